import pytest
import torch
import torch.nn.functional as F

from umeta_core.data import ImageSet
from umeta_core.episodes import Episodes, PartitionTasks
from umeta_core.evaluation import evaluate
from umeta_core.maml import MAML
from umeta_core.resnet import ResNet
from umeta_core.training import train


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def episodes(tasks=2, way=3, shot=1, query=2, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Episodes(
        torch.rand(tasks, way, shot, 3, size, size, generator=g),
        torch.rand(tasks, way, query, 3, size, size, generator=g),
    )


def network(way=3, width=2):
    """A small network whose shifts and biases are away from 0."""
    g = torch.Generator().manual_seed(0)
    net = ResNet(3, 32, width, way, generator=g)
    for p in [net.first_bias, *net.shifts, *net.biases]:
        p.data += torch.randn(p.shape, generator=g)
    return net


def literal_logits(params, x, eps=1e-3):
    """Appendix G and the authors' code for one task, written down layer by layer; a bias before batch norm as there."""
    first, first_bias, *groups, head, head_bias = params
    x = F.conv2d(x, first, first_bias, stride=2, padding=3)
    while groups:
        shift, weight, shift2, weight2, bias, shortcut = groups[:6]
        groups = groups[6:]
        x = F.max_pool2d(x, 2)
        kept = F.conv2d(x, shortcut)
        for beta, w, b in ((shift, weight, torch.full((len(weight),), 3.0)), (shift2, weight2, bias)):
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
            x = F.relu((x - mean) / torch.sqrt(var + eps) + beta.view(1, -1, 1, 1))
            x = F.conv2d(x, w, b, padding=1)
        x = kept + x
    return F.linear(x.mean((2, 3)), head, head_bias)


def meta_gradient(maml, losses):
    """Of unevenly weighted losses: each task's gradient must be its own."""
    names, leaves = zip(*maml.named_parameters())
    grads = torch.autograd.grad((losses * torch.linspace(1, 2, len(losses))).sum(), leaves)
    return dict(zip(names, grads))


def test_paper_size():
    net = ResNet()
    assert [tuple(w.shape[:2]) for w in net.weights] == [
        (64, 64), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512)
    ]  # fmt: skip
    assert net.first.shape == (64, 3, 7, 7) and net.head_weight.shape == (5, 512)
    assert sum(p.numel() for p in net.parameters()) == 4_909_189
    tasks = net.tensors(3)
    assert len(tasks) == len(net.norm_mask()) == len(net.head_mask())
    assert {id(t) for t, norm in zip(tasks, net.norm_mask()) if norm} == {id(s) for s in net.shifts}
    with torch.no_grad():
        assert net.forward_tasks([t.unsqueeze(0) for t in tasks], torch.rand(1, 2, 3, 224, 224)).shape == (1, 2, 3)


def test_tasks_together_equal_the_literal_network(double):
    net, x = network(), torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    params = [torch.stack([t, t + torch.randn(t.shape, generator=g)]) for t in net.tensors()]
    got = net.forward_tasks(params, x)
    for t in range(2):
        torch.testing.assert_close(got[t], literal_logits([p[t] for p in params], x[t]))


@pytest.mark.parametrize("adapt_norm", [False, True])
def test_meta_gradient_equals_finite_differences(double, adapt_norm):
    maml, tasks, eps = MAML(network(), 0.01, inner_steps=2, adapt_norm=adapt_norm), episodes(shot=3, query=3), 1e-7
    grads = meta_gradient(maml, maml.loss(tasks)[0])
    g = torch.Generator().manual_seed(2)
    for name, p in maml.named_parameters():
        direction = torch.randn(p.shape, generator=g)
        values = []
        for sign in (1, -1):
            p.data += sign * eps * direction
            values.append((maml.loss(tasks)[0].detach() * torch.tensor([1.0, 2.0])).sum().item())
            p.data -= sign * eps * direction
        numeric = (values[0] - values[1]) / (2 * eps)
        assert abs(numeric - (grads[name] * direction).sum().item()) < 1e-5 * max(1, abs(numeric)), name


def test_meta_loss_equals_the_plain_loop_and_shifts_stay(double):
    maml, tasks = MAML(network(), 0.1, inner_steps=2, test_steps=3), episodes(tasks=3, shot=2)
    want, logits = [], []
    for steps in (2, 3):
        for xs, ys, xq, yq in zip(*tasks.flat()):
            params = maml.network.tensors()
            for _ in range(steps):
                loss = F.cross_entropy(literal_logits(params, xs), ys, reduction="sum") / 2
                grads = torch.autograd.grad(loss, params, create_graph=True)
                norm = maml.network.norm_mask()
                params = [p if shift else p - 0.1 * g for p, g, shift in zip(params, grads, norm)]
            if steps == 2:
                want.append(F.cross_entropy(literal_logits(params, xq), yq))
            else:
                logits.append(literal_logits(params, xq))
    losses, accuracies = maml.loss(tasks)
    torch.testing.assert_close(losses, torch.stack(want))
    torch.testing.assert_close(maml.predict(tasks), torch.stack(logits))
    assert accuracies.shape == (3,)
    got = meta_gradient(maml, losses)
    for name, g in meta_gradient(maml, torch.stack(want)).items():
        torch.testing.assert_close(got[name], g, rtol=1e-7, atol=1e-9)


def test_it_learns():
    """Classes are colors under noise."""
    g = torch.Generator().manual_seed(0)
    colors = torch.rand(12, 1, 3, 1, 1, generator=g)
    images = (colors + 0.3 * torch.randn(12, 10, 3, 32, 32, generator=g)).clamp(0, 1).mul(255).to(torch.uint8)
    labels = torch.arange(12).repeat_interleave(10)
    source = PartitionTasks(ImageSet(images.flatten(0, 1), labels, [str(c) for c in range(12)], [], "colors", "train"))
    maml = MAML(ResNet(3, 32, 4, 3, generator=g), 0.05, inner_steps=1, test_steps=1)
    before = evaluate(maml, source, way=3, shot=1, query=2, tasks=40).mean
    history = train(maml, source, steps=30, tasks=2, way=3, shot=1, query=2, lr=2e-2, clip=10, progress=False)
    after = evaluate(maml, source, way=3, shot=1, query=2, tasks=40).mean
    assert after > before + 20 and len(history["loss"]) == 1


def test_errors():
    with pytest.raises(ValueError, match="images of 28x28 are too small for five halvings; use at least 32x32"):
        ResNet(1, 28)
    with pytest.raises(ValueError, match="7-way tasks need a head of 7 outputs; this network has 5"):
        ResNet(width=1).tensors(7)
