"""How prompts are read: weights, breaks, chunks of 77 tokens, and what becomes of an encoder's states."""
