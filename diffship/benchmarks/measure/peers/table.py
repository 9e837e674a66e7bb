"""The peers by name: what they need, and what they can measure."""

from __future__ import annotations

from dataclasses import dataclass

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A toolchain to compare with.

    child: the module that runs it. first, then: requirements of its own environment, installed in two steps (torch
    alone first, at an exact version: an open range may bring gigabytes of CUDA); none means our own environment.
    cli: arguments of its exporter, with {folder} and {out}. needs: programs that its build calls.
    """

    child: str
    first: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    cli: tuple[str, ...] = ()
    parts: bool = True
    needs: tuple[str, ...] = ()
    build_seconds: int = 7200


_PIPELINES = "diffship.benchmarks.measure.peers.pipelines"
PEERS: dict[str, Peer] = {
    "diffusers": Peer(_PIPELINES),
    "compile": Peer(_PIPELINES),
    "optimum": Peer(
        _PIPELINES,
        (TORCH,),
        ("optimum-onnx[onnxruntime]==0.1.0", "diffusers==0.36.0", "transformers==4.57.3", "accelerate"),
        ("export", "onnx", "--model", "{folder}", "--task", "text-to-image", "{out}"),
    ),
    # 2.1.0: from 2.2.0 on it wants torchvision, whose wheels on PyPI need CUDA's libraries beside a CPU build of torch.
    "optimum-intel": Peer(
        _PIPELINES,
        (TORCH,),
        (
            "optimum-intel==2.1.0",
            "openvino==2026.4.1",
            "nncf==3.4.0",
            "diffusers==0.37.1",
            "transformers==5.5.4",
            "accelerate",
        ),
        ("export", "openvino", "--model", "{folder}", "--task", "text-to-image", "--weight-format", "fp32", "{out}"),
    ),
    "sdcpp": Peer(
        "diffship.benchmarks.measure.peers.sdcpp",
        then=("stable-diffusion-cpp-python==0.4.7",),
        parts=False,
        needs=("cmake", "gcc", "g++"),
    ),
}
