"""Chapter 13: every labeled equation, written out, equals the function it names; scratch code equals the library."""

import itertools
import math

import pytest
import torch
from scratch import scratch_namespace

from umeta_core.em import Mixture, _scores, em, labeled_start, random_start

T, N, K, D = 2, 30, 3, 4


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/13_em.md")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@pytest.fixture
def z():
    return randn(T, N, D) + 3 * randn(T, K, D, seed=1).repeat(1, N // K, 1)


@pytest.fixture
def mixture():
    weights = torch.rand(T, K, generator=rng(), dtype=torch.float64) + 0.1
    variance = torch.rand(T, K, D, generator=rng(1), dtype=torch.float64) + 0.2
    return Mixture(weights / weights.sum(1, keepdim=True), randn(T, K, D, seed=2), variance)


def density(z, mean, variance):
    """N(z; mean, diag variance) of lists of numbers, dimension by dimension."""
    product = 1.0
    for x, m, v in zip(z, mean, variance):
        product *= math.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
    return product


def joint(mixture, z, t):
    """Weight times density ``[n][K]`` of task t, as lists."""
    mean = mixture.mean[t].tolist()
    variance = [[1.0] * D] * K if mixture.variance is None else mixture.variance[t].tolist()
    return [[mixture.weights[t, c].item() * density(x, mean[c], variance[c]) for c in range(K)] for x in z[t].tolist()]


def test_eq_mixture(z, mixture):
    for covariance in (mixture.variance, None):
        model = Mixture(mixture.weights, mixture.mean, covariance)
        for t in range(T):
            literal = [math.log(sum(row)) for row in joint(model, z, t)]
            assert model.log_density(z)[t].tolist() == pytest.approx(literal)


def test_eq_responsibility(z, mixture):
    for t in range(T):
        for got, row in zip(mixture.responsibilities(z)[t].tolist(), joint(mixture, z, t)):
            assert got == pytest.approx([p / sum(row) for p in row])


def test_eq_em_bound(z, mixture):
    """Any probabilities give a lower bound, the responsibilities the log-likelihood itself."""
    likelihood = mixture.log_likelihood(z)
    for t in range(T):
        p = joint(mixture, z, t)
        for kind in ("responsibilities", "others"):
            q = mixture.responsibilities(z) if kind == "responsibilities" else randn(T, N, K, seed=3).softmax(2)
            pairs = itertools.product(range(N), range(K))
            right = sum(q[t, i, c].item() * math.log(p[i][c] / q[t, i, c].item()) for i, c in pairs)
            if kind == "responsibilities":
                assert likelihood[t].item() == pytest.approx(right)
            else:
                assert likelihood[t].item() > right + 1


def m_step(q, vectors):
    """Weights, means and variances of one task from q ``[n][K]`` and vectors ``[n][d]``."""
    n = [sum(row[c] for row in q) for c in range(K)]
    mean = [[sum(q[i][c] * x[j] for i, x in enumerate(vectors)) / n[c] for j in range(D)] for c in range(K)]
    variance = [[sum(q[i][c] * (x[j] - mean[c][j]) ** 2 for i, x in enumerate(vectors)) / n[c] for j in range(D)]
                for c in range(K)]  # fmt: skip
    return [count / len(vectors) for count in n], mean, variance


@pytest.mark.parametrize("covariance", ["identity", "diagonal"])
def test_eq_m_step(z, covariance):
    start = random_start(z, K, rng())
    got = em(z, start, 1, covariance=covariance)
    for t in range(T):
        weights, mean, variance = m_step(start.responsibilities(z)[t].tolist(), z[t].tolist())
        torch.testing.assert_close(got.weights[t], torch.tensor(weights).double())
        torch.testing.assert_close(got.mean[t], torch.tensor(mean).double(), rtol=1e-6, atol=1e-6)
        if covariance == "diagonal":
            torch.testing.assert_close(got.variance[t], torch.tensor(variance).double(), rtol=1e-6, atol=1e-6)
    kept = em(z, start, 1, covariance=covariance, learn_weights=False)
    assert torch.equal(kept.weights, start.weights) and (covariance == "diagonal") == (kept.variance is not None)


def test_eq_em_labeled(z, mixture):
    """A sum over components for unlabeled vectors, a single one for labeled vectors; EM never lowers it."""
    y = torch.arange(9).expand(T, -1) % K
    x, rest = z[:, :9], z[:, 9:]
    for t in range(T):
        literal = sum(math.log(sum(row)) for row in joint(mixture, rest, t))
        literal += sum(math.log(row[c]) for row, c in zip(joint(mixture, x, t), y[t].tolist()))
        assert mixture.log_likelihood(rest, (x, y))[t].item() == pytest.approx(literal)
    fitted, last = labeled_start(x, y, K), None
    for _ in range(5):
        height = fitted.log_likelihood(rest, (x, y))
        assert last is None or (height >= last - 1e-9).all()
        fitted, last = em(rest, fitted, 1, labeled=(x, y), learn_weights=False), height


def test_eq_em_products(z, mixture):
    constant = mixture.weights.log()
    constant = constant - ((mixture.mean**2) / mixture.variance + (2 * math.pi * mixture.variance).log()).sum(2) / 2
    for t, i, c in itertools.product(range(T), range(N), range(K)):
        x, mean, variance = z[t, i], mixture.mean[t, c], mixture.variance[t, c]
        literal = constant[t, c] + (x * mean / variance).sum() - (x**2 / variance).sum() / 2
        assert _scores(z, mixture)[t, c, i].item() == pytest.approx(literal.item())
        assert mixture.log_joint(z)[t, i, c].item() == pytest.approx(literal.item())


def test_scratch_densities_equal_the_library(scratch, z, mixture):
    for t in range(T):
        one = mixture.weights[t], mixture.mean[t], mixture.variance[t]
        torch.testing.assert_close(scratch["log_joint"](z[t], *one), mixture.log_joint(z)[t])
        torch.testing.assert_close(scratch["log_joint_by_products"](z[t], *one), mixture.log_joint(z)[t])
        torch.testing.assert_close(scratch["responsibilities"](z[t], *one), mixture.responsibilities(z)[t])
        ours, theirs = z[t].clone().requires_grad_(), z.clone().requires_grad_()
        scratch["log_density"](ours, *one).sum().backward()
        mixture.log_density(theirs)[t].sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad[t])
        q = mixture.responsibilities(z)[t]
        torch.testing.assert_close(scratch["bound"](z[t], q, *one), mixture.log_likelihood(z)[t])


def test_scratch_samples_are_of_the_mixture(scratch, mixture):
    one = mixture.weights[0], mixture.mean[0], mixture.variance[0]
    drawn, c = scratch["sample"](40_000, *one, rng())
    torch.testing.assert_close(torch.bincount(c) / 40_000, one[0].float(), rtol=0, atol=0.01)
    for k in range(K):
        torch.testing.assert_close(drawn[c == k].mean(0), one[1][k], rtol=0, atol=0.05)
        torch.testing.assert_close(drawn[c == k].var(0), one[2][k], rtol=0.1, atol=0)


@pytest.mark.parametrize("covariance", ["identity", "diagonal"])
def test_scratch_em_equals_the_library(scratch, z, covariance):
    start, diagonal = random_start(z, K, rng()), covariance == "diagonal"
    library = em(z, start, 7, covariance=covariance)
    for t in range(T):
        ours = scratch["fit"](z[t], start.weights[t], start.mean[t], torch.ones(K, D).double(), 7, diagonal)
        torch.testing.assert_close(library.weights[t], ours[0])
        torch.testing.assert_close(library.mean[t], ours[1])
        if diagonal:
            torch.testing.assert_close(library.variance[t], ours[2])
    y = torch.arange(9).expand(T, -1) % K
    x, rest = z[:, :9], z[:, 9:]
    library = em(rest, labeled_start(x, y, K), labeled=(x, y), covariance=covariance, learn_weights=False)
    for t in range(T):
        mean, variance = scratch["fit_labeled"](rest[t], x[t], y[t], K, diagonal=diagonal)
        torch.testing.assert_close(library.mean[t], mean)
        if diagonal:
            torch.testing.assert_close(library.variance[t], variance)


def test_scratch_matching_tries_every_naming(scratch):
    assigned, labels = torch.randint(K, (2, 5, N), generator=rng())
    for t in range(5):
        best = max(sum(names[a] == b for a, b in zip(assigned[t].tolist(), labels[t].tolist()))
                   for names in itertools.permutations(range(K)))  # fmt: skip
        assert scratch["matched"](assigned, labels, K)[t].item() == pytest.approx(best / N)
    assert (scratch["matched"]((labels + 1) % K, labels, K) == 1).all()
