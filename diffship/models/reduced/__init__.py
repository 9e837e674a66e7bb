"""Published reductions of U-Nets: which layers stay, and how wide they are."""
