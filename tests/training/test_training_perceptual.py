"""LPIPS against a second implementation, its networks by their counts, folders of weights, and the script for them."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from diffship.core.errors import DiffshipError
from diffship.training.perceptual import NETWORKS, Conv, Lpips, Perceptual, Pool, blurred, distance

CPU = torch.device("cpu")
SMALL = ((Conv(4, 3, 1, blur=True),), (Pool(2), Conv(5)), (Pool(3, blur=True), Conv(6, 5, 2), Conv(3)))


def convolved(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any], padding: int) -> NDArray[Any]:
    size = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    places = [range(side - size + 1) for side in padded.shape[1:]]
    rows = [
        [np.tensordot(weight, padded[:, y : y + size, z : z + size], 3) + bias for z in places[1]] for y in places[0]
    ]
    return np.array(rows).transpose(2, 0, 1)


def blur(x: NDArray[Any]) -> NDArray[Any]:
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    line = np.array([1, 2, 1]) / 4
    lines = sum(line[i] * padded[:, i : padded.shape[1] - 2 + i] for i in range(3))
    return np.asarray(sum(line[i] * lines[:, :, i : lines.shape[2] - 2 + i] for i in range(3)))[:, ::2, ::2]


def pooled(x: NDArray[Any], size: int, stride: int) -> NDArray[Any]:
    places = [range(0, side - size + 1, stride) for side in x.shape[1:]]
    rows = [[x[:, y : y + size, z : z + size].max((1, 2)) for z in places[1]] for y in places[0]]
    return np.array(rows).transpose(2, 0, 1)


def by_hand(network: Lpips, first: NDArray[Any], second: NDArray[Any]) -> float:
    """LPIPS as the paper has it, in float64, place by place."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    sides = [(side - shift[:, None, None]) / scale[:, None, None] for side in (first, second)]
    layers, total = iter(network.convolutions), 0.0
    for depth, head in zip(network.layers, network.heads, strict=True):
        for layer in depth:
            if isinstance(layer, Pool):
                sides = [blur(pooled(s, layer.kernel, 1)) if layer.blur else pooled(s, layer.kernel, 2) for s in sides]
                continue
            conv: Any = next(layers)
            weight, bias = conv.weight.double().detach().numpy(), conv.bias.double().detach().numpy()
            sides = [convolved(s, weight, bias, layer.padding) for s in sides]
            sides = [np.maximum(blur(s) if layer.blur else s, 0) for s in sides]
        units = [s / np.maximum(np.linalg.norm(s, axis=0), 1e-10) for s in sides]
        weighed = head.double().detach().numpy()[:, None, None] * (units[0] - units[1]) ** 2
        total += weighed.sum(0).mean()
    return total


def test_the_distance_is_that_of_a_second_implementation() -> None:
    torch.manual_seed(0)
    network = Lpips(SMALL).double()
    for head in network.heads:
        head.data.uniform_(0, 2)
    first, second = (torch.rand(2, 3, 24, 29).double() * 2 - 1 for _ in range(2))
    found = distance(network, first, second)
    for at in range(2):
        assert found[at].item() == pytest.approx(by_hand(network, first[at].numpy(), second[at].numpy()), rel=1e-6)
    assert distance(network, first, first).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(blurred(first)[0].numpy(), blur(first[0].numpy()), atol=1e-12)


def test_features_that_are_all_dead_leave_a_finite_gradient() -> None:
    network = Lpips(SMALL)
    for layer in network.convolutions:
        torch.nn.init.constant_(layer.bias, -100.0)
    picture = torch.zeros(1, 3, 24, 24, requires_grad=True)
    distance(network, picture, torch.ones(1, 3, 24, 24)).sum().backward()
    assert picture.grad is not None and torch.isfinite(picture.grad).all()


# torchvision's counts of vgg16().features and AlexNet's five convolutions
@pytest.mark.parametrize(
    ("name", "count"), [("vgg16", 14_714_688), ("st-vgg16", 14_714_688), ("st-alexnet", 2_469_696)]
)
def test_networks_have_the_published_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        made = Lpips(NETWORKS[name])
    assert sum(value.numel() for value in made.convolutions.parameters()) == count
    widths = [64, 192, 384, 256, 256] if "alex" in name else [64, 128, 256, 512, 512]
    assert [len(head) for head in made.heads] == widths


def folder_of(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    tensors = {name: torch.zeros(value.shape) for name, value in Lpips(NETWORKS["st-alexnet"]).state_dict().items()}
    save_file({**tensors, **changes.get("tensors", {})}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"network": changes.get("network", "st-alexnet")}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "st-alexne"}, "did you mean 'st-alexnet'"),
        ({"tensors": {"heads.0": torch.zeros(63)}}, "heads.0 has shape"),
        ({"tensors": {"heads.9": torch.zeros(1)}}, "heads.9 has shape"),
        ({"network": "vgg16"}, "vgg16 takes"),
    ],
)
def test_folders_that_do_not_fit_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DiffshipError, match=message):
        Perceptual.find(str(folder_of(tmp_path / "weights", **changes)))


def test_features_come_from_the_package_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DiffshipError, match="legal: judge, none, or a folder"):
        Perceptual.find("lpips")
    assert Perceptual.find("none").load(CPU) is None
    judge = Perceptual.find("judge")
    features = judge.load(CPU)
    assert features is not None and (judge.network, len(judge.digest)) == ("judge", 64)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    near, far = (distance(features, picture, picture * share).item() for share in (0.9, 0.2))
    assert 0 < near < far
    assert Perceptual.find(str(folder_of(tmp_path / "weights"))).network == "st-alexnet"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = Path(__file__).parents[2] / "scripts" / "prepare_perceptual.py"
    spec = importlib.util.spec_from_file_location("prepare_perceptual", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_of_others_become_ours_in_the_order_of_layers(script: ModuleType) -> None:
    theirs = {f"features.{n}.{kind}": torch.tensor(float(n)) for n in (10, 2, 0) for kind in ("weight", "bias")}
    theirs |= {"lin1.model.1.weight": torch.ones(1, 2, 1, 1), "classifier.0.weight": torch.ones(1)}
    theirs |= {"net.slice2.5.filt": torch.ones(1), "scaling_layer.shift": torch.ones(1)}
    made = script.renamed(theirs)
    assert made["heads.1"].shape == (2,) and len(made) == 7
    assert [made[f"convolutions.{n}.bias"].item() for n in range(3)] == [0, 2, 10]


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


@pytest.mark.slow
def test_the_script_converts_a_wheel_in_a_child_and_runs_no_pickle(script: ModuleType, tmp_path: Path) -> None:
    network = Lpips(NETWORKS["st-alexnet"])
    numbers = {0: ("slice1", 0), 1: ("slice2", 5), 2: ("slice3", 9), 3: ("slice4", 11), 4: ("slice5", 13)}
    theirs = {
        f"net.{numbers[at][0]}.{numbers[at][1]}.{kind}": getattr(layer, kind).detach()
        for at, layer in enumerate(network.convolutions)
        for kind in ("weight", "bias")
    }
    theirs |= {f"lin{at}.model.1.weight": head.detach()[None, :, None, None] for at, head in enumerate(network.heads)}
    torch.save(theirs, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.write(tmp_path / "weights.pth", script._IN_WHEEL["st-alexnet"])
        wheel.writestr("a.dist-info/licenses/LICENSE", "BSD 2-Clause License")
    script.main(["st-alexnet", str(tmp_path / "out"), str(tmp_path / "a.whl")])
    assert (tmp_path / "out" / "LICENSE").read_text() == "BSD 2-Clause License"
    found = Perceptual.find(str(tmp_path / "out")).load(CPU)
    pictures = [torch.rand(1, 3, 40, 40) * 2 - 1 for _ in range(2)]
    assert found is not None and torch.equal(distance(found, *pictures), distance(network, *pictures))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    with pytest.raises(subprocess.CalledProcessError):
        script.main(["vgg16", str(tmp_path / "no"), str(tmp_path / "evil.pth")])
    assert not (tmp_path / "canary").exists()
