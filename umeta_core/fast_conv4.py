"""Conv-4 networks of many tasks as one computation, with every derivative written out.

Three ideas make this room fast; none of them approximates anything. (On a GPU PyTorch lets every convolution round its
factors to TF32; ``torch.backends.cudnn.allow_tf32 = False`` forbids it.)

1. *All tasks in one tensor.* Task t owns channels ``[t*C, (t+1)*C)`` of a channels-last tensor
   ``[n, T*C, H, W]``. One grouped convolution then serves every task, and batch-norm statistics, which are
   per channel, are per task for free.
2. *Pool first.* With a non-negative scale, max-pooling commutes with batch norm and ReLU, so it is taken first
   and everything after it handles a quarter of the numbers. A negative scale is made positive by flipping
   the signs of the filter and of the scale.
3. *No graph.* ``push`` carries a direction through a block (the R-operator of Pearlmutter, 1994) and
   ``pull_push`` carries it through the block's backward pass. Together they give Hessian-vector products,
   hence the gradient through plain SGD steps, out of forward-type kernels only.

The same block is an ``autograd.Function`` (`conv_block`) whose second derivative is made of the same two
methods, for everything that wants ordinary autograd. Tests hold it equal in float64 to PyTorch's own layers, and the
meta-gradient to `maml.adapt` under automatic differentiation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_relu_backward = torch.ops.aten.threshold_backward


def channels_last(x: Tensor) -> Tensor:
    """`x` with channels innermost in memory, also where there is one channel.

    One channel is both layouts at once; the kernels then answer in the other one, whose max-pool is 30 times slower.
    """
    if x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return x.contiguous().as_strided(x.shape, (h * w, 1, w, 1))


def to_groups(x: Tensor) -> Tensor:
    """Lay tasks side by side: ``[T, n, C, H, W]`` -> channels-last ``[n, T*C, H, W]``."""
    return channels_last(x.transpose(0, 1).flatten(1, 2))


def _channelwise(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _channel_sum(x: Tensor) -> Tensor:
    """Sum over images and pixels as one matrix-vector product, which is threaded; a reduction over NHWC is not."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return torch.mv(rows.t(), rows.new_ones(rows.shape[0]))


def batch_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of ``[n, C, H, W]``."""
    if y.device.type == "cpu":
        return torch.ops.aten.batch_norm_update_stats(y, None, None, 0.1)
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return mean, var


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """As `torch.nn.functional.unfold` for 3x3 patches, which on a GPU launches a kernel for every image."""
    padded = F.pad(x, [geometry.padding] * 4)
    patches = padded.unfold(2, 3, geometry.stride).unfold(3, 3, geometry.stride)  # [n, C, H', W', 3, 3]
    return patches.permute(0, 1, 4, 5, 2, 3).reshape(len(x), 9 * x.shape[1], -1)


class PatchMoments:
    """Mean and covariance of the patches that a convolution sees in a fixed input, per task.

    They give the batch-norm statistics of *any* filter on that input, and the dense part of its weight
    gradient, in closed form. Worth it for the support images, which pass the first layer at every inner step.
    """

    def __init__(self, x: Tensor, geometry: Geometry):
        tasks, n, channels = geometry.tasks, x.shape[0], x.shape[1] // geometry.tasks
        side = x.view(n, tasks, channels, *x.shape[2:]).transpose(0, 1).flatten(0, 1)
        patches = unfold(side, geometry) if x.is_cuda else F.unfold(side, 3, padding=geometry.padding,
                                                                    stride=geometry.stride)  # fmt: skip
        patches = patches.view(tasks, n, channels * 9, -1).transpose(1, 2).reshape(tasks, channels * 9, -1)
        self.mean = patches.mean(2)
        patches = patches - self.mean.unsqueeze(2)
        self.cov = torch.bmm(patches, patches.transpose(1, 2)) / patches.shape[2]


@dataclass(frozen=True)
class Geometry:
    """What a block does besides its weights: `tasks` groups, convolution stride and padding, pooling, epsilon."""

    tasks: int = 1
    stride: int = 1
    padding: int = 1
    pool: bool = True
    eps: float = 1e-5

    def side(self, size: int) -> int:
        """Side of the convolution's output, before pooling."""
        return (size + 2 * self.padding - 3) // self.stride + 1

    def conv(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w, None, self.stride, self.padding, 1, self.tasks)

    def _backward(self, gy: Tensor, x: Tensor, w: Tensor, wanted: list[bool]):
        two = [self.stride] * 2, [self.padding] * 2
        return torch.ops.aten.convolution_backward(gy, x, w, None, *two, [1, 1], False, [0, 0], self.tasks, wanted)

    def conv_to_input(self, gy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(gy, x, w, [True, False, False])[0]

    def conv_to_weight(self, gy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(gy, x, w, [False, True, False])[1]


class Block:
    """3x3 convolution, batch norm with batch statistics, ReLU and (if ``geometry.pool``) a 2x2 max-pool.

    Shapes: x ``[n, T*C, H, W]``, w ``[T*F, C, 3, 3]``, scale and shift ``[T*F]``. The methods must be called in
    the order forward, backward, push, pull_push; each keeps what the next ones need.

    With n pixels per channel, mean m and r = 1/sqrt(var + eps), the gradient at the convolution's output is
    ``gy = sparse + base + slope * (y - m)``: the incoming gradient at the maxima, and two numbers per channel.
    """

    def __init__(self, geometry: Geometry, moments: PatchMoments | None = None, need_input: bool = True):
        self.geometry, self.moments, self.need_input = geometry, moments, need_input

    def _matrix(self, w: Tensor) -> Tensor:
        return w.reshape(self.geometry.tasks, -1, w[0].numel())

    def _per_task(self, v: Tensor) -> Tensor:
        return v.view(self.geometry.tasks, -1, 1)

    def _flip(self, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        if self.sign is None:
            return w, scale
        return w * self.sign.view(-1, 1, 1, 1), scale * self.sign

    def _at_maxima(self, q: Tensor) -> Tensor:
        if not self.geometry.pool:
            return q.clone()
        return q.flatten(2).gather(2, self.where.flatten(2)).view(self.where.shape)

    def _from_maxima(self, g: Tensor) -> Tensor:
        if not self.geometry.pool:
            return g
        pool = torch.ops.aten.max_pool2d_with_indices_backward
        return pool(g, self.y, [2, 2], [2, 2], [0, 0], [1, 1], False, self.where)

    def forward(self, x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The block's output ``[n, T*F, H', W']``."""
        self.sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype) if self.geometry.pool else None
        w, scale = self._flip(w, scale)
        y = self.geometry.conv(x, w)
        self.n = y.numel() // y.shape[1]
        if self.moments is None:
            mean, var = batch_statistics(y)
        else:
            self.cov_w = torch.bmm(self._matrix(w), self.moments.cov)
            var = (self.cov_w * self._matrix(w)).sum(2).flatten()
            mean = torch.bmm(self._matrix(w), self.moments.mean.unsqueeze(2)).flatten()
        r = torch.rsqrt(var + self.geometry.eps)
        z, self.where = torch.ops.aten.max_pool2d_with_indices(y, [2, 2], [2, 2]) if self.geometry.pool else (y, None)
        h = (z - _channelwise(mean)).mul_(_channelwise(r))
        out = torch.addcmul(_channelwise(shift), h, _channelwise(scale)).relu_()
        self.x, self.w, self.scale, self.y, self.h, self.out = x, w, scale, y, h, out
        self.mean, self.var, self.r = mean, var, r
        return out

    def backward(self, gout: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Gradients with respect to x (None where not needed), w, scale and shift."""
        gu = _relu_backward(gout, self.out, 0)
        gshift, gscale = _channel_sum(gu), _channel_sum(gu * self.h)
        k = self.scale * self.r
        base, slope = k * gshift / -self.n, k * self.r * gscale / -self.n
        sparse = self._from_maxima(gu * _channelwise(k))
        self.gu, self.gshift, self.gscale, self.k, self.slope = gu, gshift, gscale, k, slope
        gx = None
        if self.moments is not None:
            gw = self._matrix(self.geometry.conv_to_weight(sparse, self.x, self.w))
            gw = gw + self._per_task(slope * self.n) * self.cov_w
            gw = (gw + self._per_task(base * self.n) * self.moments.mean.unsqueeze(1)).view(self.w.shape)
        else:
            dense = torch.addcmul(_channelwise(base - slope * self.mean), self.y, _channelwise(slope))
            self.gy = dense.add_(sparse)
            gx = self.geometry.conv_to_input(self.gy, self.x, self.w) if self.need_input else None
            gw = self.geometry.conv_to_weight(self.gy, self.x, self.w)
        return gx, *self._flip(gw, gscale), gshift

    def push(self, dx: Tensor | None, dw: Tensor, dscale: Tensor, dshift: Tensor) -> Tensor:
        """Derivative of `forward` in the direction (dx, dw, dscale, dshift)."""
        dw, dscale = self._flip(dw, dscale)
        q = self.geometry.conv(self.x, dw)
        if dx is not None:
            q += self.geometry.conv(dx, self.w)
        if self.moments is None:
            q_mean = _channel_sum(q) / self.n
            q_slope = (_channel_sum(q * self.y) / self.n - self.mean * q_mean) * self.r
        else:
            q_mean = torch.bmm(self._matrix(dw), self.moments.mean.unsqueeze(2)).flatten()
            q_slope = (self.cov_w * self._matrix(dw)).sum(2).flatten() * self.r
        dh = self._at_maxima(q).sub_(_channelwise(q_mean)).addcmul_(self.h, _channelwise(q_slope), value=-1)
        dh.mul_(_channelwise(self.r))
        du = torch.addcmul(_channelwise(dshift), self.h, _channelwise(dscale)).addcmul_(dh, _channelwise(self.scale))
        self.dx, self.dw, self.dscale, self.q, self.dh = dx, dw, dscale, q, dh
        self.q_mean, self.q_slope = q_mean, q_slope
        return _relu_backward(du, self.out, 0)

    def pull_push(self, dgout: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Derivative of `backward` in the pushed direction; `dgout` is the change of gout (None: it is fixed)."""
        dgu = torch.zeros_like(self.gu) if dgout is None else _relu_backward(dgout, self.out, 0)
        dgshift = _channel_sum(dgu)
        dgscale = _channel_sum((dgu * self.h).addcmul_(self.gu, self.dh))
        dr = -self.r * self.r * self.q_slope
        dk = self.dscale * self.r + self.scale * dr
        dslope = ((dk * self.r + self.k * dr) * self.gscale + self.k * self.r * dgscale) / -self.n
        dbase = (dk * self.gshift + self.k * dgshift) / -self.n
        sparse = self._from_maxima((dgu * _channelwise(self.k)).addcmul_(self.gu, _channelwise(dk)))
        gx = None
        if self.moments is not None:
            gw = self._matrix(self.geometry.conv_to_weight(sparse, self.x, self.w))
            gw = gw + self._per_task(dslope * self.n) * self.cov_w
            gw += self._per_task(self.slope * self.n) * torch.bmm(self._matrix(self.dw), self.moments.cov)
            gw = (gw + self._per_task(dbase * self.n) * self.moments.mean.unsqueeze(1)).view(self.w.shape)
        else:
            constant = dbase - dslope * self.mean - self.slope * self.q_mean
            dgy = torch.addcmul(_channelwise(constant), self.y, _channelwise(dslope))
            dgy = dgy.addcmul_(self.q, _channelwise(self.slope)).add_(sparse)
            gw = self.geometry.conv_to_weight(dgy, self.x, self.w)
            if self.dx is not None:
                gw = gw + self.geometry.conv_to_weight(self.gy, self.dx, self.w)
            if self.need_input:
                gx = self.geometry.conv_to_input(dgy, self.x, self.w)
                gx = gx + self.geometry.conv_to_input(self.gy, self.x, self.dw)
        return gx, *self._flip(gw, dgscale), dgshift


class _BlockBackward(torch.autograd.Function):
    """Backward of the block as a differentiable function of (gout, x, w, scale).

    Its own backward needs nothing new. The gradients are those of <gout, f(x, w, scale, shift)>; their Jacobian
    is a symmetric Hessian, so its transpose applied to a direction is `pull_push` of that direction, and the
    derivative with respect to gout is `push`.
    """

    @staticmethod
    def forward(ctx, gout, x, w, scale, block):
        ctx.block = copy.copy(block)  # two backward passes over one graph must not share their intermediates
        gout = gout.contiguous(memory_format=torch.channels_last)
        return ctx.block.backward(gout)

    @staticmethod
    def backward(ctx, ggx, ggw, ggscale, ggshift):
        """The second backward pass: gradients of the first one's inputs, from those of its outputs."""
        if torch.is_grad_enabled():  # what follows is written out, and would pass for a constant
            raise RuntimeError("conv_block can be differentiated twice, not three times")
        block = copy.copy(ctx.block)
        layout = {"memory_format": torch.channels_last}
        ggx = None if ggx is None or not block.need_input else ggx.contiguous(**layout)
        ggw = torch.zeros_like(block.w) if ggw is None else ggw.contiguous(**layout)
        zeros = torch.zeros_like(block.scale)
        dgout = block.push(ggx, ggw, zeros if ggscale is None else ggscale, zeros if ggshift is None else ggshift)
        gx, gw, gscale, _ = block.pull_push(None)
        return dgout, gx, gw, gscale, None


class _BlockForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, scale, shift, geometry, moments):
        """The block's output and its batch statistics, as `conv_block`."""
        block = Block(geometry, moments, need_input=ctx.needs_input_grad[0])
        out = block.forward(x.detach(), channels_last(w.detach()), scale.detach(), shift.detach())
        block.out = out.detach()  # the output itself would close a reference cycle and never be freed
        ctx.save_for_backward(x, w, scale)
        ctx.block = block
        mean = block.mean if block.sign is None else block.mean * block.sign  # of w itself, not of the flipped filter
        ctx.mark_non_differentiable(mean, block.var)
        return out, mean, block.var

    @staticmethod
    def backward(ctx, gout, *_):
        x, w, scale = ctx.saved_tensors
        return (*_BlockBackward.apply(gout, x, w, scale, ctx.block), None, None)


def conv_block(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """One block under autograd, twice differentiable: output, batch mean and biased batch variance.

    Args:
        x: channels-last ``[n, T*C, H, W]``; w: ``[T*F, C, 3, 3]``; scale, shift: ``[T*F]``.
    """
    fixed_input = torch.is_grad_enabled() and not x.requires_grad
    moments = PatchMoments(x, geometry) if fixed_input else None
    return _BlockForward.apply(x, w, scale, shift, geometry, moments)


class Head:
    """Linear layer and weighted cross-entropy of every task at once; features are maps or their spatial means."""

    def __init__(self, onehot: Tensor, weight: float, average: bool):
        self.onehot, self.weight, self.average = onehot, weight, average

    def _features(self, x: Tensor) -> Tensor:
        tasks = self.w.shape[0]
        maps = x.reshape(x.shape[0], tasks, -1, *x.shape[2:]).transpose(0, 1)
        return maps.mean((3, 4)) if self.average else maps.flatten(2)

    def _to_maps(self, gf: Tensor) -> Tensor:
        n, channels, h, w = self.shape
        if self.average:
            gx = (gf / (h * w)).transpose(0, 1).reshape(n, channels, 1, 1).expand(self.shape)
        else:
            gx = gf.transpose(0, 1).reshape(self.shape)
        return gx.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """Losses ``[T]``; w ``[T, N, features]``, b ``[T, N]``. Leaves `logits` ``[T, n, N]``."""
        self.shape, self.w = x.shape, w
        self.f = self._features(x)
        self.logits = torch.baddbmm(b.unsqueeze(1), self.f, w.transpose(1, 2))
        logp = torch.log_softmax(self.logits, 2)
        self.p = logp.exp()
        self.g = (self.p - self.onehot) * self.weight
        return -(logp * self.onehot).sum((1, 2)) * self.weight

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._to_maps(torch.bmm(self.g, self.w)), torch.bmm(self.g.transpose(1, 2), self.f), self.g.sum(1)

    def push(self, dx: Tensor, dw: Tensor, db: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Derivative of `backward` in the direction (dx, dw, db). (eq-r-operator)"""
        df = self._features(dx)
        dlogits = torch.baddbmm(torch.baddbmm(db.unsqueeze(1), self.f, dw.transpose(1, 2)), df, self.w.transpose(1, 2))
        pd = self.p * dlogits
        dg = (pd - self.p * pd.sum(2, keepdim=True)) * self.weight
        gw = torch.baddbmm(torch.bmm(dg.transpose(1, 2), self.f), self.g.transpose(1, 2), df)
        return self._to_maps(torch.baddbmm(torch.bmm(dg, self.w), self.g, dw)), gw, dg.sum(1)


class TaskNets:
    """T Conv-4 networks on T tasks: losses, gradients, and products of the Hessian with a direction."""

    def __init__(self, geometry: Geometry, blocks: int, head: Head, moments: PatchMoments | None):
        self.blocks = [Block(geometry, moments if b == 0 else None, need_input=b > 0) for b in range(blocks)]
        self.head = head

    def losses(self, params: list[Tensor], x: Tensor) -> Tensor:
        """Losses ``[T]`` on ``[n, T*C, H, W]``; params as in `networks.Conv4.tensors`, but one copy per task."""
        for b, block in enumerate(self.blocks):
            x = block.forward(x, *params[3 * b : 3 * b + 3])
        return self.head.forward(x, *params[-2:])

    def gradient(self) -> list[Tensor]:
        """Gradient of each task's loss with respect to its own weights; must follow `losses`."""
        g, *grads = self.head.backward()
        for block in reversed(self.blocks):
            g, *three = block.backward(g)
            grads = three + grads
        return grads

    def hessian_vector(self, v: list[Tensor]) -> list[Tensor]:
        """Hessian of each task's loss times the direction v; must follow `gradient`."""
        d = None
        for b, block in enumerate(self.blocks):
            d = block.push(d, *v[3 * b : 3 * b + 3])
        g, *out = self.head.push(d, *v[-2:])
        for block in reversed(self.blocks):
            g, *three = block.pull_push(g)
            out = three + out
        return out
