"""Nouns that everything else stands on: numpy and the standard library, never torch."""
