"""Fitted embeddings that come with the repository, so that a row need not wait hours for its embedding.

A shared fit is what `encode` needs of a finished fit: the encoder's weights, matrices in half precision, with the
settings of the fit and who made it. Whoever takes one has the vectors on which the records in ``results`` stand.
``python -m umeta_core.shared_fits FIT_FILE`` makes one, in ``results/fits``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from .embeddings.base import Embedding, read
from .results import REPOSITORY
from .storage import atomic, save_tensors

FOLDER = REPOSITORY / "results" / "fits"


def share(model: Embedding | type[Embedding], checkpoint: str | Path, path: str | Path) -> None:
    """Write the encoder of the finished fit in `checkpoint`, which is one of `model`'s kind, as a shared fit.

    ValueError: this is no fit's checkpoint, or not a finished one, or a weight is beyond the range of half precision.
    """
    state = read(checkpoint)
    if not {"model", "epoch", "config", "history"} <= state.keys():
        raise ValueError(f"{checkpoint} is not the checkpoint of a fit; name one that `fit` wrote")
    if state["epoch"] < state["config"]["epochs"]:
        there = f"{state['epoch']} of {state['config']['epochs']}"
        raise ValueError(f"{checkpoint} is at epoch {there}; finish the fit first")
    encoder = {name: _half(name, value) for name, value in state["model"].items() if _encodes(model, name)}
    about = {key: state[key] for key in ("config", "epoch", "made_by")}
    save_tensors({"encoder": encoder, "seconds": state["history"]["seconds"], **about}, path)


def is_shared(state: dict) -> bool:
    """Whether a file that `embeddings.base.read` has read is a shared fit, not the checkpoint of one's own."""
    return "encoder" in state


def restore(model: Embedding, state: dict, path: str | Path, **expected) -> Embedding:
    """Give `model` the encoder of a shared fit; all else that it has stays untrained.

    ValueError: the fit had other settings than the `expected` ones, or is of another network.
    """
    differ = [f"{k}: {state['config'].get(k)!r} there, {v!r} here" for k, v in expected.items()
              if state["config"].get(k) != v]  # fmt: skip
    if differ:
        raise ValueError(f"{path} is the fit of another embedding ({'; '.join(differ)}); delete it")
    encoder = {name: value.float() if torch.is_tensor(value) and value.dtype == torch.float16 else value
               for name, value in state["encoder"].items()}  # fmt: skip
    own = {name for name in model.state_dict() if _encodes(model, name)}
    try:
        if own != encoder.keys():
            raise RuntimeError(f"other weights: {', '.join(sorted(own ^ encoder.keys()))}")
        model.load_state_dict(encoder, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} holds another network: {str(error).splitlines()[-1].strip()}") from None
    return model.eval()


def take(name: str, target: Path) -> None:
    """Copy the shared fit `name` to `target`. FileNotFoundError: there is none of that name."""
    if not (FOLDER / name).is_file():
        none = "none" if FOLDER.parent.is_dir() else "none here: they are in a clone of the repository"
        there = ", ".join(sorted(path.stem for path in FOLDER.glob("*.pt"))) or none
        raise FileNotFoundError(f"no shared fit {name.removesuffix('.pt')}; there are: {there}")
    with atomic(target) as partial:
        shutil.copyfile(FOLDER / name, partial)


def main(arguments: list[str] | None = None) -> None:
    """Share the fit in a file, under the file's name."""
    parser = argparse.ArgumentParser(prog="python -m umeta_core.shared_fits", description=main.__doc__)
    parser.add_argument("fit", type=Path, metavar="FIT_FILE", help="what a finished fit of an embedding wrote")
    fit = parser.parse_args(arguments).fit
    share(_kind(fit), fit, FOLDER / fit.name)


def _kind(fit: Path) -> type[Embedding]:
    """The class of the embedding in a checkpoint; one whose `encode` uses all of it may be any, so the base class."""
    from .embeddings.acai import ACAI
    from .embeddings.bigan import BiGAN, ConvBiGAN
    from .embeddings.simclr import SimCLR

    name = read(fit).get("config", {}).get("model")
    return {kind.__name__: kind for kind in (ACAI, BiGAN, ConvBiGAN, SimCLR)}.get(name, Embedding)


def _encodes(model: Embedding | type[Embedding], name: str) -> bool:
    return name.startswith(model.encoder_parts)


def _half(name: str, value):
    """Matrices in half precision; vectors, as scales and averages of a batch norm, as they are."""
    if not torch.is_tensor(value) or not value.is_floating_point() or value.dim() < 2:
        return value
    if not torch.isfinite(value.half()).all():
        raise ValueError(f"{name} has weights that are not finite in half precision")
    return value.half()


if __name__ == "__main__":
    main()
