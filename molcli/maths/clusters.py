"""Token clusters, which become the routed blocks' subjects."""

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 12


def cosine_kmeans(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """x: (n, d) -> centroids (count, d) of unit length, by spherical k-means.

    Starts from k-means++ on at most 16,384 rows. An emptied cluster takes the row that is worst
    served. Deterministic for a CPU generator's seed.
    """
    n = x.shape[0]
    if n > 16_384:
        x = x[torch.randperm(n, generator=generator)[:16_384].sort().values.to(x.device)]
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
