"""Parts of a pipeline: how each is built, and its layers in the order in which they run."""
