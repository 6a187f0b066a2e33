"""The learned rule: section 15 of its specification, each block against its literal form."""

import math

import pytest
import torch

from umeta_core import learned_rule as rules
from umeta_core.fast_rule import shifted_sum, spread
from umeta_core.learned_rule import (
    Phi,
    UpdateRule,
    initial_phi,
    meta_objective,
    normalized_weights,
    ridge_readout,
    run_network,
)
from umeta_core.results import provenance


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def setting(tasks=2, widths=(6, 5, 4, 32), batch=7, steps=2, seed=0, **options):
    """A small rule with its norms' shifts moved off zero, networks and batches, in float64."""
    g = generator(seed)
    rule = UpdateRule("small", lr=0.05, generator=g, **options).double()
    with torch.no_grad():
        for p in rule.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g, dtype=torch.double)
    phi = initial_phi(tasks, widths, g, torch.double).map(lambda p: p * 10)
    x = torch.rand(tasks, steps, batch, widths[0], generator=g, dtype=torch.double)
    return rule, phi, x


def labeled(tasks, inputs, seed=1, classes=3, draws=2, shot=4):
    x = torch.rand(tasks, draws, 2, classes * shot, inputs, generator=generator(seed), dtype=torch.double)
    return x, torch.arange(classes).repeat_interleave(shot).expand(tasks, draws, 2, -1), classes


def test_theta_has_the_published_size():
    """The inventory of the specification, section 3.8."""
    rule = UpdateRule("full")
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in rule.named_children()}
    assert sum(p.numel() for p in rule.parameters()) == 114_670
    assert count["top"] + count["top_out"] == 37_728
    assert count["units"] + count["examples"] + rule.shift.numel() == 70_884
    assert count["to_delta"] == 2_080 and count["to_bias"] == 65
    assert count["to_upper"] + count["to_lower"] == 15 * 260
    assert len(rule.planes) == 12 and len(UpdateRule("small", planes="paper").planes) == 10


def test_shapes_of_states_and_planes():
    rule, phi, x = setting()
    xs, zs = run_network(phi, x[:, 0])
    states = rule.states(phi, xs, zs)
    assert [tuple(h.shape) for h in states] == [(2, n, 7, 16) for n in (6, 5, 4, 32)]
    for layer, w in enumerate(phi.w):
        planes = rule.weight_planes(normalized_weights(w), states[layer : layer + 2], xs[layer : layer + 2])
        assert set(planes) == set(rules.PLANES) and all(p.shape == w.shape for p in planes.values())


def test_a_batch_of_tasks_is_the_tasks_one_by_one():
    rule, phi, x = setting(tasks=3)
    together = rule(phi, x)
    for t in range(3):
        alone = rule(phi.map(lambda p, t=t: p[t : t + 1]), x[t : t + 1])
        for a, b in zip(together.tensors(), alone.tensors()):
            torch.testing.assert_close(a[t : t + 1], b, rtol=1e-10, atol=1e-12)


def test_backward_weights_become_the_forward_weights():
    """Kolen-Pollack: with one change for both, V - W shrinks by 1 - lambda a step, whatever theta is."""
    rule, phi, x = setting(steps=5)
    end = rule(phi, x)
    for w0, v0, w, v in zip(phi.w, phi.v, end.w, end.v):
        torch.testing.assert_close(v - w, (1 - 0.05) ** 5 * (v0 - w0), rtol=1e-9, atol=1e-12)


def test_what_would_shrink_the_weights_is_taken_off_and_every_column_is_bounded():
    rule, phi, x = setting(guard=0.0)
    xs, zs = run_network(phi, x[:, 0])
    states, unit = rule.states(phi, xs, zs), normalized_weights(phi.w[1])
    change = rule.merged(unit, rule.weight_planes(unit, states[1:3], xs[1:3]))
    assert (change.square().mean(1) < 1).all()
    with torch.no_grad():  # a merge that wants nothing but shrinking
        rule.merge.zero_()
        rule.merge[rule.planes.index("w_base")] = 1.0
    change = rule.merged(unit, rule.weight_planes(unit, states[1:3], xs[1:3]))
    assert (change * unit).mean((1, 2)).abs().max() < 1e-2 * unit.square().mean()


def test_bad_rows_and_names_are_refused():
    rule, rows = UpdateRule("small"), torch.rand(40, 6)
    with pytest.raises(ValueError, match="scale it to 0..1"):
        rule.fit(5 * rows, steps=1)
    with pytest.raises(ValueError, match="nan"):
        rule.fit(torch.full((40, 6), torch.nan), steps=1)
    with pytest.raises(ValueError, match="there are: relu"):
        rule.fit(rows, steps=1, activation="gelu")
    with pytest.raises(ValueError, match="fewer than two rows"):
        rule.fit(rows, steps=1).features(rows[:1])


def test_features_of_an_array_are_those_of_a_tensor():
    rows = torch.randint(256, (40, 6), dtype=torch.uint8, generator=generator())
    trained = UpdateRule("small").fit(rows.numpy(), steps=1)
    assert torch.equal(trained.features(rows.numpy()), trained.features(rows))


def test_meta_gradient_against_finite_differences():
    # Small steps, so that no ReLU changes sides within a difference.
    rule, phi, x = setting(tasks=1, widths=(5, 4, 32), batch=6, steps=2, seed=1)
    data = labeled(1, 5)

    def loss():
        return meta_objective(rule(phi, x), *data).loss.sum()

    params = [p for p in rule.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(), params)
    g, step = generator(3), 1e-8
    for _ in range(3):
        way = [torch.randn(p.shape, generator=g, dtype=torch.double) for p in params]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(params, way):
                    p += sign * step * d
                values.append(loss().item())
                for p, d in zip(params, way):
                    p -= sign * step * d
        expected = (values[0] - values[1]) / (2 * step)
        assert math.isclose(sum((a * d).sum().item() for a, d in zip(grads, way)), expected, rel_tol=1e-5)


def test_recomputed_steps_give_the_same_gradient():
    rule, phi, x = setting(steps=3)
    data = labeled(2, 6)
    params = [p for p in rule.parameters() if p.requires_grad]
    both = [torch.autograd.grad(meta_objective(rule(phi, x, recompute=again), *data).loss.sum(), params)
            for again in (False, True)]  # fmt: skip
    for a, b in zip(*both):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width, along", [(3, 1), (3, 2), (5, 2), (5, 1)])
def test_the_fast_block_is_its_reference(width, along):
    """Also with fewer neurons than the window is wide."""
    g = generator(1)
    block = rules.ConvNorm(width, 3, 4, g).double()
    with torch.no_grad():
        block.bias += 1.0  # has no effect
        block.shift += torch.randn(4, generator=g)
    for n in (2, 6):
        x = torch.randn(2, n, 5, 3, generator=g, dtype=torch.double, requires_grad=True)
        fast, slow = block(x, along), block.reference(x, along)
        torch.testing.assert_close(fast, slow)
        weight = torch.randn(fast.shape, generator=g, dtype=torch.double)
        wanted = [x, block.weight, block.shift]
        for a, b in zip(*(torch.autograd.grad((y * weight).sum(), wanted) for y in (fast, slow))):
            torch.testing.assert_close(a, b)


def test_the_convolution_is_torchs():
    g = generator(2)
    conv = rules.Conv(5, 3, 4, g).double()
    x = torch.randn(2, 6, 7, 3, generator=g, dtype=torch.double)
    kernel = conv.weight.permute(2, 0, 1)
    slow = torch.nn.functional.conv1d(x.flatten(0, 1).mT, kernel, conv.bias, padding=2).mT.unflatten(0, (2, 6))
    torch.testing.assert_close(conv(x, along=2), slow)


def test_spread_is_the_transpose_of_the_shifted_sum():
    g = generator(4)
    for along in (1, 2):
        parts = torch.randn(2, 3, 4, 5, 2, generator=g, dtype=torch.double)
        y = torch.randn(2, 3, 4, 2, generator=g, dtype=torch.double)
        left, right = (shifted_sum(parts, along) * y).sum(), (parts * spread(y, 5, along)).sum()
        torch.testing.assert_close(left, right)


def test_planes_against_their_literal_sums():
    """Each formula of App. 44-57 as the code has them, entry by entry."""
    rule, phi, x = setting(tasks=1, widths=(4, 3, 32), batch=5)
    xs, zs = run_network(phi, x[:, 0])
    low, up = rule.states(phi, xs, zs)[:2]
    w = normalized_weights(phi.w[0])
    planes = {k: p[0] for k, p in rule.weight_planes(w, (low, up), xs[:2]).items()}
    w, n, m, batch = w[0], 4, 3, 5
    below = (low @ rule.to_lower.weight[:, 0] + rule.to_lower.bias)[0].unflatten(-1, (7, 4))
    above = (up @ rule.to_upper.weight[:, 0] + rule.to_upper.bias)[0].unflatten(-1, (8, 4))

    def rank(a, b):  # sum over examples and channels, one pair of neurons at a time
        return torch.tensor([[(a[i] * b[j]).sum() / (batch * 4) for j in range(len(b))] for i in range(len(a))])

    def symmetric(top, bottom):
        u, size = rank(bottom, top), len(top)
        s = torch.tensor([[(u[i, j] + u[j, i]) / math.sqrt(2 * size) for j in range(size)] for i in range(size)])
        return s * (1 - torch.eye(size))

    def standard(x):
        return (x - x.mean(0)) / (x.square().mean(0) + 1e-6).sqrt()

    x0, x1 = standard(xs[0][0]), standard(xs[1][0])
    soft, r = (1 + w**2).sqrt() - 1, [rank(below[:, :, k], above[:, :, k]) for k in range(3)]
    correlation = x1.T @ x1 / batch
    q = w @ correlation / math.sqrt(m)
    literal = {
        "w_base": w, "large_decay": w * w.abs(), "0_order": r[0], "rbf": torch.exp(-(w**2)) * r[1], "1_order": w * r[2],
        "hebb": -torch.tensor([[(x0[:, i] * x1[:, j]).mean() for j in range(m)] for i in range(n)]),
        "lin_lower_symm": symmetric(below[:, :, 3], below[:, :, 4]) @ w,
        "sqr_lower_symm": w.sign() * (symmetric(below[:, :, 5], below[:, :, 6]) @ soft),
        "lin_upper_symm": w @ symmetric(above[:, :, 3], above[:, :, 4]),
        "sqr_upper_symm": w.sign() * (soft @ symmetric(above[:, :, 5], above[:, :, 6])),
        "lin_upper_psd": w @ rank(above[:, :, 7], above[:, :, 7]) / math.sqrt(m),
        "decorr_x": q / (q.square().mean() + 1e-8).sqrt(),
    }  # fmt: skip
    for name in rules.PLANES:
        torch.testing.assert_close(planes[name], literal[name], msg=name, check_dtype=False, rtol=1e-6, atol=1e-7)


def test_the_change_of_the_weights_sees_no_scale():
    """Every plane is made of normalized weights, so weights of ten times the size get the same change."""
    rule, phi, x = setting()
    xs, zs = run_network(phi, x[:, 0])
    states, changes = rule.states(phi, xs, zs), []
    for scale in (1, 10):
        unit = normalized_weights(scale * phi.w[1])
        changes.append(rule.merged(unit, rule.weight_planes(unit, states[1:3], xs[1:3])))
    torch.testing.assert_close(*changes, rtol=5e-3, atol=1e-3)


def test_the_base_network_is_torchs_batch_norm():
    _, phi, x = setting()
    xs, _ = run_network(phi, x[:, 0])
    y = x[0, 0]
    for w, b in zip(phi.w, phi.b):
        y = torch.relu(torch.nn.functional.batch_norm(y @ w[0], None, None, None, b[0], True, 0.0, 1e-6))
    torch.testing.assert_close(xs[-1][0], y)


def test_ridge_readout_is_scikit_learns_ridge():
    from sklearn.linear_model import Ridge

    g = generator(5)
    features = torch.randn(2, 30, 6, generator=g, dtype=torch.double)
    labels = torch.randint(0, 3, (2, 30), generator=g)
    done = ridge_readout(features, labels, 3)
    y = torch.nn.functional.one_hot(labels, 3).double()
    y = y - y.mean((1, 2), keepdim=True)
    y = y / y.square().sum(2).mean(1).sqrt()[:, None, None]
    model = Ridge(0.1).fit(features[0].numpy(), y[0].numpy())
    p = torch.as_tensor(model.predict(features[1].numpy()))
    p = p / p.norm(dim=1, keepdim=True)
    expected = (p - y[1]).square().sum() / 30 + 0.1 / 30 * (model.coef_**2).sum()
    torch.testing.assert_close(done.loss, expected, rtol=1e-6, atol=1e-8)
    assert done.accuracy == (p.argmax(1) == labels[1]).double().mean()


def test_a_dead_embedding_is_no_nan():
    features = torch.zeros(2, 6, 4, dtype=torch.double, requires_grad=True)
    done = ridge_readout(features, torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), 3)
    done.loss.backward()
    assert done.loss.isfinite() and features.grad.isfinite().all()


def test_theta_knows_no_batch_size_but_the_size_of_the_embedding():
    rule, phi, x = setting()
    rule(phi, x[:, :, :3])
    with pytest.raises(ValueError, match="32 units"):
        initial_phi(1, (6, 16), generator())


def test_the_mean_bias_is_never_pushed_up():
    rule, phi, x = setting()
    h = rule.states(phi, *run_network(phi, x[:, 0]))[1]
    for shift in (-5.0, 5.0):
        with torch.no_grad():
            rule.to_bias.bias.fill_(shift)
        change = rule.bias_change(h)
        assert (change.mean(1) >= -1e-12).all() and (change.square().mean(1) < 1).all()


def test_save_and_restore(tmp_path):
    rule, phi, x = setting()
    rule = rule.float()
    rule.save(tmp_path / "rule.pt", steps=3, **provenance())
    again = UpdateRule.restore(tmp_path / "rule.pt")
    assert again.about["steps"] == 3 and again.lr == rule.lr
    phi, x = phi.map(torch.Tensor.float), x.float()
    for a, b in zip(rule(phi, x).tensors(), again(phi, x).tensors()):
        assert torch.equal(a, b)
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not hold an update rule"):
        UpdateRule.restore(tmp_path / "no.pt")
    with pytest.raises(ValueError, match="choose from full, medium, small"):
        UpdateRule("tiny")
    with pytest.raises(ValueError, match="twelve"):
        UpdateRule(planes="all")


def test_fit_is_reproducible_and_checks_its_input():
    rule, x = UpdateRule("small", lr=1e-3), torch.randint(0, 256, (80, 10), generator=generator(), dtype=torch.uint8)
    features = [rule.fit(x, steps=3, hidden=(8,), seed=1).features(x) for _ in range(2)]
    assert torch.equal(*features) and features[0].shape == (80, 32)
    with pytest.raises(ValueError, match="at least 32 rows"):
        rule.fit(x[:10])


def test_phi_maps_every_part():
    phi = initial_phi(2, (3, 32), generator())
    assert isinstance(phi.map(torch.clone), Phi) and len(phi.tensors()) == 3
    assert 0.005 < phi.w[0].std() < 0.011 and phi.w[0].abs().max() <= 0.02

