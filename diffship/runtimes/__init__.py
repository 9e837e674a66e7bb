"""What runs a bundle: engines, the proof of them, and serve, handoff and partition on top; nothing here needs torch."""
