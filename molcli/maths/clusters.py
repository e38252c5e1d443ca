"""Clusters of token vectors; each cluster becomes the domain of a routed block."""

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 12
MOST_ROWS = 16_384
# Rounds of `even_kmeans`, and how far an offset moves in the first one, relative to the vectors'
# mean square: from an offset that keeps a cluster empty to one that fills it takes a few rounds.
EVEN_STEPS, EVEN_RATE = 40, 0.05


def cosine_kmeans(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Cluster vectors by direction (spherical k-means, started by k-means++).

    At most 16,384 rows, drawn at random, are used. A cluster that becomes empty is restarted at the
    row that is farthest from its centroid. The result depends on the generator's seed only.

    Args:
        x: (n, d) vectors of any length.
        count: number of clusters.
        generator: a generator on the CPU.

    Returns:
        (count, d) centroids of unit length.

    Source: k-means++ (Arthur and Vassilvitskii, SODA 2007); spherical k-means (Dhillon and Modha,
    Machine Learning 42, 2001).
    """
    n = x.shape[0]
    if n > MOST_ROWS:
        x = x[torch.randperm(n, generator=generator)[:MOST_ROWS].sort().values.to(x.device)]
    x = F.normalize(x, dim=-1)
    first = int(torch.randint(x.shape[0], (1,), generator=generator))
    centroids = x[first : first + 1]
    for _ in range(count - 1):
        distance = (1 - (x @ centroids.mT).amax(1)).clamp(min=0).square().double().cpu()
        if not bool(distance.sum() > 0):
            distance = torch.ones_like(distance)
        pick = torch.multinomial(distance, 1, generator=generator).to(x.device)
        centroids = torch.cat([centroids, x[pick]])
    for _ in range(ITERATIONS):
        similarity, nearest = (x @ centroids.mT).max(1)
        members = nearest == torch.arange(count, device=x.device)[:, None]
        sums = members.to(x.dtype) @ x
        sizes = torch.bincount(nearest, minlength=count)
        for empty in (sizes == 0).nonzero().flatten().tolist():
            worst = int(similarity.argmin())
            sums[empty], similarity[worst] = x[worst], 1.0
        centroids = F.normalize(sums, dim=-1)
    return centroids


def even_kmeans(
    x: Tensor, count: int, generator: torch.Generator, *, rows: int = 4 * MOST_ROWS
) -> tuple[Tensor, Tensor]:
    """Cluster vectors into clusters of about equal size, which a linear score with offsets tells.

    A vector belongs to the cluster with the largest centroid . x + offset. Offsets start at
    -|centroid|^2 / 2, which makes this k-means, and then fall for clusters with more than their
    share of the vectors, in rounds between which centroids become the means of their vectors.
    Without this, a residual's few large directions leave most clusters nearly empty.

    Args:
        x: (n, d).
        count: number of clusters.
        generator: a generator on the CPU.
        rows: at most so many vectors, drawn at random, are used.

    Returns:
        (count, d) centroids of the vectors minus their mean, and (count,) offsets, both for
        vectors from which the mean is not subtracted.

    Source: the rule for offsets is the one that balances routers (arXiv 2408.15664).
    """
    if len(x) > rows:
        x = x[torch.randperm(len(x), generator=generator)[:rows].sort().values.to(x.device)]
    mean = x.mean(0)
    x = x - mean
    energy = x.square().sum(-1).mean()  # the unit of scores
    centroids = cosine_kmeans(x, count, generator) * energy.sqrt()
    nearest = (x @ centroids.mT).argmax(1)
    balance = x.new_zeros(count)
    for step in range(EVEN_STEPS):
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        moved = sums / sizes.clamp(min=1)[:, None]
        centroids = torch.where((sizes > 0)[:, None], moved, centroids)
        rate = EVEN_RATE * (1 - step / EVEN_STEPS) * energy
        balance -= rate * (sizes * count / len(x) - 1).clamp(max=1)
        offsets = balance - centroids.square().sum(-1) / 2
        nearest = (x @ centroids.mT + offsets).argmax(1)
    return centroids, offsets - centroids @ mean
