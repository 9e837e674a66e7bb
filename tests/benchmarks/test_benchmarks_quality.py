"""Quality figures against closed forms and a second implementation."""

from __future__ import annotations

import numpy as np
import pytest

from diffship.benchmarks.quality import frechet_distance, hits, nearest, retrieval


def test_retrieval_counts_ranks() -> None:
    read = np.eye(4)
    seen = np.array([[1.0, 0, 0, 0], [0.9, 0.8, 0, 0], [0.3, 0.4, 0.2, 0.1]])
    figures = retrieval(seen, read, [0, 1, 3], ranks=(1, 2, 4))
    assert figures == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 4: 1.0}
    assert hits(seen, read, [0, 1, 3], 2).tolist() == [True, True, False]


def test_frechet_distance_of_known_gaussians() -> None:
    # For commuting covariances the distance is |m|^2 + sum (s_a - s_b)^2, exactly, as both sets share their whitening.
    base = np.random.default_rng(0).normal(size=(500, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    a, b = base * [1.0, 2.0, 3.0], base * [2.0, 2.0, 1.0] + [1.0, 0.0, 2.0]
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


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
