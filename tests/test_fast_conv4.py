"""The written-out derivatives against automatic differentiation and finite differences, in float64."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from umeta_core.fast_conv4 import Geometry, conv_block, to_groups, unfold

GEOMETRIES = [
    Geometry(2),
    Geometry(2, stride=2, pool=False, eps=1e-3),
    Geometry(2, stride=1, pool=False),
    Geometry(2, padding=0),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_patches_for_a_gpu_are_those_of_torch(geometry):
    x = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unfold(x, geometry), F.unfold(x, 3, padding=geometry.padding, stride=geometry.stride))


def block_inputs(geometry, seed=0, channels=3, filters=4, n=5, size=8):
    g = torch.Generator().manual_seed(seed)
    t = geometry.tasks
    x = to_groups(torch.randn(t, n, channels, size, size, generator=g, dtype=torch.float64))
    w = torch.randn(t * filters, channels, 3, 3, generator=g, dtype=torch.float64)
    scale = torch.randn(t * filters, generator=g, dtype=torch.float64)  # of both signs
    shift = torch.randn(t * filters, generator=g, dtype=torch.float64)
    return x, w, scale, shift


def plain_block(x, w, scale, shift, geometry):
    y = F.conv2d(x, w, None, geometry.stride, geometry.padding, 1, geometry.tasks)
    y = F.relu(F.batch_norm(y, None, None, scale, shift, training=True, eps=geometry.eps))
    return F.max_pool2d(y, 2) if geometry.pool else y


def second_order(f, inputs, directions):
    """Value, gradient of a random projection, and Hessian of that projection times `directions`."""
    inputs = [t.detach().clone().requires_grad_(r) for t, r in inputs]
    leaves = [t for t in inputs if t.requires_grad]
    out = f(*inputs)
    weights = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    grads = torch.autograd.grad((out * weights + 0.3 * out.square()).sum(), leaves, create_graph=True)
    inner = sum((g * d).sum() for g, d in zip(grads, directions))
    return [out, *grads, *torch.autograd.grad(inner, leaves)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("input_grad", [True, False])
def test_block_equals_plain_operations_to_second_order(geometry, input_grad):
    x, w, scale, shift = block_inputs(geometry)
    inputs = [(x, input_grad), (w, True), (scale, True), (shift, True)]
    g = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t, r in inputs if r]
    ours = second_order(lambda *a: conv_block(*a, geometry)[0], inputs, directions)
    want = second_order(lambda *a: plain_block(*a, geometry), inputs, directions)
    for a, b in zip(ours, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_block_gradgradcheck():
    geometry = Geometry(1)
    x, w, scale, shift = block_inputs(geometry, channels=2, filters=2, n=3, size=4)
    inputs = [t.requires_grad_() for t in (x, w, scale, shift)]
    f = lambda *a: conv_block(*a, geometry)[0]  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_two_backward_passes_over_one_graph_do_not_share_state():
    geometry = Geometry(2)
    x, w, scale, shift = (t.requires_grad_() for t in block_inputs(geometry))
    out = conv_block(x, w, scale, shift, geometry)[0]
    first = torch.autograd.grad(out.sum(), w, create_graph=True)[0]
    torch.autograd.grad(out.square().sum(), w, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), w)[0]
    w2 = w.detach().clone().requires_grad_()
    fresh = torch.autograd.grad(conv_block(x, w2, scale, shift, geometry)[0].sum(), w2, create_graph=True)[0]
    torch.testing.assert_close(second, torch.autograd.grad(fresh.square().sum(), w2)[0])


def test_block_returns_batch_statistics():
    geometry = Geometry(2)
    x, w, scale, shift = block_inputs(geometry)
    _, mean, var = conv_block(x, w, scale, shift, geometry)
    y = F.conv2d(x, w, None, 1, 1, 1, 2)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(var, y.var((0, 2, 3), correction=0))


def test_tasks_do_not_touch_each_other():
    """Batched equals per task: each group gives what it would give alone."""
    geometry = Geometry(2)
    x, w, scale, shift = block_inputs(geometry)
    both = conv_block(x, w, scale, shift, geometry)[0]
    for t in range(2):
        one = conv_block(
            x[:, 3 * t : 3 * t + 3].contiguous(),
            w[4 * t : 4 * t + 4],
            scale[4 * t : 4 * t + 4],
            shift[4 * t : 4 * t + 4],
            Geometry(1),
        )[0]
        torch.testing.assert_close(both[:, 4 * t : 4 * t + 4], one)


def test_block_memory_is_freed_without_the_garbage_collector():
    geometry = Geometry(1)
    x, w, scale, shift = block_inputs(geometry)
    gc.disable()
    try:
        out = conv_block(x, w.requires_grad_(), scale, shift, geometry)[0]
        alive = weakref.ref(out)
        del out
        assert alive() is None
    finally:
        gc.enable()


def test_a_third_derivative_is_an_error_and_not_wrong():
    x, w, scale, shift = block_inputs(GEOMETRIES[0])
    w.requires_grad_()
    (first,) = torch.autograd.grad(conv_block(x, w, scale, shift, GEOMETRIES[0])[0].pow(3).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice, not three times"):
        torch.autograd.grad(first.square().sum(), w, create_graph=True)
    torch.autograd.grad(first.square().sum(), w)
