"""Chapter 7: every labeled equation, written out, equals the function it names; scratch code equals the library."""

import math

import pytest
import torch
import torch.nn.functional as F
from scratch import scratch_namespace

from umeta_core import inspection, kmeans, partitions
from umeta_core.baselines import ClusterMatching, LinearClassifier, Ridge
from umeta_core.episodes import Episodes

T, N, K, Q, D = 3, 4, 3, 5, 6


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/07_cactus.md")


@pytest.fixture
def z():
    """60 points in three heaps [60, d]."""
    g = torch.Generator().manual_seed(0)
    heaps = 3 * torch.randn(3, 1, D, generator=g, dtype=torch.float64)
    return (heaps + torch.randn(3, 20, D, generator=g, dtype=torch.float64)).flatten(0, 1)


@pytest.fixture
def episodes():
    g = torch.Generator().manual_seed(1)
    centers = torch.randn(T, N, 1, D, generator=g, dtype=torch.float64)
    x = centers + torch.randn(T, N, K + Q, D, generator=g, dtype=torch.float64)
    return Episodes(x[:, :, :K], x[:, :, K:])


@pytest.fixture
def table():
    """Counts [clusters, labels], with an empty cluster and zeros."""
    counts = torch.randint(0, 6, (5, 4), generator=torch.Generator().manual_seed(2))
    counts[3] = 0
    return counts


def test_eq_kmeans(z):
    """The inertia is the sum over clusters, and neither another cluster for a point nor another mean lowers it."""
    found = kmeans.lloyd(z, z[::13].clone(), iterations=100, tol=0)
    members = [[i for i in range(len(z)) if found.assignment[i] == c] for c in range(len(found.centroids))]
    total = sum(((z[i] - found.centroids[c]) ** 2).sum() for c, ms in enumerate(members) for i in ms)
    torch.testing.assert_close(found.inertia, total)
    for c, ms in enumerate(members):
        torch.testing.assert_close(found.centroids[c], z[ms].mean(0))
    assert torch.equal(torch.cdist(z, found.centroids).argmin(1), found.assignment)


def test_eq_metric(z):
    """The first metric is the identity; k-means of z * w minimizes the sum of distances in the metric diag(w)^2."""
    w = partitions.random_scalings(200, D, torch.Generator().manual_seed(0))
    assert w.shape == (200, D) and (w[0] == 1).all()
    assert w[1:].min() >= 0 and w[1:].max() <= 1
    assert abs(w[1:].mean() - 0.5) < 0.03 and abs(w[1:].var() - 1 / 12) < 0.01  # U(0, 1)
    w = w[1].double()
    found = kmeans.kmeans(z * w, 3, torch.Generator().manual_seed(0), tol=0)
    A = torch.diag(w) ** 2
    mu = [z[found.assignment == c].mean(0) for c in range(3)]
    total = sum((z[i] - mu[c]) @ A @ (z[i] - mu[c]) for i, c in enumerate(found.assignment))
    torch.testing.assert_close(found.inertia, total)


def test_eq_hyperplane(z):
    g = torch.Generator().manual_seed(3)
    normals, points = torch.randn(2, 4, D, generator=g, dtype=torch.float64)
    s = partitions.signed_distances(z, normals, points)
    assert s.shape == (4, len(z))
    for h in range(4):
        for i in range(len(z)):
            length = math.sqrt(sum(v**2 for v in normals[h]))
            literal = sum(normals[h, j] * (z[i, j] - points[h, j]) for j in range(D)) / length
            torch.testing.assert_close(s[h, i], literal)


def test_eq_zca():
    images = torch.randint(0, 256, (300, 1, 4, 4), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    x = images.flatten(1).double()
    u = torch.stack([(row - row.mean()) / (((row - row.mean()) ** 2).mean() + 10) ** 0.5 for row in x])
    u = u - u.mean(0)
    covariance = sum(torch.outer(row, row) for row in u) / len(u)
    values, V = torch.linalg.eigh(covariance)
    whitener = V @ torch.diag((values + 1e-5) ** -0.5) @ V.T
    torch.testing.assert_close(partitions.zca(images).double(), u @ whitener, rtol=1e-3, atol=1e-3)


def test_eq_purity(table):
    literal = sum(max(row) for row in table.tolist()) / int(table.sum())
    assert inspection.purity(table) == pytest.approx(literal)


def test_eq_nmi(table):
    p = (table / table.sum()).tolist()
    pc, py = [sum(row) for row in p], [sum(column) for column in zip(*p)]
    information = sum(
        p[c][y] * math.log(p[c][y] / (pc[c] * py[y])) for c in range(5) for y in range(4) if p[c][y] > 0
    )
    entropies = [-sum(q * math.log(q) for q in marginal if q > 0) for marginal in (pc, py)]
    assert inspection.nmi(table) == pytest.approx(2 * information / sum(entropies), rel=1e-5)


def test_eq_ridge(episodes):
    """The closed form; and it is the minimum of squared error plus weight decay."""
    strength = 0.7
    scores = Ridge(strength).predict(episodes)
    xs, ys, xq, _ = episodes.flat()
    for t in range(T):
        mean, Y = xs[t].mean(0), F.one_hot(ys[t], N).double()
        X = xs[t] - mean
        literal = (xq[t] - mean) @ X.T @ torch.linalg.inv(X @ X.T + strength * torch.eye(N * K)) @ (Y - 1 / N) + 1 / N
        torch.testing.assert_close(scores[t], literal, rtol=1e-6, atol=1e-6)
        W = torch.linalg.solve(X.T @ X + strength * torch.eye(D), X.T @ (Y - 1 / N))  # where the gradient is zero
        torch.testing.assert_close(scores[t], (xq[t] - mean) @ W + 1 / N, rtol=1e-6, atol=1e-6)


def test_eq_kernel_logistic(episodes):
    """Weights recovered from the logits lie in the span of the support set and are where the gradient is zero."""
    c = 0.8
    logits = LinearClassifier(c=c, tolerance=1e-9).predict(Episodes(episodes.support, episodes.support))
    queries = LinearClassifier(c=c, tolerance=1e-9).predict(episodes)
    xs, ys, xq, _ = episodes.flat()
    for t in range(T):
        X, Y = xs[t] - xs[t].mean(0), F.one_hot(ys[t], N).double()
        residual = c * (Y - logits[t].softmax(1))  # a, by the first-order condition in W
        W = X.T @ residual
        torch.testing.assert_close(residual.sum(0), torch.zeros(N).double(), atol=1e-6, rtol=0)  # and in b
        torch.testing.assert_close(X @ W - (X @ W).mean(0), logits[t] - logits[t].mean(0), rtol=1e-5, atol=1e-5)
        b = (logits[t] - xs[t] @ W).mean(0)
        torch.testing.assert_close(queries[t], xq[t] @ W + b, rtol=1e-5, atol=1e-5)

        def objective(W, b, t=t):
            return c * F.cross_entropy(xs[t] @ W + b, ys[t], reduction="sum") + (W**2).sum() / 2

        for i in range(5):
            g = torch.Generator().manual_seed(i)
            other = W + 0.01 * torch.randn(D, N, generator=g).double(), b + 0.01 * torch.randn(N, generator=g).double()
            assert objective(*other) > objective(W, b)


def test_eq_matching(episodes):
    means = torch.randn(10, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    answers = ClusterMatching(means).predict(episodes).argmax(2)
    xs, ys, xq, _ = episodes.flat()

    def distance(x, c):
        return float(((x - means[c]) ** 2).sum())

    for t in range(T):
        home = [min(range(10), key=lambda c: distance(x, c)) for x in xs[t]]
        label = {}
        for c in set(home):
            tally = [sum(1 for i, h in enumerate(home) if h == c and ys[t, i] == y) for y in range(N)]
            label[c] = max(range(N), key=tally.__getitem__)
        for i, x in enumerate(xq[t]):
            assert answers[t, i] == label[min(sorted(label), key=lambda c: distance(x, c))]


def test_scratch_kmeans_equals_the_library(scratch, z):
    start = z[::13].clone()
    found = kmeans.lloyd(z, start, iterations=100, tol=0)
    assignment, means = scratch["lloyd"](z, start)
    assert torch.equal(assignment, found.assignment)
    torch.testing.assert_close(means, found.centroids)
    torch.testing.assert_close(scratch["objective"](z, assignment, means), found.inertia)
    far = torch.cat([start, 100 * torch.ones(1, D, dtype=torch.float64)])  # a mean without members stays
    assert torch.equal(scratch["means_of"](z, scratch["nearest"](z, far), far)[-1], far[-1])


def test_scratch_metric_equals_the_library(scratch, z):
    w = scratch["random_factors"](5, D, torch.Generator().manual_seed(0)).double()
    assert w.shape == partitions.random_scalings(5, D, torch.Generator().manual_seed(0)).shape and (w[0] == 1).all()
    torch.testing.assert_close(scratch["metric_distance"](z[0], z[1], w[1]), ((z[0] - z[1]) * w[1]).square().sum())


def test_scratch_scores_equal_the_library(scratch):
    g = torch.Generator().manual_seed(6)
    partition, labels = torch.randint(-1, 6, (200,), generator=g), torch.randint(0, 9, (200,), generator=g)
    table, look = scratch["counts"](partition, labels), inspection.inspect(partition, labels)
    assert table.sum() == (partition >= 0).sum()
    assert scratch["purity"](table).item() == pytest.approx(look.purity, rel=1e-5)
    assert scratch["nmi"](table).item() == pytest.approx(look.nmi, rel=1e-4)


def test_scratch_hyperplanes_equal_the_library(scratch, z):
    g = torch.Generator().manual_seed(7)
    normals, points = torch.randn(2, 2, D, generator=g, dtype=torch.float64)
    by_hand = torch.stack([scratch["signed_distance"](z, v, p) for v, p in zip(normals, points)])
    torch.testing.assert_close(by_hand, partitions.signed_distances(z, normals, points))
    cells = scratch["cells"](by_hand, 0.5)
    assert ((cells == -1) == (by_hand.abs() < 0.5).any(0)).all() and set(cells.tolist()) <= {-1, 0, 1, 2, 3}
    assert ((cells[cells >= 0] % 2 == 1) == (by_hand[0, cells >= 0] > 0)).all()


def test_scratch_zca_equals_the_library(scratch):
    images = torch.randint(0, 256, (300, 1, 4, 4), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)
    ours = scratch["zca"](images.flatten(1).double())
    torch.testing.assert_close(partitions.zca(images).double(), ours, rtol=1e-3, atol=1e-3)


def test_scratch_classifiers_equal_the_library(scratch, episodes):
    means = torch.randn(10, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    xs, ys, xq, _ = episodes.flat()
    linear = LinearClassifier(c=0.8, tolerance=1e-9).predict(episodes)
    for t in range(T):
        w, b = scratch["logistic_regression"](xs[t], ys[t], N, c=0.8)
        torch.testing.assert_close(linear[t], xq[t] @ w + b, rtol=1e-4, atol=1e-4)
        ridge = scratch["ridge"](xs[t], ys[t], xq[t], N, 0.7)
        torch.testing.assert_close(Ridge(0.7).predict(episodes)[t], ridge, rtol=1e-6, atol=1e-6)
        matched = scratch["cluster_matching"](xs[t], ys[t], xq[t], means)
        assert torch.equal(ClusterMatching(means).predict(episodes)[t].argmax(1), matched)
