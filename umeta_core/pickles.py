"""Pickles that others have published, read without running their code."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_pickle(path: str | Path):
    """The content of a pickle of numbers, strings, lists, tuples, dicts and NumPy arrays.

    A pickle is a program: the usual reader runs whatever it names. This one knows nothing but the names with which
    arrays are rebuilt. Strings of Python 2 are read as latin1.

    Raises:
        ValueError: the pickle names anything else (which is not run), or is damaged.
    """
    with open(path, "rb") as file:
        try:
            return _Harmless(file, encoding="latin1").load()
        except _Refused as error:
            raise ValueError(f"{path} asks to run {error}, which no pickle of arrays does: get it from its authors; "
                             "it may be malicious") from None
        except (MemoryError, OSError):
            raise
        except Exception as error:  # a damaged pickle may fail in any way
            raise ValueError(f"{path} is truncated or corrupt ({error}): get it again") from None


def read_embeddings(path: str | Path) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """DeepMind's published embeddings of one split, a pickle of {"embeddings": [n, 640], "keys": [n]}.

    A key is ``index-class-image``, for example ``12-n01532829-n01532829_7.JPEG``. The vectors are as they are in the
    file; LEO scales each to length 1 (reference code, not in the paper).

    Returns:
        vectors float32 ``[n, 640]``, labels int64 ``[n]``, the names of the classes (sorted; a label is an index into
        them), the names of the images.

    Raises:
        ValueError: a pickle that is damaged, holds something else, or names code to be run.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or not {"embeddings", "keys"} <= content.keys():
        raise ValueError(f"{path} is not a dict of 'embeddings' and 'keys': use one of the files *_embeddings.pkl")
    vectors = torch.from_numpy(np.array(content["embeddings"], np.float32))
    keys = [key.decode("latin1") if isinstance(key, bytes) else str(key) for key in content["keys"]]
    if vectors.ndim != 2 or len(vectors) != len(keys):
        raise ValueError(f"{path} has embeddings of shape {tuple(vectors.shape)} and {len(keys)} keys; "
                         f"they should be [{len(keys)}, 640]")  # fmt: skip
    parts = [key.rstrip("\0").split("-", 2) for key in keys]
    bad = next((key for key, part in zip(keys, parts) if len(part) != 3), None)
    if bad is not None:
        raise ValueError(f"{path} has the key {bad!r}; expected index-class-image")
    classes = sorted({part[1] for part in parts})
    number = {name: i for i, name in enumerate(classes)}
    return vectors, torch.tensor([number[part[1]] for part in parts]), classes, [part[2] for part in parts]


class _Refused(Exception):
    """The name of what a pickle wants to have run."""


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes in Python 3: `_codecs.encode`, with this one encoding."""
    if encoding != "latin1":
        raise _Refused(f"the codec {encoding!r}")
    return text.encode("latin1")


# What NumPy calls its `core` depends on its version, so its three functions are asked for, not imported.
_MAKERS = {
    "multiarray": (np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]),  # _reconstruct, scalar
    "numeric": (np.zeros(0).__reduce_ex__(5)[0],),  # _frombuffer
}
_KNOWN = {
    **{(f"numpy.{core}.{module}", made.__name__): made
       for core in ("core", "_core") for module, makers in _MAKERS.items() for made in makers},
    ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _latin1,
}  # fmt: skip


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _KNOWN:
            raise _Refused(f"{module}.{name}")
        return _KNOWN[module, name]
