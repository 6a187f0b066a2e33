"""What longer training does to the models of the chapter *From VAE to Meta-GMVAE*, on glyphs.

    python -m umeta_core.gmvae_figures --runs FOLDER

writes ``results/meta_gmvae/figures/longer-glyphs-seed0.json``. 45 minutes of a core; interrupted, it goes on
from the checkpoints in FOLDER.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .data import load
from .episodes import PartitionTasks
from .evaluation import Evaluation, evaluate
from .meta_gmvae import ImageDecoder, ImageEncoder, MetaGMVAE, UnlabeledSets
from .results import check_writable, own_folder, provenance
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


def main() -> None:
    """Train, test and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/meta_gmvae/figures", help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="after which to test, ascending")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="default: $UMETA_RESULTS, else the repository's")
    given = parser.parse_args()
    tune_cpu()
    check_writable(own_folder(given.results))
    record = longer(given.runs, given.steps, given.seed)
    path = own_folder(given.results) / "meta_gmvae" / "figures" / f"longer-glyphs-seed{given.seed}.json"
    print(write_json(record, path))


if __name__ == "__main__":
    main()
