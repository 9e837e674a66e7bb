"""Quality figures against closed forms and a second implementation."""

from __future__ import annotations

import numpy as np
import pytest

from diffship.benchmarks.studies.quality.scores import frechet_distance, hits, nearest


def test_hits_count_ranks() -> None:
    read = np.eye(4)
    seen = np.array([[1.0, 0, 0, 0], [0.9, 0.8, 0, 0], [0.3, 0.4, 0.2, 0.1]])
    found = {rank: hits(seen, read, [0, 1, 3], rank).tolist() for rank in (1, 2, 4)}
    assert found == {1: [True, False, False], 2: [True, True, False], 4: [True, True, True]}


def test_frechet_distance_of_known_gaussians() -> None:
    # For commuting covariances the distance is |m|^2 + sum (s_a - s_b)^2, exactly, as both sets share their whitening.
    base = np.random.default_rng(0).normal(size=(500, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    a, b = base * [1.0, 2.0, 3.0], base * [2.0, 2.0, 1.0] + [1.0, 0.0, 2.0]
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)
    for features in (a, b, a[:, :2] * 1e3):  # a distance is never below zero, nor is it -0.0
        distance = frechet_distance(features, features)
        assert distance == pytest.approx(0, abs=1e-5) and np.copysign(1, distance) == 1


def test_frechet_distance_equals_the_square_root_form() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(200, 6)) @ generator.normal(size=(6, 6)), generator.normal(size=(150, 6))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eig(cov_a @ cov_b)
    root = (vectors @ np.diag(np.sqrt(values)) @ np.linalg.inv(vectors)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_nearest_finds_the_copy() -> None:
    training = np.random.default_rng(2).uniform(-1, 1, size=(90, 3, 8, 8)).astype(np.float32)
    pictures = np.concatenate([training[5:6], training[7:8] + np.float32(0.1)])
    distances = nearest(pictures, training, chunk=1)
    assert distances[0] == pytest.approx(0, abs=1e-5)
    assert distances[1] == pytest.approx(0.1, rel=1e-4)
