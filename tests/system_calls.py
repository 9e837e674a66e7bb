"""What a process asked of the system, as `strace` saw it: which files it wrote, which names and hosts it wanted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

PROMISED = "DIFFSHIP_STRACE"  # set where strace must be there: a test that needs it then fails instead of being skipped
_OPENS = {"open", "openat", "openat2"}
# Calls that only look (stat, access) are most of all, cost most of the time, and are left out.
_FILES = _OPENS | {
    *("creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("unlink", "unlinkat", "rmdir", "mknod", "mknodat", "truncate"),
}
_TO = {"connect", "sendto", "sendmsg", "sendmmsg"}
_CALL = re.compile(r"\d+ +(\w+)\((.*)")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_ADDRESS = re.compile(r'sa_family=AF_INET6?, .*?port=htons\((\d+)\).*?(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"')
# glibc reads one of the first two before it asks anybody for an address; the last is systemd's
_RESOLVERS = ("/etc/resolv.conf", "/etc/hosts", "/run/systemd/resolve/io.systemd.Resolve")
_NOWHERE = ("/dev/null", "/dev/tty", "/dev/pts", "/proc/self", "/proc/thread-self")


def require_strace() -> None:
    """Skip without strace, and say why; fail where it was promised."""
    lacking = "strace is not installed (apt-get install strace)"
    if shutil.which("strace") is not None:
        tried = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True, timeout=30)
        lacking = f"strace may not trace here: {tried.stderr[:200]}" if tried.returncode else ""
    if lacking and os.environ.get(PROMISED):
        pytest.fail(f"{PROMISED} promises strace, but {lacking}")
    if lacking:
        pytest.skip(f"{lacking}: what is written and looked up cannot be seen")


def traced(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> tuple[str, str]:
    """(trace, what was said) of a command that must succeed, and of its children; it runs in `folder`."""
    file = folder.parent / "trace"
    # `?`: an architecture may lack it; -y: the folder behind a descriptor is told
    calls = ",".join(["%network", *(f"?{name}" for name in sorted(_FILES))])
    strace = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-o", str(file), "-e", f"trace={calls}"]
    done = subprocess.run(
        [*strace, *command], cwd=folder, env=dict(env), capture_output=True, text=True, errors="replace", timeout=280
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return file.read_text(encoding="utf-8", errors="replace"), done.stdout + done.stderr


def asked(trace: str) -> list[str]:
    """The lines in which a name is looked up, or another machine is spoken to."""
    return [line for line in trace.splitlines() if _asks(line)]


def written(trace: str, folder: Path, allowed: Iterable[str | Path]) -> list[str]:
    """Paths that were made, written, moved or removed, or where that was tried, outside `allowed` places."""
    places = [*_NOWHERE, *map(str, allowed)]
    found = dict.fromkeys(path for line in trace.splitlines() for path in _writes(line, folder))
    return [path for path in found if not any(_within(path, place) or _within(place, path) for place in places)]


def _within(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


def _asks(line: str) -> bool:
    call = _CALL.match(line)
    if call is None:
        return False
    name, words = call.groups()
    if name in _OPENS | _TO and any(f'"{resolver}"' in words for resolver in _RESOLVERS):
        return True
    address = _ADDRESS.search(words) if name in _TO else None
    # a name server may well be this machine: without /etc/resolv.conf glibc asks 127.0.0.1
    return address is not None and (address[1] == "53" or not address[2].startswith(("127.", "::1")))


def _writes(line: str, folder: Path) -> list[str]:
    call = _CALL.match(line)
    if call is None or call[1] not in _FILES:
        return []
    name, words = call.groups()
    if name in _OPENS and not re.search("O_WRONLY|O_RDWR|O_CREAT", words.rpartition('"')[2]):
        return []
    paths = [os.path.normpath(os.path.join(start or folder, path)) for start, path in _PATH.findall(words)]
    return paths[1:] if name.startswith("symlink") else paths  # the first is what the link says
