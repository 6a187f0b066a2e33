import pytest
import torch
import torch.nn.functional as F

from umeta_core.checks import ascending
from umeta_core.episodes import Episodes
from umeta_core.losses import cross_entropy
from umeta_core.maml import MAML
from umeta_core.networks import MLP, Conv4, truncated_normal_

CACTUS = {"downsample": "stride", "head": "mean", "norm": "shift", "eps": 1e-3, "head_init": "normal"}
NETWORKS = [CACTUS, {"norm": "affine"}, {"norm": "shift"}]
SWITCHES = [
    {},
    {"adapt_norm": True},
    {"meta_sgd": True},
    {"anil": True},
    {"first_order": True},
    {"first_order": True, "meta_sgd": True},
    {"inner_loss": "mean"},
]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def episodes(tasks=2, way=3, shot=2, query=2, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Episodes(
        torch.rand(tasks, way, shot, 1, size, size, generator=g),
        torch.rand(tasks, way, query, 1, size, size, generator=g),
    )


def network(way=3, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    net = Conv4(1, 16, 4, way=way, generator=g, **options)
    for p in [*net.scales, *net.shifts]:  # away from their initial 1 and 0; some scales negative
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=g)
    return net


def reference_logits(params, x, net):
    for b in range(4):
        w, scale, shift = params[3 * b : 3 * b + 3]
        x = F.conv2d(x, w, None, net.geometry.stride, 1)
        x = F.relu(F.batch_norm(x, None, None, scale, shift, training=True, eps=net.geometry.eps))
        x = F.max_pool2d(x, 2) if net.geometry.pool else x
    return F.linear(x.mean((2, 3)) if net.average else x.flatten(1), *params[-2:])


def reference_losses(maml, tasks):
    """MAML as one would write it on a blackboard: a loop over tasks, a loop over steps, `torch.autograd.grad`."""
    net, losses = maml.network, []
    for xs, ys, xq, yq in zip(*tasks.flat()):
        params = net.tensors(tasks.way)
        rates = maml.rates if maml.rates is not None else [maml.inner_lr * a for a in maml.adapted]
        for _ in range(maml.inner_steps):
            loss = F.cross_entropy(reference_logits(params, xs, net), ys, reduction="sum") / tasks.shot
            loss = loss / tasks.way if maml.inner_loss == "mean" else loss
            moving = [i for i, a in enumerate(maml.adapted) if a]
            grads = torch.autograd.grad(loss, [params[i] for i in moving], create_graph=not maml.first_order)
            for i, g in zip(moving, grads):
                params[i] = params[i] - rates[i] * g
        losses.append(F.cross_entropy(reference_logits(params, xq, net), yq))
    return torch.stack(losses)


def meta_gradient(maml, losses):
    maml.zero_grad()
    (
        losses * torch.linspace(1, 2, len(losses))
    ).sum().backward()  # uneven weights: each task's gradient must be its own
    return {n: p.grad.clone() for n, p in maml.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("options", NETWORKS, ids=lambda o: o.get("downsample", "") + o["norm"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_meta_gradient_equals_the_plain_loop(options, switches):
    maml = MAML(network(**options), 0.1, inner_steps=2, **switches)
    tasks = episodes()
    want_loss = reference_losses(maml, tasks)
    want = meta_gradient(maml, want_loss)
    for f in (maml.loss, maml.loss_reference):
        losses, accuracies = f(tasks)
        got = meta_gradient(maml, losses)
        torch.testing.assert_close(losses, want_loss)
        assert accuracies.shape == (2,)
        assert set(want) <= set(got)
        for name, g in got.items():
            torch.testing.assert_close(
                g, want.get(name, torch.zeros_like(g)), rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("options", NETWORKS, ids=lambda o: o.get("downsample", "") + o["norm"])
def test_meta_gradient_equals_finite_differences(options):
    maml = MAML(network(**options), 0.1, inner_steps=3, adapt_norm=options["norm"] == "affine")
    tasks, eps = episodes(), 1e-6
    grads = meta_gradient(maml, maml.loss(tasks)[0])
    g = torch.Generator().manual_seed(2)
    for name, p in maml.named_parameters():
        if not p.requires_grad:
            continue
        direction = torch.randn(p.shape, generator=g)
        values = []
        for sign in (1, -1):
            p.data += sign * eps * direction
            values.append((maml.loss(tasks)[0] * torch.tensor([1.0, 2.0])).sum().item())
            p.data -= sign * eps * direction
        numeric = (values[0] - values[1]) / (2 * eps)
        assert abs(numeric - (grads[name] * direction).sum().item()) < 1e-5 * max(1, abs(numeric)), name


def test_batched_equals_per_task():
    maml, tasks = MAML(network(**CACTUS), 0.1, inner_steps=2, test_steps=3), episodes(tasks=3)
    losses = maml.loss(tasks)[0]
    one_by_one = torch.cat([maml.loss(tasks[t : t + 1])[0] for t in range(3)])
    torch.testing.assert_close(losses, one_by_one)
    torch.testing.assert_close(maml.predict(tasks), torch.cat([maml.predict(tasks[t : t + 1]) for t in range(3)]))


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_of_tasks_on_threads_change_nothing(monkeypatch, threads):
    maml, tasks = MAML(network(**CACTUS), 0.1, inner_steps=2, test_steps=3, meta_sgd=True), episodes(tasks=5)
    losses, accuracies = maml.loss(tasks)
    whole, logits = meta_gradient(maml, losses), maml.predict(tasks)
    monkeypatch.setattr("umeta_core.maml.CACHE_BYTES", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        chunked, _ = maml.loss(tasks)
        torch.testing.assert_close(chunked, losses)
        for name, g in meta_gradient(maml, chunked).items():
            torch.testing.assert_close(g, whole[name])
        torch.testing.assert_close(maml.predict(tasks), logits)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_predictions_follow_the_plain_loop_step_by_step():
    maml, tasks = MAML(network(norm="affine"), 0.05, adapt_norm=True), episodes(tasks=1)
    curve = maml.predict_curve(tasks, [0, 1, 4])
    xs, ys, xq, _ = (a[0] for a in tasks.flat())
    params = maml.network.tensors()
    for step in range(5):
        if step in (0, 1, 4):
            torch.testing.assert_close(curve[[0, 1, 4].index(step), 0], reference_logits(params, xq, maml.network))
        grads = torch.autograd.grad(
            F.cross_entropy(reference_logits(params, xs, maml.network), ys, reduction="sum") / 2, params
        )
        params = [p - 0.05 * g for p, g in zip(params, grads)]
    torch.testing.assert_close(maml.predict_curve(tasks, [4])[0], curve[2])


def test_wide_head_is_pruned_to_its_first_outputs():
    net = network(way=6, **CACTUS)
    wide, tasks = MAML(net, 0.1, inner_steps=2), episodes(way=3)
    losses, _ = wide.loss(tasks)
    grads = meta_gradient(wide, losses)
    assert (grads["network.head_weight"][3:] == 0).all() and (grads["network.head_weight"][:3] != 0).any()
    narrow = network(way=3, **CACTUS)
    state = net.state_dict() | {"head_weight": net.head_weight[:3], "head_bias": net.head_bias[:3]}
    narrow.load_state_dict(state)
    torch.testing.assert_close(losses, MAML(narrow, 0.1, inner_steps=2).loss(tasks)[0])
    with pytest.raises(ValueError, match="7-way tasks need a head of 7 outputs; this network has 6"):
        wide.loss(episodes(way=7))


def test_sum_loss_is_the_mean_loss_with_n_times_the_rate():
    """The loss-scale trap: 0.05 on the summed loss of a 20-way task is a rate of 1.0 on the mean."""
    net, tasks = network(**CACTUS), episodes()
    summed = MAML(net, 0.1, inner_loss="sum").loss(tasks)[0]
    torch.testing.assert_close(summed, MAML(net, 0.3, inner_loss="mean").loss(tasks)[0])
    assert not torch.allclose(summed, MAML(net, 0.1, inner_loss="mean").loss(tasks)[0])


def test_mlp_learner_uses_the_reference_path():
    maml = MAML(MLP([256, 8, 3], torch.Generator().manual_seed(0)), 0.1, inner_steps=2, test_steps=2, meta_sgd=True)
    tasks = episodes(size=16)
    losses, _ = maml.loss(tasks)
    assert meta_gradient(maml, losses)["rates.0"].abs().sum() > 0
    params = [p.expand(2, *p.shape) for p in maml.network.tensors()]
    xs, ys, xq, yq = tasks.flat()
    for _ in range(2):
        loss = 3 * cross_entropy(maml.network.forward_tasks(params, xs), ys).sum()
        params = [p - 0.1 * g for p, g in zip(params, torch.autograd.grad(loss, params, create_graph=True))]
    torch.testing.assert_close(losses, cross_entropy(maml.network.forward_tasks(params, xq), yq))
    torch.testing.assert_close(maml.predict(tasks), maml.network.forward_tasks(params, xq).detach())


def test_mlp_on_embeddings_normalizes_each_task_on_its_own():
    """Hidden layers as in CACTUs' code: batch norm without a scale; shifts are meta-learned and not adapted."""
    net = MLP([6, 5, 4, 3], torch.Generator().manual_seed(0), norm="shift", std=0.01)
    assert max(w.abs().max() for w in net.weights) <= 0.02
    for b in net.biases:
        torch.nn.init.normal_(b)
    x = torch.rand(2, 7, 6)
    params = [p.expand(2, *p.shape) for p in net.tensors()]
    for t in range(2):
        h = x[t]
        for w, b in list(zip(net.weights, net.biases))[:2]:
            h = F.relu(F.batch_norm(h @ w.T, None, None, None, b, training=True, eps=1e-3))
        torch.testing.assert_close(net.forward_tasks(params, x)[t], h @ net.weights[2].T + net.biases[2])
    maml = MAML(net, 0.5, inner_steps=2)
    assert maml.adapted == [True, False, True, False, True, True]
    tasks = Episodes(torch.rand(2, 3, 2, 6), torch.rand(2, 3, 2, 6))
    losses, _ = maml.loss(tasks)
    shift = net.biases[0]
    (gradient,) = torch.autograd.grad(losses.sum(), shift)
    numeric = torch.zeros_like(shift)
    with torch.no_grad():
        for i in range(len(shift)):
            ends = []
            for step in (1e-5, -1e-5):
                shift[i] += step
                with torch.enable_grad():
                    ends.append(maml.loss(tasks)[0].sum().item())
                shift[i] -= step
            numeric[i] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-8)


def test_no_scale_trap():
    """`F.batch_norm` without a scale cannot be differentiated twice with respect to its shift; ours can.

    Should the first half fail one day, torch has been mended and the workaround may go.
    """
    x, shift = torch.randn(4, 3, 5, 5), torch.zeros(3, requires_grad=True)
    w = torch.randn(3, 3, 3, 3, requires_grad=True)
    y = F.batch_norm(F.conv2d(x, w), None, None, None, shift, training=True)
    g = torch.autograd.grad(y.pow(3).sum(), [w, shift], create_graph=True)
    with pytest.raises(RuntimeError, match="None"):
        torch.autograd.grad(sum(t.square().sum() for t in g), [w, shift], allow_unused=True)
    maml = MAML(network(norm="shift"), 0.1, inner_steps=2, adapt_norm=True)
    want = meta_gradient(maml, reference_losses(maml, episodes()))
    for name, g in meta_gradient(maml, maml.loss(episodes())[0]).items():
        torch.testing.assert_close(g, want[name], rtol=1e-7, atol=1e-9)


def test_vmap_over_batch_norm_trap():
    """`vmap` over `F.batch_norm` gets the loss right and the second-order gradient wrong; a learner built on it would
    train on a wrong meta-gradient without a word. Ours agrees with the loop (above); this shows that the trap is real.
    """
    from torch.func import grad, vmap

    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 2, 8, 8, generator=g)
    params = [torch.randn(3, 2, 3, 3, generator=g), torch.rand(3, generator=g) + 0.5, torch.randn(3, generator=g)]

    def loss(p, x, spelled):
        w, scale, shift = p
        y = F.conv2d(x, w)
        if spelled:
            y = y - y.mean((0, 2, 3), keepdim=True)
            y = y * torch.rsqrt(y.square().mean((0, 2, 3), keepdim=True) + 1e-5)
            y = y * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        else:
            y = F.batch_norm(y, None, None, scale, shift, training=True, eps=1e-5)
        return F.relu(y).pow(3).mean()

    def after_a_step(p, x, spelled):
        return loss([a - 0.5 * b for a, b in zip(p, grad(loss)(p, x, spelled))], x, spelled)

    def batched(p, spelled):
        return vmap(lambda x: after_a_step(p, x, spelled))(x).sum()

    def loop(p):
        total = 0
        for t in x:
            fast = [a - 0.5 * b for a, b in zip(p, torch.autograd.grad(loss(p, t, False), p, create_graph=True))]
            total = total + loss(fast, t, False)
        return total

    leaves = [p.clone().requires_grad_() for p in params]
    want = torch.autograd.grad(loop(leaves), leaves)
    torch.testing.assert_close(batched(params, True), batched(params, False))
    torch.testing.assert_close(grad(batched)(params, True), list(want))
    wrong = grad(batched)(params, False)
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(wrong, want))
    assert error > 1e-6, "torch has been mended: vmap over F.batch_norm may be used again"


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="way="):
        MAML(Conv4(1, 16, 4))
    with pytest.raises(ValueError, match="inner_loss='total'"):
        MAML(network(), inner_loss="total")
    with pytest.raises(ValueError, match="too small"):
        Conv4(1, 8, 4)
    with pytest.raises(ValueError, match="downsample='dilate'"):
        Conv4(downsample="dilate")
    with pytest.raises(ValueError, match="norm='affine' is not known; use None or shift"):
        MLP([6, 5, 4], norm="affine")


@pytest.mark.parametrize("steps", [[], [2, 1], [1, 1]])
def test_steps_of_a_curve_ascend(steps):
    for net in (network(), MLP([256, 8, 3])):
        with pytest.raises(ValueError, match="are not ascending; name each once, in order"):
            MAML(net).predict_curve(episodes(), steps)


def test_rates_may_be_whole_numbers():
    """A step size of 1 is a number like others."""
    whole, exact = MAML(network(), 1, inner_steps=1), MAML(network(), 1.0, inner_steps=1)
    torch.testing.assert_close(whole.loss(episodes())[0], exact.loss(episodes())[0])
    torch.testing.assert_close(whole.predict(episodes()), exact.predict(episodes()))


def test_a_derivative_too_many_is_an_error():
    """Written-out derivatives would pass for constants in the next one."""
    e = episodes()
    maml = MAML(Conv4(1, 16, 4, way=3, **CACTUS, generator=torch.Generator().manual_seed(0)), 0.1, inner_steps=1)
    weights = [p for p in maml.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="can be differentiated once; MAML.loss_reference"):
        torch.autograd.grad(maml.loss(e)[0].square().mean(), weights, create_graph=True)


def test_training_accuracy_is_that_of_the_adapted_network():
    maml, tasks = MAML(network(**CACTUS), 0.1, inner_steps=3, test_steps=3), episodes(tasks=4, query=5)
    right = (maml.predict(tasks).argmax(2) == tasks.labels).float().mean(1)
    for f in (maml.loss, maml.loss_reference):
        torch.testing.assert_close(f(tasks)[1], right)


def test_heads_start_as_asked():
    heads = [Conv4(1, 16, 8, way=50, head_init=kind, generator=torch.Generator().manual_seed(0)).head_weight
             for kind in ("normal", "glorot")]  # fmt: skip
    normal, glorot = (head.detach() for head in heads)
    assert normal.std().item() == pytest.approx(1, rel=0.1)
    assert glorot.abs().max().item() == pytest.approx((6 / (50 + 8)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncated_normals_are_those_of_pytorch_2_12(dtype):
    """Earlier versions draw others, so that with the same seed a rule would start elsewhere."""
    ours, theirs = torch.empty(50, 40, dtype=dtype), torch.empty(50, 40, dtype=dtype)
    truncated_normal_(ours, 0.3, torch.Generator().manual_seed(5))
    assert ours.abs().max() <= 0.6 and ours.std().item() == pytest.approx(0.3 * 0.88, rel=0.06)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):
        torch.nn.init.trunc_normal_(theirs, 0, 0.3, -0.6, 0.6, generator=torch.Generator().manual_seed(5))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("at", [[], [2, 1], [1, 1], [-1, 2]])
def test_numbers_of_steps_ascend(at):
    with pytest.raises(ValueError, match="are not ascending; name each once, in order"):
        ascending(at)


@pytest.mark.parametrize("change", [lambda x: x.repeat(1, 1, 1, 3, 1, 1), lambda x: x[..., :8, :8],
                                    lambda x: (255 * x).byte()])  # fmt: skip
def test_images_that_the_network_was_not_made_for_are_named(change):
    e = episodes(tasks=2)
    wrong = Episodes(change(e.support), change(e.query))
    maml = MAML(network(), 0.1, 1, 1)
    for f in (maml.loss, maml.loss_reference, maml.predict):
        with pytest.raises(ValueError, match=r"the network takes float images .* build Conv4\(channels, size\)"):
            f(wrong)
