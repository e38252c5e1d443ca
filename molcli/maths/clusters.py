"""Clusters of token vectors; each cluster becomes the domain of a routed block."""

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 12
MOST_ROWS = 16_384


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
