from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino")

# the core is first asked in the main thread; a session is let go of by another one, as servers and notebooks do
PROGRAM = """
import gc, signal, sys, threading
from pathlib import Path
from diffship.runtimes.engines.openvino import OpenVinoRunner

heard = []
signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
assert OpenVinoRunner.probe().available
held = [OpenVinoRunner(threads=1).open([Path(sys.argv[1])])]

def let_go():
    held.pop().close()
    gc.collect()

thread = threading.Thread(target=let_go)
thread.start()
thread.join()
signal.raise_signal(signal.SIGINT)
print(heard == [signal.SIGINT])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_is_heard_after_another_thread_has_closed_a_model(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny_bundle / "vae_decoder" / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
