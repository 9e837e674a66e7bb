"""No telemetry: what every verb writes and looks up, with an empty home, as the system saw it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from system_calls import asked, require_strace, traced, written

from diffship.cli.main import VERBS
from diffship.core.registry import RUNNERS
from diffship.core.telemetry import ABSENT, VARIABLES

ROOT = Path(__file__).parents[1]
WORK = Path("/w")  # the current folder of the recorded lines
HOME = "/home/user"

# Recorded of onnxruntime 1.32 and openvino 2026.4 with nothing set, the home's path replaced.
TOLD = {
    "onnxruntime's events": f'8613  openat(AT_FDCWD</w>, "{HOME}/.cache/Microsoft/DeveloperTools/.onnxruntime/'
    'onnxruntime.db", O_RDWR|O_CREAT|O_NOFOLLOW|O_CLOEXEC, 0644) = 3<...>',
    "onnxruntime's folder": f'8613  mkdir("{HOME}/.cache/Microsoft", 0700) = 0',
    "onnxruntime's device id": f'8613  linkat(6<{HOME}/.cache/Microsoft/DeveloperTools/.onnxruntime>, "deviceid.tmp.1c'
    f'9d", 6<{HOME}/.cache/Microsoft/DeveloperTools/.onnxruntime>, "deviceid", 0) = 0',
    "openvino's client id": f'8608  openat(AT_FDCWD</w>, "{HOME}/intel/openvino_ga_cid", '
    "O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0666) = 3<...>",
}
LOOKED_UP = {
    "the resolver's file": '8684  openat(AT_FDCWD</w>, "/etc/resolv.conf", O_RDONLY|O_CLOEXEC) = 8</etc/resolv.conf>',
    "a name server": "8684  connect(8<socket:[14749]>, {sa_family=AF_INET, sin_port=htons(53), "
    'sin_addr=inet_addr("10.255.255.53")}, 16 <unfinished ...>',
    "a name server on this machine": "8684  connect(8<socket:[14749]>, {sa_family=AF_INET, sin_port=htons(53), "
    'sin_addr=inet_addr("127.0.0.1")}, 16) = 0',
    "systemd": "8615  connect(6<socket:[14741]>, {sa_family=AF_UNIX, "
    'sun_path="/run/systemd/resolve/io.systemd.Resolve"}, 42) = 0',
    "another machine": "91  connect(7<socket:[3]>, {sa_family=AF_INET6, sin6_port=htons(443), sin6_flowinfo=htonl(0), "
    'inet_pton(AF_INET6, "2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = -1 ENETUNREACH (Network is unreachable)',
    "a datagram": '91  sendto(7<socket:[3]>, "x", 1, 0, {sa_family=AF_INET, sin_port=htons(9), '
    'sin_addr=inet_addr("192.0.2.1")}, 16) = 1',
}
INNOCENT = {
    "reading": f'7302  openat(AT_FDCWD</w>, "{HOME}/.config/x.toml", O_RDONLY|O_CLOEXEC) = -1 ENOENT (No such file)',
    "a result": '6762  rename("out/.a.png.partial-ce33284c", "out/a.png") = 0',
    "a removed folder": '6762  unlinkat(6</w/out/tmp>, "stage.onnx", 0) = 0',
    "a user's name": '6313  connect(3<socket:[10494]>, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1',
    "our own server": "8501  connect(9<socket:[1]>, {sa_family=AF_INET, sin_port=htons(46391), "
    'sin_addr=inet_addr("127.0.0.1")}, 16) = -1 EINPROGRESS (Operation now in progress)',
    "its answer": '8504  sendto(8<socket:[13970]>, "HTTP/1.1 200 OK \\"/etc/hosts\\"", 200, 0, NULL, 0) = 200',
    "nothing": '1  openat(AT_FDCWD</w>, "/dev/null", O_RDWR|O_CLOEXEC) = 3</dev/null>',
    "a user's link": '1  symlink("/usr/lib/x", "out/link") = 0',
}


@pytest.mark.parametrize("name", TOLD)
def test_the_check_sees_what_is_written_beside_the_stated_places(name: str) -> None:
    assert written(TOLD[name], WORK, [WORK, f"{HOME}/.cache/diffship"]) != []


@pytest.mark.parametrize("name", LOOKED_UP)
def test_the_check_sees_a_lookup(name: str) -> None:
    assert asked(LOOKED_UP[name]) == [LOOKED_UP[name]]


@pytest.mark.parametrize("name", INNOCENT)
def test_the_check_lets_work_pass(name: str) -> None:
    assert asked(INNOCENT[name]) == [] and written(INNOCENT[name], WORK, [WORK]) == []


SET = """
import json, os, sys
os.environ.update(json.loads(sys.argv[1]))
import diffship
from diffship.core.child import environment
absent = {name: sys.modules.get(name, "importable") for name in json.loads(sys.argv[2])}
print(json.dumps([{name: environment().get(name) for name in json.loads(sys.argv[3])}, absent]))
"""


@pytest.mark.parametrize("chosen", [{}, {"ORT_DISABLE_TELEMETRY": "0"}])
def test_importing_the_package_switches_telemetry_off_unless_the_user_has_chosen(chosen: dict[str, str]) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"PYTHONPATH": str(ROOT)}
    words = [json.dumps(chosen), json.dumps(ABSENT), json.dumps(list(VARIABLES))]
    done = subprocess.run(
        [sys.executable, "-c", SET, *words], capture_output=True, text=True, env=clean, timeout=60, check=True
    )
    children, absent = json.loads(done.stdout)
    assert children == {**VARIABLES, **chosen}
    assert absent == dict.fromkeys(ABSENT)


def test_the_install_page_names_each_variable() -> None:
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert [name for name in (*VARIABLES, *ABSENT) if f"`{name}" not in page] == []


TINY = "arch:tiny-sd"
CUT = ("--parts", "vae_decoder")
# What runs in one process, one verb after the other. BUNDLE and DATA are filled in.
RUNS: dict[str, list[Sequence[str]]] = {
    "onnxruntime": [
        ("run", "BUNDLE", "cat", "--steps", "1"),
        ("verify", "BUNDLE", "--reduce"),
        ("verify", "BUNDLE", "--polygraphy", "polygraphy"),
        ("inspect", "BUNDLE"),
    ],
    "openvino": [
        ("doctor",),
        ("run", "BUNDLE", "cat", "--steps", "1", "--engine", "openvino"),
        ("verify", "BUNDLE", "--engine", "openvino"),
    ],
    "torch": [
        ("export", TINY, "--to", "onnx", *CUT, "-o", "exported"),
        ("inspect", TINY),
        ("run", TINY, "cat", "--steps", "1"),
        ("compare", "BUNDLE", TINY, *CUT, "--steps", "1"),
        ("compress", TINY, "--pass", "prune", "--set", "parameters=0.8", "-o", "pruned"),
        ("compress", TINY, "--pass", "distill", "--set", "steps=1", "--set", "data=DATA", "-o", "distilled"),
        ("compress", TINY, "--pass", "layout", "--set", "name=bk-tiny", "--dry-run"),
        ("calibrate", TINY, "--samples", "1", "--steps", "1", "-o", "ranges"),
        ("train", "emoji-vae", "--data", "DATA", "-o", "runs", "--steps", "1", "--batch", "1"),
    ],
    "tensorrt": [("export", TINY, "--to", "tensorrt", *CUT, "--sm", "89", "-o", "plans")],
    "mil": [
        ("export", TINY, "--to", "coreml", "--parts", "text_encoder", "--width", "64", "-o", "packages"),
        ("verify", "packages", "--engine", "mil"),
    ],
    "bench": [
        ("bench", "BUNDLE", *CUT, "--rounds", "1", "--calls", "1", "--plots", "plots", "-o", "r.json"),
    ],
}  # fmt: skip
VERBS_IN_TURN = """
import json, sys
from diffship.cli.main import main
for words in json.loads(sys.argv[1]):
    if code := main(words):
        sys.exit(f"{words}: exit code {code}")
"""
SERVED = """
import re, subprocess, sys
from diffship.cli.main import main
bundle = sys.argv[1]
command = [sys.executable, "-m", "diffship", "serve", f"tiny={bundle}", "--port", "0"]
serving = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
url = next(found[1] for line in serving.stderr if (found := re.match(r"ready on (\\S+)", line)))
code = main(["run", bundle, "cat", "--cloud", url, "--split", "1,1", "-o", "cat.png"])
serving.terminate()
sys.exit(code or serving.wait(60))
"""
NEEDS = {"openvino": "openvino", "tensorrt": "tensorrt_rtx_bindings", "bench": "matplotlib", "torch": "torch_pruning"}
NEEDS["mil"] = "coremltools"


def environment(base: Path) -> dict[str, str]:
    """Nothing of the user's: an empty home and temporary folder, no CI, no choice about telemetry or caches."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    for name in ("home", "tmp", "work"):
        (base / name).mkdir()
    ours = {"HOME": str(base / "home"), "TMPDIR": str(base / "tmp"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, "PYTHONDONTWRITEBYTECODE": "1"}


def require_silence(trace: str, base: Path, more: Sequence[str | Path] = ()) -> None:
    """Nobody is asked, and nothing is written but where docs/install.md says so."""
    assert asked(trace) == []
    stated = [base / "work", base / "tmp", base / "home/.cache/diffship", *more]
    assert written(trace, base / "work", stated) == []
    left = sorted(path.name for path in (base / "tmp").iterdir())
    assert [name for name in left if not re.fullmatch(r"diffship-\d+\.lock|torchinductor_\w+", name)] == []
    assert [path for folder in (base / "tmp").glob("torchinductor_*") for path in folder.iterdir()] == []


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures with captions."""
    folder = tmp_path / "data"
    folder.mkdir()
    record = {"style": "fluent", "domain": True, "concept": "apple", "text": "red apple", "tags": [], "tone": None}
    lines = []
    for name, split in (("a.png", "train"), ("b.png", "held_out")):
        Image.new("RGB", (128, 128), "red").save(folder / name)
        lines.append(json.dumps({**record, "file_name": name, "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_verbs_write_where_it_is_stated_and_ask_nobody(
    name: str, tmp_path: Path, tiny_bundle: Path, data: Path
) -> None:
    require_strace()
    pytest.importorskip(NEEDS.get(name, name))
    base = tmp_path / "traced"
    base.mkdir()
    filled = {"BUNDLE": str(tiny_bundle), "data=DATA": f"data={data}", "DATA": str(data)}
    words = json.dumps([[filled.get(word, word) for word in run] for run in RUNS[name]])
    trace, _ = traced([sys.executable, "-c", VERBS_IN_TURN, words], base / "work", environment(base))
    home = base / "home"
    # matplotlib's own, and of the fontconfig that it asks for fonts
    drawn = [home / ".config/matplotlib", home / ".cache/matplotlib", home / ".cache/fontconfig"]
    require_silence(trace, base, [*drawn, home / ".fontconfig", "/var/cache/fontconfig"] if name == "bench" else ())


@pytest.mark.slow
def test_a_server_and_its_client_ask_each_other_alone(tmp_path: Path, tiny_bundle: Path) -> None:
    require_strace()
    pytest.importorskip("fastapi")
    trace, said = traced([sys.executable, "-c", SERVED, str(tiny_bundle)], tmp_path / "work", environment(tmp_path))
    require_silence(trace, tmp_path)
    assert "tiny: 1 calls" in said  # the server was asked, or the trace shows nothing
    assert 'inet_addr("127.0.0.1")' in trace


def test_every_verb_and_engine_is_traced() -> None:
    ran = [run for runs in RUNS.values() for run in runs]
    assert {run[0] for run in ran} | {"serve"} == set(VERBS)
    assert set(RUNNERS) <= set(RUNS)


TELLS = """
import os, pathlib, socket
import diffship
place = pathlib.Path.home() / "device-id"
place.write_text("1")
place.unlink()
try:
    socket.getaddrinfo("telemetry.invalid", 443)
except OSError:
    pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:  # sends nothing
    try:
        asking.connect(("192.0.2.1", 9))
    except OSError:
        pass
"""


@pytest.mark.slow
def test_a_live_trace_shows_a_program_that_tells(tmp_path: Path) -> None:
    require_strace()
    trace, _ = traced([sys.executable, "-c", TELLS], tmp_path / "work", environment(tmp_path))
    assert written(trace, tmp_path / "work", [tmp_path / "work"]) == [str(tmp_path / "home/device-id")]
    assert any("resolv" in line or "/etc/hosts" in line for line in asked(trace))
    assert any("192.0.2.1" in line for line in asked(trace))
