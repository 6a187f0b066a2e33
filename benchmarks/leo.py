"""A meta-step of LEO on 12 tasks of 640 features: umeta, all tasks at once, against a loop over tasks.

    python benchmarks/leo.py
    python benchmarks/leo.py --device cuda

The loop is LEO as one would write it down for one task: every pair of examples through the relation network, K copies
of codes and weights, PyTorch's dropout and normal distribution. Before anything is timed, both give the same losses and
meta-gradients without noise. Both then run with dropout and sampling, backward, clipping and Adam. On a GPU the script
also times as many tasks per step as the machine likes.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from harness import arguments, interleaved

from umeta_core.episodes import Episodes
from umeta_core.leo import LEO, deviation

TASKS, WAY, QUERY, TARGET = 12, 5, 15, 5


def episodes(tasks: int, shot: int, device) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(tasks, WAY, shot + QUERY, 640, generator=generator), dim=-1).to(device)
    return Episodes(x[:, :, :shot], x[:, :, shot:])


def one_task(model: LEO, support, query, noisy: bool):
    """The meta-loss of one task, regularizers aside, from features ``[N, K, 640]`` and ``[N, Q, 640]``."""
    n, k, d = support.shape
    drop = lambda x: F.dropout(x, model.dropout, noisy)  # noqa: E731
    e = (drop(support) @ model.encoder).flatten(0, 1)
    pairs = torch.cat([e.unsqueeze(1).expand(-1, n * k, -1), e.unsqueeze(0).expand(n * k, -1, -1)], 2)
    first, second, last = model.relation
    out = torch.relu(torch.relu(pairs @ first) @ second) @ last
    mean, s = out.mean(1).view(n, k, -1).mean(1, keepdim=True).expand(-1, k, -1).split(model.latent, 2)
    sigma, epsilon = deviation(s), torch.randn_like(s)
    z = start = mean + sigma * epsilon if noisy else mean

    def decode(z):
        mu, s = (z @ model.decoder).split(d, 2)
        sigma = deviation(s, (2 / (d + n)) ** 0.5)
        return mu + sigma * torch.randn_like(mu) if noisy else mu

    def logits(x, w):
        return torch.einsum("md,nkd->mnk", drop(x), w).mean(2)

    x, y = support.flatten(0, 1), torch.arange(n, device=support.device).repeat_interleave(k)
    inner = lambda w: F.cross_entropy(logits(x, w), y, reduction="sum")  # noqa: E731
    w = decode(z)
    for _ in range(model.latent_steps):
        z = z - model.latent_rate * torch.autograd.grad(inner(w), z, create_graph=True)[0]
        w = decode(z)
    for _ in range(model.weight_steps):
        w = w - model.weight_rate * torch.autograd.grad(inner(w), w, create_graph=True)[0]
    yq = torch.arange(n, device=support.device).repeat_interleave(query.shape[1])
    loss = F.cross_entropy(logits(query.flatten(0, 1), w), yq)
    loss = loss + model.encoder_penalty * F.mse_loss(start, z.detach())
    return loss + model.kl * (start.square() / 2 - epsilon.square() / 2 - sigma.log()).mean() if noisy else loss


def loop(model: LEO, e: Episodes, noisy=True):
    losses = torch.stack([one_task(model, s, q, noisy) for s, q in zip(e.support, e.query)])
    return losses + model.l2 * model.l2_penalty() + model.orthogonality * model.orthogonality_of()


def same_numbers(e: Episodes, device) -> None:
    model = LEO(stochastic=False, dropout=0.0, generator=torch.Generator().manual_seed(0)).to(device)
    ours, theirs = model.loss(e)[0].mean(), loop(model, e, noisy=False).mean()
    assert torch.allclose(ours, theirs, rtol=1e-5), (ours, theirs)
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs))):
        assert (a - b).norm() < 1e-4 * b.norm() + 1e-9


def step(losses, e: Episodes, device):
    """A function that makes one meta-step."""
    model = LEO(generator=torch.Generator().manual_seed(0)).to(device)
    adam = torch.optim.Adam(model.parameters(), 1e-4)

    def once():
        loss = losses(model, e).mean()
        adam.zero_grad()
        loss.backward()
        model.prepare_gradients(loss)
        adam.step()

    return once


def main():
    args = arguments(__doc__)
    for shot in (1, 5):
        e = episodes(TASKS, shot, args.device)
        same_numbers(e, args.device)
        ours = step(lambda model, e: model.loss(e)[0], e, args.device)
        times = interleaved({"umeta": ours, "loop": step(loop, e, args.device)}, args.repeats, args.device)
        ms = {name: statistics.median(t) for name, t in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["umeta"], times["loop"]))
        print(
            f"{WAY}-way {shot}-shot, {TASKS} tasks: umeta {ms['umeta']:6.1f} ms, loop over tasks {ms['loop']:6.1f} ms, "
            f"{ratio:4.1f}x as fast (target {TARGET}x); 100,000 steps take {ms['umeta'] / 0.6:.0f} min",
            flush=True,
        )
        if args.device != "cpu":
            for tasks in (100, 1000, 5000):
                many = step(lambda model, e: model.loss(e)[0], episodes(tasks, shot, args.device), args.device)
                each = statistics.median(interleaved({"umeta": many}, args.repeats, args.device)["umeta"])
                print(f"  {tasks} tasks: {each:7.1f} ms a step, {1000 * tasks / each:9.0f} tasks a second", flush=True)


if __name__ == "__main__":
    main()
