"""The one reading of configs: a key that a config.json does not have takes the default of the class that it is for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import diffusers
    import transformers
else:
    diffusers, transformers = lazy("diffusers"), lazy("transformers")

# the config class of each text encoder that is run here, whose attributes are the defaults
_TEXT_CONFIGS = {
    "CLIPTextModel": "CLIPTextConfig",
    "CLIPTextModelWithProjection": "CLIPTextConfig",
    "T5EncoderModel": "T5Config",
    "Qwen3ForCausalLM": "Qwen3Config",
}
# Of every network that is run here the config says this itself; without it a file is likely no such config at all.
_STATED = {"UNet2DConditionModel": ("block_out_channels",)}


def completed(class_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` and, for each key that it lacks, the default in the signature of diffusers' or transformers' class.

    A key that stands there with null stays null, as it does for the class.
    """
    return {**class_defaults(class_name), **config}


@cache
def class_defaults(class_name: str) -> dict[str, Any]:
    """Keys and defaults of the config of a class of diffusers or transformers; none of a class that neither has.

    Lists stand for the tuples of the class, as in JSON.
    """
    if class_name in _TEXT_CONFIGS:
        config = getattr(transformers, _TEXT_CONFIGS[class_name])
        # as declared: what the class derives from other keys (a list with an entry per layer) is left to it
        declared = {one.name: one.default for one in fields(config)}
        return {key: declared[key] for key in vars(config)["__annotations__"]}
    network = getattr(diffusers, class_name, None)
    if network is None:  # a kind of model may bring a network of its own
        return {}
    given = inspect.signature(network.__init__).parameters
    left = _STATED.get(class_name, ())
    return {key: _plain(one.default) for key, one in given.items() if key not in left and one.default is not one.empty}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
