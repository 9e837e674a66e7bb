"""Prompts, activation ranges and sensitivity that exporters and passes share."""
