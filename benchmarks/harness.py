"""Interleaved timing of several ways to do the same work, checked equal first."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from umeta_core.speed import tune_cpu


def arguments(doc: str, **more) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"allocator tuned: {tune_cpu()}; torch {torch.__version__}; {given.device}; {given.threads} threads", flush=True
    )
    return given


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def matmul_rate(device: str) -> float:
    """Measured GFLOP/s of a 2048 x 2048 float32 matrix product, best of ten."""
    a = torch.rand(2048, 2048, device=device)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e9


def interleaved(entrants: dict, repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every call, in turn (A B C A B C ...), two warm-up rounds left out."""
    times = {name: [] for name in entrants}
    for round_ in range(repeats + 2):
        for name, step in entrants.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if round_ >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def report(times: dict[str, list[float]], ours: str, peers: set[str], gflop: float | None, device: str) -> None:
    rate = matmul_rate(device)
    middle = {name: statistics.median(t) for name, t in times.items()}
    for name, ms in middle.items():
        share = ""
        if gflop is not None:
            share = f"  {gflop / ms * 1e3:6.0f} GFLOP/s, {100e3 * gflop / ms / rate:4.0f} % of matmul's {rate:.0f}"
        print(f"  {name:22s} median {ms:8.1f} ms  (min {min(times[name]):8.1f}, max {max(times[name]):8.1f}){share}")
    rivals = {name: ms for name, ms in middle.items() if name in peers}
    if rivals:
        best = min(rivals, key=rivals.get)
        # pair by pair: a shared machine drifts, the ratio within one round does not
        ratio = statistics.median(b / a for a, b in zip(times[ours], times[best]))
        print(f"  {ours} is {ratio:.2f}x as fast as the fastest peer here, {best}", flush=True)
    elif peers:
        print("  no peer installed: pip install higher learn2learn", flush=True)
