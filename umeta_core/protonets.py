"""Prototypical networks (Snell et al., 2017) as CACTUs uses them, for T tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import one_of
from .data import as_floats
from .episodes import Episodes
from .losses import accuracy, cross_entropy


def prototypes(z: Tensor) -> Tensor:
    """Class means ``[T, N, d]`` of support features ``[T, N, K, d]``. (eq-prototype)"""
    return z.mean(2)


def squared_distances(z: Tensor, c: Tensor, reduce: str = "sum") -> Tensor:
    """Squared distances ``[T, n, N]`` of features ``[T, n, d]`` to prototypes ``[T, N, d]``. (eq-proto-distance)

    Expanded to ``|z|^2 - 2 z.c + |c|^2``, so that the work is one matrix product (eq-proto-linear).
    `reduce` "mean" divides by d (LASIUM's code). ValueError: another `reduce` than "sum" or "mean".
    """
    one_of("reduce", reduce, ("sum", "mean"))
    d = z.square().sum(2, keepdim=True) - 2 * z @ c.transpose(1, 2) + c.square().sum(2).unsqueeze(1)
    return d if reduce == "sum" else d / z.shape[2]


class ProtoNet(nn.Module):
    """Classify a query by the nearest mean of the embedded support images of each class. (eq-proto-posterior)

    Args:
        network: `Conv4` without a head.
        distance: "sum" of squared differences over features, or their "mean" (LASIUM; reference code).
        batch_norm: statistics in `predict`. "inductive": averages gathered in training (CACTUs' released evaluation;
            reference code, not in the paper). "transductive": those of the task's support and query images together.
        apart: support and queries of a task are each normalized with their own statistics, in `loss` and in `predict`,
            where "inductive" then holds for the queries only (LASIUM; reference code: transductive on Omniglot,
            inductive on photographs).

    Raises:
        ValueError: an unknown option, or a network with a head, which nothing would train.
    """

    def __init__(self, network: nn.Module, *, distance="sum", batch_norm="inductive", apart=False):
        super().__init__()
        one_of("distance", distance, ("sum", "mean"))
        one_of("batch_norm", batch_norm, ("inductive", "transductive"))
        if getattr(network, "way", None) is not None:
            raise ValueError("ProtoNet compares features: give the network no head (way=None)")
        self.network, self.distance, self.batch_norm, self.apart = network, distance, batch_norm, apart

    def _logits(self, z: Tensor, episodes: Episodes) -> Tensor:
        """From features ``[T, N*K + N*Q, d]``, support first."""
        n = episodes.way * episodes.shot
        support = z[:, :n].unflatten(1, (episodes.way, episodes.shot))
        return -squared_distances(z[:, n:], prototypes(support), self.distance)

    def loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Mean query cross-entropy ``[T]`` (eq-proto-loss) and accuracy ``[T]``.

        Unless `apart`, all images of the batch, support and query, pass the network together and share statistics.
        """
        xs, _, xq, yq = episodes.flat()
        if self.apart:
            z = torch.cat([self._by_task(x, update=True) for x in (xs, xq)], 1)
        else:
            x = torch.cat([xs, xq], 1)
            z = self.network.embed(x.flatten(0, 1), update=True).unflatten(0, x.shape[:2])
        logits = self._logits(z, episodes)
        return cross_entropy(logits, yq), accuracy(logits.detach(), yq)

    @property
    def sees_one(self) -> bool:
        """Whether a feature in `predict` depends on its image alone, so that images can be embedded before."""
        return self.batch_norm == "inductive" and not self.apart

    @torch.no_grad()
    def embed(self, images: Tensor, chunk=500) -> Tensor:
        """Features ``[n, d]`` of uint8 images ``[n, C, H, W]``, on averages of training, for `predict_embedded`."""
        device = next(self.parameters()).device
        return torch.cat([self.network.embed(as_floats(x.to(device)), stats="running") for x in images.split(chunk)])

    @torch.no_grad()
    def predict(self, episodes: Episodes) -> Tensor:
        """Query logits ``[T, N*Q, N]``: negative squared distances to the prototypes."""
        xs, _, xq, _ = episodes.flat()
        embed = self._known if self.batch_norm == "inductive" else self._by_task
        z = torch.cat([self._by_task(xs), embed(xq)], 1) if self.apart else embed(torch.cat([xs, xq], 1))
        return self._logits(z, episodes)

    def predict_embedded(self, episodes: Episodes) -> Tensor:
        """`predict` for episodes that show what `embed` made of their images, if the learner `sees_one` at a time."""
        xs, _, xq, _ = episodes.flat()
        return self._logits(torch.cat([xs, xq], 1), episodes)

    def _by_task(self, x: Tensor, update: bool = False) -> Tensor:
        """Features ``[T, n, d]`` of ``[T, n, C, H, W]`` under the statistics of each task."""
        return self.network.embed_tasks([p.expand(len(x), *p.shape) for p in self.network.tensors()], x, update)

    def _known(self, x: Tensor) -> Tensor:
        """The same under the averages gathered in training."""
        return self.network.embed(x.flatten(0, 1), stats="running").unflatten(0, x.shape[:2])
