from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from diffship.core import job as job_module
from diffship.core.errors import Cancelled, ConfigError, SourceError, UnsupportedError
from diffship.core.job import Job, available_memory, digest_of, kept_json, require_disk, require_memory
from diffship.core.leftovers import claim_folder, temporary_folder

DIGEST = "0123456789abcdef"


def test_once_makes_once_and_resumes(tmp_path: Path) -> None:
    calls = []

    def make(path: Path) -> None:
        calls.append(path)
        path.write_text("result")

    for _ in range(2):
        assert Job(tmp_path / "cache").once(DIGEST, make).read_text() == "result"
    assert len(calls) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [DIGEST]


def test_once_takes_folders(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "a").write_text("1")

    assert (Job(tmp_path).once(DIGEST, make) / "a").read_text() == "1"


def test_a_failure_or_nothing_written_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Job(tmp_path).once(DIGEST, fail)
    with pytest.raises(ConfigError, match="nothing was written"):
        Job(tmp_path).once(DIGEST, lambda path: None)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_is_made_again(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom diffship.core.job import Job\n"
        "def make(path):\n path.write_text('half'); os.kill(os.getpid(), 9)\n"
        f"Job(sys.argv[1]).once({DIGEST!r}, make)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -9
    assert [path.name[:26] for path in tmp_path.iterdir()] == [f".{DIGEST}.partial-"]
    assert Job(tmp_path).once(DIGEST, lambda path: path.write_text("whole")).read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == [DIGEST]


def test_two_threads_at_once_agree(tmp_path: Path) -> None:
    barrier, results = threading.Barrier(2, timeout=10), []

    def make(path: Path) -> None:
        barrier.wait()
        path.mkdir()
        (path / "a").write_text("same")

    threads = [threading.Thread(target=lambda: results.append(Job(tmp_path).once(DIGEST, make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert results == [tmp_path / DIGEST] * 2
    assert [path.name for path in tmp_path.iterdir()] == [DIGEST]


@pytest.mark.parametrize(
    "digest", ["", "short", "../../etc/passwd", "a/bcdefghi", ".hidden-digest", "A" * 64, "a" * 200]
)
def test_only_digests_name_results(digest: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a digest"):
        Job(tmp_path).once(digest, lambda path: path.touch())


def test_without_a_folder_the_cache_goes_with_the_job() -> None:
    job = Job()
    made = job.once(DIGEST, lambda path: path.write_text("x"))
    folder = job.folder
    assert made.exists() and folder.stat().st_mode & 0o777 == 0o700
    del job
    assert not folder.exists()


def test_progress_and_cancel() -> None:
    heard: list[tuple[str, int, int]] = []
    stop = False
    job = Job(progress=lambda *report: heard.append(report), cancel=lambda: stop)
    job.progress("weights", 1, 3)
    stop = True
    with pytest.raises(Cancelled, match="run the same command again"):
        job.progress("weights", 2, 3)
    with pytest.raises(Cancelled):
        job.once(DIGEST, lambda path: path.touch())
    assert heard == [("weights", 1, 3), ("weights", 2, 3)]


def test_disk_and_memory_are_asked_before(tmp_path: Path) -> None:
    require_disk(tmp_path / "not/yet/there", 1)
    with pytest.raises(UnsupportedError, match=r"the export needs 1048576.0 GiB of disk at .*are free"):
        require_disk(tmp_path / "not/yet", 1 << 50, "the export")
    require_memory(1)
    with pytest.raises(UnsupportedError, match=r"the gate needs .* of memory"):
        require_memory(1 << 60, "the gate")


def test_memory_that_cannot_be_told_does_not_stop_work(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    assert free is None or 1 << 20 < free < 1 << 50
    monkeypatch.setattr(job_module, "_meminfo", lambda: None)
    monkeypatch.setattr(job_module, "_group_free", lambda: None)
    require_memory(1 << 60)
    monkeypatch.setattr(job_module, "_group_free", lambda: 10)
    with pytest.raises(UnsupportedError):
        require_memory(11)


def test_the_cache_survives_a_file_system_that_cannot_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "no fsync on folders")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert Job(tmp_path).once(DIGEST, lambda path: path.write_text("x")).read_text() == "x"


def test_digests_take_plain_data_only(tmp_path: Path) -> None:
    facts = {"path": tmp_path, "table": MappingProxyType({"a": [1, (2, None)]})}
    assert digest_of(facts) == digest_of({"path": str(tmp_path), "table": {"a": [1, [2, None]]}})
    # the text of a large array leaves its middle out
    first = np.arange(5000)
    second = first.copy()
    second[2500] = -1
    assert str(first) == str(second)
    with pytest.raises(TypeError, match="ndarray"):
        digest_of({"x": first})


def test_a_signal_right_after_a_folder_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = os.mkdir

    def interrupted(path: Path, *mode: int) -> None:
        made(path, *mode)
        raise KeyboardInterrupt

    def job() -> None:
        Job().folder.exists()

    def claimed() -> None:
        with claim_folder(tmp_path / "bundle"):
            pass

    def temporary() -> None:
        with temporary_folder("test"):
            pass

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for make in (job, claimed, temporary):
        monkeypatch.setattr(os, "mkdir", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make()
        monkeypatch.setattr(os, "mkdir", made)
        gc.collect()
        assert not list(tmp_path.iterdir()), make.__name__


@pytest.mark.parametrize("text", ["", '[[1, 2], [3, "a"', "[" * 100_000, "[[1]]", "{}", "[1]", "\xff"])
def test_what_is_kept_and_damaged_is_named_with_the_remedy(text: str, tmp_path: Path) -> None:
    place = tmp_path / "scores-1"
    place.write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=r"scores-1: is damaged .*Remove it, and the same command makes it anew"):
        kept_json(place, lambda found: [(row[0], row[1]) for row in found] or found["none"])
    place.write_text("[[1, 2]]")
    assert kept_json(place, lambda found: [tuple(row) for row in found]) == [(1, 2)]
