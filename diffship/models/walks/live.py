"""A U-Net that a diffusers pipeline has loaded, as a Component: its tensors are shared, nothing is read or copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffship.core.described import Described
from diffship.core.dtype import TensorMeta
from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.models.parts.component import Component
from diffship.models.parts.unet import unet
from diffship.models.walks.stages import Stage

if TYPE_CHECKING:
    import numpy as np
    from diffusers.models.unets import unet_2d_condition
    from numpy.typing import NDArray
    from torch import nn
else:
    unet_2d_condition = lazy("diffusers.models.unets.unet_2d_condition")

_FREEU = ("s1", "s2", "b1", "b2")


class ModuleWeights(Described):
    """The tensors of a loaded module under their names; they are described, and not read."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(
            {
                name: TensorMeta(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in module.state_dict().items()
            }
        )

    def read(self, name: str) -> NDArray[np.generic]:
        raise UnsupportedError(f"{name} belongs to a pipeline that is loaded; save the pipeline and open its folder")


def live_unet(inner: Any) -> Component:
    """The U-Net of a diffusers pipeline as a part that can be cut; `over` of its stages takes `inner`.

    Raises:
        UnsupportedError: it is no UNet2DConditionModel of the SD families, or something changes how its blocks run.
    """
    kind = unet_2d_condition.UNet2DConditionModel
    if not isinstance(inner, kind) or type(inner).forward is not kind.forward:
        raise UnsupportedError(f"the pipeline's U-Net is a {type(inner).__name__}; a UNet2DConditionModel is cut")
    config: Mapping[str, Any] = {key: value for key, value in inner.config.items() if not key.startswith("_")}
    component = unet(config, ModuleWeights(inner))
    changed = next(_changes(component, inner), None)
    if changed:
        raise UnsupportedError(f"the pipeline's U-Net cannot be cut: {changed}")
    return component


def share(stage: Stage, inner: nn.Module) -> nn.Module:
    """The stage as a module whose weights are those of `inner`."""
    if stage.over is None:
        raise UnsupportedError(f"{stage.name} was not cut out of a part that can be shared")
    return stage.over(inner)


def _changes(component: Component, inner: nn.Module) -> Iterator[str]:
    """What diffusers would run and stages would skip, a sentence each: stages call the layers, never the blocks around
    them."""
    if getattr(inner, "_hf_peft_config_loaded", False):
        yield "it has LoRA adapters; call pipeline.fuse_lora() and pipeline.unload_lora_weights() first"
    if getattr(inner, "encoder_hid_proj", None) is not None:
        yield "it has an IP-Adapter; call pipeline.unload_ip_adapter() first"
    plan = component.program(inner)
    owned = {path for layer in plan.layers for path in layer.modules}
    for name, module in inner.named_modules():
        if any(name == path or name.startswith(f"{path}.") for path in owned):
            continue
        label = name or "the U-Net itself"
        if all(getattr(module, key, None) for key in _FREEU):
            yield "FreeU is on; call pipeline.disable_freeu() first"
        if "forward" in vars(module):
            yield f"the forward of {label} is replaced (offloading, a cache, or another parallel run); undo that first"
        if module._compiled_call_impl is not None:
            yield f"{label} is compiled; compile the layers below it instead"
        if name and (module._forward_hooks or module._forward_pre_hooks):
            yield f"{label} has forward hooks, which would not run; remove them first"
