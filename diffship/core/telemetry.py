"""Telemetry of the packages that we stand on: off, before any of them is imported.

`import diffship` does it, the first thing in every process: the command, a library's user, an engine's child, a peer to
be measured. What a package does while it is imported cannot be taken back; one that was imported before diffship is as
its user left it.
"""

from __future__ import annotations

import os
import sys

# A variable that the user has set keeps its value.
VARIABLES = {
    # from 1.24 on: a device id and a file of events below the home, and its vendor's host looked up
    "ORT_DISABLE_TELEMETRY": "1",
    # huggingface_hub and what asks the hub through it: more in the requests than the file that is asked for, and a list
    # of coding agents, fetched to be found among them
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# `import openvino` brings its tools, and they write a client id and tell an analytics host of the import. No variable
# stops that but one that says that this is CI. They do without this package where it is not installed.
ABSENT = ("openvino_telemetry",)


def refuse() -> None:
    """Tell every package by its own means; none is imported. A second call changes nothing."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in ABSENT:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # to `import`, a module that is not there
