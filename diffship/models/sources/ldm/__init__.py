"""Checkpoints in one file with the names of the original code (CompVis LDM, Stability's generative-models, OpenCLIP):
which tensor of diffusers is which tensor there, and the configs that shapes tell."""
