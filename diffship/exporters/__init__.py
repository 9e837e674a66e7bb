"""Exporters: a Pipeline's components, compiled for one target; runtimes open what they write."""
