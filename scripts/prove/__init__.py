"""Proving published checkpoints on a networked machine: the logic of scripts/prove_real.py."""
