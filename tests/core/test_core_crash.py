from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from diffship.core import atomic, leftovers
from diffship.core import bundle as bundle_module
from diffship.core.atomic import write_file, write_new
from diffship.core.bundle import Bundle, Manifest, write_bundle
from diffship.core.errors import BundleError, ConfigError

Fill = Callable[..., None]

# writes generation after generation of one bundle; every file of a generation holds its number
WRITER = """
import sys
from pathlib import Path
from diffship.core.bundle import Manifest, Part, write_bundle
from diffship.core.family import Family
from diffship.core.spec import TensorSpec
import diffship.core.bundle as bundle
place, generation, limit, swap = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if swap == "two-steps":
    bundle.exchange = lambda first, second: False
spec = (TensorSpec("x", "float32", (1,)),)
print("ready", flush=True)
for number in range(generation, generation + limit):
    with write_bundle(place, overwrite=True) as draft:
        names = [f"part{index}.dat" for index in range(12)]
        for name in names:
            (draft.folder / name).write_text(f"{number}\\n" * 2000)
        draft.finish(Manifest("sample", Family("sd"), (Part("p", tuple(names), spec, spec, "fp32", "0" * 64),)))
print("done", flush=True)
"""


def start(place: Path, generation: int, limit: int = 10**9, swap: str = "exchange") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(place), str(generation), str(limit), swap]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def write_once(place: Path, generation: int) -> None:
    assert start(place, generation, 1).communicate(timeout=60)[0].endswith("done\n")


def generation_of(place: Path) -> int:
    opened = Bundle.open(place)
    opened.verify()
    numbers = {line for name in opened.manifest.files for line in opened.file(name).read_text().split()}
    assert len(numbers) == 1, "files of several generations in one bundle"
    return int(numbers.pop())


@pytest.mark.slow
@pytest.mark.parametrize("swap", ["exchange", "two-steps"])
def test_sigkill_at_50_random_moments_leaves_old_or_new(swap: str, tmp_path: Path) -> None:
    place, generator, seen = tmp_path / "bundle", random.Random(0), set()
    with start(place, 0, 1) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        begin = time.perf_counter()
        assert writer.stdout.read() == "done\n"
        one_write = time.perf_counter() - begin
    for attempt in range(50):
        writer = start(place, 1000 * attempt, swap=swap)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0, 3 * one_write))
        writer.kill()
        writer.wait(10)
        writer.stdout.close()
        for path in tmp_path.iterdir():
            assert path == place or path.name.startswith((".bundle.partial-", ".bundle.old-"))
        if swap == "two-steps":
            leftovers.remove_leftovers(place)
        seen.add(generation_of(place))
    assert len(seen) > 5
    write_once(place, 10**6)
    assert generation_of(place) == 10**6
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.slow
def test_two_processes_writing_one_place_never_mix(tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    write_once(place, 0)
    writers = [start(place, 1000, 25), start(place, 2000, 25)]
    while any(writer.poll() is None for writer in writers):
        # a reader may catch the moment of the swap between its own opens; what it sees settled is one generation
        time.sleep(0.05)
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.read().endswith("done\n")
        writer.stdout.close()
    assert generation_of(place) in (1024, 2024)
    assert list(tmp_path.iterdir()) == [place]


def _limited() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 11, 1 << 11))


def test_a_full_disk_leaves_the_old_bundle(bundle: Bundle, tmp_path: Path) -> None:
    before = (bundle.path / "diffship.json").read_bytes()
    command = [sys.executable, "-c", WRITER, str(bundle.path), "0", "1", "exchange"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limited, timeout=60)
    assert result.returncode == 1 and "File too large" in result.stderr
    assert (bundle.path / "diffship.json").read_bytes() == before
    bundle.verify()
    assert list(tmp_path.iterdir()) == [bundle.path]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_io_error_in_any_rename_leaves_the_old_bundle(
    failing: int, bundle: Bundle, manifest: Manifest, fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = os.replace

    def replace(source: object, target: object) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.EIO, "fake")
        real(source, target)  # type: ignore[call-overload]

    monkeypatch.setattr("diffship.core.bundle.exchange", lambda first, second: False)
    with pytest.raises(OSError, match="fake"), write_bundle(bundle.path, overwrite=True) as draft:
        fill(draft.folder, 2)
        monkeypatch.setattr(os, "replace", replace)
        draft.finish(manifest)
    monkeypatch.undo()
    Bundle.open(bundle.path).verify()
    assert Bundle.open(bundle.path).file("unet/config.json").read_text() == '{"value": 1}'
    assert list(tmp_path.iterdir()) == [bundle.path]


def test_a_bundle_that_was_moved_aside_comes_back(bundle: Bundle, tmp_path: Path) -> None:
    bundle.path.rename(tmp_path / ".bundle.old-0123abcd")
    with pytest.raises(ConfigError, match="exists already"), write_bundle(bundle.path):
        pass
    Bundle.open(bundle.path).verify()
    assert list(tmp_path.iterdir()) == [bundle.path]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path, fill: Fill, manifest: Manifest) -> None:
    dead, other = tmp_path / ".b.partial-dead0000", tmp_path / ".bb.partial-dead0000"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "x").write_text("x")
    with write_bundle(tmp_path / "b") as living:
        fill(living.folder)
        with write_bundle(tmp_path / "b"):
            assert not dead.exists() and other.exists() and living.folder.exists()
        living.finish(manifest)
    Bundle.open(tmp_path / "b").verify()


def test_a_link_named_like_a_leftover_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.mkdir()
    (target / "x").write_text("x")
    (tmp_path / ".b.partial-00000000").symlink_to(target)
    with write_bundle(tmp_path / "b"):
        pass
    assert (target / "x").exists()


def test_a_place_taken_at_the_last_moment_is_kept(
    tmp_path: Path, manifest: Manifest, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "b"

    def taken_meanwhile(path: Path, overwrite: bool) -> None:
        path.mkdir()
        (path / "x").touch()

    with pytest.raises(BundleError, match="theirs is kept"), write_bundle(place) as draft:
        fill(draft.folder)
        monkeypatch.setattr(bundle_module, "_refuse_target", taken_meanwhile)
        monkeypatch.setattr(bundle_module, "_is_free", lambda path: True)
        draft.finish(manifest)
    assert [path.name for path in place.iterdir()] == ["x"]


def test_write_file_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_file(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, _raise)
            with pytest.raises(OSError, match="fake"):
                write_file(path, b"new")
        assert path.read_bytes() == "ä".encode() and list(tmp_path.iterdir()) == [path]


def _raise(*_: object) -> None:
    raise OSError(errno.EIO, "fake")


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_exchange_swaps_or_says_no(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/x").touch()
    swapped = atomic.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / ("b" if swapped else "a") / "x").exists()
    assert atomic.exchange(tmp_path / "a", tmp_path / "none") is False


def test_what_is_no_plain_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "folder"):
        with pytest.raises(FileExistsError, match="is no plain file, and never replaced"):
            write_file(tmp_path / name, b"x")
    write_file(tmp_path / "link", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]
    assert (tmp_path / "pipe").is_fifo() and not (tmp_path / "link").is_symlink()
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("links", [True, False])
def test_writers_of_one_new_name_lose_nothing(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise PermissionError("a file system without hard links")

    if not links:
        monkeypatch.setattr(os, "link", none)
    places = [write_new(tmp_path / "a.png", bytes([number])) for number in range(3)]
    assert [place.name for place in places] == ["a.png", "a-2.png", "a-3.png"]
    assert [place.read_bytes() for place in places] == [b"\0", b"\1", b"\2"]
    (tmp_path / "b.png").symlink_to("nowhere")
    assert write_new(tmp_path / "b.png", b"x").name == "b-2.png"
    assert len(list(tmp_path.iterdir())) == 5 and places[0].stat().st_nlink == 1
    monkeypatch.setattr(atomic, "_PLACES", 2)
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a.png", b"x")
    assert len(list(tmp_path.iterdir())) == 5
