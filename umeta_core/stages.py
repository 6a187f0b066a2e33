"""The stages before meta-training as files that rows share: a fitted embedding, its vectors, the partitions.

``<folder>/<embedding>-<dataset>-<scale>.pt`` is an embedding, ``...-vectors-<split>.pt`` are its vectors, and
``...-partitions-clusters-k500-P100-R6-seed0.pt`` is a stack of partitions. A file that exists is used; delete it to
make it anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import partitions as parts
from . import shared_fits
from .data import COUNTS, ImageSet, load
from .embeddings.acai import ACAI
from .embeddings.base import Embedding, read
from .embeddings.bigan import BiGAN, ConvBiGAN
from .embeddings.deepcluster import DeepCluster, pca_whitening
from .embeddings.infogan import InfoGAN
from .embeddings.simclr import SimCLR
from .embeddings.simple import PCAPixels, RandomNetwork
from .embeddings.supervised import Supervised
from .embeddings.vgg import VGG19
from .generators import MSGAN, VAE, GivenGenerator
from .kmeans import kmeans
from .pickles import read_embeddings
from .readers import MINI_IMAGENET
from .rows import EMBEDDINGS, EmbeddingPlan, Row, embedding_plan
from .speed import tune_cpu
from .storage import alone, cache_folder, load_tensors, save_tensors, sha256

KINDS = {
    "acai": ACAI, "bigan": BiGAN, "conv-bigan": ConvBiGAN, "infogan": InfoGAN, "deepcluster": DeepCluster,
    "simclr": SimCLR, "supervised": Supervised, "vgg19": VGG19, "vae": VAE, "msgan": MSGAN, "pca": PCAPixels,
    "random": RandomNetwork,
}  # fmt: skip


def stages_folder(folder=None) -> Path:
    """The argument, ``$UMETA_STAGES``, or a folder in the user's cache."""
    return Path(folder or os.environ.get("UMETA_STAGES") or cache_folder() / "stages").expanduser()


def build_embedding(plan: EmbeddingPlan, channels: int, size: int, seed: int = 0, path=None) -> Embedding:
    """The plan's embedding with initial weights from `seed`, for square images; `path` has a given generator."""
    if plan.kind == "given":
        return given_generator(plan, channels, size, path)
    if plan.kind not in KINDS:
        raise ValueError(f"nothing is built for an embedding of kind {plan.kind!r}")
    generator = torch.Generator().manual_seed(seed)
    return KINDS[plan.kind](channels, size, generator=generator, **plan.options)


def given_generator(plan: EmbeddingPlan, channels: int, size: int, path) -> Embedding:
    """A generator that others have trained, from a TorchScript file that maps z to images in [-1, 1].

    FileNotFoundError: no such file.
    """
    path = Path(path or "generator").with_suffix(".ts")
    if not path.is_file():
        what = "ProGAN (github.com/facebookresearch/pytorch_GAN_zoo)" if plan.options["latent"] == 512 else "BigBiGAN"
        raise FileNotFoundError(f"no generator {path}: save one, for example {what}, with torch.jit.trace(net, z).save("
                                f"path); it maps z [n, {plan.options['latent']}] to images in [-1, 1]")  # fmt: skip
    network = torch.jit.load(str(path), map_location="cpu").eval()
    return GivenGenerator(network, channels=channels, size=size, output=(-1.0, 1.0), clip=True, **plan.options)


def stem(row: Row, scale: str, folder=None) -> Path:
    """What the files of the row's embedding have in common."""
    return _stem(row.fitted or row.embedding, row.dataset, scale, folder)


def _stem(embedding: str, dataset: str, scale: str, folder) -> Path:
    words = re.sub("[^a-z0-9]+", "-", f"{embedding} {dataset}".lower()).strip("-")
    return stages_folder(folder) / f"{words}-{scale}"


def fit_file(row: Row, scale: str, folder=None) -> Path:
    """The checkpoint of the fit of the row's embedding, which all views of one network share."""
    return Path(f"{_stem(row.plan.weights_of or row.fitted or row.embedding, row.dataset, scale, folder)}.pt")


def vectors_file(row: Row, split: str, scale: str, folder=None) -> Path:
    """Where the split's vectors are or will be: published ones (`import_embeddings`) serve every scale."""
    published = published_file(row, split, folder)
    return published if published.is_file() else Path(f"{stem(row, scale, folder)}-vectors-{split}.pt")


def published_file(row: Row, split: str, folder=None) -> Path:
    """The row's published vectors of a split, if they were imported."""
    return Path(f"{stem(row, 'published', folder)}-vectors-{split}.pt")


def partitions_file(row: Row, scale: str, seed: int, folder=None) -> Path:
    margin = "" if row.margin is None else f"-m{row.margin:g}"
    margin += f"-N{row.way}" if row.source == "hyperplanes" else ""  # which keeps cells enough for the way
    settings = f"{row.source.replace('mixed', 'clusters')}-k{clusters(row, scale)}-P{row.stack(scale)}-R{row.least()}"
    margin += "-most" if _most_sizable(row) else ""
    return Path(f"{stem(row, scale, folder)}-partitions-{settings}{margin}-seed{seed}.pt")


def wanted_vectors(row: Row, scale: str, folder=None) -> str:
    """Which files to bring for a row whose embedding is not fitted here (ImageNet's VGG-16 is too large)."""
    files = ", ".join(str(vectors_file(row, split, scale, folder)) for split in ("train", "val", "test"))
    return ("the ImageNet rows need the vectors of DeepCluster's VGG-16 (github.com/facebookresearch/deepcluster): "
            f"write {{'z': float32 [n, 256]}} with torch.save into {files}; rows in the order of "
            "load('imagenet', split)")  # fmt: skip


def fitted_file(row: Row, scale: str, folder=None) -> Path:
    """Says that a generator is trained; its weights are beside it, also while it is trained."""
    return Path(f"{stem(row, scale, folder)}.fitted")


def clusters(row: Row, scale: str) -> int:
    """k, at smoke at most 50."""
    return min(row.clusters, 50) if scale == "smoke" else row.clusters


def stage_files(row: Row, scale: str, seed: int, folder=None) -> list[Path]:
    """The files that must be there before the row can run without fitting or clustering anything itself."""
    files = []
    if row.needs_embedding and row.inputs == "embeddings":
        made = (split for split in row.splits if not published_file(row, split, folder).is_file())
        files += [vectors_file(row, split, scale, folder) for split in made]
    if (row.needs_embedding or row.embedding) and row.source in ("clusters", "hyperplanes", "mixed"):
        files.append(partitions_file(row, scale, seed, folder))
    if row.source == "latent":
        files.append(fitted_file(row, scale, folder))
    return files


def training_mark(row: Row, scale: str, seed: int, folder=None) -> str:
    """A checksum of the files that the row's training tasks were made of; "" if they are of images and labels."""
    files = [fit_file(row, scale, folder)] if row.source in ("latent", "augmented") and row.needs_embedding else []
    if row.source in ("clusters", "hyperplanes", "mixed"):
        files.append(partitions_file(row, scale, seed, folder))
    if row.inputs == "embeddings":
        files += [vectors_file(row, split, scale, folder) for split in row.train_splits]
    sums = [sha256(file) for file in files if file.is_file()]  # a generator that others trained has none
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16] if sums else ""


def run_stage(rows: list[Row], scale: str, seeds: list[int], path, device="cpu", threads=1) -> None:
    """Make the stage file `path` for the first of the rows that needs it. ValueError: none does."""
    path = Path(path)
    tune_cpu()
    torch.set_num_threads(threads)
    for row in rows:
        for split in ("train", *row.splits) if row.needs_embedding else ():
            if path == vectors_file(row, split, scale, path.parent):
                vectors(row, split, scale, device, path.parent)
                return
        for seed in seeds:
            if path == partitions_file(row, scale, seed, path.parent):
                make_partitions(row, scale, seed, device, path.parent)
                return
        if row.source == "latent" and path == fitted_file(row, scale, path.parent):
            fit_embedding(row, scale, device, path.parent)
            path.touch()
            return
    raise ValueError(f"no row needs {path}")


def images_of(row: Row, split: str, device="cpu") -> ImageSet:
    """A split of the row's dataset under the row's protocol. ValueError: this copy of the dataset has none of it."""
    name = row.dataset.removesuffix("_identity")  # CelebA's classes are people, unless a row asks for attributes
    try:
        return load(name, split, protocol=row.split_protocol, device=device)
    except ValueError as error:
        if split != "val" or "is empty" not in str(error):
            raise
        raise ValueError(f"{error}. {row.slug} needs validation images; rows of which nothing is tuned, for example "
                         "nearest-mean and matching, run without") from None  # fmt: skip


def fit_embedding(row: Row, scale: str, device="cpu", folder=None, progress=True) -> Embedding:
    """The row's embedding: fitted now, finished from an interrupted fit, or read if it was fitted before.

    All rows and all seeds share one embedding, as in the paper. At smoke it sees about 2000 images.
    FileNotFoundError: it is not fitted here, see `wanted_vectors`.
    """
    plan = row.plan
    if plan.kind == "file":
        raise FileNotFoundError(wanted_vectors(row, scale, folder))
    path = fit_file(row, scale, folder)
    data = images_of(row, "train")
    model = build_embedding(plan, *data.images.shape[1:3], path=path).to(device)
    model.options = embedding_plan(plan.weights_of, row.dataset).options if plan.weights_of else plan.options
    every = max(1, len(data) // 2000) if scale == "smoke" else 1
    labels = {"labels": data.labels[::every]} if plan.kind == "supervised" else {}
    budget = {"epochs": plan.epochs[scale], "batch": plan.batch}
    with alone(path):
        state = read(path) if path.is_file() else {}
        if shared_fits.is_shared(state):
            return shared_fits.restore(model, state, path, options=model.options, **budget)
        home = "cpu" if state.get("epoch", 0) >= budget["epochs"] else device  # a finished fit is only read
        labels = {name: value.to(home) for name, value in labels.items()}
        model.fit(data.images[::every].to(home), checkpoint=path, progress=progress, **budget, **labels)
    return model


def take_fit(row: Row, folder=None) -> Path:
    """Take the fit of the row's embedding that comes with the repository, for full scale; returns the file.

    Raises ValueError if there is an own fit or its vectors, FileNotFoundError if the repository has none.
    """
    if not row.needs_embedding:
        raise ValueError(f"{row.slug} needs no embedding")
    path, fit = fit_file(row, "full", folder), row.plan.weights_of or row.fitted or row.embedding
    views = {fit, *(name for (name, _), plan in EMBEDDINGS.items() if plan.weights_of == fit)}
    stems = (_stem(name, row.dataset, "full", folder).name for name in views)
    own = sorted(file.name for name in stems for file in path.parent.glob(f"{name}*.pt"))
    if own:  # the fit itself, and vectors, partitions and centroids that stand on it
        raise ValueError(f"{', '.join(own)} in {path.parent}: move {'them' if own[1:] else 'it'} away to take the "
                         "shared fit")  # fmt: skip
    shared_fits.take(path.name, path)
    return path


def fitted_by(row: Row, scale: str, folder=None) -> tuple[list[dict], bool]:
    """Commit, device and versions of each process that worked on the fit of the row's embedding, if known; and whether
    it is the fit that comes with the repository."""
    path = fit_file(row, scale, folder)
    state = read(path) if path.is_file() else {}
    return state.get("made_by", []), shared_fits.is_shared(state)


def vectors(row: Row, split: str, scale: str, device="cpu", folder=None) -> Tensor:
    """The embedding ``[n, d]`` of a split, from its file if that exists.

    Raises ValueError if the file is of other images or settings, of another width, or no vectors at all.
    """
    settings = {"epochs": row.plan.epochs[scale], "batch": row.plan.batch, "options": row.plan.options}
    path, images = vectors_file(row, split, scale, folder), images_of(row, split)
    if path.exists():
        stored = _stored_vectors(path, row)
        if len(stored["z"]) != len(images):
            raise ValueError(f"{path} embeds {len(stored['z'])} images but {row.dataset} {split} has {len(images)}; "
                             "delete it to embed again")  # fmt: skip
        _check_images(path, stored, images)
        if stored.get("settings", settings) != settings:
            raise ValueError(f"{path} is of an embedding with {stored['settings']}, the row has {settings}; delete it, "
                             "the fit, partitions and centroids of it, and checkpoints trained on them, to make "
                             "them again")  # fmt: skip
        return stored["z"].to(device)
    model = fit_embedding(row, scale, device, folder)
    z = model.embed(images.images.to(device))
    if row.plan.whiten:
        basis = z if split == "train" else model.embed(images_of(row, "train", device).images)
        mean, matrix = pca_whitening(basis, model.d)
        z = (z - mean) @ matrix
    z = torch.nn.functional.normalize(z, dim=1) if row.plan.normalize else z
    save_tensors({"z": z.cpu(), "images": fingerprint(images), "settings": settings}, path)
    return z


def _stored_vectors(path: Path, row: Row) -> dict:
    """What is in a file of vectors, "z" ``[n, d]`` and more. ValueError: no vectors, or not as wide as the row says."""
    stored = read(path)
    z = stored.get("z")
    if not torch.is_tensor(z) or z.dim() != 2:
        raise ValueError(f"{path} holds no vectors [n, d] under 'z'; delete it to embed again")
    said = re.search(r"\bd=(\d+)", row.variant) if (row.embedding, row.dataset) in EMBEDDINGS else None
    d = int(said[1]) if said else z.shape[1]
    if z.shape[1] != d:
        raise ValueError(f"{path} holds vectors of {z.shape[1]} numbers but {row.slug} has d={d}; delete it to embed "
                         "again")  # fmt: skip
    return stored


def fingerprint(images: ImageSet) -> str:
    """A cheap checksum of a set: its shape, all labels, and every pixel of about 256 images."""
    some = images.images[:: max(1, len(images) // 256)].contiguous().cpu()
    words = (str(list(images.images.shape)).encode(), images.labels.cpu().numpy().tobytes(), some.numpy().tobytes())
    return hashlib.sha256(b"".join(words)).hexdigest()[:16]


def _check_images(path: Path, stored: dict, images: ImageSet) -> None:
    """ValueError if the file is of other images; a file that does not say (an older one, or brought) passes."""
    if "images" in stored and stored["images"] != fingerprint(images):
        raise ValueError(f"{path} was made of other images than those of {images.name} {images.split} now; delete it "
                         "to make it again")  # fmt: skip


def shown(row: Row, split: str, scale: str, device="cpu", folder=None) -> tuple[ImageSet, Tensor | None]:
    """The images of a split; or, if the row learns on vectors, the set without its pixels, and the vectors.

    Vectors may come with labels of their own (`import_embeddings`).
    """
    if row.inputs == "images":
        return images_of(row, split, device), None
    path = vectors_file(row, split, scale, folder)
    stored = _stored_vectors(path, row) if path.exists() else {}
    if "labels" in stored:
        z, names = stored["z"].to(device), stored["class_names"]
        images = ImageSet(torch.empty(0), stored["labels"], names, [], row.dataset, split)
    else:
        z, images = vectors(row, split, scale, device, folder), images_of(row, split)
    return replace(images, images=torch.empty(len(z), 0, 1, 1, dtype=torch.uint8)).to(device), z


def import_embeddings(row: Row, source, folder=None) -> list[Path]:
    """Take published embeddings of the three splits, ``<source>/{train,val,test}_embeddings.pkl``, as the vectors of
    the row's embedding, at every scale. Returns the files written: three, or none if one of them is unfit.

    Raises:
        FileNotFoundError: a split is missing; ValueError: the row does not learn on what was published, the classes are
        not those of its dataset, or see `pickles.read_embeddings`.
    """
    given = row.needs_embedding and not row.fitted and row.plan.kind == "supervised"
    if not given or row.dataset not in ("mini_imagenet", "tiered_imagenet"):
        raise ValueError(f"{row.slug} does not learn on LEO's features; take leo-1shot or leo-1shot-tiered-imagenet")
    pickles = {split: Path(source) / f"{split}_embeddings.pkl" for split in ("train", "val", "test")}
    for pickle in pickles.values():
        if not pickle.is_file():
            raise FileNotFoundError(f"no {pickle}; {source} should be the folder of a dataset and crop, for example "
                                    "embeddings/miniImageNet/center, of the authors' embeddings.zip "
                                    "(github.com/google-deepmind/leo)")  # fmt: skip
    found = {split: read_embeddings(pickle)[:3] for split, pickle in pickles.items()}
    _check_classes(row, source, {split: names for split, (_, _, names) in found.items()})
    for split, (z, labels, names) in found.items():
        z = torch.nn.functional.normalize(z, dim=1) if row.plan.normalize else z
        save_tensors({"z": z, "labels": labels, "class_names": names}, published_file(row, split, folder))
    return [published_file(row, split, folder) for split in pickles]


def _check_classes(row: Row, source, names: dict[str, list[str]]) -> None:
    """Raise ValueError unless the classes of the splits can be those of the row's dataset.

    Which of mini-ImageNet's classes are in which split is not asked: LEO's Fig. 4 calls Jellyfish a validation class,
    in the usual split it is a training class.
    """
    counts = {split: classes for split, (classes, _) in COUNTS[row.dataset].items()}
    if {split: len(classes) for split, classes in names.items()} != counts:
        there = "/".join(str(len(classes)) for classes in names.values())
        raise ValueError(f"{source} has {there} classes to train, validate and test on, {row.dataset} has "
                         f"{'/'.join(map(str, counts.values()))}: give the folder of the row's dataset")  # fmt: skip
    every = sorted(name for classes in names.values() for name in classes)
    twice = next((name for name in every if every.count(name) > 1), None)
    if twice:
        raise ValueError(f"{source} has the class {twice} in two splits: get the files again")
    if row.dataset == "mini_imagenet":
        strange = set(every).difference(*MINI_IMAGENET.values())
        if strange:
            raise ValueError(f"{source} has the class {min(strange)}, which is not one of mini-ImageNet's: give the "
                             "folder of the row's dataset")  # fmt: skip


def make_partitions(row: Row, scale: str, seed: int, device="cpu", folder=None) -> Tensor:
    """The row's partitions ``[P, n]`` of the training images, -1 = left out, from their file if it exists.

    Raises ValueError if the file is of other images or vectors, or holds no partitions.
    """
    k, many, least = clusters(row, scale), row.stack(scale), row.least()
    path = partitions_file(row, scale, seed, folder)
    generator = torch.Generator(device=device).manual_seed(seed)
    if row.source == "random":
        return parts.random_partitions(len(images_of(row, "train", device)), k, many, generator)
    clustered = row.embedding != "pixels" and (not path.exists() or vectors_file(row, "train", scale, folder).exists())
    z = vectors(row, "train", scale, device, folder) if clustered else None
    mark = {} if z is None else {"vectors": _mark(z)}
    with alone(path):
        if not path.exists():
            made = _partitions(row, scale, k, many, least, z, generator).cpu()
            save_tensors({"partitions": made, "images": fingerprint(images_of(row, "train")), **mark}, path)
    stored = load_tensors(path, "partitions file")
    if "partitions" not in stored:
        raise ValueError(f"{path} holds no partitions; delete it to cluster again")
    if "images" in stored:
        _check_images(path, stored, images_of(row, "train"))
    _check_vectors(path, stored, mark)
    return stored["partitions"].to(device)


def _mark(z: Tensor) -> str:
    """A checksum of vectors, for the files that are made of them."""
    return hashlib.sha256(z.cpu().numpy().tobytes()).hexdigest()[:16]


def _check_vectors(path: Path, stored: dict, mark: dict) -> None:
    """ValueError if the file was made of other vectors; an older file, which does not say, passes."""
    if mark and stored.get("vectors", mark["vectors"]) != mark["vectors"]:
        raise ValueError(f"{path} was made of other vectors; delete it to cluster again")


def _partitions(row: Row, scale: str, k: int, many: int, least: int, z: Tensor | None, generator) -> Tensor:
    size = dict(least=least, way=row.way)
    if row.source == "hyperplanes":
        return parts.hyperplane_partitions(z, partitions=many, generator=generator, margin=row.margin,
                                           spread=spread(row), **size)  # fmt: skip
    if row.embedding == "pixels":
        z = parts.zca(images_of(row, "train", generator.device).images)
        return parts.cluster_partitions(z, k, many, generator, enough=0.0, restarts=1, **size)
    rule = dict(enough=0.8, sizable=least, restarts=3 if many > 1 else None) if _most_sizable(row) else {}
    small = 2 * k * least > len(z)  # clusters are too small for the rule on average: those with R images are used
    rule = dict(enough=0.0) if scale == "smoke" else rule | {"enough": 0.0} if small else rule
    return parts.cluster_partitions(z, k, many, generator, **rule, **size)


def _most_sizable(row: Row) -> bool:
    """Whether 80 % of the clusters have to be large enough (prototypical networks; reference code)."""
    return row.learner == "protonets" and row.source in ("clusters", "mixed") and row.embedding != "pixels"


def spread(row: Row) -> float:
    """Points on the hyperplanes are U(-0.8, 0.8), and the origin for DeepCluster (reference code)."""
    return 0.0 if row.embedding == "DeepCluster" else 0.8


def centroids(row: Row, scale: str, device="cpu", folder=None) -> Tensor:
    """The centroids ``[k, d]`` of the training vectors for cluster matching: the best of ten k-means, seed 0.

    Raises ValueError if their file is of other vectors.
    """
    k = clusters(row, scale)
    path = Path(f"{stem(row, scale, folder)}-centroids-k{k}.pt")
    z = vectors(row, "train", scale, device, folder)
    mark = {"vectors": _mark(z)}
    with alone(path):
        if not path.exists():
            restarts = 10 if scale == "full" else 1
            made = kmeans(z, k, torch.Generator(device=device).manual_seed(0), restarts=restarts).centroids
            save_tensors({"centroids": made.cpu(), **mark}, path)
    stored = load_tensors(path, "centroids file")
    _check_vectors(path, stored, mark)
    return stored["centroids"].to(device)
