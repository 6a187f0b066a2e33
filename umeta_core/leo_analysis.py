"""What the figures of LEO's analysis show: curvature of the support loss, expansion by the decoder, length of steps.

The metrics are made precise here, the paper leaves them open: at the first inner step, with means instead of samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .leo import LEO
from .losses import cross_entropy
from .maml import MAML, adapt


def curvature(x: Tensor, logits: Tensor) -> Tensor:
    """Eigenvalues ``[T, M(N-1)]``, descending, of the Hessian of the summed cross-entropy of a linear classifier with
    respect to its weights; all others of the N*d are zero. (eq-leo-hessian)

    The Hessian is ``sum_i (diag(p_i) - p_i p_i') (x) x_i x_i'``, of rank M(N-1) at most, and each factor in parentheses
    is ``B_i B_i'`` with ``B_i = diag(u_i)(I - u_i u_i')``, ``u_i = sqrt(p_i)``: so its eigenvalues are those of a Gram
    matrix of M*N rows. In the space of codes x becomes ``x @ D.T``, since weights are linear in them (see `codes_see`).

    Args:
        x: features ``[T, M, d]`` of the support set; logits: ``[T, M, N]``.
    """
    u = logits.softmax(2).sqrt()
    eye = torch.eye(u.shape[2], dtype=u.dtype, device=u.device)
    b = u.unsqueeze(3) * (eye - u.unsqueeze(3) * u.unsqueeze(2))  # [T, M, N, N]
    gram = torch.einsum("tinl,tjnk,tij->tiljk", b, b, x @ x.transpose(1, 2)).flatten(3, 4).flatten(1, 2)
    m, n = logits.shape[1:]
    return torch.linalg.eigvalsh(gram).flip(1)[:, : m * (n - 1)]


def codes_see(model: LEO, x: Tensor) -> Tensor:
    """Features ``[..., d]`` as the codes act on them ``[..., n_z]``: logits are linear in a code with these."""
    return x @ model.decoder[:, : model.features].T


def singular_values(model: LEO) -> Tensor:
    """Of the linear map from a code to the mean of the weights ``[n_z]``, descending. (LEO, Fig. 5b)"""
    return torch.linalg.svdvals(model.decoder.detach()[:, : model.features])


def step_lengths(path: list[Tensor]) -> Tensor:
    """Euclidean lengths ``[T, steps]`` of the steps of classifiers ``[T, N, d]``, classes together. (LEO, Fig. 5c)"""
    return torch.stack([(b - a).flatten(1).norm(dim=1) for a, b in zip(path, path[1:])], 1).detach()


def meta_sgd_path(learner: MAML, x: Tensor, y: Tensor) -> list[Tensor]:
    """The weights ``[T, N, d]`` of a linear Meta-SGD classifier before and after each inner step on ``[T, M, d]``."""
    way = int(y.max()) + 1
    params = [p.detach().expand(len(x), *p.shape).clone().requires_grad_() for p in learner.network.tensors(way)]
    weight = way if learner.inner_loss == "sum" else 1
    path, rates = [params[0].detach()], learner._rates(way)

    def loss(logits, y):
        return weight * cross_entropy(logits, y)

    for _ in range(learner.inner_steps):
        moved = adapt(learner.network.forward_tasks, params, rates, x, y, 1, loss, create_graph=False)
        params = [p.detach().requires_grad_() for p in moved]
        path.append(params[0].detach())
    return path
