"""Files: the cache folder, writes that are whole or not at all, locks, archives, tensors, memory-mapped arrays."""

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch


def cache_folder():
    """Folder for downloaded and decoded data: $UMETA_CACHE, else the platform's cache folder for umeta."""
    chosen = os.environ.get("UMETA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    try:
        import platformdirs
    except ImportError:
        return Path.home() / ".cache" / "umeta"
    return Path(platformdirs.user_cache_dir("umeta"))


def _make_folder(folder):
    """Make a folder, unless it is there; OSError says which and what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = " with UMETA_CACHE" if cache_folder() in (folder, *folder.parents) else ""
        raise OSError(f"cannot write to {folder} ({error.strerror}): choose another folder{hint}") from None


def _remove_stale(path):
    """Remove what a process that was killed a day ago or longer had written of `path`."""
    for partial in path.parent.glob(f".{'[0-9a-f]' * 8}-{glob.escape(path.name)}"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > 86_400:
                partial.unlink()


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path` that takes its name at the end; after an error nothing is left behind."""
    path = Path(path)
    _make_folder(path.parent)
    _remove_stale(path)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder):
    """Yield a temporary folder whose entries replace those of `folder` at the end; after an error it is removed."""
    folder = Path(folder)
    temporary = folder.with_name(f".{uuid.uuid4().hex[:8]}-{folder.name}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        folder.mkdir(exist_ok=True)
        for entry in temporary.iterdir():
            if (folder / entry.name).is_dir():
                shutil.rmtree(folder / entry.name)
            os.replace(entry, folder / entry.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone(path):
    """Keep other processes that make the same file waiting; they then find it. Not where there are no file locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = Path(path)
    try:
        _make_folder(path.parent)
        lock = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115
    except OSError:
        if not path.exists():
            raise
        yield  # a finished file in a folder that cannot be written to
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes {path}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        yield


def write_json(value, path):
    """`value` as a JSON file, whole or not at all. ValueError: a number in it is not finite."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def write_archive(path, **arrays):
    """Write the compressed .npz file `path` atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_archive(path, *keys):
    """The arrays `keys` of the .npz file `path`, as a list. ValueError names a file cut short or without a key."""
    try:
        with np.load(path) as archive:
            return [archive[key] for key in keys]
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a flipped byte may end in any of a dozen kinds of error
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and get it again") from error


def save_tensors(state, path):
    """``torch.save``, whole or not at all. OSError: there is no room."""
    with atomic(path) as partial, open(partial, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # its own text says nothing of a full disk
            raise OSError(f"cannot write {path}: {error.__context__ or error}") from None


def load_tensors(path, what):
    """The dict in a file of `torch.save`, on the CPU. ValueError names a damaged file, which should be a `what`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception:  # as in `read_archive`
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a readable {what}; delete it to start afresh")
    return state


def sha256(path):
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached_array(label, sources, shape, fill):
    """Memory-mapped uint8 array of `shape`, filled once by `fill(array)` and kept in the cache folder.

    The file's name carries the names (with their folders'), sizes and modification times of the files `sources`, so a
    changed source is decoded anew. The map is copy-on-write, or read-only if it is larger than memory: the file never
    changes, and only the pages that are read occupy memory.
    """
    stamp = hashlib.sha256(repr(tuple(shape)).encode())
    for source in sources:
        status = os.stat(source)
        stamp.update(f"{Path(source).parent.name}/{Path(source).name}/{status.st_size}/{status.st_mtime_ns};".encode())
    path = cache_folder() / "arrays" / f"{label}-{stamp.hexdigest()[:16]}.npy"
    if not path.exists():
        with alone(path):  # of several runs one decodes
            if not path.exists():
                _fill_array(path, label, shape, fill)
    try:
        return _mapped(path, "c")
    except OSError:  # Linux refuses a copy-on-write map that is larger than memory
        return _mapped(path, "r")


def _fill_array(path, label, shape, fill):
    with atomic(path) as temporary:
        # A memory map on a full disk ends in a bus error, not an exception: look first.
        needed, free = int(np.prod(shape)), shutil.disk_usage(temporary.parent).free
        if free < needed:
            raise OSError(f"{path.parent} has {free >> 20} MB free, {label} needs {needed >> 20} MB: "
                          "choose another folder with UMETA_CACHE")
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=tuple(shape))
        fill(array)
        array.flush()
        del array


def map_array(path):
    """The uint8 array of an .npy file as a tensor on the file itself: what is indexed is read, the rest is not.

    The map is read-only, and writing to the tensor ends the process. (A copy-on-write map, as of `torch.from_file` or
    `cached_array`, is refused by Linux for files larger than memory.)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(_mapped(path, "r"))


def _mapped(path, mode):
    """The array of an .npy file, as a memory map. ValueError names a damaged file."""
    try:
        return np.load(path, mmap_mode=mode)
    except OSError:
        raise
    except Exception as error:  # as in `read_archive`: a flipped bit of the header may even be a TokenError
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and get it again") from None


def progress(iterable, total, what):
    """`iterable` with a progress bar, or as it is where tqdm is not installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, desc=what, unit=" images", unit_scale=True, mininterval=1.0, leave=False)
