"""The process: settings that make the same arithmetic faster, and its place among several under ``torchrun``."""

from __future__ import annotations

import ctypes
import os


def tune_cpu() -> bool:
    """Tell glibc to keep large freed blocks instead of returning them to the system; True where it applied.

    A training step frees and asks for the same few megabytes again and again; page faults are a third to a half of
    its time otherwise. The price is that the process keeps its peak memory. Never called at import: the command
    line and the notebooks call it first thing. Does nothing on systems without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mmap_threshold, trim_threshold = -3, -1
    return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, 2**31 - 1))


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank() -> int:
    """The number of this process among those that ``torchrun`` has started, 0 for one alone."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes ``torchrun`` has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_of_process(name: str) -> str:
    """The device of this process: under ``torchrun`` each has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name
