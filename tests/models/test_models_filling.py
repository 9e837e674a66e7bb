"""Tied weights and computed buffers: components built without values, filled, beside the libraries' own modules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_parts import foreign

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.weights import MemoryWeights
from diffship.models.parts.component import Component, fill, unexpected, weight_metas
from diffship.models.parts.filling import computed_names, tied

SIZES = {"batch_size": 2, "height": 6, "width": 10, "sequence_length": 7}


@pytest.mark.parametrize("name", ["t5", "sd3", "rotary"])
def test_a_filled_part_computes_what_the_library_computes(name: str) -> None:
    made = foreign(name)
    feeds = made.component.example(3, SIZES)
    with torch.no_grad():
        expected = made.original(*(torch.from_numpy(array) for array in feeds.values()))[0].numpy()
    found = np.asarray(next(iter(made.component.load().run(feeds).values())))
    assert np.array_equal(found, expected), "the same operations on the same numbers"
    assert not unexpected(made.component.meta, made.component.weights)


def test_tied_tensors_are_read_once_and_stay_tied() -> None:
    component = foreign("t5").component
    both = ("shared.weight", "encoder.embed_tokens.weight")
    assert component.weights.names()[0] == both[0] and both[1] not in component.weights.names()
    assert (f"inner.{both[0]}", f"inner.{both[1]}") in tied(component.meta)
    module = component.module()
    assert module.get_parameter(f"inner.{both[0]}") is module.get_parameter(f"inner.{both[1]}")
    assert list(weight_metas(component.meta)) == list(component.weights.names())


def test_either_name_of_a_tied_tensor_may_be_in_the_file_and_two_values_may_not() -> None:
    component = foreign("t5").component
    state = {name: component.weights.read(name) for name in component.weights.names()}
    table = state.pop("shared.weight")
    other = replace(component, weights=MemoryWeights({**state, "encoder.embed_tokens.weight": table}))
    feeds = component.example(3, SIZES)
    first, second = (part.load().run(feeds)["last_hidden_state"] for part in (component, other))
    assert np.array_equal(first, second)
    both = {**state, "shared.weight": table, "encoder.embed_tokens.weight": table}
    assert replace(component, weights=MemoryWeights(both)).module() is not None
    both["encoder.embed_tokens.weight"] = table + 1
    with pytest.raises(SourceError, match="are one tensor by its config, and differ"):
        replace(component, weights=MemoryWeights(both)).module()
    with pytest.raises(SourceError, match="2 tensors are missing"):
        replace(component, weights=MemoryWeights(state)).module()


def test_computed_buffers_have_the_values_and_the_type_of_the_library_in_any_dtype() -> None:
    made = foreign("rotary")
    names = computed_names(made.component.meta)
    assert "inner.rotary.inv_freq" in names
    module = made.component.module(dtype="float16")
    for name in names:
        assert torch.equal(module.get_buffer(name), made.original.get_buffer(name))
        assert module.get_buffer(name).dtype == torch.float32
    assert module.get_parameter("inner.project.weight").dtype == torch.float16


def test_a_buffer_without_values_is_refused() -> None:
    class Scratch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)
            self.inner.register_buffer("scratch", torch.empty(3), persistent=False)

    weights = MemoryWeights({"weight": np.zeros((2, 2), np.float32), "bias": np.zeros(2, np.float32)})
    component = Component("odd", "Scratch", {}, Scratch, weights, (), ())
    with pytest.raises(UnsupportedError, match=r"inner\.scratch has no values"):
        component.module()
    with pytest.raises(UnsupportedError, match="is computed when the part is made, and was not"):
        fill(component.meta, weights, "cpu", torch.float32, "odd")
