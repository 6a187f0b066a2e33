"""Pickles that others have published, read without running their code."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_pickle(path: str | Path):
    """The content of a pickle of numbers, strings, lists, tuples, dicts and NumPy arrays.

    A pickle is a program: the usual reader runs whatever it names. This one knows nothing but the names with which
    arrays are rebuilt, and rebuilds them itself: NumPy's own functions believe what a pickle says of memory. Strings of
    Python 2 are read as latin1.

    Raises:
        ValueError: the pickle names anything else (which is not run), or is damaged.
    """
    with open(path, "rb") as file:
        try:
            return _with_arrays(_Harmless(file, encoding="latin1").load(), {})
        except _Refused as error:
            raise ValueError(f"{path} asks for {error}, which no pickle of numbers and strings does: get it from its "
                             "authors; it may be malicious") from None
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
    try:
        vectors = torch.from_numpy(np.array(content["embeddings"], np.float32))
    except (ValueError, TypeError):
        raise ValueError(f"{path} has embeddings that are not numbers: get it again") from None
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{path} has embeddings that are not finite: get it again")
    if not isinstance(content["keys"], (list, tuple, np.ndarray)) or not len(content["keys"]):
        raise ValueError(f"{path} has no list of keys: get it again")
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
    """What a pickle asks for and does not get."""


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes in Python 3: `_codecs.encode`, with this one encoding."""
    if encoding != "latin1":
        raise _Refused(f"the codec {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocol 2 writes an empty string of bytes."""
    return b""


class _Type:
    """Stands for ``numpy.dtype``: numbers, strings, or objects, without fields."""

    def __init__(self, name, align=False, copy=True):
        if not isinstance(name, str) or not re.fullmatch(r"[biufSUO]\d*", name):
            raise _Refused(f"arrays of type {name!r}")
        self.name, self.order = name, "="

    def __setstate__(self, state):
        _, order, *fields = state
        if any(field is not None for field in fields[:3]):
            raise _Refused("arrays with fields")
        self.order = order if order in ("<", ">") else "="

    def array(self, data, shape, order="C") -> np.ndarray:
        """The array in `data`, bytes or a list of strings. _Refused: other objects."""
        if self.name[0] != "O":
            data = data.encode("latin1") if isinstance(data, str) else data
            return np.frombuffer(data, self.order + self.name).reshape(shape, order=order).copy()
        if not isinstance(data, list) or not all(isinstance(value, (str, bytes)) for value in data):
            raise _Refused("arrays of objects that are not strings")
        flat = np.empty(len(data), object)
        flat[:] = data
        return flat.reshape(shape, order=order)


class _Array:
    """Stands for an array, which its state makes: what ``_reconstruct`` returns."""

    def __init__(self, kind, shape, code):
        self.value = None

    def __setstate__(self, state):
        *_, shape, dtype, fortran, data = state
        self.value = dtype.array(data, shape, "F" if fortran else "C")


def _from_buffer(data, dtype: _Type, shape, order) -> np.ndarray:
    return dtype.array(data, shape, order)


def _scalar(dtype: _Type, data):
    return dtype.array(data, ())[()]


class _Function:
    """A function that a pickle may call and not change."""

    __slots__ = ("call",)

    def __init__(self, call):
        self.call = call

    def __call__(self, *arguments):
        return self.call(*arguments)

    def __setstate__(self, state):
        raise _Refused("a function with another state")


def _with_arrays(content, done: dict):
    """`content` with arrays in place of what stands for them. `done`: what was made of objects, by their ids.

    Without it lists that share lists would take for ever.
    """
    if id(content) in done:
        return done[id(content)]
    if isinstance(content, _Array):
        made = content.value
    elif isinstance(content, dict):
        made = {_with_arrays(key, done): _with_arrays(value, done) for key, value in content.items()}
    elif isinstance(content, (list, tuple)):
        made = type(content)(_with_arrays(value, done) for value in content)
    elif content is None or isinstance(content, (str, bytes, int, float, np.ndarray, np.generic)):
        return content
    else:
        raise _Refused(f"a {type(content).__name__.strip('_').lower()}")
    done[id(content)] = made
    return made


_KNOWN = {
    **{(f"numpy.{core}.{module}", name): made for core in ("core", "_core") for module, name, made in (
        ("multiarray", "_reconstruct", _Array), ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _from_buffer))},
    ("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): _Type, ("_codecs", "encode"): _latin1,
    ("__builtin__", "bytes"): _no_bytes, ("builtins", "bytes"): _no_bytes,
}  # fmt: skip


class _Harmless(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _KNOWN:
            raise _Refused(f"{module}.{name}")
        known = _KNOWN[module, name]
        return known if isinstance(known, str) else _Function(known)
