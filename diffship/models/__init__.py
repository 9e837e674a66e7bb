"""Torch side of a pipeline: sources, components, stages, costs and architectures."""
