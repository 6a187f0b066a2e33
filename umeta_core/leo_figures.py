"""The numbers behind LEO's Figures 3, 4 and 5 at full scale, as files of ``results/leo/figures``.

    python -m umeta_core.leo_figures analysis --suffix small --shot 1 --stages STAGES --checkpoints FOLDER
    python -m umeta_core.leo_figures codes --suffix small --shot 1 --stages STAGES --checkpoints FOLDER
    python -m umeta_core.leo_figures regression --seed 0 --checkpoint FILE

`analysis` reads the checkpoints of three trained rows, ``<row>-<scale>-seed<seed>.pt``, and `codes` that of LEO;
`regression` trains.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

from .episodes import PartitionTasks
from .evaluation import sample_blocks
from .experiments import testing_tasks, trained, untrained
from .leo import LEO
from .leo_analysis import codes_see, curvature, meta_sgd_path, singular_values, step_lengths
from .leo_regression import (
    LEORegression,
    Regression,
    RegressionTasks,
    ambiguous_tasks,
    both_families,
    distances,
    tasks_by_belief,
)
from .results import SCALES, check_writable, own_folder, provenance
from .rows import Row, find_row
from .speed import tune_cpu
from .storage import write_json
from .training import train

PERCENTILES = (5, 25, 50, 75, 95)
ANALYZED = ("leo", "leo-generator-tuned", "meta-sgd")


def percentiles(values: Tensor, most=1_000_000) -> list[float]:
    """Those of a box with whiskers from 5 to 95, over all numbers of a tensor."""
    marks = torch.tensor(PERCENTILES, dtype=torch.float64) / 100
    flat = values.detach().double().flatten()
    return [float(f"{v:.4g}") for v in torch.quantile(flat[:: -(-len(flat) // most)], marks)]


def analyze(learner, source, shot: int, tasks: int, seed: int) -> dict:
    """Curvature at the first inner step and the length of every inner step over test tasks (LEO, Fig. 5).

    Curvature is that in the space of weights, and for LEO that in the space of codes too, whether or not it takes steps
    there. Eigenvalues below 1e-6 of the task's largest count as zero and are left out.
    """
    values, lengths = {"weights": [], "codes": []}, []
    for e in sample_blocks(source, tasks, 5, shot, 1, seed):
        x, y, _, _ = e.flat()
        is_leo = isinstance(learner, LEO)
        path = learner.adapt(e.support, first=e.first).weights if is_leo else meta_sgd_path(learner, x, y)
        logits = (x @ path[0].transpose(1, 2)).detach().double()
        values["weights"].append(not_zero(curvature(x.double(), logits)))
        if is_leo:
            values["codes"].append(not_zero(curvature(codes_see(learner, x).detach().double(), logits)))
        lengths.append(step_lengths(path))
    lengths = torch.cat(lengths)
    kinds = ["code"] * getattr(learner, "latent_steps", 0)
    kinds += ["weights"] * (lengths.shape[1] - len(kinds))
    return {"curvature": {space: percentiles(torch.cat(found)) for space, found in values.items() if found},
            "steps": [{"of": kind, "length": percentiles(lengths[:, i])} for i, kind in enumerate(kinds)]}  # fmt: skip


def not_zero(eigenvalues: Tensor, least=1e-6) -> Tensor:
    """Those of ``[T, n]`` above `least` times the largest of their task, ``[m]``."""
    return eigenvalues[eigenvalues > least * eigenvalues.amax(1, keepdim=True)]


def analysis(stages, checkpoints, shot=1, seed=0, tasks=1000, suffix="small", scale="full") -> dict:
    """Figure 5 for the three rows of `ANALYZED`, from their checkpoints; `suffix` as in `row_of`."""
    origin, done = provenance(), {}
    for name in ANALYZED:
        row = row_of(name, shot, suffix)
        learner, steps = trained(row, checkpoint_of(checkpoints, row, scale, seed), seed, scale=scale, stages=stages)
        done[name] = analyze(learner, testing_tasks(row, scale, stages=stages), shot, tasks, seed)
        done[name] |= {"steps_trained": steps}
        if isinstance(learner, LEO):
            done[name] |= {"singular_values": [round(v, 5) for v in singular_values(learner).tolist()]}
    return {"what": "analysis", "of": f"{shot}shot{'-' * bool(suffix)}{suffix}-{scale}", "percentiles": PERCENTILES,
            "shot": shot, "seed": seed, "scale": scale, "tasks": tasks, "dataset": row.dataset,
            "features": row.departs or "the paper's", "rows": done, **origin}  # fmt: skip


def codes(stages, checkpoints, shot=1, seed=0, tasks=1000, suffix="small", scale="full", mapped=400) -> dict:
    """Figure 4 for a trained LEO: a t-SNE map of the codes of the first `mapped` validation tasks, and over all tasks
    the `neighbor_shares`, for an untrained LEO too."""
    origin, row = provenance(), row_of("leo", shot, suffix)
    learner, steps = trained(row, checkpoint_of(checkpoints, row, scale, seed), seed, scale=scale, stages=stages)
    source, shares = testing_tasks(row, scale, "val", stages=stages), {}
    for name, model in (("untrained", untrained(row, seed, scale=scale, stages=stages)), ("trained", learner)):
        found, images, of_task = task_codes(model, source, tasks, shot, seed)
        classes = source.images.labels[images]
        shares[name] = rounded(neighbor_shares(found, classes, of_task, images if shot == 1 else None))
    few = int((of_task < mapped).sum())
    places = {kind: {axis: rounded(values.tolist(), 2) for axis, values in zip("xy", place.T)}
              for kind, place in zip(("first", "adapted"), tsne(found[:, :few], seed))}  # fmt: skip
    return {"what": "codes", "of": f"{row.slug}-{scale}", "shot": shot, "seed": seed, "scale": scale, "tasks": tasks,
            "dataset": row.dataset, "features": row.departs or "the paper's", "steps_trained": steps, **shares,
            "map": places, "classes": classes[:few].tolist(), "class_names": source.images.class_names,
            **origin}  # fmt: skip


def task_codes(model: LEO, source: PartitionTasks, tasks: int, shot: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and adapted codes of 5-way tasks, means over copies, ``[2, 5 tasks, n_z]``; for each code the number of its
    class's first support image, and of its task."""
    carrying, found, images = copy.copy(source), [], []  # each vector carries the number of its image
    number = torch.arange(len(source.features), dtype=source.features.dtype).unsqueeze(1)
    carrying.features = torch.cat([source.features, number], 1)
    for e in sample_blocks(carrying, tasks, 5, shot, 1, seed):
        path = model.adapt(e.support[..., :-1], first=e.first).codes
        found.append(torch.stack([path[i].detach().mean(2).flatten(0, 1) for i in (0, -1)]))
        images.append(e.support[:, :, 0, -1].long().flatten())
    return torch.cat(found, 1), torch.cat(images), torch.arange(tasks).repeat_interleave(5)


def neighbor_shares(codes: Tensor, classes: Tensor, tasks: Tensor, images: Tensor | None = None) -> dict[str, float]:
    """The claims of LEO's Fig. 4 in the space of codes, not of the map.

    The nearest neighbor of a code is looked for in other tasks, and if `images` are given, among codes of other images.

    Args:
        codes: first and adapted ones, ``[2, n, n_z]``; classes, tasks, images: of each, ``[n]``.

    Returns:
        ``first``, ``adapted``: share of codes whose neighbor among their own kind is of the same class; ``kind``: share
        whose neighbor among all is of their own kind; ``moved``: how far adaptation moves codes on average, in units of
        how far first codes lie from their mean.
    """
    images = tasks if images is None else images

    def share(z, group, copies=1):
        task, image, right = tasks.repeat(copies), images.repeat(copies), 0
        for i in torch.arange(len(z)).split(1000):
            near = (task[i].unsqueeze(1) == task) | (image[i].unsqueeze(1) == image)
            away = torch.cdist(z[i], z).masked_fill_(near, torch.inf)
            right += int((group[away.argmin(1)] == group[i]).sum())
        return right / len(z)

    kind, (first, adapted) = torch.arange(2).repeat_interleave(codes.shape[1]), codes
    moved = (adapted - first).norm(dim=1).mean() / (first - first.mean(0)).norm(dim=1).mean()
    return {"first": share(first, classes), "adapted": share(adapted, classes),
            "kind": share(codes.flatten(0, 1), kind, 2), "moved": moved.item()}  # fmt: skip


def tsne(codes: Tensor, seed: int = 0) -> Tensor:
    """One map of first and adapted codes ``[2, n, n_z]``, ``[2, n, 2]``."""
    from sklearn.manifold import TSNE

    flat = codes.flatten(0, 1).numpy()
    placed = TSNE(perplexity=min(30, len(flat) / 4), init="pca", random_state=seed, n_jobs=1).fit_transform(flat)
    return torch.tensor(placed).unflatten(0, (2, -1))


def row_of(name: str, shot: int, suffix: str) -> Row:
    """``<name>-<shot>shot-<suffix>``: "small" is on features a processor can train, "" on the paper's."""
    return find_row(f"{name}-{shot}shot" + (f"-{suffix}" if suffix else ""))


def checkpoint_of(folder, row: Row, scale: str, seed: int) -> Path:
    """Where ``umeta reproduce`` keeps the row's weights."""
    return Path(folder) / f"{row.slug}-{scale}-seed{seed}.pt"


def regression(seed=0, steps=(40_000, 20_000), checkpoint=None, ambiguous=200) -> dict:
    """Train on sines and lines, first at Adam's 1e-3 then at 1e-4, and measure Figure 3's claim.

    With the `checkpoint` of a finished run nothing is trained, and what it learned is measured again.
    """
    origin, seconds = provenance(), 0.0
    learner, source, before = LEORegression(generator=torch.Generator().manual_seed(seed)), RegressionTasks(), 0
    curve = {"step": [], "loss": []}
    for stage, (many, lr) in enumerate(zip(steps, (1e-3, 1e-4))):
        history = train(learner, source, steps=many, tasks=12, way=1, shot=5, query=10, lr=lr, seed=seed + 1000 * stage,
                        prepare=learner.prepare_gradients, log_every=500, progress=False,
                        checkpoint=checkpoint and f"{checkpoint}.stage{stage}")  # fmt: skip
        curve["step"] += [before + s for s in history["step"]]
        curve["loss"] += [round(v, 4) for v in history["loss"]]
        before += many
        seconds += history["seconds"]  # over all processes that worked on it
    return {"what": "regression", "seed": seed, "steps": sum(steps), "seconds": round(seconds, 1), "history": curve,
            **examine(learner, source, seed, ambiguous), **origin}  # fmt: skip


def examine(learner: LEORegression, source: RegressionTasks, seed: int, ambiguous: int) -> dict:
    """Errors before and after adaptation on 500 tasks; how so many ambiguous tasks, and twice as many certain ones, are
    answered; panels of a certain sine, a certain line and four ambiguous tasks: the first ones, not the finest."""
    generator = torch.Generator().manual_seed(seed + 1)
    batch = source.sample(500, 1, 5, 20, generator)
    error = {}
    for name, many in (("before", 0), ("after", None)):
        y = learner.predict(batch, batch.query_x, 1, generator, many)[0]
        each = (y - batch.query_y).square().mean(1)
        error[name] = {"mean": round(each.mean().item(), 4), "median": round(each.median().item(), 4)}
    x = torch.linspace(-5, 5, 101)
    tasks, belief = ambiguous_tasks(source, ambiguous, generator)
    curves = learner.predict(tasks, x, 100, generator)
    share = both_families(distances(curves, x), belief)
    certain, belief = certain_tasks(source, 2 * ambiguous, generator)
    others = learner.predict(certain, x, 100, generator)
    del share["both_elsewhere"]  # there were no others
    share["both_certain"] = both_families(distances(others, x), belief)["both_elsewhere"]
    return {"error": error, "ambiguous": rounded(share), "x": rounded(x.tolist()),
            "certain": [_panel(certain, others, x, i) for i in sine_and_line(certain)],
            "panels": [_panel(tasks, curves, x, i) for i in range(4)]}  # fmt: skip


def _panel(tasks: Regression, curves: Tensor, x: Tensor, i: int) -> dict:
    return rounded({"support_x": tasks.support_x[i].tolist(), "support_y": tasks.support_y[i].tolist(),
                    "line": tasks.line[i].item(), "truth": tasks.curve(x)[i].tolist(),
                    "curves": curves[:8, i].tolist()})  # fmt: skip


def certain_tasks(source: RegressionTasks, tasks: int, generator, doubt=0.01) -> tuple[Regression, Tensor]:
    """5-shot tasks whose other family has a probability below `doubt`, and the belief in a line ``[T]``.

    Most tasks are of this kind; drawing goes on until there are enough.
    """
    return tasks_by_belief(source, tasks, generator, lambda found: found < doubt, tasks, 15)


def sine_and_line(tasks: Regression) -> list[int]:
    """The first sine and the first line of many tasks."""
    return [int((tasks.line == line).nonzero()[0]) for line in (False, True)]


def rounded(value, digits=4):
    """A nested structure with the floats rounded."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return [rounded(v, digits) for v in value] if isinstance(value, list) else value


def write(record: dict, folder=None) -> Path:
    """``<results>/leo/figures/<what>-<of>-seed<seed>.json``, whole or not at all."""
    name = "-".join(record[key] for key in ("what", "of") if key in record)
    path = own_folder(folder) / "leo" / "figures" / f"{name}-seed{record['seed']}.json"
    return write_json(record, path)


def main() -> None:
    """Write one of the three records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("analysis", "codes", "regression"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suffix", default="small", help="of the rows; '' for the paper's features")
    parser.add_argument("--shot", type=int, choices=(1, 5), default=1)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--scale", choices=SCALES, default="full", help="at which the rows were trained")
    parser.add_argument("--stages", default="runs/leo/stages")
    parser.add_argument("--checkpoints", default="runs/leo")
    parser.add_argument("--checkpoint", help="of the regression run: to resume it, or if it is finished to examine it")
    parser.add_argument("--results", help="default: $UMETA_RESULTS, else the repository's")
    given = parser.parse_args()
    tune_cpu()
    try:
        check_writable(own_folder(given.results))
        record = _record(given)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(write(record, given.results))


def _record(given) -> dict:
    if given.what == "regression":
        return regression(given.seed, checkpoint=given.checkpoint)
    make = codes if given.what == "codes" else analysis
    return make(given.stages, given.checkpoints, given.shot, given.seed, given.tasks, given.suffix, given.scale)


if __name__ == "__main__":
    main()
