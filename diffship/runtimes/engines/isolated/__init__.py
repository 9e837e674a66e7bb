"""An engine in a process of its own, so that a crash inside it takes a call and not the program.

A batch's latents, samplers and noise stay with the caller; only the feeds and outputs of a call travel.
"""
