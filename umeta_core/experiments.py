"""Running a row of a table: its stages, its meta-training, its tests and its record.

One training serves all of a row's tests. The rows themselves are in `rows`, embeddings and partitions in `stages`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from .attributes import AttributeTasks, attribute_prototypes
from .augmentation import AugmentedTasks, auto_augment, umtra_drawings
from .baselines import ClusterMatching, LinearClassifier, MLPClassifier, NearestMean, NearestNeighbors, Ridge, tune
from .data import ImageSet, join, official
from .episodes import MixedTasks, PartitionTasks, UnlabeledSets
from .evaluation import Evaluation, evaluate, evaluate_curve
from .gmvae_networks import FeatureDecoder, ImageDecoder, ImageEncoder
from .latent_tasks import LatentTasks
from .leo import LEO
from .maml import MAML
from .meta_gmvae import MetaGMVAE
from .networks import MLP, Conv4, LinearHead
from .protonets import ProtoNet
from .resnet import ResNet
from .results import REPOSITORY, SCALES, check_writable, difference, own_folder, pack_counts, provenance, write_record
from .rows import Row, embedding_plan
from .snapshots import last_weights, select, selected, snapshots_of
from .speed import rank, world
from .stages import (
    centroids,
    fit_embedding,
    fitted_by,
    images_of,
    make_partitions,
    published_file,
    shown,
    training_mark,
    vectors_file,
)
from .storage import alone
from .training import read_checkpoint, train

NOTEBOOKS = REPOSITORY / "notebooks" / "experiments"
BASELINES = ("knn", "linear", "mlp", "matching", "nearest-mean", "ridge")
_AT_ONCE = 15_000_000  # numbers handled at once in tests on embeddings
NO_TRAINING = {"step": [], "loss": [], "accuracy": [], "seconds": 0.0}


def build_learner(row: Row, channels: int, size: int, seed: int, features: int | None = None) -> torch.nn.Module:
    """The row's meta-learner, initialized from `seed`, for square images or for vectors of `features` numbers."""
    generator = torch.Generator().manual_seed(seed)
    if row.learner == "protonets":
        if features is not None:
            raise ValueError(f"{row.slug} has inputs={row.inputs!r}, but prototypical networks learn from images here")
        return ProtoNet(Conv4(channels, size, **row.network, generator=generator), **row.options)
    if row.learner == "leo":
        return LEO(features, **row.options, seed=seed, generator=generator)
    if row.learner == "gmvae":
        return _gmvae(row, channels, size, seed, features, generator)
    if features is not None and row.network.get("linear"):
        network = LinearHead(features, row.way, generator)
    elif features is not None:
        network = MLP([features, *row.network["hidden"], row.way], norm="shift", std=0.01, generator=generator)
    elif row.network.get("residual"):
        network = ResNet(channels, size, way=row.way, generator=generator)
    else:
        network = Conv4(channels, size, way=row.way, **row.network, generator=generator)
    return MAML(network, **row.options)


def _gmvae(row: Row, channels: int, size: int, seed: int, features, generator) -> MetaGMVAE:
    options = {**row.options, "seed": seed, "generator": generator}
    latent = {"latent": options["latent"]} if "latent" in options else {}
    if features is not None:
        decoder = FeatureDecoder(features, calibrated=options.pop("calibrated"), **latent, generator=generator)
        return MetaGMVAE(None, decoder, features=features, **options)
    encoder = ImageEncoder(channels, size, generator=generator)
    return MetaGMVAE(encoder, ImageDecoder(channels=channels, size=size, **latent, generator=generator), **options)


def untrained(row: Row, seed: int, device="cpu", scale="quick", stages=None) -> torch.nn.Module:
    """The row's meta-learner as it is before training, made for its dataset's images or vectors."""
    images, features = shown(row, "test", scale, device, stages)
    width = None if features is None else features.shape[1]
    return build_learner(row, *images.images.shape[1:3], seed, width).to(device)


def trained(row: Row, checkpoint, seed=0, device="cpu", scale="quick", stages=None) -> tuple[torch.nn.Module, int]:
    """The row's meta-learner from a checkpoint, the best of its run if that was kept, and after how many steps.

    FileNotFoundError: there is no such file; ValueError: it is of another row, another network, or learned on another
    embedding; or the row trains nothing.
    """
    if not row.trained:
        raise ValueError(f"{row.slug} trains nothing and has no checkpoint; umeta train {row.slug} tests it as it is")
    path = training_file(row, checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; umeta train {row.slug} --checkpoint makes one")
    state = read_checkpoint(path)
    of = state["config"].get("row")
    if of not in (None, row.slug, row.training_of):
        raise ValueError(f"{path} is of the row {of}, not of {row.slug}")
    of_scale, published = state["config"].get("scale", scale), published_file(row, "test", stages)
    if row.inputs == "embeddings" and of_scale != scale and vectors_file(row, "test", scale, stages) != published:
        raise ValueError(f"{path} learned on the embedding of scale {of_scale}; test it with --scale {of_scale}")
    learner = untrained(row, seed, device, scale, stages)
    try:
        learner.load_state_dict(state.get("best") or selected(snapshots_of(path), row.slug) or state["learner"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} is of another network than {row.slug}: {reason}") from None
    return learner, state["step"]


def training_tasks(row: Row, scale: str, seed: int, device="cpu", stages=None):
    """The row's source of training tasks; stages that it needs are made or read (see `stages`)."""
    if row.source == "augmented":
        return _augmented_tasks(row, scale, device, stages)
    images, features = _training_images(row, scale, device, stages)
    if row.source == "latent":
        ahead = 50 if torch.device(device).type == "cuda" else 1  # larger batches are faster on a GPU only
        return LatentTasks(images, fit_embedding(row, scale, device, stages), ahead=ahead, **row.latent)
    if row.source == "unlabeled":
        return UnlabeledSets(images, features)
    if row.source == "attributes":
        least = max(10, row.least())  # as in testing; the authors' code takes K + Q, 6 for MAML
        return AttributeTasks(images, attribute_prototypes(images, sorted(images.attribute_names)[:20], least))
    if row.source in ("labels", "mixed"):
        labeled = PartitionTasks(images, some_labels(images, row.share, seed) if row.share else None, features)
        if row.source == "labels":
            return labeled
    clustered = PartitionTasks(images, make_partitions(row, scale, seed, device, stages), features)
    return MixedTasks(labeled, clustered, row.mix) if row.source == "mixed" else clustered


def _augmented_tasks(row: Row, scale: str, device, stages) -> AugmentedTasks:
    """UMTRA's tasks, of images; or, if the row learns on vectors, of those of the images and of their copies."""
    images = images_of(row, "train", device)
    embed = None if row.inputs == "images" else fit_embedding(row, scale, device, stages).embed
    return AugmentedTasks(images, umtra_drawings if images.images.shape[1] == 1 else auto_augment, embed)


def _training_images(row: Row, scale: str, device, stages) -> tuple[ImageSet, torch.Tensor | None]:
    """The images of the row's training splits, and their vectors if the row learns on vectors."""
    sets, features = zip(*(shown(row, split, scale, device, stages) for split in row.train_splits))
    return join(sets), None if row.inputs == "images" else torch.cat(features)


def testing_tasks(row: Row, scale: str, split="test", device="cpu", stages=None):
    """The row's source of test tasks: always the labels (or attributes) that people gave."""
    images, features = shown(row, split, scale, device, stages)
    if row.dataset == "celeba":
        names = sorted(images.attribute_names)
        chosen = names[20:30] if split == "val" else names[30:]
        return AttributeTasks(images, attribute_prototypes(images, chosen, 10), features)
    return PartitionTasks(images, None, features)


def some_labels(images: ImageSet, share: float, seed: int) -> torch.Tensor:
    """The labels of a random `share` of the classes, -1 for the images of all others."""
    classes = images.n_classes
    keep = max(1, round(share * classes))
    chosen = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))[:keep].to(images.labels.device)
    if images.name == "imagenet":  # those of mini-ImageNet's training part (CACTUs, App. G)
        chosen = torch.tensor([i for i, s in enumerate(images.superclasses) if s == "mini_imagenet train"])
        chosen = chosen.to(images.labels.device)
    return torch.where(torch.isin(images.labels, chosen), images.labels, -1)


def train_row(row: Row, scale: str, seed: int, device="cpu", checkpoint=None, stages=None):
    """Meta-train the row's learner, going on from `checkpoint` if it exists. Returns the learner and the history."""
    seed = row.draws(seed)
    learner = untrained(row, seed, device, scale, stages)
    if row.budget(scale) == 0:
        return learner, NO_TRAINING
    early = early_stopping(row, scale, seed, device, stages) if row.validation else {}
    if row.training_of:
        return learner, _shared_training(learner, row, scale, seed, device, checkpoint, stages, **early)
    with alone(checkpoint) if checkpoint and world() == 1 else contextlib.nullcontext():
        return learner, _train(learner, row, scale, seed, device, checkpoint, stages, **early)


def _train(learner, row: Row, scale: str, seed: int, device, checkpoint, stages, **during) -> dict:
    source = training_tasks(row, scale, seed, device, stages)
    return train(
        learner, source, steps=row.budget(scale), tasks=row.tasks,
        way=row.way, shot=row.shot, query=row.query, lr=row.lr, clip=row.clip, seed=seed, device=device,
        prepare=learner.prepare_gradients if isinstance(learner, LEO) else None, checkpoint=checkpoint,
        config={"row": row.training_of or row.slug, "scale": scale, **plain(row.training()),
                "stages": training_mark(row, scale, seed, stages)}, **during,
    )  # fmt: skip


def _shared_training(
    learner, row: Row, scale: str, seed: int, device, checkpoint, stages, *, validate, validate_every: int, **_
) -> dict:  # fmt: skip
    """Train, or find trained, what rows share, and select this row's weights; those who come later wait meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:
        file = training_file(row, checkpoint or Path(scratch) / "training.pt")
        folder = snapshots_of(file)
        with alone(file) if world() == 1 else contextlib.nullcontext():
            history = _train(learner, row, scale, seed, device, file, stages, validate_every=validate_every,
                             snapshots=folder)  # fmt: skip
        if rank() == 0:  # under torchrun one process tests
            history |= select(learner, folder, validate, steps=row.budget(scale), every=validate_every, row=row.slug,
                              plan={"scale": scale, "seed": seed, **plain(row.protocol())})  # fmt: skip
            history["last"] = last_weights(folder, row.budget(scale))
    return history


def training_file(row: Row, checkpoint) -> Path:
    """The checkpoint of the row's training: if rows share it and `checkpoint` has the row's slug, under its own name.

    So ``gmvae-5way-5shot-full-seed0.pt`` is ``gmvae-5way-1shot-full-seed0.pt``, whose training that row takes.
    """
    path = Path(checkpoint)
    if row.training_of and path.name.startswith(row.slug):
        return path.with_name(row.training_of + path.name.removeprefix(row.slug))
    return path


def early_stopping(row: Row, scale: str, seed: int, device="cpu", stages=None) -> dict:
    """Arguments of `train` that keep the weights best on tasks of the validation classes, the same at every check."""
    source, plan = testing_tasks(row, scale, "val", device, stages), row.validation
    tasks, every = row.checks(scale)
    task = {"way": plan.get("way", row.way), "shot": plan.get("shot", row.shot), "query": plan["query"],
            "tasks": tasks, "seed": seed + 1}  # fmt: skip

    def validate(learner) -> float:
        tested, seen = _seen_once(learner, source)
        at_once = {"max_images": _at_once(seen, learner)} if seen.features is not None else {}
        return evaluate(tested, seen, **at_once, **task).mean

    return {"validate": validate, "validate_every": every, "keep_best": True, "patience": plan.get("patience")}


def measure(row: Row, learner, scale: str, seed: int, device="cpu", stages=None) -> list[dict]:
    """Test `learner` on every (way, shot) of the row: the cells of the record, for MAML with the adaptation curve.

    The test tasks are drawn from `seed`, so all rows of one seed meet the same tasks and seeds are independent; trials
    of a search all meet those of seed 0.
    """
    seed = row.draws(seed)
    tested, source = _seen_once(learner, testing_tasks(row, scale, row.test_split, device, stages))
    at_once = {"max_images": 300} if row.dataset == "imagenet" else {}
    at_once = {"max_images": _at_once(source, learner)} if source.features is not None else at_once
    cells = []
    for way, shot in row.tests:
        task = {"way": way, "shot": shot, "query": _queries(row, shot, source), "tasks": row.test_tasks[scale]}
        if isinstance(learner, MAML):
            last = learner.test_steps
            at = sorted({step for step in (0, 1, 2, 3, 5, *range(10, last, 10)) if step < last} | {last})
            *_, result = path = evaluate_curve(learner, source, at, seed=seed, **task, **at_once)
            more = {"curve": {"steps": at, "accuracy": [round(point.mean, 3) for point in path]}}
        else:
            result, more = evaluate(tested, source, seed=seed, **task, **at_once), {}
        if row.readings and (way, shot) in row.tests[:2]:
            found = {name: _reading(learner, changes, source, result, seed=seed, **task, **at_once)
                     for name, changes in row.readings.items()}  # fmt: skip
            more["readings"] = {name: reading for name, reading in found.items() if reading}
        cells.append(_cell(task, result, seed) | more)
    return cells


def _reading(learner, changes: dict, source, first, *, tasks: int, **task) -> dict | None:
    """The test with some attributes of the learner changed, which are put back; and task by task how it differs.

    The tasks are those of the `first` test, or the first of them if `changes` name fewer "tasks". If they name
    "classes", and perhaps another "query", the tasks are others and the two means independent; None: there are no such
    classes.
    """
    changes = dict(changes)
    tasks = min(tasks, changes.pop("tasks", tasks))
    ending = changes.pop("classes", None)
    if "query" in changes:
        task["query"] = changes.pop("query")
    if ending and not (source := _of_classes(source, ending)):
        return None
    before = {name: getattr(learner, name) for name in changes}
    try:
        vars(learner).update(changes)
        result = evaluate(learner, source, tasks=tasks, **task)
    finally:
        vars(learner).update(before)
    gap = Evaluation(result.accuracies - first.accuracies[:tasks])
    half = math.hypot(result.ci95, first.ci95) if ending else gap.ci95
    return {"tasks": tasks, "accuracy": round(result.mean, 4), "ci95": round(result.ci95, 4),
            "difference": round(gap.mean, 4), "difference_ci95": round(half, 4)}  # fmt: skip


def _last(row: Row, learner, weights: dict, chosen: dict, scale: str, seed: int, device, stages) -> dict:
    """The first test with the weights after the last step, and how it differs from that with the `chosen` ones.

    That is what the selection on labels is worth. The learner gets its own weights back.
    """
    own = copy.deepcopy(learner.state_dict())
    try:
        learner.load_state_dict(weights)
        (cell,) = measure(replace(row, tests=row.tests[:1], readings={}), learner, scale, seed, device, stages)
    finally:
        learner.load_state_dict(own)
    gap, half = difference(cell, chosen)
    return {name: cell[name] for name in ("tasks", "accuracy", "ci95")} | {
        "difference": round(gap, 4), "difference_ci95": round(half, 4)}  # fmt: skip


def _of_classes(source: PartitionTasks, ending: str) -> PartitionTasks | None:
    """Tasks of the classes whose names end so; None if there are none."""
    images = source.images
    kept = torch.tensor([name.endswith(ending) for name in images.class_names], device=images.labels.device)
    if not kept.any():
        return None
    return PartitionTasks(images, torch.where(kept[images.labels], images.labels, -1), source.features)


def _seen_once(learner, source) -> tuple:
    """The learner and its tasks, of features in place of images if it sees every image alone: each is encoded once."""
    if not isinstance(source, PartitionTasks) or source.features is not None:
        return learner, source
    if isinstance(learner, ProtoNet) and learner.sees_one:
        tested = SimpleNamespace(predict=learner.predict_embedded)
    elif isinstance(learner, MetaGMVAE) and learner.encoder is not None:
        tested = learner
    else:
        return learner, source
    return tested, PartitionTasks(source.images, None, learner.embed(source.images.images))


def _at_once(source, learner=None) -> int:
    """Vectors of a source of tasks on embeddings that fit into memory together.

    Meta-GMVAE makes many samples of each; on a CPU EM is a quarter faster on those of few tasks at once.
    """
    samples = learner.test_samples if isinstance(learner, MetaGMVAE) and source.features.device.type == "cpu" else 1
    return _AT_ONCE // (source.features.shape[1] * samples)


def _cell(task: dict, result: Evaluation, seed: int) -> dict:
    """A test as the record keeps it, with the right answers of every task, so that rows can be compared in pairs."""
    counts = (result.accuracies.double() * task["way"] * task["query"]).round().int().tolist()
    return task | {"accuracy": round(result.mean, 4), "ci95": round(result.ci95, 4),
                   "answers": {"seed": seed, "correct": pack_counts(counts)}}  # fmt: skip


def measure_baseline(row: Row, scale: str, seed: int, device="cpu", stages=None) -> list[dict]:
    """Tune a baseline on labeled validation tasks, as the paper does, and test it: the cells, with the tuning."""
    test, cells = testing_tasks(row, scale, "test", device, stages), []
    for way, shot in row.tests:
        task = {"way": way, "shot": shot, "query": _queries(row, shot, test), "tasks": row.test_tasks[scale]}
        make, values = _baseline(row, scale, seed, way * shot, device, stages)
        if values:
            valid = testing_tasks(row, scale, "val", device, stages)
            few = {"tasks": min(200, task["tasks"]), "query": min(task["query"], _queries(row, shot, valid))}
            best, tried = tune(make, values, valid, seed=seed + 1, max_images=_at_once(valid), **(task | few))
            more = {"tuned": {"value": best, "validation": {str(v): round(a, 3) for v, a in tried.items()}}}
        else:
            best, more = None, {}
        result = evaluate(make(best), test, seed=seed, max_images=_at_once(test), **task)
        cells.append(_cell(task, result, seed) | more)
    return cells


def _queries(row: Row, shot: int, source) -> int:
    """Queries per class of a test task: the row's number, or all others of 600 images.

    That is all of a class of mini-ImageNet; LEO's reference code takes as many of tieredImageNet's larger ones. If the
    smallest class has fewer images, all others of these.
    """
    if row.test_query is not None:
        return row.test_query
    sizes = source.size[source.size > 0]
    return min(int(sizes.min()), 600) - shot


def _baseline(row: Row, scale: str, seed: int, support: int, device, stages):
    """What makes the row's baseline from its tuned value, and the values to try (none: nothing to tune)."""
    if row.learner == "knn":
        return NearestNeighbors, [k for k in (1, 3, 5, 10) if k <= support]
    if row.learner == "linear":
        if row.options:  # of a paper that does not tune it
            return (lambda _: _untuned(row, scale, device, stages)), []
        return LinearClassifier, [10.0**power for power in range(-5, 5)]
    if row.learner == "mlp":

        def make(dropout):
            return MLPClassifier(generator=torch.Generator(device).manual_seed(seed), dropout=dropout, **row.options)

        return make, [0.0, 0.25, 0.5, 0.75]
    if row.learner == "ridge":
        return Ridge, [10.0**power for power in range(-2, 5)]
    if row.learner == "nearest-mean":
        return (lambda _: NearestMean()), []
    matching = ClusterMatching(centroids(row, scale, device, stages))
    return (lambda _: matching), []


def _untuned(row: Row, scale: str, device, stages) -> LinearClassifier:
    """Logistic regression on features that are divided by their standard deviations over the training images."""
    options = dict(row.options)
    if options.pop("standardize", None) == "train":
        deviation = shown(row, "train", scale, device, stages)[1].std(0, correction=0)
        options["deviation"] = torch.where(deviation > 0, deviation, 1)
    return LinearClassifier(**options)


def run_row(
    row: Row, scale="quick", seed=0, device="cpu", folder=None, checkpoint=None, notebook=None, stages=None
) -> dict:
    """Train and test one row and write its record. Returns the record.

    Args:
        scale: "smoke" (seconds), "quick" (a minute or two) or "full" (the paper's budget).
        folder: of the records (None: see `results.own_folder`).
        checkpoint: file to save to and resume from; an interrupted run goes on where it stopped.
        notebook: path of the executed notebook, to be named in the record.
        stages: folder of embeddings and partitions (None: see `stages.stages_folder`).
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; scales: {', '.join(SCALES)}")
    check_writable(own_folder(folder) / row.paper)
    if checkpoint:
        check_writable(Path(checkpoint).parent)
    origin = provenance(device)  # before the run: the code that is about to be executed
    row = row.configuration(seed)
    if row.learner in BASELINES:
        history, started = NO_TRAINING, time.perf_counter()
        cells = measure_baseline(row, scale, seed, device, stages)
    else:
        learner, history = train_row(row, scale, seed, device, checkpoint, stages)
        started = time.perf_counter()
        cells = measure(row, learner, scale, seed, device, stages)
        if "last" in history and "readings" in cells[0]:
            at_end = _last(row, learner, history["last"], cells[0], scale, seed, device, stages)
            cells[0]["readings"]["last weights"] = at_end
    record = {
        "paper": row.paper, "table": row.table, "row": row.slug, "method": row.method, "embedding": row.embedding,
        "variant": row.variant, "dataset": row.dataset, "scale": scale, "seed": seed,
        "steps": history.get("stopped", row.budget(scale)), "budget": row.budget(scale),
        "paper_steps": row.steps["full"], "tasks_per_step": row.tasks, "deviation": row.departs, "cells": cells,
        "seconds": round(history["seconds"], 1), "test_seconds": round(time.perf_counter() - started, 1),
        "history": _thinned(history), "validation": history.get("validation", []),
        "validation_seconds": round(history.get("validation_seconds", 0.0), 1),
        "protocol": plain(row.protocol()), "notebook": notebook,
        **({"training_of": row.training_of} if row.training_of else {}),
        **({"trained_by": history["made_by"]} if "made_by" in history else {}),
        **({"skipped": history["skipped"]} if "skipped" in history else {}),
        **embedding_record(row, scale, stages), **images_record(row, scale, stages), **origin,
    }  # fmt: skip
    write_record(record, folder)
    return record


def embedding_record(row: Row, scale: str, stages=None) -> dict:
    """How the row's embedding was fitted, and by which code, for the record."""
    if not row.needs_embedding:
        return {}
    if row.inputs == "embeddings" and vectors_file(row, "test", scale, stages) == published_file(row, "test", stages):
        return {"embedding_fit": {"origin": "published features"}}
    plan = row.plan
    made_by, is_shared = fitted_by(row, scale, stages)
    origin = {"origin": "shared fit"} if is_shared else {}
    return {"embedding_fit": {"options": plain(plan.options), "epochs": plan.epochs[scale], "batch": plan.batch,
                              "paper_epochs": paper_epochs(row), "seed": 0, "made_by": made_by, **origin}}  # fmt: skip


def paper_epochs(row: Row) -> int:
    """For how many epochs the paper fits the row's embedding, of which its own plan may be a short version."""
    name = row.fitted or row.embedding
    for word in ("short ", "plain ", "small ", "untrained "):
        name = name.removeprefix(word)
    return embedding_plan(row.embedding if name == "features" else name, row.dataset).epochs["full"]


def images_record(row: Row, scale: str, stages=None) -> dict:
    """How many images of each split the row uses, and its departures from the paper: with a part of the data, that."""
    images = {split: len(shown(row, split, scale, folder=stages)[0]) for split in row.splits}
    whole = {split: official(row.dataset.removesuffix("_identity"), split) for split in images}
    short = [f"{n:,} of {whole[split]:,} {split} images" for split, n in images.items() if n < (whole[split] or 0)]
    part = [f"a part of the data ({', '.join(short)})"] if short else []
    return {"images": images, "deviation": "; ".join([*filter(None, [row.departs]), *part])}


def plain(protocol: dict) -> dict:
    """Tuples as lists, as JSON and checkpoints keep them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in protocol.items()}


def _thinned(history: dict, points: int = 100) -> dict:
    """The training curve at no more than about 100 points, short enough for a record."""
    every = -(-len(history["step"]) // points) or 1
    keep = range(len(history["step"]) - 1, -1, -every)[::-1]
    return {name: [_rounded(history[name][i]) for i in keep] for name in ("step", "loss", "accuracy")}


def _rounded(value: float | None) -> float | None:
    """None is an interval of training without a finite loss."""
    return None if value is None else round(value, 4)


def execute_notebook(row: Row, scale: str, seed: int, device="cpu", threads=1, folder=None, runs="runs"):
    """Execute the paper's experiment notebook for one row with papermill; returns the path of the executed copy.

    The notebook calls `run_row`, so the record is written on the way. The copy and the checkpoint are
    ``<runs>/<paper>/<row>-<scale>-seed<seed>`` with ``.ipynb`` and ``.pt``; rows that share a training share the
    checkpoint (see `training_file`). Embeddings and partitions are in ``<runs>/<paper>/stages``.
    """
    stem = Path(runs).resolve() / row.paper / f"{row.slug}-{scale}-seed{seed}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    copy, checkpoint = Path(f"{stem}.ipynb"), training_file(row, f"{stem}.pt")
    parameters = {"row": row.slug, "scale": scale, "seed": seed, "device": str(device), "threads": threads,
                  "results": str(own_folder(folder).resolve()), "checkpoint": str(checkpoint),
                  "stages": str(stem.parent / "stages"),
                  "notebook": f"{Path(runs).resolve().name}/{row.paper}/{copy.name}"}  # fmt: skip
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
