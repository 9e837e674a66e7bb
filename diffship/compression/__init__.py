"""Passes that make a pipeline smaller or faster: layouts, pruning, distillation, few-step and VAE siblings."""
