from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffship.core import family as family_module
from diffship.core import registry
from diffship.core.errors import ConfigError, MissingExtra, RunnerError
from diffship.core.family import Family
from diffship.core.limits import LIMITS, check_range
from diffship.core.recipe import parse_recipe, read_recipe
from diffship.core.spec import TensorSpec
from diffship.core.strict import bounds, choices, load, plain


@dataclass(frozen=True)
class Prune:
    ratio: float = field(default=0.3, metadata=bounds(0.0, 0.9))
    steps: int = field(default=10, metadata=bounds(1, 1000))
    order: str = field(default="taylor", metadata=choices("taylor", "magnitude"))
    keep: tuple[str, ...] = ()
    recover: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Onnx:
    precision: str = "fp32"
    opset: int = field(default=23, metadata=bounds(13, 25))


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    module = types.ModuleType("sample_plugin")
    module.Prune, module.Onnx = Prune, Onnx  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sample_plugin", module)
    return {"passes": {"prune": "sample_plugin:Prune"}, "exporters": {"onnx": "sample_plugin:Onnx"}}


def read(text: str, tables: dict[str, dict[str, str]], tmp_path: Path) -> Any:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return read_recipe(path, **tables)


SOUND = """
schema = 1
source = "arch:sd15"
[[pass]]
type = "prune"
ratio = 0.5
keep = ["conv_in", "conv_out"]
[[target]]
to = "onnx"
precision = "fp16"
[[target]]
to = "onnx"
opset = 18
"""


def test_sound_recipe_and_its_resolved_form(tables: dict[str, dict[str, str]], tmp_path: Path) -> None:
    recipe = read(SOUND, tables, tmp_path)
    assert recipe.passes == (("prune", Prune(0.5, keep=("conv_in", "conv_out"))),)
    assert recipe.targets == (("onnx", Onnx("fp16")), ("onnx", Onnx(opset=18)))
    resolved = recipe.to_json()
    assert resolved["pass"][0]["steps"] == 10 and resolved["target"][1]["precision"] == "fp32"
    assert parse_recipe(resolved, **tables) == recipe


WRONG = {
    'source = "a"': "the key 'schema' is missing",
    'schema = 2\nsource = "a"': "schema is 2; legal is from 1 to 1",
    'schema = true\nsource = "a"': "must be a whole number",
    'schema = 1\nsource = "a"\nsorce = "b"': "unknown key 'sorce'; did you mean 'source'?",
    'schema = 1\nsource = "a"\n[pass]\ntype = "prune"': "must be a list",
    'schema = 1\nsource = "a"\n[[pass]]\nratio = 0.5': "pass 1 has no 'type'; legal: prune",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prun"': "'prun'; did you mean 'prune'?",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nratoi = 0.5': "did you mean 'ratio'?",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nratio = 0.91': "ratio is 0.91; legal is from 0.0 to 0.9",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nratio = nan': "legal is from 0.0 to 0.9",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nratio = "0.5"': "must be a number",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nsteps = true': "must be a whole number",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nsteps = 1.0': "must be a whole number",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nrecover = 1': "must be true or false",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nkeep = "x"': "must be a list",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nkeep = [1]': "keep[0] is 1; it must be a string",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\norder = "tailor"': "did you mean 'taylor'?",
    'schema = 1\nsource = "a"\n[[pass]]\ntype = "prune"\nseed = 2020-01-01': "must be a whole number",
    "schema = ": "is not TOML",
    'schema = 1\nsource = "a"\nx = ' + "[" * 5000: "is not TOML",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[-30:].replace("\n", " "))
def test_wrong_recipes_say_what_is_legal(text: str, tables: dict[str, dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read(text, tables, tmp_path)
    assert WRONG[text] in str(refused.value)
    assert len(str(refused.value)) < 500


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * (LIMITS.recipe_bytes + 1))
    with pytest.raises(ConfigError, match="at most"):
        read_recipe(tmp_path / "big.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not TOML"):
        read_recipe(tmp_path / "bad.toml")


@given(
    st.builds(
        Prune,
        st.floats(0, 0.9),
        st.integers(1, 1000),
        st.sampled_from(["taylor", "magnitude"]),
        st.lists(st.text()).map(tuple),
        st.booleans(),
        st.none() | st.integers(),
    )
)
def test_plain_and_load_are_inverse(prune: Prune) -> None:
    assert load(Prune, plain(prune), "prune") == prune


def test_registry_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown engine 'onnxruntim'; did you mean 'onnxruntime'"):
        registry.load(registry.RUNNERS, "onnxruntim", "engine")
    assert registry.load({"x": "sample_plugin:Prune"}, "x") is Prune
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "openvino_importer", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'diffship\[openvino\]'"):
        registry.load({"x": "openvino:Core"}, "x")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.load({"x": "no_such_module:X"}, "x")


def test_every_registered_class_is_spelt_as_module_and_name() -> None:
    for table in (registry.EXPORTERS, registry.RUNNERS, registry.PASSES):
        for name, target in table.items():
            module, _, attribute = target.partition(":")
            assert module.startswith("diffship.") and attribute[:1].isalpha(), (name, target)


@pytest.mark.parametrize(
    "value", [0, 151, -1, True, 1.0, "5", None, 10**400, float("nan")], ids=lambda value: repr(value)[:9]
)
def test_check_range_takes_whole_numbers_only(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"steps is .*; legal is a whole number from 1 to 150") as refused:
        check_range("steps", value, *LIMITS.steps)
    assert len(str(refused.value)) < 150


def test_check_range_of_floats() -> None:
    assert check_range("guidance", 7.5, *LIMITS.guidance) == 7.5 and check_range("guidance", 0, *LIMITS.guidance) == 0
    assert [check_range("steps", step, *LIMITS.steps) for step in (1, 150)] == [1, 150]
    for value in (float("nan"), float("inf"), -0.1, 35.1, True):
        with pytest.raises(ConfigError):
            check_range("guidance", value, *LIMITS.guidance)


SD, XL = Family("sd"), Family("sdxl", size_step=32, default_size=1024)


@pytest.mark.parametrize(
    ("family", "side", "nearest"),
    [(SD, 7, (64, 128)), (SD, 100, (64, 128)), (SD, 520, (512, 576)), (SD, 9999, (1472, 1536)), (XL, 100, (96, 128))],
)
def test_illegal_size_names_the_nearest_two(family: Family, side: int, nearest: tuple[int, int]) -> None:
    for size in ((side, 512), (512, side)):
        with pytest.raises(ConfigError, match=f"the nearest are {nearest[0]} and {nearest[1]}"):
            family.check_size(*size)


def test_legal_sizes_and_latents() -> None:
    assert SD.latent_shape(512, 768) == (4, 96, 64) and XL.latent_shape(96, 1536) == (4, 192, 12)
    for size in (True, 512.0, "512", None):
        with pytest.raises(ConfigError):
            SD.check_size(size, 512)  # type: ignore[arg-type]


def test_pixels_are_bounded_beside_the_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_module, "LIMITS", replace(LIMITS, pixels=512 * 512))
    SD.check_size(512, 512)
    with pytest.raises(ConfigError, match="512x576 is 294912 pixels; at most 262144"):
        SD.check_size(512, 576)


def test_integers_beyond_floats_are_refused() -> None:
    with pytest.raises(ConfigError, match="an integer of 1329 bits"):
        load(Prune, {"steps": 10**400}, "prune")
    with pytest.raises(ConfigError, match="must be a number"):
        load(Prune, {"ratio": 10**400}, "prune")


def test_family_is_read_back_strictly() -> None:
    assert Family.from_json(XL.to_json()) == XL
    with pytest.raises(ConfigError, match="did you mean 'vae_factor'"):
        Family.from_json({**XL.to_json(), "vae_facter": 8})


def test_spec_binds_and_resolves() -> None:
    spec = TensorSpec("sample", "float32", ("batch_size", 3, "latent_height * 8", "width / 2"))
    sizes = spec.bind((2, 3, 64, 5))
    assert sizes == {"batch_size": 2, "latent_height": 8, "width": 10}
    assert spec.resolve(sizes) == (2, 3, 64, 5) and spec.axes() == ("batch_size", "latent_height", "width")
    assert TensorSpec.from_json(spec.to_json()) == spec
    assert spec.text({"latent_height": 8}) == "(batch_size, 3, latent_height * 8=64, width / 2)"


def test_a_product_of_axes_binds_with_what_is_known() -> None:
    tokens = TensorSpec("tokens", "float32", ("batch_size", "height * width / 4", 32))
    plane = TensorSpec("plane", "float32", ("batch_size", 32, "height / 2", "width / 2"))
    assert tokens.axes() == ("batch_size", "height", "width")
    assert tokens.resolve({"batch_size": 2, "height": 8, "width": 12}) == (2, 24, 32)
    sizes = {"batch_size": 2, "height": 8, "width": 12}
    # whichever comes first; one known factor tells the other
    assert tokens.bind((2, 24, 32), plane.bind((2, 32, 4, 6))) == sizes
    assert plane.bind((2, 32, 4, 6), tokens.bind((2, 24, 32))) == {**sizes, "height * width": 96}
    assert tokens.bind((2, 24, 32), {"height": 8}) == sizes
    alone = tokens.bind((2, 24, 32))
    assert tokens.resolve(alone) == (2, 24, 32)
    assert tokens.text(sizes) == "(batch_size=2, height * width / 4=24, 32)"
    for known, shape in (({"height": 8, "width": 12}, (2, 25, 32)), ({"height": 7}, (2, 24, 32))):
        with pytest.raises(RunnerError, match="tokens: got shape"):
            tokens.bind(shape, known)
    with pytest.raises(RunnerError, match="plane: got shape"):
        plane.bind((2, 32, 4, 7), tokens.bind((2, 24, 32)))
    with pytest.raises(ConfigError, match="height \\* width has no size"):
        tokens.resolve({"batch_size": 2, "height": 8})
    with pytest.raises(ConfigError, match="not a multiple of 4"):
        tokens.resolve({"batch_size": 1, "height": 3, "width": 5})
    for axis in ("height *width", "height * ", "4 * height", "height * width * 4 / 2", "height / width"):
        with pytest.raises(ConfigError, match="axis"):
            TensorSpec("x", "float32", (axis,))
