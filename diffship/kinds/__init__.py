"""Kinds of models: one file per kind, which knows its parts, its conditioning and its diffusers folders.

The registry names them (`core.registry.KINDS`); the other rooms reach them by `family.kind` and never import this one.
"""
