"""Curvature and step lengths against automatic differentiation."""

import pytest
import torch
import torch.nn.functional as F

from umeta_core.leo import LEO
from umeta_core.leo_analysis import codes_see, curvature, meta_sgd_path, singular_values, step_lengths
from umeta_core.maml import MAML
from umeta_core.networks import LinearHead


def task(n=3, k=2, d=7, tasks=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, n * k, d, generator=generator, dtype=torch.float64)
    w = torch.randn(tasks, n, d, generator=generator, dtype=torch.float64)
    return x, w, torch.arange(n).repeat_interleave(k)


def support_loss(w, x, y):
    return F.cross_entropy(x @ w.T, y, reduction="sum")


def test_eigenvalues_are_those_of_the_hessian_in_weight_space():
    x, w, y = task()
    ours = curvature(x, x @ w.transpose(1, 2))
    for t in range(2):
        hessian = torch.func.hessian(support_loss)(w[t], x[t], y).reshape(21, 21)
        values = torch.linalg.eigvalsh(hessian).flip(0)
        assert torch.allclose(ours[t], values[:12], atol=1e-10)
        assert values[12:].abs().max() < 1e-10, "the rank is at most M(N-1)"


def test_hessian_in_code_space_is_that_of_weight_space_between_decoders():
    x, _, y = task()
    model = LEO(7, 4, generator=torch.Generator().manual_seed(0)).double()
    d = model.decoder[:, :7].detach()
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = curvature(codes_see(model, x), x @ (z @ d).transpose(1, 2)).detach()
    for t in range(2):
        by_autograd = torch.func.hessian(lambda z, x: support_loss(z @ d, x, y))(z[t], x[t])
        in_weights = torch.func.hessian(support_loss)(z[t] @ d, x[t], y)
        blocks = torch.block_diag(d, d, d)
        sandwich = blocks @ in_weights.reshape(21, 21) @ blocks.T
        assert torch.allclose(by_autograd.reshape(12, 12), sandwich, atol=1e-10)
        assert torch.allclose(ours[t], torch.linalg.eigvalsh(sandwich).flip(0), atol=1e-10)


def test_singular_values_bound_the_expansion():
    model = LEO(7, 4, generator=torch.Generator().manual_seed(0))
    values = singular_values(model)
    z = F.normalize(torch.randn(500, 4), dim=1)
    lengths = (z @ model.decoder[:, :7]).norm(dim=1)
    assert values.shape == (4,) and lengths.max() <= values[0] + 1e-5 and lengths.min() >= values[-1] - 1e-5


def test_steps_of_leo_are_the_gradients_mapped_by_the_decoder():
    x, _, y = task(k=1)
    model = LEO(7, 4, weight_steps=0, generator=torch.Generator().manual_seed(0)).double()
    done = model.adapt(x.unsqueeze(2))
    lengths = step_lengths(done.weights)
    z = done.codes[0].detach().requires_grad_()
    loss = F.cross_entropy((x @ model.decode(z).transpose(1, 2)).flatten(0, 1), y.repeat(2), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    first = (model.latent_rate * gradient) @ model.decoder[:, :7]
    assert lengths.shape == (2, 5)
    assert torch.allclose(lengths[:, 0], first.flatten(1).norm(dim=1))


@pytest.mark.parametrize("inner_loss", ["sum", "mean"])
def test_path_of_meta_sgd_ends_where_prediction_starts(inner_loss):
    from umeta_core.episodes import Episodes

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 7, generator=generator)
    learner = MAML(LinearHead(7, 3, generator), 0.5, 5, 5, meta_sgd=True, inner_loss=inner_loss)
    e = Episodes(x[:, :, :2], x[:, :, 2:])
    xs, ys, xq, _ = e.flat()
    path = meta_sgd_path(learner, xs, ys)
    assert len(path) == 6
    assert torch.allclose(xq @ path[-1].transpose(1, 2), learner.predict(e), atol=1e-5)
    assert step_lengths(path).min() > 0


def test_curvature_of_certain_predictions_is_zero():
    x, _, y = task()
    certain = 1000 * F.one_hot(y, 3).double().expand(2, -1, -1)
    assert curvature(x, certain).abs().max() == pytest.approx(0, abs=1e-12)
