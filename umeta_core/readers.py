"""Readers of the data sets but Omniglot.

Each gives (images uint8 [n, channels, height, width], labels int64 [n], class names, superclasses), and CelebA also its
attributes and their names. `layout` names one of the layouts of `umeta_core.data.ABOUT`.
"""

import csv
import hashlib
import io
import os
import re

import numpy as np
import torch

from . import packs, storage
from .pickles import read_pickle

SPLITS = ("train", "val", "test")
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "omniglot": "Omniglot"}
# The classes of mini-ImageNet by their WordNet ids (Ravi & Larochelle 2017).
MINI_IMAGENET = {split: ids.split() for split, ids in {
    "train": """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867 n02091831
        n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079 n02165456 n02457408
        n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168 n03047690 n03062245 n03207743
        n03220513 n03337140 n03347037 n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605
        n03908618 n03924679 n03998194 n04067472 n04243546 n04251144 n04258138 n04275548 n04296562 n04389033
        n04435653 n04443257 n04509417 n04515003 n04596742 n04604644 n04612504 n06794110 n07584110 n07697537
        n07747607 n09246464 n13054560 n13133613
    """,
    "val": """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370 n03417042
        n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
    """,
    "test": """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525
        n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480
    """,
}.items()}


def glyphs(split, size):
    """The built-in characters; splits are by script."""
    from . import glyphs as built_in

    drawn = built_in.glyphs(storage.cache_folder())
    chosen = np.arange(len(drawn["split"])) if split == "all" else np.flatnonzero(drawn["split"] == SPLITS.index(split))
    if size <= 28:
        images = drawn["images28"][chosen]
    else:
        images = built_in.unpack(drawn["images105"][chosen])
    labels = torch.arange(len(chosen)).repeat_interleave(images.shape[1])
    return (torch.from_numpy(images.reshape(-1, 1, *images.shape[-2:])), labels,
            [str(drawn["class_names"][i]) for i in chosen], [str(drawn["scripts"][i]) for i in chosen])


def digits(split):
    """scikit-learn's digits, gray levels 0..16 spread over 0..255."""
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
        labels, names = storage.read_archive(file, "labels", "class_names")
        images = packs.decode_pack(file, 32)
    else:
        file = folder / f"{name}.npz"
        images, labels = storage.read_archive(file, f"x_{part}", f"y_{part}")
        images = images[:, None]
        names = storage.read_archive(file, "class_names")[0] if name == "fashion_mnist" else range(10)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), list(map(str, names))


def part_of_imagenet(name, places):
    """mini- or tieredImageNet, in the order of the CSV or the files. places: {split: (folder, layout)} of those wanted.

    64/16/20 classes of 600 photographs; 351/97/160 classes of 732 to 1300.
    """
    images, labels, names = [], [], []
    for split, (folder, layout) in places.items():
        if layout == "pack":
            file = folder / f"mini_imagenet_{split}.npz"
            numbers, classes = storage.read_archive(file, "labels", "class_names")
            decoded = packs.decode_pack(file, 84)
        elif layout == "pickles":
            decoded, numbers, classes = tiered_pickles(folder, split)
        else:
            files, numbers, classes = part_of_imagenet_files(name, folder, layout, split)
            decoded = packs.decode_files(files, 84, f"{name}_{split}")
        images.append(torch.from_numpy(decoded))
        labels.append(torch.from_numpy(np.asarray(numbers, dtype=np.int64)) + len(names))
        names += map(str, classes)
    # One part stays the memory-mapped file itself.
    return images[0] if len(images) == 1 else torch.cat(images), torch.cat(labels), names, []


def tiered_pickles(folder, split):
    """(images, labels, class names) of one split of the authors' tieredImageNet: a list of PNGs, a dict of labels.

    The list is held in memory while it is read and decoded, the first time (7 GB to train on, twice that at the peak).
    """
    images, labels = folder / f"{split}_images_png.pkl", read_pickle(folder / f"{split}_labels.pkl")
    wanted = ("label_specific", "label_specific_str")
    numbers, classes = (labels.get(key) for key in wanted) if isinstance(labels, dict) else (None, None)
    if numbers is None or classes is None or not len(numbers) or not 0 <= min(numbers) <= max(numbers) < len(classes):
        raise ValueError(f"{folder / f'{split}_labels.pkl'} has no {' and '.join(wanted)} that fit: get it again")

    def fill(array):
        pngs = read_pickle(images)
        if not isinstance(pngs, list) or len(pngs) != len(array):
            raise ValueError(f"{images} has {len(pngs)} entries and {split}_labels.pkl {len(array)} labels: "
                             "get both again")
        packs.decode(lambda i: io.BytesIO(np.asarray(pngs[i]).tobytes()), array, f"tiered_imagenet_{split}")

    return storage.cached_array(f"tiered_imagenet_{split}", [images], (len(numbers), 3, 84, 84), fill), numbers, classes


def part_of_imagenet_files(name, folder, layout, split):
    """(files, labels, class names) of one split: a CSV (filename,label) with images/, or a folder for each class."""
    if layout == "csv":
        with open(folder / f"{split}.csv", newline="") as file:
            found = csv.DictReader(file)
            if not {"filename", "label"} <= set(found.fieldnames or ()):
                raise ValueError(f"{file.name} has no columns filename and label: get it again")
            rows = [(folder / "images" / row["filename"], row["label"]) for row in found]
    else:
        rows = [(file, file.parent.name) for file in packs.image_files(folder / split, "*/*")]
    absent = [file for file, _ in rows if not file.exists()]
    if absent or not rows:
        first = f" (first: {absent[0]})" if absent else ""
        raise FileNotFoundError(f"{name} {split} in {folder}: {len(rows)} images are named, {len(absent)} of them are "
                                f"not there{first}: put all of them in place")
    classes = list(dict.fromkeys(label for _, label in rows))
    number = {label: i for i, label in enumerate(classes)}
    return [file for file, _ in rows], [number[label] for _, label in rows], classes


def pack_mini_imagenet(folder, layout, split, out):
    """Write the JPEG pack of one split from images at their places; returns its path."""
    files, labels, classes = part_of_imagenet_files("mini_imagenet", folder, layout, split)
    path = out / f"mini_imagenet_{split}.npz"
    packs.encode_pack(path, packs.decode_files(files, 84, path.stem), labels=np.array(labels, np.int16),
                      wnids=np.array(classes), class_names=np.array(classes),
                      filenames=np.array([file.name.encode() for file in files]))
    return path


def imagenet(folder, split):
    """The photographs of a split, not in memory but mapped from the pack's file.

    Validation and test are the 16 and 20 classes of mini-ImageNet, training is all others (CACTUs, App. G). The
    superclass of a class says which split of mini-ImageNet has it: "mini_imagenet train" and so on, or "no mini".
    """
    labels, names = storage.read_archive(folder / "imagenet.npz", "labels", "class_names")
    images, names = storage.map_array(folder / "imagenet.npy"), list(map(str, names))
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} images in imagenet.npy and {len(labels)} labels in imagenet.npz: "
                         "pack it again")
    classes = [i for i, name in enumerate(names) if split in ("all", imagenet_split(name))]
    if not classes:
        raise ValueError(f"imagenet {split!r} is empty in {folder}: none of its classes were packed; pack all 1000")
    # A split is one piece of the file: `imagenet_files` sorts by split first.
    first, last = np.searchsorted(labels, [classes[0], classes[-1] + 1])
    home = {name: f"mini_imagenet {mini}" for mini, members in MINI_IMAGENET.items() for name in members}
    chosen = [names[i] for i in classes]
    return (images[first:last], torch.from_numpy(labels[first:last].astype(np.int64) - classes[0]), chosen,
            [home.get(name, "no mini") for name in chosen])


def imagenet_split(wnid):
    """The split that a class of ImageNet belongs to."""
    return next((split for split in ("val", "test") if wnid in MINI_IMAGENET[split]), "train")


def imagenet_files(folder):
    """(files, their classes) in `folder`/train/<WordNet id>/ or `folder`/<WordNet id>/, by split, class and name."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    classes = [name for name in os.listdir(root) if re.fullmatch(r"n\d{8}", name)] if root.is_dir() else []
    classes.sort(key=lambda wnid: (SPLITS.index(imagenet_split(wnid)), wnid))
    rows = [(file, wnid) for wnid in classes for file in packs.image_files(root / wnid, "*")]
    if not rows:
        raise FileNotFoundError(f"no images in {root}/n01440764/*.JPEG and so on: unpack ILSVRC2012_img_train.tar and "
                                "the 1000 archives in it, one folder for each class")
    return [file for file, _ in rows], [wnid for _, wnid in rows]


def pack_imagenet(folder, out):
    """Write all images at 224x224 (193 GB) to imagenet.npy and their labels to imagenet.npz; returns the paths.

    An interrupted call goes on where it stopped; what is packed already is left alone. Images are resized whole, like
    mini-ImageNet's. (The reference code reads files of this size and does not say how they were made.)
    """
    files, labels = imagenet_files(folder)
    array, archive = out / "imagenet.npy", out / "imagenet.npz"
    stamp = hashlib.sha256("\n".join(f"{file.parent.name}/{file.name}" for file in files).encode()).hexdigest()[:16]
    with storage.alone(array):  # of several runs one packs
        if not (array.exists() and archive.exists() and storage.read_archive(archive, "stamp")[0] == stamp):
            array.unlink(missing_ok=True)  # of other files
            classes = list(dict.fromkeys(labels))
            number = {wnid: i for i, wnid in enumerate(classes)}
            storage.write_archive(archive, labels=np.array([number[wnid] for wnid in labels], np.int16),
                                class_names=np.array(classes), stamp=np.array(stamp))
            packs.append_images(array, files, 224, stamp)  # last, as the array has its name when it is whole
    return [array, archive]


def celeba(folder, layout, split, part):
    """Faces of the official partition; labels are identities, numbered in the order of their official numbers."""
    if layout == "full":
        images, identity, attributes, names = read_celeba_full(folder, split)
    else:
        files = [folder / f"celeba_{p}.npz" for p in (("identity", "aligned") if part == "both" else (part,))]
        lists = "identity", "attributes", "partition", "attribute_names"
        columns = [storage.read_archive(file, *lists) for file in files]
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
    """(file names, identities [n], attributes [n, 40] in {0, 1}, their names) from the official lists.

    ValueError: the lists do not fit each other, or one is cut short.
    """
    try:
        return _celeba_labels(folder, split)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{folder}: its three lists do not fit each other or are cut short ({error}): get them again"
                         ) from None


def _celeba_labels(folder, split):
    partition = dict(line.split() for line in (folder / "list_eval_partition.txt").read_text().splitlines())
    people = dict(line.split() for line in (folder / "identity_CelebA.txt").read_text().splitlines())
    lines = (folder / "list_attr_celeba.txt").read_text().splitlines()
    values = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    files = [file for file in partition if split == "all" or partition[file] == str(SPLITS.index(split))]
    attributes = (np.array([values[file] for file in files]) == "1").astype(np.uint8)
    return files, np.array([int(people[file]) for file in files]), attributes, lines[1].split()
