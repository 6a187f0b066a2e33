"""The equations of the MAML chapter, term by term, against the functions they name; and its from-scratch code."""

import pytest
import torch
import torch.nn.functional as F
from scratch import scratch_namespace

from umeta_core.episodes import Episodes
from umeta_core.fast_conv4 import Head
from umeta_core.maml import MAML, adapt
from umeta_core.networks import MLP, Conv4

CHAPTER = "book/04_maml.md"
CACTUS = {"filters": 4, "downsample": "stride", "head": "mean", "norm": "shift", "eps": 1e-3, "head_init": "normal"}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def chapter():
    return scratch_namespace(CHAPTER)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(tasks=2, way=3, shot=2, query=2, size=28):
    x = torch.rand(tasks, way, shot + query, 1, size, size, generator=generator())
    return Episodes(x[:, :, :shot], x[:, :, shot:])


def learner(**switches):
    return MAML(Conv4(1, 28, way=3, generator=generator(), **CACTUS), 0.1, inner_steps=2, **switches)


def weights(maml):
    return [p for p in maml.parameters() if p.requires_grad]


def bowls(tasks=3, d=4):
    """Quadratic losses of T tasks: curvatures [T, d, d], minima [T, d], and the loss [T] of parameters [T, d]."""
    root = torch.randn(tasks, d, d, generator=generator())
    curvature, center = root @ root.mT / d, torch.randn(tasks, d, generator=generator(1))

    def loss(theta):
        away = (theta - center).unsqueeze(2)
        return (away.mT @ curvature @ away).flatten() / 2

    return curvature, center, loss


def test_eq_maml_inner():
    """theta_{k+1} = theta_k - alpha grad L(theta_k), where the gradient of a quadratic is known."""
    curvature, center, loss = bowls()
    theta = torch.randn(4, generator=generator(2)).expand(3, 4).clone().requires_grad_()
    (got,) = adapt(lambda params, x: params[0], [theta], [0.1], None, None, 3, lambda out, y: loss(out))
    want = theta
    for _ in range(3):
        want = want - 0.1 * (curvature @ (want - center).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(got, want)


def test_eq_maml_outer():
    """The mean over tasks of the query loss at the adapted weights."""
    maml, tasks = learner(), images()
    xs, ys, xq, yq = tasks.flat()
    start = [p.expand(2, *p.shape) for p in maml.network.tensors()]
    adapted = adapt(maml.network.forward_tasks, start, [0.1 * a for a in maml.adapted], xs, ys, 2,
                    lambda out, y: F.cross_entropy(out.mT, y, reduction="none").sum(1) / 2)
    want = F.cross_entropy(maml.network.forward_tasks(adapted, xq).mT, yq)
    torch.testing.assert_close(maml.loss(tasks)[0].mean(), want)


def test_eq_maml_hypergradient():
    """v_k = v_{k+1} - H(theta_k)(alpha * v_{k+1}) with H by automatic differentiation, one task, all in one vector."""
    maml, tasks = learner(meta_sgd=True), images(tasks=1)
    net, (xs, ys, xq, yq) = maml.network, tasks.flat()
    shapes = [p.shape for p in net.tensors()]
    alpha = torch.cat([torch.full_like(p, 0.1 * a).flatten() for p, a in zip(net.tensors(), maml.adapted, strict=True)])

    def forward(theta, x):
        parts = theta.split([s.numel() for s in shapes])
        return net.forward_tasks([p.view(s).unsqueeze(0) for p, s in zip(parts, shapes, strict=True)], x)[0]

    def gradient(theta, x, y, scale):
        return torch.autograd.grad(scale * F.cross_entropy(forward(theta, x), y[0]), theta, create_graph=True)[0]

    def at(theta):
        return gradient(theta, xs, ys, 3.0)  # the sum over N K images / K is N times the mean

    path = [torch.cat([p.detach().flatten() for p in net.tensors()]).requires_grad_()]
    for _ in range(2):
        path.append((path[-1] - alpha * at(path[-1])).detach().requires_grad_())
    v, rate_gradient = gradient(path[2], xq, yq, 1.0).detach(), 0
    for theta in (path[1], path[0]):
        g = at(theta)
        rate_gradient = rate_gradient - g.detach() * v
        v = v - torch.autograd.grad(g, theta, alpha * v)[0]

    losses, _ = maml.loss(tasks)  # the library's path, which is `_InnerLoop.meta_gradient`
    for want, tensors in ((v, [*net.tensors()[:-2], net.head_weight, net.head_bias]), (rate_gradient, maml.rates)):
        parts = [g.view(s) for g, s in zip(want.split([s.numel() for s in shapes]), shapes, strict=True)]
        learned = [i for i, t in enumerate(tensors) if t.requires_grad]
        found = torch.autograd.grad(losses.sum(), [tensors[i] for i in learned], retain_graph=True)
        torch.testing.assert_close(found, tuple(parts[i] for i in learned), rtol=1e-7, atol=1e-10)


def head_problem(n=6, way=3, d=5):
    g = generator()
    f, w, u = (torch.randn(s, generator=g) for s in ((n, d), (way, d), (way, d)))
    return f, w, u, torch.arange(way).repeat_interleave(n // way)


def library_push(f, w, u, labels, epsilon=0.0):
    """Gradient of the head at w + epsilon u, and its derivative in the direction u, for one task."""
    head, zeros = Head(F.one_hot(labels).to(f.dtype).unsqueeze(0), 1.0, average=True), torch.zeros(1, len(w))
    maps = f.view(*f.shape, 1, 1)
    head.forward(maps, (w + epsilon * u).unsqueeze(0), zeros)
    gradient = head.backward()[1][0]
    return gradient, head.push(torch.zeros_like(maps), u.unsqueeze(0), zeros)[1][0]


def test_eq_r_operator():
    """H u is the derivative of the gradient along u."""
    f, w, u, labels = head_problem()
    plus, minus = (library_push(f, w, u, labels, epsilon)[0] for epsilon in (1e-5, -1e-5))
    torch.testing.assert_close(library_push(f, w, u, labels)[1], (plus - minus) / 2e-5, rtol=1e-7, atol=1e-9)


def test_eq_maml_scale():
    """1/K for each of the N K support images, which is N times the mean."""
    tasks = images(way=3, shot=2)
    cross_entropies = torch.rand(6, generator=generator())
    assert learner()._weight(tasks) == 1 / 2
    summed = (learner()._weight(tasks) * cross_entropies).sum()
    averaged = (learner(inner_loss="mean")._weight(tasks) * cross_entropies).sum()
    torch.testing.assert_close(averaged, cross_entropies.mean())
    torch.testing.assert_close(summed, 3 * averaged)


# The chapter's own code ----------------------------------------------------------------------------------------------


def test_scratch_sinusoid_maml(chapter):
    net, g = MLP([1, 8, 8, 1], generator()), generator(1)
    xs, ys, xq, yq = (torch.randn(3, 5, 1, generator=g) for _ in range(4))
    error = chapter["squared_error"]
    for second_order in (True, False):
        losses = chapter["query_losses"](net.tensors(), xs, ys, xq, yq, 0.05, 2, second_order)
        start = [p.expand(3, *p.shape) for p in net.tensors()]
        params = adapt(net.forward_tasks, start, [0.05] * 6, xs, ys, 2, error, create_graph=second_order)
        library = error(net.forward_tasks(params, xq), yq)
        torch.testing.assert_close(losses, library)
        found, want = (torch.autograd.grad(x.mean(), list(net.parameters())) for x in (losses, library))
        torch.testing.assert_close(found, want)


def test_scratch_conv4_maml(chapter):
    maml, tasks = learner(), images()
    for p in maml.network.shifts:
        p.data.normal_(generator=generator(3))
    ours = chapter["conv4_query_losses"](maml.network.tensors(), maml.adapted, tasks, 0.1, 2)
    library, _ = maml.loss(tasks)
    torch.testing.assert_close(ours, library)
    found, want = (torch.autograd.grad(x.mean(), weights(maml)) for x in (ours, library))
    torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-10)


def test_scratch_grouped_convolution(chapter):
    x, w = torch.randn(3, 4, 2, 8, 8, generator=generator()), torch.randn(3, 5, 2, 3, 3, generator=generator(1))
    want = torch.stack([F.conv2d(a, b, stride=2, padding=1) for a, b in zip(x, w, strict=True)])
    torch.testing.assert_close(chapter["convolve_tasks"](x, w), want)


def test_scratch_hypergradient(chapter):
    """On small cubics, with one rate of zero, against automatic differentiation through the steps."""
    curvature, center, _ = bowls(tasks=2)

    def bowl(t):
        return lambda theta: (theta - center[t]) @ curvature[t] @ (theta - center[t]) / 2 + (theta**3).sum() / 6

    theta = torch.randn(4, generator=generator(2)).requires_grad_()
    rate = torch.tensor([0.1, 0.0, 0.2, 0.05]).requires_grad_()
    params = theta
    for _ in range(3):
        params = params - rate * torch.autograd.grad(bowl(0)(params), params, create_graph=True)[0]
    want = torch.autograd.grad(bowl(1)(params), [theta, rate])
    found = chapter["hypergradient"](theta.detach(), rate.detach(), bowl(0), bowl(1), 3)
    torch.testing.assert_close(found, want)


def test_scratch_head_push(chapter):
    f, w, u, labels = head_problem()
    pushed = chapter["head_push"](f, w, u)
    torch.testing.assert_close(pushed, library_push(f, w, u, labels)[1])
    loss = lambda w: F.cross_entropy(f @ w.mT, labels, reduction="sum")  # noqa: E731
    torch.testing.assert_close(pushed, chapter["hessian_product"](loss, w, u))
