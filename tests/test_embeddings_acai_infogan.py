import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from umeta_core.data import load
from umeta_core.embeddings import infogan
from umeta_core.embeddings.acai import ACAI
from umeta_core.embeddings.infogan import BatchNorm, InfoGAN


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=12, channels=1, size=28, seed=0):
    return torch.randint(0, 256, (n, channels, size, size), generator=rng(seed), dtype=torch.uint8)


def small(which, seed=0):
    if which is ACAI:
        return ACAI(depth=2, latent=2, generator=rng(seed))
    return InfoGAN(size=8, noise=3, per_epoch=16, generator=rng(seed))


def images_for(which):
    return pictures(20) if which is ACAI else pictures(20, size=8)


def plain_sgd(model, *players):
    """Optimizers that leave the negative gradient as the difference of the weights."""
    model.opt = [torch.optim.SGD(player, lr=1.0) for player in players]
    return [[p.detach().clone() for p in player] for player in players]


def moved(players, before):
    return [[old - p.detach() for p, old in zip(player, olds)] for player, olds in zip(players, before)]


# ACAI


def literal_acai(model, images, alpha):
    """Both losses image by image, as the paper writes them (with a mean over pixels)."""
    x = F.pad(images.double() / 255, [2] * 4) * 2 - 1
    n = len(x)
    f, g, d = model.encoder, model.decoder, lambda image: model.critic(image).mean()
    autoencoder = critic = 0
    for i in range(n):
        mine, other = f(x[i : i + 1]), f(x[n - 1 - i : n - i])
        again = g(mine)
        mix = g(alpha[i] * mine + (1 - alpha[i]) * other)
        autoencoder = autoencoder + (x[i] - again[0]).square().mean() + 0.5 * d(mix) ** 2
        critic = critic + (d(mix) - alpha[i]) ** 2 + d(0.2 * x[i : i + 1] + 0.8 * again) ** 2
    return autoencoder / n, critic / n


def test_acai_losses_equal_the_formulas_image_by_image():
    model, images = small(ACAI).double(), pictures(5)
    alpha = torch.rand(5, 1, 1, 1, generator=rng(1), dtype=torch.float64) / 2
    want = literal_acai(model, images, alpha.flatten())
    autoencoder, critic, report = model.losses(model._pad(images.double() / 255), alpha)
    torch.testing.assert_close((autoencoder, critic), want)
    torch.testing.assert_close(report["autoencoder"], autoencoder)


def test_acai_each_player_follows_its_own_loss_only_and_both_move_at_once():
    model, images = small(ACAI), pictures(6)
    players = model._autoencoder(), model._critic()
    assert sum(map(len, players)) == len(list(model.parameters()))
    alpha = torch.rand(6, 1, 1, 1, generator=rng(3)) / 2
    twin = copy.deepcopy(model).double()
    losses = literal_acai(twin, images, alpha.flatten().double())
    wants = [
        torch.autograd.grad(loss, own, retain_graph=True)
        for loss, own in zip(losses, (twin._autoencoder(), twin._critic()))
    ]
    before = plain_sgd(model, *players)
    model.step(images, torch.arange(6), rng(3))
    for got, want in zip(moved(players, before), wants):
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


def test_acai_has_the_authors_networks():
    model = ACAI(generator=rng())
    filters = [(16, 1, 1), (16, 16, 3), (16, 16, 3), (32, 16, 3), (32, 32, 3), (64, 32, 3), (64, 64, 3), (128, 64, 3),
               (16, 128, 3)]  # fmt: skip
    back = [(64, 16, 3), (64, 64, 3), (32, 64, 3), (32, 32, 3), (16, 32, 3), (16, 16, 3), (16, 16, 3), (1, 16, 3)]
    for network, want in ((model.encoder, filters), (model.critic, filters), (model.decoder, back)):
        convolutions = [m for m in network if isinstance(m, nn.Conv2d)]
        assert [tuple(c.weight.shape[:3]) for c in convolutions] == want
        activated = [isinstance(network[list(network).index(c) + 1], nn.LeakyReLU) for c in convolutions[:-1]]
        assert all(activated[1:]) and activated[0] == (network is model.decoder)
        for c in convolutions:
            assert (c.bias == 0).all()
        wide = convolutions[-2].weight
        assert wide.std().item() == pytest.approx((1.04 * wide[0].numel()) ** -0.5, rel=0.06)
    assert model.d == 256 and model.embed(pictures(3)).shape == (3, 256)


def test_acai_pads_with_background_and_crops_again():
    model = ACAI(depth=2, latent=2, generator=rng())
    wide = ACAI(size=32, depth=2, latent=2, generator=rng())
    images = pictures(3)
    torch.testing.assert_close(model.embed(images), wide.embed(F.pad(images, [2] * 4)))
    z = model.embed(images)
    torch.testing.assert_close(model.decode(z), wide.decode(z)[:, :, 2:30, 2:30])
    assert model.decode(100 * z).min() >= 0 and model.decode(100 * z).max() <= 1
    color = ACAI(channels=3, size=32, depth=2, latent=2, generator=rng())
    assert color.decode(color.embed(pictures(2, 3, 32))).shape == (2, 3, 32, 32)


def test_acai_interpolation_starts_and_ends_at_the_reconstructions():
    model, a, b = small(ACAI), pictures(3), pictures(3, seed=1)
    way = model.interpolate(a, b, torch.linspace(0, 1, 5))
    assert way.shape == (3, 5, 1, 28, 28)
    for at, ends in ((0, a), (4, b)):
        torch.testing.assert_close(way[:, at], model.decode(model.embed(ends)))
    torch.testing.assert_close(way[:, 1], model.decode(0.75 * model.embed(a) + 0.25 * model.embed(b)))


def test_acai_learns_to_reconstruct():
    digits = load("digits", "train", size=28).images[:256]
    model = ACAI(depth=4, latent=4, lr=4e-3, generator=rng())

    def error():
        return (model.decode(model.embed(digits)) - digits / 255).square().mean().item()

    mean = (digits / 255 - (digits / 255).mean(0)).square().mean().item()  # of answering with the mean image
    before = error()
    history = model.fit(digits, epochs=10, batch=32, progress=False)
    assert history["reconstruction"][-1] < history["reconstruction"][0]
    assert error() < 0.8 * mean < before


def test_acai_refuses_other_images():
    with pytest.raises(ValueError, match="28x28 or 32x32, not 84x84"):
        ACAI(size=84)
    with pytest.raises(ValueError, match=r"takes images of \(1, 28, 28\), these are \(3, 28, 28\)"):
        small(ACAI).embed(pictures(2, 3))


# InfoGAN


def test_information_equals_torch_distributions():
    g = rng()
    c = torch.cat([F.one_hot(torch.tensor([2, 0, 1, 2]), 3).double(), torch.rand(4, 2, generator=g).double()], 1)
    q = torch.randn(4, 5, generator=g).double()
    D = torch.distributions
    read = D.Categorical(logits=q[:, :3]).log_prob(c[:, :3].argmax(1))
    read = read + D.Normal(q[:, 3:], 1.0).log_prob(c[:, 3:]).sum(1)
    entropy = D.Categorical(torch.ones(3).double()).entropy() + 2 * D.Uniform(-1.0, 1.0).entropy()
    torch.testing.assert_close(infogan.information(c, q, 3), entropy + read.mean())
    sure = torch.cat([1000 * c[:, :3], c[:, 3:]], 1)  # all is read: only the width of the Gaussians is lost
    best = math.log(3) + 2 * math.log(2) - math.log(2 * math.pi)
    torch.testing.assert_close(infogan.information(c, sure, 3).item(), best)


def test_gan_losses_equal_the_formulas():
    real, fake = torch.randn(2, 9, generator=rng()).double()
    D = torch.sigmoid
    want = -(D(real).log() + (1 - D(fake)).log()).mean()
    torch.testing.assert_close(infogan.discriminator_loss(real, fake), want)
    torch.testing.assert_close(infogan.generator_loss(fake), -D(fake).log().mean())


def torch_twin(network):
    """The discriminator or generator out of torch's own layers, with the same weights."""
    state = network.state_dict()

    def put(layer, name):
        weight = state[f"{name}.weight"]
        layer.weight.data = weight.reshape(layer.weight.shape).clone()
        if layer.bias is not None:
            layer.bias.data = state[f"{name}.bias"].clone()
        return layer

    def norm(cls, name):
        layer = cls(len(state[f"{name}.scale"]))
        layer.weight.data, layer.bias.data = state[f"{name}.scale"].clone(), state[f"{name}.shift"].clone()
        return layer

    if "full1.weight" in state:
        return nn.Sequential(
            put(nn.Linear(state["full1.weight"].shape[1], 1024, bias=False), "full1"), norm(nn.BatchNorm1d, "norm1"),
            nn.ReLU(), put(nn.Linear(1024, 512, bias=False), "full2"), norm(nn.BatchNorm1d, "norm2"), nn.ReLU(),
            nn.Unflatten(1, (128, 2, 2)), put(nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), "conv3"),
            norm(nn.BatchNorm2d, "norm3"), nn.ReLU(), put(nn.ConvTranspose2d(64, 1, 4, 2, 1), "conv4"), nn.Sigmoid(),
        ).double()  # fmt: skip
    leaky = nn.LeakyReLU(0.01)
    trunk = nn.Sequential(
        put(nn.Conv2d(1, 64, 4, 2, 1), "conv1"), leaky, put(nn.Conv2d(64, 128, 4, 2, 1, bias=False), "conv2"),
        norm(nn.BatchNorm2d, "norm2"), leaky, nn.Flatten(), put(nn.Linear(512, 1024, bias=False), "full"),
        norm(nn.BatchNorm1d, "norm3"), leaky,
    )  # fmt: skip
    read = nn.Sequential(
        put(nn.Linear(1024, 128, bias=False), "read"), norm(nn.BatchNorm1d, "norm4"), leaky,
        put(nn.Linear(128, 12), "code"),
    )  # fmt: skip
    return nn.ModuleList([trunk, put(nn.Linear(1024, 1), "real"), read]).double()


def literal_infogan(D, G, x, noise, c):
    """The discriminator's loss, minus log likelihoods written out; the constant of the bound as in `information`."""
    trunk, real, read = D

    def bound(q):
        numbers = -0.5 * (c[:, 10:] - q[:, 10:]) ** 2 - 0.5 * math.log(2 * math.pi)
        chosen = q[:, :10].softmax(1)[torch.arange(len(c)), c[:, :10].argmax(1)]
        return math.log(10) + 2 * math.log(2) + (chosen.log() + numbers.sum(1)).mean()

    fake = trunk(G(torch.cat([noise, c], 1)))
    deceive = -real(fake).sigmoid().log().mean() - bound(read(fake))
    see = -real(trunk(x)).sigmoid().log().mean() - (1 - real(fake).sigmoid()).log().mean() - bound(read(fake))
    return see, deceive


def test_infogan_losses_and_gradients_equal_torch_layers():
    model = small(InfoGAN).double()
    for m in model.modules():  # biases and shifts away from zero
        if isinstance(m, BatchNorm):
            m.shift.data += 0.1 * torch.randn(m.shift.shape, generator=rng(4)).double()
    D, G = torch_twin(model.discriminator), torch_twin(model.generator)
    x = torch.rand(6, 1, 8, 8, generator=rng(1)).double()
    noise, c = (t.double() for t in model.draw(6, rng(2)))
    see, deceive = literal_infogan(D, G, x, noise, c)
    got_see, (got_deceive, bound) = model.see_through(x, noise, c), model.deceive(noise, c)
    torch.testing.assert_close((got_see, got_deceive), (see, deceive))
    assert bound.item() == pytest.approx((infogan.information(c, D[2](D[0](G(torch.cat([noise, c], 1)))), 10)).item())
    for got, loss, network, twin in (
        (got_see, see, model.discriminator, D[0]), (got_deceive, deceive, model.generator, G),
    ):  # fmt: skip
        first, same = next(network.parameters()), next(twin.parameters())
        (a,), (b,) = torch.autograd.grad(got, first), torch.autograd.grad(loss, same, retain_graph=True)
        torch.testing.assert_close(a, b)
    assert not any(p.grad is not None for p in model.parameters())


def test_infogan_embeds_with_the_statistics_of_real_images():
    model = small(InfoGAN)
    images = images_for(InfoGAN)
    twin = torch_twin(model.discriminator)
    model.opt = [torch.optim.SGD(model.parameters(), lr=0.0)] * 2
    for part in range(3):
        index = torch.arange(6 * part, 6 * part + 6)
        model.step(images, index, rng(part))
        twin[2](twin[0](images[index].double() / 255))  # in training mode: gathers the averages
    q = twin.eval()[2](twin[0](images.double() / 255)).float()
    want = torch.cat([q[:, :10].softmax(1), q[:, 10:]], 1)
    torch.testing.assert_close(model.embed(images), want, rtol=1e-4, atol=1e-5)
    model.logits = True
    torch.testing.assert_close(model.embed(images), q, rtol=1e-4, atol=1e-5)


def test_infogan_players_move_in_turn_and_alone():
    model, images = small(InfoGAN), images_for(InfoGAN)
    players = list(model.discriminator.parameters()), list(model.generator.parameters())
    x, g = images[:8].float() / 255, rng(5)
    twin = copy.deepcopy(model)
    want_d = torch.autograd.grad(twin.see_through(x, *twin.draw(8, g)), list(twin.discriminator.parameters()))
    with torch.no_grad():
        for p, grad in zip(twin.discriminator.parameters(), want_d):
            p -= grad
    want_g = torch.autograd.grad(twin.deceive(*twin.draw(8, g))[0], list(twin.generator.parameters()))
    before = plain_sgd(model, *players)
    model.step(images, torch.arange(8), rng(5))
    for got, want in zip(moved(players, before), (want_d, want_g)):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-6)


def test_infogan_codes_are_drawn_as_specified():
    model = InfoGAN(size=8, generator=rng())
    noise, c = model.draw(5000, rng())
    assert noise.shape == (5000, 62) and c.shape == (5000, 12)
    assert (c[:, :10].sum(1) == 1).all() and (c[:, :10].max(1).values == 1).all()
    assert (c[:, :10].mean(0) - 0.1).abs().max() < 0.02
    for uniform in (noise, c[:, 10:]):
        assert uniform.min() >= -1 and uniform.max() <= 1
        assert abs(uniform.mean()) < 0.02 and abs(uniform.std() - 3**-0.5) < 0.02


def test_infogan_epoch_is_12800_images_and_repeats_late():
    model = InfoGAN(size=8, generator=rng())
    order = model.start_epoch(torch.empty(55_000, 0), 0, 50, rng())
    assert len(order) == len(order.unique()) == 12_800
    few = model.start_epoch(torch.empty(5000, 0), 0, 50, rng())
    assert len(few) == 12_800 and (few[:5000].bincount() == 1).all() and few.bincount().max() == 3


def test_infogan_traversal_changes_one_part_of_the_code():
    model = small(InfoGAN)
    noise, c = model.draw(3, rng())
    digits = model.traverse(0, range(10), noise, c)
    assert digits.shape == (3, 10, 1, 8, 8) and digits.min() > 0 and digits.max() < 1
    plain = model.generate(noise, c)
    for i in range(3):
        torch.testing.assert_close(digits[i, c[i, :10].argmax()], plain[i])
    tilted = model.traverse(2, [-1.0, c[1, 11].item(), 1.0], noise, c)
    torch.testing.assert_close(tilted[1, 1], plain[1])
    changed = c.clone()
    changed[:, 11] = 1
    torch.testing.assert_close(tilted[:, 2], model.generate(noise, changed))
    with pytest.raises(ValueError, match="part 3"):
        model.traverse(3, [0], noise, c)


def test_infogan_information_grows():
    digits = load("digits", "train").images
    model = InfoGAN(size=8, per_epoch=320, lr=(1e-3, 1e-3), generator=rng())
    history = model.fit(digits, epochs=4, batch=64, progress=False)
    assert history["information"][-1] > history["information"][0] + 0.5
    assert all(map(math.isfinite, history["discriminator"] + history["generator"]))


def test_infogan_refuses_other_images():
    with pytest.raises(ValueError, match="divisible by 4, not 30x30"):
        InfoGAN(size=30)
    with pytest.raises(ValueError, match=r"takes images of \(1, 8, 8\), these are \(1, 28, 28\)"):
        small(InfoGAN).embed(pictures(2))


def test_an_epoch_fills_a_batch():
    digits = load("digits", "train").images[:100]
    with pytest.raises(ValueError, match="an epoch of 50 images does not fill one batch of 64; use a smaller batch"):
        InfoGAN(size=8, per_epoch=50).fit(digits, epochs=1, batch=64, progress=False)


# Both


@pytest.mark.parametrize("which", [ACAI, InfoGAN])
def test_embedding_does_not_depend_on_the_company(which, tmp_path):
    model, images = small(which), images_for(which)
    model.fit(images, epochs=1, batch=4, progress=False)
    z = model.embed(images)
    assert z.shape == (20, model.d) and z.dtype == torch.float32 and not z.requires_grad
    assert torch.equal(z, model.embed(images))
    torch.testing.assert_close(model.embed(images, chunk=3), z)
    torch.testing.assert_close(model.train().embed(images.flip(0)).flip(0), z)
    model.save(tmp_path / "model.pt")
    torch.testing.assert_close(small(which, seed=1).restore(tmp_path / "model.pt").embed(images), z, rtol=0, atol=0)


@pytest.mark.parametrize("which", [ACAI, InfoGAN])
def test_interrupted_fit_continues_bit_identically(which, tmp_path):
    images, checkpoint = images_for(which), tmp_path / "fit.pt"

    class Interrupted(which):
        left = 5

        def step(self, *args):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().step(*args)

    Interrupted.__name__ = which.__name__
    whole = small(which)
    history = whole.fit(images, epochs=2, batch=4, progress=False)
    cut = small(which)
    cut.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.fit(images, epochs=2, batch=4, checkpoint=checkpoint, save_every=0, progress=False)
    again = small(which, seed=1)
    resumed = again.fit(images, epochs=2, batch=4, checkpoint=checkpoint, progress=False)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    assert {k: v for k, v in history.items() if k != "seconds"} == {k: v for k, v in resumed.items() if k != "seconds"}
    assert len(history["epoch"]) == 2


def test_infogan_players_have_rates_of_their_own():
    model = small(InfoGAN)
    groups = [optimizer.param_groups[0] for optimizer in model.optimizers()]
    assert [(group["lr"], group["betas"]) for group in groups] == [(2e-4, (0.5, 0.999)), (1e-3, (0.5, 0.999))]
    for group, network in zip(groups, (model.discriminator, model.generator)):
        assert all(a is b for a, b in zip(group["params"], network.parameters(), strict=True))
