"""Points to cluster."""

import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=1500, d=10, centers=30, noise=0.4, seed=0, dtype=torch.float32):
    """Overlapping groups, and the group of each point."""
    g = seeded(seed)
    group = torch.randint(centers, (n,), generator=g)
    x = torch.randn(centers, d, generator=g, dtype=dtype)[group] + noise * torch.randn(n, d, generator=g, dtype=dtype)
    return x, group
