"""k-means against scikit-learn and its literal form, alone and under many metrics at once."""

import numpy as np
import pytest
import torch
from points import blobs, seeded
from sklearn.cluster import KMeans

from umeta_core import kmeans
from umeta_core.partitions import random_scalings


def literal_lloyd(x, centroids, steps):
    """Every distance, every step."""
    for _ in range(steps):
        assignment = torch.cdist(x, centroids).argmin(1)
        centroids = torch.stack(
            [x[assignment == c].mean(0) if (assignment == c).any() else centroids[c] for c in range(len(centroids))]
        )
    return torch.cdist(x, centroids).argmin(1), centroids


@pytest.mark.parametrize("n, d, k", [(1500, 10, 40), (1003, 7, 25), (3000, 33, 60)])
def test_inertia_is_that_of_scikit_learn(n, d, k):
    x, _ = blobs(n, d)
    ours = [kmeans.kmeans(x, k, seeded(s)).inertia.item() for s in range(6)]
    theirs = [KMeans(k, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(6)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.02)
    batched = kmeans.kmeans_batched(x, k, torch.ones(6, d), seeded()).inertia
    assert batched.mean().item() == pytest.approx(np.mean(theirs), rel=0.02)


def test_start_is_as_good_as_that_of_scikit_learn():
    from sklearn.cluster import kmeans_plusplus

    x, _ = blobs(800)
    cost = lambda c: torch.cdist(x, c).amin(1).square().sum().item()  # noqa: E731
    theirs = np.mean([cost(torch.from_numpy(kmeans_plusplus(x.numpy(), 30, random_state=s)[0])) for s in range(20)])
    ours = np.mean([cost(kmeans.plus_plus(x, 30, seeded(s))) for s in range(20)])
    assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("steps", [0, 1, 4, 50])
def test_bounds_change_nothing(steps):
    x, _ = blobs(1003, 6, dtype=torch.float64)
    start = x[torch.randperm(len(x), generator=seeded())[:25]]
    found = kmeans.lloyd(x, start, steps, tol=0)
    assignment, centroids = literal_lloyd(x, start, steps)
    assert torch.equal(found.assignment, assignment)
    assert torch.allclose(found.centroids, centroids)
    assert found.inertia.item() == pytest.approx((x - centroids[assignment]).square().sum().item())


def test_at_the_end_every_point_is_with_its_nearest_mean():
    x, _ = blobs()
    found = kmeans.kmeans(x, 40, seeded(), iterations=500, tol=0)
    means = torch.stack([x[found.assignment == c].mean(0) for c in range(40)])
    assert torch.allclose(found.centroids, means, atol=1e-4)
    distance = torch.cdist(x, means)
    own = distance.gather(1, found.assignment.unsqueeze(1)).squeeze(1)
    assert (own - distance.amin(1)).max() < 1e-4
    assert found.inertia.item() == pytest.approx(own.square().sum().item(), rel=1e-4)


def test_early_stopping_costs_little():
    x, _ = blobs(3000, 20, 100)
    early, late = (kmeans.kmeans(x, 60, seeded(), tol=tol).inertia.item() for tol in (1e-3, 0))
    assert late <= early <= 1.002 * late


def test_far_from_the_origin_nothing_changes():
    x, _ = blobs()
    near, far = (kmeans.kmeans(x + offset, 30, seeded()).inertia.item() for offset in (0, 300))
    assert far == pytest.approx(near, rel=0.02)


def test_one_cluster_and_as_many_as_points():
    x, _ = blobs(50)
    one = kmeans.kmeans(x, 1, seeded())
    assert one.assignment.unique().tolist() == [0] and torch.allclose(one.centroids[0], x.mean(0), atol=1e-5)
    all_ = kmeans.kmeans(x, 50, seeded())
    assert len(all_.assignment.unique()) == 50 and all_.inertia < 1e-3
    assert kmeans.kmeans_batched(x, 50, torch.ones(2, 10), seeded()).inertia.max() < 1e-2


def test_fewer_distinct_points_than_clusters():
    x = torch.tensor([[0.0], [1.0], [5.0]]).repeat(20, 1)
    for found in (kmeans.kmeans(x, 6, seeded()), kmeans.kmeans_batched(x, 6, torch.ones(1, 1), seeded())):
        assert found.inertia.sum() < 1e-3 and len(found.assignment.unique()) == 3
        assert found.centroids.isfinite().all()


def test_restarts_keep_the_best():
    x, _ = blobs(600, 2, 40, 0.05)
    g = seeded()
    runs = [kmeans.kmeans(x, 30, g).inertia.item() for _ in range(5)]
    assert kmeans.kmeans(x, 30, seeded(), restarts=5).inertia.item() == pytest.approx(min(runs))
    single = kmeans.kmeans_batched(x, 30, torch.ones(20, 2), seeded()).inertia
    best = kmeans.kmeans_batched(x, 30, torch.ones(4, 2), seeded(), restarts=5).inertia
    assert best.shape == (4,) and best.mean() < single.mean()


def test_pooled_draws_follow_the_squared_distance():
    """Three points on a line: the second pick is proportional to D^2 when there is one candidate per step."""
    x = torch.tensor([[0.0], [1.0], [3.0]]).repeat_interleave(20, 0)
    first_two = []
    for s in range(400):
        first, second = kmeans.plus_plus(x, 2, seeded(s))[:, 0].tolist()
        first_two.append((first, second))
    assert all(a != b for a, b in first_two)
    from_middle = [b for a, b in first_two if a == 1.0]
    # two candidates, 0 with weight 1 and 3 with weight 4; the greedy choice prefers 3 if it is among them
    assert np.mean([b == 3.0 for b in from_middle]) == pytest.approx(1 - 0.2**2, abs=0.05)


def test_a_metric_is_k_means_on_scaled_points():
    x, _ = blobs()
    w = random_scalings(3, 10, seeded())
    found = kmeans.kmeans_batched(x, 30, w, seeded(), tol=0)
    for p in range(3):
        a, scaled = found.assignment[p], x * w[p]
        means = torch.stack([scaled[a == c].mean(0) for c in range(30)])
        assert torch.allclose(found.centroids[p] * w[p], means, atol=1e-4)
        assert torch.equal(torch.cdist(scaled, means).argmin(1), a)
        assert found.inertia[p].item() == pytest.approx((scaled - means[a]).square().sum().item(), rel=1e-4)
        one_by_one = np.mean([kmeans.kmeans(scaled, 30, seeded(s)).inertia.item() for s in range(5)])
        assert found.inertia[p].item() == pytest.approx(one_by_one, rel=0.05)


def test_batched_and_bounded_agree_from_the_same_start():
    x, _ = blobs(900, 6, dtype=torch.float64)
    x = x - x.mean(0)
    w = random_scalings(3, 6, seeded()).double()
    starts = x[torch.randperm(len(x), generator=seeded())[:60]].view(3, 20, 6)
    for p in range(3):
        centroids = starts[p : p + 1]
        for _ in range(7):
            assignment, _ = kmeans.assign_batched(x, centroids, w[p : p + 1].square())
            centroids = kmeans.means_batched(x, assignment, centroids)
        bounded = kmeans.lloyd(x * w[p], starts[p] * w[p], 7, tol=0)
        assert torch.allclose(bounded.centroids, centroids[0] * w[p])


def test_small_blocks_and_batches_change_nothing(monkeypatch):
    x, _ = blobs(703, 6, dtype=torch.float64)
    w = torch.ones(2, 6, dtype=torch.float64)
    whole = kmeans.kmeans(x, 20, seeded()), kmeans.kmeans_batched(x, 20, w, seeded())
    monkeypatch.setattr(kmeans, "BLOCK", 32)
    monkeypatch.setattr(kmeans, "BATCH", 1000)
    cut = kmeans.kmeans(x, 20, seeded()), kmeans.kmeans_batched(x, 20, w, seeded())
    assert all(torch.equal(a.assignment, b.assignment) for a, b in zip(whole, cut))


@pytest.mark.parametrize("n, d", [(2048, 64), (100, 5), (37, 3), (7, 2)])
def test_scores_are_the_matrix_product(n, d):
    x, c = torch.randn(n, d, generator=seeded()), torch.randn(11, d, generator=seeded(1))
    half = c.square().sum(1) / 2
    assert torch.allclose(kmeans.scores(x, c, half), x @ c.t() - half, atol=1e-4)
