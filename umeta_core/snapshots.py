"""Snapshots of a training, from which each of the rows that share it chooses its own weights.

``<checkpoint>-snapshots/step-00001000.pt`` are the weights after 1000 steps, and ``<row>.json`` beside them is what a
row has validated so far.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .storage import load_tensors, save_tensors, write_json


def snapshots_of(checkpoint) -> Path:
    """The folder of the snapshots of a training with this checkpoint."""
    return Path(checkpoint).with_name(f"{Path(checkpoint).stem}-snapshots")


def take(learner: nn.Module, folder, step: int) -> None:
    """Write the weights as they are after `step` steps."""
    save_tensors(learner.state_dict(), _file(folder, step))


def clear(folder) -> None:
    """Remove the snapshots of an earlier training, and what was validated on them."""
    shutil.rmtree(folder, ignore_errors=True)


def select(
    learner: nn.Module, folder, validate: Callable[[nn.Module], float], *, steps: int, every: int, row: str, plan: dict
) -> dict:  # fmt: skip
    """Give `learner` the weights that ``validate(learner)`` rates highest, the first of equals.

    Looked at are the snapshots after each `every` steps and after the last of `steps`. Values are saved one by one, so
    that an interrupted selection goes on; those of another `plan` are not used.

    Returns:
        ``{"validation": [[step, value], ...], "validation_seconds": float}``.

    Raises:
        ValueError: a snapshot is missing or damaged, or so is what was validated.
    """
    due = [*range(every, steps, every), steps]
    missing = [str(step) for step in due if not _file(folder, step).is_file()]
    if missing:
        raise ValueError(f"{folder} has no snapshot of step {', '.join(missing)}; delete the checkpoint beside it, "
                         "and the training starts afresh")  # fmt: skip
    done = _validated(folder, row)
    done = done if done.get("plan") == json.loads(json.dumps(plan)) else {"plan": plan, "values": [], "seconds": 0.0}
    values = dict(done["values"])
    for step in due:
        if step not in values:
            started = time.perf_counter()
            learner.load_state_dict(_weights(folder, step))
            values[step] = validate(learner)
            done |= {"values": sorted(values.items()), "seconds": done["seconds"] + time.perf_counter() - started}
            write_json(done, _values_file(folder, row))
    done["chosen"] = max(due, key=values.get)
    write_json(done, _values_file(folder, row))
    learner.load_state_dict(_weights(folder, done["chosen"]))
    return {"validation": [[step, values[step]] for step in due], "validation_seconds": done["seconds"]}


def selected(folder, row: str) -> dict | None:
    """The weights that a row has chosen, or has rated highest so far; None: it has not validated any.

    Raises ValueError for a damaged file.
    """
    step = chosen_step(folder, row)
    return None if step is None else _weights(folder, step)


def chosen_step(folder, row: str) -> int | None:
    """After how many steps the weights of `selected` were taken; None and ValueError as there."""
    done = _validated(folder, row)
    values = dict(done.get("values", []))
    return done.get("chosen", max(values, key=values.get, default=None))


def last_weights(folder, steps: int) -> dict:
    """The weights after the last of `steps` steps."""
    return _weights(folder, steps)


def _validated(folder, row: str) -> dict:
    file = _values_file(folder, row)
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to validate afresh") from None


def _values_file(folder, row: str) -> Path:
    return Path(folder) / f"{row}.json"


def _file(folder, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}.pt"


def _weights(folder, step: int) -> dict:
    return load_tensors(_file(folder, step), "snapshot")
