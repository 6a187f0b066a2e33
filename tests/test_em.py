"""EM against a literal form, scikit-learn, and what must hold of any maximization of a likelihood."""

import math

import pytest
import torch

from umeta_core.em import Mixture, em, labeled_start, random_start


def vectors(tasks=3, n=60, d=5, k=4, dtype=torch.float64, seed=0, spread=3.0):
    """Vectors around k centers, and the centers they belong to."""
    g = torch.Generator().manual_seed(seed)
    centers = spread * torch.randn(tasks, k, d, generator=g, dtype=dtype)
    y = torch.randint(k, (tasks, n), generator=g)
    y[:, :k] = torch.arange(k)  # no class is empty
    noise = torch.randn(tasks, n, d, generator=g, dtype=dtype) * (0.5 + torch.rand(tasks, 1, d, generator=g))
    return centers.gather(1, y.unsqueeze(2).expand(-1, -1, d)) + noise.to(dtype), y


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


# The equations as they are printed, one set after the other, every difference written out ----------------------------


def normal(z, mean, variance):
    """Densities ``[n, K]``, without logarithms."""
    square = ((z.unsqueeze(1) - mean).square() / variance).sum(2)
    return (-square / 2).exp() / ((2 * math.pi) ** z.shape[1] * variance.prod(1)).sqrt()


def literal(z, start, t, iterations, labeled=None, diagonal=False, released=False, learn_weights=True):
    pi, mean, variance = start.weights[t], start.mean[t], torch.ones_like(start.mean[t])
    x, y = (labeled[0][t], labeled[1][t]) if labeled else (z[t][:0], torch.zeros(0, dtype=torch.long))
    everything, known = torch.cat([x, z[t]]), torch.nn.functional.one_hot(y, len(pi)).to(z.dtype)
    for _ in range(iterations):
        q = pi * normal(z[t], mean, torch.ones_like(variance) if released else variance)
        q = torch.cat([known, q / q.sum(1, keepdim=True)])
        mean = torch.stack([(q[:, k : k + 1] * everything).sum(0) / q[:, k].sum() for k in range(len(pi))])
        if diagonal:
            squares = (everything.unsqueeze(1) - mean).square()
            variance = (q.unsqueeze(2) * squares).sum(0) / q.sum(0).unsqueeze(1)
        pi = q.sum(0) / len(q) if learn_weights else pi
    return pi, mean, variance


@pytest.mark.parametrize("options", [
    {}, {"learn_weights": False}, {"diagonal": True}, {"diagonal": True, "released": True},
    {"diagonal": True, "learn_weights": False},
])  # fmt: skip
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("iterations", [1, 4])
def test_every_variant_is_the_printed_equation(options, with_labels, iterations):
    z, y = vectors()
    labeled = (z[:, :12], y[:, :12]) if with_labels else None
    z = z[:, 12:]
    start = labeled_start(*labeled, 4) if with_labels else random_start(z, 4, generator())
    covariance = "diagonal" if options.get("diagonal") else "identity"
    e_step = "identity" if options.get("released") else None
    got = em(z, start, iterations, labeled=labeled, covariance=covariance, e_step=e_step,
             learn_weights=options.get("learn_weights", True))  # fmt: skip
    for t in range(len(z)):
        pi, mean, variance = literal(z, start, t, iterations, labeled, **options)
        torch.testing.assert_close(got.weights[t], pi)
        torch.testing.assert_close(got.mean[t], mean)
        if covariance == "diagonal":
            torch.testing.assert_close(got.variance[t], variance)
        else:
            assert got.variance is None
        joint = pi.log() + normal(z[t], mean, variance).log()
        torch.testing.assert_close(got.log_joint(z)[t], joint)
        torch.testing.assert_close(got.log_density(z)[t], joint.exp().sum(1).log())
        torch.testing.assert_close(got.responsibilities(z)[t], joint.softmax(1))


def test_diagonal_mixture_equals_scikit_learn():
    mixture, exceptions = (pytest.importorskip(f"sklearn.{name}") for name in ("mixture", "exceptions"))
    z, _ = vectors(n=200)
    start = random_start(z, 4, generator())
    for iterations in (1, 10):
        ours = em(z, start, iterations, covariance="diagonal", floor=1e-12)
        for t in range(len(z)):
            theirs = mixture.GaussianMixture(
                4, covariance_type="diag", tol=0, reg_covar=0, max_iter=iterations, weights_init=start.weights[t],
                means_init=start.mean[t], precisions_init=torch.ones_like(start.mean[t]),
            )  # fmt: skip
            with pytest.warns(exceptions.ConvergenceWarning):
                theirs.fit(z[t])
            for got, wanted in ((ours.weights, theirs.weights_), (ours.mean, theirs.means_),
                                (ours.variance, theirs.covariances_)):  # fmt: skip
                torch.testing.assert_close(got[t], torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours.log_density(z)[t], torch.from_numpy(theirs.score_samples(z[t])))
            assert torch.equal(ours.responsibilities(z)[t].argmax(1), torch.from_numpy(theirs.predict(z[t])))


@pytest.mark.parametrize("floor", [1e-4, 1.0])  # 1: most variances lie on the floor
@pytest.mark.parametrize("covariance", ["identity", "diagonal"])
@pytest.mark.parametrize("learn_weights", [True, False])
@pytest.mark.parametrize("with_labels", [True, False])
def test_likelihood_never_falls(covariance, learn_weights, with_labels, floor):
    z, y = vectors(tasks=8, n=80, spread=1.5)
    labeled = (z[:, :20], y[:, :20]) if with_labels else None
    z = z[:, 20:]
    mixture = random_start(z, 4, generator())
    before = mixture.log_likelihood(z, labeled)
    for _ in range(15):
        mixture = em(z, mixture, 1, labeled=labeled, covariance=covariance, learn_weights=learn_weights, floor=floor)
        after = mixture.log_likelihood(z, labeled)
        assert (after >= before - 1e-9 * before.abs()).all()
        before = after
    if covariance == "diagonal":
        assert mixture.variance.min() >= floor


def test_ten_iterations_are_one_taken_ten_times():
    z, _ = vectors()
    start = random_start(z, 4, generator())
    whole, steps = em(z, start, 10, covariance="diagonal"), start
    for _ in range(10):
        steps = em(z, steps, 1, covariance="diagonal")
    torch.testing.assert_close(whole.mean, steps.mean)
    torch.testing.assert_close(whole.variance, steps.variance)
    assert em(z, start, 0).mean.allclose(start.mean)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("covariance, e_step", [("identity", None), ("diagonal", None), ("diagonal", "identity")])
def test_float32_gives_float32_and_nearly_the_numbers_of_float64(covariance, e_step, with_labels):
    z, y = vectors()
    start, labeled = labeled_start(z, y, 4), (z, y) if with_labels else None
    wanted = em(z, start, labeled=labeled, covariance=covariance, e_step=e_step)
    start, labeled = labeled_start(z.float(), y, 4), (z.float(), y) if with_labels else None
    got = em(z.float(), start, labeled=labeled, covariance=covariance, e_step=e_step)
    for a, b in ((got.weights, wanted.weights), (got.mean, wanted.mean), (got.variance, wanted.variance)):
        if b is not None:
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_sets_do_not_touch_each_other():
    z, y = vectors()
    start = labeled_start(z, y, 4)
    together = em(z, start, 5, covariance="diagonal")
    for t in range(len(z)):
        alone = Mixture(start.weights[t : t + 1], start.mean[t : t + 1])
        torch.testing.assert_close(em(z[t : t + 1], alone, 5, covariance="diagonal").mean[0], together.mean[t])


# Numbers -------------------------------------------------------------------------------------------------------------


def test_nothing_underflows_in_64_dimensions():
    z, _ = vectors(n=100, d=64, spread=30.0, dtype=torch.float32)  # densities as small as exp(-50,000)
    for covariance in ("identity", "diagonal"):
        mixture = em(z, random_start(z, 4, generator()), 10, covariance=covariance)
        q = mixture.responsibilities(z)
        assert torch.isfinite(mixture.mean).all() and torch.isfinite(mixture.log_density(z)).all()
        torch.testing.assert_close(q.sum(2), torch.ones(3, 100))


@pytest.mark.parametrize("covariance", ["identity", "diagonal"])
def test_float32_far_from_the_origin_and_narrow_components_keep_their_digits(covariance):
    z, y = vectors(n=300, d=64, dtype=torch.float64)
    z = (0.05 * z + 100).float()  # shared offset of 100, standard deviations of 0.05
    start = random_start(z, 4, generator())
    got = em(z, start, 10, covariance=covariance)
    wanted = em(z.double(), Mixture(start.weights.double(), start.mean.double()), 10, covariance=covariance)
    torch.testing.assert_close(got.mean.double(), wanted.mean, rtol=0, atol=2e-4)
    torch.testing.assert_close(got.log_density(z).double(), wanted.log_density(z.double()), rtol=1e-3, atol=2e-2)
    if covariance == "diagonal":
        torch.testing.assert_close(got.variance.double(), wanted.variance, rtol=2e-3, atol=1e-6)
        assert (wanted.variance < 0.02).any()


def test_a_component_far_away_costs_no_digits():
    """An empty component may lie anywhere; what float32 says of the others must not change by it."""
    z = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([torch.zeros(64), torch.ones(64), torch.full((64,), 1e4)])[None]
    weights = torch.tensor([[0.5, 0.5, 0.0]])
    narrow, wide = Mixture(weights, mean), Mixture(weights.double(), mean.double())
    torch.testing.assert_close(narrow.log_density(z).double(), wide.log_density(z.double()), rtol=1e-4, atol=1e-2)
    found, wanted = narrow.responsibilities(z), wide.responsibilities(z.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-3)


def test_empty_components_stay_and_come_to_no_harm():
    z, y = vectors(k=2)
    far = torch.full((3, 1, 5), 1e4, dtype=torch.float64)
    start = Mixture(z.new_full((3, 3), 1 / 3), torch.cat([z[:, :2], far], 1))
    for learn_weights in (True, False):
        got = em(z, start, 5, covariance="diagonal", learn_weights=learn_weights)
        torch.testing.assert_close(got.mean[:, 2:], far)
        assert (got.weights[:, 2] == (0 if learn_weights else 1 / 3)).all()
        without = em(z, Mixture(z.new_full((3, 2), 1 / 2), z[:, :2]), 5, covariance="diagonal",
                     learn_weights=learn_weights)  # fmt: skip
        torch.testing.assert_close(got.mean[:, :2], without.mean)
        assert torch.isfinite(got.log_density(z)).all()
    z.requires_grad_()
    em(z, start, 5).log_density(z).sum().backward()  # a weight of 0 has the logarithm -inf
    assert torch.isfinite(z.grad).all()


def test_variances_keep_to_the_floor_where_all_vectors_are_alike():
    z = torch.ones(1, 10, 3)
    got = em(z, random_start(z, 2, generator()), 5, covariance="diagonal", floor=0.01)
    assert torch.allclose(got.variance, torch.tensor(0.01))
    assert torch.isfinite(got.log_density(z)).all()


def test_labels_hold_components_to_their_classes():
    z, y = vectors(tasks=20, n=100, spread=1.5)
    labeled = z[:, :40], y[:, :40]
    mixture = em(z[:, 40:], labeled_start(*labeled, 4), 10, labeled=labeled, covariance="diagonal")
    right = mixture.responsibilities(z[:, 40:]).argmax(2) == y[:, 40:]
    assert right.double().mean() > 0.75  # without labels a component is a class only by chance
    only = em(z[:, :1], labeled_start(z, y, 4), 1, labeled=(z, y), learn_weights=True)
    torch.testing.assert_close(only.weights.sum(1), torch.ones(20, dtype=torch.float64))


def test_gradients_flow_through_the_density_but_not_through_the_fit():
    z, _ = vectors(tasks=2, n=10, d=3)
    z.requires_grad_()
    for covariance in ("identity", "diagonal"):
        mixture = em(z, random_start(z, 3, generator()), 3, covariance=covariance)
        assert not mixture.mean.requires_grad and not mixture.weights.requires_grad
        assert torch.autograd.gradcheck(mixture.log_density, z)


@pytest.mark.parametrize("covariance", ["identity", "diagonal"])
def test_memory_is_linear_in_the_vectors(covariance):
    """No tensor has samples x K x d numbers."""
    z = torch.randn(2, 400, 32, generator=generator())
    start = random_start(z, 20, generator())
    with torch.profiler.profile(profile_memory=True) as profile:
        em(z, start, 2, covariance=covariance, labeled=(z[:, :50], torch.zeros(2, 50, dtype=torch.long)))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 8 * 2 * 400 * 32  # float64 where variances are concerned


# Starts and mistakes -------------------------------------------------------------------------------------------------


def test_random_starts_are_different_vectors_of_the_set():
    z, _ = vectors(tasks=50, n=6)
    start = random_start(z, 6, generator())
    torch.testing.assert_close(start.mean.sort(1).values, z.sort(1).values)  # all six, each once
    assert not torch.equal(start.mean, z)
    assert torch.equal(start.mean, random_start(z, 6, generator()).mean)
    first = torch.stack([random_start(z[:1], 1, generator(s)).mean[0, 0] for s in range(300)])
    tally = (first.unsqueeze(1) == z[0]).all(2).sum(0)
    assert tally.sum() == 300 and tally.min() > 25  # 50 expected


def test_labeled_start_is_the_mean_of_each_class():
    z, y = vectors()
    start = labeled_start(z, y, 4)
    torch.testing.assert_close(start.mean[1, 2], z[1][y[1] == 2].mean(0))
    assert (start.weights == 0.25).all() and start.variance is None


def test_mistakes_are_named():
    z, y = vectors()
    start = random_start(z, 4, generator())
    with pytest.raises(ValueError, match="61 components cannot start from 60 different vectors"):
        random_start(z, 61, generator())
    broken = z.clone()
    broken[1, :7, 2] = float("nan")
    with pytest.raises(ValueError, match="7 of 180 vectors are not finite"):
        em(broken, start)
    with pytest.raises(ValueError, match=r"labels from 0 to 3, but the components are 0 to 2"):
        labeled_start(z, y, 3)
    with pytest.raises(ValueError, match="a class of 9 has no labeled vector"):
        labeled_start(z, y, 9)
    with pytest.raises(ValueError, match=r"do not fit; use \[T, m, d\] and \[T, m\]"):
        em(z, start, labeled=(z, y[:, :3]))
    with pytest.raises(ValueError, match="no unlabeled vectors"):
        em(torch.zeros(1, 0, 2), Mixture(torch.ones(1, 1), torch.zeros(1, 1, 2)))
    with pytest.raises(ValueError, match=r"do not fit; use \[T, n, d\] and \[T, K, d\]"):
        em(z[..., :2], start)
    with pytest.raises(ValueError, match="covariance='full' is not known"):
        em(z, start, covariance="full")
    with pytest.raises(ValueError, match="needs covariance='diagonal'"):
        em(z, start, e_step="diagonal")
    with pytest.raises(ValueError, match="floor=0 is not a variance"):
        em(z, start, floor=0)
    with pytest.raises(ValueError, match="iterations=-1 is not"):
        em(z, start, iterations=-1)
    for x in (z[..., :2], z[:1]):
        with pytest.raises(ValueError, match=r"labeled vectors .* do not fit; use \[T, m, d\] and \[T, n, d\]"):
            em(z, start, labeled=(x, y[: len(x)]))
    for other in (Mixture(start.weights[:, :3], start.mean), Mixture(start.weights, start.mean, start.mean[:1])):
        with pytest.raises(ValueError, match="are not of one mixture"):
            em(z, other)


def test_the_floor_is_small_unless_another_is_asked_for():
    z = torch.ones(1, 10, 3)
    assert torch.allclose(em(z, random_start(z, 2, generator()), 5, covariance="diagonal").variance, torch.tensor(1e-4))
