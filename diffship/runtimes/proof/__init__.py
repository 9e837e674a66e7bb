"""Whether an engine computes what the original did: golden vectors, block by block, and which node errs."""
