"""Truncations per second of the learned rule: tasks as one batch against one task at a time, and against plain layers.

    python benchmarks/learned_rule.py
    python benchmarks/learned_rule.py --device cuda --tasks 64

A truncation is U steps of the rule, the meta-objective and the gradient. "one at a time" is the same code on a batch of
one task; "plain" is one task at a time with `torch.nn.functional.conv1d` and `batch_norm` in place of the fused block.
Before anything is timed, all three give the same losses and gradients in float64. Memory is what a truncation saves for
its backward pass. On a CPU two processes with one thread each are compared with one that has two threads.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from harness import arguments, interleaved

from umeta_core.learned_rule import ConvNorm, UpdateRule, initial_phi, meta_objective

FASTER = 3  # target, against one task at a time
PRESETS = {  # size of the rule, widths, B, U
    "book": ("small", (64, 32, 32, 32), 32, 4),
    "medium": ("medium", (64, 64, 64, 32), 64, 4),
    "full": ("full", (196, 64, 64, 32), 64, 2),
}


def plain_block(self, x, along):
    """Convolution, batch norm and ReLU as PyTorch has them, for a batch of one task."""
    x = x[0] if along == 2 else x[0].transpose(0, 1)
    y = F.conv1d(x.mT, self.weight.permute(2, 0, 1), None, padding=self.weight.shape[1] // 2)
    y = F.relu(F.batch_norm(y, None, None, torch.ones_like(self.shift), self.shift, True, 0.0, 1e-3)).mT
    return (y if along == 2 else y.transpose(0, 1))[None]


def setting(preset, tasks, device, dtype=torch.float32):
    size, widths, batch, unroll = PRESETS[preset]
    g = torch.Generator().manual_seed(0)
    rule = UpdateRule(size, generator=g).to(device, dtype)
    phi = initial_phi(tasks, widths, g, dtype).map(lambda p: p.to(device))
    x = torch.rand(tasks, unroll, batch, widths[0], generator=g, dtype=dtype).to(device)
    labeled = torch.rand(tasks, 1, 2, 100, widths[0], generator=g, dtype=dtype).to(device)
    labels = torch.arange(10, device=device).repeat(10).expand(tasks, 1, 2, -1)
    return rule, phi, x, labeled, labels


def gradient(rule, phi, x, labeled, labels, recompute=False):
    rule.zero_grad()
    loss = meta_objective(rule(phi, x, recompute=recompute), labeled, labels, 10).loss
    loss.sum().backward()
    return loss.detach()


def one_at_a_time(rule, phi, x, labeled, labels, block=None):
    rule.zero_grad()
    fused, losses = ConvNorm.forward, []
    ConvNorm.forward = block or fused
    try:
        for t in range(len(x)):
            task = slice(t, t + 1)
            end = rule(phi.map(lambda p, task=task: p[task]), x[task])
            losses.append(meta_objective(end, labeled[task], labels[task], 10).loss)
            losses[-1].sum().backward()
    finally:
        ConvNorm.forward = fused
    return torch.cat(losses).detach()


def same_numbers(device):
    given = setting("book", 2, device, torch.float64)
    found = []
    for run in (gradient, one_at_a_time, lambda *a: one_at_a_time(*a, block=plain_block)):
        losses = run(*given)
        found.append((losses, [p.grad.clone() for p in given[0].parameters() if p.grad is not None]))
    for losses, grads in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-9, atol=0)
        worst = max(((a - b).norm() / (b.norm() + 1e-9)).item() for a, b in zip(grads, found[0][1]))
        assert worst < 1e-6, worst
    print("  the same losses and gradients in float64", flush=True)


def saved_bytes(*given, recompute):
    """Bytes that are held at the end of the forward pass, each storage once; recomputed steps hold their networks."""
    rule, phi, x, labeled, labels = given
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        meta_objective(rule(phi, x, recompute=recompute), labeled, labels, 10)
    networks = x.shape[1] * sum(tensor.nbytes for tensor in phi.tensors()) if recompute else 0
    return networks + sum(size for size, _ in seen.values())


def truncations_per_second(preset, tasks, device, seconds=5.0):
    given = setting(preset, tasks, device)
    gradient(*given)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        gradient(*given)
        done += tasks
    return done / (time.perf_counter() - started)


def processes(preset, tasks):
    """Truncations per second of two processes with one thread each, together."""
    command = [sys.executable, __file__, "--threads", "1", "--tasks", str(tasks), "--worker", preset]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(p.communicate()[0].split()[-1]) for p in both)


def main():
    args = arguments(__doc__, tasks={"type": int, "default": 8}, worker={"choices": [*PRESETS], "default": None},
                     presets={"nargs": "+", "choices": [*PRESETS], "default": [*PRESETS]})  # fmt: skip
    if args.worker:
        print(truncations_per_second(args.worker, args.tasks, args.device))
        return
    same_numbers(args.device)
    for preset in args.presets:
        size, widths, batch, unroll = PRESETS[preset]
        given = setting(preset, args.tasks, args.device)
        entrants = {
            "batch": lambda given=given: gradient(*given),
            "one at a time": lambda given=given: one_at_a_time(*given),
            "plain": lambda given=given: one_at_a_time(*given, block=plain_block),
        }
        times = interleaved(entrants, args.repeats, args.device)
        rate = 1e3 * args.tasks / statistics.median(times["batch"])
        print(f"  {preset}: {size} rule, network {'-'.join(map(str, widths))}, B = {batch}, U = {unroll}, "
              f"{args.tasks} tasks: {rate:.1f} truncations/s")  # fmt: skip
        for name in ("one at a time", "plain"):
            ratio = statistics.median(b / a for a, b in zip(times["batch"], times[name]))
            print(f"    {ratio:4.1f}x as fast as {name} (target {FASTER}x)")
        memory = [saved_bytes(*given, recompute=again) / 2**20 for again in (False, True)]
        print(f"    saved for the backward pass: {memory[0]:.0f} MiB, {memory[1]:.1f} MiB with recompute", flush=True)
        if args.device == "cpu" and args.threads > 1:
            together, alone = processes(preset, args.tasks), truncations_per_second(preset, args.tasks, "cpu")
            print(f"    two processes {together:.1f}, one with {args.threads} threads {alone:.1f} truncations/s")


if __name__ == "__main__":
    main()
