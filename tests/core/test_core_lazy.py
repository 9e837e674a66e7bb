from __future__ import annotations

import copy
import json
import sys
import tomllib
from collections import UserDict
from pathlib import Path

import pytest

from diffship.core.errors import MissingExtra
from diffship.core.lazy import EXTRAS, lazy, lazy_base, need

ROOT = Path(__file__).parents[2]


class Named(lazy_base("collections", "UserDict")):  # type: ignore[misc]
    """A derived class that was made before its base was imported."""

    def __init__(self, name: str, data: dict[str, int]) -> None:
        super().__init__(data)
        self.name = name


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)  # what diffusers stands on is there
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    called, extra = EXTRAS[name]
    with pytest.raises(MissingExtra) as caught:
        need(name)
    assert str(caught.value) == f"{called} is not installed. Run: pip install 'diffship[{extra}]'"
    with pytest.raises(MissingExtra, match=rf"diffship\[{extra}\]"):
        _ = lazy(f"{name}.within").anything


@pytest.mark.parametrize("name", EXTRAS)
def test_the_extra_that_is_named_installs_the_package(name: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    called, extra = EXTRAS[name]
    assert any(line.startswith(f"{called}>=") for line in extras[extra])


@pytest.mark.parametrize("name", ["diffusers", "transformers"])
def test_packages_that_import_without_torch_and_do_nothing_name_torch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, name, sys)
    with pytest.raises(MissingExtra, match=r"^torch is not installed"):
        need(name)


def test_other_packages_and_faults_inside_a_package_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        need("no_such_module")
    monkeypatch.setitem(sys.modules, "torch", json)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lazy("json").nothing


def test_nothing_is_imported_before_it_is_used() -> None:
    module = lazy("no_such_module.at_all")
    assert repr(module) == "<lazy module 'no_such_module.at_all'>"
    with pytest.raises(ModuleNotFoundError):
        _ = module.anything


def test_attributes_are_those_of_the_module_at_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = lazy("json.encoder")
    assert module.JSONEncoder is json.JSONEncoder
    monkeypatch.setattr(json.encoder, "JSONEncoder", dict)
    assert module.JSONEncoder is dict


def test_a_class_joins_its_base_when_it_is_used() -> None:
    assert not issubclass(Named, UserDict)
    one, other = Named("a", {"x": 1}), Named("b", {})
    assert isinstance(one, Named) and isinstance(one, UserDict) and type(one) is type(other)
    assert (type(one).__name__, type(one).__module__, type(one).__doc__) == ("Named", __name__, Named.__doc__)
    assert one["x"] == 1 and one.name == "a"


def test_copies_of_such_an_instance_are_of_its_class() -> None:
    one = Named("a", {"x": 1})
    for twin in (copy.copy(one), copy.deepcopy(one)):
        assert type(twin) is type(one) and twin == one and twin.name == "a"


def test_a_class_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "torch.nn"):  # an earlier test may have imported either
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]

    class Net(lazy_base("torch.nn", "Module")):  # type: ignore[misc]
        pass

    with pytest.raises(MissingExtra, match=r"diffship\[torch\]"):
        Net()
