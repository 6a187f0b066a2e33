"""What every embedding can do: fit, embed, save, restore. And the one loop that fits those that are trained."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import as_floats
from ..evaluation import evaluating
from ..results import provenance
from ..storage import load_tensors, save_tensors
from ..training import NonFiniteLoss

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of red, green and blue in [0, 1]


class Embedding(nn.Module):
    """A map from images to vectors of `d` numbers, learned without labels (two controls aside: `Supervised`, `VGG19`).

    A trained embedding defines ``encode``, ``optimizers`` and ``step``; one with a closed form overrides `fit`.
    """

    d: int
    takes: tuple | None = None  # [C, H, W] of the images, where another shape would not be noticed or fail obscurely
    autocast: bool | None = False  # bfloat16 where `autocast_for` is used; None: on a GPU that can (Ampere or later)
    encoder_parts: tuple = ("",)  # how the names of what `encode` uses begin in the state dict

    def encode(self, x: Tensor) -> Tensor:
        """Vectors ``[n, d]`` of images ``[n, C, H, W]`` in [0, 1], each image on its own (averaged statistics)."""
        raise NotImplementedError(f"{type(self).__name__} does not encode images; use an embedding, or the VAE")

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """New optimizers of the parameters; `fit` keeps them in ``self.opt``."""
        raise NotImplementedError

    def step(self, images: Tensor, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One update on ``images[index]`` (uint8 ``[n, C, H, W]``, int64 ``[batch]``); returns the losses."""
        raise NotImplementedError

    def start_epoch(self, images: Tensor, epoch: int, epochs: int, generator: torch.Generator) -> Tensor:
        """The images of this epoch in the order of their use, int64 ``[m]``: here all of them, shuffled."""
        return torch.randperm(len(images), generator=generator, device=images.device)

    def fit(
        self, images: Tensor, *, epochs: int, batch: int = 128, seed: int = 0, checkpoint: str | Path | None = None,
        save_every: float = 120, progress: bool = True,
    ) -> dict:
        """Train on uint8 images ``[n, C, H, W]``; the last incomplete batch of an epoch is left out.

        Args:
            checkpoint: file to resume from if it exists and to write every `save_every` seconds and at the end. A
                resumed run continues bit-identically on the CPU.

        Returns:
            ``{"epoch": [...], <loss name>: [...], "seconds": float}``, the losses averaged over each epoch.

        Raises:
            NonFiniteLoss: a loss is not finite; nothing is written from then on.
            ValueError: images that `embed` would refuse, fewer of them, or fewer in an epoch, than one batch, or a
                checkpoint of another run.
        """
        self.check_images(images)
        if len(images) < batch:
            raise ValueError(f"{len(images)} images do not fill one batch of {batch}; use a smaller batch")
        fitting = _Fitting(self, images, epochs, batch, seed, checkpoint)
        saved = time.monotonic()
        self.train()
        while fitting.epoch < epochs:
            fitting.one_step()
            if checkpoint and (time.monotonic() - saved > save_every or fitting.epoch == epochs):
                fitting.save()
                saved = time.monotonic()
            if progress:
                fitting.report()
        self.eval()
        return fitting.history

    @torch.no_grad()
    def embed(self, images: Tensor, chunk: int = 1000) -> Tensor:
        """Vectors ``[n, d]``, float32, of uint8 images ``[n, C, H, W]``, on the images' device.

        Raises ValueError for images of another type, or of another shape than those it was made for.
        """
        self.check_images(images)
        with evaluating(self):
            return torch.cat([self.encode(as_floats(x)).float() for x in images.split(chunk)])

    def check_images(self, images: Tensor) -> None:
        """ValueError: images of another type than uint8, or of another shape than the embedding takes."""
        as_floats(images[:0])
        self.check_shape(images)

    def check_shape(self, images: Tensor) -> None:
        """ValueError: images ``[n, C, H, W]`` of another shape than the embedding takes."""
        shape = tuple(images.shape[1:])
        if self.takes not in (None, shape):
            raise ValueError(f"this {type(self).__name__} takes images of {self.takes}, these are {shape}; resize "
                             "them, or make one of their shape")  # fmt: skip

    def autocast_for(self, x: Tensor) -> torch.autocast:
        """The context of a network's pass over x: in bfloat16 if `autocast` says so."""
        able = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)  # older GPUs only emulate it
        enabled = able and (x.is_cuda if self.autocast is None else self.autocast)
        return torch.autocast(x.device.type, torch.bfloat16, enabled=enabled)

    @staticmethod
    def move(optimizer: torch.optim.Optimizer, loss: Tensor, network: nn.Module) -> None:
        """One update of one of several networks, by a loss that others take part in."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=list(network.parameters()))
        optimizer.step()

    def save(self, path: str | Path) -> None:
        """Write the state dict, whole or not at all."""
        save_tensors(self.state_dict(), path)

    def restore(self, path: str | Path) -> Embedding:
        """Read what `save` or a checkpoint of `fit` wrote. ValueError: another network, or a damaged file."""
        state = read(path)
        try:
            self.load_state_dict(state.get("model", state))
        except RuntimeError as error:
            raise ValueError(f"{path} holds another network: {str(error).splitlines()[-1].strip()}") from None
        return self.eval()


class _Fitting:
    """The state of a fit: everything that a checkpoint holds."""

    def __init__(self, model: Embedding, images: Tensor, epochs: int, batch: int, seed: int, checkpoint):
        self.model, self.images, self.epochs, self.batch = model, images, epochs, batch
        self.checkpoint = Path(checkpoint) if checkpoint else None
        self.config = {"model": type(model).__name__, "images": len(images), "epochs": epochs, "batch": batch,
                       "seed": seed, "options": getattr(model, "options", _settings(model)),
                       "pixels": _mark(images)}  # fmt: skip
        self.generator = torch.Generator(device=images.device).manual_seed(seed)
        model.opt = model.optimizers()
        self.epoch, self.at, self.order, self.sums = 0, 0, None, {}
        self.history = {"epoch": [], "seconds": 0.0}
        self.made_by = [provenance(images.device)]  # one entry for each process that went on with the fit
        if self.checkpoint and self.checkpoint.exists():
            self.load()
        self.started, self.first, self.shown = time.monotonic(), self.done, time.monotonic()

    @property
    def done(self) -> float:
        """Epochs, with the share of the one under way."""
        return self.epoch + (0 if self.order is None else self.at / len(self.order))

    def one_step(self) -> None:
        """One update; an epoch begins or ends with it where it is due. ValueError: no batch fits into an epoch."""
        started = time.perf_counter()
        if self.order is None:
            self.order, self.at, self.sums = self.model.start_epoch(self.images, self.epoch, self.epochs,
                                                                    self.generator), 0, {}  # fmt: skip
            if len(self.order) < self.batch:
                raise ValueError(f"an epoch of {len(self.order)} images does not fill one batch of {self.batch}; use a "
                                 "smaller batch")  # fmt: skip
        losses = self.model.step(self.images, self.order[self.at : self.at + self.batch], self.generator)
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.at += self.batch
        if self.at + self.batch > len(self.order):
            self._end_epoch()
        self.history["seconds"] += time.perf_counter() - started

    def _end_epoch(self) -> None:
        steps = len(self.order) // self.batch
        self._check()
        for name, value in self.sums.items():
            self.history.setdefault(name, []).append(value.item() / steps)
        self.epoch, self.order = self.epoch + 1, None
        self.history["epoch"].append(self.epoch)

    def _check(self) -> None:
        for name, value in self.sums.items():
            if not torch.isfinite(value):
                kept = f"; the last checkpoint, {self.checkpoint}, is from before" if self.checkpoint else ""
                raise NonFiniteLoss(f"the {name} loss became {value.item()} in epoch {self.epoch + 1}{kept}. "
                                    "Lower the learning rate.")  # fmt: skip

    def save(self) -> None:
        """Write the checkpoint. NonFiniteLoss: a loss or a weight is not finite, and the old file stays."""
        if self.order is not None:
            self._check()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise NonFiniteLoss(f"a weight is not finite after {self.done:.1f} epochs, though the losses are; the last "
                                f"checkpoint, {self.checkpoint}, is from before. Lower the learning rate.")  # fmt: skip
        state = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.model.opt],
            "generator": self.generator.get_state(), "epoch": self.epoch, "at": self.at, "order": self.order,
            "sums": self.sums, "history": self.history, "config": self.config, "made_by": self.made_by,
        }  # fmt: skip
        save_tensors(state, self.checkpoint)

    def load(self) -> None:
        """Go on from the checkpoint. ValueError: it is of another run, or of another kind of device."""
        state = read(self.checkpoint)
        old = state.get("config", {})
        for what in ("options", "pixels"):  # files of older versions do not say
            old.setdefault(what, self.config[what])
        differ = [f"{k}: {old.get(k)!r} there, {v!r} here" for k, v in self.config.items() if old.get(k) != v]
        if differ:
            raise ValueError(f"{self.checkpoint} belongs to another run ({'; '.join(differ)}); "
                             "choose another file or the same settings")  # fmt: skip
        self.model.restore(self.checkpoint).train()
        for optimizer, saved in zip(self.model.opt, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if len(state["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(state["generator"].cpu())
        elif state["epoch"] < self.epochs:
            raise ValueError(f"{self.checkpoint} was written on another kind of device than {self.images.device.type}, "
                             "whose random numbers differ; go on there, or start afresh with another file")
        self.epoch, self.at, self.sums, self.history = (state[k] for k in ("epoch", "at", "sums", "history"))
        device = self.images.device
        self.made_by = state.get("made_by", []) + self.made_by
        self.order = None if state["order"] is None else state["order"].to(device)
        self.sums = {name: value.to(device) for name, value in self.sums.items()}

    def report(self) -> None:
        """A line every half minute and at the end."""
        now = time.monotonic()
        if now - self.shown < 30 and self.epoch < self.epochs:
            return
        self.shown = now
        left = (self.epochs - self.done) * (now - self.started) / max(self.done - self.first, 1e-9)
        losses = "  ".join(f"{k} {v[-1]:.4f}" for k, v in self.history.items() if k not in ("epoch", "seconds"))
        print(f"epoch {self.done:.1f}/{self.epochs}  {losses}  {left / 60:.1f} min left", file=sys.stderr, flush=True)


def _settings(model: Embedding) -> dict:
    """What a model was built with, if no plan says: its attributes that are numbers, words or dicts of such.

    Not switches: a module's `training` and DeepCluster's `final` move, as does its `nmi`.
    """
    kept = {name: value for name, value in vars(model).items() if not name.startswith("_") and name != "nmi"}
    return {name: value for name, value in kept.items()
            if isinstance(value, (int, float, str, dict)) and not isinstance(value, bool)}  # fmt: skip


def _mark(images: Tensor) -> str:
    """A checksum of a thousand of the images."""
    return hashlib.sha256(images[:: -(-len(images) // 1000)].cpu().numpy().tobytes()).hexdigest()[:16]


def read(path: str | Path) -> dict:
    """What `save_tensors` wrote, tensors on the CPU. ValueError: the file is damaged or something else."""
    return load_tensors(path, "embedding")
