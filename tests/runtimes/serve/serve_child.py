"""A server of a slow toy model in a process of its own: `serve_child.py DELAY GRACE BATCH`."""

from __future__ import annotations

import sys
from collections import deque

from serve_toy import HeldModel

from diffship.core.errors import DiffshipError
from diffship.runtimes.serve.connections import bind
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.server import serve_until_asked
from diffship.runtimes.serve.service import Service
from diffship.runtimes.serve.worker import Served

delay, grace, batch = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
model = HeldModel(delay=delay)
model.batches = deque(maxlen=1)  # what the toy writes down would be memory that grows
for runner in model.runners.values():
    runner.calls = deque(maxlen=1)
service = Service([Served("toy", model)], ServeOptions(grace=grace, batch=batch))
try:
    serve_until_asked(service, bind("127.0.0.1", 0))
except DiffshipError as fault:
    print(fault, file=sys.stderr)
    sys.exit(fault.exit_code)
