"""Chapter 10: the labeled equation, written out, equals the function it names; scratch code equals the library."""

import pytest
import torch
import torch.nn.functional as F
from scratch import scratch_namespace

from umeta_core.leo import LEO
from umeta_core.leo_analysis import codes_see, curvature

T, N, K, D, NZ = 2, 3, 2, 6, 4


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/10_leo_tables.md")


@pytest.fixture
def model():
    return LEO(D, NZ, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def task():
    """Support features [T, NK, d], codes [T, N, n_z] and labels [NK]."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(T, N * K, D, generator=g, dtype=torch.float64)
    return x, torch.randn(T, N, NZ, generator=g, dtype=torch.float64), torch.arange(N).repeat_interleave(K)


def literal_hessian(x, p):
    """Entry by entry: row (n, a), column (m, b) is the sum over i of p_in ([n = m] - p_im) x_ia x_ib."""
    h = torch.zeros(N, D, N, D, dtype=torch.float64)
    for xi, pi in zip(x, p):
        for n in range(N):
            for m in range(N):
                h[n, :, m] += pi[n] * (float(n == m) - pi[m]) * xi.unsqueeze(1) * xi
    return h.reshape(N * D, N * D)


def support_loss(w, x, y):
    return F.cross_entropy(x @ w.T, y, reduction="sum")


def test_eq_leo_hessian(model, task):
    """Both lines against entries written out, and the library's eigenvalues against those of the matrices."""
    x, z, y = task
    decoder = model.decoder[:, :D].detach()
    logits = x @ (z @ decoder).transpose(1, 2)
    in_weights, in_codes = curvature(x, logits), curvature(codes_see(model, x).detach(), logits)
    assert in_weights.shape == (T, N * K * (N - 1))
    for t in range(T):
        h = literal_hessian(x[t], logits[t].softmax(1))
        by_autograd = torch.func.hessian(support_loss)(z[t] @ decoder, x[t], y)
        torch.testing.assert_close(h, by_autograd.reshape(N * D, N * D))
        rank = N * K * (N - 1)
        torch.testing.assert_close(in_weights[t], torch.linalg.eigvalsh(h).flip(0)[:rank])
        blocks = torch.block_diag(*[decoder] * N)
        of_codes = torch.linalg.eigvalsh(blocks @ h @ blocks.T).flip(0)  # N n_z of them
        torch.testing.assert_close(in_codes[t][: N * NZ], of_codes[:rank])


def test_scratch_hessians(scratch, model, task):
    x, z, _ = task
    decoder = model.decoder[:, :D].detach()
    p = (x[0] @ (z[0] @ decoder).T).softmax(1)
    h = scratch["hessian"](x[0], p)
    torch.testing.assert_close(h, literal_hessian(x[0], p))
    of_codes = torch.linalg.eigvalsh(scratch["between_decoders"](h, decoder, N)).flip(0)
    want = curvature(codes_see(model, x[:1]).detach(), p.log().unsqueeze(0))[0]
    torch.testing.assert_close(of_codes, want[: N * NZ])


def test_codes_in_other_units_give_the_same_classifiers_and_another_curvature(model, task):
    """The chapter's remark on units: c times smaller codes, c times the decoder, rates divided by c squared."""
    x = F.normalize(task[0], dim=2).unflatten(1, (N, K))
    other = LEO(D, NZ).double()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.relation[2][:, :NZ] /= 3
        other.decoder *= 3
        other.latent_rate /= 9
    paths = [m.adapt(x) for m in (model, other)]
    for a, b in zip(paths[0].weights, paths[1].weights):
        torch.testing.assert_close(a, b)
    first = x.flatten(1, 2) @ paths[0].weights[0].transpose(1, 2)
    mine, theirs = (curvature(codes_see(m, x.flatten(1, 2)), first) for m in (model, other))
    torch.testing.assert_close(9 * mine, theirs)
