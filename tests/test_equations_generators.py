"""Chapter 11: every labeled equation, written out, equals the function it names; scratch code equals the library."""

import math

import pytest
import torch
from scratch import scratch_namespace
from torch.distributions import Bernoulli, Normal, kl_divergence

from umeta_core import generators
from umeta_core.generators import MSGAN, VAE
from umeta_core.latent_tasks import in_class

SMALL = (((4, 3, 2), (4, 3, 2)), ((4, 3, 2), (4, 3, 2)))
B, N, L = 6, 5, 7


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/11_generators.md")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@pytest.fixture
def pictures():
    return torch.randint(0, 256, (B, 1, 28, 28), generator=rng(), dtype=torch.uint8)


def vae(**options):
    return VAE(latent=L, layers=SMALL, generator=rng(), **options).double()


def gradients(loss, weights):
    return torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)


def assert_same_gradients(a, b, weights):
    for x, y in zip(gradients(a, weights), gradients(b, weights)):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y)


def test_eq_vae_bound(pictures):
    """Minus the two losses is the expected log-likelihood at z = mean + std * noise, less the divergence."""
    model, x, noise = vae().eval(), pictures.double() / 255, randn(B, L)
    mean, std = model.posterior(x)
    q = Normal(mean, std)
    z = mean + std * noise
    made = Bernoulli(probs=model.decode(z), validate_args=False)  # gray pixels are no outcomes of a coin
    likelihood = made.log_prob(x).flatten(1).sum(1).mean()
    divergence = kl_divergence(q, Normal(torch.zeros(()).double(), 1.0)).sum(1).mean()
    first, second = model.losses(x, noise)
    torch.testing.assert_close(-first, likelihood, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, divergence)
    prior = Normal(torch.zeros(L).double(), 1.0)
    z = q.sample((20_000,))
    sampled = (q.log_prob(z) - prior.log_prob(z)).sum(2).mean()
    torch.testing.assert_close(second, sampled, rtol=0.05, atol=0.05)


def test_eq_vae_kl():
    mean, log_var = randn(B, L).requires_grad_(), randn(B, L, seed=1).requires_grad_()
    literal = 0
    for i in range(B):
        for j in range(L):
            variance = math.exp(log_var[i, j].item())
            literal += (mean[i, j].item() ** 2 + variance - 1 - math.log(variance)) / 2 / B
    value = generators.kl_divergence(mean, log_var)
    assert value.item() == pytest.approx(literal)
    exact = kl_divergence(Normal(mean, (log_var / 2).exp()), Normal(torch.zeros(()).double(), 1.0)).sum(1).mean()
    assert_same_gradients(value, exact, [mean, log_var])


def entropy(logit, label):
    return math.log(1 + math.exp(logit)) - label * logit


def test_eq_gan_discriminator():
    logits, noise = 2 * randn(2, B), 0.05 * torch.rand(2, B, generator=rng(1))
    made = sum(entropy(d, 1 + n) for d, n in zip(logits[0].tolist(), noise[0].tolist())) / B
    real = sum(entropy(d, n) for d, n in zip(logits[1].tolist(), noise[1].tolist())) / B
    assert generators.discriminator_loss(logits, noise).item() == pytest.approx((made + real) / 2, rel=1e-5)
    sure = torch.tensor([[1e4], [0.0]])
    assert generators.discriminator_loss(sure, torch.full((2, 1), 0.05)) < -100  # no lower bound above 1


def one_step(pictures, ratio="released"):
    """Losses of a step that moves nothing, and what it drew."""
    model = MSGAN(latent=L, width=4, ratio=ratio, lr=0.0, generator=rng())
    model.opt = model.optimizers()
    losses = model.step(pictures, torch.arange(B), rng(1))
    g = rng(1)
    z = model.prior(3 * B, g).split(B)
    return model, losses, z, 0.05 * torch.rand(2, B, generator=g)


@pytest.mark.parametrize("ratio", ["released", "original"])
def test_eq_gan_generator(pictures, ratio):
    """The sum of two logits in one cross-entropy with label 0, and R with the latents that the ratio takes."""
    model, losses, z, _ = one_step(pictures, ratio)
    first, second = (model.discriminate(model.decode(part)).tolist() for part in z[:2])
    literal = sum(entropy(a + b, 0) for a, b in zip(first, second)) / B
    assert losses["generator"].item() == pytest.approx(literal, rel=1e-5)
    of_denominator = z[0] if ratio == "original" else z[2]
    term = generators.mode_seeking(model.decode(z[0]), model.decode(z[1]), of_denominator, z[1], ratio)
    torch.testing.assert_close(losses["modes"], term)
    moved = MSGAN(latent=L, width=4, ratio=ratio, lr=1e-3, generator=rng())
    moved.opt = [torch.optim.SGD(moved.discriminator.parameters(), 0.0),
                 torch.optim.SGD(moved.generator.parameters(), 1.0)]  # fmt: skip
    before = [p.detach().clone() for p in moved.generator.parameters()]
    moved.step(pictures, torch.arange(B), rng(1))
    logits = [model.discriminate(model.decode(part)) for part in z[:2]]
    total = torch.log1p((logits[0] + logits[1]).exp()).mean() + term
    slopes = gradients(total, list(model.generator.parameters()))
    for p, old, slope in zip(moved.generator.parameters(), before, slopes):
        torch.testing.assert_close(old - p, slope, rtol=1e-3, atol=1e-5)


def test_eq_mode_seeking():
    x1, x2 = torch.rand(2, B, 1, 4, 4, generator=rng(), dtype=torch.float64)
    z1, z2 = randn(2, B, L)
    images = [sum(abs(a - b) for a, b in zip(x1[i].flatten().tolist(), x2[i].flatten().tolist())) / 16
              for i in range(B)]  # fmt: skip
    latents = [sum(abs(a - b) for a, b in zip(z1[i].tolist(), z2[i].tolist())) / L for i in range(B)]
    literal = 1 / ((sum(images) / B) / (sum(latents) / B) + 1e-5)
    assert generators.mode_seeking(x1, x2, z1, z2).item() == pytest.approx(literal)
    pairs = 1 / (sum(a / b for a, b in zip(images, latents)) / B + 1e-5)
    assert generators.mode_seeking(x1, x2, z1, z2, "released").item() == pytest.approx(pairs)


@pytest.mark.parametrize(("policy", "strength"), [("N", 0.5), ("RO", 0.2), ("OC", 0.4)])
def test_eq_lasium_policies(policy, strength):
    z = torch.randn(2, N, L, generator=rng())
    made = in_class(z, 4, policy, strength, rng(1))
    drawn = torch.randn(2, N, 4, L, generator=rng(1))  # epsilon or v
    for t in range(2):
        for c in range(N):
            for k in range(1, 5):
                if policy == "N":
                    literal = z[t, c] + strength * drawn[t, c, k - 1]
                else:
                    v = drawn[t, c, k - 1] if policy == "RO" else z[t, (c + k) % N]
                    literal = z[t, c] + strength * (v - z[t, c])
                torch.testing.assert_close(made[t, c, k - 1], literal)


def test_scratch_bound_equals_the_library(scratch, pictures):
    model, x, noise = vae().eval(), pictures.double() / 255, randn(B, L)

    def statistics(x):
        h = model.encoder(x)
        return model.mean(h), model.log_var(h)

    ours = scratch["bound"](statistics, model.decoder, x, noise)
    for a, b in zip(ours, model.losses(x, noise)):
        torch.testing.assert_close(a, b)
        assert_same_gradients(a, b, list(model.parameters()))


def test_scratch_gan_losses_equal_the_library(scratch, pictures):
    for ratio in ("released", "original"):
        model, losses, z, noise = one_step(pictures, ratio)
        x1, x2 = model.decode(z[0]), model.decode(z[1])
        judged = [model.discriminate(x) for x in (x1, x2, pictures.float() / 255)]
        first = z[0] if ratio == "original" else z[2]
        ours = {"discriminator": scratch["discriminator_loss"](judged[0], judged[2], noise),
                "generator": scratch["deceive"](*judged[:2]),
                "modes": scratch["seek"](x1, x2, first, z[1], ratio == "released")}  # fmt: skip
        for name, loss in ours.items():
            torch.testing.assert_close(loss, losses[name])
        library = generators.mode_seeking(x1, x2, first, z[1], ratio)
        assert_same_gradients(ours["modes"], library, list(model.generator.parameters()))
        library = generators.discriminator_loss(torch.stack([judged[0], judged[2]]), noise)
        assert_same_gradients(ours["discriminator"], library, list(model.discriminator.parameters()))


def test_scratch_policies_equal_the_library(scratch):
    z = torch.randn(N, L, generator=rng())
    for policy in ("N", "RO", "OC"):
        noise = torch.zeros(N, 6, L)
        drawn = slice(4, 5) if policy == "OC" else slice(None)
        noise[:, drawn] = torch.randn(noise[:, drawn].shape, generator=rng(1))
        made = scratch["members"](z, 6, policy, 0.3, noise)
        torch.testing.assert_close(made, in_class(z[None], 6, policy, 0.3, rng(1))[0])


def test_scratch_probability_of_different_classes(scratch):
    """By counting all ordered draws of a small set."""
    labels, right, total = [0, 0, 0, 1, 1, 1, 2, 2, 2], 0, 0
    for i in range(9):
        for j in range(9):
            for k in range(9):
                if len({i, j, k}) == 3:
                    total += 1
                    right += len({labels[i], labels[j], labels[k]}) == 3
    assert scratch["all_different"](3, 3, 3) == pytest.approx(right / total)
