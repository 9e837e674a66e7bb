"""The adversarial phase: losses in closed form, augmentations against a second implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffship.training.adversarial import (
    MOST_WEIGHT,
    Discriminator,
    adaptive_weight,
    augmented,
    hinge,
    recoloured,
    worst_half,
)


def test_hinge_in_closed_form() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    assert hinge(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1) / 2) / 2)
    assert hinge(torch.full((3,), 1.0), torch.full((3,), -1.0)).item() == 0


def test_the_adaptive_weight_is_the_ratio_of_both_pulls_on_the_last_layer() -> None:
    """Of a linear layer the gradients are known: r = 3 w.x, a = tanh(w.x)."""
    x, last = torch.tensor([0.3, -0.4]), torch.tensor([0.5, 1.0], requires_grad=True)
    output = last @ x
    pull = (1 - np.tanh(output.item()) ** 2) * 0.5
    found = adaptive_weight(3 * output, torch.tanh(output), last)
    assert found.item() == pytest.approx(3 * 0.5 / (pull + 1e-4), rel=1e-5) and not found.requires_grad
    assert adaptive_weight(3 * output, 0 * output, last).item() == MOST_WEIGHT  # 1.5 / 1e-4 is more
    (output + found * output).backward()  # the graph is still there
    assert last.grad is not None


def test_the_discriminator_is_that_of_70_pixels_without_state() -> None:
    """pix2pix's has 2,768,705 weights for six channels; group norms have as many as its batch norms."""
    made = Discriminator()
    assert sum(value.numel() for value in made.parameters()) == 2_768_705 - 3 * 64 * 4 * 4 and not list(made.buffers())
    assert made(torch.zeros(2, 3, 128, 128)).shape == (2, 1, 14, 14)
    again = Discriminator().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in made.state_dict().items())
    assert not torch.equal(Discriminator(seed=1).layers[0].weight, made.layers[0].weight)  # type: ignore[arg-type]


def augmented_by_hand(pictures: NDArray[Any], generator: torch.Generator) -> NDArray[Any]:
    """DiffAugment's `color,translation,cutout`, picture by picture, from the same draws."""
    count, _, height, width = pictures.shape
    draws = [torch.rand(count, 1, 1, 1, generator=generator).flatten().tolist() for _ in range(3)]
    made = []
    for picture, bright, saturate, contrast in zip(pictures, *draws, strict=True):
        x = picture + bright - 0.5
        x = x.mean(0) + (x - x.mean(0)) * 2 * saturate
        x = x.mean() + (x - x.mean()) * (contrast + 0.5)
        far = [int(side / 8 + 0.5) for side in (height, width)]
        down, right = (int(torch.randint(2 * most + 1, (), generator=generator)) - most for most in far)
        moved = np.zeros_like(x)
        for row in range(height):
            for column in range(width):
                source = (row + down, column + right)
                if 0 <= source[0] < height and 0 <= source[1] < width:
                    moved[:, row, column] = x[:, source[0], source[1]]
        size = [int(side / 5 + 0.5) for side in (height, width)]
        middle = [int(torch.randint(side + 1, (), generator=generator)) for side in (height, width)]
        for row in range(height):
            for column in range(width):
                inside = [0 <= at - (m - s // 2) < s for at, m, s in zip((row, column), middle, size, strict=True)]
                if all(inside):
                    moved[:, row, column] = 0
        made.append(moved)
    return np.stack(made)


def test_augmentations_are_those_of_a_second_implementation() -> None:
    pictures = torch.rand(6, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = augmented(pictures, torch.Generator().manual_seed(4)).numpy()
    np.testing.assert_allclose(found, augmented_by_hand(pictures.numpy(), torch.Generator().manual_seed(4)), atol=1e-6)
    seen = pictures.clone().requires_grad_(True)
    augmented(seen, torch.Generator().manual_seed(4)).square().sum().backward()
    assert seen.grad is not None and (seen.grad != 0).float().mean() > 0.5


def test_colours_are_mixed_as_far_as_the_blend_says() -> None:
    pictures = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mix = torch.tensor([[0.0, 1, 0], [0, 0, 1], [2, 0, 0]]).expand(2, 3, 3)  # green, blue, twice red
    blend = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    found = recoloured(pictures, mix, blend)
    torch.testing.assert_close(found[1], pictures[1])
    torch.testing.assert_close(found[0, 0], pictures[0, 1])
    torch.testing.assert_close(found[0, 1], pictures[0, 1])
    unit = (pictures[0] + 1) / 2
    torch.testing.assert_close(found[0, 2], (unit[2] + (2 * unit[0]).clamp(max=1)) / 2 * 2 - 1)


def test_the_better_half_of_the_pixels_turns_white() -> None:
    pictures = torch.zeros(1, 3, 2, 3)
    error = torch.tensor([[5.0, 1, 4], [2, 3, 6]])
    found = worst_half(pictures, error.expand(1, 3, 2, 3), torch.zeros(1, 3, 2, 3))
    assert found[0, 0].tolist() == [[0, 1, 0], [1, 0, 0]]  # the median of six is the third
