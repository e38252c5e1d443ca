"""Spherical k-means on clusters that are known."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molcli.maths.clusters import cosine_kmeans, even_kmeans


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(count: int, each: int, seed: int, noise: float = 0.01) -> tuple[Tensor, Tensor]:
    """Centres (count, 16), orthonormal, and each * count rows around them, of any length."""
    generator = seeded(seed)
    centres = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:count]
    rows = centres.repeat_interleave(each, 0)
    rows = rows + noise * torch.randn(rows.shape, generator=generator)
    return centres, rows * (0.1 + 10 * torch.rand(len(rows), 1, generator=generator))


@settings(max_examples=30)
@given(count=st.integers(1, 8), seed=st.integers(0, 999))
def test_planted_clusters_are_found(count: int, seed: int) -> None:
    """Each planted cluster has one centroid, and no row is assigned to another one."""
    centres, rows = planted(count, 40, seed)
    found = cosine_kmeans(rows, count, seeded(seed))
    similarity, match = (found @ centres.T).max(1)
    assert sorted(match.tolist()) == list(range(count))
    assert similarity.min() > 0.99
    nearest = match[(rows @ found.T).argmax(1)]
    assert torch.equal(nearest, torch.arange(count).repeat_interleave(40))


@settings(max_examples=30)
@given(seed=st.integers(0, 999), count=st.integers(2, 12))
def test_centroids_have_unit_length_and_rows_of_their_own(seed: int, count: int) -> None:
    """On shapeless data too."""
    rows = torch.randn(80, 5, generator=seeded(seed))
    found = cosine_kmeans(rows, count, seeded(seed))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(count))
    sizes = torch.bincount((rows @ found.T).argmax(1), minlength=count)
    assert sizes.min() > 0


def test_the_seed_decides() -> None:
    rows = torch.randn(200, 6, generator=seeded(0))
    one, again, other = (cosine_kmeans(rows, 5, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_many_rows_are_subsampled_evenly() -> None:
    """Past 16,384 rows a sample is clustered: of all rows, not of the first ones."""
    centres, rows = planted(2, 17_000, 0)
    found = cosine_kmeans(rows[:18_000], 2, seeded(0))
    assert (found @ centres.T).amax(0).min() > 0.99


@pytest.mark.parametrize("distinct", [1, 3])
def test_fewer_distinct_rows_than_clusters(distinct: int) -> None:
    """Every distinct row has its centroid; the others are copies, not NaN."""
    rows = F.normalize(torch.randn(distinct, 4, generator=seeded(0)), dim=-1)
    found = cosine_kmeans(rows.repeat(5, 1), 6, seeded(0))
    similarity = found @ rows.T
    torch.testing.assert_close(similarity.amax(1), torch.ones(6))
    torch.testing.assert_close(similarity.amax(0), torch.ones(distinct))


def test_even_clusters_share_vectors_that_one_direction_dominates() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator) * torch.logspace(1, -1, 16) + 20
    centroids, offsets = even_kmeans(x, 8, generator)
    sizes = torch.bincount((x @ centroids.mT + offsets).argmax(1), minlength=8)
    assert sizes.min() > 0.5 * 4000 / 8
    assert sizes.max() < 1.5 * 4000 / 8


def test_even_clusters_are_those_that_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    middles = 10 * torch.randn(4, 8, generator=generator)
    label = torch.arange(4).repeat(100)
    x = middles[label] + 0.1 * torch.randn(400, 8, generator=generator) + 5
    centroids, offsets = even_kmeans(x, 4, generator)
    found = (x @ centroids.mT + offsets).argmax(1)
    assert all(len(found[label == i].unique()) == 1 for i in range(4))
    assert len(found.unique()) == 4


def test_one_cluster_has_everything() -> None:
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    centroids, offsets = even_kmeans(x, 1, torch.Generator().manual_seed(0))
    assert centroids.shape == (1, 3) and offsets.shape == (1,)
    assert centroids.isfinite().all() and offsets.isfinite().all()
