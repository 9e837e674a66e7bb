"""Quality figures from a judge's embeddings: hits, Fréchet distance, distance to the nearest training picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hits(seen: Array, read: Array, wanted: Sequence[int], rank: int) -> NDArray[np.bool_]:
    """(n,) whether each picture's own caption is among the `rank` captions that fit best.

    Args:
        seen: (n, d) unit vectors of pictures. read: (m, d) unit vectors of the distinct captions.
        wanted: for each picture, the row of its caption in `read`.
    """
    scores = seen @ read.T
    own = scores[np.arange(len(wanted)), np.asarray(wanted)]
    return np.asarray((scores > own[:, None]).sum(axis=1) < rank)


def frechet_distance(a: Array, b: Array) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two feature sets (n, d) (Heusel et al. 2017, eq. 6).

    The trace of the square root is the sum of the square roots of the eigenvalues of S_a S_b, which are those of the
    symmetric S_a^(1/2) S_b S_a^(1/2): no complex square root of a matrix is needed. Never below zero: of equal sets
    the parts cancel up to rounding, on either side.
    """
    mean = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    return max(0.0, float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum()))


def nearest(pictures: NDArray[np.float32], training: NDArray[np.float32], chunk: int = 64) -> NDArray[np.float64]:
    """(n,) root mean square pixel difference of each picture to its nearest training picture.

    Both (n, ...) float32 in [-1, 1]; flattened here.
    """
    a = pictures.reshape(len(pictures), -1)
    b = training.reshape(len(training), -1)
    square = (b.astype(np.float64) ** 2).sum(axis=1)
    best = []
    for start in range(0, len(a), chunk):
        rows = a[start : start + chunk].astype(np.float64)
        distance = (rows**2).sum(axis=1)[:, None] + square - 2 * rows @ b.T.astype(np.float64)
        best.append(distance.min(axis=1))
    return np.sqrt(np.concatenate(best).clip(min=0) / a.shape[1])
