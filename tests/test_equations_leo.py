"""Chapter 9: every labeled equation, written out, equals the function it names; scratch code equals the library."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scratch import scratch_namespace

from umeta_core.episodes import Episodes
from umeta_core.fast_leo import InnerLoops
from umeta_core.leo import LEO, deviation, keep_mask, support_loss

T, N, K, Q, D, Z = 3, 3, 2, 4, 10, 4


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/09_leo.md")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def leo(**options):
    options = {"kl": 0.1, "encoder_penalty": 0.2, "l2": 0.01, "latent_lr": 0.5, "weight_lr": 0.1} | options
    return LEO(D, Z, generator=generator(1), **options).double()


@pytest.fixture
def episodes():
    x = F.normalize(torch.randn(T, N, K + Q, D, generator=generator(), dtype=torch.float64), dim=-1)
    return Episodes(x[:, :, :K], x[:, :, K:])


def relate(model, pair):
    """g_r of the codes of one ordered pair."""
    first, second, last = model.relation
    return torch.relu(torch.relu(torch.cat(pair) @ first) @ second) @ last


def test_eq_leo_encoder(episodes):
    model = leo()
    mean, sigma = model.encode(episodes.support)
    for t in range(T):
        e = [[model.encoder.T @ episodes.support[t, n, k] for k in range(K)] for n in range(N)]
        for n in range(N):
            pairs = [relate(model, (e[n][k], other)) for k in range(K) for row in e for other in row]
            both = sum(pairs) / (N * K**2)
            torch.testing.assert_close(mean[t, n], both[:Z])
            torch.testing.assert_close(sigma[t, n], deviation(both[Z:]))


def test_eq_leo_deviation():
    s = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    for offset in (0.0, 0.3):
        sigma = deviation(s, offset)
        literal = [max(math.exp(value) - (1 - offset), 1e-10) for value in s.tolist()]
        torch.testing.assert_close(sigma.detach(), torch.tensor(literal, dtype=torch.float64))
        (slope,) = torch.autograd.grad(sigma.sum(), s)
        torch.testing.assert_close(slope, torch.where(sigma > 1e-10, s.exp(), 0.0).detach())


def test_eq_leo_decoder(episodes):
    model = leo()
    z = torch.randn(T, N, K, Z, generator=generator(2), dtype=torch.float64)
    w = model.decode(z, generator(3))
    epsilon = torch.empty(T, N, K, D, dtype=torch.float64).normal_(generator=generator(3))
    offset = math.sqrt(2 / (D + N))
    for t in range(T):
        for n in range(N):
            copies = []
            for k in range(K):
                mean, s = z[t, n, k] @ model.decoder[:, :D], z[t, n, k] @ model.decoder[:, D:]
                copies.append(mean + deviation(s, offset) * epsilon[t, n, k])
            torch.testing.assert_close(w[t, n], sum(copies) / K)


def test_eq_leo_predict():
    model = leo(dropout=0.4)
    x, w = (torch.randn(T, n, D, generator=generator(n), dtype=torch.float64) for n in (6, N))
    mask = keep_mask(x, 0.6, generator(4))
    assert all(abs(value) < 1e-9 or abs(value - 1 / 0.6) < 1e-9 for value in mask.flatten().tolist())
    dropped, whole = model.classify(x, w, generator(4)), model.classify(x, w)
    for t in range(T):
        for i in range(6):
            for n in range(N):
                torch.testing.assert_close(dropped[t, i, n], ((mask[t, i] * x[t, i]) * w[t, n]).sum())
                torch.testing.assert_close(whole[t, i, n], x[t, i] @ w[t, n])


def test_eq_leo_support_loss():
    logits, y = torch.randn(T, 6, N, generator=generator()), torch.randint(N, (T, 6), generator=generator())
    for t, loss in enumerate(support_loss(logits, y).tolist()):
        literal = sum(math.log(sum(math.exp(v) for v in row)) - row[c] for row, c in zip(logits[t].tolist(), y[t]))
        assert loss == pytest.approx(literal, rel=1e-5)


def test_eq_leo_inner(episodes):
    """Both loops with gradients by hand, without noise; rates differ between dimensions."""
    model = leo(stochastic=False, copies=False)
    with torch.no_grad():
        model.latent_rate.copy_(torch.linspace(0.2, 1.5, Z))
        model.weight_rate.copy_(torch.linspace(0.01, 0.4, D))
    done = model.adapt(episodes.support)
    y = torch.arange(N).repeat_interleave(K)
    to_mean = model.decoder[:, :D].detach()

    def gradient(x, w):
        return sum(torch.outer((x[i] @ w.T).softmax(0) - F.one_hot(y[i], N), x[i]) for i in range(N * K))

    for t in range(T):
        x, z = episodes.support[t].flatten(0, 1), done.codes[0][t, :, 0].detach()
        for step in range(5):
            z = z - model.latent_rate.detach() * (gradient(x, z @ to_mean) @ to_mean.T)
            torch.testing.assert_close(done.codes[step + 1][t, :, 0].detach(), z)
        w = z @ to_mean
        for step in range(5):
            w = w - model.weight_rate.detach() * gradient(x, w)
            torch.testing.assert_close(done.weights[6 + step][t].detach(), w)


def test_eq_leo_kl(episodes):
    """Against the densities themselves, with deviations off their bound."""
    model = leo()
    with torch.no_grad():
        model.relation[2][:, Z:].abs_()
    done = model.adapt(episodes.support, generator(5))
    mean, sigma = model.encode(episodes.support, generator(5))
    estimate = model.divergence(done)
    q, p = torch.distributions.Normal(mean.unsqueeze(2), sigma.unsqueeze(2)), torch.distributions.Normal(0.0, 1.0)
    z = done.codes[0]
    for t in range(T):
        difference = (q.log_prob(z) - p.log_prob(z))[t]
        torch.testing.assert_close(estimate[t], difference.mean())


def test_eq_leo_penalty(episodes):
    model = leo()
    done = model.adapt(episodes.support, generator(6), create_graph=True)
    first, last = done.codes[0], done.codes[-1]
    for t in range(T):
        literal = sum(
            (last[t, n, k, j].item() - first[t, n, k, j].item()) ** 2
            for n in range(N) for k in range(K) for j in range(Z)
        ) / (N * K * Z)  # fmt: skip
        assert model.penalty(done)[t].item() == pytest.approx(literal)
    (slope,) = torch.autograd.grad(model.penalty(done).sum(), first)
    torch.testing.assert_close(slope, 2 * (first - last).detach() / (N * K * Z))  # the adapted codes are constants


def test_eq_leo_orthogonality():
    model = leo()
    rows = [row / row.norm() for row in model.decoder]
    literal = sum((rows[i] @ rows[j] - float(i == j)) ** 2 for i in range(Z) for j in range(Z)) / Z**2
    torch.testing.assert_close(model.orthogonality_of(), literal)


def test_eq_leo_meta_loss(episodes):
    """The sum of its terms for each task, the query loss from the same noise."""
    model = leo()
    losses, _ = model.loss(episodes)
    model.draws = 0
    noise = model._noise(episodes.query)
    done = model.adapt(episodes.support, noise)
    _, _, xq, yq = episodes.flat()
    logits = model.classify(xq, done.weights[-1], noise)
    squares = sum((p**2).sum() for p in (model.encoder, *model.relation, model.decoder))
    for t in range(T):
        query = sum(logits[t, i].logsumexp(0) - logits[t, i, yq[t, i]] for i in range(N * Q)) / (N * Q)
        literal = query + 0.1 * model.divergence(done)[t] + 0.2 * model.penalty(done)[t] + 0.01 / 2 * squares
        torch.testing.assert_close(losses[t], literal + model.orthogonality * model.orthogonality_of())


def test_eq_leo_code_gradient(episodes):
    """Of any function of the weights; here a linear one, whose gradient for the weights is known."""
    model = leo()
    loops = InnerLoops(model, episodes.support, episodes.query.flatten(1, 2), generator(7))
    z = torch.randn(T, N, K, Z, generator=generator(8), dtype=torch.float64, requires_grad=True)
    g = torch.randn(T, N, D, generator=generator(9), dtype=torch.float64)
    now = loops.decode(z.detach())
    epsilon = torch.empty(T, N, K, D, dtype=torch.float64).normal_(generator=generator(7))
    s, offset = z @ model.decoder[:, D:], math.sqrt(2 / (D + N))
    above = deviation(s, offset) > 1e-10
    torch.testing.assert_close(now.kappa, (s.exp() * epsilon * above / K).detach())
    ours = loops.to_code(g, g.unsqueeze(2) * now.kappa, K)
    w = (z @ model.decoder[:, :D] + deviation(s, offset) * epsilon).mean(2)
    torch.testing.assert_close(now.w, w.detach())
    torch.testing.assert_close(ours, torch.autograd.grad((w * g).sum(), z)[0])


def test_eq_leo_hessian_product(episodes):
    model = leo()
    loops = InnerLoops(model, episodes.support, episodes.query.flatten(1, 2), generator(7))
    w, q = torch.randn(2, T, N, D, generator=generator(10), dtype=torch.float64)
    _, x, p = loops.gradient(w)
    ours = loops.hessian(q, x, p)
    y = torch.arange(N).repeat_interleave(K)
    for t in range(T):
        def loss(w, t=t):
            return F.cross_entropy(x[t] @ w.T, y, reduction="sum")

        hessian = torch.func.hessian(loss)(w[t])
        torch.testing.assert_close(ours[t], torch.einsum("abcd,cd->ab", hessian, q[t]))
        r = p[t] * (x[t] @ q[t].T - (p[t] * (x[t] @ q[t].T)).sum(1, keepdim=True))
        torch.testing.assert_close(ours[t], r.T @ x[t])


@pytest.mark.parametrize("shot", [1, K])
def test_scratch_meta_loss_equals_the_library(scratch, episodes, shot):
    """Forward and gradient, task by task, with the same noise."""
    for t in range(T):
        model, task = leo(), Episodes(episodes.support[t : t + 1, :, :shot], episodes.query[t : t + 1])
        library, _ = model.loss(task)
        model.draws = 0
        ours = scratch["meta_loss"](model, task.support[0], task.query[0], model._noise(task.query))
        torch.testing.assert_close(ours, library[0])
        parameters = list(model.parameters())
        for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, library.mean()))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_scratch_parts_equal_the_library(scratch, episodes):
    model, x = leo(), episodes.support[0]
    mean, s = scratch["encode"](model, x)
    library_mean, library_sigma = model.encode(episodes.support[:1])
    torch.testing.assert_close(mean, library_mean[0])
    torch.testing.assert_close(scratch["deviation"](s), library_sigma[0])
    done = model.adapt(episodes.support[:1])
    z, w = scratch["adapt"](model, x, mean.unsqueeze(1).expand(-1, K, -1))
    torch.testing.assert_close(z.mean(1), done.codes[-1][0, :, 0].detach())
    torch.testing.assert_close(w.mean(1), done.weights[-1][0].detach())
    logits = scratch["classify"](model, episodes.query[0].flatten(0, 1), w)
    torch.testing.assert_close(logits, model.predict(episodes[:1])[0])
    torch.testing.assert_close(scratch["orthogonality"](model), model.orthogonality_of())


def test_scratch_code_gradient_equals_automatic_differentiation(scratch, episodes):
    model = leo(stochastic=False)
    model.weight_rate.data.fill_(0.3)
    one_shot = Episodes(episodes.support[:, :, :1], episodes.query)
    done = model.adapt(one_shot.support, create_graph=True)
    xs, ys, xq, yq = one_shot.flat()
    for t in range(T):
        loss = F.cross_entropy(model.classify(xq, done.weights[-1])[t], yq[t])
        (wanted,) = torch.autograd.grad(loss, done.codes[0], retain_graph=True)
        start = done.codes[0][t, :, 0].detach()
        ours = scratch["code_gradient"](model, start, xs[t], ys[t], xq[t], yq[t])
        torch.testing.assert_close(ours, wanted[t, :, 0])
        hessian = scratch["hessian_times"](xs[t], start @ model.decoder[:, :D], torch.ones(N, D).double())
        assert hessian.sum(0).abs().max() < 1e-9  # the same change of all rows changes no probability


def test_scratch_dropout_is_absent_at_test_time(scratch):
    m, x = SimpleNamespace(dropout=0.5), torch.ones(100, 50)
    assert torch.equal(scratch["drop"](x, m, None), x)
    assert 0.4 < (scratch["drop"](x, m, generator()) == 0).float().mean() < 0.6
