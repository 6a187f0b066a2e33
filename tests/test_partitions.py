"""Clusters under many metrics, hyperplane cells against a loop, chance, whitened pixels."""

import math
import warnings

import numpy as np
import pytest
import torch
from points import blobs, seeded

from umeta_core import inspection
from umeta_core import partitions as parts
from umeta_core.data import ImageSet
from umeta_core.episodes import PartitionTasks


def test_first_metric_is_plain_and_the_others_are_uniform():
    w = parts.random_scalings(50, 200, seeded())
    assert (w[0] == 1).all()
    assert 0 <= w[1:].min() < 0.01 and 0.99 < w[1:].max() < 1
    assert w[1:].mean().item() == pytest.approx(0.5, abs=0.01)


def test_clusters_become_tasks():
    x, group = blobs(1000, 10, 20, 0.1)
    found = parts.cluster_partitions(x, 25, 4, seeded(), least=6, way=5)
    assert found.shape == (4, 1000) and found.dtype == torch.int16
    assert inspection.inspect(found[0], group).nmi > 0.9
    assert not torch.equal(found[1], found[2])
    images = ImageSet(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), group, ["x"] * 20, [], "blobs", "train")
    assert PartitionTasks(images, found).sample(8, 5, 1, 5, seeded()).query.shape == (8, 5, 5, 1, 2, 2)


def test_same_seed_same_partitions():
    x, _ = blobs(600)
    first, second, other = (parts.cluster_partitions(x, 20, 3, seeded(s), least=3) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_many_clusters_need_a_wider_type():
    assert parts.label_type(32767) == torch.int16 and parts.label_type(32768) == torch.int32


def test_small_clusters_are_pruned():
    labels = torch.tensor([[0, 0, 0, 1, 1, 2], [2, 2, 2, 2, 1, 1]], dtype=torch.int16)
    assert parts.class_sizes(labels, 3).tolist() == [[3, 2, 1], [0, 2, 4]]
    pruned = parts.prune(labels.clone(), 3, least=2, way=2)
    assert pruned.tolist() == [[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 1, 1]]
    with pytest.raises(
        ValueError, match=r"partition 0 has 1 clusters of at least 3 members, but 2 are needed \(its la"
    ):
        parts.prune(labels, 3, least=3, way=2)


def scripted(monkeypatch, attempts):
    """Clusterings that come out as given, one after the other."""
    attempts = iter(attempts)
    monkeypatch.setattr(parts, "_cluster", lambda *a: torch.tensor([next(attempts)]))


BAD, BETTER, GOOD = [0] * 7 + [1], [0] * 5 + [1] * 3, [0] * 4 + [1] * 4  # sizes 7 + 1, 5 + 3, 4 + 4


def test_a_clustering_with_too_many_small_clusters_is_done_again(monkeypatch):
    x = torch.randn(8, 2)
    scripted(monkeypatch, [GOOD, BAD, BETTER, GOOD])  # partitions 0 and 1, then 1 again and again
    found = parts.cluster_partitions(x, 2, 2, seeded(), least=3)  # the MAML rule: more than 3 members
    assert found.tolist() == [GOOD, GOOD]
    scripted(monkeypatch, [GOOD, BAD, BETTER])
    found = parts.cluster_partitions(x, 2, 2, seeded(), least=3, sizable=3, enough=0.8)  # ProtoNets: at least 3
    assert found.tolist() == [GOOD, BETTER]
    scripted(monkeypatch, [GOOD, BAD])
    found = parts.cluster_partitions(x, 2, 2, seeded(), least=3, enough=0)  # pixels: no such rule
    assert found.tolist() == [GOOD, [0] * 7 + [-1]]


def test_re_runs_end_with_the_best_and_a_warning(monkeypatch):
    scripted(monkeypatch, [[*attempt, 2, 2] for attempt in (GOOD, BETTER, GOOD)])
    with pytest.warns(UserWarning, match=r"1 of 1 partitions have at most 50 % clusters of 5 or more.*worst: 1 of 3"):
        found = parts.cluster_partitions(torch.randn(10, 2), 3, 1, seeded(), least=3, sizable=5, enough=0.5, reruns=2)
    assert found.tolist() == [[*BETTER, -1, -1]]


def test_partitions_without_re_run_give_no_warning():
    x, _ = blobs(400, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts.cluster_partitions(x, 8, 2, seeded(), least=2)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=41), r"k=41 clusters needs at least as many points; there are 40"),
        (dict(k=0), r"k=0 clusters"),
        (dict(z="broken"), r"3 of 40 embeddings hold NaN or infinity"),
        (dict(z="flat"), r"embeddings are floats \[n, d\]; these are torch.float32 \[40\]"),
        (dict(least=20), r"more than 75 % of 4 clusters with 21 or more members need 84 points; there are 40"),
        (dict(least=50, enough=0), r"has 0 clusters of at least 50 members, but 1 are needed \(its largest has"),
        (dict(way=5), r"has 4 clusters of at least 2 members, but 5 are needed"),
    ],
)
def test_bad_input(change, message):
    z = torch.arange(80.0).view(40, 2)
    if change.get("z") == "broken":
        z = z.clone()
        z[3, 0], z[7], z[9, 1] = math.nan, math.inf, -math.inf
    elif change.get("z") == "flat":
        z = z[:, 0]
    settings = dict(k=4, least=2, **{"partitions": 2}) | {k: v for k, v in change.items() if k != "z"}
    with pytest.raises(ValueError, match=message):
        parts.cluster_partitions(z, generator=seeded(), **settings)


# hyperplanes


def test_signed_distance_is_that_of_the_equation():
    z, normal, point = (torch.randn(*s, generator=seeded(i)) for i, s in enumerate([(7, 4), (3, 4), (3, 4)]))
    found = parts.signed_distances(z, normal, point)
    for m in range(3):
        for i in range(7):
            want = sum(normal[m] / normal[m].norm() * (z[i] - point[m]))
            assert found[m, i].item() == pytest.approx(want.item(), abs=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_cells_are_those_of_a_loop(margin, monkeypatch):
    z, _ = blobs(500, 5)
    drawn, real = [], parts.signed_distances
    monkeypatch.setattr(parts, "signed_distances", lambda *a: drawn.append(real(*a)) or drawn[-1])
    found = parts.hyperplane_partitions(z, 3, 4, seeded(), least=4, margin=margin, planes=2)
    good = [d for d in drawn[0] if min((d >= margin).sum(), (d <= -margin).sum()) >= 40][:2]
    literal = []
    for order in (good, good[::-1]):  # a pool of two: every partition has both, in either order
        cells = [
            -1 if any(abs(d[i]) < margin for d in order) else sum(2**h for h in range(2) if order[h][i] > 0)
            for i in range(500)
        ]
        literal.append([c if cells.count(c) >= 4 else -1 for c in cells])
    assert found.shape == (4, 500) and all(f in literal for f in found.tolist())


def test_cells_have_enough_members_and_ways():
    z, _ = blobs(3000, 16)
    found = parts.hyperplane_partitions(z, 20, 40, seeded(), least=6)
    assert found.dtype == torch.int16 and found.max() < 32
    counts = parts.class_sizes(found, 32)
    assert ((counts == 0) | (counts >= 6)).all() and ((counts >= 6).sum(1) >= 20).all()
    assert torch.equal(found, parts.hyperplane_partitions(z, 20, 40, seeded(), least=6))


def test_a_margin_leaves_points_out():
    z, _ = blobs(3000, 16)
    left_out = [
        (parts.hyperplane_partitions(z, 4, 10, seeded(), least=6, margin=m) < 0).float().mean() for m in (0, 0.3)
    ]
    assert left_out[0] < 0.01 and left_out[1] > 0.1


def test_impossible_hyperplanes_are_refused():
    z, _ = blobs(300, 8)
    with pytest.raises(ValueError, match="only 0 of 2000 random hyperplanes have 60 of the 300 points beyond .* 9 on"):
        parts.hyperplane_partitions(z, 5, 3, seeded(), least=6, margin=9, tries=2)
    with pytest.raises(
        ValueError, match=r"only 0 of \d+ partitions by 7 hyperplanes with margin 0 have 100 cells of at"
    ):
        parts.hyperplane_partitions(z, 100, 3, seeded(), least=6, tries=2)


# chance and pixels


def test_random_partitions_are_uniform_and_independent():
    found = parts.random_partitions(5000, 10, 3, seeded())
    assert found.shape == (3, 5000) and found.dtype == torch.int16
    counts = parts.class_sizes(found, 10)
    assert counts.min() > 400 and counts.max() < 600
    assert (found[0] == found[1]).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_zca_is_the_recipe():
    images = torch.randint(0, 256, (200, 1, 5, 5), generator=seeded(), dtype=torch.uint8)
    images[0] = 7  # a blank image has no contrast
    x = images.numpy().reshape(200, 25).astype(np.float64)
    x = np.stack([(row - row.mean()) / np.sqrt(row.var() + 10) for row in x])
    x = x - x.mean(0)
    u, s, _ = np.linalg.svd(x.T @ x / 200)
    want = x @ (u @ np.diag(1 / np.sqrt(s + 1e-5)) @ u.T)
    found = parts.zca(images)
    assert found.dtype == torch.float32 and np.allclose(found.numpy(), want, atol=1e-3)
    values = torch.linalg.eigvalsh(found.t() @ found / 200)
    assert torch.allclose(values[1:], torch.ones(24), atol=1e-2)  # white, but for the mean that was taken away


def test_impossible_sizes_are_refused():
    for wrong in (lambda: parts.random_partitions(50, 0, 2, seeded()),
                  lambda: parts.random_partitions(50, 3, 0, seeded()),
                  lambda: parts.hyperplane_partitions(torch.rand(50, 4), 1, 2, seeded(), least=2)):  # fmt: skip
        with pytest.raises(ValueError, match="asked for; at least one of"):
            wrong()


def test_each_partition_is_clustered_under_its_own_metric():
    """Heaps at the corners of a square: two clusters halve it across the side that the metric makes the longer."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(10, 1)
    w = parts.random_scalings(8, 2, seeded(1))
    found = parts.cluster_partitions(x, 2, 8, seeded(1), least=6, restarts=10)
    for labels, longer in zip(found[1:], w[1:].argmax(1)):
        side = x[:, longer].to(labels.dtype)
        assert torch.equal(labels, side) or torch.equal(labels, 1 - side)
    assert len(w[1:].argmax(1).unique()) == 2


def test_a_single_partition_is_the_best_of_ten(monkeypatch):
    asked = []
    monkeypatch.setattr(parts, "_cluster", lambda z, *rest: asked.append(rest[-1]) or torch.arange(len(z))[None] % 2)
    for partitions in (1, 2):
        parts.cluster_partitions(torch.randn(20, 2), 2, partitions, seeded(), least=3)
    assert asked == [10, 1, 1]


def test_points_on_hyperplanes_are_spread_as_asked(monkeypatch):
    drawn, real = [], parts.signed_distances
    monkeypatch.setattr(parts, "signed_distances", lambda z, n, points: drawn.append(points) or real(z, n, points))
    for spread in (0.0, 0.8):
        drawn.clear()
        parts.hyperplane_partitions(blobs(3000, 16)[0], 4, 2, seeded(), least=6, spread=spread, planes=20)
        assert 0.99 * spread <= torch.cat(drawn).abs().max() <= spread
