"""Other people's toolchains on the same weights: how each is installed, fed and run.

A peer's child runs in the peer's environment, with nothing of this package but `clock` and itself.
"""
