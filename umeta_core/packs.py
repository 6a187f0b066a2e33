"""Image files on disk: the cache folder, atomic writes, archives, and JPEGs decoded once into a memory-mapped file.

A *JPEG pack* is an .npz with `jpeg_header` (the bytes that every image of the file starts with), `jpeg_data` (the rest
of every image, end to end) and `offsets` [n + 1]: image i is `jpeg_header + jpeg_data[offsets[i]:offsets[i + 1]]`.
"""

import glob
import hashlib
import io
import json
import os
import shutil
import sys
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
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


def write_json(value, path):
    """`value` as a JSON file, whole or not at all. ValueError: a number in it is not finite."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


@contextmanager
def alone(path):
    """Keep other processes that make the same file waiting; they then find it. Not on systems without ``fcntl``."""
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
        yield


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


def write_archive(path, **arrays):
    """Write the compressed .npz file `path` atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


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


def _mapped(path, mode):
    """The array of an .npy file, as a memory map. ValueError names a damaged file."""
    try:
        return np.load(path, mmap_mode=mode)
    except OSError:
        raise
    except Exception as error:  # as in `read_archive`: a flipped bit of the header may even be a TokenError
        raise ValueError(f"{path} is truncated or corrupt ({error}): delete it and get it again") from None


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


def progress(iterable, total, what):
    """`iterable` with a progress bar, or as it is where tqdm is not installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, desc=what, unit=" images", unit_scale=True, mininterval=1.0, leave=False)


def image_files(folder, pattern):
    """The image files in `folder` that match a pattern, sorted; not ``._NAME``, which macOS puts beside a file."""
    kinds = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
    return [file for file in sorted(Path(folder).glob(pattern))
            if file.suffix.lower() in kinds and not file.name.startswith(".")]


def open_image(source, name, mode):
    """Decode an image (a path or a binary file, called `name` in an error) to Pillow's `mode`. ValueError: damaged."""
    from PIL import Image

    try:
        with Image.open(source) as image:
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # a broken PNG: SyntaxError
        raise ValueError(f"{name} is truncated or corrupt ({error}): get it again") from None


def read_image(source, size, name, crop=None):
    """Decode an image (a path or a binary file, called `name` in an error): uint8 [3, size, size].

    An image of another size is cut to its central `crop` x `crop` pixels (where given) and resized (Lanczos, as the
    mini-ImageNet script of Finn et al. 2017 does).
    """
    from PIL import Image

    image = open_image(source, name, "RGB")
    if crop and image.size != (size, size):
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    if image.size != (size, size):
        image = image.resize((size, size), Image.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


def decode(image_file, array, what, crop=None):
    """Decode image i, `image_file(i)` (a path or a binary file), into array[i], uint8 [3, size, size], for all i.

    Threads share the work: Pillow releases the interpreter lock.
    """

    def one(i):
        source = image_file(i)
        name = source if isinstance(source, (str, Path)) else f"image {i} of {what}"
        array[i] = read_image(source, array.shape[-1], name, crop)

    def some_at_a_time():  # waiting tasks take memory, too
        for first in range(0, len(array), 1000):
            yield from pool.map(one, range(first, min(first + 1000, len(array))))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in progress(some_at_a_time(), len(array), f"decoding {what}"):
            pass


def decode_pack(path, size):
    """All images of a JPEG pack: memory-mapped uint8 [n, 3, size, size], decoded the first time only."""
    path = Path(path)
    (offsets,) = read_archive(path, "offsets")

    def fill(array):
        header, data = read_archive(path, "jpeg_header", "jpeg_data")
        if offsets[-1] != len(data):
            raise ValueError(f"{path} is truncated or corrupt (its offsets do not fit its data): get it again")
        header, data = header.tobytes(), data.tobytes()
        decode(lambda i: io.BytesIO(header + data[offsets[i] : offsets[i + 1]]), array, path.stem)

    return cached_array(path.stem, [path], (len(offsets) - 1, 3, size, size), fill)


def decode_files(files, size, label, crop=None):
    """All images of a list of files: memory-mapped uint8 [n, 3, size, size], decoded the first time only."""
    return cached_array(label, files, (len(files), 3, size, size),
                        lambda array: decode(lambda i: files[i], array, label, crop))


def append_images(path, files, size, stamp):
    """Decode image files into the .npy file `path`, uint8 [n, 3, size, size], which may be far larger than memory.

    The images are appended to a file named after `stamp` beside it, which is renamed at the end. After an interruption
    the same call goes on where it stopped. Hold `alone(path)`. OSError: the disk is too small.
    """
    start, each = io.BytesIO(), 3 * size * size
    shape = (len(files), 3, size, size)
    np.lib.format.write_array_header_1_0(start, {"descr": "|u1", "fortran_order": False, "shape": shape})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}-{stamp}.part")
    there = part.stat().st_size if part.exists() else 0
    done = max(0, there - start.tell()) // each
    needed, free = (len(files) - done) * each, shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(f"{path.parent} has {free / 1e9:.1f} GB free, {path.name} needs {needed / 1e9:.1f} GB: "
                      "choose another folder with --out")

    def decoded():
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for first in range(done, len(files), 500):  # some at a time: decoding may be faster than the disk
                yield from pool.map(lambda file: read_image(file, size, file), files[first : first + 500])

    with open(part, "ab") as file:
        if not done:
            file.truncate(0)
            file.write(start.getvalue())
        file.truncate(start.tell() + done * each)
        for image in progress(decoded(), len(files) - done, f"packing {path.stem}"):
            file.write(np.ascontiguousarray(image))
    os.replace(part, path)


def map_array(path):
    """The uint8 array of an .npy file as a tensor on the file itself: what is indexed is read, the rest is not.

    The map is read-only, and writing to the tensor ends the process. (A copy-on-write map, as of `torch.from_file` or
    `cached_array`, is refused by Linux for files larger than memory.)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(_mapped(path, "r"))


def encode_pack(path, images, **arrays):
    """Write uint8 images [n, 3, height, width] as a JPEG pack (lossy: quality 75) with further `arrays` beside them."""
    from PIL import Image

    header, rest, offsets = None, [], [0]
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1))).save(buffer, "JPEG", quality=75)
        data = buffer.getvalue()
        scan = data.index(b"\xff\xda")  # start of scan: from here on the bytes are the image's own
        scan += 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
        header = header or data[:scan]
        if data[:scan] != header:
            raise ValueError("the images do not share one JPEG header: are they all of one size?")
        rest.append(data[scan:])
        offsets.append(offsets[-1] + len(data) - scan)
    write_archive(path, jpeg_header=np.frombuffer(header, np.uint8), jpeg_data=np.frombuffer(b"".join(rest), np.uint8),
                  offsets=np.array(offsets, np.int64), **arrays)


def resize(images, size, chunk=2000):
    """uint8 images [n, channels, h, w] (tensor) to uint8 [n, channels, size, size]: antialiased bilinear, rounded."""
    if images.shape[-2:] == (size, size):
        return images
    return torch.cat([
        torch.nn.functional.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        .round_().clamp_(0, 255).to(torch.uint8)
        for part in images.split(chunk)
    ])
