"""Readers of the data sets but Omniglot.

Each gives (images uint8 [n, channels, height, width], labels int64 [n], class names, superclasses), and CelebA also its
attributes and their names. `layout` names one of the layouts of `umeta_core.data.ABOUT`.
"""

import csv

import numpy as np
import torch

from . import packs

SPLITS = ("train", "val", "test")
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "omniglot": "Omniglot"}


def glyphs(split, size):
    """The built-in characters; splits are by script."""
    from . import glyphs as built_in

    drawn = built_in.glyphs(packs.cache_folder())
    chosen = np.arange(len(drawn["split"])) if split == "all" else np.flatnonzero(drawn["split"] == SPLITS.index(split))
    if size <= 28:
        images = drawn["images28"][chosen]
    else:
        images = np.unpackbits(drawn["images105"][chosen], axis=-1, count=105) * np.uint8(255)
    labels = torch.arange(len(chosen)).repeat_interleave(images.shape[1])
    return (torch.from_numpy(images.reshape(-1, 1, *images.shape[-2:])), labels,
            [str(drawn["class_names"][i]) for i in chosen], [str(drawn["scripts"][i]) for i in chosen])


def digits(split):
    """scikit-learn's digits, grey levels 0..16 spread over 0..255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.round(data.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target.astype(np.int64))
    rows = within_classes(labels, {"train": (0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1), "all": (0, 1)}[split])
    return images[rows], labels[rows], [str(digit) for digit in range(10)], []


def within_classes(labels, span):
    """Rows from the fraction span[0] up to span[1] of every class, in the file's order."""
    rows = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        rows.append(members[round(span[0] * len(members)) : round(span[1] * len(members))])
    return torch.cat(rows).sort().values


def vision(name, folder, layout, split):
    """MNIST, Fashion-MNIST, CIFAR-10, from a pack or from torchvision's files."""
    parts = []
    for part in ("train", "test"):
        if split == "all" or part == ("test" if split == "test" else "train"):
            parts.append(read_vision(name, folder, layout, part))
    images, labels = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    if split in ("train", "val"):
        if name == "cifar10":
            rows = within_classes(labels, (0, 0.9) if split == "train" else (0.9, 1))
        else:
            rows = slice(None, -5000) if split == "train" else slice(-5000, None)
        images, labels = images[rows], labels[rows]
    return images, labels, parts[0][2], []


def read_vision(name, folder, layout, part):
    """(images, labels, class names) of the official training or test part."""
    if layout == "torchvision":
        import torchvision

        try:
            data = getattr(torchvision.datasets, TORCHVISION[name])(str(folder), train=part == "train", download=False)
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            raise ValueError(f"{folder} has a truncated or corrupt copy of {name} ({error}): "
                             "delete it and get it again") from None
        images = torch.as_tensor(data.data)
        images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images[:, None]
        return images, torch.as_tensor(data.targets, dtype=torch.int64), list(data.classes)
    if name == "cifar10":
        file = folder / f"cifar10_{part}.npz"
        labels, names = packs.read_archive(file, "labels", "class_names")
        images = packs.decode_pack(file, 32)
    else:
        file = folder / f"{name}.npz"
        images, labels = packs.read_archive(file, f"x_{part}", f"y_{part}")
        images = images[:, None]
        names = packs.read_archive(file, "class_names")[0] if name == "fashion_mnist" else range(10)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), list(map(str, names))


def mini_imagenet(places):
    """64/16/20 classes of 600 photographs, in the CSV's order. places: {split: (folder, layout)} of those wanted."""
    images, labels, names = [], [], []
    for split, (folder, layout) in places.items():
        if layout == "pack":
            file = folder / f"mini_imagenet_{split}.npz"
            numbers, classes = packs.read_archive(file, "labels", "class_names")
            decoded = packs.decode_pack(file, 84)
        else:
            files, numbers, classes = mini_imagenet_files(folder, layout, split)
            decoded = packs.decode_files(files, 84, f"mini_imagenet_{split}")
        images.append(torch.from_numpy(decoded))
        labels.append(torch.from_numpy(np.asarray(numbers, dtype=np.int64)) + len(names))
        names += map(str, classes)
    # One part stays the memory-mapped file itself.
    return images[0] if len(images) == 1 else torch.cat(images), torch.cat(labels), names, []


def mini_imagenet_files(folder, layout, split):
    """(files, labels, class names) of one split: a CSV (filename,label) with images/, or a folder for each class."""
    if layout == "csv":
        with open(folder / f"{split}.csv", newline="") as file:
            rows = [(folder / "images" / row["filename"], row["label"]) for row in csv.DictReader(file)]
    else:
        rows = [(file, file.parent.name) for file in sorted((folder / split).glob("*/*"))
                if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    absent = [file for file, _ in rows if not file.exists()]
    if absent or not rows:
        first = f" (first: {absent[0]})" if absent else ""
        raise FileNotFoundError(f"mini_imagenet {split} in {folder}: {len(rows)} images are named, {len(absent)} of "
                                f"them are not there{first}: put all of them in place")
    classes = list(dict.fromkeys(label for _, label in rows))
    number = {label: i for i, label in enumerate(classes)}
    return [file for file, _ in rows], [number[label] for _, label in rows], classes


def pack_mini_imagenet(folder, layout, split, out):
    """Write the JPEG pack of one split from images at their places; returns its path."""
    files, labels, classes = mini_imagenet_files(folder, layout, split)
    path = out / f"mini_imagenet_{split}.npz"
    packs.encode_pack(path, packs.decode_files(files, 84, path.stem), labels=np.array(labels, np.int16),
                      wnids=np.array(classes), class_names=np.array(classes),
                      filenames=np.array([file.name.encode() for file in files]))
    return path


def celeba(folder, layout, split, part):
    """Faces of the official partition; labels are identities, numbered in the order of their official numbers."""
    if layout == "full":
        images, identity, attributes, names = read_celeba_full(folder, split)
    else:
        files = [folder / f"celeba_{p}.npz" for p in (("identity", "aligned") if part == "both" else (part,))]
        columns = [packs.read_archive(file, "identity", "attributes", "partition", "attribute_names") for file in files]
        names = columns[0][3]
        identity, attributes, partition = (np.concatenate([column[i] for column in columns]) for i in range(3))
        rows = slice(None) if split == "all" else partition == SPLITS.index(split)
        identity, attributes = identity[rows], attributes[rows]
        images = np.concatenate([packs.decode_pack(file, 84) for file in files])[rows]
        if not len(images):
            raise ValueError(f"celeba {split!r} is empty in {', '.join(map(str, files))}: the packs hold a part of "
                             "CelebA, use another split or the full data set")
    people, labels = np.unique(identity, return_inverse=True)
    return (torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), [str(person) for person in people], [],
            torch.from_numpy(attributes), [str(name) for name in names])


def read_celeba_full(folder, split):
    """(images, identities, attributes, their names) from the official files, cut to the central 178x178."""
    files, *labels = celeba_labels(folder, split)
    images = packs.decode_files([folder / "img_align_celeba" / file for file in files], 84, f"celeba_{split}", crop=178)
    return images, *labels


def celeba_labels(folder, split):
    """(file names, identities [n], attributes [n, 40] in {0, 1}, their names) from the official lists."""
    partition = dict(line.split() for line in (folder / "list_eval_partition.txt").read_text().splitlines())
    people = dict(line.split() for line in (folder / "identity_CelebA.txt").read_text().splitlines())
    lines = (folder / "list_attr_celeba.txt").read_text().splitlines()
    values = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    files = [file for file in partition if split == "all" or partition[file] == str(SPLITS.index(split))]
    attributes = (np.array([values[file] for file in files]) == "1").astype(np.uint8)
    return files, np.array([int(people[file]) for file in files]), attributes, lines[1].split()
