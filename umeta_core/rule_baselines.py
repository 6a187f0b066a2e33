"""What the learned rule is compared with: a VAE, supervised learning on the same labels, a prototypical network.

Metz et al. 2019, App. H.3. Networks of all tasks are trained together, with a leading task axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import ascending
from .episodes import Episodes
from .learned_rule import EMBEDDING, Phi, run_network
from .losses import accuracy, cross_entropy
from .protonets import prototypes, squared_distances
from .rule_evaluation import Trial

BIN = 1 / 255  # width of a gray level


def vae_path(task: Trial, at: tuple[int, ...], width: int = 128, lr: float = 1e-4, batch: int = 128):
    """Train a VAE on unlabeled images; yields loss ``[T]`` and accuracy ``[T]`` of its latent means at each of `at`.

    Three layers of `width` units with batch norm and ReLU, linear mean and log deviation of 32 latents, the mirrored
    decoder; the likelihood of a gray level is the mass that a normal of learned mean and deviation has on it (H.3.1).
    """
    tasks, inputs = task.x.shape[0], task.x.shape[-1]
    generator = torch.Generator(device=task.x.device).manual_seed(task.seed + 2)
    encoder = _layers(tasks, (inputs, *[width] * 3), generator)
    decoder = _layers(tasks, (EMBEDDING, *[width] * 3), generator)
    heads = [_matrix(tasks, width, n, generator) for n in (2 * EMBEDDING, 2 * inputs)]
    params = [*encoder.w, *encoder.b, *decoder.w, *decoder.b, *(p for head in heads for p in head)]
    optimizer = torch.optim.Adam(params, lr=lr)

    def mean_and_log_std(layers: Phi, head, x):
        return (run_network(layers, x)[0][-1] @ head[0] + head[1][:, None]).chunk(2, -1)

    ascending(at)
    done = 0
    for steps in at:
        loss = torch.full((tasks,), float("nan"), device=task.x.device)
        for _ in range(steps - done):
            x = task.batch(batch, generator)
            mean, log_std = mean_and_log_std(encoder, heads[0], x)
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            likely = log_likelihood(x, *mean_and_log_std(decoder, heads[1], mean + log_std.exp() * noise))
            kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
            loss = (kl.sum(-1) - likely.sum(-1)).mean(1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        done = steps
        with torch.no_grad():
            draws = task.x.flatten(1, 3)  # [T, D*2*K, N_0], which share their batch norm
            latent = mean_and_log_std(encoder, heads[0], draws)[0]
        yield loss.detach(), task.readout(latent.view(*task.x.shape[:-1], -1))


def log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of the mass of N(mean, std) on the bin of gray level x; the first and last bins have no outer end."""
    scale = torch.exp(-log_std)

    def below(edge):
        return torch.special.ndtr((edge - mean) * scale)

    upper = torch.where(x > 1 - BIN / 2, torch.ones_like(x), below(x + BIN / 2))
    lower = torch.where(x < BIN / 2, torch.zeros_like(x), below(x - BIN / 2))
    return (upper - lower).clamp_min(1e-6).log()


def supervised_accuracy(task: Trial, steps: int = 300, lr: float = 3e-3) -> Tensor:
    """Accuracy ``[T]`` of the same network with a layer of logits, trained on the labeled halves alone (H.3.2)."""
    tasks, draws, _, k, inputs = task.x.shape
    generator = torch.Generator(device=task.x.device).manual_seed(task.seed + 3)
    phi = _layers(tasks * draws, task.bucket.widths, generator)
    head = _matrix(tasks * draws, EMBEDDING, task.bucket.way, generator)
    optimizer = torch.optim.Adam([*phi.w, *phi.b, *head], lr=lr)
    (a, b), (ya, yb) = (part.flatten(0, 1).unbind(1) for part in (task.x, task.labels))

    def logits(x):
        return run_network(phi, x)[0][-1] @ head[0] + head[1][:, None]

    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(logits(a), ya).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return accuracy(logits(b), yb).view(tasks, draws).mean(1)


class ProtoMLP(nn.Module):
    """Prototypical network of three fully connected layers with batch norm and ReLU (H.3.4), for Figure 2.

    It learns features, not a rule: with pixels in a new order for every task there is little to learn.
    """

    def __init__(self, inputs: int, width: int = 128, generator: torch.Generator | None = None):
        super().__init__()
        phi = _layers(1, (inputs, *[width] * 3), generator or torch.Generator().manual_seed(0))
        self.weights, self.biases = (nn.ParameterList(nn.Parameter(p[0].detach()) for p in part) for part in phi[:2])

    def predict(self, episodes: Episodes) -> Tensor:
        """Query logits ``[T, N*Q, N]``; batch norm over the images of each task."""
        xs, _, xq, _ = episodes.flat()
        x = torch.cat([xs, xq], 1).flatten(2)
        phi = Phi(tuple(w[None] for w in self.weights), tuple(b[None] for b in self.biases), ())
        z = run_network(phi, x)[0][-1]
        support = z[:, : xs.shape[1]].unflatten(1, (episodes.way, episodes.shot))
        return -squared_distances(z[:, xs.shape[1] :], prototypes(support))

    def loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy ``[T]`` of the queries."""
        logits, labels = self.predict(episodes), episodes.labels
        return cross_entropy(logits, labels), accuracy(logits.detach(), labels)


class ShuffledTasks:
    """Tasks of a source, each with the pixels of all its images in one random order of its own (Fig. 2 right)."""

    def __init__(self, source):
        self.source, self.images = source, source.images

    def sample(self, tasks: int, way: int, shot: int, query: int, generator: torch.Generator) -> Episodes:
        """Episodes whose images are still shaped as images."""
        episodes = self.source.sample(tasks, way, shot, query, generator)
        pixels = episodes.support[0, 0, 0].numel()
        order = torch.rand(tasks, 1, 1, pixels, generator=generator, device=episodes.support.device).argsort(-1)

        def shuffled(x):
            return x.flatten(3).gather(3, order.expand(*x.shape[:3], -1)).view(x.shape)

        return Episodes(shuffled(episodes.support), shuffled(episodes.query))


def _layers(tasks: int, widths: tuple[int, ...], generator: torch.Generator) -> Phi:
    """Trainable weights, Glorot-like in effect since batch norm takes their scale off again; no backward weights."""
    pairs = [_matrix(tasks, n, m, generator) for n, m in zip(widths, widths[1:])]
    return Phi(tuple(w for w, _ in pairs), tuple(b for _, b in pairs), ())


def _matrix(tasks: int, inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    w = torch.randn(tasks, inputs, outputs, generator=generator, device=generator.device) / inputs**0.5
    return w.requires_grad_(), torch.zeros(tasks, outputs, device=w.device, requires_grad=True)
