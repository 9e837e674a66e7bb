"""A bundle that is replaced behind a running server: nothing is drawn with other weights than those that it names."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from serve_toy import until

from diffship.core.bundle import Bundle
from diffship.runtimes.serve.files import Files, ReplacedError, identity
from diffship.runtimes.serve.forms import GenerateForm
from diffship.runtimes.serve.opened import open_served
from diffship.runtimes.serve.options import ServeOptions
from diffship.runtimes.serve.order import generate_order
from diffship.runtimes.serve.service import Service

WEIGHTS = "unet/model.onnx_data"


def swap_folder(path: Path) -> None:
    """What `export --overwrite` does: the new folder takes the place of the old one in one step."""
    shutil.copytree(path, path.with_name("tuned"))
    _tune(path.with_name("tuned"))
    path.rename(path.with_name("old"))
    path.with_name("tuned").rename(path)


def swap_file(path: Path) -> None:
    """What a synchronising program does."""
    shutil.copy2(path / WEIGHTS, path / "new")
    os.replace(path / "new", path / WEIGHTS)


def write_over(path: Path) -> None:
    _tune(path)


def _tune(path: Path) -> None:
    weights = np.fromfile(path / WEIGHTS, np.float32)
    (weights * np.float32(0.97)).tofile(path / WEIGHTS)


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "model"))


@pytest.mark.parametrize("change", [swap_folder, swap_file, write_over])
def test_files_that_are_not_those_of_before(copied: Path, change: Callable[[Path], None]) -> None:
    files = Files(Bundle.open(copied), identity(copied / "diffship.json"))
    assert files.lost() == ""
    change(copied)
    assert files.lost() == "replaced"
    with pytest.raises(ReplacedError, match="are replaced since the server opened it; start the server anew"):
        files.require_same()
    (copied / WEIGHTS).unlink()
    assert files.lost() == "missing"


def test_a_folder_that_is_swapped_while_it_is_opened_is_noticed(copied: Path) -> None:
    before = identity(copied / "diffship.json")
    swap_folder(copied)
    with pytest.raises(ReplacedError):
        Files(Bundle.open(copied), before)


@contextmanager
def served(bundle: Path) -> Iterator[Service]:
    with open_served({"toy": str(bundle)}, "onnxruntime", {"threads": 1}) as models:
        service = Service(models, ServeOptions())
        service.start()
        until(service.ready, 30)
        try:
            yield service
        finally:
            service.close()


def drawn(service: Service) -> tuple[bytes, dict[str, object]]:
    worker = service.worker("toy")
    order = generate_order(GenerateForm(prompt="cat", steps=2, seed=1, response="json"), worker.served.model)
    return service.submit(worker, order).result(30).pictures[0]


@pytest.mark.slow
@pytest.mark.parametrize("change", [swap_folder, swap_file])
def test_an_engine_that_dies_is_not_started_with_other_files(copied: Path, change: Callable[[Path], None]) -> None:
    """The process ends with that reason, and whoever supervises it starts it anew: with names that are right."""
    with served(copied) as service:
        before = drawn(service)
        change(copied)
        assert drawn(service) == before, "the engine has read the old files"
        assert service.states() == {"toy": "replaced"} and service.ready()
        engine = service.worker("toy").served.model.opener.pid  # type: ignore[attr-defined]
        os.kill(engine, signal.SIGKILL)
        assert service.broken.wait(30)
        assert isinstance(service.fault(), ReplacedError) and service.states() == {"toy": "broken"}
    if change is swap_folder:
        with served(copied) as service:
            picture, _ = drawn(service)
            assert picture != before[0] and service.states() == {"toy": "ready"}


@pytest.mark.slow
def test_an_engine_that_dies_over_the_same_files_is_started_again(copied: Path) -> None:
    with served(copied) as service:
        before = drawn(service)
        os.kill(service.worker("toy").served.model.opener.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        until(lambda: not service.ready(), 30)
        until(service.ready, 30)
        assert drawn(service) == before
