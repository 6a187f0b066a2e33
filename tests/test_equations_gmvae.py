"""Chapter 14: every labeled equation, written out, equals the function it names; scratch code equals the library."""

import math

import pytest
import torch
import torch.nn.functional as F
from scratch import scratch_namespace

from umeta_core.em import Mixture, em, labeled_start
from umeta_core.episodes import Episodes
from umeta_core.gmvae_networks import FeatureDecoder, ImageDecoder, ImageEncoder, SetBlock
from umeta_core.meta_gmvae import MetaGMVAE

T, M, S, D, W, K, WAY = 2, 9, 4, 3, 8, 3, 3


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/14_meta_gmvae.md")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def model(**options):
    g = rng()
    options = {"components": K, "samples": S, "iterations": 5} | options
    decoder = FeatureDecoder(W, D, generator=g)
    return MetaGMVAE(None, decoder, features=W, latent=D, generator=g, **options).double()


@pytest.fixture
def h():
    return torch.rand(T, M, W, generator=rng(1), dtype=torch.float64) * 3


def log_normal(z, mean, variance):
    """log N(z; mean, diag variance) of vectors of numbers, dimension by dimension."""
    return sum(-((a - b) ** 2) / (2 * v) - math.log(2 * math.pi * v) / 2 for a, b, v in zip(z, mean, variance))


def log_mixture(z, weights, means):
    return math.log(sum(w * math.exp(log_normal(z, m, [1.0] * D)) for w, m in zip(weights, means)))


def drawn(gmvae, h, seed):
    """Means, log-variances and samples as `terms` draws them, and the generator after it."""
    noise = rng(seed)
    mean, log_variance = gmvae.posterior(h)
    epsilon = torch.randn(T, M, S, D, generator=noise, dtype=torch.float64)
    return mean, log_variance, mean.unsqueeze(2) + (log_variance / 2).exp().unsqueeze(2) * epsilon, noise


def literal_block(block, x):
    """One set [M, W], head by head and image by image."""
    q, k, v = (x @ layer.weight.T + layer.bias for layer in (block.query, block.key, block.value))
    size, a = W // 4, torch.zeros_like(x)
    for head in range(4):
        part = slice(head * size, (head + 1) * size)
        for j in range(len(x)):
            scores = torch.stack([q[j, part] @ k[i, part] for i in range(len(x))]) / math.sqrt(W)
            share = scores.exp() / scores.exp().sum()
            a[j, part] = q[j, part] + sum(share[i] * v[i, part] for i in range(len(x)))
    return a + (a @ block.out.weight.T + block.out.bias).clamp_min(0)


def test_eq_gmvae_block(h):
    block = SetBlock(W, generator=rng()).double()
    for t in range(T):
        torch.testing.assert_close(block(h)[t], literal_block(block, h[t]))


def test_eq_gmvae_posterior(h):
    gmvae = model()
    first, second, last = gmvae.set_encoder
    mean, log_variance = gmvae.posterior(h)
    for t in range(T):
        hidden = literal_block(second, literal_block(first, h[t]))
        torch.testing.assert_close(mean[t], hidden @ last.weight[:D].T + last.bias[:D])
        torch.testing.assert_close(log_variance[t], hidden @ last.weight[D:].T + last.bias[D:])


def test_eq_gmvae_prior(h):
    """A fixed point of EM on all samples of an episode, from some of which it started; a constant."""
    gmvae = model(iterations=300)
    _, _, z, noise = drawn(gmvae, h, 3)
    psi = gmvae.prior(z, noise)
    pooled = z.detach().flatten(1, 2)
    assert not psi.mean.requires_grad and psi.variance is None
    again = em(pooled, psi, 1)
    torch.testing.assert_close(again.mean, psi.mean, rtol=1e-3, atol=1e-4)
    best = psi.log_likelihood(pooled)
    for seed in range(20):  # a maximum, if only among neighbors
        moved = psi.mean + 0.05 * torch.randn(psi.mean.shape, generator=rng(seed), dtype=torch.float64)
        assert (Mixture(psi.weights, moved).log_likelihood(pooled) <= best + 1e-3).all()
    gmvae.iterations = 0
    start = gmvae.prior(z, rng(5)).mean
    for t in range(T):
        assert all((start[t, c] - pooled[t]).abs().amax(1).min() < 1e-12 for c in range(K))
    gmvae.episodic = False
    torch.testing.assert_close(gmvae.prior(z, noise).mean, torch.zeros(T, 1, D).double())


def test_eq_gmvae_kl(h):
    gmvae = model()
    mean, log_variance, z, noise = drawn(gmvae, h, 3)
    psi = gmvae.prior(z, noise)
    _, got = gmvae.terms(h, rng(3))
    for t in range(T):
        total = 0.0
        for j in range(M):
            posterior = mean[t, j].tolist(), log_variance[t, j].exp().tolist()
            for one in z[t, j].tolist():
                total += log_normal(one, *posterior)
                total -= log_mixture(one, psi.weights[t].tolist(), psi.mean[t].tolist())
        assert got[t].item() == pytest.approx(total / (M * S))


def test_eq_gmvae_objective(h):
    """`loss` is minus the sum over images, or their mean; the log-likelihood is minus squared errors here."""
    episodes = Episodes(h.unsqueeze(1), h.unsqueeze(1)[:, :, :0])
    for reduce, scale in (("sum", 1), ("mean", M)):
        gmvae = model(reduce=reduce)
        seed = gmvae._noise(h).initial_seed()
        gmvae.draws -= 1
        mean, log_variance, z, noise = drawn(gmvae, h, seed)
        psi = gmvae.prior(z, noise)
        losses, accuracies = gmvae.loss(episodes)
        assert not accuracies.any()
        for t in range(T):
            total = 0.0
            for j in range(M):
                for s in range(S):
                    one = z[t, j, s]
                    total -= (gmvae.decoder(one) - h[t, j]).square().sum().item()
                    total += log_mixture(one.tolist(), psi.weights[t].tolist(), psi.mean[t].tolist())
                    total -= log_normal(one.tolist(), mean[t, j].tolist(), log_variance[t, j].exp().tolist())
            assert losses[t].item() == pytest.approx(-total / S / scale)


def task(h):
    """Three labeled vectors, one of each class, and six queries."""
    y = torch.arange(WAY).expand(T, -1)
    return h[:, :WAY], y, h[:, WAY:]


def test_eq_gmvae_semi(h):
    """The mixture is what the M-step makes of its own E-step: labels for support, responsibilities for queries."""
    gmvae = model(e_step="diagonal", iterations=500)
    support, y, query = task(h)
    mixture, x, z = gmvae.adapt(support, y, query, WAY)
    known = F.one_hot(y.repeat_interleave(S, 1), WAY).double()
    q = torch.cat([known, mixture.responsibilities(z)], 1)
    every = torch.cat([x, z], 1)
    torch.testing.assert_close(mixture.weights, torch.full((T, WAY), 1 / WAY).double())
    for t in range(T):
        for c in range(WAY):
            count = q[t, :, c].sum()
            mu = sum(q[t, i, c] * every[t, i] for i in range(len(every[t]))) / count
            variance = sum(q[t, i, c] * (every[t, i] - mu) ** 2 for i in range(len(every[t]))) / count
            torch.testing.assert_close(mixture.mean[t, c], mu, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mixture.variance[t, c], variance, rtol=1e-3, atol=1e-4)
    gmvae.iterations = 0
    torch.testing.assert_close(gmvae.adapt(support, y, query, WAY)[0].mean,
                               labeled_start(x, y.repeat_interleave(S, 1), WAY).mean)  # fmt: skip


def test_eq_gmvae_predict(h):
    gmvae = model()
    support, y, query = task(h)
    mixture, _, z = gmvae.adapt(support, y, query, WAY)
    got = gmvae.classify(support, y, query, WAY).exp()
    for t in range(T):
        for i in range(M - WAY):
            total = [0.0] * WAY
            for one in z[t, i * S : (i + 1) * S].tolist():
                p = [math.exp(log_normal(one, mixture.mean[t, c].tolist(), mixture.variance[t, c].tolist()))
                     for c in range(WAY)]  # fmt: skip
                total = [a + b / sum(p) / S for a, b in zip(total, p)]
            assert got[t, i].tolist() == pytest.approx(total)


def parts(gmvae):
    first, second, last = gmvae.set_encoder
    return *([b.query, b.key, b.value, b.out] for b in (first, second)), last


def test_scratch_posterior_equals_the_library(scratch, h):
    gmvae = model()
    for t in range(T):
        for ours, theirs in zip(scratch["posterior"](h[t], *parts(gmvae)), gmvae.posterior(h)):
            torch.testing.assert_close(ours, theirs[t])


def test_scratch_densities_equal_the_library(scratch):
    z = torch.randn(1, 7, D, generator=rng(), dtype=torch.float64)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    means = torch.randn(K, D, generator=rng(1), dtype=torch.float64)
    library = Mixture(weights[None], means[None])
    torch.testing.assert_close(scratch["log_prior"](z, weights, means), library.log_density(z))
    log_variance = torch.randn(D, generator=rng(2), dtype=torch.float64)
    normal = torch.distributions.Normal(means[0], (log_variance / 2).exp())
    torch.testing.assert_close(scratch["log_normal"](z, means[0], log_variance), normal.log_prob(z).sum(2))


def test_scratch_terms_and_gradients_equal_the_library(scratch):
    g = rng()
    encoder, decoder = ImageEncoder(1, 14, 4, g), ImageDecoder(D, 1, 14, 4, g)
    gmvae = MetaGMVAE(encoder, decoder, features=encoder.features, latent=D, components=K, samples=S, generator=g)
    gmvae.double()
    x = torch.rand(1, M, 1, 14, 14, generator=rng(1), dtype=torch.float64)
    noise = rng(2)
    epsilon = torch.randn(1, M, S, D, generator=noise, dtype=torch.float64)
    start = torch.rand(1, M * S, generator=noise).topk(K).indices[0]
    posterior = scratch["posterior"](gmvae.features(x)[0], *parts(gmvae))
    ours = scratch["terms"](x[0], *posterior, decoder.logits, epsilon[0], start)
    theirs = gmvae.terms(x, rng(2))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b[0])
    gradients = [torch.autograd.grad(sum(p.sum() for p in pair), list(gmvae.parameters())) for pair in (ours, theirs)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("e_step", ["identity", "diagonal"])
def test_scratch_classifier_equals_the_library(scratch, h, e_step):
    gmvae = model(e_step=e_step, iterations=10)
    support, y, query = task(h)
    _, x, z = gmvae.adapt(support, y, query, WAY)
    library = gmvae.classify(support, y, query, WAY)
    for t in range(T):
        codes = x[t].view(WAY, S, D), z[t].view(M - WAY, S, D)
        torch.testing.assert_close(scratch["classify"](codes[0], y[t], codes[1], WAY, e_step=e_step), library[t])
