"""Chapter 6: every labeled equation, written out, equals the function it names; scratch code equals the library."""

import math

import pytest
import torch
import torch.nn.functional as F
from scratch import scratch_namespace

from umeta_core.embeddings import acai, bigan, deepcluster, infogan
from umeta_core.embeddings.acai import ACAI
from umeta_core.embeddings.deepcluster import DeepCluster
from umeta_core.embeddings.simple import PCAPixels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/06_embeddings.md")


@pytest.fixture
def images():
    return torch.randint(256, (120, 1, 28, 28), dtype=torch.uint8, generator=seeded())


@pytest.fixture
def two():
    """Two vectors of 30 numbers that take part in a gradient."""
    return torch.randn(2, 30, generator=seeded(1), dtype=torch.float64).requires_grad_()


def sigma(a):
    return 1 / (1 + math.exp(-a))


def small_deepcluster():
    options = dict(d=5, clusters=6, width=1 / 64, kernel=3, crop=28, flip=False, dropout=0.0)
    model = DeepCluster(1, 28, generator=seeded(), **options)
    model.opt = model.optimizers()
    return model


def test_eq_pca_whitening(images):
    """One component of one image at a time, from the singular values of the centered pixels."""
    model = PCAPixels(d=3)
    model.fit(images)
    x = images.flatten(1).double() / 255
    mean = x.mean(0)
    _, singular, directions = torch.linalg.svd(x - mean)
    z = model.embed(images)
    for i in (0, 57):
        for j in range(3):
            literal = (directions[j] @ (x[i] - mean)) / (singular[j] ** 2 / 119).sqrt()
            torch.testing.assert_close(z[i, j].abs().double(), literal.abs(), rtol=1e-3, atol=1e-4)


def test_eq_acai_critic(two):
    on_mix, on_blend = two
    alpha = torch.rand(30, generator=seeded(2), dtype=torch.float64) / 2
    literal = sum((m - a) ** 2 + b**2 for m, a, b in zip(on_mix.tolist(), alpha.tolist(), on_blend.tolist())) / 30
    assert acai.critic_loss(on_mix, alpha, on_blend).item() == pytest.approx(literal)


def test_eq_acai_autoencoder():
    x, again = torch.rand(2, 4, 1, 5, 5, generator=seeded(), dtype=torch.float64)
    on_mix = torch.randn(4, generator=seeded(1), dtype=torch.float64)
    literal = sum((x[i] - again[i]).square().sum() / 25 + 0.5 * on_mix[i] ** 2 for i in range(4)) / 4
    torch.testing.assert_close(acai.autoencoder_loss(x, again, on_mix, 0.5), literal)


def test_eq_bigan(two):
    real, made = (a.tolist() for a in two)
    value = sum(math.log(sigma(a)) for a in real) / 30 + sum(math.log(1 - sigma(a)) for a in made) / 30
    swapped = sum(math.log(1 - sigma(a)) for a in real) / 30 + sum(math.log(sigma(a)) for a in made) / 30
    discriminator, players = bigan.bigan_losses(*two)
    assert discriminator.item() == pytest.approx(-value / 2) and players.item() == pytest.approx(-swapped / 2)


def test_eq_infogan():
    category, numbers = torch.randint(4, (20,), generator=seeded()), torch.rand(20, 2, generator=seeded()) * 2 - 1
    read = torch.randn(20, 6, generator=seeded(1))
    literal = math.log(4) + 2 * math.log(2)  # the entropy of the code
    for i in range(20):
        total = sum(math.exp(a) for a in read[i, :4].tolist())
        literal += math.log(math.exp(read[i, category[i]]) / total) / 20
        for c, mean in zip(numbers[i].tolist(), read[i, 4:].tolist()):
            literal += math.log(math.exp(-((c - mean) ** 2) / 2) / math.sqrt(2 * math.pi)) / 20
    bound = infogan.information(torch.cat([F.one_hot(category, 4), numbers], 1), read, 4)
    assert bound.item() == pytest.approx(literal, rel=1e-5)


def test_eq_deepcluster(images):
    model = small_deepcluster()
    model.start_epoch(images, 0, 1, seeded(1))
    z = model.eval().embed(images)
    means = torch.stack([z[model.labels == j].mean(0) for j in range(6)])
    nearest = torch.stack([torch.stack([(v - m).square().sum() for m in means]).argmin() for v in z])
    assert (nearest == model.labels).float().mean() > 0.9  # k-means may stop before its last moves

    index = torch.arange(50)
    model.train()
    rows = (F.relu(model.features(images[index] / 255)) @ model.top.weight.T + model.top.bias).detach()
    literal = 0
    for row, y in zip(rows.tolist(), model.labels.tolist()):
        literal -= math.log(math.exp(row[y]) / sum(math.exp(a) for a in row)) / 50
    assert model.step(images, index, seeded())["loss"].item() == pytest.approx(literal, rel=1e-5)


def test_eq_whitening():
    z = torch.randn(200, 7, generator=seeded()) @ torch.randn(7, 7, generator=seeded(1)) + 3
    mean, matrix = deepcluster.pca_whitening(z, 4)
    _, singular, directions = torch.linalg.svd((z - z.mean(0)).double())
    for j in range(4):
        literal = directions[j] / (singular[j] ** 2 / 199).sqrt()
        torch.testing.assert_close(matrix[:, j].double().abs(), literal.abs(), rtol=1e-3, atol=1e-5)
    w = (z - mean) @ matrix
    torch.testing.assert_close(w.T.cov(), torch.eye(4), rtol=1e-3, atol=1e-3)
    for i in (0, 100):
        torch.testing.assert_close(deepcluster.apply_whitening(z, mean, matrix)[i], w[i] / w[i].square().sum().sqrt())


def test_scratch_whitening_equals_the_library(scratch, images):
    x = images.flatten(1).float() / 255
    model = PCAPixels(d=6)
    model.fit(images)
    ours = scratch["whiten"](x, *scratch["pca"](x, 6))
    torch.testing.assert_close(ours.abs(), model.embed(images).abs(), rtol=1e-2, atol=1e-3)
    ours = scratch["whitened"](x[:, :20], 6)
    theirs = deepcluster.apply_whitening(x[:, :20], *deepcluster.pca_whitening(x[:, :20], 6))
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-2, atol=1e-3)


def test_scratch_acai_equals_the_library(scratch):
    model = ACAI(depth=2, latent=2, generator=seeded()).double()
    x = torch.rand(6, 1, 32, 32, generator=seeded(1), dtype=torch.float64) * 2 - 1
    alpha = torch.rand(6, generator=seeded(2), dtype=torch.float64) / 2
    ours = scratch["acai_losses"](model.encoder, model.decoder, model.judge, x, alpha)
    theirs = model.losses(x, alpha.view(-1, 1, 1, 1))
    for a, b, player in zip(ours, theirs, (model._autoencoder(), model._critic())):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(*(torch.autograd.grad(loss, player, retain_graph=True) for loss in (a, b)))


def test_scratch_pair_losses_equal_the_library(scratch, two):
    for ours, theirs in zip(scratch["pair_losses"](*two), bigan.bigan_losses(*two)):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(loss, two)[0] for loss in (ours, theirs)))


def test_scratch_information_equals_the_library(scratch):
    category, numbers = torch.randint(10, (20,), generator=seeded()), torch.rand(20, 2, generator=seeded()) * 2 - 1
    read = torch.randn(20, 12, generator=seeded(1)).requires_grad_()
    ours = scratch["information"](category, numbers, read[:, :10], read[:, 10:])
    theirs = infogan.information(torch.cat([F.one_hot(category, 10), numbers], 1), read, 10)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(bound, read)[0] for bound in (ours, theirs)))


def test_scratch_clusters_equal_the_library(scratch, images):
    model = small_deepcluster()
    model.start_epoch(images, 0, 1, seeded(1))
    model.train()
    ours = scratch["cluster_loss"](model.features(images[:50] / 255), model.top, model.labels[:50])
    torch.testing.assert_close(ours, model.step(images, torch.arange(50), seeded())["loss"])
    z = model.eval().embed(images)
    centroids = z[:4]
    assert torch.equal(scratch["pseudo_labels"](z, centroids)[:4], torch.arange(4))
