"""Chapter 16: every labeled equation, written out, equals the function it names; scratch code equals the library."""

import math

import pytest
import torch
from scratch import scratch_namespace
from torch.nn import functional as F

from umeta_core import learned_rule as rules
from umeta_core.learned_rule import UpdateRule, initial_phi, meta_objective, run_network
from umeta_core.rule_learners import PESLearner, RuleLearner
from umeta_core.rule_tasks import Truncation

WIDTHS, B, LOW = (6, 5, 4, 32), 7, 4


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/16_learned_rule.md")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def setting(widths=WIDTHS, **options):
    """A rule moved off its round start, one network and a batch, in float64."""
    rule = UpdateRule("small", lr=0.05, generator=rng(), **options).double()
    with torch.no_grad():
        for i, p in enumerate(rule.parameters()):
            p += 0.05 * randn(*p.shape, seed=i)
    phi = initial_phi(1, widths, rng(1), torch.double).map(lambda p: (20 * p).requires_grad_())
    return rule, phi, torch.rand(1, B, widths[0], generator=rng(2), dtype=torch.float64)


def states_of(rule, phi, x):
    xs, zs = run_network(phi, x)
    return xs, zs, rule.states(phi, xs, zs)


def one(phi):
    return [[p[0] for p in part] for part in phi]


def theta(rule):
    return [p for p in rule.parameters() if p.requires_grad]


def assert_same(ours, theirs, of):
    """Values, and gradients of one random function of them."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    sums = [sum((x * randn(*x.shape, seed=9)).sum() for x in part) for part in (ours, theirs)]
    for a, b in zip(*(torch.autograd.grad(s, of, allow_unused=True, retain_graph=True) for s in sums)):
        torch.testing.assert_close(a, b)


def test_eq_rule_forward():
    _, phi, x = setting()
    xs, zs = run_network(phi, x)
    low = x[0].tolist()
    for layer, (w, b) in enumerate(zip(phi.w, phi.b), 1):
        n_in, n_out = w.shape[1:]
        raw = [[sum(low[e][i] * w[0, i, j].item() for i in range(n_in)) for j in range(n_out)] for e in range(B)]
        z = [[0.0] * n_out for _ in range(B)]
        for j in range(n_out):
            mean = sum(row[j] for row in raw) / B
            var = sum((row[j] - mean) ** 2 for row in raw) / B
            for e in range(B):
                z[e][j] = (raw[e][j] - mean) / math.sqrt(var + 1e-6) + b[0, j].item()
        low = [[max(v, 0) for v in row] for row in z]
        torch.testing.assert_close(zs[layer][0], torch.tensor(z).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(xs[layer][0], torch.tensor(low).double(), rtol=1e-5, atol=1e-5)


def test_eq_rule_delta():
    """The errors that reach computeH, caught there, follow from the states above them neuron by neuron."""
    rule, phi, x = setting()
    caught, compute = [], rule.hidden

    def catch(d, *rest):
        caught.insert(0, d)
        return compute(d, *rest)

    rule.hidden = catch
    with torch.no_grad():
        xs, zs, h = states_of(rule, phi, x)
        torch.testing.assert_close(caught[-1], rule.top_error(xs[-1].mT))
    weight, shift = rule.to_delta.weight.detach()[:, 0], rule.to_delta.bias.detach()
    channels = len(shift)
    for layer in range(len(phi.w), 0, -1):
        v = phi.v[layer - 1][0].detach()
        for e in (0, B - 1):
            for i in (0, len(v) - 1):
                total = torch.zeros(channels, dtype=torch.float64)
                for j in range(v.shape[1]):
                    z = zs[layer][0, e, j].item()
                    for c in range(channels):
                        delta = caught[layer][0, j, e, c] / (1 + math.exp(-z)) + shift[c]
                        delta += sum(h[layer][0, j, e, k] * weight[k, c] for k in range(len(weight)))
                        total[c] += v[i, j] * delta
                literal = total / math.sqrt(1e-6 + (total**2).sum() / channels)
                torch.testing.assert_close(caught[layer - 1][0, i, e], literal)


def test_eq_rule_normalized():
    w = randn(1, 5, 3)
    for j in range(3):
        scale = math.sqrt(sum(w[0, i, j].item() ** 2 for i in range(5)) / 5 + 1e-6)
        torch.testing.assert_close(rules.normalized_weights(w)[0, :, j], w[0, :, j] / scale)


def test_eq_rule_planes():
    """All twelve, entry by entry."""
    rule, phi, x = setting()
    with torch.no_grad():
        xs, _, h = states_of(rule, phi, x)
        w = rules.normalized_weights(phi.w[1])
        planes = {k: p[0] for k, p in rule.weight_planes(w, tuple(h[1:3]), tuple(xs[1:3])).items()}
        r, s = ((state[0] @ layer.weight[:, 0] + layer.bias).unflatten(-1, (-1, LOW)).unbind(-2)
                for state, layer in ((h[1], rule.to_lower), (h[2], rule.to_upper)))  # fmt: skip
    w, n, m = w[0], *w.shape[1:]

    def pair(a, b, i, j):
        return sum(a[i, e, p] * b[j, e, p] for e in range(B) for p in range(LOW)) / (B * LOW)

    def coupling(a, b, i, j, size):
        return 0.0 if i == j else (pair(a, b, i, j) + pair(a, b, j, i)) / math.sqrt(2 * size)

    def standard(x):
        return (x - x.mean(0)) / (x.square().mean(0) + 1e-6).sqrt()

    low, up = standard(xs[1][0].detach()), standard(xs[2][0].detach())
    q = torch.tensor([[sum(w[i, k] * (up[:, k] * up[:, j]).mean() for k in range(m)) / math.sqrt(m)
                       for j in range(m)] for i in range(n)])  # fmt: skip
    sign, soft = w.sign(), (1 + w**2).sqrt() - 1
    literal = {
        "w_base": lambda i, j: w[i, j],
        "large_decay": lambda i, j: w[i, j] * abs(w[i, j]),
        "0_order": lambda i, j: pair(r[0], s[0], i, j),
        "rbf": lambda i, j: math.exp(-(w[i, j] ** 2)) * pair(r[1], s[1], i, j),
        "1_order": lambda i, j: w[i, j] * pair(r[2], s[2], i, j),
        "hebb": lambda i, j: -(low[:, i] * up[:, j]).mean(),
        "lin_lower_symm": lambda i, j: sum(coupling(r[3], r[4], i, k, n) * w[k, j] for k in range(n)),
        "sqr_lower_symm": lambda i, j: sign[i, j] * sum(coupling(r[5], r[6], i, k, n) * soft[k, j] for k in range(n)),
        "lin_upper_symm": lambda i, j: sum(w[i, k] * coupling(s[3], s[4], k, j, m) for k in range(m)),
        "sqr_upper_symm": lambda i, j: sign[i, j] * sum(soft[i, k] * coupling(s[5], s[6], k, j, m) for k in range(m)),
        "lin_upper_psd": lambda i, j: sum(w[i, k] * pair(s[7], s[7], k, j) for k in range(m)) / math.sqrt(m),
        "decorr_x": lambda i, j: q[i, j] / (q.square().mean() + 1e-8).sqrt(),
    }
    assert set(literal) == set(planes) == set(rules.PLANES)
    for name, entry in literal.items():
        for i in range(n):
            for j in range(m):
                assert planes[name][i, j].item() == pytest.approx(float(entry(i, j)), rel=1e-5, abs=1e-7), name


def bound(x):
    return x / (1 + x.square().mean(0)).sqrt()


@pytest.mark.parametrize("guard", [0.0, 1 / 7])
def test_eq_rule_merge(guard):
    """Also when the mixture would shrink the weights, which the second line then takes off exactly."""
    rule, _, _ = setting(guard=guard)
    w = rules.normalized_weights(randn(1, 6, 5))
    planes = {name: randn(1, 6, 5, seed=i) for i, name in enumerate(rules.PLANES, 1)}
    for sign in (1, -1):
        planes["w_base"] = 30 * sign * w
        m = sum(rule.merge[p].item() * bound(planes[name][0]) for p, name in enumerate(rules.PLANES))
        m = (m + rule.merge_shift.item()) / 12
        along = (m * w[0]).mean().item()
        assert along * sign > 0
        free = m - w[0] * max(along, 0)
        literal = bound(free / math.sqrt(12)) - guard * w[0]
        torch.testing.assert_close(rule.merged(w, planes)[0].detach(), literal)
        if sign > 0:
            assert abs((free * w[0]).mean()) < 1e-5 * along


def test_eq_rule_step():
    rule, phi, x = setting()
    with torch.no_grad():
        xs, _, h = states_of(rule, phi, x)
        new = rule.step(phi, x)
        for layer in range(3):
            w = rules.normalized_weights(phi.w[layer])
            change = rule.merged(w, rule.weight_planes(w, tuple(h[layer : layer + 2]), tuple(xs[layer : layer + 2])))
            state = h[layer + 1][0]
            u = torch.stack([(neuron @ rule.to_bias.weight[:, 0, 0] + rule.to_bias.bias).mean() for neuron in state])
            u = u - min(0.0, u.mean().item())
            literal = u / math.sqrt(0.5 + u.square().mean().item())
            for got, old, c in ((new.w, phi.w, change), (new.v, phi.v, change), (new.b, phi.b, literal)):
                torch.testing.assert_close(got[layer], 0.95 * old[layer] - 0.05 * c)


def ridge(u, labels, classes, rho=0.1):
    """The objective by its normal equations, row by row."""
    sides = []
    for half in labels:
        y = F.one_hot(half, classes).double()
        y = y - y.sum() / y.numel()
        sides.append(y / math.sqrt(sum(row.square().sum().item() for row in y) / len(y)))
    a, b = (torch.cat([half, torch.ones(len(half), 1).double()], 1) for half in u)
    penalty = torch.diag(torch.tensor([rho] * u.shape[2] + [0.0]).double())
    g = torch.linalg.inv(a.T @ a + penalty) @ a.T @ sides[0]
    loss = rho / len(b) * g[:-1].square().sum()
    right = 0
    for k, row in enumerate(b @ g):
        p = row / row.norm()
        loss = loss + (p - sides[1][k]).square().sum() / len(b)
        right += (p.argmax() == labels[1, k]).item()
    return loss, right / len(b)


def test_eq_rule_ridge():
    u, labels = randn(2, 12, 5).requires_grad_(), torch.arange(3).repeat_interleave(4).expand(2, -1)
    loss, accuracy = ridge(u, labels, 3)
    done = rules.ridge_readout(u, labels, 3)
    assert_same([done.loss], [loss], [u])
    assert done.accuracy.item() == pytest.approx(accuracy)


def truncation(phi, steps=3, tasks=1):
    x = torch.rand(tasks, steps, B, WIDTHS[0], generator=rng(3), dtype=torch.float64)
    data = torch.rand(tasks, 1, 2, 12, WIDTHS[0], generator=rng(4), dtype=torch.float64)
    labels = torch.arange(3).repeat_interleave(4).expand(tasks, 1, 2, -1)
    return Truncation(phi.map(lambda p: p.detach().clone()), x, data, labels, 3)


def test_eq_rule_truncation():
    """J after the steps of this truncation; the next one starts where it ended and sends no gradient back to it."""
    rule, phi, _ = setting()
    shown = truncation(phi)
    for _ in range(2):
        now = shown.phi.map(lambda p: p.clone())
        for x in shown.x.unbind(1):
            now = rule.step(now, x)
        literal = meta_objective(now, shown.labeled, shown.labels, 3).loss
        losses, _ = RuleLearner(rule).loss(shown)
        assert_same([literal], [losses], theta(rule))
        for a, b in zip(shown.phi.tensors(), now.tensors()):
            assert torch.equal(a, b.detach()) and not a.requires_grad


def test_eq_rule_pes():
    """In the second truncation of a pair, the noise of both is weighed."""
    rule, phi, _ = setting()
    learner, sigma = PESLearner(rule, sigma=0.03, seed=5), 0.03
    shown = truncation(phi)
    pair = [shown.phi.map(lambda p: p.clone()) for _ in range(2)]
    shown.noise = {"below": [list(part) for part in shown.phi.map(lambda p: p.clone())],
                   "noise": torch.zeros(1, learner.size, dtype=torch.float64)}  # fmt: skip
    twin, total = PESLearner(rule, seed=5), torch.zeros(learner.size, dtype=torch.float64)
    start = torch.nn.utils.parameters_to_vector(theta(rule)).detach().clone()
    for _ in range(2):
        e = sigma * torch.randn(learner.size, generator=twin._noise()).double()
        total += e
        values = []
        for which, sign in enumerate((1, -1)):
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(start + sign * e, theta(rule))
                pair[which] = rule(pair[which], shown.x)
                values.append(meta_objective(pair[which], shown.labeled, shown.labels, 3).loss.item())
                torch.nn.utils.vector_to_parameters(start.clone(), theta(rule))
        losses, _ = learner.loss(shown)
        got = torch.cat([part.flatten() for part in torch.autograd.grad(losses.sum(), theta(rule))])
        literal = (values[0] - values[1]) / (2 * sigma**2) * total
        torch.testing.assert_close(got, literal, rtol=1e-4, atol=1e-6)
        assert losses.item() == pytest.approx(sum(values) / 2, rel=1e-6)


def test_scratch_step_equals_the_library(scratch):
    """States, planes, merge and the whole step, values and gradients."""
    rule, phi, x = setting()
    of = phi.tensors() + theta(rule)
    w, b, v = one(phi)
    xs, zs = scratch["forward"](x[0], w, b)
    h = scratch["states"](rule, w, b, v, xs, zs)
    their_xs, _, theirs = states_of(rule, phi, x)
    assert_same(h, [state[0] for state in theirs], of)
    flat = rules.normalized_weights(phi.w[0])
    planes = scratch["planes"](rule, scratch["unit"](w[0]), h[0], h[1], xs[0], xs[1])
    library = rule.weight_planes(flat, tuple(theirs[:2]), tuple(their_xs[:2]))
    assert_same([planes[name] for name in rules.PLANES], [library[name][0] for name in rules.PLANES], of)
    assert_same([scratch["merge"](rule, scratch["unit"](w[0]), planes)], [rule.merged(flat, library)[0]], of)
    ours = [tensor for part in scratch["step"](rule, w, b, v, x[0]) for tensor in part]
    assert_same(ours, [tensor[0] for tensor in rule.step(phi, x).tensors()], of)


def test_scratch_truncation_and_ridge_equal_the_library(scratch):
    rule, phi, _ = setting()
    shown = truncation(phi)
    (ours, accuracy), ended = scratch["truncation_loss"](
        rule, *one(shown.phi.map(torch.clone)), shown.x[0], shown.labeled[0, 0], shown.labels[0, 0], 3
    )
    losses, accuracies = RuleLearner(rule).loss(shown)
    assert_same([ours], [losses[0]], theta(rule))
    assert accuracy == accuracies[0]
    torch.testing.assert_close(shown.phi.w[0][0], ended[0][0].detach())
    u = randn(2, 12, 5).requires_grad_()
    assert_same([scratch["ridge"](u, shown.labels[0, 0], 3)[0]],
                [rules.ridge_readout(u, shown.labels[0, 0], 3).loss], [u])  # fmt: skip


def test_scratch_pes_estimates_a_slope(scratch):
    """For a quadratic function of one parameter, the mean over noise is its derivative."""
    noise = 0.1 * torch.randn(1, 40_000, generator=rng())  # as many functions at once
    plus, minus = ((1 + sign * noise[0]) ** 2 for sign in (1, -1))
    estimates = scratch["pes"](plus, minus, noise, 0.1)
    assert estimates.mean().item() == pytest.approx(2, abs=5 * estimates.std().item() / 200)


def test_scratch_oja_finds_the_first_component(scratch):
    x = torch.randn(3000, 3, generator=rng()) * torch.tensor([0.3, 1.5, 0.7])
    w = torch.ones(3)
    for row in x:
        w = scratch["oja"](w, row, 0.01)
    assert w[1].abs() > 0.95 and w.norm().item() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(scratch["hebb"](w, x[0], 0.01) - w, 0.01 * (x[0] @ w) * x[0])
