"""Noise, samplers, trajectories, the denoising loop and `generate`: numpy, and a Model's protocol, never torch."""
