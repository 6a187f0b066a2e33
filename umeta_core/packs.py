"""Image files and JPEG packs, decoded once into a memory-mapped file.

A *JPEG pack* is an .npz with `jpeg_header` (the bytes that every image of the file starts with), `jpeg_data` (the rest
of every image, end to end) and `offsets` [n + 1]: image i is `jpeg_header + jpeg_data[offsets[i]:offsets[i + 1]]`.
"""

import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .storage import cached_array, progress, read_archive, write_archive


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

    for _ in progress(_threaded(one, range(len(array))), len(array), f"decoding {what}"):
        pass


def _threaded(function, items, at_once=500):
    """`function` of every item, in order, on several threads; few are under way, as what waits takes memory."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(items), at_once):
            yield from pool.map(function, items[first : first + at_once])


def decode_files(files, size, label, crop=None):
    """All images of a list of files: memory-mapped uint8 [n, 3, size, size], decoded the first time only."""
    return cached_array(label, files, (len(files), 3, size, size),
                        lambda array: decode(lambda i: files[i], array, label, crop))


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

    decoded = _threaded(lambda file: read_image(file, size, file), files[done:])
    with open(part, "ab") as file:
        if not done:
            file.truncate(0)
            file.write(start.getvalue())
        file.truncate(start.tell() + done * each)
        for image in progress(decoded, len(files) - done, f"packing {path.stem}"):
            file.write(np.ascontiguousarray(image))
    os.replace(part, path)


def resize(images, size, chunk=2000):
    """uint8 images [n, channels, h, w] (tensor) to uint8 [n, channels, size, size]: antialiased bilinear, rounded."""
    if images.shape[-2:] == (size, size):
        return images
    return torch.cat([
        torch.nn.functional.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        .round_().clamp_(0, 255).to(torch.uint8)
        for part in images.split(chunk)
    ])
