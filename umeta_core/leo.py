"""Latent embedding optimization (Rusu et al., 2019): adapt a low-dimensional code of a classifier's weights.

All shapes are for T tasks at once; N ways, K shots, features of d = 640 and codes of n_z = 64 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import one_of
from .episodes import Episodes
from .fast_leo import QueryLoss
from .losses import accuracy, cross_entropy
from .networks import glorot_uniform
from .noise import CountedNoise, noise_of_tasks


@dataclass
class Adaptation:
    """What adaptation did to T tasks. Codes are ``[T, N, copies, n_z]``, classifiers ``[T, N, d]``, means over copies.

    `weights` has the classifier after every step: the generated one, then one per latent step, then one per step in
    weight space; `codes` likewise, without the last. `sigma` are the standard deviations of the codes ``[T, N, 1,
    n_z]`` and `noise` the sample that made the first codes, or None where nothing was sampled.
    """

    codes: list[Tensor]
    weights: list[Tensor]
    sigma: Tensor | None
    noise: Tensor | None


class LEO(CountedNoise, nn.Module):
    """Encode the support set into a code for each class, decode it into the class's weights of a linear softmax
    classifier without bias, adapt the code by gradient descent, then the weights.

    Inputs are episodes of features ``[T, N, K, d]``, of length 1 each (reference code, not in the paper).

    Args:
        features, latent: d and n_z.
        latent_steps, weight_steps: inner steps on codes and on weights; 0 and 0 is the "conditional generator only" of
            Table 2, 0 and 5 adds fine-tuning, 5 and 0 is "no fine-tuning".
        stochastic: sample codes and weights in training; False is the "deterministic" row (and has no KL term).
        prior: "encoder", or "random": codes start from N(0, I) instead of the encoder's; at test time from 0, the mean
            ("random at test" samples there too; the paper does not say).
        copies: sample K codes and classifiers for each class and average their logits (reference code); False: one
            code for each class, as the paper writes it.
        reduce: KL term, encoder penalty and orthogonality are a "mean" over all numbers, L2 has a half (reference
            code); or a "sum" over a class's code, averaged over classes, the norm of C - I itself, and no half (the
            paper's equations 6 and 7). Their weights belong to this choice.
        spread: standard deviations are "shifted" (`deviation`; reference code) or "exp", exp(s) alone.
        nan_rule: gradients of a step whose loss or gradient is not a number are the parameters themselves ("released":
            in the code two names are swapped) or those of an L2 penalty of weight 1e-4 ("intended", by its comment).
        clip: after its entries, the norm of each "variable" of the meta-gradient is clipped (reference code), or that
            of the "whole" gradient, as the text reads (App. B.4).
        class_rates: None: one step size for each dimension, shared by the classes (reference code); or N: one for each
            dimension of each of N classes, as "per-parameter" can be read. Tasks then have N ways.
        dropout: probability of dropping an input feature, anew at every use (training only).
        kl, encoder_penalty, l2, orthogonality: beta, gamma, lambda_1 and lambda_2 of equations 6 and 7.
        latent_lr, weight_lr: initial inner step sizes; one for each of the n_z and d dimensions is meta-learned.
        seed: of dropout and sampling. At test time each task has noise of its own, the same in every call.
        generator: source of the initial weights (Glorot uniform).

    The reference code has three more habits that the paper does not mention: the inner loss is the sum over the support
    set; the shifted deviation is 1e-10 for about half of all codes at first, so that they start without noise; the last
    layer of the relation network is linear. Defaults of the loss weights are those of its configuration file, which
    nobody tuned (its dropout is 0.5); `rows.leo` has the published ones.

    Raises:
        ValueError: an unknown option, or a dropout that is not in [0, 1).
    """

    def __init__(
        self, features=640, latent=64, *, latent_steps=5, weight_steps=5, stochastic=True, prior="encoder", copies=True,
        reduce="mean", spread="shifted", nan_rule="released", clip="variable", class_rates: int | None = None,
        dropout=0.3, kl=0.001, encoder_penalty=1e-9, l2=1e-8, orthogonality=0.001, latent_lr=1.0, weight_lr=0.001,
        seed=0, generator: torch.Generator | None = None,
    ):
        super().__init__()
        one_of("prior", prior, ("encoder", "random", "random at test"))
        one_of("reduce", reduce, ("mean", "sum"))
        one_of("spread", spread, ("shifted", "exp"))
        one_of("nan_rule", nan_rule, ("released", "intended"))
        one_of("clip", clip, ("variable", "whole"))
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} drops everything or is no probability; use 0 to less than 1")
        self.features, self.latent, self.seed = features, latent, seed
        self.latent_steps, self.weight_steps, self.copies = latent_steps, weight_steps, copies
        self.stochastic, self.prior, self.reduce, self.dropout = stochastic, prior, reduce, dropout
        self.kl, self.encoder_penalty, self.l2, self.orthogonality = kl, encoder_penalty, l2, orthogonality
        self.spread, self.nan_rule, self.clip, hidden = spread, nan_rule, clip, 2 * latent

        def matrix(rows, columns):
            return nn.Parameter(glorot_uniform((rows, columns), generator))

        self.encoder = matrix(features, latent)
        self.relation = nn.ParameterList(
            [matrix(2 * latent, hidden), matrix(hidden, hidden), matrix(hidden, 2 * latent)]
        )
        self.decoder = matrix(latent, 2 * features)
        of_codes, of_weights = ((class_rates, 1), (class_rates,)) if class_rates else ((), ())  # [N, copies], [N]
        self.latent_rate = nn.Parameter(torch.full((*of_codes, latent), float(latent_lr)))
        self.weight_rate = nn.Parameter(torch.full((*of_weights, features), float(weight_lr)))

    # The three maps ----------------------------------------------------------------------------------------------

    def encode(self, support: Tensor, noise: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[T, N, n_z]`` of each class's code from ``[T, N, K, d]``. (eq-leo-encoder)

        Every ordered pair of support examples passes the relation network, an example with itself too; the class takes
        the mean over its own examples and all partners. The first layer is split over the pair and the last, being
        linear, comes after the mean: the same numbers for a third of the work.
        """
        first, second, last = self.relation
        way, shot = support.shape[1:3]
        e = self._drop(support, noise) @ self.encoder
        left, right = e @ first[: self.latent], (e @ first[self.latent :]).flatten(1, 2)
        pairs = (left.unsqueeze(3) + right[:, None, None]).relu_()  # [T, N, K, NK, 2 n_z]
        statistics = (pairs @ second).relu_().sum((2, 3)) / (way * shot**2) @ last
        mean, s = statistics.split(self.latent, -1)
        return mean, deviation(s, self._offset())

    def decode(self, z: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Classifiers ``[T, N, d]`` from codes ``[T, N, copies, n_z]``, the mean over copies. (eq-leo-decoder)

        With `noise`, each copy's weights are sampled, else they are the decoder's means.
        """
        to_mean, to_s = self.decoder.split(self.features, 1)
        mean = z.mean(2) @ to_mean
        if noise is None or not self.stochastic:
            return mean
        sigma = deviation(z @ to_s, self._offset(z.shape[1]))
        return mean + (sigma * _normal(sigma, noise)).mean(2)

    def _offset(self, way: int | None = None) -> float:
        """The deviation of codes, or of the weights of `way` classes, where the network says 0; 1 makes it exp(s)."""
        if self.spread == "exp":
            return 1.0
        return 0.0 if way is None else (2 / (self.features + way)) ** 0.5

    def classify(self, x: Tensor, w: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Logits ``[T, n, N]`` of features ``[T, n, d]`` under classifiers ``[T, N, d]``. (eq-leo-predict)"""
        return self._drop(x, noise) @ w.transpose(1, 2)

    def _drop(self, x: Tensor, noise: torch.Generator | None) -> Tensor:
        if noise is None or self.dropout == 0:
            return x
        return x * keep_mask(x, 1 - self.dropout, noise)

    # Adaptation --------------------------------------------------------------------------------------------------

    def adapt(self, support: Tensor, noise: torch.Generator | None = None, create_graph=False, first=0) -> Adaptation:
        """Both inner loops on support features ``[T, N, K, d]`` of tasks number `first` and on. (eq-leo-inner)

        The gradient for one of C copies is 1/C of that for their mean; copies that are all alike, and the weights,
        which only act through their mean, are kept once and move by 1/K of the step size: the same numbers.
        """
        shot, x = support.shape[2], support.flatten(1, 2)
        y = torch.arange(support.shape[1], device=x.device).repeat_interleave(shot).expand(len(x), -1)
        done = self._initial_codes(support, noise, first)
        z = done.codes[0]
        shrink = shot // z.shape[2] if self.copies else 1

        def inner_loss(w):
            return support_loss(self.classify(x, w, noise), y).sum()

        w = self.decode(z, noise)
        done.weights.append(w)
        for _ in range(self.latent_steps):
            (gradient,) = torch.autograd.grad(inner_loss(w), z, create_graph=create_graph)
            z = _step(z, self.latent_rate / shrink, gradient, create_graph)
            w = self.decode(z, noise)
            done.codes.append(z)
            done.weights.append(w)
        for _ in range(self.weight_steps):
            w = w if create_graph or w.requires_grad else w.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(inner_loss(w), w, create_graph=create_graph)
            w = _step(w, self.weight_rate / (shot if self.copies else 1), gradient, create_graph)
            done.weights.append(w)
        return done

    def _initial_codes(self, support: Tensor, noise: torch.Generator | None, first=0) -> Adaptation:
        tasks, way, shot = support.shape[:3]
        if self.prior == "encoder":
            mean, sigma = (t.unsqueeze(2) for t in self.encode(support, noise))
        else:
            mean = support.new_zeros(tasks, way, 1, self.latent)
            sigma = torch.ones_like(mean)
        if not self.stochastic or noise is None and self.prior != "random at test":
            return Adaptation([mean if mean.requires_grad else mean.requires_grad_()], [], None, None)
        like = mean.expand(-1, -1, shot if self.copies else 1, -1)
        epsilon = noise_of_tasks(like, self.seed, first) if noise is None else _normal(like, noise)
        z = mean + sigma * epsilon
        return Adaptation([z if z.requires_grad else z.requires_grad_()], [], sigma, epsilon)

    # Learner -----------------------------------------------------------------------------------------------------

    def loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Meta-loss ``[T]`` (eq-leo-meta-loss) and query accuracy ``[T]``, with dropout and sampling.

        Uses the written-out derivatives of `fast_leo`, which take the mean over tasks for granted.
        """
        _, _, xq, yq = episodes.flat()
        noise = self._noise(xq)
        done = self._initial_codes(episodes.support, noise)
        losses, logits, last = QueryLoss.apply(
            done.codes[0], self.decoder, self.latent_rate, self.weight_rate, self, episodes.support, xq, noise
        )
        done.codes.append(last)
        return losses + self.regularizers(done), accuracy(logits, yq)

    def loss_reference(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The same by automatic differentiation through every inner step."""
        _, _, xq, yq = episodes.flat()
        noise = self._noise(xq)
        done = self.adapt(episodes.support, noise, create_graph=True)
        logits = self.classify(xq, done.weights[-1], noise)
        return cross_entropy(logits, yq) + self.regularizers(done), accuracy(logits.detach(), yq)

    def regularizers(self, done: Adaptation) -> Tensor:
        """All terms of the meta-loss but the query loss, ``[T]``: equations 6 and 7."""
        total = self.l2 * self.l2_penalty() + self.orthogonality * self.orthogonality_of()
        if self.prior != "encoder":
            return total
        total = total + self.encoder_penalty * self.penalty(done)
        return total + self.kl * self.divergence(done) if self.stochastic else total

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Query logits ``[T, N*Q, N]`` after both inner loops, without sampling and dropout."""
        with torch.enable_grad():
            done = self.adapt(episodes.support, first=episodes.first)
        return self.classify(episodes.flat()[2], done.weights[-1])

    def divergence(self, done: Adaptation) -> Tensor:
        """One-sample estimate ``[T]`` of KL(q(z) || N(0, I)) at the first codes. (eq-leo-kl)"""
        return self._reduce(divergence(done.codes[0], done.sigma, done.noise))

    def penalty(self, done: Adaptation) -> Tensor:
        """Squared distance ``[T]`` of the first codes to the adapted ones, taken as constants. (eq-leo-penalty)"""
        return self._reduce((done.codes[-1].detach() - done.codes[0]).square())

    def _reduce(self, elements: Tensor) -> Tensor:
        return elements.mean((1, 2, 3)) if self.reduce == "mean" else elements.sum(3).mean((1, 2))

    def l2_penalty(self) -> Tensor:
        """The sum of squares of encoder, relation network and decoder, or half of it; step sizes are free."""
        total = sum(p.square().sum() for p in (self.encoder, *self.relation, self.decoder))
        return total / 2 if self.reduce == "mean" else total

    def orthogonality_of(self) -> Tensor:
        """Mean squared difference of the cosines of the decoder's n_z rows from the identity, or its norm.

        (eq-leo-orthogonality)
        """
        rows = nn.functional.normalize(self.decoder, dim=1)
        difference = rows @ rows.T - torch.eye(self.latent, dtype=rows.dtype, device=rows.device)
        return difference.square().mean() if self.reduce == "mean" else difference.norm()

    def step_sizes(self) -> tuple:
        """The parameters that no penalty reaches."""
        return self.latent_rate, self.weight_rate

    def prepare_gradients(self, loss: Tensor) -> None:
        """Clip each entry of the gradient to 0.1, then the norm of each variable's, or of the whole, to 0.1. (App. B.4)

        If the loss or a gradient is not a number, that step follows `nan_rule` instead.
        """
        parameters = [p for p in self.parameters() if p.grad is not None]
        failed = torch.stack([p.grad.isnan().any() for p in parameters] + [loss.detach().isnan()]).any()
        for p in parameters:
            penalized = all(p is not rate for rate in self.step_sizes())
            share = 1.0 if self.nan_rule == "released" else 1e-4 if penalized else 0.0
            p.grad = torch.where(failed, share * p.detach(), p.grad)
            p.grad.clamp_(-0.1, 0.1)
            if self.clip == "variable":
                p.grad.mul_(0.1 / p.grad.norm().clamp_min(0.1))
        if self.clip == "whole":
            nn.utils.clip_grad_norm_(parameters, 0.1)


def deviation(s: Tensor, offset: float = 0.0) -> Tensor:
    """Standard deviation ``max(exp(s) - (1 - offset), 1e-10)``; no gradient where the bound holds. (eq-leo-deviation)

    Reference code, not in the paper.
    """
    return nn.functional.threshold(s.exp() - (1 - offset), 1e-10, 1e-10)


def divergence(z: Tensor, sigma: Tensor, epsilon: Tensor) -> Tensor:
    """log q(z) - log N(z; 0, I) of each number of the codes ``z = mean + sigma * epsilon``.

    ``log q = -log sigma - epsilon^2 / 2`` takes the sample's own epsilon: no division by a deviation of 1e-10.
    """
    return z.square() / 2 - epsilon.square() / 2 - sigma.log()


def support_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Summed cross-entropy ``[T]`` of logits ``[T, n, N]``, labels ``[T, n]``. (eq-leo-support-loss)"""
    return cross_entropy(logits, y) * y.shape[1]


def keep_mask(x: Tensor, keep: float, noise: torch.Generator) -> Tensor:
    """1 / keep with probability `keep`, else 0, in the shape of `x`: inverted dropout.

    Four entries share one random number of 64 bits, four times as fast as one each; `keep` is rounded to 1/65536.
    """
    if keep > 1 - 2**-17:  # rounds to 1, which 16 bits do not hold
        return torch.ones_like(x)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None, generator=noise)
    threshold = round(keep * 2**16) - 2**15
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    # Written into floats at once: a tensor of bools costs ten times as much.
    return torch.lt(bits, threshold, out=torch.empty_like(bits, dtype=x.dtype)).mul_(1 / keep)


def _normal(like: Tensor, noise: torch.Generator) -> Tensor:
    return torch.empty_like(like, requires_grad=False, memory_format=torch.contiguous_format).normal_(generator=noise)


def _step(x: Tensor, rate: Tensor, gradient: Tensor, create_graph: bool) -> Tensor:
    """x - rate * gradient; a new leaf where nothing is to be differentiated again."""
    if create_graph:
        return torch.addcmul(x, rate, gradient, value=-1)
    return torch.addcmul(x.detach(), rate.detach(), gradient, value=-1).requires_grad_()
