"""Omniglot (Lake et al. 2015): 1623 characters of 50 alphabets, 20 drawings each, and the protocols that split them."""

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import packs, storage
from .readers import SPLITS

# (train, validation, test) characters; whether each rotation by a quarter turn is a class of its own.
PROTOCOLS = {
    "cactus": ((1100, 100, 423), False),
    "lasium": ((1200, 100, 323), False),
    "meta_gmvae": ((1200, 100, 323), True),
    "vinyals": ((1028, 172, 423), True),
}
# The split of Vinyals et al. (2016) as torchmeta ships it: whole alphabets, but for four characters of Gurmukhi.
VINYALS_VAL = {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
VINYALS_TEST = {"Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)", "Oriya",
                "Syriac_(Serto)", "Sylheti", "Tengwar", "Tibetan", "ULOG"}
GURMUKHI_TEST = {f"character{i}" for i in range(42, 46)}


@dataclass
class Characters:
    """Names per character, the number of drawings of each, and ink(): uint8 [characters, drawings, 105, 14].

    Rows of ink are packed by np.packbits, 1 = ink. `sources` are the files it comes from.
    """

    alphabets: list[str]
    names: list[str]
    is_evaluation: np.ndarray
    drawings: int
    ink: Callable[[], np.ndarray]
    sources: list[Path]


def character_split(alphabets, names, protocol):
    """Split of every character under a protocol: int array, 0 train, 1 val, 2 test.

    "vinyals" is by alphabet (Vinyals et al. 2016). The other protocols ignore alphabets: characters are put in the
    order of sha256("0/alphabet/character") and cut into train, validation and test. That order depends on no
    random-number library and on no directory listing. The authors' code (CACTUs: MAML's data_generator.py, seed 1;
    LASIUM: seed 47) shuffles a directory listing that cannot be recovered, so the counts are theirs and the characters
    are not. Splits nest: the 323 test characters of "lasium" and "meta_gmvae" are among the 423 of "cactus".
    Raises ValueError for an unknown protocol, or when the number of characters is not 1623.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown Omniglot protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
    (train, val, test), _ = PROTOCOLS[protocol]
    if len(names) != train + val + test:
        raise ValueError(f"protocol {protocol!r} splits the 1623 characters of Omniglot, this copy has {len(names)}: "
                         "get the whole data set, or load split='all'")
    if protocol == "vinyals":
        return np.array([vinyals(*pair) for pair in zip(alphabets, names, strict=True)])
    keys = [hashlib.sha256(f"0/{a}/{name}".encode()).hexdigest() for a, name in zip(alphabets, names, strict=True)]
    split = np.empty(len(names), dtype=int)
    split[np.argsort(keys)] = np.repeat([0, 1, 2], (train, val, test))
    return split


def vinyals(alphabet, name):
    """Split of one character in Vinyals et al. (2016), as torchmeta ships it: 0 train, 1 val, 2 test."""
    if alphabet in VINYALS_VAL:
        return 1
    return 2 if alphabet in VINYALS_TEST or (alphabet == "Gurmukhi" and name in GURMUKHI_TEST) else 0


def read_pack(path):
    """Characters of the compact omniglot.npz."""
    ink, alphabet, alphabet_names, names, evaluation = storage.read_archive(
        path, "images_packed", "alphabet", "alphabet_names", "character_names", "is_evaluation")
    return Characters([str(alphabet_names[a]) for a in alphabet], [str(name) for name in names], evaluation,
                      ink.shape[1], lambda: ink, [Path(path)])


def read_folder(folder):
    """Characters of the original layout images_{background,evaluation}/ALPHABET/characterNN/NNNN_DD.png (0 = ink).

    They come in the order of the original file numbers NNNN. ValueError: no drawings, or not as many of each character.
    """
    parts = [Path(folder) / part for part in ("images_background", "images_evaluation")]  # no images_background_small1
    files = [file for part in parts for file in packs.image_files(part, "*/character*/*.png")]
    drawings = defaultdict(list)
    for file in sorted(files, key=lambda file: (file.name, str(file))):
        drawings[file.parent].append(file)
    counts = {len(files) for files in drawings.values()}
    if not drawings:
        raise ValueError(f"{folder} has no images_background/ALPHABET/characterNN/NNNN_NN.png: unpack the images there")
    if len(counts) != 1:
        raise ValueError(f"{folder} is incomplete: its characters have {min(counts)} to {max(counts)} drawings; "
                         "unpack the images again")
    files = [file for members in drawings.values() for file in members]
    count = counts.pop()
    return Characters(
        [character.parent.name for character in drawings], [character.name for character in drawings],
        np.array([character.parent.parent.name == "images_evaluation" for character in drawings]), count,
        lambda: np.stack([read_ink(file) for file in files]).reshape(len(drawings), count, 105, 14), files)


def read_ink(file):
    """Packed ink [105, 14] of one PNG."""
    pixels = np.asarray(packs.open_image(file, file, "L"))
    if pixels.shape != (105, 105):
        raise ValueError(f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, Omniglot's drawings are 105x105: "
                         "unpack it again")
    return np.packbits(pixels < 128, axis=-1)


def images_at(characters, size):
    """uint8 [characters, drawings, size, size], ink = 255; resized once (antialiased bilinear) and cached."""
    count, drawings = len(characters.names), characters.drawings

    def fill(array):
        packed = characters.ink()
        for i in range(0, count, 50):
            ink = np.unpackbits(packed[i : i + 50], axis=-1, count=105).reshape(-1, 1, 105, 105) * np.uint8(255)
            array[i : i + 50] = packs.resize(torch.from_numpy(ink), size).numpy().reshape(-1, drawings, size, size)

    return storage.cached_array(f"omniglot{size}", characters.sources, (count, drawings, size, size), fill)


def load(folder, layout, split, protocol, size):
    """(images [n, 1, size, size], labels [n], class names, alphabets): see `umeta_core.data.load`."""
    characters = read_pack(Path(folder) / "omniglot.npz") if layout == "pack" else read_folder(folder)
    chosen, rotations = np.arange(len(characters.names)), 1
    if split != "all":
        splits = character_split(characters.alphabets, characters.names, protocol)
        chosen = np.flatnonzero(splits == SPLITS.index(split))
        rotations = 4 if PROTOCOLS[protocol][1] else 1
    images = torch.from_numpy(images_at(characters, size)[chosen])
    names = [f"{characters.alphabets[i]}/{characters.names[i]}" for i in chosen]
    alphabets = [characters.alphabets[i] for i in chosen]
    if rotations > 1:
        images = torch.stack([images.rot90(turn, (-2, -1)) for turn in range(4)], dim=1)
        names = [f"{name}/rotated{90 * turn}" for name in names for turn in range(4)]
        alphabets = [alphabet for alphabet in alphabets for _ in range(4)]
    images = images.reshape(-1, 1, size, size)
    labels = torch.arange(len(names)).repeat_interleave(characters.drawings)
    return images, labels, names, alphabets


def pack(folder, out):
    """Write the compact omniglot.npz from the original folders; returns the path."""
    characters = read_folder(folder)
    alphabet_names = list(dict.fromkeys(characters.alphabets))
    out = Path(out) / "omniglot.npz"
    storage.write_archive(
        out, images_packed=characters.ink(), alphabet_names=np.array(alphabet_names),
        alphabet=np.array([alphabet_names.index(a) for a in characters.alphabets], np.int16),
        character_names=np.array(characters.names), is_evaluation=characters.is_evaluation,
        vinyals_split=np.array([vinyals(*pair) for pair in
                                zip(characters.alphabets, characters.names, strict=True)], np.int8))
    return out
