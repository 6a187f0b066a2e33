"""The generators of LASIUM: networks, losses, updates, and what every generator promises."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from umeta_core.data import load
from umeta_core.generators import (
    MSGAN,
    VAE,
    GivenGenerator,
    ToPixels,
    _down,
    _up,
    discriminator_loss,
    interpolate,
    kl_divergence,
    mode_seeking,
    reconstruction_loss,
)

SMALL = (((8, 3, 2), (8, 3, 2)), ((8, 3, 2), (8, 3, 2)))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=12, channels=1, size=28, seed=0):
    return torch.randint(0, 256, (n, channels, size, size), generator=rng(seed), dtype=torch.uint8)


def small(which, seed=0, **options):
    if which is VAE:
        return VAE(latent=3, layers=SMALL, generator=rng(seed), **options)
    return MSGAN(latent=3, width=4, generator=rng(seed), **options)


def count(network):
    return sum(p.numel() for p in network.parameters())


# Networks


def test_omniglot_vae_is_the_released_one():
    model = VAE(generator=rng())
    norms = 4 * 2 * 64  # scales and shifts
    assert count(model.encoder) == 9 * 64 + 3 * 9 * 64 * 64 + norms
    assert count(model.mean) == count(model.log_var) == 3136 * 20 + 20
    assert count(model.decoder) == 20 * 3136 + 3136 + 4 * 9 * 64 * 64 + norms + (9 * 64 + 1)
    x = torch.rand(2, 1, 28, 28, generator=rng())
    assert [h.shape[2] for h in maps(model.encoder, x)] == [14, 7, 7, 7]
    assert [h.shape[2] for h in maps(model.decoder, torch.zeros(2, 20))] == [14, 28, 28, 28, 28]
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert (norm.eps, norm.momentum) == (1e-3, 0.01) and model.beta == 1 / 20


def test_celeba_vae_is_the_released_one():
    model = VAE(3, 84, generator=rng())
    assert model.latent == model.d == 500 and VAE(3, 84, 512).latent == 512
    x = torch.rand(2, 3, 84, 84, generator=rng())
    assert [h.shape[1:] for h in maps(model.encoder, x)] == [(64, 42, 42), (128, 21, 21), (256, 11, 11), (256, 6, 6),
                                                              (512, 3, 3)]  # fmt: skip
    assert [h.shape[1:] for h in maps(model.decoder, torch.zeros(2, 500))] == [
        (512, 21, 21), (256, 42, 42), (256, 84, 84), (128, 84, 84), (64, 84, 84), (3, 84, 84)]  # fmt: skip
    norms = 2 * (64 + 128 + 256 + 256 + 512)
    assert count(model.encoder) == 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512) + norms
    assert count(model.mean) == 9 * 512 * 500 + 500


def maps(network, x):
    """What the convolutions return."""
    seen = []
    for layer in network.eval():
        x = layer(x)
        if not isinstance(layer, (nn.Linear, nn.ReLU, nn.BatchNorm2d, nn.Flatten)) and type(layer).__name__ != "_Maps":
            seen.append(x)
    return seen


def test_msgan_is_the_released_one():
    model = MSGAN(generator=rng())
    assert count(model.generator) == 128 * 6272 + 6272 + 2 * (16 * 128 * 128 + 128) + 49 * 128 + 1
    assert count(model.discriminator) == (9 * 64 + 64) + (9 * 64 * 128 + 128) + (9 * 128 * 128 + 128) + (128 + 1)
    x = model.discriminator[:6](torch.rand(2, 1, 28, 28, generator=rng()))
    assert x.shape == (2, 128, 4, 4)
    want = model.discriminator[8](x.amax((2, 3)))
    torch.testing.assert_close(model.discriminator[6:](x), want)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("which", [VAE, MSGAN])
def test_initial_weights_are_glorot_uniform_and_come_from_the_generator(which):
    model, twin, other = which(generator=rng()), which(generator=rng()), which(generator=rng(1))
    for layer, same, differs in zip(model.modules(), twin.modules(), other.modules()):
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            continue
        w = layer.weight
        assert torch.equal(w, same.weight) and not torch.equal(w, differs.weight)
        assert layer.bias is None or (layer.bias == 0).all()
        bound = (6 / (w[0, 0].numel() * (w.shape[0] + w.shape[1]))) ** 0.5
        assert w.abs().max() <= bound
        assert w.numel() < 1000 or w.abs().max() > 0.95 * bound
        assert w.numel() < 1000 or w.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def same_transposed(x, w, stride):
    """TensorFlow's Conv2DTranspose with padding SAME: each pixel adds its filter; the surplus is cut, less before."""
    n, _, side, _ = x.shape
    kernel = w.shape[2]
    out = x.new_zeros(n, w.shape[1], (side - 1) * stride + kernel, (side - 1) * stride + kernel)
    for i in range(side):
        for j in range(side):
            stamp = torch.einsum("ni,iokl->nokl", x[:, :, i, j], w)
            out[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel] += stamp
    before = (kernel - stride) // 2
    return out[:, :, before : before + side * stride, before : before + side * stride]


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(7, 3, 2), (14, 3, 2), (5, 3, 1), (7, 4, 2), (7, 4, 3), (6, 4, 1)]
)
def test_enlarging_layers_are_tensorflows_in_a_mirror(side, kernel, stride):
    layer = _up(2, 3, kernel, stride, bias=False).double()
    w = next(layer.parameters())
    w = w if isinstance(layer, nn.ConvTranspose2d) else w.transpose(0, 1).flip(2, 3)  # in, out, kernel, kernel
    x = torch.randn(2, 2, side, side, generator=rng()).double()
    want = same_transposed(x.flip(2, 3), w.flip(2, 3), stride).flip(2, 3)
    assert want.shape[2] == side * stride
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(28, 3, 2), (14, 3, 2), (7, 3, 1), (84, 4, 2), (21, 4, 2), (11, 4, 2), (6, 4, 2)]
)
def test_shrinking_layers_are_tensorflows_in_a_mirror(side, kernel, stride):
    layer = _down(2, 3, kernel, stride, side).double()
    x = torch.randn(2, 2, side, side, generator=rng()).double()
    small_side = -(-side // stride)
    missing = max((small_side - 1) * stride + kernel - side, 0)
    padded = F.pad(x.flip(2, 3), [missing // 2, missing - missing // 2] * 2)
    want = F.conv2d(padded, layer.weight.flip(2, 3), stride=stride).flip(2, 3)
    assert want.shape[2] == small_side
    torch.testing.assert_close(layer(x), want)


def test_convolution_to_pixels_is_a_convolution():
    for channels in (1, 3):
        layer, plain = ToPixels(5, channels, 7).double(), nn.Conv2d(5, channels, 7, padding=3).double()
        plain.load_state_dict(layer.state_dict())
        x = torch.randn(2, 5, 9, 9, generator=rng()).double().requires_grad_()
        weights = torch.randn(2, channels, 9, 9, generator=rng(1)).double()
        got, want = layer(x), plain(x)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad((got * weights).sum(), [x, *layer.parameters()]),
                        torch.autograd.grad((want * weights).sum(), [x, *plain.parameters()])):  # fmt: skip
            torch.testing.assert_close(a, b)


# Losses


def test_reconstruction_is_the_mean_cross_entropy_times_the_pixels():
    x, logits = torch.rand(3, 1, 4, 5, generator=rng()).double(), torch.randn(3, 1, 4, 5, generator=rng(1)).double()
    p = logits.sigmoid()
    mean = -(x * p.log() + (1 - x) * (1 - p).log()).mean()
    torch.testing.assert_close(reconstruction_loss(x, logits), 20 * mean)


def test_kl_equals_torch_distributions_and_the_released_code_averages_it():
    mean, log_var = torch.randn(2, 6, 4, generator=rng()).double()
    D = torch.distributions
    each = D.kl_divergence(D.Normal(mean, (log_var / 2).exp()), D.Normal(0.0, 1.0))  # [n, latent]
    torch.testing.assert_close(kl_divergence(mean, log_var), each.sum(1).mean())
    model, textbook = small(VAE).double(), small(VAE, beta=1.0).double()
    x, z_noise = torch.rand(5, 1, 28, 28, generator=rng()).double(), torch.randn(5, 3, generator=rng()).double()
    reconstruction, kl = model.losses(x, z_noise)
    model_mean, std = model.posterior(x)
    each = D.kl_divergence(D.Normal(model_mean, std), D.Normal(0.0, 1.0))
    torch.testing.assert_close(model.beta * kl, each.mean())
    torch.testing.assert_close(textbook.beta * kl, each.sum(1).mean())
    again = model.decode(model_mean + std * z_noise)
    torch.testing.assert_close(reconstruction, F.binary_cross_entropy(again, x) * 784)


def test_mode_seeking_both_ways_as_written():
    x1, x2 = torch.rand(2, 4, 1, 3, 3, generator=rng()).double()
    z1, z2 = torch.randn(2, 4, 5, generator=rng(1)).double()
    ratios = [(x1[i] - x2[i]).abs().mean() / (z1[i] - z2[i]).abs().mean() for i in range(4)]
    torch.testing.assert_close(mode_seeking(x1, x2, z1, z2, "released"), 1 / (sum(ratios) / 4 + 1e-5))
    whole = (x1 - x2).abs().mean() / (z1 - z2).abs().mean()
    torch.testing.assert_close(mode_seeking(x1, x2, z1, z2), 1 / (whole + 1e-5))


def test_discriminator_loss_as_written():
    made, real = torch.randn(2, 6, generator=rng()).double()
    noise = 0.05 * torch.rand(2, 6, generator=rng(1)).double()
    total = 0.0
    for logits, labels in ((made, 1 + noise[0]), (real, noise[1])):
        p = logits.sigmoid()
        total = total - (labels * p.log() + (1 - labels) * (1 - p).log()).sum()
    torch.testing.assert_close(discriminator_loss(torch.stack([made, real]), noise), total / 12)


# Updates


def descend(loss, network):
    for p, grad in zip(network.parameters(), torch.autograd.grad(loss, [*network.parameters()])):
        p.data -= 0.1 * grad


@pytest.mark.parametrize("ratio", ["released", "original"])
def test_msgan_update_is_the_literal_one(ratio):
    """The discriminator's step, then the generator's against the new discriminator."""
    model, images = small(MSGAN, ratio=ratio).double(), pictures(6)
    model._pixels = lambda x: x.double() / 255
    twin = copy.deepcopy(model)
    model.opt = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (model.discriminator, model.generator)]
    n, g, x = 6, rng(3), images.double() / 255
    z = torch.randn(18, 3, generator=g)
    noise = 0.05 * torch.rand(2, 6, generator=g)
    model.prior = lambda count, generator: torch.randn(count, 3, generator=generator).double()
    model.step(images, torch.arange(6), rng(3))

    z, z2, fresh = z.double().split(n)
    G, D = (lambda z: twin.generator(z).sigmoid()), (lambda x: twin.discriminator(x).squeeze(1))
    bce = F.binary_cross_entropy_with_logits
    theirs = (bce(D(G(z)), 1 + noise[0].double()) + bce(D(x), noise[1].double())) / 2
    descend(theirs, twin.discriminator)
    one, two = G(z), G(z2)
    first = fresh if ratio == "released" else z
    ours = bce(D(one) + D(two), torch.zeros(n).double()) + mode_seeking(one, two, first, z2, ratio)
    descend(ours, twin.generator)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)


def test_msgan_players_get_their_own_gradients_only():
    model, images = small(MSGAN), pictures(6)
    model.opt = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (model.discriminator, model.generator)]
    model.seeking = 0.0  # a plain GAN
    model.step(images, torch.arange(6), rng())
    plain = [p.grad.clone() for p in model.parameters()]
    model.seeking = 1.0
    model.step(images, torch.arange(6), rng())
    for (name, p), before in zip(model.named_parameters(), plain):  # the rates are zero: only the loss has changed
        assert torch.equal(p.grad, before) == name.startswith("discriminator"), name


def test_vae_update_is_the_literal_one():
    model, images = small(VAE), pictures(6)
    twin = copy.deepcopy(model).train()
    model.train().opt = [torch.optim.SGD(model.parameters(), lr=0.01)]
    report = model.step(images, torch.arange(6), rng(3))
    reconstruction, kl = twin.losses(images / 255, torch.randn(6, 3, generator=rng(3)))
    torch.testing.assert_close((report["reconstruction"], report["kl"]), (reconstruction, kl))
    grads = torch.autograd.grad(reconstruction + kl / 3, list(twin.parameters()))
    for p, q, grad in zip(model.parameters(), twin.parameters(), grads):
        torch.testing.assert_close(p, q - 0.01 * grad, rtol=1e-4, atol=1e-5)


def test_fixed_norm_learns_scales_but_sees_no_batch():
    model = small(VAE, norm="fixed")
    model.fit(pictures(20), epochs=1, batch=5, progress=False)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert (norm.running_mean == 0).all() and (norm.running_var == 1).all() and norm.num_batches_tracked == 0
    assert (norm.weight != 1).any()
    batch = small(VAE)
    batch.fit(pictures(20), epochs=1, batch=5, progress=False)
    assert next(m for m in batch.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked == 4


# What every generator promises


@pytest.mark.parametrize("which", [VAE, MSGAN])
def test_generation_depends_on_z_alone(which):
    model, z = small(which).train(), torch.randn(20, 3, generator=rng())
    x = model.generate(z)
    assert x.shape == (20, 1, 28, 28) and x.dtype == torch.float32 and not x.requires_grad
    assert x.min() >= 0 and x.max() <= 1 and model.training
    assert torch.equal(x, model.generate(z))
    torch.testing.assert_close(model.generate(z, chunk=7), x)
    torch.testing.assert_close(model.generate(z.flip(0)).flip(0), x)
    assert model.generate(1000 * z).isfinite().all()
    with pytest.raises(ValueError, match=r"\(20, 4\), but this generator takes \[n, 3\]"):
        model.generate(torch.zeros(20, 4))


def test_prior_is_normal_or_on_the_sphere():
    z = small(MSGAN).prior(4000, rng())
    assert z.shape == (4000, 3) and abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    ball = GivenGenerator(lambda z: z, 5, sphere=True).prior(4, rng())
    torch.testing.assert_close(ball.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("which", [VAE, MSGAN])
@pytest.mark.parametrize("norm", ["batch", "fixed"])
def test_an_interrupted_fit_continues_bit_identically(which, norm, tmp_path):
    options = {"norm": norm} if which is VAE else {"ratio": "released" if norm == "batch" else "original"}
    images, checkpoint = pictures(20), tmp_path / "fit.pt"
    whole, cut, resumed = (small(which, seed, **options) for seed in (0, 0, 1))
    history = whole.fit(images, epochs=3, batch=6, progress=False)
    steps, step = [0], cut.step

    def interrupted(*args):
        steps[0] += 1
        if steps[0] > 5:
            raise KeyboardInterrupt
        return step(*args)

    cut.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.fit(images, epochs=3, batch=6, checkpoint=checkpoint, save_every=0, progress=False)
    again = resumed.fit(images, epochs=3, batch=6, checkpoint=checkpoint, progress=False)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    assert {k: v for k, v in history.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


def test_watching_sees_every_epoch_and_changes_nothing():
    images, plain, watched, seen = pictures(20), small(VAE), small(VAE), []
    z = torch.zeros(1, 3)
    watched.watch = lambda model, epoch: seen.append((epoch, model.training, model.generate(z)))
    plain.fit(images, epochs=3, batch=6, progress=False)
    watched.fit(images, epochs=3, batch=6, progress=False)
    assert [(epoch, training) for epoch, training, _ in seen] == [(0, True), (1, True), (2, True)]
    assert not torch.equal(seen[0][2], seen[2][2])
    for a, b in zip(plain.state_dict().values(), watched.state_dict().values()):
        assert torch.equal(a, b)


def test_vae_embeds_as_its_posterior_mean():
    model, images = small(VAE), pictures(8)
    mean, std = model.eval().posterior(images / 255)
    assert mean.shape == std.shape == (8, 3) and (std > 0).all()
    torch.testing.assert_close(model.embed(images), mean.detach())
    torch.testing.assert_close(model.encode(images / 255), mean)
    with pytest.raises(ValueError, match=r"this VAE takes images of \(1, 28, 28\), these are \(1, 20, 20\)"):
        model.embed(pictures(2, size=20))


def test_vae_learns_to_reconstruct():
    glyphs = load("glyphs", "train").images[::80][:256]
    model = VAE(latent=8, layers=SMALL, lr=5e-3, generator=rng())
    history = model.fit(glyphs, epochs=15, batch=16, progress=False)
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    error = (model.generate(model.embed(glyphs)) - glyphs / 255).square().mean()
    of_mean = (glyphs / 255 - (glyphs / 255).mean(0)).square().mean()
    assert error < 0.9 * of_mean


def test_msgan_learns_to_make_different_images():
    glyphs = load("glyphs", "train").images[::80][:128]
    model = MSGAN(latent=8, width=8, lr=2e-3, generator=rng())
    z = model.prior(50, rng())
    before = model.generate(z).std(0).mean()
    history = model.fit(glyphs, epochs=4, batch=32, progress=False)
    assert history["modes"][-1] < 0.5 * history["modes"][0]
    assert model.generate(z).std(0).mean() > 2 * before


def test_interpolation_goes_straight_from_end_to_end():
    model = small(VAE)
    z0, z1 = torch.randn(2, 4, 3, generator=rng())
    way = interpolate(model, z0, z1, 5)
    assert way.shape == (4, 5, 1, 28, 28)
    for at, z in ((0, z0), (2, (z0 + z1) / 2), (4, z1)):
        torch.testing.assert_close(way[:, at], model.generate(z))


@pytest.mark.parametrize("which", [VAE, MSGAN])
def test_bfloat16_is_close(which):
    model, z = small(which), torch.randn(4, 3, generator=rng())
    exact = model.generate(z)
    model.autocast = True
    rough = model.generate(z)
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.02


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="no VAE for 32x32 images"):
        VAE(size=32)
    with pytest.raises(ValueError, match="enlarges 4 times does not make 30x30"):
        VAE(size=30, layers=SMALL)
    with pytest.raises(ValueError, match="norm='group'"):
        VAE(norm="group")
    with pytest.raises(ValueError, match="divisible by 4, not 30x30"):
        MSGAN(size=30)
    with pytest.raises(ValueError, match="ratio='mean'"):
        MSGAN(ratio="mean")


# Somebody's generator


def test_given_generator_maps_range_and_size():
    def make(z):  # in [-1, 1], 6x6
        return z.tanh()[:, :1].view(-1, 1, 1, 1).expand(-1, 3, 6, 6)

    given = GivenGenerator(make, 4, channels=3, size=12, output=(-1.0, 1.0))
    z = given.prior(5, rng())
    x = given.generate(z)
    assert x.shape == (5, 3, 12, 12) and given.latent == 4
    torch.testing.assert_close(x[:, 0, 3, 3], (z[:, 0].tanh() + 1) / 2)
    assert given.fit(pictures()) == {"epoch": [], "seconds": 0.0}
    assert interpolate(given, z, z.flip(0), 3).shape == (5, 3, 3, 12, 12)


def test_given_generator_on_the_sphere_interpolates_on_the_sphere():
    seen = []

    def make(z):
        seen.append(z)
        return z.new_zeros(len(z), 3, 84, 84)

    given = GivenGenerator(make, 4, sphere=True)
    z0, z1 = given.prior(2, rng()), given.prior(2, rng(1))
    interpolate(given, z0, z1, 5)
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(10))
    torch.testing.assert_close(seen[0][0], z0[0])


def test_given_module_moves_along_and_is_in_evaluation_mode():
    network = nn.Sequential(nn.Linear(4, 3 * 64), nn.Dropout(0.5), nn.Unflatten(1, (3, 8, 8)), nn.Sigmoid())
    given = GivenGenerator(network.train(), 4, size=8)
    z = given.prior(6, rng())
    x = given.generate(z)
    assert torch.equal(x, given.generate(z)) and not x.requires_grad
    given.to(torch.float64)
    assert network[0].weight.dtype == torch.float64


def test_given_generator_says_what_is_wrong():
    def returning(images, **options):
        return lambda: GivenGenerator(lambda z: images, 4, channels=1, size=8, **options).generate(torch.zeros(2, 4))

    flat = torch.zeros(2, 1, 8, 8)
    for images, told in (
        (torch.zeros(2, 8, 8, 1), r"returned \(2, 8, 8, 1\), not square images \[2, 1, h, h\]"),
        (torch.zeros(3, 1, 8, 8), r"for 2 vectors the generator returned \(3, 1, 8, 8\)"),
        (torch.zeros(2, 64), r"returned \(2, 64\)"),
        ([flat], "returned list"),
        (flat / 0, "NaN"),
        (flat + 2, r"from 2 to 2, outside output=\(0.0, 1.0\)"),
        (flat - 0.5, "from -0.5 to -0.5"),
        (flat + torch.inf, "to inf"),
    ):
        with pytest.raises(ValueError, match=told):
            returning(images)()
    assert (returning(flat + 2, clip=True)() == 1).all()
    with pytest.raises(ValueError, match="is no range"):
        returning(flat, output=(1, 0))()


def test_the_vae_has_the_rate_of_the_paper():
    (optimizer,) = VAE(1, 28).optimizers()
    assert optimizer.defaults["lr"] == 1e-3
