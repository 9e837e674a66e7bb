"""The `diffship` command: one file per verb, which reads flags, calls one function of a room and prints."""
