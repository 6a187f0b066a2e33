"""Model-agnostic meta-learning (Finn et al., 2017) as CACTUs uses it, for T tasks at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import ascending, one_of
from .episodes import Episodes
from .fast_conv4 import Head, PatchMoments, TaskNets, to_groups
from .losses import accuracy, cross_entropy
from .networks import Conv4

CACHE_BYTES = 3e6  # measured: with larger first maps, tasks one by one are faster than together


def adapt(
    forward: Callable,
    params: list[Tensor],
    rates: list,
    x: Tensor,
    y: Tensor,
    steps: int,
    loss: Callable,
    create_graph: bool = True,
) -> list[Tensor]:
    """Plain gradient descent per task, differentiable: the readable reference of the inner loop. (eq-maml-inner)

    Args:
        forward: maps (params, x ``[T, n, ...]``) to outputs ``[T, n, out]``.
        params: tensors with a leading task axis; rates: one number or tensor per entry (0: not adapted).
        loss: maps (outputs, y) to losses ``[T]``.
        create_graph: False treats the inner gradients as constants (first order).

    Returns:
        The adapted tensors. Tasks do not touch each other's weights: the gradient of the sum is each task's own.
    """
    for _ in range(steps):
        moving = [i for i, p in enumerate(params) if p.requires_grad]
        grads = torch.autograd.grad(
            loss(forward(params, x), y).sum(), [params[i] for i in moving], create_graph=create_graph
        )
        params = list(params)
        for i, g in zip(moving, grads):
            params[i] = params[i] - rates[i] * g
    return params


class MAML(nn.Module):
    """Learn initial weights from which a few gradient steps on the support set classify the query set. (eq-maml-outer)

    Batch norm always uses the statistics of the batch at hand, support and query apart, also at test time: the
    queries of a task share them, so predictions are transductive (reference code, not in the paper).

    Args:
        network: `Conv4`, `MLP`, `LinearHead` or `resnet.ResNet` with a head: it has `way`, `tensors(way)`, the masks
            `norm_mask()` and `head_mask()` of these, and ``forward_tasks(params, x [T, n, ...]) -> [T, n, N]``. Tasks
            of fewer ways use the head's first outputs (CACTUs, App. E.1).
        inner_lr: step size of adaptation; inner_steps: steps in training; test_steps: steps in `predict`.
        inner_loss: "sum" over the support set divided by K, which is N times the mean (reference code, not in the
            paper: the published numbers were made with it), or "mean".
        first_order: treat inner gradients as constants.
        adapt_norm: adapt batch norm's scale and shift too (LASIUM); otherwise they are meta-learned only (CACTUs).
        meta_sgd: learn one rate per weight, all starting at inner_lr (Li et al., 2017).
        anil: adapt the head only (Raghu et al., 2020).
    """

    def __init__(
        self,
        network: nn.Module,
        inner_lr=0.05,
        inner_steps=5,
        test_steps=50,
        *,
        inner_loss="sum",
        first_order=False,
        adapt_norm=False,
        meta_sgd=False,
        anil=False,
    ):
        super().__init__()
        one_of("inner_loss", inner_loss, ("sum", "mean"))
        if network.way is None:
            raise ValueError("MAML adapts a classifier: give the network a head with way=...")
        self.network = network
        self.inner_lr, self.inner_steps, self.test_steps = inner_lr, inner_steps, test_steps
        self.inner_loss, self.first_order = inner_loss, first_order
        adapted = [
            (adapt_norm or not norm) and (head or not anil) and t.requires_grad
            for t, norm, head in zip(network.tensors(), network.norm_mask(), network.head_mask())
        ]
        self.adapted = adapted
        self.rates = None
        if meta_sgd:
            self.rates = nn.ParameterList(
                nn.Parameter(torch.full_like(t, inner_lr * a), requires_grad=a)
                for t, a in zip(network.tensors(), adapted)
            )

    def _rates(self, way: int) -> list:
        if self.rates is None:
            return [float(self.inner_lr) if a else 0.0 for a in self.adapted]
        return [rate[:way] if head else rate for rate, head in zip(self.rates, self.network.head_mask())]

    def _weight(self, episodes: Episodes) -> float:
        """What one support image counts in the inner loss. (eq-maml-scale)"""
        return 1 / episodes.shot if self.inner_loss == "sum" else 1 / (episodes.shot * episodes.way)

    def loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Mean query cross-entropy ``[T]`` and accuracy ``[T]`` after adaptation, differentiable once.

        Uses the written-out derivatives of `fast_conv4` where they apply, else `loss_reference`.
        """
        if not isinstance(self.network, Conv4):
            return self.loss_reference(episodes)
        start = self.network.tensors(episodes.way)
        rates = self._rates(episodes.way)
        learned = rates if self.rates is not None else []
        losses, logits = _MetaLoss.apply(self, episodes, rates, *start, *learned)
        return losses, accuracy(logits, episodes.labels)

    def loss_reference(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The same by automatic differentiation through every inner step, for any network."""
        xs, ys, xq, yq = episodes.flat()
        start = [p.expand(episodes.tasks, *p.shape) for p in self.network.tensors(episodes.way)]
        scale = self._weight(episodes) * ys.shape[1]
        rates = self._rates(episodes.way)
        params = adapt(
            self.network.forward_tasks,
            start,
            rates,
            xs,
            ys,
            self.inner_steps,
            lambda out, y: scale * cross_entropy(out, y),
            create_graph=not self.first_order,
        )
        logits = self.network.forward_tasks(params, xq)
        return cross_entropy(logits, yq), accuracy(logits.detach(), yq)

    def predict(self, episodes: Episodes) -> Tensor:
        """Query logits ``[T, N*Q, N]`` after `test_steps` steps on the support set."""
        return self.predict_curve(episodes, [self.test_steps])[0]

    @torch.no_grad()
    def predict_curve(self, episodes: Episodes, at: list[int]) -> Tensor:
        """Query logits ``[len(at), T, N*Q, N]`` after each number of steps in `at` (ascending, 0 allowed).

        ValueError: `at` is empty or not ascending.
        """
        ascending(at)
        rates = self._rates(episodes.way)
        start = self.network.tensors(episodes.way)
        if not isinstance(self.network, Conv4):
            return self._predict_curve_reference(start, rates, episodes, at)
        return torch.cat(_over_chunks(self.network, episodes, lambda e: _InnerLoop(self, e, start, rates).curve(at)), 1)

    def _predict_curve_reference(self, start, rates, episodes, at) -> Tensor:
        xs, ys, xq, _ = episodes.flat()
        scale, curve, done = self._weight(episodes) * ys.shape[1], [], 0
        params = [p.detach().expand(episodes.tasks, *p.shape).clone().requires_grad_() for p in start]
        for step in at:
            with torch.enable_grad():
                params = adapt(
                    self.network.forward_tasks,
                    params,
                    rates,
                    xs,
                    ys,
                    step - done,
                    lambda out, y: scale * cross_entropy(out, y),
                    create_graph=False,
                )
            done, params = step, [p.detach().requires_grad_() for p in params]
            curve.append(self.network.forward_tasks(params, xq).detach())
        return torch.stack(curve)


def _descend(p: Tensor, rate: float | Tensor, g: Tensor) -> Tensor:
    """p - rate * g in one pass over memory; p itself where the rate is 0."""
    if isinstance(rate, float):
        return torch.sub(p, g, alpha=rate) if rate else p
    return torch.addcmul(p, rate, g, value=-1)


class _InnerLoop:
    """SGD on the support sets of T tasks with analytic gradients; weights are laid out in groups (see `fast_conv4`)."""

    def __init__(self, maml: MAML, episodes: Episodes, start: list[Tensor], rates: list):
        net = maml.network
        self.maml, self.tasks, self.way = maml, episodes.tasks, episodes.way
        self.geometry = dataclasses.replace(net.geometry, tasks=self.tasks)
        xs, ys, xq, yq = episodes.flat()
        net.check_images(xs)
        self.xs, self.xq = to_groups(xs), to_groups(xq)
        self.ys, self.yq = (F.one_hot(y, self.way).to(xs.dtype) for y in (ys, yq))
        self.weight = maml._weight(episodes)
        self.moments = PatchMoments(self.xs, self.geometry)
        self.params = [self._repeat(p, i) for i, p in enumerate(start)]
        self.rates = [r if isinstance(r, float) else self._repeat(r, i) for i, r in enumerate(rates)]
        self.path: list[tuple[TaskNets, list[Tensor]]] = []

    def _repeat(self, p: Tensor, i: int) -> Tensor:
        """Shared ``[...]`` -> one copy per task: ``[T*F, ...]`` in the body, ``[T, ...]`` in the head (last two)."""
        p = p.detach()
        if i >= 3 * self.maml.network.blocks:
            return p.repeat(self.tasks, *[1] * p.dim())
        p = p.repeat(self.tasks, *[1] * (p.dim() - 1))
        return p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p

    def per_task(self, i: int, g: Tensor) -> Tensor:
        """A gradient in the grouped layout as ``[T, ...]``."""
        return g if i >= 3 * self.maml.network.blocks else g.unflatten(0, (self.tasks, -1))

    def nets(self, onehot: Tensor, weight: float, moments: PatchMoments | None) -> TaskNets:
        net = self.maml.network
        return TaskNets(self.geometry, net.blocks, Head(onehot, weight, net.average), moments)

    def step(self, keep: bool) -> None:
        """One inner step; `keep` remembers what the way back needs."""
        nets = self.nets(self.ys, self.weight, self.moments)
        nets.losses(self.params, self.xs)
        grads = nets.gradient()
        if keep:
            self.path.append((nets, grads))
        self.params = [_descend(p, r, g) for p, r, g in zip(self.params, self.rates, grads)]

    def curve(self, at: list[int]) -> Tensor:
        """Query logits ``[len(at), T, N*Q, N]`` after each number of steps in `at`."""
        logits = []
        for step in range(at[-1] + 1):
            if step in at:
                nets = self.nets(self.yq, 1 / self.yq.shape[1], None)
                nets.losses(self.params, self.xq)
                logits.append(nets.head.logits)
            if step < at[-1]:
                self.step(keep=False)
        return torch.stack(logits)

    def meta_gradient(self) -> list[Tensor]:
        """Losses ``[T]``, query logits, and each task's gradients ``[T, ...]`` for the start weights and learned rates.

        Backward through ``p_{k+1} = p_k - rate * g(p_k)``, with v the gradient for p_{k+1}: the gradient for p_k is
        ``v - H(p_k) (rate * v)`` and that for the rate is ``-g(p_k) * v``. A weight with rate 0 is not adapted, and the
        same formula gives its meta-gradient. (eq-maml-hypergradient)
        """
        maml = self.maml
        for _ in range(maml.inner_steps):
            self.step(keep=True)
        nets = self.nets(self.yq, 1 / self.yq.shape[1], None)
        losses = nets.losses(self.params, self.xq)
        v, rate_grads = nets.gradient(), None
        while self.path:
            nets_k, grads = self.path.pop()
            if maml.rates is not None:
                here = torch._foreach_mul(grads, v)
                rate_grads = here if rate_grads is None else torch._foreach_add(rate_grads, here)
            if not maml.first_order:
                torch._foreach_sub_(v, nets_k.hessian_vector(torch._foreach_mul(v, self.rates)))
        grads = [*v, *(-g for g in rate_grads or [])]
        return [losses, nets.head.logits, *(self.per_task(i % len(v), g) for i, g in enumerate(grads))]


def _over_chunks(net: Conv4, episodes: Episodes, f: Callable) -> list:
    """f of chunks of tasks, in order. One chunk, but on the CPU, where the first map of a single task fills the cache,
    one task each, on as many Python threads as torch has, one core to a thread."""
    first_map = episodes.way * episodes.shot * net.weights[0].shape[0] * (net.size // net.geometry.stride) ** 2 * 4
    if episodes.support.device.type != "cpu" or first_map < CACHE_BYTES:
        return [f(episodes)]
    chunks = [episodes[i : i + 1] for i in range(len(episodes))]
    threads = torch.get_num_threads()
    if threads == 1:
        return [f(c) for c in chunks]
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        results = list(pool.map(torch.no_grad()(f), chunks))
    torch.set_num_threads(threads)  # the matrix library keeps one setting for the whole process
    return results


class _MetaLoss(torch.autograd.Function):
    """The meta-loss with its analytic gradient, so that `loss(...)` has a backward as for any other learner."""

    @staticmethod
    def forward(ctx, maml, episodes, rates, *tensors):
        start = tensors[: len(rates)]
        parts = _over_chunks(maml.network, episodes, lambda e: _InnerLoop(maml, e, start, rates).meta_gradient())
        losses, logits, *ctx.grads = (torch.cat(chunks) for chunks in zip(*parts))
        ctx.mark_non_differentiable(logits)
        return losses, logits

    @staticmethod
    def backward(ctx, gout, _):
        if torch.is_grad_enabled():
            raise RuntimeError("MAML.loss can be differentiated once; MAML.loss_reference is for more")
        return None, None, None, *[torch.einsum("t,t...->...", gout, g) for g in ctx.grads]
