"""LASIUM's variants of MAML and ProtoNets, each against the plain form of what its released code does."""

import pytest
import torch
import torch.nn.functional as F

from umeta_core.episodes import Episodes
from umeta_core.maml import MAML
from umeta_core.networks import Conv4
from umeta_core.protonets import ProtoNet

DRAWINGS = {"downsample": "stride", "head": "mean", "norm": "shift", "eps": 1e-3}  # 64 filters, 28x28
PHOTOS = {"filters": 32, "padding": 0, "norm": "shift", "eps": 1e-3}  # 84x84


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(channels, size, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    net = Conv4(channels, size, generator=g, **options)
    for p in net.shifts:
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return net


def episodes(channels, size, tasks=2, way=3, shot=1, query=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Episodes(
        torch.rand(tasks, way, shot, channels, size, size, generator=g),
        torch.rand(tasks, way, query, channels, size, size, generator=g),
    )


def features(net, params, x, maps=None, running=False):
    """Convolution, batch norm, max-pool, ReLU in the released order; batch statistics unless `running`."""
    for b in range(4):
        w, scale, shift = params[3 * b : 3 * b + 3]
        known = (net.running_mean[b], net.running_var[b]) if running else (None, None)
        x = F.conv2d(x, w, None, net.geometry.stride, net.geometry.padding)
        if maps is not None:
            maps.append(x)
        x = F.batch_norm(x, *known, scale, shift, training=not running, eps=net.geometry.eps)
        x = F.relu(F.max_pool2d(x, 2) if net.geometry.pool else x)
    return x.mean((2, 3)) if net.average else x.flatten(1)


def test_maps_without_padding_have_the_sides_of_the_released_network():
    net = network(3, 84, way=5, **PHOTOS)
    maps = []
    out = features(net, net.tensors(), torch.rand(2, 3, 84, 84), maps)
    assert [m.shape[-1] for m in maps] == [82, 39, 17, 6]  # pooled: 41, 19, 8, 3
    assert out.shape[1] == net.features == 288
    small = network(1, 28, way=5, **DRAWINGS)
    assert small.features == 64 and Conv4(1, 28, 64, downsample="stride").features == 256
    with pytest.raises(ValueError, match="28x28 are too small for four blocks; use at least 46x46"):
        Conv4(1, 28, 32, padding=0)
    with pytest.raises(ValueError, match="padding=2 is not known; use 0 or 1"):
        Conv4(1, 28, 32, padding=2)


@pytest.mark.parametrize(("channels", "size", "options", "lr"), [(1, 28, DRAWINGS, 0.4), (2, 46, PHOTOS, 0.05),
                                                                (1, 49, PHOTOS, 0.05)])  # fmt: skip
def test_maml_adapts_filters_shifts_and_head_on_the_mean_loss(channels, size, options, lr):
    net = network(channels, size, way=3, **(options | {"filters": 4}))
    maml = MAML(net, lr, inner_steps=2, test_steps=3, adapt_norm=True, inner_loss="mean")
    tasks = episodes(channels, size)
    assert maml.adapted == [True, False, True] * 4 + [True, True]  # there is no scale to adapt
    losses, _ = maml.loss(tasks)
    leaves = [*(t for t in net.tensors()[:-2] if t.requires_grad), net.head_weight, net.head_bias]
    got = torch.autograd.grad(losses.sum(), leaves)
    want_losses, want, predictions = [], 0, []
    for xs, ys, xq, yq in zip(*tasks.flat()):
        params = [t.detach().clone().requires_grad_(t.requires_grad) for t in net.tensors()]
        start, moving = params, [i for i, t in enumerate(params) if t.requires_grad]
        for step in range(3):
            if step == 2:
                loss = F.cross_entropy(F.linear(features(net, params, xq), *params[-2:]), yq)
                want_losses.append(loss)
                grads = torch.autograd.grad(loss, [start[i] for i in moving], retain_graph=True)
                want = [a + b for a, b in zip(want, grads)] if want else grads
            inner = F.cross_entropy(F.linear(features(net, params, xs), *params[-2:]), ys)
            steps = torch.autograd.grad(inner, [params[i] for i in moving], create_graph=True)
            params = list(params)
            for i, g in zip(moving, steps):
                params[i] = params[i] - lr * g
        predictions.append(F.linear(features(net, params, xq), *params[-2:]).detach())
    torch.testing.assert_close(losses, torch.stack(want_losses))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(maml.predict(tasks), torch.stack(predictions))


def plain_logits(net, e, t, running=False):
    """Support and queries of task t pass the network one after the other; mean of squared differences."""
    params = net.tensors()
    prototypes = features(net, params, e.support[t].flatten(0, 1)).view(e.way, e.shot, -1).mean(1)
    z = features(net, params, e.query[t].flatten(0, 1), running=running)
    return -(z.unsqueeze(1) - prototypes).square().mean(2)


@pytest.mark.parametrize("options", [DRAWINGS | {"head": "flatten"}, PHOTOS], ids=["drawings", "photos"])
def test_protonets_normalize_support_and_queries_apart(options):
    channels, size = (1, 28) if "downsample" in options else (2, 46)
    net, e = network(channels, size, **(options | {"filters": 4})), episodes(channels, size, shot=2, query=3)
    learner = ProtoNet(net, distance="mean", batch_norm="transductive", apart=True)
    losses, _ = learner.loss(e)
    want = torch.stack([F.cross_entropy(plain_logits(net, e, t), e.flat()[3][t]) for t in range(2)])
    torch.testing.assert_close(losses, want)
    for p in (p for p in net.parameters() if p.requires_grad):
        (a,), (b,) = (torch.autograd.grad(x.sum(), p, retain_graph=True) for x in (losses, want))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(learner.predict(e), torch.stack([plain_logits(net, e, t) for t in range(2)]).detach())
    together = ProtoNet(net, distance="mean", batch_norm="transductive").predict(e)
    assert not torch.allclose(together, learner.predict(e))
    inductive = ProtoNet(net, distance="mean", batch_norm="inductive", apart=True).predict(e)
    torch.testing.assert_close(inductive, torch.stack([plain_logits(net, e, t, True) for t in range(2)]).detach())
    one = Episodes(e.support, e.query[:, :, :1])
    changed = ProtoNet(net, distance="mean", batch_norm="inductive", apart=True).predict(one)
    torch.testing.assert_close(changed, inductive.view(2, 3, 3, 3)[:, :, 0])  # a query on its own


@pytest.mark.parametrize("options", [DRAWINGS | {"head": "flatten"}, {"padding": 0}], ids=["stride", "no padding"])
def test_running_averages_count_the_pixels_that_there_are(options):
    """The unbiased variance of torch's layers, also for odd maps and without padding."""
    size = 28 if "downsample" in options else 46
    net, e = network(1, size, **(options | {"filters": 4})), episodes(1, size, tasks=1)
    maps = []
    features(net, net.tensors(), torch.cat([e.flat()[0][0], e.flat()[2][0]]), maps)
    ProtoNet(net).loss(e)
    for b, y in enumerate(maps):
        torch.testing.assert_close(net.running_mean[b], 0.1 * y.mean((0, 2, 3)).detach())
        torch.testing.assert_close(net.running_var[b], 0.9 + 0.1 * y.var((0, 2, 3)).detach())


def test_running_averages_of_tasks_apart():
    net, e = network(1, 28, **(DRAWINGS | {"filters": 4, "head": "flatten"})), episodes(1, 28)
    want = torch.ones(4, 4)
    for x in (e.flat()[0], e.flat()[2]):  # support first, then queries; averaged over tasks
        found = []
        for task in x:
            features(net, net.tensors(), task, maps := [])
            found.append(torch.stack([y.var((0, 2, 3)) for y in maps]).detach())
        want = 0.9 * want + 0.1 * torch.stack(found).mean(0)
    ProtoNet(net, apart=True).loss(e)
    torch.testing.assert_close(net.running_var, want)
