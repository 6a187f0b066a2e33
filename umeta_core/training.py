"""The one meta-training loop: progress, validation, checkpoints, exact resume, several processes."""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .episodes import Episodes
from .results import provenance
from .snapshots import clear, take
from .speed import world
from .storage import load_tensors, save_tensors


class NonFiniteLoss(ArithmeticError):
    """The training loss became NaN or infinite; the last checkpoint is from before."""


def train(
    learner: nn.Module,
    source,
    *,
    steps: int,
    tasks: int,
    way: int,
    shot: int,
    query: int,
    lr: float | Callable[[int], float] = 1e-3,
    clip: float | None = None,
    prepare: Callable[[torch.Tensor], None] | None = None,
    seed: int = 0,
    device="cpu",
    checkpoint: str | Path | None = None,
    save_every: float = 120,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every: int = 0,
    keep_best: bool = False,
    patience: int | None = None,
    snapshots: str | Path | None = None,
    log_every: int = 100,
    config: dict | None = None,
    progress: bool = True,
) -> dict:
    """Meta-train with Adam on episodes of `source`; returns the history.

    Args:
        learner: ``loss(episodes) -> (losses [T], accuracies [T])``.
        source: ``sample(tasks, way, shot, query, generator) -> Episodes``; if it has a `state_dict`, a checkpoint
            holds that too.
        tasks: episodes per step, over all processes together.
        lr: of Adam, or a function from the number of steps done to it; clip: bound on each entry of the gradient
            (CACTUs, mini-ImageNet; reference code).
        prepare: called with the mean loss before each step of Adam, to change the gradients in place (LEO); it also
            answers for a loss that is not finite, which then stops nothing: the history counts such steps as "skipped".
        checkpoint: file to resume from if it exists and to write every `save_every` seconds and at the end. A resumed
            run continues bit-identically on the CPU, of one process if the source has a state of its own.
        validate: called every `validate_every` steps; its value goes into the history. keep_best: at the end the
            learner has the weights of the highest value, not the last ones. patience: early stopping, once so many
            values in a row were no new highest; the history then says after how many steps, as "stopped".
        snapshots: folder for the weights after every `validate_every` steps and after the last (see `snapshots`).
        config: what else must agree for a checkpoint to fit, for example the network's size.

    Under ``torchrun`` each process takes its share of every batch of tasks, gradients are averaged over all tasks that
    were done, and process 0 prints and writes. All processes draw the same batch, so the tasks are those of a single
    process; but statistics of a batch norm over all images of a batch are those of a process's share.

    Returns:
        ``{"step": [...], "loss": [...], "accuracy": [...], "validation": [[step, value], ...], "seconds": float,
        "made_by": [...]}``, loss and accuracy averaged since the entry before, made_by the commit, device and versions
        of each process that trained; with `validate` also "validation_seconds". Where `prepare` made up for every
        loss of an interval, its loss and accuracy are None.

    Raises:
        NonFiniteLoss: the loss is not finite; nothing is written from then on.
        ValueError: the checkpoint belongs to another run (the message names the fields that differ), is beyond `steps`,
            did not keep the best weights that are asked for, or has the random numbers of another kind of device; fewer
            tasks than processes; `tasks` or `log_every` below 1; snapshots or `validate` without `validate_every`,
            `keep_best` or `patience` without `validate`.
    """
    _check(tasks, log_every, snapshots, validate, validate_every, keep_best, patience)
    fixed = dict(config or {}, tasks=tasks, way=way, shot=shot, query=query, clip=clip, seed=seed,
                 lr=lr(0) if callable(lr) else lr)  # fmt: skip
    run = _Run(learner, source, config=fixed, schedule=lr if callable(lr) else None, prepare=prepare, device=device,
               checkpoint=checkpoint)  # fmt: skip
    if keep_best and run.history["validation"] and run.best is None:
        raise ValueError(f"{checkpoint} did not keep its best weights; go on without keep_best, or with another file")
    if run.step > steps:
        raise ValueError(f"{checkpoint} is at step {run.step:,}, beyond the {steps:,} asked for; choose another file")
    if run.step < steps and not run.is_stale(patience):
        run.begin()
    if snapshots and run.step == 0 and run.rank == 0:
        clear(snapshots)
    report = _Report(run, steps, progress and run.rank == 0)
    saved = time.monotonic()
    learner.train()
    while run.step < steps and not run.is_stale(patience):
        started = time.perf_counter()
        run.one_step(tasks, way, shot, query)
        if logged := run.step % log_every == 0 or run.step == steps:
            run.log()  # waits for a GPU, so that its time counts
        run.history["seconds"] += time.perf_counter() - started
        if logged:
            report.show()
        if validate and run.step % validate_every == 0:
            run.check()
            run.validate(validate, keep_best)
        if snapshots and run.rank == 0 and (run.step % validate_every == 0 or run.step == steps):
            run.check()
            take(learner, snapshots, run.step)
        if checkpoint and (time.monotonic() - saved > save_every or run.step == steps or run.is_stale(patience)):
            run.save()
            saved = time.monotonic()
    report.close()
    if run.step < steps:
        run.history["stopped"] = run.step
    if keep_best and run.best is not None:
        learner.load_state_dict(run.best)
    return run.history | {"made_by": run.made_by}


def _check(tasks, log_every, snapshots, validate, validate_every, keep_best, patience) -> None:
    """ValueError: arguments of `train` that do not go together."""
    if min(tasks, log_every) < 1:
        raise ValueError(f"tasks={tasks}, log_every={log_every}: both must be at least 1")
    if (snapshots or validate) and not validate_every:
        raise ValueError("validations and snapshots come every `validate_every` steps; say how many")
    if (keep_best or patience) and not validate:
        raise ValueError("keep_best and patience need `validate`, which tells what is best")


class _Run:
    """The state of a run: everything that a checkpoint holds."""

    def __init__(self, learner, source, *, config: dict, schedule, prepare, device, checkpoint):
        self.learner, self.source, self.config, self.prepare = learner, source, config, prepare
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.generator = torch.Generator(device=device).manual_seed(config["seed"])
        self.params = [p for p in learner.parameters() if p.requires_grad]
        self.schedule = schedule
        self.optimizer = torch.optim.Adam(self.params, lr=config["lr"])
        self.step = 0
        self.history = {"step": [], "loss": [], "accuracy": [], "validation": [], "seconds": 0.0}
        self.recent: list[torch.Tensor] = []
        self.best: dict | None = None
        self.made_by: list[dict] = []  # one entry for each process that trained
        self.foreign = False  # whether the checkpoint's random numbers are those of another kind of device
        self.rank, self.world = _processes(device)
        if self.checkpoint and self.checkpoint.exists():
            self.load()

    def begin(self) -> None:
        """Before the first step of this process. ValueError: its random numbers cannot go on from the checkpoint's."""
        device = self.generator.device
        if self.foreign:
            raise ValueError(
                f"{self.checkpoint} was written on another kind of device than {device.type}, whose random numbers "
                "differ; go on there, or start afresh with another file"
            )
        self.made_by = [*self.made_by, provenance(device)]

    def one_step(self, tasks: int, way: int, shot: int, query: int) -> None:
        """Draw tasks, average the gradients of all processes, and update. NonFiniteLoss: on a CPU, at once."""
        episodes = self.source.sample(tasks, way, shot, query, self.generator)
        losses, accuracies = self.learner.loss(self._share(episodes))
        self.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        mean = torch.stack([losses.detach().mean(), accuracies.mean()])
        if self.world > 1:
            averages = [b for b in self.learner.buffers() if b.is_floating_point()]  # of batch norm
            _average([p.grad for p in self.params] + averages + [mean], len(losses))
        self.recent.append(mean)
        if self.prepare is not None:
            self.prepare(mean[0])
        elif mean.device.type == "cpu":
            self._check(mean)
        if self.config["clip"] is not None:
            nn.utils.clip_grad_value_(self.params, self.config["clip"])
        if self.schedule:
            self.optimizer.param_groups[0]["lr"] = self.schedule(self.step)
        self.optimizer.step()
        self.step += 1

    def validate(self, validate, keep_best: bool) -> None:
        started = time.perf_counter()
        self.history["validation"].append([self.step, self.agreed(validate(self.learner))])
        if keep_best and self.is_best():
            self.best = copy.deepcopy(self.learner.state_dict())
        spent = self.history.get("validation_seconds", 0.0)
        self.history["validation_seconds"] = spent + time.perf_counter() - started

    def is_best(self) -> bool:
        """Whether the last validation is above all before."""
        *before, last = (value for _, value in self.history["validation"])
        return not before or last > max(before)

    def agreed(self, value: float) -> float:
        """The value of process 0: others may differ in the last digit, and all must stop at the same step."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        shared = torch.tensor(value, dtype=torch.float64, device=self.generator.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def is_stale(self, patience: int | None) -> bool:
        """Whether the last `patience` validations brought no new best."""
        values = [value for _, value in self.history["validation"]]
        return patience is not None and len(values) - patience > values.index(max(values)) if values else False

    def _share(self, episodes: Episodes) -> Episodes:
        if self.world == 1:
            return episodes
        if len(episodes) < self.world:
            raise ValueError(f"{len(episodes)} tasks per step are fewer than {self.world} processes")
        first, last = (len(episodes) * number // self.world for number in (self.rank, self.rank + 1))
        return episodes[first:last]

    def _check(self, mean: torch.Tensor) -> None:
        if not torch.isfinite(mean).all():
            raise NonFiniteLoss(
                f"the loss became {mean[0].item()} at step {self.step}{self._kept()}. "
                "Lower the learning rates or clip the gradient."
            )

    def _kept(self) -> str:
        return f"; the last checkpoint, {self.checkpoint}, is from before" if self.checkpoint else ""

    def log(self) -> None:
        """Put the means since the last call into the history. NonFiniteLoss: they are not, and nothing skips steps."""
        recent = torch.stack(self.recent)
        if self.prepare is not None:
            finite = recent.isfinite().all(1)
            self.history["skipped"] = self.history.get("skipped", 0) + int((~finite).sum())
            recent = recent[finite]
        mean = (None, None)  # all of them were skipped
        if len(recent):
            self._check(recent.mean(0))
            mean = recent.mean(0).tolist()
        self.recent = []
        for key, value in zip(("step", "loss", "accuracy"), (self.step, *mean)):
            self.history[key].append(value)

    def check(self) -> None:
        """Nothing that is not finite may be kept, validated or written. NonFiniteLoss: the loss or a weight is not."""
        if self.recent and self.prepare is None:
            self._check(torch.stack(self.recent).mean(0))
        if not torch.stack([p.detach().isfinite().all() for p in self.params]).all():
            raise NonFiniteLoss(
                f"a weight is not finite at step {self.step}, though the loss is{self._kept()}. "
                "Lower the learning rates or clip the gradient."
            )

    def save(self) -> None:
        """Write the checkpoint, in the first process alone. NonFiniteLoss: as `check`, and the old file stays."""
        if self.rank != 0:
            return
        self.check()
        state = {
            "step": self.step,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "config": self.config,
            "history": self.history,
            "recent": self.recent,
            "best": self.best,
            "source": self.source.state_dict() if hasattr(self.source, "state_dict") else None,
            "made_by": self.made_by,
        }
        save_tensors(state, self.checkpoint)

    def load(self) -> None:
        """Go on from the checkpoint. ValueError: it is of another run, or of another network."""
        state = read_checkpoint(self.checkpoint)
        old, new = state["config"], self.config
        old = {"stages": new["stages"], **old} if "stages" in new else old  # older files do not name theirs
        differ = [
            f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in sorted({*old, *new}) if old.get(k) != new.get(k)
        ]
        if differ:
            raise ValueError(
                f"{self.checkpoint} belongs to another run ({'; '.join(differ)}); "
                "choose another file or the same settings"
            )
        try:
            self.learner.load_state_dict(state["learner"])
        except RuntimeError as error:
            raise ValueError(
                f"{self.checkpoint} holds another network: {str(error).splitlines()[-1].strip()}"
            ) from None
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.generator.device
        self.foreign = len(state["generator"]) != len(self.generator.get_state())
        if not self.foreign:
            self.generator.set_state(state["generator"].cpu())
        self.step, self.history, self.made_by = state["step"], state["history"], state.get("made_by", [])
        self.recent = [mean.to(device) for mean in state["recent"]]
        self.best = state.get("best")
        if state.get("source") is not None:
            self.source.load_state_dict(state["source"])


class _Report:
    """A progress bar on a terminal, else a line every half minute."""

    def __init__(self, run: _Run, steps: int, shown: bool):
        self.run, self.steps, self.shown, self.bar = run, steps, shown and not os.environ.get("TQDM_DISABLE"), None
        self.started, self.first, self.last = time.monotonic(), run.step, time.monotonic()
        if self.shown and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=steps, initial=run.step, unit="step")

    def show(self) -> None:
        """Print or draw where the run is, if it is time."""
        if not self.shown:
            return
        h, run = self.run.history, self.run
        text = "every loss of late was skipped"
        if h["loss"][-1] is not None:
            text = f"loss {h['loss'][-1]:.4f}"
            if any(h["accuracy"]):  # Meta-GMVAE and regressions have none
                text += f" accuracy {100 * h['accuracy'][-1]:.1f} %"
        if h["validation"]:
            text += f" validation {h['validation'][-1][1]:.2f} %"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(run.step - self.bar.n)
        elif time.monotonic() - self.last > 30 or run.step == self.steps:
            self.last = time.monotonic()
            rate = (run.step - self.first) / (self.last - self.started)
            left = (self.steps - run.step) / rate
            print(
                f"step {run.step}/{self.steps}  {text}  {rate:.1f} steps/s  {left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def read_checkpoint(path: str | Path) -> dict:
    """The contents of a checkpoint, tensors on the CPU.

    Raises:
        ValueError: the file is not a checkpoint, or is damaged.
    """
    state = load_tensors(path, "checkpoint")
    if not {"step", "learner", "optimizer", "generator", "config", "history"} <= set(state):
        raise ValueError(f"{path} is not a readable checkpoint; delete it to start afresh")
    return state


def _processes(device) -> tuple[int, int]:
    """Rank and number of processes; joins the group that ``torchrun`` describes in the environment."""
    if world() == 1:
        return 0, 1
    import torch.distributed as dist

    if not dist.is_initialized():
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def _average(tensors: list[torch.Tensor], tasks: int) -> None:
    """Average in place over the tasks of all processes, of which this one did `tasks`, as one message."""
    import torch.distributed as dist

    flat = torch.cat([t.flatten() for t in tensors] + [tensors[0].new_ones(1)]) * tasks
    dist.all_reduce(flat)
    flat /= flat[-1].clone()
    at = 0
    for t in tensors:
        t.copy_(flat[at : at + t.numel()].view_as(t))
        at += t.numel()
