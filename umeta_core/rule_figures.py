"""The numbers behind the figures about the learned rule, as files of ``results/learned_rule/figures``.

    python -m umeta_core.rule_figures datasets --theta thetas/cpu-seed0/004000.pt
    python -m umeta_core.rule_figures training --thetas thetas/cpu-seed0 --checkpoint ck.pt

Each record names theta's own run (`theta`) and has accuracies in percent, one for each of several networks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import ImageSet, load, places
from .episodes import PartitionTasks
from .evaluation import evaluate
from .learned_rule import ACTIVATIONS, UpdateRule
from .results import check_writable, own_folder, provenance
from .rule_baselines import ProtoMLP, ShuffledTasks, supervised_accuracy, vae_path
from .rule_evaluation import Trial, pca_accuracy, pixel_accuracy, rule_curve, trial
from .rule_learners import PESLearner, RuleLearner
from .rule_tasks import Bucket, Curriculum, RuleTasks
from .speed import tune_cpu
from .storage import read_archive, write_json
from .training import read_checkpoint, train

STEPS = (0, 50, 100, 200, 400)  # of the rule; accuracy is read at each
# name: (data set, split without labels, split with labels, pixels); None: as the split without.
HELD_OUT = {
    "unseen characters, 8x8": ("glyphs", "test", None, 8),
    "Omniglot, 8x8": ("omniglot", "test", None, 8),
    "digits, 8x8": ("digits", "all", None, 8),
    "MNIST, 8x8": ("mnist", "train", "test", 8),
    "MNIST, 14x14": ("mnist", "train", "test", 14),
    "MNIST, 28x28": ("mnist", "train", "test", 28),
    "Fashion-MNIST, 8x8": ("fashion_mnist", "train", "test", 8),
    "Fashion-MNIST, 14x14": ("fashion_mnist", "train", "test", 14),
    "Fashion-MNIST, 28x28": ("fashion_mnist", "train", "test", 28),
    "mini-ImageNet test, 8x8": ("mini_imagenet", "test", None, 8),
    "IMDB, 1000 words": ("imdb", "train", "test", 1000),
}
WIDTHS = (16, 32, 64, 128, 256, 512)
DEPTHS = (2, 3, 4, 5, 6, 8)  # hidden layers


def held_out(name: str, **options) -> Trial:
    """The trial of a data set of `HELD_OUT`. Raises FileNotFoundError if its data are missing."""
    dataset, shown, judged, size = HELD_OUT[name]
    if dataset == "imdb":
        return trial(imdb("train", size), imdb("test", size), way=2, **options)
    return trial(load(dataset, shown, size=size), load(dataset, judged, size=size) if judged else None, **options)


def imdb(split: str, words: int = 1000) -> ImageSet:
    """Film reviews as images ``[n, 1, 1, words]``: 255 where one of the most frequent words occurs, else 0."""
    path = next((p / "imdb_bow5000.npz" for p in places("imdb") if (p / "imdb_bow5000.npz").exists()), None)
    if path is None:
        raise FileNotFoundError(f"imdb_bow5000.npz (word counts of the IMDB reviews) not found in {places('imdb')[0]}")
    labels, starts, columns, is_test = read_archive(path, "labels", "indptr", "indices", "is_test")
    rows = np.repeat(np.arange(len(labels)), np.diff(starts))
    frequent = columns < words
    x = np.zeros((len(labels), words), np.uint8)
    x[rows[frequent], columns[frequent]] = 255
    part = is_test == (split == "test")
    labels = torch.from_numpy(labels[part].astype(np.int64))
    return ImageSet(torch.from_numpy(x[part])[:, None, None], labels, ["negative", "positive"], [], "imdb", split)


def datasets(theta: UpdateRule, names=tuple(HELD_OUT), networks=8, vae_steps=(500, 2000), seed=0) -> dict:
    """Figure 4 with the controls that it lacks, for each held-out data set; missing data are left out and said."""
    start = torch.Generator().manual_seed(theta.about.get("seed", 0))
    untrained, done = UpdateRule(**theta.config, generator=start), {}
    for name in names:
        started = time.perf_counter()
        try:
            task = held_out(name, networks=networks, seed=seed)
        except FileNotFoundError as error:
            done[name] = {"missing": str(error).splitlines()[0]}
            continue
        curves = {"rule": rule_curve(theta, task, STEPS), "theta at its start": rule_curve(untrained, task, STEPS)}
        vae = [accuracy for _, accuracy in vae_path(task, vae_steps, lr=1e-3)]
        done[name] = {
            "steps": STEPS, **{k: percent(v) for k, v in curves.items()}, "random network": percent(curves["rule"][0]),
            "pixels": percent(pixel_accuracy(task)), "PCA": percent(pca_accuracy(task)),
            "supervised": percent(supervised_accuracy(task)), "VAE steps": vae_steps,
            "VAE": percent(torch.stack(vae)), "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip
        print(name, {k: np.round(np.mean(v, -1), 1).tolist() for k, v in done[name].items() if isinstance(v, list)})
    sizes = {"hidden": [32, 32], "batch": 32, "VAE": {"layers": 3, "width": 128, "batch": 128}}
    return {"networks": networks, "sizes": sizes, "data": done}


def architectures(theta: UpdateRule, name="MNIST, 14x14", networks=4, seed=0) -> dict:
    """Figure 5: widths of two hidden layers, depths of layers of 64, and nonlinearities never met before."""
    at, done = STEPS[:4], {"width": {}, "depth": {}, "activation": {}}

    def curve(hidden, activation="relu"):
        task = held_out(name, hidden=hidden, networks=networks, seed=seed)
        return percent(rule_curve(theta, task, at, activation=activation))

    for width in WIDTHS:
        done["width"][str(width)] = curve((width, width))
    for depth in DEPTHS:
        done["depth"][str(depth)] = curve((64,) * depth)
    for activation in ACTIVATIONS:
        done["activation"][activation] = curve((64, 64), activation)
    return {"dataset": name, "networks": networks, "steps": at, **done}


def permutation(theta: UpdateRule, networks=8, steps=2000, seed=0) -> dict:
    """Figure 2, right, and the rule beside it: 10-way characters with pixels in place and in an order of each task."""
    done = {"rule": {}, "prototypical network": {}}
    sets = {split: PartitionTasks(load("glyphs", split, size=8)) for split in ("train", "test")}
    for how in ("in place", "shuffled"):
        task = trial(load("glyphs", "test", size=8), networks=networks, seed=seed, shuffle=how == "shuffled")
        done["rule"][how] = percent(rule_curve(theta, task, STEPS))
        wrap = ShuffledTasks if how == "shuffled" else lambda source: source
        learner = ProtoMLP(64, generator=torch.Generator().manual_seed(seed))
        history = train(learner, wrap(sets["train"]), steps=steps, tasks=8, way=10, shot=5, query=5, seed=seed,
                        progress=False, log_every=steps // 20)  # fmt: skip
        result = evaluate(learner, wrap(sets["test"]), tasks=500, way=10, shot=10, query=10, seed=seed)
        done["prototypical network"][how] = {
            "accuracy": round(result.mean, 2), "ci95": round(result.ci95, 2), "step": history["step"],
            "training": percent(torch.tensor(history["accuracy"])),
        }  # fmt: skip
    return {"networks": networks, "steps": STEPS, "training_steps": steps, **done}


def mismatch(name="cifar10", networks=4, steps=8000, seed=0) -> dict:
    """Figure 2, left: loss and few-shot accuracy of a VAE's latents, on the images that it is trained on (16x16)."""
    task = trial(load(name, "train", size=16), networks=networks, seed=seed)
    at = tuple(int(s) for s in np.unique(np.geomspace(50, steps, 16).astype(int)))
    path = [(loss, accuracy) for loss, accuracy in vae_path(task, at)]
    return {"dataset": name, "networks": networks, "steps": at, "loss": [round(v.mean().item(), 3) for v, _ in path],
            "accuracy": percent(torch.stack([a for _, a in path]))}  # fmt: skip


def training(thetas: Path, checkpoint: Path | None, names=("unseen characters, 8x8", "digits, 8x8", "MNIST, 14x14"),
             networks=4, most=8, seed=0) -> dict:  # fmt: skip
    """Figure 3: accuracy after 200 steps of the rule over meta-training, from the thetas that were kept on the way."""
    files = sorted(Path(thetas).glob("*.pt"))
    files = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, most).astype(int))]
    done = {"meta_steps": [UpdateRule.restore(f).about["steps"] for f in files], "data": {}}
    for name in names:
        task = held_out(name, networks=networks, seed=seed)
        done["data"][name] = [percent(rule_curve(UpdateRule.restore(f), task, (200,))[0]) for f in files]
    if checkpoint:
        state = read_checkpoint(checkpoint)
        done |= {"history": state["history"], "meta_steps_done": state["step"]}
    return {"networks": networks, "steps": 200, **done}


def variance(theta: UpdateRule, unrolls=(1, 2, 4, 8, 16), samples=96, sigma=0.03, seed=0) -> dict:
    """Relative variance of the meta-gradient of one truncation against its unroll, by both estimators.

    The trace of the covariance over the squared norm of the mean, over draws of networks, batches and noise; None where
    that norm is within two standard errors of 0. For PES the pair is fresh, so that both estimate the gradient of the
    same loss.
    """
    done = {"backpropagation": [], "evolution": []}
    images = load("glyphs", "train", size=8)
    for unroll in unrolls:
        curriculum = Curriculum(unroll=((unroll, unroll),) * 2, length=(1.0, 1.0), length_steps=1)
        for kind, learner in (("backpropagation", RuleLearner(theta)), ("evolution", PESLearner(theta, sigma, seed))):
            source = RuleTasks([Bucket(images, 10, (32, 32))], curriculum, 32, 1, theta=getattr(learner, "size", 0))
            generator = torch.Generator().manual_seed(seed)
            gradients = torch.stack([_gradient(learner, source, generator) for _ in range(samples)])
            spread, products = gradients.var(0).sum(), gradients @ gradients.T
            others = (products.sum(1) - products.diagonal()) / (samples - 1)  # their mean: the squared norm, unbiased
            signal, error = others.mean(), 2 * others.std() / samples**0.5
            relative = (spread / signal).item() if signal > 2 * error else None
            done[kind].append({"variance": spread.item(), "relative": relative})
    return {"unrolls": unrolls, "samples": samples, "sigma": sigma, **done}


def _gradient(learner: RuleLearner, source: RuleTasks, generator: torch.Generator) -> Tensor:
    learner.zero_grad()
    source.alive = [None]
    learner.loss(source.sample(1, 0, 10, 0, generator))[0].mean().backward()
    return torch.cat([p.grad.flatten() for p in learner.parameters() if p.requires_grad])


def percent(accuracy: Tensor) -> list:
    """Shares as percentages with two digits, nested as the tensor is."""
    return (100 * accuracy.double()).round(decimals=2).tolist()


FIGURES = {"datasets": datasets, "architectures": architectures, "permutation": permutation, "variance": variance}


def main() -> None:
    """Write the record of one figure."""
    parser = _parser()
    given = parser.parse_args()
    if wrong := _wrong(given):
        parser.error(wrong)
    tune_cpu()
    started = time.perf_counter()
    check_writable(given.folder or own_folder())
    about, done = _figure(given)
    record = {"figure": given.figure, "theta": about, **done,
              "wall_seconds": round(time.perf_counter() - started, 1), **provenance()}  # fmt: skip
    try:
        print(_write(record, given.folder, add=bool(given.data)))
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "training", "mismatch"])
    parser.add_argument("--theta", type=Path, help="file of `rule_runs`; without it the package's own")
    parser.add_argument("--thetas", type=Path, help="folder of `rule_runs`, for `training`")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--networks", type=int, help="how many each number is the mean of")
    parser.add_argument("--data", nargs="+", choices=HELD_OUT, metavar="NAME", help="for `datasets` and `training`")
    parser.add_argument("--folder", type=Path, help="where to write (default: learned_rule/figures among the records)")
    return parser


def _wrong(given: argparse.Namespace) -> str:
    """What does not go together in a command, or ""."""
    if given.figure == "training" and not (given.thetas and sorted(given.thetas.glob("*.pt"))):
        return "training needs --thetas FOLDER, with the files that rule_runs wrote"
    for option, figures in (("theta", [*FIGURES]), ("thetas", ["training"]), ("checkpoint", ["training"]),
                            ("data", ["datasets", "training"]),
                            ("networks", ["datasets", "architectures", "permutation", "training", "mismatch"])):
        if getattr(given, option) is not None and given.figure not in figures:
            return f"--{option} means nothing to {given.figure}"
    return ""


def _figure(given: argparse.Namespace) -> tuple[dict, dict]:
    """What theta says of itself, and the numbers of the figure."""
    options = {} if given.networks is None else {"networks": given.networks}
    if given.data:
        options["names"] = tuple(given.data)
    if given.figure == "training":
        done = training(given.thetas, given.checkpoint, **options)
        return UpdateRule.restore(sorted(given.thetas.glob("*.pt"))[-1]).about, done
    if given.figure == "mismatch":
        return {}, mismatch(**options)
    theta = UpdateRule.restore(given.theta) if given.theta else UpdateRule.pretrained()
    return theta.about, FIGURES[given.figure](theta, **options)


def _write(record: dict, folder: Path | None, add: bool) -> Path:
    """Write a record into its file; `add` keeps the data sets that are there. ValueError: those have other settings."""
    about = record["theta"]
    name = record["figure"] + (f"-{about['plan']}-{about['steps']}-seed{about['seed']}" if about else "")
    path = (folder or own_folder() / "learned_rule" / "figures") / f"{name}.json"
    if add and path.exists():
        old = json.loads(path.read_text())
        settings = ("networks", "steps", "meta_steps")
        if any(old.get(key) != json.loads(json.dumps(record.get(key))) for key in settings):
            raise ValueError(f"{path} has other settings; give another --folder")
        record["data"] = old["data"] | record["data"]
    return write_json(record, path)


if __name__ == "__main__":
    main()
