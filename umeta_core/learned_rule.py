"""A learned, label-free update rule: the network it trains, one application of the rule, and the meta-objective.

Metz et al. 2019, "Learning Unsupervised Learning Rules". Where the paper's appendix G and the released code differ,
the code is taken: its weights are the published ones. Tensors have a leading axis of tasks T; B is the size of an
unlabeled batch, L the number of layers, N_l the width of layer l, and N_L the size of the embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .fast_rule import ConvNormRelu, shifted_sum
from .networks import truncated_normal_
from .storage import load_tensors, save_tensors

EMBEDDING = 32  # N_L; theta is tied to it, and to nothing else of the network that it trains
LOW_RANK = 4  # R, channels of a low-rank readout (reference code; the paper gives no number)
PLANES = (
    "0_order", "1_order", "decorr_x", "hebb", "large_decay", "lin_lower_symm", "lin_upper_psd", "lin_upper_symm",
    "rbf", "sqr_lower_symm", "sqr_upper_symm", "w_base",
)  # fmt: skip
NOT_IN_PAPER = ("lin_upper_psd", "decorr_x")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "step": lambda z: (z > 0).to(z.dtype),
}


@dataclass(frozen=True)
class RuleSize:
    """Channels inside the rule: of the error signal (C_d), of the hidden state (C_h) and of topD (C_t)."""

    delta: int = 32
    hidden: int = 64
    top: int = 64


SIZES = {"full": RuleSize(), "medium": RuleSize(16, 32, 32), "small": RuleSize(8, 16, 16)}


class Phi(NamedTuple):
    """What the rule trains: weights ``[T, N_{l-1}, N_l]``, biases ``[T, N_l]``, backward weights shaped as weights."""

    w: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Phi:
        """The same with every tensor replaced."""
        return Phi(*(tuple(function(tensor) for tensor in part) for part in self))

    def tensors(self) -> list[Tensor]:
        return [*self.w, *self.b, *self.v]


def initial_phi(tasks: int, widths: tuple[int, ...], generator: torch.Generator, dtype=torch.float32) -> Phi:
    """Fresh networks of `widths` N_0, ..., N_L: truncated normal, std 0.01 for weights and 0.1 for biases (code).

    Raises:
        ValueError: N_L is not 32, which theta is made for.
    """
    if len(widths) < 2 or widths[-1] != EMBEDDING:
        raise ValueError(f"widths {widths}: the last layer must have {EMBEDDING} units, which the rule is made for")

    def normal(*shape, std):
        x = torch.empty(shape, dtype=dtype, device=generator.device)
        return truncated_normal_(x, std, generator)

    pairs = list(zip(widths, widths[1:]))
    return Phi(
        tuple(normal(tasks, n, m, std=0.01) for n, m in pairs),
        tuple(normal(tasks, m, std=0.1) for _, m in pairs),
        tuple(normal(tasks, n, m, std=0.01) for n, m in pairs),
    )


def run_network(phi: Phi, x: Tensor, activation: str = "relu") -> tuple[list[Tensor], list[Tensor]]:
    """Activations x^0..x^L after and z^0..z^L before the nonlinearity, each ``[T, B, N_l]``; z^0 is x^0.

    The base model of Metz et al., App. G (eq-rule-forward): batch norm with the batch's own statistics, always, with a
    shift and no scale; a nonlinearity also on the embedding x^L. ValueError: no such nonlinearity.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are: {', '.join(ACTIVATIONS)}")
    xs, zs = [x], [x]
    for w, b in zip(phi.w, phi.b):
        z = xs[-1] @ w
        var, mean = torch.var_mean(z, 1, correction=0, keepdim=True)
        zs.append((z - mean) * torch.rsqrt(var + 1e-6) + b[:, None])
        xs.append(ACTIVATIONS[activation](zs[-1]))
    return xs, zs


class UpdateRule(nn.Module):
    """phi' = Update(phi, x; theta): every weight changes by what the rule reads off its two neurons.

    Args:
        size: "full" (114,670 numbers, as published), "medium" or "small".
        lr: inner step size lambda; 3e-4 in the paper, 1e-4 in the code.
        planes: "code" (twelve) or "paper" (ten: without the PSD and the decorrelation plane).
        guard: share of the normalized weights taken off every update; 1/7 in the code, 0 in the paper.

    Raises:
        ValueError: unknown size or planes.
    """

    def __init__(self, size: str = "full", lr: float = 3e-4, planes="code", guard=1 / 7, generator=None):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r} of the rule: choose from {', '.join(SIZES)}")
        if planes not in ("code", "paper"):
            raise ValueError(f"unknown planes {planes!r}: choose code (twelve) or paper (ten)")
        self.about: dict = {}
        self.config = {"size": size, "lr": lr, "planes": planes, "guard": guard}
        self.lr, self.guard = lr, guard
        self.planes = tuple(p for p in PLANES if planes == "code" or p not in NOT_IN_PAPER)
        c, g = SIZES[size], generator or torch.Generator().manual_seed(0)
        self.top = nn.ModuleList([
            ConvNorm(5, 1, c.top, g), ConvNorm(3, EMBEDDING, EMBEDDING, g), ConvNorm(3, EMBEDDING, EMBEDDING, g),
            ConvNorm(3, c.top, c.top, g), ConvNorm(3, c.top, c.top, g),
        ])  # fmt: skip
        self.top_out = Conv(3, c.top, c.delta, g)
        self.shift = nn.Parameter(torch.zeros(4 + c.delta))
        self.units = nn.ModuleList([ConvNorm(3, c.hidden, c.hidden, g) for _ in range(4)])
        self.examples = nn.ModuleList([ConvNorm(3, 13 + c.delta, c.hidden, g), ConvNorm(3, c.hidden, c.hidden, g)])
        self.to_delta = Conv(1, c.hidden, c.delta, g)
        self.to_bias = Conv(1, c.hidden, 1, g)
        paper = planes == "paper"
        self.to_upper = Conv(1, c.hidden, (7 if paper else 8) * LOW_RANK, g)
        self.to_lower = Conv(1, c.hidden, 7 * LOW_RANK, g)
        self.merge = nn.Parameter(torch.full((len(self.planes),), 0.1))
        self.merge_shift = nn.Parameter(torch.zeros(()))

    def top_error(self, x: Tensor) -> Tensor:
        """topD: the first error signal d^L ``[T, N_L, B, C_d]`` from the embedding x^L ``[T, N_L, B]`` (App. 65-79)."""
        y = self.top[0](x[..., None], along=2)
        y = y.permute(0, 3, 2, 1)  # the units become the channels: here they are mixed densely
        y = self.top[2](self.top[1](y, along=2), along=2)
        y = y.permute(0, 3, 2, 1)
        return self.top_out(self.top[4](self.top[3](y, along=2), along=2), along=2)

    def hidden(self, d: Tensor, x: Tensor, z: Tensor, b: Tensor, below: Tensor | None, above: Tensor | None) -> Tensor:
        """computeH: the state h^l ``[T, N_l, B, C_h]`` of every neuron on every example (App. 80-104).

        d: ``[T, N_l, B, C_d]``; x, z: ``[T, N_l, B]``; b: ``[T, N_l]``; below: W^l or None at the input; above:
        W^{l+1} or None at the embedding.
        """
        tasks, units, batch = x.shape
        place = torch.linspace(0, 4 * math.pi, units, dtype=x.dtype, device=x.device)[:, None].expand_as(x)
        own = torch.cat([torch.stack([x, z, place.sin(), place.cos()], -1), d], -1)
        own = normalize(own) + self.shift
        known = [weight_statistics(below, 1)] if below is not None else []
        known += [weight_statistics(above, 2)] if above is not None else []
        weights = torch.cat(known * (3 - len(known)), -1)
        weights = weights * torch.rsqrt(weights.square().mean((1, 2), keepdim=True) + 1e-6)
        shared = torch.cat([weights, b[..., None]], -1)[:, :, None].expand(tasks, units, batch, 9)
        y = self.examples[0](torch.cat([shared, own], -1), along=2)
        y = y + self.units[1](self.units[0](y, along=1), along=1)
        y = self.examples[1](y, along=2)
        return y + self.units[3](self.units[2](y, along=1), along=1)

    def states(self, phi: Phi, xs: list[Tensor], zs: list[Tensor]) -> list[Tensor]:
        """h^0..h^L from the top down (eq-rule-delta): the error runs through V, and each layer adds to it.

        The error is normalized over its channels for every neuron and example (reference code; App. 35 has one norm
        for the whole tensor).
        """
        depth = len(phi.w)
        x, z = ([each.transpose(1, 2) for each in part] for part in (xs, zs))
        d, states = self.top_error(x[-1]), []
        for layer in range(depth, -1, -1):
            b = phi.b[layer - 1] if layer else torch.zeros_like(x[0][..., 0])
            below, above = (phi.w[layer - 1] if layer else None), (phi.w[layer] if layer < depth else None)
            states.insert(0, self.hidden(d, x[layer], z[layer], b, below, above))
            if layer:
                delta = d * z[layer].sigmoid()[..., None] + self.to_delta(states[0], along=2)
                d = (phi.v[layer - 1] @ delta.flatten(2)).unflatten(2, delta.shape[2:])
                d = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + 1e-6)
        return states

    def weight_planes(self, w: Tensor, h: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The candidate changes ``[T, N_{l-1}, N_l]`` of one layer by name (App. 44-57) (eq-rule-planes).

        w: normalized weights; h: states of the lower and the upper layer; x: their activations ``[T, B, N]``.
        """
        lower = self.to_lower(h[0], along=2).unflatten(-1, (-1, LOW_RANK)).unbind(-2)
        upper = self.to_upper(h[1], along=2).unflatten(-1, (-1, LOW_RANK)).unbind(-2)
        soft = torch.sqrt(1 + w.square()) - 1
        x_low, x_up = standardize(x[0]), standardize(x[1])
        planes = {
            "w_base": w,
            "large_decay": w * w.abs(),
            "0_order": low_rank(lower[0], upper[0]),
            "rbf": torch.exp(-w.square()) * low_rank(lower[1], upper[1]),
            "1_order": w * low_rank(lower[2], upper[2]),
            "hebb": -x_low.transpose(1, 2) @ x_up / x_low.shape[1],
            "lin_lower_symm": symmetric(lower[3], lower[4]) @ w,
            "sqr_lower_symm": w.sign() * (symmetric(lower[5], lower[6]) @ soft),
            "lin_upper_symm": w @ symmetric(upper[3], upper[4]),
            "sqr_upper_symm": w.sign() * (soft @ symmetric(upper[5], upper[6])),
        }
        if "decorr_x" in self.planes:
            units = w.shape[2]
            q = w @ (x_up.transpose(1, 2) @ x_up / (x_up.shape[1] * math.sqrt(units)))
            planes["decorr_x"] = q * torch.rsqrt(q.square().mean((1, 2), keepdim=True) + 1e-8)
            planes["lin_upper_psd"] = w @ low_rank(upper[7], upper[7]) / math.sqrt(units)
        return planes

    def merged(self, w: Tensor, planes: dict[str, Tensor]) -> Tensor:
        """One change from all planes (App. 59-62) (eq-rule-merge): a weighted mean, from which is taken off what
        would shrink the matrix as a whole (App. 61), before its columns are bounded (App. 62)."""
        n = len(self.planes)
        change = sum(m * bounded(planes[name]) for m, name in zip(self.merge, self.planes))
        change = (change + self.merge_shift) / n
        change = change - w * F.relu((change * w).mean((1, 2), keepdim=True))
        return bounded(change / math.sqrt(n)) - self.guard * w

    def bias_change(self, h: Tensor) -> Tensor:
        """``[T, N_l]``: the mean bias is never pushed up, and the change is bounded (App. 63-64, reference code)."""
        change = self.to_bias(h.mean(2, keepdim=True), along=2)[:, :, 0, 0]
        change = change - change.mean(1, keepdim=True).clamp(max=0)
        return change * torch.rsqrt(0.5 + change.square().mean(1, keepdim=True))

    def step(self, phi: Phi, x: Tensor, activation: str = "relu") -> Phi:
        """One application of the rule to unlabeled x ``[T, B, N_0]`` (eq-rule-step).

        Backward weights get the change of the forward weights (reference code), so that V becomes W's copy.
        """
        xs, zs = run_network(phi, x, activation)
        states, new = self.states(phi, xs, zs), ([], [], [])
        for layer, (w, b, v) in enumerate(zip(*phi)):
            unit = normalized_weights(w)
            between = slice(layer, layer + 2)
            change = self.merged(unit, self.weight_planes(unit, states[between], xs[between]))
            changes = (change, self.bias_change(states[layer + 1]), change)
            for part, old, c in zip(new, (w, b, v), changes):
                part.append((1 - self.lr) * old - self.lr * c)
        return Phi(*map(tuple, new))

    def forward(self, phi: Phi, xs: Tensor, activation: str = "relu", recompute: bool = False) -> Phi:
        """Steps on batches xs ``[T, U, B, N_0]``. recompute: keep only phi of each step and run it again backward."""
        for x in xs.unbind(1):
            if recompute:
                phi = checkpoint(self.step, phi, x, activation, use_reentrant=False, preserve_rng_state=False)
            else:
                phi = self.step(phi, x, activation)
        return phi

    def save(self, path: str | Path, **about) -> None:
        """Write theta and how it was made."""
        # Through JSON, since torch.__version__ is a class that a safe reader refuses.
        state = {"config": self.config, "theta": self.state_dict(), "about": json.loads(json.dumps(about))}
        save_tensors(state, path)

    @classmethod
    def restore(cls, path: str | Path) -> UpdateRule:
        """The rule in a file that `save` wrote. Raises ValueError if it is no such file."""
        try:
            state = load_tensors(path, "update rule")
            rule = cls(**state["config"])
            rule.load_state_dict(state["theta"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(f"{path} does not hold an update rule; save one with UpdateRule.save") from None
        rule.about = state["about"]
        return rule

    @classmethod
    def pretrained(cls) -> UpdateRule:
        """The rule that this project meta-trained; `about` says on what and for how long."""
        return cls.restore(Path(__file__).with_name("pretrained") / "update_rule.pt")

    @torch.no_grad()
    def fit(self, x: Tensor, steps: int = 200, hidden=(32, 32), batch: int = 32, seed: int = 0, activation="relu"):
        """Train a fresh network on rows x ``[n, N_0]`` (uint8, or floats in 0..1; tensor or array) without labels.

        The batch is that of the meta-training of `pretrained`.

        Returns:
            a `Trained` network: ``features(x) -> [n, 32]``.

        Raises:
            ValueError: x is no matrix, has fewer rows than a batch, or has numbers that are not finite or beyond 0..1.
        """
        x = torch.as_tensor(x)
        if x.ndim != 2 or len(x) < batch:
            raise ValueError(f"x has shape {tuple(x.shape)}: give a matrix of at least {batch} rows or a smaller batch")
        low, high = (float(edge) for edge in as_float(x).aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"x has numbers from {low:g} to {high:g}: scale it to 0..1, or give bytes as uint8")
        g = torch.Generator(device=x.device).manual_seed(seed)
        phi = initial_phi(1, (x.shape[1], *hidden, EMBEDDING), g)
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,), generator=g, device=x.device)
            phi = self.step(phi, as_float(x[rows])[None], activation)
        return Trained(phi, activation)


class Trained(NamedTuple):
    """A network that a rule has trained."""

    phi: Phi
    activation: str

    def features(self, x: Tensor) -> Tensor:
        """The embedding ``[n, 32]`` of rows x ``[n, N_0]``, as in `fit`, with batch norm over these n rows together.

        ValueError: fewer than two rows, of which batch norm would leave nothing.
        """
        x = torch.as_tensor(x)
        if len(x) < 2:
            raise ValueError("features of fewer than two rows: batch norm needs others beside it, give them together")
        return run_network(self.phi, as_float(x)[None], self.activation)[0][-1][0]


def as_float(x: Tensor) -> Tensor:
    """Pixels of 0..255 as 0..1; other numbers as they are, in float32."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


# The parts of the rule


class Conv(nn.Module):
    """Convolution with zero padding along one axis of ``[T, N, B, C]``, as one matrix product and shifted sums."""

    def __init__(self, width: int, inputs: int, outputs: int, generator: torch.Generator):
        super().__init__()
        std = 1 / math.sqrt(width * inputs)
        weight = torch.empty(inputs, width, outputs)
        self.weight = nn.Parameter(truncated_normal_(weight, std, generator))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, along: int) -> Tensor:
        if self.weight.shape[1] == 1:
            return x @ self.weight[:, 0] + self.bias
        return shifted_sum((x @ self.weight.flatten(1)).unflatten(-1, self.weight.shape[1:]), along) + self.bias


class ConvNorm(Conv):
    """Convolution, batch norm with a shift and no scale, ReLU."""

    def __init__(self, width: int, inputs: int, outputs: int, generator: torch.Generator):
        super().__init__(width, inputs, outputs, generator)
        self.bias.requires_grad_(False)  # the norm takes it off again; theta has it as the published one does
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, along: int) -> Tensor:
        return ConvNormRelu.apply(x, self.weight, self.shift, along)

    def reference(self, x: Tensor, along: int) -> Tensor:
        """The same in plain operations."""
        return F.relu(normalize(super().forward(x, along)) + self.shift)


def normalize(x: Tensor) -> Tensor:
    """Batch norm inside the rule: over neurons and examples of one task, for each channel of ``[T, N, B, C]``."""
    var, mean = torch.var_mean(x, (1, 2), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-3)


def weight_statistics(w: Tensor, over: int) -> Tensor:
    """Four numbers ``[T, N, 4]`` about the weights of each neuron: mean size, root mean square, mean, deviation."""
    var, mean = torch.var_mean(w, over, correction=0)
    return torch.stack(
        [w.abs().mean(over), (w.square().mean(over) + 1e-6).sqrt(), mean, (var + 1e-8).sqrt()], -1
    )  # fmt: skip


def normalized_weights(w: Tensor) -> Tensor:
    """W with root mean square 1 over the inputs of each neuron (App. 43) (eq-rule-normalized)."""
    return w * torch.rsqrt(w.square().mean(1, keepdim=True) + 1e-6)


def bounded(x: Tensor) -> Tensor:
    """x / sqrt(1 + mean square over the inputs of each neuron): large changes to size 1, small ones as they are."""
    return x * torch.rsqrt(1 + x.square().mean(1, keepdim=True))


def standardize(x: Tensor) -> Tensor:
    """Activations ``[T, B, N]`` minus their mean over the batch, over the root of their mean square."""
    return (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


def low_rank(lower: Tensor, upper: Tensor) -> Tensor:
    """``[T, N_lower, N_upper]``: products of readouts ``[T, N, B, R]``, mean over examples and channels (App. 42)."""
    return lower.flatten(2) @ upper.flatten(2).transpose(1, 2) / (lower.shape[2] * lower.shape[3])


def symmetric(top: Tensor, bottom: Tensor) -> Tensor:
    """S ``[T, N, N]``: the low-rank product of a layer with itself, symmetric, nothing on the diagonal."""
    u = low_rank(bottom, top)
    s = (u + u.transpose(1, 2)) / math.sqrt(2 * u.shape[1])
    return s - torch.diag_embed(s.diagonal(dim1=1, dim2=2))


# The meta-objective


class Readout(NamedTuple):
    """Loss and accuracy ``[...]`` of a ridge regression from features to labels."""

    loss: Tensor
    accuracy: Tensor


def ridge_readout(features: Tensor, labels: Tensor, classes: int, extra: Tensor | None = None, ridge=0.1) -> Readout:
    """Fit on one half of the examples, measure on the other (App. 18-28) (eq-rule-ridge).

    features: ``[..., 2, K, n]``, halves a and b; labels: ``[..., 2, K]``; extra: more targets ``[..., 2, K, r]``, for
    example a known rotation. The bias is not penalized; the loss includes the ridge's penalty (reference code).
    """
    y = F.one_hot(labels, classes).to(features.dtype)
    y = y if extra is None else torch.cat([y, extra], -1)
    y = y - y.mean((-2, -1), keepdim=True)
    y = y * torch.rsqrt(y.square().sum(-1).mean(-1)[..., None, None])
    ones = torch.ones_like(features[..., :1])
    a, b = torch.cat([features, ones], -1).unbind(-3)
    penalty = torch.full((a.shape[-1],), ridge, dtype=a.dtype, device=a.device)
    penalty[-1] = 0
    gram = a.mT @ a + penalty.diag()
    w = torch.linalg.solve(gram, a.mT @ y[..., 0, :, :])
    p = b @ w
    p = p * torch.rsqrt(p.square().sum(-1, keepdim=True) + 1e-12)
    k = labels.shape[-1]
    loss = (p - y[..., 1, :, :]).square().sum((-2, -1)) / k + ridge / k * w[..., :-1, :].square().sum((-2, -1))
    right = p[..., :classes].argmax(-1) == labels[..., 1, :]
    return Readout(loss, right.to(features.dtype).mean(-1))


def meta_objective(phi: Phi, x: Tensor, labels: Tensor, classes: int, extra=None, activation="relu") -> Readout:
    """Loss and accuracy ``[T]`` of networks phi on labeled x ``[T, D, 2, K, N_0]``, averaged over the D draws.

    Both halves of a draw go through the network together, so they share their batch norm (reference code).
    """
    tasks, draws, _, k, n = x.shape
    many = phi.map(lambda p: p.repeat_interleave(draws, 0))
    u = run_network(many, x.reshape(tasks * draws, 2 * k, n), activation)[0][-1]
    done = ridge_readout(u.view(tasks, draws, 2, k, -1), labels, classes, extra)
    return Readout(done.loss.mean(1), done.accuracy.mean(1))
