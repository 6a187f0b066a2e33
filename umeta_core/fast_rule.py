"""The learned rule's convolution, batch norm and ReLU as one operation with a written-out backward pass.

Nearly all time of the rule goes here. Autograd would keep five tensors of every such block and fill zeros for every
shifted sum; this keeps two. No second derivative of the rule is ever needed. `learned_rule.ConvNorm.reference` is the
readable form; a test compares both in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ConvNormRelu(torch.autograd.Function):
    """relu(batch_norm(convolution(x)) + shift); the norm is over axes 1 and 2, so a bias before it would cancel."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, shift: Tensor, along: int) -> Tensor:
        """x: ``[T, N, B, inputs]``; weight: ``[inputs, width, outputs]``; along: 1 (neurons) or 2 (examples)."""
        y = shifted_sum((x @ weight.flatten(1)).unflatten(-1, weight.shape[1:]), along)
        count = y.shape[1] * y.shape[2]
        y -= y.sum((1, 2), keepdim=True) / count
        rstd = torch.rsqrt((y * y).sum((1, 2), keepdim=True) / count + 1e-3)
        y *= rstd
        out = (y + shift).relu_()
        ctx.save_for_backward(x, weight, y, out, rstd)
        ctx.along = along
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        """Gradients of x, the filter and the shift, written out; they cannot be differentiated again."""
        x, weight, normed, out, rstd = ctx.saved_tensors
        count = normed.shape[1] * normed.shape[2]
        g = torch.ops.aten.threshold_backward(grad, out, 0)
        total = g.sum((1, 2), keepdim=True)
        along_normed = (g * normed).sum((1, 2), keepdim=True)
        g -= total / count
        g = g.addcmul_(normed, along_normed / count, value=-1).mul_(rstd)
        parts = spread(g, weight.shape[1], ctx.along).flatten(3)
        grad_x = parts @ weight.flatten(1).T if ctx.needs_input_grad[0] else None
        grad_weight = (x.flatten(0, 2).T @ parts.flatten(0, 2)).view_as(weight)
        return grad_x, grad_weight, total.sum((0, 1, 2)), None


def shifted_sum(parts: Tensor, along: int) -> Tensor:
    """Sum over k of parts ``[T, N, B, width, C]``, part k moved by k - width // 2 along an axis, zeros moved in."""
    width, n = parts.shape[3], parts.shape[along]
    out = parts[..., width // 2, :].clone(memory_format=torch.contiguous_format)
    for k, to, start, length in _moves(width, n):
        out.narrow(along, to, length).add_(parts[..., k, :].narrow(along, start, length))
    return out


def spread(g: Tensor, width: int, along: int) -> Tensor:
    """The transpose of `shifted_sum`: ``[T, N, B, width, C]`` from ``[T, N, B, C]``."""
    n = g.shape[along]
    parts = g.new_empty(*g.shape[:3], width, g.shape[3])
    parts[..., width // 2, :] = g
    for k in range(width):
        if k != width // 2:
            edge = min(abs(k - width // 2), n)
            parts[..., k, :].narrow(along, 0 if k > width // 2 else n - edge, edge).zero_()
    for k, to, start, length in _moves(width, n):
        parts[..., k, :].narrow(along, start, length).copy_(g.narrow(along, to, length))
    return parts


def _moves(width: int, n: int):
    """(k, first output, first input, length) of every part but the middle one."""
    for k in range(width):
        shift = k - width // 2  # output i takes input i + shift
        if shift and abs(shift) < n:
            yield k, max(-shift, 0), max(shift, 0), n - abs(shift)
