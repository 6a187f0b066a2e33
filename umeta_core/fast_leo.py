"""Both inner loops of LEO and their derivative, written out: less than half the work of differentiating twice.

With C copies of a code, ``D_mu`` and ``D_s`` the decoder's two halves, epsilon the noise and x~ the support features
after dropout, one latent step is (all gradients of the support loss summed over examples)

    w = mean_c(z_c) D_mu + mean_c(sigma_c epsilon_c),   sigma_c = max(exp(s_c) - (1 - offset), 1e-10),   s_c = z_c D_s
    g = (softmax(x~ w') - y)' x~                        the gradient for w
    g_c = g D_mu' / C + (g kappa_c) D_s'                the gradient for z_c,   kappa_c = dw/ds_c
    z_c <- z_c - rate g_c

`leo.LEO.loss_reference` is the readable form: `leo.LEO.adapt` under automatic differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import check_equal_weights


@dataclass
class Decoded:
    """A decoded code ``z [T, N, C, n_z]``: weights ``w [T, N, d]`` and ``kappa [T, N, C, d]`` (None: no noise)."""

    z: Tensor
    w: Tensor
    kappa: Tensor | None


class InnerLoops:
    """Latent steps, then steps on the weights, then the query loss, for T tasks, with the way back.

    Args:
        model: the `leo.LEO`; support: features ``[T, N, K, d]``; query: ``[T, N*Q, d]``; noise: what both loops draw
            from, in the order of `leo.LEO.adapt`.
    """

    def __init__(self, model, support: Tensor, query: Tensor, noise: torch.Generator):
        self.model, self.noise, self.query = model, noise, query
        self.x, self.shot = support.flatten(1, 2), support.shape[2]
        n = support.shape[1]
        self.y = torch.eye(n, dtype=self.x.dtype, device=self.x.device).repeat_interleave(self.shot, 0)
        self.yq = torch.eye(n, dtype=self.x.dtype, device=self.x.device).repeat_interleave(query.shape[1] // n, 0)
        self.to_mean, self.to_s = (half.contiguous() for half in model.decoder.detach().split(model.features, 1))
        self.weight_share = self.shot if model.copies else 1  # see `leo.LEO.adapt`
        self.weight_rate = model.weight_rate.detach() / self.weight_share
        self.mean_gradient, self.s_gradient = torch.zeros_like(self.to_mean), torch.zeros_like(self.to_s)

    # Forward -----------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor) -> Decoded:
        """Weights drawn for codes ``[T, N, C, n_z]``, and what the backward pass needs of the draw."""
        mean = z.mean(2) @ self.to_mean
        if not self.model.stochastic:
            return Decoded(z, mean, None)
        offset = self.model._offset(z.shape[1])
        e = (z @ self.to_s).exp_()
        epsilon = torch.empty_like(e).normal_(std=1 / z.shape[2], generator=self.noise)
        difference = e - (1 - offset)
        kappa = torch.ops.aten.threshold_backward(e.mul_(epsilon), difference, 1e-10)  # 0 where the bound holds
        return Decoded(z, mean + difference.clamp_min_(1e-10).mul_(epsilon).sum(2), kappa)

    def gradient(self, w: Tensor):
        """Of the support loss for w ``[T, N, d]``; the features after dropout and the probabilities ``[T, NK, N]``."""
        x = self.model._drop(self.x, self.noise)
        p = (x @ w.transpose(1, 2)).softmax(2)
        return (p - self.y).transpose(1, 2) @ x, x, p

    def to_code(self, g: Tensor, scaled: Tensor | None, copies: int) -> Tensor:
        """The gradient for codes ``[T, N, C, n_z]`` from that for w and, with noise, for s. (eq-leo-code-gradient)"""
        through_mean = (g @ self.to_mean.T).unsqueeze(2).div_(copies)
        return through_mean.expand(-1, -1, copies, -1) if scaled is None else through_mean + scaled @ self.to_s.T

    def run(self, z: Tensor):
        """Losses ``[T]``, query logits, the last codes; and the gradients of the summed losses for the first codes, the
        decoder and both vectors of step sizes."""
        model, copies, path, tuning = self.model, z.shape[2], [], []
        self.latent_share = self.shot // copies if model.copies else 1
        self.latent_rate = model.latent_rate.detach() / self.latent_share
        now = self.decode(z)
        for _ in range(model.latent_steps):
            g, x, p = self.gradient(now.w)
            scaled = None if now.kappa is None else g.unsqueeze(2) * now.kappa
            step = self.to_code(g, scaled, copies)
            path.append((now, g, x, p, scaled, step))
            now = self.decode(now.z - self.latent_rate * step)
        w = now.w
        for _ in range(model.weight_steps):
            g, x, p = self.gradient(w)
            tuning.append((g, x, p))
            w = w - self.weight_rate * g
        xq = model._drop(self.query, self.noise)
        logits = xq @ w.transpose(1, 2)
        losses = -(logits.log_softmax(2) * self.yq).sum(2).mean(1)
        v = ((logits.softmax(2) - self.yq) / xq.shape[1]).transpose(1, 2) @ xq
        return losses, logits, now.z, *self.back(v, now, path, tuning)

    # Backward ----------------------------------------------------------------------------------------------------

    def hessian(self, q: Tensor, x: Tensor, p: Tensor) -> Tensor:
        """The Hessian of the support loss times q, both ``[T, N, d]``. (eq-leo-hessian-product)"""
        r = p * (x @ q.transpose(1, 2))
        return torch.addcmul(r, p, r.sum(2, keepdim=True), value=-1).transpose(1, 2) @ x

    def back(self, v: Tensor, last: Decoded, path: list, tuning: list):
        """From v, the gradient for the last weights ``[T, N, d]``, back to the first codes."""
        weight_rate, latent_rate = torch.zeros_like(self.weight_rate), torch.zeros_like(self.latent_rate)
        for g, x, p in reversed(tuning):
            weight_rate -= (v * g).sum_to_size(weight_rate.shape)
            v = v - self.hessian(self.weight_rate * v, x, p)
        vz = self.through_decoder(last, v, None if last.kappa is None else v.unsqueeze(2) * last.kappa)
        for now, g, x, p, scaled, step in reversed(path):
            latent_rate -= (vz * step).sum_to_size(latent_rate.shape)
            u = vz * -self.latent_rate  # for the gradient that made the step
            mean_u = u.mean(2)
            q = mean_u @ self.to_mean
            add_outer(self.mean_gradient, mean_u, g)
            if now.kappa is None:
                h, for_s = self.hessian(q, x, p), None
            else:
                b = u @ self.to_s
                q = q + (b * now.kappa).sum(2)
                h = self.hessian(q, x, p)
                for_s = b.mul_(g.unsqueeze(2)).add_(h.unsqueeze(2)).mul_(now.kappa)
                add_outer(self.s_gradient, u, scaled)
            vz = vz + self.through_decoder(now, h, for_s)
        decoder = torch.cat([self.mean_gradient, self.s_gradient], 1)
        return vz, decoder, latent_rate / self.latent_share, weight_rate / self.weight_share

    def through_decoder(self, now: Decoded, h: Tensor, for_s: Tensor | None) -> Tensor:
        """The gradient for a code from those for its w and s; the decoder's share is added up."""
        add_outer(self.mean_gradient, now.z.mean(2), h)
        if for_s is not None:
            add_outer(self.s_gradient, now.z, for_s)
        return self.to_code(h, for_s, now.z.shape[2])


def add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the outer products of the rows of left ``[..., n_z]`` and right ``[..., d]`` to `total` ``[n_z, d]``."""
    total.addmm_(left.flatten(0, -2).T, right.flatten(0, -2))


class QueryLoss(torch.autograd.Function):
    """Query losses ``[T]``, logits and last codes from the first codes, with the written-out derivative."""

    @staticmethod
    def forward(ctx, z, decoder, latent_rate, weight_rate, model, support, query, noise):
        losses, logits, last, *gradients = InnerLoops(model, support, query, noise).run(z)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(logits, last)
        return losses, logits, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gout, *_):
        check_equal_weights(gout)  # so that gradients could be summed over tasks on the way
        z, *shared = (g * gout[0] for g in ctx.gradients)
        return z, *shared, None, None, None, None
