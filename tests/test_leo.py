"""LEO against a literal, slow implementation, and one test for each mistake that public ports make."""

import math

import pytest
import torch
import torch.nn.functional as F

from umeta_core.data import load
from umeta_core.episodes import Episodes, PartitionTasks
from umeta_core.evaluation import in_chunks
from umeta_core.leo import LEO, deviation, keep_mask, support_loss
from umeta_core.training import train


def small(dtype=torch.float64, d=12, z=4, seed=1, **options):
    model = LEO(d, z, generator=torch.Generator().manual_seed(seed), **{"kl": 0.1, "encoder_penalty": 0.1} | options)
    return model.to(dtype)


def episodes(tasks=3, way=3, shot=2, query=4, d=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(tasks, way, shot + query, d, generator=generator, dtype=dtype), dim=-1)
    return Episodes(x[:, :, :shot], x[:, :, shot:])


# The literal form: one task after the other, every pair, every copy --------------------------------------------------


class Noise:
    """The numbers that a call of `loss` draws, in the order of its draws: then any task can take its own."""

    def __init__(self, model, e):
        self.g = model._noise(e.query)
        model.draws -= 1
        self.model, self.e = model, e
        t, n, k, d = e.support.shape
        self.support_mask = self.mask(t, n, k, d)
        self.epsilon = self.normal(t, n, k, model.latent)
        self.decoded, self.masks = [self.normal(t, n, k, d)], []
        for _ in range(model.latent_steps):
            self.masks.append(self.mask(t, n * k, d))
            self.decoded.append(self.normal(t, n, k, d))
        self.masks += [self.mask(t, n * k, d) for _ in range(model.weight_steps)]
        self.query_mask = self.mask(t, n * e.query.shape[2], d)

    def mask(self, *shape):
        return keep_mask(torch.empty(shape, dtype=torch.float64), 1 - self.model.dropout, self.g)

    def normal(self, *shape):
        return torch.empty(shape, dtype=torch.float64).normal_(generator=self.g)


def literal(model, e, t, noise=None, test=False):
    """Meta-loss terms and query logits of task t as the reference code writes them: K copies of codes and weights."""
    support, query = e.support[t], e.query[t].flatten(0, 1)
    n, k, d = support.shape
    x = support * (1.0 if test else noise.support_mask[t])
    codes = [[x[c, i] @ model.encoder for i in range(k)] for c in range(n)]
    first, second, last = model.relation
    means, sigmas = [], []
    for c in range(n):
        outputs = [
            torch.relu(torch.relu(torch.cat([codes[c][i], other]) @ first) @ second) @ last
            for i in range(k)
            for row in codes
            for other in row
        ]
        mean, s = torch.stack(outputs).mean(0).split(model.latent)
        means.append(mean)
        sigmas.append(torch.maximum(s.exp() - 1, torch.tensor(1e-10, dtype=s.dtype)))
    mean = torch.stack(means).unsqueeze(1).expand(-1, k, -1)
    sigma = torch.stack(sigmas).unsqueeze(1)
    z = first_z = mean.clone() if test else mean + sigma * noise.epsilon[t]
    offset = (2 / (d + n)) ** 0.5

    def decode(z, step):
        mu, s = (z @ model.decoder).split(d, -1)
        if test:
            return mu
        return mu + torch.maximum(s.exp() - (1 - offset), torch.tensor(1e-10, dtype=s.dtype)) * noise.decoded[step][t]

    y = torch.arange(n).repeat_interleave(k)

    def inner(w, step):
        masked = support.flatten(0, 1) * (1.0 if test else noise.masks[step][t])
        logits = torch.stack([masked @ w[:, i].T for i in range(k)]).mean(0)
        return F.cross_entropy(logits, y, reduction="sum")

    w = decode(z, 0)
    for step in range(model.latent_steps):
        (g,) = torch.autograd.grad(inner(w, step), z, create_graph=True)
        z = z - model.latent_rate * g
        w = decode(z, step + 1)
    for step in range(model.latent_steps, model.latent_steps + model.weight_steps):
        (g,) = torch.autograd.grad(inner(w, step), w, create_graph=True)
        w = w - model.weight_rate * g
    logits = torch.stack([(query * (1.0 if test else noise.query_mask[t])) @ w[:, i].T for i in range(k)]).mean(0)
    loss = F.cross_entropy(logits, torch.arange(n).repeat_interleave(len(query) // n))
    if not test:
        q, p = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 1.0)
        loss = loss + model.kl * (q.log_prob(first_z) - p.log_prob(first_z)).mean()
        loss = loss + model.encoder_penalty * F.mse_loss(first_z, z.detach())
    return loss, logits


@pytest.mark.parametrize("shot", [1, 3])
def test_loss_and_its_gradient_are_those_of_the_literal_form(shot):
    model, e = small(), episodes(shot=shot)
    with torch.no_grad():  # deviations off their bound, so that log q can be divided by them
        model.relation[2][:, model.latent :].abs_()
    noise = Noise(model, e)
    losses = torch.stack([literal(model, e, t, noise)[0] for t in range(3)])
    losses = losses + model.l2 * model.l2_penalty() + model.orthogonality * model.orthogonality_of()
    ours, _ = model.loss(e)
    assert torch.allclose(ours, losses, rtol=1e-6)
    wanted = torch.autograd.grad(losses.mean(), list(model.parameters()))
    got = torch.autograd.grad(ours.mean(), list(model.parameters()))
    for a, b in zip(got, wanted):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shot", [1, 3])
def test_prediction_equals_copies_that_are_all_alike(shot):
    model, e = small(), episodes(shot=shot)
    wanted = torch.stack([literal(model, e, t, test=True)[1] for t in range(3)])
    assert torch.allclose(model.predict(e), wanted, rtol=1e-9)


def test_batched_tasks_equal_tasks_alone():
    model, e = small(stochastic=False, dropout=0.0), episodes(tasks=4)
    together = model.loss(e)[0]
    alone = torch.cat([model.loss(e[t : t + 1])[0] for t in range(4)])
    assert torch.allclose(together, alone)
    assert torch.allclose(model.predict(e), torch.cat([model.predict(e[t : t + 1]) for t in range(4)]))


def test_meta_gradient_by_finite_differences():
    # The penalty holds the adapted codes constant, finite differences do not: it is left out here.
    model = small(d=6, z=3, latent_lr=0.5, weight_lr=0.05, encoder_penalty=0.0)
    e = episodes(tasks=2, way=2, d=6)

    def value():
        model.draws = 0  # the same noise at every call
        return model.loss(e)[0].mean()

    gradients = torch.autograd.grad(value(), list(model.parameters()))
    for p, g in zip(model.parameters(), gradients):
        direction = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * 1e-6)
            values.append(value().item())
            with torch.no_grad():
                p.sub_(direction, alpha=sign * 1e-6)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx((g * direction).sum().item(), rel=2e-4, abs=1e-7)


@pytest.mark.parametrize("shot", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"latent_steps": 0}, {"weight_steps": 0}, {"latent_steps": 0, "weight_steps": 0}, {"stochastic": False},
        {"prior": "random"}, {"copies": False}, {"copies": False, "stochastic": False}, {"class_rates": 3},
        {"class_rates": 3, "copies": False, "stochastic": False},
    ],
)  # fmt: skip
def test_written_out_derivatives_are_those_of_automatic_differentiation(options, shot):
    e, model = episodes(shot=shot), small(**options)
    results = []
    for loss in (model.loss, model.loss_reference):
        model.draws = 0
        losses, accuracies = loss(e)
        gradients = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
        results.append([losses, accuracies, *(torch.zeros(1) if g is None else g for g in gradients)])
    for ours, reference in zip(*results):
        assert torch.allclose(ours.double(), reference.double(), rtol=1e-9, atol=1e-12)


def test_losses_of_unequal_weight_are_refused():
    losses, _ = small().loss(episodes())
    with pytest.raises(ValueError, match="equal weights"):
        (losses * torch.tensor([1.0, 2.0, 3.0])).sum().backward()


# What the specification asks for -------------------------------------------------------------------------------------


def test_number_of_parameters():
    model = LEO()
    rates = model.latent_rate.numel() + model.weight_rate.numel()
    assert rates == 704 and sum(p.numel() for p in model.parameters()) - rates == 172_032


def test_at_the_start_half_of_the_deviations_are_at_their_bound_and_the_divergence_is_about_13():
    model = LEO(generator=torch.Generator().manual_seed(0))
    e = episodes(tasks=50, way=5, shot=1, d=640, dtype=torch.float32)
    _, sigma = model.encode(e.support)
    assert 0.4 < (sigma == 1e-10).float().mean() < 0.6
    divergence = model.divergence(model.adapt(e.support, torch.Generator().manual_seed(1)))
    assert 10 < divergence.mean() < 16


def test_divergence_estimates_the_closed_form():
    model, e = small(d=8, z=4), episodes(tasks=1, d=8)
    with torch.no_grad():
        model.relation[2][:, model.latent :].abs_()
    mean, sigma = model.encode(e.support)
    generator, model.dropout = torch.Generator().manual_seed(0), 0.0
    with torch.no_grad():
        z = [model._initial_codes(e.support, generator) for _ in range(4000)]
        estimate = torch.stack([model.divergence(done) for done in z]).mean()
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0, 1))
    assert estimate.item() == pytest.approx(exact.mean().item(), rel=0.02)


def test_orthogonality_is_zero_for_orthogonal_rows():
    model = LEO()
    with torch.no_grad():
        model.decoder.copy_(torch.linalg.qr(torch.randn(1280, 64))[0].T * torch.rand(64, 1))
    assert model.orthogonality_of().item() == pytest.approx(0, abs=1e-10)


def test_sum_is_the_mean_times_what_it_is_over():
    e = episodes()
    mean, total = small(), small(reduce="sum")
    done = mean.adapt(e.support, torch.Generator().manual_seed(0))
    assert torch.allclose(total.divergence(done), mean.divergence(done) * mean.latent)
    assert torch.allclose(total.penalty(done), mean.penalty(done) * mean.latent)


def test_one_code_for_each_class_without_copies():
    model, e = small(copies=False), episodes(shot=3)
    done = model.adapt(e.support, torch.Generator().manual_seed(0))
    assert done.codes[0].shape == (3, 3, 1, 4)


# The rows of Table 2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_steps, weight_steps", [(0, 0), (0, 5), (5, 0), (5, 5)])
def test_ablated_steps(latent_steps, weight_steps):
    model, e = small(latent_steps=latent_steps, weight_steps=weight_steps), episodes()
    done = model.adapt(e.support)
    assert len(done.codes) == 1 + latent_steps and len(done.weights) == 1 + latent_steps + weight_steps
    model.loss(e)[0].mean().backward()
    assert (model.latent_rate.grad.abs().max() > 0) == (latent_steps > 0)
    assert (model.weight_rate.grad.abs().max() > 0) == (weight_steps > 0)


def test_deterministic_draws_nothing_but_dropout():
    model, e = small(stochastic=False, dropout=0.0), episodes()
    first, second = model.loss(e)[0], model.loss(e)[0]
    assert torch.equal(first, second)
    assert not torch.equal(small().loss(e)[0], first)


def test_random_prior_needs_no_encoder():
    model, e = small(prior="random"), episodes()
    model.loss(e)[0].mean().backward()
    assert model.encoder.grad is None or model.encoder.grad.abs().max() <= model.l2 * model.encoder.abs().max()
    start = model.adapt(e.support)
    assert start.codes[0].abs().max() == 0 and start.weights[0].abs().max() == 0
    assert start.weights[-1].abs().max() > 0, "the latent gradient at z = 0 is not zero"
    sampled = small(prior="random at test")
    assert sampled.adapt(e.support).codes[0].abs().max() > 0
    assert torch.equal(sampled.predict(e), sampled.predict(e))


@pytest.mark.parametrize("copies", [True, False])
def test_noise_at_test_is_the_task_s_own_whatever_fits_the_memory(copies):
    model, e = small(prior="random at test", copies=copies), episodes(tasks=5)
    e.first = 20
    whole, alone = (in_chunks(model.predict, e, images) for images in (1000, 1))
    torch.testing.assert_close(alone, whole)
    codes = model.adapt(e.support, first=20).codes[0]
    assert len({tuple(code.flatten().tolist()) for code in codes}) == 5, "tasks do not share their noise"
    assert torch.equal(model.adapt(e.support[2:], first=22).codes[0], codes[2:])
    assert model.draws == 0, "a test does not count as a step of training"


# Mistakes of public ports --------------------------------------------------------------------------------------------


def test_last_relation_layer_is_linear_so_that_means_may_be_negative():
    mean, _ = LEO(generator=torch.Generator().manual_seed(0)).encode(episodes(d=640, dtype=torch.float32).support)
    assert (mean < 0).float().mean() > 0.2


def test_raw_output_is_not_the_deviation():
    s = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    sigma = deviation(s)
    assert torch.allclose(sigma, torch.tensor([1e-10, 1e-10, torch.e - 1]))
    (gradient,) = torch.autograd.grad(sigma.sum(), s)
    assert gradient[0] == 0 and gradient[2] == pytest.approx(torch.e)


def test_nothing_is_sampled_in_predict():
    """Neither anew nor once: the codes that adaptation starts from are the means."""
    model, e = small(), episodes()
    model.eval()
    assert torch.equal(model.predict(e), model.predict(e))
    assert torch.equal(model.adapt(e.support).codes[0], model.encode(e.support)[0].unsqueeze(2))


def test_the_inner_loop_leaves_no_gradient_in_the_parameters():
    model, e = small(), episodes()
    model.adapt(e.support)
    model.predict(e)
    assert all(p.grad is None for p in model.parameters())


def test_second_order():
    e = episodes()
    model = small(dropout=0.0, stochastic=False)
    last = model.adapt(e.support, create_graph=True).weights[-1]
    through = torch.autograd.grad(last.sum(), [model.decoder, model.latent_rate, model.weight_rate, model.encoder])
    assert all(g.abs().max() > 0 for g in through)
    assert model.adapt(e.support).codes[-1].grad_fn is None, "nothing is kept for a prediction"


def test_encoder_penalty_reaches_encoder_and_relation_network_only():
    model, e = small(), episodes()
    done = model.adapt(e.support, torch.Generator().manual_seed(0), create_graph=True)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(model.penalty(done).mean(), list(model.parameters()), allow_unused=True)
    reached = {name for name, g in zip(names, gradients) if g is not None and g.abs().max() > 0}
    assert reached == {"encoder", "relation.0", "relation.1", "relation.2"}


def test_orthogonality_is_of_the_64_rows_not_of_the_1280_columns():
    model = small()
    rows = F.normalize(model.decoder, dim=1)
    wanted = sum((rows[i] @ rows[j] - float(i == j)) ** 2 for i in range(4) for j in range(4)) / 16
    assert torch.allclose(model.orthogonality_of(), wanted)


def test_each_dimension_has_its_own_step_size():
    model = LEO()
    assert model.latent_rate.shape == (64,) and model.weight_rate.shape == (640,)
    assert (model.latent_rate == 1).all() and (model.weight_rate == 0.001).all()


def test_inner_loss_is_a_sum_over_the_support_set():
    logits, y = torch.randn(2, 6, 3), torch.randint(3, (2, 6))
    wanted = torch.stack([F.cross_entropy(logits[t], y[t], reduction="sum") for t in range(2)])
    assert torch.allclose(support_loss(logits, y), wanted)


def test_dropout_acts_on_the_inputs_of_the_classifier_anew_at_every_use():
    model = LEO(dropout=0.5)
    x, w = torch.ones(1, 4, 640), torch.ones(1, 5, 640)
    noise = torch.Generator().manual_seed(0)
    first, second = model.classify(x, w, noise), model.classify(x, w, noise)
    assert not torch.equal(first, second)
    assert first.mean().item() == pytest.approx(640, rel=0.05)


def test_keep_mask_keeps_the_stated_share():
    mask = keep_mask(torch.empty(1000, 999), 0.7, torch.Generator().manual_seed(0))
    assert mask.mean().item() == pytest.approx(1, abs=0.005)
    assert (mask > 0).float().mean().item() == pytest.approx(0.7, abs=0.003)
    assert (mask[:, 1:] * mask[:, :-1]).mean().item() == pytest.approx(1, abs=0.01), "neighbors are independent"


def test_gradients_are_clipped_entry_by_entry_then_variable_by_variable():
    model = small()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model.relation[0].grad = torch.full_like(model.relation[0], 1e-4)
    model.prepare_gradients(torch.tensor(1.0))
    for name, p in model.named_parameters():
        if name == "relation.0":
            assert (p.grad == 1e-4).all(), "a small gradient stays"
        else:
            assert p.grad.norm().item() == pytest.approx(0.1)


def test_the_norm_of_the_whole_gradient_is_clipped_if_the_text_is_followed():
    model = small(clip="whole")
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model.relation[0].grad = torch.full_like(model.relation[0], 0.05)
    model.prepare_gradients(torch.tensor(1.0))
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert whole.norm().item() == pytest.approx(0.1, rel=1e-4)
    ratio = model.relation[0].grad / model.encoder.grad.max()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5))  # entries were clipped to 0.1 before


def test_equal_step_sizes_for_each_class_change_nothing():
    e, shared, own = episodes(), small(weight_lr=0.3), small(weight_lr=0.3, class_rates=3)
    assert own.latent_rate.shape == (3, 1, 4) and own.weight_rate.shape == (3, 12)
    torch.testing.assert_close(own.predict(e), shared.predict(e))
    own.weight_rate.data[0] = 0.0
    last, before = (own.adapt(e.support).weights[-k] for k in (1, 2))
    assert torch.equal(last[:, 0], before[:, 0]) and not torch.equal(last[:, 1], before[:, 1])


@pytest.mark.parametrize("rule", ["released", "intended"])
@pytest.mark.parametrize("class_rates", [None, 3])
def test_what_a_loss_that_is_not_a_number_leaves(rule, class_rates):
    """Two names are swapped in the released code: its gradients are the parameters, rates and all, and get clipped."""
    model = small(nan_rule=rule, class_rates=class_rates)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    model.prepare_gradients(torch.tensor(torch.nan))
    for name, p in model.named_parameters():
        if rule == "released":
            clipped = before[name].clamp(-0.1, 0.1)
            expected = clipped * min(1.0, 0.1 / clipped.norm().item())
        else:
            expected = torch.zeros_like(p) if name.endswith("rate") else 1e-4 * before[name]
        torch.testing.assert_close(p.grad, expected)


def test_an_infinite_gradient_is_clipped_not_replaced():
    model = small()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.decoder.grad[0, 0] = torch.inf
    model.prepare_gradients(torch.tensor(1.0))
    assert model.decoder.grad[0, 0].item() == pytest.approx(0.1) and model.encoder.grad.abs().max() == 0


@pytest.mark.parametrize("options, message", [
    ({"dropout": 1.0}, "dropout=1.0 drops everything"), ({"dropout": -0.2}, "dropout=-0.2"),
    ({"spread": "log"}, "spread='log' is not known; use shifted or exp"),
    ({"nan_rule": "skip"}, "released or intended"),
    ({"prior": "none"}, "encoder, random or random at test"), ({"reduce": "max"}, "mean or sum"),
    ({"clip": "none"}, "variable or whole"),
])  # fmt: skip
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_dropout_too_small_for_16_bits_drops_nothing():
    assert keep_mask(torch.zeros(9, 7), 1 - 1e-6, torch.Generator()).eq(1).all()


def test_the_paper_s_literal_deviation_and_sums():
    model, twin = small(spread="exp", reduce="sum"), small()
    assert deviation(torch.tensor([-1.0, 2.0]), model._offset()).tolist() == pytest.approx([math.exp(-1), math.exp(2)])
    rows = F.normalize(model.decoder, dim=1)
    off = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)
    torch.testing.assert_close(model.orthogonality_of(), off.square().sum().sqrt())
    torch.testing.assert_close(model.l2_penalty(), 2 * twin.l2_penalty())


# Training ------------------------------------------------------------------------------------------------------------


def features(split="train", d=16):
    images = load("glyphs", split)
    generator = torch.Generator().manual_seed(0)
    x = images.images.flatten(1).float() / 255 @ torch.randn(784, d, generator=generator)
    return PartitionTasks(images, None, F.normalize(x - x.mean(0), dim=1))


def test_training_lowers_the_loss_and_resumes_bit_identically(tmp_path):
    source = features()
    options = dict(tasks=8, way=5, shot=1, query=5, lr=3e-3, seed=0, progress=False, log_every=20)

    def new():
        return LEO(16, 8, generator=torch.Generator().manual_seed(0), dropout=0.1)

    whole = new()
    history = train(whole, source, steps=120, prepare=whole.prepare_gradients, **options)
    assert history["loss"][-1] < history["loss"][0] - 0.05
    part = new()
    train(part, source, steps=50, checkpoint=tmp_path / "leo.pt", prepare=part.prepare_gradients, **options)
    rest = new()
    train(rest, source, steps=120, checkpoint=tmp_path / "leo.pt", prepare=rest.prepare_gradients, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters()))


def test_steps_that_are_not_finite_are_counted():
    model = LEO(16, 8, generator=torch.Generator().manual_seed(0))
    calls = []

    def broken(episodes):
        calls.append(0)
        losses, accuracies = LEO.loss_reference(model, episodes)
        return losses * (torch.nan if len(calls) % 4 == 0 else 1.0), accuracies

    model.loss = broken
    history = train(model, features(), steps=20, tasks=2, way=3, shot=1, query=2, log_every=10, progress=False,
                    prepare=model.prepare_gradients)  # fmt: skip
    assert history["skipped"] == 5
    assert all(0 < loss < 100 for loss in history["loss"])
    assert all(p.isfinite().all() for p in model.parameters())


def test_noise_differs_between_seeds_and_processes(monkeypatch):
    """A generator on a CPU looks at 32 bits of its seed only."""
    drawn = set()
    for seed, rank in ((0, "0"), (1, "0"), (0, "1")):
        monkeypatch.setenv("RANK", rank)
        g = LEO(8, seed=seed)._noise(torch.zeros(1))
        drawn.add(tuple(torch.randn(3, generator=g).tolist()))
    assert len(drawn) == 3


@pytest.mark.parametrize("prior", ["random", "random at test"])
def test_random_codes_have_neither_divergence_nor_penalty(prior):
    model = small(prior=prior)
    done = model.adapt(episodes().support, torch.Generator().manual_seed(0))
    wanted = model.l2 * model.l2_penalty() + model.orthogonality * model.orthogonality_of()
    torch.testing.assert_close(model.regularizers(done), wanted)
