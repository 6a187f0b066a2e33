"""The numbers behind the figures of Meta-GMVAE's chapters that take long, as files of ``results/meta_gmvae/figures``.

    python -m umeta_core.gmvae_figures longer --runs FOLDER
    python -m umeta_core.gmvae_figures components --row gmvae-20way-1shot --checkpoint FILE

`longer` trains the models of the chapter *From VAE to Meta-GMVAE* on glyphs, for 45 minutes of a core; interrupted, it
goes on from the checkpoints in FOLDER. `components` makes Figures 3 and 4 of the paper from a trained row, in a minute.
"""

from __future__ import annotations

import argparse
import base64
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .data import load
from .em import Mixture
from .episodes import PartitionTasks, UnlabeledSets
from .evaluation import Evaluation, evaluate
from .experiments import shown, trained, training_file
from .gmvae_networks import ImageDecoder, ImageEncoder
from .meta_gmvae import MetaGMVAE
from .results import check_writable, own_folder, provenance
from .rows import find_row
from .snapshots import chosen_step, snapshots_of
from .speed import tune_cpu
from .storage import load_tensors, save_tensors, write_json
from .training import train

NETWORK = {"filters": 16, "latent": 16}
OPTIONS = {"samples": 16, "decoded": 2, "components": 20}
TRAINING = {"tasks": 2, "way": 1, "shot": 100, "query": 0, "lr": 3e-3}
MODELS = {  # with the covariance that is the better one at test time, the plain VAE's by the paper's definition
    "plain VAE": {"episodic": False, "set_level": False, "covariance": "identity"},
    "Ep": {"set_level": False},
    "Meta-GMVAE": {},
}
STEPS = (800, 1600, 3200, 6400)
TEST = {"way": 5, "query": 15, "tasks": 400, "seed": 1}


def build(seed: int, **options) -> MetaGMVAE:
    """The chapter's small model, initialized from `seed`."""
    g = torch.Generator().manual_seed(seed)
    encoder = ImageEncoder(1, 28, NETWORK["filters"], g)
    decoder = ImageDecoder(NETWORK["latent"], 1, 28, NETWORK["filters"], g)
    return MetaGMVAE(encoder, decoder, features=encoder.features, latent=NETWORK["latent"], generator=g, **options)


def longer(runs: str | Path, steps=STEPS, seed=0) -> dict:
    """Accuracy of each model on glyphs (%) after so many steps, and task by task how it differs from the plain VAE.

    Returns a record: for each model and shot a list over `steps` of "accuracy", "ci95", "difference" and
    "difference_ci95"; all meet the same tasks, all queries of a task together.
    """
    protocol = {"network": NETWORK, "options": OPTIONS, "training": TRAINING, "test": TEST}
    record = {"what": "longer", "of": "glyphs", "seed": seed, "steps": list(steps), "models": {}, "seconds": {},
              "trained_by": {}, "protocol": protocol, **provenance("cpu")}  # fmt: skip
    reference = {}
    for name, switches in MODELS.items():
        model, cells = build(seed, **OPTIONS, **switches), {"1": [], "5": []}
        checkpoint = Path(runs) / f"{name.lower().replace(' ', '-')}-seed{seed}.pt"
        for done in steps:
            found = _after(model, checkpoint, done, seed, {"model": name, **protocol})
            record["trained_by"][name] = found.pop("made_by")
            record["seconds"][name] = round(found.pop("seconds"), 1)
            for shot, accuracies in found.items():
                base = reference.setdefault((done, shot), accuracies)
                cells[shot].append(_cell(accuracies, base))
        record["models"][name] = cells
    return record


def _after(model: MetaGMVAE, checkpoint: Path, steps: int, seed: int, protocol: dict) -> dict:
    """Accuracies ``[tasks]`` by shot after `steps` steps, those that a former call has measured from its file.

    ValueError: a file of another protocol.
    """
    measured = checkpoint.with_name(f"{checkpoint.stem}-{steps}.pt")
    if not measured.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        history = train(model, UnlabeledSets(load("glyphs", "train")), steps=steps, seed=seed, checkpoint=checkpoint,
                        config={key: protocol[key] for key in ("model", "network", "options")}, **TRAINING)  # fmt: skip
        test = load("glyphs", "test")
        source = PartitionTasks(test, features=model.embed(test.images))
        found = {str(shot): evaluate(model, source, shot=shot, **TEST).accuracies for shot in (1, 5)}
        save_tensors(found | {"seconds": history["seconds"], "made_by": history["made_by"], "protocol": protocol},
                     measured)  # fmt: skip
    found = load_tensors(measured, "measurement")
    if found.pop("protocol", None) != protocol:
        raise ValueError(f"{measured} was measured with other settings; give another folder, or remove it")
    return found


def _cell(accuracies: torch.Tensor, base: torch.Tensor) -> dict:
    here, gap = Evaluation(accuracies), Evaluation(accuracies - base)
    return {"accuracy": round(here.mean, 3), "ci95": round(here.ci95, 3),
            "difference": round(gap.mean, 3), "difference_ci95": round(gap.ci95, 3)}  # fmt: skip


# Figures 3 and 4 --------------------------------------------------------------------------------------------------


@torch.no_grad()
def components(slug: str, checkpoint: str | Path, seed=0, rows=5, columns=7, scale="full") -> dict:
    """What EM puts together, by a trained row on images: in a training set, and in a 5-way 1-shot test task.

    Returns a record. Under "training" and "test": "real", the first `columns` images of each of the `rows` largest
    components (test: of each class, by the answers, "wrong" says which are), and "generated" from the component, as
    `packed` text; "counts" of the real ones. Under "maps", t-SNE of the codes: "place" of each point, its "component",
    how many are of the "support" set (they come first) and which are "wrong"; "one normal" is the control, a cloud of
    points from one normal with the mean and covariance of the training set's codes. ValueError: a row that fits no
    mixture to images.
    """
    origin, row = provenance("cpu"), find_row(slug)
    if row.learner != "gmvae" or row.inputs != "images" or not row.options.get("episodic", True):
        raise ValueError(f"{slug} has no components of images to show; take a row with a mixture over images")
    model, _ = trained(row, checkpoint, seed, scale=scale)
    model.eval()
    x = UnlabeledSets(shown(row, "train", scale)[0]).sample(1, 1, row.shot, 0, _seeded(3)).flat()[0]
    mean, log_variance = model.posterior(model.features(x))
    prior, component, code = _divided(model, mean, log_variance)
    largest = torch.bincount(component).topk(rows).indices.tolist()
    training = {"real": [x[0, component == c][:columns] for c in largest],
                "generated": [_made(model, prior, c, columns) for c in largest]}  # fmt: skip
    test, answered = _test_task(model, PartitionTasks(shown(row, "test", scale)[0]), columns)
    covariance = torch.cov(mean[0].T) + 1e-4 * torch.eye(model.latent)
    cloud = torch.randn(mean.shape, generator=_seeded(2)) @ torch.linalg.cholesky(covariance).T
    _, colors, spread = _divided(model, mean.mean(1, keepdim=True) + cloud, log_variance)
    maps = {"training set": _map(code, component), "test task": _map(**answered), "one normal": _map(spread, colors)}
    counts = {name: [len(images) for images in part["real"]] for name, part in (("training", training), ("test", test))}
    parts = {name: {key: packed(value) if key != "wrong" else value for key, value in part.items()}
             for name, part in (("training", training), ("test", test))}  # fmt: skip
    return {"what": "components", "of": slug, "seed": seed, "size": x.shape[-1], "columns": columns, "counts": counts,
            "steps": _chosen(row, checkpoint), **parts, "maps": maps, **origin}  # fmt: skip


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _divided(model: MetaGMVAE, mean: Tensor, log_variance: Tensor):
    """The prior of a set, as in training, and of each image the component ``[M]`` and one sample ``[M, d]``."""
    noise = _seeded(1)
    epsilon = torch.randn(1, mean.shape[1], model.samples, model.latent, generator=noise)
    z = mean.unsqueeze(2) + (log_variance / 2).exp().unsqueeze(2) * epsilon
    prior = model.prior(z, noise)
    q = prior.responsibilities(z.flatten(1, 2)).unflatten(1, z.shape[1:3]).mean(2)[0]
    return prior, q.argmax(1), z[0, :, 0]


def _made(model: MetaGMVAE, mixture: Mixture, c: int, n: int) -> Tensor:
    """n images ``[n, C, H, W]`` decoded from codes of component c of the first mixture."""
    width = 1 if mixture.variance is None else mixture.variance[0, c].sqrt()
    return model.decoder(mixture.mean[0, c] + width * torch.randn(n, model.latent, generator=_seeded(c)))


def _test_task(model: MetaGMVAE, source: PartitionTasks, columns: int) -> tuple[dict, dict]:
    """The images of each class by the answers and from its Gaussian, and the codes with the answers."""
    xs, ys, xq, yq = source.sample(1, 5, 1, 15, _seeded(5)).flat()
    support, query = model.features(torch.cat([xs, xq], 1)).split([xs.shape[1], xq.shape[1]], 1)
    answer = model.classify(support, ys, query, 5)[0].argmax(1)
    mixture, _, _ = model.adapt(support, ys, query, 5)
    mean, _ = model.posterior(torch.cat([support, query], 1))
    wrong = answer != yq[0]
    parts = {"real": [xq[0, answer == c][:columns] for c in range(5)],
             "generated": [_made(model, mixture, c, columns) for c in range(5)],
             "wrong": [wrong[answer == c][:columns].tolist() for c in range(5)]}  # fmt: skip
    return parts, {"codes": mean[0], "component": torch.cat([ys[0], answer]), "support": 5,
                   "wrong": (5 + wrong.nonzero()[:, 0]).tolist()}  # fmt: skip


def _map(codes: Tensor, component: Tensor, support=0, wrong=()) -> dict:
    """t-SNE of codes ``[n, d]``, and how many of the five nearest neighbors share a component, by chance too."""
    from sklearn.manifold import TSNE

    place = TSNE(perplexity=15, init="pca", random_state=0).fit_transform(codes.numpy())
    place = torch.from_numpy(place).double()
    near = torch.cdist(place, place).fill_diagonal_(math.inf).topk(5, largest=False).indices
    chance = (torch.bincount(component).double() / len(component)).square().sum()
    return {"place": [[round(v, 1) for v in point] for point in place.tolist()], "component": component.tolist(),
            "support": support, "wrong": list(wrong), "chance": round(chance.item(), 4),
            "alike": round((component[near] == component[:, None]).double().mean().item(), 4)}  # fmt: skip


def packed(images: list[Tensor]) -> str:
    """Images in 0..1 ``[n, 1, H, W]``, one list after the other, as text: a byte for each pixel, zlib, base64."""
    pixels = (255 * torch.cat(images)).round().clamp(0, 255).byte()
    return base64.b64encode(zlib.compress(pixels.numpy().tobytes(), 9)).decode()


def unpacked(text: str, counts: list[int], size: int) -> tuple[Tensor, ...]:
    """The inverse of `packed`: uint8 ``[count, 1, size, size]`` for each count."""
    pixels = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8)
    return pixels.view(-1, 1, size, size).split(counts)


def _chosen(row, checkpoint) -> int:
    """After how many steps the row's weights were taken."""
    return chosen_step(snapshots_of(training_file(row, checkpoint)), row.slug)


def main() -> None:
    """Make the numbers of one figure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("longer", "components"))
    parser.add_argument("--runs", default="runs/meta_gmvae/figures", help="longer: folder of the checkpoints")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="longer: after which to test, ascending")
    parser.add_argument("--row", default="gmvae-20way-1shot", help="components: the trained row")
    parser.add_argument("--checkpoint", help="components: of that row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="default: $UMETA_RESULTS, else the repository's")
    given = parser.parse_args()
    if (given.figure == "components") != (given.checkpoint is not None):
        parser.error("components needs --checkpoint FILE, longer takes none")
    tune_cpu()
    check_writable(own_folder(given.results))
    if given.figure == "longer":
        record = longer(given.runs, given.steps, given.seed)
    else:
        record = components(given.row, given.checkpoint, given.seed)
    name = f"{record['what']}-{record['of']}-seed{given.seed}.json"
    print(write_json(record, own_folder(given.results) / "meta_gmvae" / "figures" / name))


if __name__ == "__main__":
    main()
