"""The rows of the papers' tables as data, and the one function that runs any of them.

A row is a task source, a learner and a protocol; one training serves all of the row's tests.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from .data import ABOUT, known, load
from .episodes import PartitionTasks
from .evaluation import evaluate, evaluate_curve
from .maml import MAML
from .networks import Conv4
from .protonets import ProtoNet
from .results import REPOSITORY, SCALES, matches, provenance, published, results_folder, write_record
from .training import train

NOTEBOOKS = REPOSITORY / "notebooks" / "experiments"
TEST_QUERY = 5  # per class, always (CACTUs, section 4.1)

# Seconds per training step on 20-way tasks, and per image and test pass, for the printed plan only. Measured with one
# thread of an AMD EPYC (Zen 5) on Omniglot; "None" is a device on which nobody has measured yet.
_RATES = {("protonets", "cpu"): (0.13, 4.5e-4), ("maml", "cpu"): (0.24, 1e-4)}


@dataclass(frozen=True)
class Row:
    """One row of a published table. `method`, `embedding` and `variant` are spelled as in ``results/paper``.

    `learner` is "protonets" or "maml", made with the keyword arguments `network` (of Conv4) and `options`. `steps` maps
    a scale to the number of meta-training steps; "full" is the paper's. `tasks`, `way`, `shot`, `query` and `lr` are
    those of meta-training; `tests` are (way, shot) pairs, each measured on `test_tasks` tasks. `deviation` says where
    even the full run departs from the paper; such a run is never called reproduced.
    """

    slug: str
    table: str
    method: str
    learner: str
    network: dict
    options: dict
    steps: dict
    tasks: int
    query: int
    variant: str = ""
    embedding: str = ""
    paper: str = "cactus"
    dataset: str = "omniglot"
    split_protocol: str | None = "cactus"
    source: str = "labels"
    way: int = 20
    shot: int = 1
    lr: float = 1e-3
    tests: tuple = ((5, 1), (5, 5), (20, 1), (20, 5))
    test_tasks: dict = field(default_factory=lambda: {"smoke": 5, "quick": 100, "full": 1000})
    deviation: str = ""
    at_most: int | None = None

    def budget(self, scale: str) -> int:
        """Training steps at `scale`, or `at_most` if that is fewer; the record then says "reduced budget"."""
        return min(self.steps[scale], self.steps[scale] if self.at_most is None else self.at_most)

    def protocol(self) -> dict:
        """Every switch that moves a number, for the record."""
        training = {"train_way": self.way, "train_shot": self.shot, "train_query": self.query, "outer_lr": self.lr}
        place = {"source": self.source, "split": self.split_protocol, "test_query": TEST_QUERY}
        norm = {} if self.learner == "protonets" else {"batch_norm": "transductive"}
        return place | (training if self.steps["full"] else {}) | self.network | norm | self.options


# Tables 5 and 6 of the paper; what they do not say is from its code (see the chapter's ledger).
_MAML_NETWORK = {"filters": 32, "downsample": "stride", "head": "mean", "norm": "shift", "eps": 1e-3,
                 "head_init": "normal"}  # fmt: skip

_ORACLE_PROTONETS = Row(
    slug="oracle-protonets", table="8", method="Oracle-ProtoNets (control)", variant="supervised",
    learner="protonets", network={"filters": 64}, options={"distance": "sum", "batch_norm": "inductive"},
    steps={"smoke": 3, "quick": 400, "full": 30_000}, tasks=1, query=15,
)  # fmt: skip
_ORACLE_MAML = Row(
    slug="oracle-maml", table="8", method="Oracle-MAML (control)", variant="supervised",
    learner="maml", network=_MAML_NETWORK,
    options={"inner_lr": 0.05, "inner_steps": 5, "test_steps": 50, "inner_loss": "sum", "adapt_norm": False},
    steps={"smoke": 2, "quick": 300, "full": 30_000}, tasks=8, query=5,
)  # fmt: skip
_SCRATCH = Row(  # the same network from one random initialization that all tasks share, adapted longer and faster
    slug="scratch", table="8", method="Training from scratch", learner="maml", network=_MAML_NETWORK,
    options={"inner_lr": 0.1, "test_steps": 200, "inner_loss": "sum", "adapt_norm": False},
    steps={"smoke": 0, "quick": 0, "full": 0}, tasks=0, query=0, test_tasks={"smoke": 2, "quick": 40, "full": 1000},
)  # fmt: skip


ROWS = (
    _ORACLE_PROTONETS,
    _ORACLE_MAML,
    replace(_ORACLE_MAML, slug="oracle-maml-5way", way=5, tests=((5, 1), (5, 5)), deviation="trained on 5-way tasks"),
    _SCRATCH,
)


def on_dataset(row: Row, dataset: str) -> Row:
    """The same experiment on another dataset that `load` knows; its slug then ends in the dataset's name."""
    if dataset == row.dataset:
        return row
    split = "cactus" if dataset == "omniglot" else None
    return replace(row, slug=f"{row.slug}-{dataset.replace('_', '-')}", dataset=dataset, split_protocol=split)


def find_row(slug: str, dataset: str | None = None) -> Row:
    """The row named `slug` (``oracle-maml``, or ``oracle-maml-mnist`` for its move to another dataset).

    `dataset` moves it. ValueError lists the rows there are.
    """
    for row in ROWS:
        place = row.dataset if slug == row.slug else slug.removeprefix(f"{row.slug}-").replace("-", "_")
        if slug.startswith(row.slug) and place in ABOUT:
            known(dataset or place)
            return on_dataset(row, dataset or place)
    raise ValueError(f"unknown row {slug!r}; rows: {', '.join(row.slug for row in ROWS)}")


def select_rows(paper: str, table=None, names: str | None = None, dataset: str | None = None) -> list[Row]:
    """The rows of a paper's table whose slug contains one of the comma-separated `names`, moved to `dataset` if given.

    Raises ValueError, naming what there is, when nothing is left.
    """
    numbers = published(paper)
    rows = [row for row in ROWS if row.paper == paper]
    if table is not None:
        tables = sorted({number["table"] for number in numbers})
        if str(table) not in tables:
            raise ValueError(f"{paper} has no table {table!r}; its tables: {', '.join(tables)}")
        rows = [row for row in rows if any(n["table"] == str(table) and matches(n, asdict(row)) for n in numbers)]
    if dataset is not None:
        known(dataset)
        rows = [on_dataset(row, dataset) for row in rows]
    if names is not None:
        rows = [row for row in rows if any(name.strip() in row.slug for name in names.split(","))]
    if not rows:
        there = ", ".join(row.slug for row in ROWS if row.paper == paper) or "none yet"
        raise ValueError(f"no row of {paper} fits; its rows: {there}")
    return rows


def build_learner(row: Row, channels: int, size: int, seed: int) -> torch.nn.Module:
    """The row's learner for square images, initialized from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    if row.learner == "protonets":
        return ProtoNet(Conv4(channels, size, **row.network, generator=generator), **row.options)
    return MAML(Conv4(channels, size, way=row.way, **row.network, generator=generator), **row.options)


def untrained(row: Row, seed: int, device="cpu") -> torch.nn.Module:
    """The row's learner as it is before training, made for its dataset's images."""
    images = load(row.dataset, "test", protocol=row.split_protocol)
    return build_learner(row, *images.images.shape[1:3], seed).to(device)


def train_row(row: Row, scale: str, seed: int, device="cpu", checkpoint=None) -> tuple[torch.nn.Module, dict]:
    """Meta-train the row's learner, going on from `checkpoint` if it exists. Returns the learner and the history."""
    learner = untrained(row, seed, device)
    if row.budget(scale) == 0:
        return learner, {"step": [], "loss": [], "accuracy": [], "seconds": 0.0}
    source = PartitionTasks(load(row.dataset, "train", protocol=row.split_protocol, device=device))
    history = train(
        learner, source, steps=row.budget(scale), tasks=row.tasks, way=row.way, shot=row.shot, query=row.query,
        lr=row.lr, seed=seed, device=device, checkpoint=checkpoint, config={"row": row.slug, **row.protocol()},
    )  # fmt: skip
    return learner, history


def measure(row: Row, learner, scale: str, seed: int, device="cpu") -> list[dict]:
    """Test `learner` on every (way, shot) of the row: the cells of the record, for MAML with the adaptation curve.

    The test tasks are drawn from `seed`, so all rows of one seed meet the same tasks and seeds are independent.
    """
    source = PartitionTasks(load(row.dataset, "test", protocol=row.split_protocol, device=device))
    cells = []
    learner.eval()
    for way, shot in row.tests:
        task = {"way": way, "shot": shot, "query": TEST_QUERY, "tasks": row.test_tasks[scale]}
        if isinstance(learner, MAML):
            last = learner.test_steps
            at = sorted({*range(min(10, last)), *range(0, last, 5), last})
            *_, result = path = evaluate_curve(learner, source, at, seed=seed, **task)
            curve = {"curve": {"steps": at, "accuracy": [round(point.mean, 3) for point in path]}}
        else:
            result, curve = evaluate(learner, source, seed=seed, **task), {}
        cells.append(task | {"accuracy": round(result.mean, 4), "ci95": round(result.ci95, 4)} | curve)
    return cells


def run_row(row: Row, scale="quick", seed=0, device="cpu", folder=None, checkpoint=None, notebook=None) -> dict:
    """Train and test one row and write its record. Returns the record.

    Args:
        scale: "smoke" (seconds), "quick" (a minute or two) or "full" (the paper's budget).
        folder: of the records (None: see `results.results_folder`).
        checkpoint: file to save to and resume from; an interrupted run goes on where it stopped.
        notebook: path of the executed notebook, to be named in the record.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; scales: {', '.join(SCALES)}")
    origin = provenance(device)  # before the run: the code that is about to be executed
    learner, history = train_row(row, scale, seed, device, checkpoint)
    started = time.perf_counter()
    cells = measure(row, learner, scale, seed, device)
    record = {
        "paper": row.paper, "table": row.table, "row": row.slug, "method": row.method, "embedding": row.embedding,
        "variant": row.variant, "dataset": row.dataset, "scale": scale, "seed": seed, "steps": row.budget(scale),
        "paper_steps": row.steps["full"], "tasks_per_step": row.tasks, "deviation": row.deviation, "cells": cells,
        "seconds": round(history["seconds"], 1), "test_seconds": round(time.perf_counter() - started, 1),
        "history": _thinned(history), "protocol": row.protocol(), "notebook": notebook, **origin,
    }  # fmt: skip
    write_record(record, folder)
    return record


def _thinned(history: dict, points: int = 100) -> dict:
    """The training curve at no more than about 100 points, short enough for a record."""
    every = -(-len(history["step"]) // points) or 1
    keep = range(len(history["step"]) - 1, -1, -every)[::-1]
    return {name: [round(history[name][i], 4) for i in keep] for name in ("step", "loss", "accuracy")}


def expected_seconds(row: Row, scale: str, device="cpu") -> float | None:
    """Rough seconds of one run with one thread, from measured rates; None where nobody has measured."""
    rates = _RATES.get((row.learner, torch.device(device).type))
    if rates is None:
        return None
    per_step, per_image = rates
    steps = row.options.get("test_steps", 1)  # an adaptation step passes the support images only
    images = sum(way * (shot * steps + TEST_QUERY) for way, shot in row.tests)
    return 15 + row.steps[scale] * per_step * row.way / 20 + row.test_tasks[scale] * images * per_image


def execute_notebook(row: Row, scale: str, seed: int, device="cpu", threads=1, folder=None, runs="runs", restart=False):
    """Execute the paper's experiment notebook for one row with papermill; returns the path of the executed copy.

    The notebook calls `run_row`, so the record is written on the way. The copy and the checkpoint are
    ``<runs>/<paper>/<row>-<scale>-seed<seed>`` with ``.ipynb`` and ``.pt``; `restart` deletes an old checkpoint.
    """
    stem = Path(runs).resolve() / row.paper / f"{row.slug}-{scale}-seed{seed}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    copy, checkpoint = Path(f"{stem}.ipynb"), Path(f"{stem}.pt")
    if restart:
        checkpoint.unlink(missing_ok=True)
    parameters = {"row": row.slug, "scale": scale, "seed": seed, "device": str(device), "threads": threads,
                  "results": str(results_folder(folder).resolve()), "checkpoint": str(checkpoint),
                  "notebook": f"runs/{row.paper}/{copy.name}"}  # fmt: skip
    run_notebook(NOTEBOOKS / f"{row.paper}.ipynb", copy, parameters)
    return copy


def run_notebook(notebook, copy, parameters: dict) -> None:
    """``papermill.execute_notebook`` that raises ValueError for a parameter that the notebook does not have.

    Papermill itself prints a line about it and runs with the default value.
    """
    import papermill

    there = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(there))
    if unknown:
        names = f"{', '.join(unknown)}; it has {', '.join(sorted(there))}"
        raise ValueError(f"{Path(notebook).name} has no parameter {names}")
    papermill.execute_notebook(str(notebook), str(copy), parameters, kernel_name="python3", progress_bar=False,
                               stdout_file=sys.stdout, stderr_file=sys.stderr)  # fmt: skip
