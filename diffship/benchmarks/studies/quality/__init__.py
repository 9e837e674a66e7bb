"""What pictures are worth: scored, judged and compared over models that were trained anew."""
