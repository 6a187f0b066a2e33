"""Meta-GMVAE against torch's own layers and the printed equations, one episode after the other."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from umeta_core.data import ImageSet
from umeta_core.em import Mixture, em, labeled_start
from umeta_core.episodes import Episodes, PartitionTasks, UnlabeledSets
from umeta_core.evaluation import evaluate
from umeta_core.gmvae_networks import FeatureDecoder, ImageDecoder, ImageEncoder, NormBlock, SetBlock, sides
from umeta_core.meta_gmvae import MetaGMVAE
from umeta_core.noise import noise_of_call
from umeta_core.training import NonFiniteLoss, train

NORMAL = torch.distributions.Normal


def image_model(seed=0, size=14, filters=4, latent=6, dtype=torch.float64, fresh=False, **options):
    """14x14 images pass the sides 14, 7, 4, 2, 1: even and odd ones. Scales are of both signs, unless it is fresh."""
    g = torch.Generator().manual_seed(seed)
    encoder = ImageEncoder(1, size, filters, g)
    options = {"components": 3, "samples": 5, "iterations": 3} | options
    model = MetaGMVAE(encoder, ImageDecoder(latent, 1, size, filters, g), features=encoder.features, latent=latent,
                      generator=g, **options)  # fmt: skip
    for block in (b for b in model.modules() if isinstance(b, NormBlock) and not fresh):
        block.scale.data += torch.randn(block.scale.shape, generator=g)
        block.shift.data += 0.3 * torch.randn(block.shift.shape, generator=g)
    return model.to(dtype)


def feature_model(seed=0, features=8, latent=4, dtype=torch.float64, calibrated=False, **options):
    g = torch.Generator().manual_seed(seed)
    decoder = FeatureDecoder(features, latent, calibrated=calibrated, generator=g)
    options = {"components": 3, "samples": 5, "iterations": 3} | options
    return MetaGMVAE(None, decoder, features=features, latent=latent, generator=g, **options).to(dtype)


def image_sets(tasks=2, m=7, size=14, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(tasks, 1, m, 1, size, size, generator=g, dtype=dtype)
    return Episodes(x, x[:, :, :0])


def feature_episodes(tasks=2, way=3, shot=2, query=4, d=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    classes = torch.randn(tasks, way, 1, d, generator=g, dtype=dtype)
    x = F.relu(classes + 0.5 * torch.randn(tasks, way, shot + query, d, generator=g, dtype=dtype))
    return Episodes(x[:, :, :shot], x[:, :, shot:])


# Networks ------------------------------------------------------------------------------------------------------------


def torch_encoder(encoder):
    layers = []
    for block in list(encoder)[:-1]:
        f, c = block.weight.shape[:2]
        conv = nn.Conv2d(c, f, 3, padding=1, bias=False)
        layers += [with_weight(conv, block), norm(block), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    return nn.Sequential(*layers, nn.Flatten()).double()


def torch_decoder(decoder):
    """The layers of the paper's Table 4 after its MLP."""
    layers = []
    for block in decoder.blocks:
        c, f, k, _ = block.weight.shape
        layers += [with_weight(nn.ConvTranspose2d(c, f, k, 2, 1, bias=False), block), norm(block), nn.ReLU()]
    last = with_weight(nn.ConvTranspose2d(*decoder.weight.shape[:2], 4, 2, 1), decoder)
    last.bias.data = decoder.bias.data.clone()
    return nn.Sequential(*layers, last).double()


def with_weight(layer, like):
    layer.weight.data = like.weight.data.clone().contiguous()
    return layer


def norm(block):
    layer = nn.BatchNorm2d(len(block.scale))
    layer.weight.data, layer.bias.data = block.scale.data.clone(), block.shift.data.clone()
    return layer


def same_gradients(network, twin):
    blocks = [b for b in network.modules() if isinstance(b, NormBlock)]
    norms = [b for b in twin if isinstance(b, nn.BatchNorm2d)]
    convs = [b for b in twin if isinstance(b, (nn.Conv2d, nn.ConvTranspose2d))]
    for block, layer, conv in zip(blocks, norms, convs):
        torch.testing.assert_close(block.weight.grad, conv.weight.grad)
        torch.testing.assert_close(block.scale.grad, layer.weight.grad)
        torch.testing.assert_close(block.shift.grad, layer.bias.grad)
        torch.testing.assert_close(block.running_mean, layer.running_mean)
        torch.testing.assert_close(block.running_var, layer.running_var)


@pytest.mark.parametrize("size", [14, 28])
def test_encoder_equals_torch_layers_in_training_and_evaluation(size):
    encoder = image_model(size=size).encoder
    twin = torch_encoder(encoder)
    x = torch.rand(6, 1, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for _ in range(2):
        got, wanted = encoder(x), twin(x)
        torch.testing.assert_close(got, wanted)
        for out, parameters in ((got, encoder), (wanted, twin)):
            parameters.zero_grad()
            out.square().sum().backward()
        same_gradients(encoder, twin)
    torch.testing.assert_close(encoder.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("size", [14, 28])
def test_decoder_equals_torch_layers_in_training_and_evaluation(size):
    decoder = image_model(size=size).decoder
    twin = torch_decoder(decoder)
    z = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for _ in range(2):
        got, wanted = decoder.logits(z), twin(decoder.mlp(z).unflatten(1, decoder.shape))
        assert got.shape == (6, 1, size, size)
        torch.testing.assert_close(got, wanted)
        for out, parameters in ((got, decoder), (wanted, twin)):
            decoder.mlp.zero_grad()
            parameters.zero_grad()
            out.square().sum().backward()
        same_gradients(decoder, twin)
        torch.testing.assert_close(decoder.weight.grad, twin[-1].weight.grad)
        torch.testing.assert_close(decoder.bias.grad, twin[-1].bias.grad)
    torch.testing.assert_close(decoder.eval()(z), twin.eval()(decoder.mlp(z).unflatten(1, decoder.shape)).sigmoid())


def test_shapes_and_sizes_are_those_of_the_paper():
    assert sides(28) == [28, 14, 7, 4, 2]
    encoder, decoder, features = ImageEncoder(), ImageDecoder(), FeatureDecoder()
    maps, x = [], torch.rand(2, 1, 28, 28)
    for block in encoder:
        x = block(x)
        maps.append(tuple(x.shape[1:]))
    assert maps == [(64, 14, 14), (64, 7, 7), (64, 4, 4), (64, 2, 2), (256,)] and encoder.features == 256
    x, maps = decoder.mlp(torch.rand(2, 64)).view(2, 64, 2, 2), []
    for block in decoder.blocks:
        x = block(x)
        maps.append(tuple(x.shape[1:]))
    assert maps == [(64, 4, 4), (64, 7, 7), (64, 14, 14)]
    assert features(torch.rand(5, 64)).shape == (5, 256) and (features(torch.rand(5, 64)) >= 0).all()

    def size(module):
        return sum(p.numel() for p in module.parameters())

    linear = lambda a, b: a * b + b  # noqa: E731
    assert size(encoder) == 9 * 64 + 3 * 9 * 64 * 64 + 8 * 64
    assert size(decoder) == linear(64, 256) + 2 * linear(256, 256) + (16 + 9 + 16) * 64 * 64 + 6 * 64 + 16 * 64 + 1
    assert size(features) == linear(64, 512) + linear(512, 512) + linear(512, 256)
    assert size(MetaGMVAE(encoder, decoder).set_encoder) == 8 * linear(256, 256) + linear(256, 128)


def test_set_block_is_the_released_formula():
    block = SetBlock(8, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for s in range(3):
        heads = []
        for h in range(4):
            q, k, v = (layer(x[s])[:, 2 * h : 2 * h + 2] for layer in (block.query, block.key, block.value))
            heads.append(q + torch.softmax(q @ k.T / math.sqrt(8), 1) @ v)
        o = torch.cat(heads, 1)
        torch.testing.assert_close(block(x)[s], o + F.relu(o @ block.out.weight.T + block.out.bias))
    assert torch.autograd.gradcheck(block, x.requires_grad_())
    with pytest.raises(ValueError, match="4 heads cannot share 10 features"):
        SetBlock(10)


def test_set_encoder_follows_the_order_of_the_set_and_no_other():
    model = feature_model()
    h = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for first, second in zip(model.posterior(h), model.posterior(h[:, order])):
        torch.testing.assert_close(first[:, order], second)
    mean, _ = model.posterior(h)
    changed = h.clone()
    changed[0, 0] += 1
    assert not torch.allclose(model.posterior(changed)[0][0, 1:], mean[0, 1:])  # the others look at it
    torch.testing.assert_close(model.posterior(changed)[0][1], mean[1])  # other sets do not
    model.set_level = False
    alone, _ = model.posterior(h)
    torch.testing.assert_close(model.posterior(changed)[0][0, 1:], alone[0, 1:])
    torch.testing.assert_close(model.posterior(h[:, 2:3])[0][:, 0], alone[:, 2])


# Objective -----------------------------------------------------------------------------------------------------------


def literal_loss(model, episodes):
    """Equation 9 with every density written out, one episode and one sample after the other."""
    x = episodes.support.squeeze(1)
    tasks, m = x.shape[:2]
    g = model._noise(x)
    model.draws -= 1
    h = x if model.encoder is None else torch_encoder(model.encoder)(x.flatten(0, 1)).view(tasks, m, -1)
    epsilon = torch.randn(tasks, m, model.samples, model.latent, generator=g, dtype=x.dtype)
    mean, log_variance = (torch.stack(s) for s in zip(*(model.posterior(h[t : t + 1]) for t in range(tasks))))
    mean, sigma = mean.squeeze(1).unsqueeze(2), log_variance.squeeze(1).exp().sqrt().unsqueeze(2)
    z = mean + sigma * epsilon
    if model.encoder is None:
        log_x = -(model.decoder(z) - x.unsqueeze(2)).square().sum(3)
    else:
        hidden = model.decoder.mlp(z.flatten(0, 2)).unflatten(1, model.decoder.shape)
        p = torch_decoder(model.decoder)(hidden).sigmoid().view(tasks, m, model.samples, *x.shape[2:])
        pixels = x.unsqueeze(2)
        log_x = (pixels * p.log() + (1 - pixels) * (1 - p).log()).sum((3, 4, 5))
    prior = model.prior(z, g)
    losses = []
    for t in range(tasks):
        log_p = [
            (prior.weights[t, k].log() + NORMAL(prior.mean[t, k], torch.ones(())).log_prob(z[t]).sum(2)).exp()
            for k in range(prior.weights.shape[1])
        ]
        log_q = NORMAL(mean[t], sigma[t]).log_prob(z[t]).sum(2)
        terms = log_x[t] + sum(log_p).log() - log_q
        losses.append(-sum(terms[:, n].sum() for n in range(model.samples)) / model.samples)
    return torch.stack(losses) / (m if model.reduce == "mean" else 1)


@pytest.mark.parametrize("options", [
    {}, {"reduce": "sum"}, {"episodic": False}, {"set_level": False}, {"learn_weights": False},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["images", "features"])
def test_loss_and_its_gradient_are_those_of_the_equation(kind, options):
    if kind == "images":
        model, e = image_model(**options), image_sets()
    else:
        model, e = feature_model(**options), feature_episodes(way=1, shot=7, query=0)
    wanted = literal_loss(model, e)
    losses, accuracies = model.loss(e)
    torch.testing.assert_close(losses, wanted)
    assert losses.shape == accuracies.shape == (2,) and not accuracies.any()
    losses.mean().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in got.values())
    model.zero_grad()
    model.draws -= 1
    # the twins have weights of their own: compare along a direction, by finite differences of the literal form
    g = torch.Generator().manual_seed(5)
    direction = {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in model.named_parameters()}
    values = []
    psi = fixed_prior(model, e)
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(direction[name], alpha=step)
            model.prior = lambda z, noise: psi  # no gradient through EM
            values.append(literal_loss(model, e).mean())
            for name, p in model.named_parameters():
                p.sub_(direction[name], alpha=step)
    slope = sum((got[name] * d).sum() for name, d in direction.items())
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-5, atol=1e-5)


def fixed_prior(model, e):
    seen = []
    original = model.prior
    model.prior = lambda z, noise: seen.append(original(z, noise)) or seen[-1]
    literal_loss(model, e)
    model.prior = original
    return seen[0]


def test_batched_episodes_equal_episodes_alone():
    """Features: batch norm, in training, would tie the episodes together."""
    model, e = feature_model(), feature_episodes(tasks=3, way=1, shot=9, query=0)
    x = e.support.squeeze(1)
    noise = torch.randn(3, 9, model.samples, model.latent, dtype=torch.float64)
    mean, log_variance = (s.unsqueeze(2) for s in model.posterior(x))
    z = mean + (log_variance / 2).exp() * noise
    together = model.reconstruction(x, z)
    for t in range(3):
        torch.testing.assert_close(model.reconstruction(x[t : t + 1], z[t : t + 1])[0], together[t])
        torch.testing.assert_close(model.posterior(x[t : t + 1])[0][0].unsqueeze(1), mean[t])


@pytest.mark.parametrize("kind", ["images", "features"])
def test_chunks_change_the_memory_and_nothing_else(kind):
    """Images in evaluation mode: in training each chunk has batch statistics of its own."""
    make, e = (image_model, image_sets()) if kind == "images" else (feature_model, feature_episodes(2, 1, 7, 0))
    results = []
    for chunk in (10**6, 14, 28, 1):
        model = make(chunk=chunk, samples=5)
        model.decoder.eval()
        losses, _ = model.loss(e)
        losses.mean().backward()
        results.append((losses.detach(), [p.grad for p in model.parameters()]))
        with torch.no_grad():
            model.draws -= 1
            torch.testing.assert_close(model.loss(e)[0], losses.detach())
    assert [len(make(chunk=c)._chunks(torch.zeros(2, 7, 5, 1))) for c in (10**6, 14, 28, 1)] == [1, 5, 3, 5]
    for losses, gradients in results[1:]:
        torch.testing.assert_close(losses, results[0][0])
        for a, b in zip(gradients, results[0][1]):
            torch.testing.assert_close(a, b)


def test_divergence_is_unbiased_given_the_prior():
    """Against the closed form for one Gaussian, and against ever more samples for a mixture."""
    model = feature_model(episodic=False, samples=4)
    x = feature_episodes(way=1, shot=3, query=0).support.squeeze(1)
    mean, log_variance = model.posterior(x)
    exact = (mean.square() + log_variance.exp() - 1 - log_variance).sum(2).mean(1) / 2
    estimates = repeat(model, x, 400)
    error = estimates.std(0) / 20
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all() and (error < 0.1 * exact).all()
    psi = Mixture(torch.tensor([[0.2, 0.8]] * 2).double(), torch.randn(2, 2, 4, dtype=torch.float64))
    model.prior = lambda z, noise: psi
    model.samples = 50_000
    truth = repeat(model, x, 4).mean(0)
    for samples in (1, 4):
        model.samples = samples
        estimates = repeat(model, x, 400)
        assert ((estimates.mean(0) - truth).abs() < 4 * estimates.std(0) / 20 + 0.02).all()


@torch.no_grad()
def repeat(model, x, times):
    """Independent estimates of the divergence, ``[times, T]``."""
    return torch.stack([model.terms(x, model._noise(x))[1] for _ in range(times)])


def test_fewer_samples_give_the_same_expectation_and_gradient():
    """Given the prior, one sample estimates what eight do, with eight times the variance."""
    model = feature_model()
    x = feature_episodes(way=1, shot=5, query=0).support.squeeze(1)
    psi = Mixture(torch.full((2, 3), 1 / 3).double(), torch.randn(2, 3, 4, dtype=torch.float64))
    model.prior = lambda z, noise: psi
    found = {}
    for samples in (1, 8):
        model.samples = samples
        values = []
        for _ in range(200):
            loss = sum(model.terms(x, model._noise(x))).mean()
            (gradient,) = torch.autograd.grad(loss, model.set_encoder[2].bias)
            values.append(torch.cat([loss.detach().view(1), gradient]))
        found[samples] = torch.stack(values)
    means, variances = ({n: f(v) for n, v in found.items()} for f in (lambda v: v.mean(0), lambda v: v.var(0)))
    error = (sum(variances.values()) / 200).sqrt()
    assert ((means[1] - means[8]).abs() < 4.5 * error).all()
    ratio = variances[1] / variances[8]
    assert (ratio > 5).all() and (ratio < 13).all()


def test_samples_that_are_not_decoded_still_join_prior_and_divergence():
    model = feature_model(samples=6)
    x = feature_episodes(way=1, shot=5, query=0).support.squeeze(1)
    everything = model.terms(x, torch.Generator().manual_seed(0))
    parts = []
    for decoded in range(1, 7):
        model.decoded = decoded
        reconstruction, divergence = model.terms(x, torch.Generator().manual_seed(0))
        torch.testing.assert_close(divergence, everything[1])
        parts.append(decoded * reconstruction)
    torch.testing.assert_close(parts[-1] / 6, everything[0])
    each = torch.stack(parts).diff(dim=0, prepend=torch.zeros(1, 2).double())  # the loss of each of the six
    assert (each > 0).all() and len(each.unique()) == 12


def test_prior_starts_from_samples_and_takes_no_gradient():
    model = feature_model(iterations=0)
    z = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    prior = model.prior(z, torch.Generator().manual_seed(0))
    assert not prior.mean.requires_grad
    pooled = z.detach().flatten(1, 2)
    for t in range(2):
        same = (prior.mean[t].unsqueeze(1) - pooled[t]).abs().amax(2) < 1e-12
        assert (same.sum(1) == 1).all() and (same.sum(0) <= 1).all()
    with pytest.raises(ValueError, match="31 components cannot start from 30"):
        feature_model(components=31).prior(z, torch.Generator())


def test_calibrated_gaussian_is_the_best_of_all_gaussians():
    model = feature_model(calibrated=True)
    x = feature_episodes(way=1, shot=6, query=0).support.squeeze(1)
    z = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    found = model.decoder.log_likelihood(x, z)
    reconstructed = model.decoder(z)

    def under(variance):
        return NORMAL(reconstructed, variance**0.5).log_prob(x.unsqueeze(2)).sum(3)

    best = (reconstructed - x.unsqueeze(2)).square().mean()
    torch.testing.assert_close(found, under(best))  # and its gradient, though the variance is taken as constant:
    got = torch.autograd.grad(found.sum(), model.decoder[0].weight)[0]
    torch.testing.assert_close(got, torch.autograd.grad(under(best).sum(), model.decoder[0].weight)[0])
    assert under(best.detach()).sum() > max(under(1.1 * best.detach()).sum(), under(0.9 * best.detach()).sum())


def test_weight_decay_is_that_of_adam():
    plain, decayed, e = feature_model(), feature_model(weight_decay=0.05), feature_episodes(way=1, shot=7, query=0)
    for model in (plain, decayed):
        model.loss(e)[0].mean().backward()
    for a, b in zip(plain.parameters(), decayed.parameters()):
        torch.testing.assert_close(b.grad, a.grad + 0.05 * a)


# Test time -----------------------------------------------------------------------------------------------------------


def literal_prediction(model, e, t, queries=None):
    """Equations 10 and 11 for one episode: log p(y | x, D), ``[q, K]``."""
    xs, y, xq, _ = (part[t] for part in e.flat())
    xq = xq if queries is None else xq[queries]
    g, m = noise_of_call("cpu", model.seed, e.first + t), len(xs)  # noise of this task's own
    epsilon = torch.randn(m + e.flat()[2].shape[1], model.test_samples, model.latent, generator=g, dtype=xs.dtype)
    if queries is not None:
        epsilon = torch.cat([epsilon[:m], epsilon[[m + q for q in queries]]])
    x = torch.cat([xs, xq])
    h = x if model.encoder is None else torch_eval_encoder(model.encoder)(x)
    mean, log_variance = (s[0].unsqueeze(1) for s in model.posterior(h.unsqueeze(0)))
    z = mean + (log_variance / 2).exp() * epsilon
    zs, zq = z[: len(xs)].flatten(0, 1), z[len(xs) :].flatten(0, 1)
    known = F.one_hot(y.repeat_interleave(model.test_samples), e.way).double()
    mu, variance = (known.T @ zs) / known.sum(0).unsqueeze(1), torch.ones(e.way, model.latent, dtype=x.dtype)

    def p(variance):
        density = torch.stack([NORMAL(mu[k], variance[k].sqrt()).log_prob(zq).sum(1) for k in range(e.way)], 1)
        return density.softmax(1)

    for _ in range(model.iterations):
        q = torch.cat([known, p(variance if model.e_step == "diagonal" else torch.ones_like(variance))])
        everything = torch.cat([zs, zq])
        mu = torch.stack([(q[:, k : k + 1] * everything).sum(0) / q[:, k].sum() for k in range(e.way)])
        if model.covariance == "diagonal":
            squares = (everything.unsqueeze(1) - mu).square()
            variance = (q.unsqueeze(2) * squares).sum(0) / q.sum(0).unsqueeze(1)
    return p(variance).unflatten(0, (-1, model.test_samples)).mean(1).log()


def torch_eval_encoder(encoder):
    twin = torch_encoder(encoder)
    for block, layer in zip(encoder, (m for m in twin if isinstance(m, nn.BatchNorm2d))):
        layer.running_mean, layer.running_var = block.running_mean, block.running_var
    return twin.eval()


TESTS = [{}, {"e_step": "diagonal"}, {"covariance": "identity"}, {"set_level": False}]


@pytest.mark.parametrize("options", TESTS)
def test_transductive_prediction_is_the_equation(options):
    model, e = feature_model(test_samples=7, **options), feature_episodes()
    logits = model.predict(e)
    assert logits.shape == (2, 12, 3)
    torch.testing.assert_close(logits.exp().sum(2), torch.ones(2, 12, dtype=torch.float64))
    for t in range(2):
        torch.testing.assert_close(logits[t], literal_prediction(model, e, t))
        torch.testing.assert_close(logits[t : t + 1], model.predict(e[t : t + 1]))


@pytest.mark.parametrize("options", TESTS)
def test_inductive_prediction_meets_each_query_alone(options, monkeypatch):
    model, e = feature_model(test_samples=7, inference="inductive", **options), feature_episodes()
    logits = model.predict(e)
    for t in range(2):
        for q in range(12):
            torch.testing.assert_close(logits[t, q], literal_prediction(model, e, t, [q])[0])
    other = Episodes(e.support, e.query.clone())
    other.query[:, 1:] = 3.0  # the other queries may be anything
    torch.testing.assert_close(model.predict(other)[:, :4], logits[:, :4])
    monkeypatch.setattr("umeta_core.meta_gmvae.MEMORY", 5 * 7 * 4 * 7)
    torch.testing.assert_close(model.predict(e), logits)


@pytest.mark.parametrize("inference", ["transductive", "inductive"])
def test_noise_belongs_to_a_task_and_not_to_its_batch(inference):
    model, e = feature_model(test_samples=3, inference=inference), feature_episodes()
    whole = model.predict(e)
    torch.testing.assert_close(torch.cat([model.predict(e[:1]), model.predict(e[1:])]), whole)
    twice = Episodes(e.support[:1].repeat(2, 1, 1, 1), e.query[:1].repeat(2, 1, 1, 1))
    first, second = model.predict(twice)
    torch.testing.assert_close(first, whole[0])
    assert not torch.allclose(first, second)  # an interval over tasks has to contain the noise


def test_prediction_on_images_uses_running_averages_and_leaves_no_trace():
    model, e = image_model(), image_sets(tasks=3)
    for _ in range(3):
        model.loss(e)
    g = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 3, 1, 14, 14, generator=g, dtype=torch.float64)
    test = Episodes(x[:, :, :1], x[:, :, 1:])
    before = {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}
    logits = model.predict(test)
    assert model.training and all(torch.equal(before[k], model.state_dict()[k]) for k in before)
    assert torch.equal(model.predict(test), logits)
    for t in range(2):
        torch.testing.assert_close(logits[t], literal_prediction(model, test, t))


def test_images_may_be_encoded_once_before_the_tasks():
    """A test image is in many tasks; batch norm on averages sees it alone, so its features are always the same."""
    model, data = image_model().float(), drawings()
    features = model.embed(data.images, chunk=7)
    assert model.training
    results = [evaluate(model, PartitionTasks(data, None, h), way=5, shot=1, query=3, tasks=6).accuracies
               for h in (None, features)]  # fmt: skip
    torch.testing.assert_close(*results)
    one = model.eval().features(data.images[3:4, None].float().div(255))[0]
    torch.testing.assert_close(features[3:4], one)
    pixels = data.images.float()
    before = pixels.clone()
    with pytest.raises(ValueError, match="images are uint8"):
        model.train().embed(pixels)
    assert torch.equal(pixels, before) and model.training


def test_networks_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="the decoder has latent=64, the model latent=32; make them equal"):
        MetaGMVAE(None, FeatureDecoder(16, 64), features=16, latent=32)
    with pytest.raises(ValueError, match="the encoder has features=256, the model features=64"):
        MetaGMVAE(ImageEncoder(), ImageDecoder(), features=64)


def test_unlearned_weights_and_any_way():
    """The way at test time need not be the number of components in training; mixing weights are uniform there."""
    model = feature_model(components=3)
    for way in (2, 5):
        e = feature_episodes(way=way)
        assert model.predict(e).shape == (2, 4 * way, way)
        h = torch.cat([e.flat()[0], e.flat()[2]], 1)
        mixture, x, z = model.adapt(h[:, : 2 * way], e.flat()[1], h[:, 2 * way :], way)
        torch.testing.assert_close(mixture.weights, torch.full((2, way), 1 / way).double())
        assert x.shape == (2, 2 * way * 5, 4) and z.shape == (2, 4 * way * 5, 4)
        start = labeled_start(x, e.flat()[1].repeat_interleave(5, 1), way)
        assert not torch.allclose(em(z, start).mean, mixture.mean)


# Learning ------------------------------------------------------------------------------------------------------------


def drawings(n=8, classes=12, size=14, seed=0):
    """Images whose quarters are black or white, with flipped pixels: a class is one of 16 patterns."""
    g = torch.Generator().manual_seed(seed)
    quarters = (torch.arange(1, classes + 1).unsqueeze(1) >> torch.arange(4)) % 2 == 1
    patterns = quarters.view(classes, 1, 1, 2, 2).repeat_interleave(size // 2, 3).repeat_interleave(size // 2, 4)
    flips = torch.rand(classes, n, 1, size, size, generator=g) < 0.08
    images = 255 * (patterns ^ flips)
    labels = torch.arange(classes).repeat_interleave(n)
    names = [str(c) for c in range(classes)]
    return ImageSet(images.flatten(0, 1).byte(), labels, names, [], "patterns", "train")


def test_unlabeled_sets_are_drawn_with_replacement_and_equal_by_seed():
    images = drawings()
    source = UnlabeledSets(images)
    e = source.sample(4, 1, 300, 0, torch.Generator().manual_seed(0))
    assert e.support.shape == (4, 1, 300, 1, 14, 14) and e.query.shape == (4, 1, 0, 1, 14, 14)
    pool = {tuple(x.flatten().tolist()) for x in images.images.float() / 255}
    drawn = [tuple(x.flatten().tolist()) for x in e.support[0, 0]]
    assert set(drawn) <= pool and len(set(drawn)) < 300
    again = source.sample(4, 1, 300, 0, torch.Generator().manual_seed(0))
    assert torch.equal(again.support, e.support)
    vectors = torch.rand(len(images), 8)
    shown = UnlabeledSets(images, vectors).sample(2, 1, 5, 0, torch.Generator().manual_seed(0))
    assert shown.support.shape == (2, 1, 5, 8)
    with pytest.raises(ValueError, match="the features are of 5 images but patterns train has 96"):
        UnlabeledSets(images, vectors[:5])
    with pytest.raises(ValueError, match="not finite"):
        UnlabeledSets(images, vectors / 0)


def learner(seed=0):
    options = {"components": 6, "samples": 2, "test_samples": 8}
    return image_model(seed, filters=8, latent=8, fresh=True, dtype=torch.float32, **options)


TRAINING = {"tasks": 2, "way": 1, "shot": 40, "query": 0, "lr": 6e-3, "log_every": 4, "progress": False}


def test_training_finds_classes_without_labels():
    images, model = drawings(), learner()
    history = train(model, UnlabeledSets(images), steps=100, **TRAINING)
    assert history["loss"][-1] < history["loss"][0] - 20 and not any(history["accuracy"])
    for inference in ("transductive", "inductive"):
        model.inference = inference
        assert evaluate(model, PartitionTasks(images), way=5, shot=1, tasks=40).mean > 65  # untrained: 20


def test_an_interrupted_run_resumes_bit_identically(tmp_path):
    source, whole, part, resumed = UnlabeledSets(drawings()), learner(), learner(), learner(seed=1)
    train(whole, source, steps=8, **TRAINING)
    train(part, source, steps=4, checkpoint=tmp_path / "run.pt", **TRAINING)
    train(resumed, source, steps=8, checkpoint=tmp_path / "run.pt", **TRAINING)
    a, b = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def test_latents_that_are_not_finite_stop_training():
    model = feature_model(dtype=torch.float32)
    with torch.no_grad():
        model.set_encoder[2].bias[:4] = float("inf")
    source = UnlabeledSets(drawings(), torch.rand(96, 8))
    with pytest.raises(NonFiniteLoss, match="the loss became"):
        train(model, source, steps=1, tasks=2, way=1, shot=5, query=0, progress=False)


def test_a_training_that_diverges_says_so_and_where():
    """Not that EM was given vectors without an end."""
    model = image_model(dtype=torch.float32, samples=2)
    with pytest.raises(NonFiniteLoss, match="Lower the learning rate"):
        train(model, UnlabeledSets(drawings()), steps=60, tasks=2, way=1, shot=20, query=0, lr=300.0, progress=False)


def test_mistakes_are_named():
    for options, match in (
        ({"covariance": "full"}, "covariance='full' is not known; use identity or diagonal"),
        ({"inference": "both"}, "use transductive or inductive"),
        ({"covariance": "identity", "e_step": "diagonal"}, "needs covariance='diagonal'"),
        ({"decoded": 0}, "decoded=0 is too few; use 1 or more"),
        ({"samples": 4, "decoded": 5}, "5 of 4 samples cannot be decoded; use 4 or fewer"),
        ({"samples": 0}, "samples=0 is too few"), ({"test_samples": 0}, "test_samples=0 is too few"),
        ({"chunk": 0}, "chunk=0 is too few"), ({"iterations": -1}, "iterations=-1 is too few; use 0 or more"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            feature_model(**options)
    with pytest.raises(ValueError, match="no decoder for 15x15 images"):
        ImageDecoder(size=15)


def test_losses_of_unequal_weight_are_refused():
    """The decoder's gradients are summed over tasks while they are computed."""
    model = image_model()
    x = torch.rand(2, 5, 1, 14, 14, dtype=torch.float64)
    z = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    model.reconstruction(x, z).sum().backward()
    with pytest.raises(ValueError, match="must have equal weights"):
        (model.reconstruction(x, z) * torch.tensor([1.0, 0.0])).sum().backward()
