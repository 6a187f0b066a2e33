"""LEO's regression experiment: a whole network for a noisy sine or line, generated from one latent code per task.

Five noisy points can look like a sine and like a line. LEO samples a code and weights, so it can answer with both
(LEO, Sec. 4.1, App. A; no code was released). How often a perfect sampler would do so is known here: `ExactPosterior`
integrates over every line and sine that a task can have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .leo import LEO, deviation, divergence
from .networks import glorot_uniform

WIDTH = 40  # hidden units of the generated network 1-40-40-1
LAYOUT = (WIDTH, WIDTH, WIDTH * WIDTH, WIDTH, WIDTH, 1)  # its weights and biases, layer by layer
WEIGHTS = sum(LAYOUT)  # 1761
CHUNK = 1024  # sampled functions adapted together: about 150 megabytes
X_MAX, AMPLITUDE, PHASE, SLOPE = 5.0, (0.1, 5.0), (0.0, math.pi), (-3.0, 3.0)  # slope and intercept: the same range


@dataclass
class Regression:
    """T regression tasks: support ``[T, K]``, queries ``[T, Q]``, and the truth behind them.

    ``line`` ``[T]`` is True for lines; ``coefficients`` ``[T, 2]`` are those of the `basis` of the family. `generator`
    is the one that drew the tasks: a learner that samples draws on from it, so one seed fixes a run.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    line: Tensor
    coefficients: Tensor
    generator: torch.Generator

    def __len__(self) -> int:
        return len(self.line)

    def __getitem__(self, tasks) -> Regression:
        """The tasks of a slice or an index tensor."""
        parts = (self.support_x, self.support_y, self.query_x, self.query_y, self.line, self.coefficients)
        return Regression(*(p[tasks] for p in parts), self.generator)

    def curve(self, x: Tensor) -> Tensor:
        """The functions without noise ``[T, n]`` at x ``[T, n]`` or ``[n]``."""
        lines, sines = ((basis(x, line) * self.coefficients.unsqueeze(1)).sum(-1) for line in (True, False))
        return torch.where(self.line.unsqueeze(1), lines, sines)


def basis(x: Tensor, line: bool) -> Tensor:
    """``(x, 1)`` for lines and ``(sin x, cos x)`` for sines, ``[..., 2]``: both families are linear in two numbers.

    ``a sin(x - phi)`` has the coefficients ``(a cos phi, -a sin phi)``.
    """
    return torch.stack([x, torch.ones_like(x)] if line else [x.sin(), x.cos()], -1)


class RegressionTasks:
    """Noisy sines and lines in equal proportion, inputs uniform in [-5, 5] (LEO, App. A.1).

    Sines are ``a sin(x - phi)`` with a in [0.1, 5] and phi in [0, pi] (the sign and the frequency 1 are those of MAML's
    code; the paper names the tasks of Finn et al. 2018); lines have slope and intercept in [-3, 3]; all uniform.

    Args:
        noise: standard deviation of the targets, support and query alike.
    """

    def __init__(self, noise: float = 0.3):
        self.noise = noise

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Regression:
        """Draw `tasks` tasks; `way` is there for `training.train` and has no meaning here."""
        device, points = generator.device, shot + query
        line = torch.rand(tasks, generator=generator, device=device) < 0.5
        u = torch.rand(tasks, 2 + points, generator=generator, device=device)
        coefficients = torch.where(line.unsqueeze(1), _line(u[:, :2]), _sine(u[:, :2]))
        x = X_MAX * (2 * u[:, 2:] - 1)
        none = x[:, :0]
        y = Regression(none, none, none, none, line, coefficients, generator).curve(x)
        y = y + self.noise * torch.randn(y.shape, generator=generator, device=device)
        return Regression(x[:, :shot], y[:, :shot], x[:, shot:], y[:, shot:], line, coefficients, generator)


def _line(u: Tensor) -> Tensor:
    """Slope and intercept from u ``[..., 2]`` in [0, 1]."""
    return SLOPE[0] + (SLOPE[1] - SLOPE[0]) * u


def _sine(u: Tensor) -> Tensor:
    """``(a cos phi, -a sin phi)`` from u ``[..., 2]`` in [0, 1]."""
    a = AMPLITUDE[0] + (AMPLITUDE[1] - AMPLITUDE[0]) * u[..., 0]
    phi = PHASE[0] + (PHASE[1] - PHASE[0]) * u[..., 1]
    return torch.stack([a * phi.cos(), -a * phi.sin()], -1)


class Noise(NamedTuple):
    """Standard normal draws of one adaptation: for the code ``[T, 16]``, for each decoding ``[steps + 1, T, 1761]``."""

    code: Tensor
    weights: Tensor


class LEORegression(nn.Module):
    """LEO with one code for the task and a generated 1-40-40-1 ReLU network with biases (LEO, App. A.2).

    Encoder, relation network and decoder are three-layer ReLU networks without biases, the last layer linear. Codes and
    weights are sampled in training and in evaluation, the weights anew at every decoding. The paper gives the sizes
    only; steps, rates, loss weights and standard deviations are ours.

    Args:
        hidden: units of every hidden layer (the paper's Table 3 has 16 in the encoder, its text 32 everywhere); latent:
            size of the code.
        latent_steps: latent gradient steps on the mean squared error of the support set; no fine-tuning.
        latent_lr: start of the learned rates, one per latent dimension.
        inner_clip: bound on the norm of each task's latent gradient. Without it the rates grow until single tasks
            diverge.
        kl: weight of KL(q(z) || N(0, I)), a one-sample estimate, mean over the dimensions, as in the released code
            for classification.
        encoder_penalty: weight of the encoder penalty, mean over the dimensions.
        code_offset, weight_offset: standard deviations where the network says 0, see `leo.deviation`.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        hidden: int = 32,
        latent: int = 16,
        latent_steps: int = 5,
        latent_lr: float = 0.02,
        *,
        inner_clip: float = 5.0,
        kl: float = 0.05,
        encoder_penalty: float = 1e-4,
        code_offset: float = 0.1,
        weight_offset: float = 0.02,
        generator: torch.Generator | None = None,
    ):
        super().__init__()

        def matrices(*sizes):
            return nn.ParameterList(nn.Parameter(glorot_uniform(s, generator)) for s in zip(sizes, sizes[1:]))

        self.encoder = matrices(2, hidden, hidden, latent)
        self.relation = matrices(2 * latent, hidden, hidden, 2 * latent)
        self.decoder = matrices(latent, hidden, hidden, 2 * WEIGHTS)
        self.rates = nn.Parameter(torch.full((latent,), latent_lr))
        self.latent_steps, self.inner_clip = latent_steps, inner_clip
        self.kl, self.encoder_penalty = kl, encoder_penalty
        self.code_offset, self.weight_offset = code_offset, weight_offset

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[T, 16]`` of the code of support sets x, y ``[T, K]``.

        The relation network sees every ordered pair, a point with itself too. Its first layer is linear in the pair, so
        it is applied to the points; its last layer is linear, so it is applied to the average.
        """
        codes = mlp(torch.stack([x, y], -1), self.encoder)  # [T, K, 16]
        first, *middle, last = self.relation
        left, right = first.chunk(2)
        pairs = F.relu((codes @ left).unsqueeze(2) + (codes @ right).unsqueeze(1))  # [T, K, K, hidden]
        for weight in middle:
            pairs = F.relu(pairs @ weight)
        mean, s = (pairs.mean((1, 2)) @ last).chunk(2, -1)
        return mean, deviation(s, self.code_offset)

    def decode(self, z: Tensor, noise: Tensor) -> Tensor:
        """Weights ``[T, 1761]`` sampled for codes ``[T, 16]`` with standard normal noise ``[T, 1761]``."""
        mean, s = mlp(z, self.decoder).chunk(2, -1)
        return torch.addcmul(mean, deviation(s, self.weight_offset), noise)

    def noise(self, tasks: int, generator: torch.Generator) -> Noise:
        """All the noise of one adaptation of `tasks` tasks."""
        like = {"generator": generator, "device": self.rates.device, "dtype": self.rates.dtype}
        code = torch.randn(tasks, len(self.rates), **like)
        return Noise(code, torch.randn(self.latent_steps + 1, tasks, WEIGHTS, **like))

    def adapt(
        self, z: Tensor, x: Tensor, y: Tensor, noise: Tensor, create_graph: bool = False
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Codes ``[T, 16]`` and weights ``[T, 1761]`` before adaptation and after each latent step.

        Args:
            z: codes to start from; x, y: support sets ``[T, K]``.
            noise: standard normal ``[steps + 1, T, 1761]``, one for each decoding.
            create_graph: keep what the meta-gradient needs; otherwise steps are detached from each other.
        """
        codes, weights = [z], [self.decode(z, noise[0])]
        for fresh in noise[1:]:
            losses = squared_error(weights[-1], x, y)
            # codes of different tasks do not meet: the gradient of the sum is each task's own
            (g,) = torch.autograd.grad(losses.sum(), z, create_graph=create_graph)
            z = z - self.rates * clip_norm(g, self.inner_clip)
            z = z if create_graph else z.detach().requires_grad_()
            codes.append(z)
            weights.append(self.decode(z, fresh))
        return codes, weights

    def loss(self, batch: Regression, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """Meta-loss ``[T]``, differentiable, and zeros ``[T]``: there is no accuracy.

        The meta-loss is the mean squared error of the noisy queries after adaptation, plus the KL term and the
        encoder penalty (LEO, Eq. 6 without its regularizers). Without `noise` it is drawn from the batch's generator.
        """
        noise = self.noise(len(batch), batch.generator) if noise is None else noise
        mean, std = self.encode(batch.support_x, batch.support_y)
        start = torch.addcmul(mean, std, noise.code)
        codes, weights = self.adapt(start, batch.support_x, batch.support_y, noise.weights, create_graph=True)
        kl = divergence(start, std, noise.code).mean(1)
        penalty = (codes[-1].detach() - start).square().mean(1)
        losses = squared_error(weights[-1], batch.query_x, batch.query_y)
        losses = losses + self.kl * kl + self.encoder_penalty * penalty
        return losses, torch.zeros_like(kl)

    prepare_gradients, nan_rule, clip = LEO.prepare_gradients, "intended", "variable"  # as the classifier's

    def step_sizes(self) -> tuple:
        """The parameters that no penalty reaches."""
        return (self.rates,)

    def predict(
        self, batch: Regression, x: Tensor, samples: int, generator: torch.Generator, steps: int | None = None
    ) -> Tensor:
        """Functions sampled for each task, at x ``[n]`` or ``[T, n]``: ``[samples, T, n]``.

        Every sample has a code, weights and an adaptation of its own. `steps` latent steps are taken (None: as many as
        in training; 0: what the decoder says before adaptation). ValueError: fewer or more than these.
        """
        x = x.expand(len(batch), -1)
        inputs = [v.repeat(samples, 1).split(CHUNK) for v in (batch.support_x, batch.support_y, x)]
        steps = self.latent_steps if steps is None else steps
        if not 0 <= steps <= self.latent_steps:
            raise ValueError(f"steps={steps}: this learner adapts in 0 to {self.latent_steps} steps")
        curves = [self._predict(*chunk, generator, steps) for chunk in zip(*inputs)]
        return torch.cat(curves).view(samples, *x.shape)

    def _predict(self, support_x, support_y, x, generator, steps) -> Tensor:
        noise = self.noise(len(x), generator)
        with torch.no_grad():
            mean, std = self.encode(support_x, support_y)
        with torch.enable_grad():  # also inside no_grad: adaptation needs gradients
            start = torch.addcmul(mean, std, noise.code).requires_grad_()
            _, weights = self.adapt(start, support_x, support_y, noise.weights[: steps + 1])
        return network(weights[-1].detach(), x)


def mlp(x: Tensor, weights) -> Tensor:
    """A ReLU network without biases, the last layer linear; weights are ``[in, out]``."""
    for weight in weights[:-1]:
        x = F.relu(x @ weight)
    return x @ weights[-1]


def network(weights: Tensor, x: Tensor) -> Tensor:
    """T generated networks 1-40-40-1: weights ``[T, 1761]`` and x ``[T, n]`` to ``[T, n]``."""
    w1, b1, w2, b2, w3, b3 = weights.split(LAYOUT, 1)
    h = F.relu(torch.addcmul(b1.unsqueeze(1), x.unsqueeze(2), w1.unsqueeze(1)))
    h = F.relu(torch.baddbmm(b2.unsqueeze(1), h, w2.view(-1, WIDTH, WIDTH)))
    return torch.baddbmm(b3.unsqueeze(1), h, w3.unsqueeze(2)).squeeze(2)


def squared_error(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error ``[T]`` of generated networks on x, y ``[T, n]``."""
    return (network(weights, x) - y).square().mean(1)


def clip_norm(g: Tensor, bound: float) -> Tensor:
    """Each row of g ``[T, d]`` shortened to at most `bound`, differentiably."""
    return g * (bound / g.norm(dim=1, keepdim=True).clamp(min=bound))


def distances(curves: Tensor, x: Tensor) -> Tensor:
    """Root mean squared distance of curves ``[..., n]`` at x ``[n]`` to the nearest line and sine, ``[2, ...]``.

    By least squares over all lines and all sines of frequency 1: two free numbers each, whose ranges are not bounded,
    so that neither family is favored.
    """
    left = []
    for line in (True, False):
        q, _ = torch.linalg.qr(basis(x, line).to(curves.dtype))
        left.append((curves - curves @ q @ q.T).square().mean(-1).sqrt())
    return torch.stack(left)


def family_of(curves: Tensor, x: Tensor) -> Tensor:
    """Whether curves ``[..., n]`` at x ``[n]`` are nearer to a line than to a sine, bool ``[...]``."""
    line, sine = distances(curves, x)
    return line < sine


def _errors(features: Tensor, y: Tensor, coefficients: Tensor) -> Tensor:
    """Sums of squared errors ``[T, G]`` of G curves ``[G, 2]``, from features ``[T, K, 2]`` and targets ``[T, K]``."""
    gram = features.transpose(1, 2) @ features  # [T, 2, 2]
    cross = (features.transpose(1, 2) @ y.unsqueeze(2)).squeeze(2)
    a, b = coefficients.unbind(1)
    monomials = torch.stack([a * a, 2 * a * b, b * b, -2 * a, -2 * b])
    form = torch.cat([gram[:, 0], gram[:, 1, 1:], cross], 1)  # [T, 5]
    return form @ monomials + y.square().sum(1, keepdim=True)


class ExactPosterior:
    """What a Bayesian who knows `RegressionTasks` believes after the support set: the experiment's reference.

    Integrates over a grid of `grid` x `grid` lines and as many sines, uniform in what tasks are drawn from. The squared
    error of a curve that is linear in two coefficients is a quadratic form in them, so one matrix product compares all
    T tasks with all curves.

    Args:
        batch: T tasks; memory is T / 4 megabytes for the default grid (its error: below 0.001 in `line`).
        noise: as in `RegressionTasks`.

    Raises:
        ValueError: noise that is not above 0.
    """

    def __init__(self, batch: Regression, noise: float = 0.3, grid: int = 128):
        if noise <= 0:
            raise ValueError(f"noise={noise}: without noise the posterior is a point; use a number above 0")
        x, y = batch.support_x.double(), batch.support_y.double()
        u = (torch.arange(grid, device=x.device, dtype=x.dtype) + 0.5) / grid
        u = torch.cartesian_prod(u, u)
        self.coefficients = torch.stack([_line(u), _sine(u)])  # [2, G, 2]
        log = torch.stack([_errors(basis(x, f), y, c) for f, c in zip((True, False), self.coefficients)], 1)
        self.weights = (log / (-2 * noise**2)).flatten(1).softmax(1).view(log.shape)  # [T, 2, G]

    @property
    def line(self) -> Tensor:
        """Probability that the task is a line ``[T]``."""
        return self.weights[:, 0].sum(1)

    def mean(self, x: Tensor) -> Tensor:
        """The posterior mean ``[T, n]`` at x ``[n]`` or ``[T, n]``, the best prediction in squared error."""
        c = torch.einsum("tfg,fgc->ftc", self.weights, self.coefficients)
        return sum((basis(x, line).to(c.dtype) * c[i].unsqueeze(1)).sum(-1) for i, line in enumerate((True, False)))

    def sample(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Curves drawn from the posterior: is it a line ``[samples, T]``, coefficients ``[samples, T, 2]``."""
        picked = torch.multinomial(self.weights.flatten(1), samples, replacement=True, generator=generator).T
        return picked < self.weights.shape[2], self.coefficients.flatten(0, 1)[picked]


def ambiguous_tasks(
    source: RegressionTasks, tasks: int, generator: torch.Generator, low: float = 0.2, query: int = 15
) -> tuple[Regression, Tensor]:
    """5-shot tasks to which the exact posterior gives both families at least `low`, and the belief in a line ``[T]``.

    One task in 60 is ambiguous at low = 0.2; drawing goes on until there are enough.
    ValueError: `low` is not between 0 and 0.5.
    """
    if not 0 < low < 0.5:
        raise ValueError(f"low={low}: the less likely family's belief is a number between 0 and 0.5")
    return tasks_by_belief(source, tasks, generator, lambda doubt: doubt >= low, 200, query)


def tasks_by_belief(
    source: RegressionTasks, tasks: int, generator: torch.Generator, wanted: Callable, each: int, query: int
) -> tuple[Regression, Tensor]:
    """5-shot tasks of which the exact posterior has a `wanted` doubt, and the belief in a line ``[T]``.

    Args:
        wanted: maps doubts ``[n]``, the probabilities of the less likely family, to whether such tasks are kept.
        each: so many tasks are drawn at a time, until enough were kept.
    """
    found, beliefs, count = [], [], 0
    while count < tasks:
        batch = source.sample(each, 1, 5, query, generator)
        belief = ExactPosterior(batch, source.noise).line
        keep = wanted(torch.minimum(belief, 1 - belief))
        found.append(batch[keep])
        beliefs.append(belief[keep])
        count += int(keep.sum())
    return join(found)[:tasks], torch.cat(beliefs)[:tasks]


def join(batches: list[Regression]) -> Regression:
    """One batch of several."""
    parts = ("support_x", "support_y", "query_x", "query_y", "line", "coefficients")
    joined = (torch.cat([getattr(b, name) for b in batches]) for name in parts)
    return Regression(*joined, batches[0].generator)


def both_families(away: Tensor, belief: Tensor, low=0.2, share=0.1, near=0.5) -> dict[str, float]:
    """The number behind LEO's Fig. 3 c, d: do samples of ambiguous tasks come from both families?

    A task is ambiguous if the exact posterior gives each family at least `low`; it is answered with both families if
    each has at least `share` of the samples. Of 100 samples of the exact posterior itself, nearly all ambiguous tasks
    are answered with both.

    Args:
        away: `distances` of the sampled functions, ``[2, samples, T]``; a sample belongs to the family that is nearer,
            and to none if that is farther than `near`.
        belief: `ExactPosterior.line`, ``[T]``.

    Returns:
        ``ambiguous``: number of ambiguous tasks; ``both``: share of them answered with both (NaN if there are none);
        ``both_elsewhere``: the same share of the other tasks; ``none``: share of samples that belong to no family;
        ``error``: mean absolute difference between `belief` and the share of lines, over all tasks.
    """
    line = away[0] < away[1]
    close = away.amin(0) <= near
    says = torch.stack([line & close, ~line & close]).to(belief.dtype).mean(1)  # [2, T]
    ambiguous = torch.minimum(belief, 1 - belief) >= low
    both = (says.amin(0) >= share).to(belief.dtype)
    return {
        "ambiguous": int(ambiguous.sum()),
        "both": both[ambiguous].mean().item(),
        "both_elsewhere": both[~ambiguous].mean().item(),
        "none": 1 - says.sum(0).mean().item(),
        "error": (line.to(belief.dtype).mean(0) - belief).abs().mean().item(),
    }
