"""EM and a training step of Meta-GMVAE (Omniglot, 20-way): umeta against a loop over episodes.

    python benchmarks/meta_gmvae.py
    python benchmarks/meta_gmvae.py --device cuda
    python benchmarks/meta_gmvae.py --samples 32            the paper's N: the loop needs more than 20 GiB

The loop is EM as one would write it down for one episode: the density of every sample under every component from the
difference of both, ``[samples, K, 64]``. Its step has that EM, whose graph it builds and does not use as the authors'
code, and PyTorch's layers in their default memory format. Before anything is timed, both give the same mixtures, losses
and gradients in float64. The loop, too, profits from `umeta_core.speed.tune_cpu`: its step takes twice as long without.
EM's extra memory is printed for several numbers of samples: it is linear in them.
"""

from __future__ import annotations

import math
import statistics

import torch
import torch.nn.functional as F
from harness import arguments, interleaved
from torch import nn

from umeta_core.em import em, labeled_start, random_start
from umeta_core.episodes import Episodes
from umeta_core.gmvae_networks import ImageDecoder, ImageEncoder, NormBlock
from umeta_core.meta_gmvae import MetaGMVAE

EPISODES, SET, WAY, LATENT = 4, 300, 20, 64
FASTER_EM, FASTER_STEP = 5, 2  # targets


# EM, one episode at a time -------------------------------------------------------------------------------------------


def log_normal(z, mean, variance):
    """``[n, K]`` from z ``[n, d]``, mean and variance ``[K, d]``, by way of ``[n, K, d]``."""
    square = (z.unsqueeze(1) - mean).square() / variance
    return -(square + variance.log() + math.log(2 * math.pi)).sum(2) / 2


def one_em(z, mean, iterations=10, labeled=None):
    """Weights, means and variances of one episode; with labels as the reference code: variances last, weights equal."""
    k = len(mean)
    weights, variance = z.new_full((k,), 1 / k), torch.ones_like(mean)
    for _ in range(iterations):
        q = (weights.log() + log_normal(z, mean, torch.ones_like(mean))).softmax(1)
        x = z
        if labeled is not None:
            q, x = torch.cat([F.one_hot(labeled[1], k).to(q), q]), torch.cat([labeled[0], z])
        count = q.sum(0).unsqueeze(1)
        mean = q.T @ x / count
        if labeled is None:
            weights = count.squeeze(1) / len(x)
        else:
            variance = q.T @ x.square() / count - 2 * mean * (q.T @ x) / count + mean.square()
    return weights, mean, variance


def em_loop(z, start, labeled=None):
    found = [one_em(z[t], start.mean[t], labeled=labeled and [s[t] for s in labeled]) for t in range(len(z))]
    return [torch.stack(parts) for parts in zip(*found)]


def latents(samples, device, dtype):
    """What training pools, and what a 20-way 5-shot test episode has: queries, support and labels, grouped."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(WAY).repeat_interleave(5 * samples).expand(EPISODES, -1)
    centers = torch.randn(EPISODES, WAY, LATENT, generator=g)
    draw = lambda n: torch.randn(EPISODES, n, LATENT, generator=g)  # noqa: E731
    support = centers.repeat_interleave(5 * samples, 1) + draw(WAY * 5 * samples)
    query = centers.repeat_interleave(15 * samples, 1) + draw(WAY * 15 * samples)
    return [t.to(device, dtype) for t in (draw(SET * samples) + centers.repeat(1, 15 * samples, 1), query, support)] + [
        y.to(device)
    ]


def em_pairs(samples, device, dtype=torch.float32):
    """name -> (ours, theirs), each a function that returns weights, means and variances."""
    z, query, support, y = latents(samples, device, dtype)
    start = random_start(z, WAY, torch.Generator(device).manual_seed(1))
    classes = labeled_start(support, y, WAY)
    parts = lambda m: [m.weights, m.mean, torch.ones_like(m.mean) if m.variance is None else m.variance]  # noqa: E731
    labeled = {"labeled": (support, y), "covariance": "diagonal", "e_step": "identity", "learn_weights": False}
    return {
        "EM, training": (lambda: parts(em(z, start)), lambda: em_loop(z, start)),
        "EM, test": (lambda: parts(em(query, classes, **labeled)), lambda: em_loop(query, classes, (support, y))),
    }


# A training step -----------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The same model out of PyTorch's layers, with the same initial weights."""

    def __init__(self, model: MetaGMVAE):
        super().__init__()
        self.samples, self.set_encoder, self.mlp = model.samples, model.set_encoder, model.decoder.mlp
        *blocks, flatten = model.encoder
        self.encoder = nn.Sequential(*(layer for b in blocks for layer in self.block(b)), flatten)
        last = nn.ConvTranspose2d(64, 1, 4, 2, 1)
        last.weight.data, last.bias.data = (p.data.clone() for p in (model.decoder.weight, model.decoder.bias))
        self.decoder = nn.Sequential(*(layer for b in model.decoder.blocks for layer in self.block(b)), last)

    def block(self, block: NormBlock):
        (a, b), kernel = block.weight.shape[:2], block.weight.shape[2]
        conv = nn.ConvTranspose2d(a, b, kernel, 2, 1, bias=False) if block.up else nn.Conv2d(b, a, 3, 1, 1, bias=False)
        conv.weight.data = block.weight.data.clone().contiguous()
        pool = [nn.MaxPool2d(2, ceil_mode=True)] if block.pool else []
        return [conv, nn.BatchNorm2d(len(block.scale)), nn.ReLU(), *pool]

    def loss(self, x, noise):
        tasks, m = x.shape[:2]
        h = self.encoder(x.flatten(0, 1)).view(tasks, m, -1)
        mean, log_variance = self.set_encoder(h).unsqueeze(2).split(LATENT, 3)
        shape = (tasks, m, self.samples, LATENT)
        epsilon = torch.randn(*shape, generator=noise, device=x.device, dtype=x.dtype)
        z = mean + (log_variance / 2).exp() * epsilon
        start = random_start(z.flatten(1, 2), WAY, noise)
        kl = []
        for t in range(tasks):
            weights, mu, one = (p.detach() for p in one_em(z[t].flatten(0, 1), start.mean[t]))
            log_p = (weights.log() + log_normal(z[t].flatten(0, 1), mu, one)).logsumexp(1)
            square = (z[t] - mean[t]).square() / log_variance[t].exp()
            log_q = -(square + log_variance[t] + math.log(2 * math.pi)).sum(2) / 2
            kl.append((log_q.flatten() - log_p).mean())
        logits = self.decoder(self.mlp(z.flatten(0, 2)).view(-1, 64, 2, 2)).view(*shape[:3], *x.shape[2:])
        pixels = x.unsqueeze(2).expand_as(logits)
        rest = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum((3, 4, 5)).mean((1, 2))
        return rest + torch.stack(kl)


def models(samples, device, dtype):
    """Losses ``[T]`` and the parameters of both, in the same order."""
    g = torch.Generator().manual_seed(0)
    networks = ImageEncoder(generator=g), ImageDecoder(generator=g)
    model = MetaGMVAE(*networks, components=WAY, samples=samples, generator=g)
    plain = Plain(model).to(device, dtype)
    model = model.to(device, dtype)
    convolutions = [m.weight for m in plain.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    ours = [b.weight for b in model.modules() if isinstance(b, NormBlock)] + [model.decoder.weight]
    pairs = list(zip(ours, convolutions)) + [(p, p) for p in plain.set_encoder.parameters()]
    return model, plain, pairs


def sets(episodes, m, device, dtype):
    x = torch.rand(episodes, 1, m, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    x = ((x > 0.85).to(dtype)).to(device)
    return Episodes(x, x[:, :, :0])


def same_numbers(device):
    for name, (ours, theirs) in em_pairs(2, device, torch.float64).items():
        for a, b in zip(ours(), theirs()):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)
    model, plain, pairs = models(2, device, torch.float64)
    e = sets(2, 30, device, torch.float64)
    ours = model.loss(e)[0]
    model.draws = 0
    theirs = plain.loss(e.support.squeeze(1), model._noise(e.support))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(loss.mean(), [pair[i] for pair in pairs]) for i, loss in enumerate((ours, theirs))]
    largest = max(b.norm() for b in gradients[1])  # that of a key's bias is 0
    worst = max(((a - b).norm() / (b.norm() + 1e-3 * largest)).item() for a, b in zip(*gradients))
    assert worst < 1e-6, worst
    print(f"  same mixtures, losses and gradients (within {worst:.0e}) in float64", flush=True)


def step(loss, parameters):
    adam = torch.optim.Adam(parameters, 1e-3)

    def once():
        adam.zero_grad()
        loss().mean().backward()
        adam.step()

    return once


def extra_memory(run, device):
    """MiB that `run` holds at most beyond what there was before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def memory(device):
    """EM's memory against the number of samples: its largest tensors are [T, samples, d] and [T, K, samples]."""
    for samples in (4, 8, 16, 32):
        found = {name: extra_memory(ours, device) for name, (ours, _) in em_pairs(samples, device).items()}
        text = ", ".join(f"{name} {mib:6.1f} MiB" for name, mib in found.items())
        print(f"  extra memory at N = {samples:2}: {text}", flush=True)


def report(what, times, target):
    ours, loop = (statistics.median(times[name]) for name in ("umeta", "loop"))
    ratio = statistics.median(b / a for a, b in zip(times["umeta"], times["loop"]))
    ms = f"umeta {ours:8.1f} ms, loop {loop:8.1f} ms"
    print(f"  {what:20s} {ms}, {ratio:5.1f}x as fast (target {target}x)", flush=True)


def main():
    args = arguments(__doc__, samples={"type": int, "default": 4})
    same_numbers(args.device)
    print(f"  {EPISODES} episodes of {SET} images, K = {WAY}; EM with N = 4 and 32 samples, step with {args.samples}")
    for samples in (4, 32):
        for name, (ours, theirs) in em_pairs(samples, args.device).items():
            times = interleaved({"umeta": ours, "loop": theirs}, args.repeats, args.device)
            report(f"{name}, N = {samples}", times, FASTER_EM)
    memory(args.device)
    model, plain, _ = models(args.samples, args.device, torch.float32)
    e = sets(EPISODES, SET, args.device, torch.float32)
    noise = torch.Generator(args.device).manual_seed(0)
    entrants = {
        "umeta": step(lambda: model.loss(e)[0], model.parameters()),
        "loop": step(lambda: plain.loss(e.support.squeeze(1), noise), plain.parameters()),
    }
    times = interleaved(entrants, args.repeats, args.device)
    report("training step", times, FASTER_STEP)
    print(f"  60,000 steps take {60 * statistics.median(times['umeta']) / 3600:.1f} h", flush=True)
    model.samples, took = 32, {}
    for model.decoded in (32, 4, 1):
        times = interleaved({"umeta": entrants["umeta"]}, min(3, args.repeats), args.device)
        took[model.decoded] = statistics.median(times["umeta"])
        faster = f", {took[32] / took[model.decoded]:.1f}x as fast as with all"
        print(f"  N = 32 samples, {model.decoded} decoded: {took[model.decoded]:8.1f} ms a step{faster}", flush=True)


if __name__ == "__main__":
    main()
