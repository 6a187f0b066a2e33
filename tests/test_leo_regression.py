import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from umeta_core import leo_regression as leo
from umeta_core.leo_regression import ExactPosterior, LEORegression, Noise, RegressionTasks
from umeta_core.training import train


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tasks(n=4, query=6, seed=0, **options):
    return RegressionTasks(**options).sample(n, 1, 5, query, generator(seed))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learner(seed=0, **options):
    return LEORegression(generator=generator(seed), **options)


def literal_loss(model, xs, ys, xq, yq, code_noise, weight_noise):
    """LEO for one task, written with loops over pairs, layers and steps (LEO, Alg. 1, App. A)."""

    def layers(v, matrices):
        for w in matrices[:-1]:
            v = F.relu(v @ w)
        return v @ matrices[-1]

    def std(s, offset):
        return torch.clamp(torch.exp(s) - (1 - offset), min=1e-10)

    def decode(z, noise):
        mean, s = layers(z, list(model.decoder)).split(1761)
        return mean + std(s, 0.02) * noise

    def error(theta, x, y):
        w1, b1, w2, b2, w3, b3 = theta.split([40, 40, 1600, 40, 40, 1])
        total = 0.0
        for a, b in zip(x, y):
            h = F.relu(w1 * a + b1)
            h = F.relu(h @ w2.reshape(40, 40) + b2)
            total = total + (h @ w3 + b3[0] - b) ** 2
        return total / len(x)

    codes = [layers(torch.stack([a, b]), list(model.encoder)) for a, b in zip(xs, ys)]
    outs = [layers(torch.cat([c, d]), list(model.relation)) for c in codes for d in codes]
    assert len(outs) == 25
    mean, s = (sum(outs) / 25).split(16)
    sigma = std(s, model.code_offset)
    start = z = mean + sigma * code_noise
    for k in range(5):
        (g,) = torch.autograd.grad(error(decode(z, weight_noise[k]), xs, ys), z, create_graph=True)
        if g.norm() > model.inner_clip:
            g = g * model.inner_clip / g.norm()
        z = z - model.rates * g
    q, p = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 1.0)
    kl = (q.log_prob(start) - p.log_prob(start)).mean()
    penalty = ((z.detach() - start) ** 2).mean()
    return error(decode(z, weight_noise[5]), xq, yq) + model.kl * kl + model.encoder_penalty * penalty


def gradients(model, losses):
    model.zero_grad()
    (losses * torch.linspace(1, 2, len(losses))).sum().backward()  # uneven: each task's gradient must be its own
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_sizes_of_the_paper():
    model = learner()
    assert leo.WEIGHTS == 80 + 1640 + 41 == 1761
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert [s for n, s in shapes.items() if n.startswith("encoder")] == [(2, 32), (32, 32), (32, 16)]
    assert [s for n, s in shapes.items() if n.startswith("relation")] == [(32, 32), (32, 32), (32, 32)]
    assert [s for n, s in shapes.items() if n.startswith("decoder")] == [(16, 32), (32, 32), (32, 3522)]
    assert shapes["rates"] == (16,) and len(shapes) == 10  # and no biases


def test_generated_network_has_the_layers_and_biases_of_a_torch_network():
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1)
    )
    theta = torch.cat([p.t().flatten() for p in net.parameters()])
    x = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(leo.network(theta.expand(2, -1), x.expand(2, -1))[1], net(x[:, None])[:, 0])


@pytest.mark.parametrize("clip", [5.0, 0.05, 1e9], ids=["clip 5", "always clipped", "never clipped"])
def test_batch_equals_a_literal_loop_with_its_meta_gradient(double, clip):
    # standard deviations far from 1e-10, where the literal KL loses its digits
    model, batch = learner(inner_clip=clip, code_offset=0.8), to_double(tasks(3))
    noise = model.noise(3, generator(1))
    want = torch.stack([
        literal_loss(model, batch.support_x[t], batch.support_y[t], batch.query_x[t], batch.query_y[t],
                     noise.code[t], noise.weights[:, t])
        for t in range(3)
    ])  # fmt: skip
    got, before = model.loss(batch, noise)
    assert before.shape == (3,) and not before.requires_grad
    torch.testing.assert_close(got, want)
    want = gradients(model, want)
    for name, g in gradients(model, got).items():
        torch.testing.assert_close(g, want[name], rtol=1e-7, atol=1e-10, msg=name)


def to_double(batch):
    floats = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
    return leo.Regression(*(v.double() for v in floats), batch.line, batch.coefficients.double(), batch.generator)


def test_meta_gradient_equals_finite_differences(double):
    # the encoder penalty stops a gradient on purpose and is left out
    model, batch = learner(encoder_penalty=0.0), to_double(tasks(3))
    noise = model.noise(3, generator(1))
    grads = gradients(model, model.loss(batch, noise)[0])
    eps = 1e-6
    for number, (name, p) in enumerate(model.named_parameters()):
        direction = F.normalize(torch.randn(p.shape, generator=generator(number)).flatten(), dim=0).view_as(p)
        values = []
        for sign in (1, -1):
            p.data += sign * eps * direction
            values.append((model.loss(batch, noise)[0] * torch.linspace(1, 2, 3)).sum().item())
            p.data -= sign * eps * direction
        numeric = (values[0] - values[1]) / (2 * eps)
        assert abs(numeric - (grads[name] * direction).sum().item()) < 1e-5 * max(1, abs(numeric)), name


def test_encoder_penalty_reaches_the_encoder_and_relation_net_only():
    batch, grads = tasks(3), []
    for gamma in (0.0, 1.0):
        model = learner(encoder_penalty=gamma)
        grads.append(gradients(model, model.loss(batch, model.noise(3, generator(1)))[0]))
    for name in grads[0]:
        same = torch.equal(grads[0][name], grads[1][name])
        assert same == (not name.startswith(("encoder", "relation"))), name


def test_adaptation_lowers_the_support_error():
    model, batch = learner(latent_lr=0.005), tasks(200)
    start = torch.randn(200, 16, generator=generator(1)).requires_grad_()
    # without the sampling of weights, whose noise hides the steps of an untrained decoder
    codes, weights = model.adapt(start, batch.support_x, batch.support_y, torch.zeros(6, 200, 1761))
    assert len(codes) == len(weights) == 6
    errors = torch.stack([leo.squared_error(w, batch.support_x, batch.support_y) for w in weights])
    assert (errors[1:] <= errors[:-1]).float().mean() > 0.95 and (errors[5] < errors[0]).float().mean() > 0.99
    steps = torch.stack([b - a for a, b in zip(codes, codes[1:])]).norm(dim=2)
    assert steps.max() <= 0.005 * 5 * 1.0001  # rate times clipped gradient


def test_predictions_are_samples_and_repeatable(monkeypatch):
    model, batch, grid = learner(), tasks(4), torch.linspace(-5, 5, 9)
    with torch.no_grad():  # adaptation takes the gradients that it needs
        first = model.predict(batch, grid, 3, generator(1))
    again = model.predict(batch, grid.expand(4, -1), 3, generator(1))
    assert first.shape == (3, 4, 9) and torch.equal(first, again) and not first.requires_grad
    assert (first[0] != first[1]).any(1).all()  # every task's samples differ, in evaluation too
    assert all(p.grad is None for p in model.parameters())
    zero = model.predict(batch, grid, 3, generator(1), steps=0)
    assert not torch.allclose(zero, first)
    noise = model.noise(12, generator(1))  # sample s of task t is row s * T + t
    one = Noise(noise.code[5:6], noise.weights[:, 5:6])
    mean, std = model.encode(batch.support_x[1:2], batch.support_y[1:2])
    _, weights = model.adapt(mean + std * one.code, batch.support_x[1:2], batch.support_y[1:2], one.weights)
    torch.testing.assert_close(leo.network(weights[-1], grid[None])[0], first[1, 1])
    monkeypatch.setattr(leo, "CHUNK", 5)
    assert model.predict(batch, grid, 3, generator(1)).shape == (3, 4, 9)


def test_tasks_have_the_stated_ranges_and_noise():
    batch = tasks(4000, query=20)
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    assert batch.support_x.shape == batch.support_y.shape == (4000, 5) and batch.query_y.shape == (4000, 20)
    assert x.min() > -5.001 and x.max() < 5.001 and x.std().item() == pytest.approx(10 / 12**0.5, rel=0.01)
    assert batch.line.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (y - batch.curve(x)).std().item() == pytest.approx(0.3, rel=0.02)
    lines, sines = batch.coefficients[batch.line], batch.coefficients[~batch.line]
    assert lines.abs().max() <= 3 and lines.std(0).tolist() == pytest.approx([3**0.5] * 2, rel=0.05)
    amplitude, phase = sines.norm(dim=1), torch.atan2(-sines[:, 1], sines[:, 0])
    assert 0.099 < amplitude.min() < 0.2 and 4.9 < amplitude.max() < 5.001 and amplitude.mean() > 2.4
    assert -1e-5 < phase.min() < 0.05 and 3.09 < phase.max() <= math.pi + 1e-5
    t = int((~batch.line).nonzero()[0])
    a, phi = batch.coefficients[t].norm(), torch.atan2(-batch.coefficients[t, 1], batch.coefficients[t, 0])
    torch.testing.assert_close(batch.curve(x)[t], a * torch.sin(x[t] - phi), rtol=1e-4, atol=1e-4)


def test_slices():
    batch = tasks(6)
    part = batch[2:4]
    assert len(part) == 2 and torch.equal(part.query_y, batch.query_y[2:4])


def test_family_of_pure_curves_and_least_squares():
    batch, grid = tasks(300, noise=0.0), torch.linspace(-5, 5, 101)
    curves = batch.curve(grid)
    assert torch.equal(leo.family_of(curves, grid), batch.line)
    bent = curves.view(3, 100, 101) + torch.randn(3, 100, 101, generator=generator(1)).cumsum(2)
    got = leo.family_of(bent, grid)
    x = grid.numpy().astype(float)
    for i, j in [(0, 0), (1, 7), (2, 50), (0, 99), (2, 3)]:
        left = [
            np.linalg.lstsq(design, bent[i, j].numpy(), rcond=None)[1]
            for design in (np.stack([x, x**0], 1), np.stack([np.sin(x), np.cos(x)], 1))
        ]
        assert bool(got[i, j]) == (left[0].item() < left[1].item())
        rms = leo.distances(bent, grid)[:, i, j]
        assert rms.tolist() == pytest.approx([math.sqrt(v.item() / 101) for v in left], rel=1e-3)


def test_exact_posterior_equals_brute_force_and_is_calibrated():
    batch = tasks(1500, seed=1)
    belief = ExactPosterior(batch, grid=64).line
    assert batch.line.double().mean().item() == pytest.approx(belief.mean().item(), abs=0.01)
    unsure = (belief > 0.02) & (belief < 0.98)  # beliefs between mean what they say: as many are lines
    assert unsure.sum() > 30
    assert belief[unsure].mean().item() == pytest.approx(batch.line[unsure].double().mean().item(), abs=0.1)

    t = int((belief - 0.5).abs().argmin())  # the most ambiguous task, by Monte Carlo over tasks
    one = batch[t : t + 1]
    prior = RegressionTasks(noise=0.0).sample(300_000, 1, 1, 1, generator(2))
    error = (prior.curve(one.support_x[0]) - one.support_y).double().square().sum(1)
    weight = torch.exp(error / (-2 * 0.3**2))
    want = (weight * prior.line).sum() / weight.sum()
    posterior = ExactPosterior(one)
    assert posterior.line.item() == pytest.approx(want.item(), abs=0.1)
    grid = torch.tensor([-4.0, 0.0, 3.0])
    mean = (weight[:, None] * prior.curve(grid)).sum(0) / weight.sum()
    torch.testing.assert_close(posterior.mean(grid)[0], mean, rtol=0, atol=0.3)


def test_exact_posterior_samples_agree_with_its_mean():
    batch, grid = tasks(5), torch.linspace(-5, 5, 7).double()
    posterior = ExactPosterior(batch)
    line, c = posterior.sample(4000, generator(1))
    assert line.shape == (4000, 5) and c.shape == (4000, 5, 2)
    curves = torch.where(line[..., None], *((leo.basis(grid, f) * c.unsqueeze(2)).sum(-1) for f in (True, False)))
    torch.testing.assert_close(curves.mean(0), posterior.mean(grid), rtol=0, atol=0.1)
    torch.testing.assert_close(line.double().mean(0), posterior.line, rtol=0, atol=0.03)


def test_ambiguous_tasks_are_those_of_the_posterior():
    batch, belief = leo.ambiguous_tasks(RegressionTasks(), 5, generator(3), low=0.1, query=2)
    assert len(batch) == len(belief) == 5 and batch.query_y.shape == (5, 2)
    assert ((belief >= 0.1) & (belief <= 0.9)).all()
    torch.testing.assert_close(ExactPosterior(batch).line, belief)
    with pytest.raises(ValueError, match="low=0.5"):
        leo.ambiguous_tasks(RegressionTasks(), 5, generator(3), low=0.5)


def test_both_families_counts():
    belief = torch.tensor([0.5, 0.25, 0.5, 0.01, 0.99], dtype=torch.float64)
    lines = torch.zeros(10, 5, dtype=torch.bool)
    lines[:5, 0] = True  # half and half; task 1: no line at all; task 2: one of ten; task 4: half and half
    lines[:1, 2] = True
    lines[:5, 4] = True
    away = torch.stack([(~lines).double(), lines.double()])  # 0 to the own family, 1 to the other
    got = leo.both_families(away, belief)
    assert got["ambiguous"] == 3 and got["both"] == pytest.approx(2 / 3) and got["both_elsewhere"] == 0.5
    assert got["none"] == pytest.approx(0) and got["error"] == pytest.approx((0 + 0.25 + 0.4 + 0.01 + 0.49) / 5)
    away[:, 0, 2] += 3  # the only line of task 2 is far from all lines
    got = leo.both_families(away, belief)
    assert got["both"] == pytest.approx(1 / 3) and got["none"] == pytest.approx(1 / 50)


def meta_train(steps, seed=0, **options):
    model = learner(seed)
    history = train(
        model, RegressionTasks(), steps=steps, tasks=12, way=1, shot=5, query=15, seed=seed, progress=False,
        prepare=model.prepare_gradients, **options,
    )  # fmt: skip
    return model, history


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole, _ = meta_train(6)
    meta_train(3, checkpoint=tmp_path / "run.pt")
    resumed, history = meta_train(6, checkpoint=tmp_path / "run.pt")
    assert history["step"][-1] == 6
    for p, q in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_training_beats_predicting_the_mean():
    model, _ = meta_train(200)
    test = tasks(400, query=30, seed=5)
    error = (model.predict(test, test.query_x, 1, generator(1))[0] - test.query_y).square().mean(1)
    variance = (test.query_y - test.query_y.mean(1, keepdim=True)).square().mean(1)  # predicting each task's mean
    assert error.median() < 0.75 * variance.median()  # medians: after so few steps single tasks still diverge


def test_a_step_that_is_not_a_number_shrinks_the_weights_and_leaves_the_rates():
    model = learner()
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    model.prepare_gradients(torch.tensor(torch.nan))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if name == "rates" else 1e-4 * p.detach())


def test_numbers_that_have_no_meaning_are_refused():
    batch = RegressionTasks(noise=0.0).sample(2, 0, 5, 3, generator())
    with pytest.raises(ValueError, match="without noise the posterior is a point"):
        ExactPosterior(batch, 0.0)
    model = learner()
    for steps in (-1, model.latent_steps + 1):
        with pytest.raises(ValueError, match=f"adapts in 0 to {model.latent_steps} steps"):
            model.predict(batch, batch.query_x, 2, generator(), steps=steps)
    assert model.loss(batch)[1].tolist() == [0.0, 0.0]  # a regression has no accuracy
