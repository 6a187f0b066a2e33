"""Batch norm and ReLU as one pass over channels-last maps, with the derivative written out."""

from __future__ import annotations

import torch
from torch import Tensor

from .fast_conv4 import Geometry, batch_statistics, channels_last

CACHE = 1 << 18  # numbers of a map that are handled at a time on a CPU


class NormRelu(torch.autograd.Function):
    """Batch norm with batch statistics, then ReLU: output, mean and biased variance of channels-last ``[n, C, H, W]``.

    On a CPU some images at a time, which stay in the cache from one pass over them to the next.
    """

    @staticmethod
    def forward(ctx, y, scale, shift):
        """``relu(scale h + shift)`` with h the normalized y, its mean and its variance."""
        ctx.images = max(1, CACHE // y[0].numel()) if y.device.type == "cpu" else len(y)
        mean, var = batch_statistics(y)
        r = torch.rsqrt(var + Geometry.eps)
        gain = scale * r
        gain, offset = (v.repeat(y.shape[2] * y.shape[3]) for v in (gain, shift - mean * gain))
        out = torch.empty_like(y)
        for part, done in _parts(ctx.images, y, out):
            torch.addcmul(offset, part, gain, out=done).relu_()
        ctx.save_for_backward(y, out, mean, r, scale)
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx, gout, *_):
        """``gy = k (relu'(out) gout - mean(..) - h mean(.. h))`` with h the normalized y, as in `fast_conv4.Block`."""
        y, out, mean, r, scale = ctx.saved_tensors
        channels, pixels = y.shape[1], y.shape[2] * y.shape[3]
        gy = torch.empty_like(y)
        gshift, with_y = torch.zeros_like(mean), torch.zeros_like(mean)
        for g, o, part, u in _parts(ctx.images, channels_last(gout), out, y, gy):
            torch.ops.aten.threshold_backward.grad_input(g, o, 0, grad_input=u)
            ones = u.new_ones(u.numel() // channels)
            gshift.addmv_(u.view(-1, channels).t(), ones)
            with_y.addmv_((u * part).view(-1, channels).t(), ones)
        gscale = r * (with_y - mean * gshift)
        k, n = scale * r, len(y) * pixels
        slope = -k * r * gscale / n
        k, slope, base = (v.repeat(pixels) for v in (k, slope, -k * gshift / n - slope * mean))
        for part, u in _parts(ctx.images, y, gy):
            u.mul_(k).add_(torch.addcmul(base, part, slope))
        return gy, gscale, gshift


def _parts(images: int, *maps: Tensor):
    """Channels-last maps ``[n, C, H, W]`` side by side, some images at a time, as rows ``[images, H*W*C]``."""
    return zip(*(x.permute(0, 2, 3, 1).flatten(1).split(images) for x in maps))
