"""Data sets: formats, protocols, where they are looked for, and what is said when they are missing or damaged."""

import errno
import io
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from umeta_core import data, omniglot, packs, readers, storage
from umeta_core.attributes import attribute_prototypes
from umeta_core.episodes import PartitionTasks


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for every test."""
    monkeypatch.setenv("UMETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("UMETA_DATA", raising=False)


def real(name, split="train"):
    """Skip a test where the real data set is not there."""
    if split not in data.available(name):
        pytest.skip(f"needs the real {name}: set UMETA_DATA to a folder that has it")


def random_images(n, size=84, channels=3, seed=0):
    """Smooth random uint8 images [n, channels, size, size], so that JPEG changes them little."""
    coarse = torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * 255).to(torch.uint8).numpy()


def write_omniglot(folder):
    """3 + 1 characters x 3 drawings in the original layout; returns the ink {class name: [3, 105, 105]}."""
    ink, number = {}, 0
    random = np.random.default_rng(0)
    for part, alphabet, count in (("background", "Latin", 2), ("background", "Hebrew", 1), ("evaluation", "ULOG", 1)):
        for character in range(1, count + 1):
            number += 1
            strokes = np.kron(random.random((3, 15, 15)) < 0.3, np.ones((7, 7), bool))
            place = folder / f"images_{part}" / alphabet / f"character{character:02d}"
            place.mkdir(parents=True)
            for drawing, pixels in enumerate(strokes, start=1):
                Image.fromarray(~pixels).save(place / f"{number:04d}_{drawing:02d}.png")
            ink[f"{alphabet}/character{character:02d}"] = strokes
    return ink


def write_mini_imagenet(folder, layout):
    """2 classes x 3 images in every split, as CSVs with images/ or as class folders."""
    for s, split in enumerate(("train", "val", "test")):
        rows = []
        for i, image in enumerate(random_images(6, size=90, seed=s)):
            label = f"n{s}{i // 3:07d}"
            name = f"{label}{i:08d}.jpg"
            place = folder / "images" if layout == "csv" else folder / split / label
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(place / name, quality=95)
            rows.append(f"{name},{label}\n")
        if layout == "csv":
            (folder / f"{split}.csv").write_text("filename,label\n" + "".join(rows))


def write_imagenet(folder):
    """Five classes of ImageNet x 4 photographs in train/: two to train on, one for validation, two for testing."""
    for c, wnid in enumerate(("n07613480", "n01440764", "n01930112", "n01855672", "n01532829")):
        (folder / "train" / wnid).mkdir(parents=True)
        for i, image in enumerate(random_images(4, size=30 + c, seed=c)):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / "train" / wnid / f"{wnid}_{i}.JPEG", quality=95)


CELEBA_NAMES = ["Bald", "Eyeglasses", "Smiling"]


def write_celeba(folder):
    """Packs of 4 + 2 faces of 3 persons."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, people, partition in (("identity", [7, 7, 9, 9], [0, 0, 2, 2]), ("aligned", [3, 7], [0, 0])):
        n = len(people)
        packs.encode_pack(folder / f"celeba_{part}.npz", random_images(n), identity=np.array(people, np.int16),
                          attributes=np.eye(n, 3, dtype=np.uint8), attribute_names=np.array(CELEBA_NAMES),
                          partition=np.array(partition, np.uint8), file_number=np.arange(n))


# Formats


def test_omniglot_folder_and_pack_agree(tmp_path):
    ink = write_omniglot(tmp_path / "folder")
    (path,) = data.pack("omniglot", tmp_path / "folder", tmp_path / "packs")
    from_folder = data.load("omniglot", "all", path=tmp_path / "folder", size=105)
    from_pack = data.load("omniglot", "all", path=path, size=105)
    assert from_folder.class_names == from_pack.class_names == list(ink)
    assert from_folder.superclasses == ["Latin", "Latin", "Hebrew", "ULOG"]
    expected = torch.from_numpy(np.stack(list(ink.values()))).reshape(12, 1, 105, 105) * 255
    assert torch.equal(from_folder.images, expected.to(torch.uint8))
    assert torch.equal(from_pack.images, from_folder.images)
    assert from_pack.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    evaluation, split = storage.read_archive(path, "is_evaluation", "vinyals_split")
    assert evaluation.tolist() == [False, False, False, True] and split.tolist() == [0, 0, 1, 2]


def test_other_parts_of_the_omniglot_repository_are_left_out(tmp_path):
    """images_background_small1 has characters of images_background once more, and macOS makes companions of files."""
    ink = write_omniglot(tmp_path)
    shutil.copytree(tmp_path / "images_background", tmp_path / "images_background_small1")
    (tmp_path / "images_background/Latin/character01/._0001_01.png").write_bytes(b"no image")
    images = data.load("omniglot", "all", path=tmp_path)
    assert images.class_names == list(ink) and len(images) == 12


def test_thin_strokes_survive_resizing():
    lines = torch.eye(105, dtype=torch.uint8)[:, None, None].expand(-1, 1, 105, -1) * 255  # image i: column i is ink
    small = packs.resize(lines, 28)
    ink = small.float().sum((1, 2, 3))[3:-3]
    assert small.dtype == torch.uint8 and ink.min() > 0.9 * ink.max()  # without antialiasing some would vanish


def test_omniglot_is_resized_once(tmp_path, monkeypatch):
    write_omniglot(tmp_path)
    small = data.load("omniglot", "all", path=tmp_path)
    assert small.images.shape == (12, 1, 28, 28) and small.images.dtype == torch.uint8
    monkeypatch.setattr(omniglot, "read_ink", lambda file: pytest.fail("read again"))
    assert torch.equal(data.load("omniglot", "all", path=tmp_path).images, small.images)


def test_companions_that_macos_makes_of_photographs_are_no_images(tmp_path):
    write_mini_imagenet(tmp_path / "mini", "folders")
    write_imagenet(tmp_path / "imagenet")
    for folder in (tmp_path / "mini/train/n00000000", tmp_path / "imagenet/train/n01440764"):
        (folder / "._1.jpg").write_bytes(b"no image")
    assert len(data.load("mini_imagenet", path=tmp_path / "mini")) == 6
    assert len(data.from_folder(tmp_path / "mini" / "train")) == 6
    assert len(readers.imagenet_files(tmp_path / "imagenet")[0]) == 20


@pytest.mark.parametrize("layout", ["csv", "folders"])
def test_mini_imagenet_layouts_and_pack(tmp_path, layout):
    write_mini_imagenet(tmp_path / "folder", layout)
    written = data.pack("mini_imagenet", tmp_path / "folder", tmp_path / "packs")
    assert [path.name for path in written] == [f"mini_imagenet_{split}.npz" for split in ("train", "val", "test")]
    for split in ("train", "val", "test"):
        images = data.load("mini_imagenet", split, path=tmp_path / "folder")
        packed = data.load("mini_imagenet", split, path=tmp_path / "packs")
        assert images.images.shape == (6, 3, 84, 84) and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert packed.class_names == images.class_names and torch.equal(packed.labels, images.labels)
        assert (packed.images.float() - images.images.float()).abs().mean() < 4  # JPEG
    everything = data.load("mini_imagenet", "all", path=tmp_path / "packs")
    assert len(everything) == 18 and everything.n_classes == 6
    assert torch.bincount(everything.labels).tolist() == [3] * 6


def write_tiered_imagenet(folder):
    """What `write_mini_imagenet` writes, in the authors' pickles; returns {split: images [6, 3, 84, 84]}."""
    written = {}
    for s, split in enumerate(("train", "val", "test")):
        images, pngs = random_images(6, seed=s), []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
            pngs.append(np.frombuffer(buffer.getvalue(), np.uint8)[:, None])  # as cv2.imencode returns it
        labels = {"label_specific": np.array([0, 0, 0, 1, 1, 1], np.int32), "label_specific_str": ["crane", "crate"],
                  "label_general": np.zeros(6, np.int32), "label_general_str": ["things"]}
        (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps(pngs, 2))
        (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(labels, 2))
        written[split] = images
    return written


def test_tiered_imagenet_layouts(tmp_path):
    (tmp_path / "pickles").mkdir()
    written = write_tiered_imagenet(tmp_path / "pickles")
    for split in ("train", "val", "test"):
        images = data.load("tiered_imagenet", split, path=tmp_path / "pickles")
        assert np.array_equal(images.images, written[split]) and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert images.class_names == ["crane", "crate"] and images.labels.dtype == torch.int64
    write_mini_imagenet(tmp_path / "folders", "folders")
    for s, split in enumerate(("train", "val", "test")):
        images = data.load("tiered_imagenet", split, path=tmp_path / "folders")
        assert images.images.shape == (6, 3, 84, 84) and images.class_names == [f"n{s}{c:07d}" for c in range(2)]
    everything = data.load("tiered_imagenet", "all", path=tmp_path / "folders")
    assert everything.n_classes == 6 and torch.bincount(everything.labels).tolist() == [3] * 6
    assert [line["ok"] for line in data.check("tiered_imagenet", tmp_path / "folders")] == [False] * 3
    assert sum(n for _, n in data.COUNTS["tiered_imagenet"].values()) == 779165


def test_damaged_tiered_imagenet(tmp_path):
    write_tiered_imagenet(tmp_path)
    labels = tmp_path / "val_labels.pkl"
    short = pickle.loads(labels.read_bytes()) | {"label_specific": np.zeros(5, np.int32)}
    labels.write_bytes(pickle.dumps(short, 2))
    with pytest.raises(ValueError, match="6 entries and val_labels.pkl 5 labels"):
        data.load("tiered_imagenet", "val", path=tmp_path)
    for wrong in ({"label_specific": [0]}, ["label_specific"], short | {"label_specific": np.full(6, 2)}):
        labels.write_bytes(pickle.dumps(wrong, 2))
        with pytest.raises(ValueError, match="val_labels.pkl has no label_specific and label_specific_str that fit"):
            data.load("tiered_imagenet", "val", path=tmp_path)
    images = tmp_path / "test_images_png.pkl"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(ValueError, match="test_images_png.pkl is truncated or corrupt"):
        data.load("tiered_imagenet", "test", path=tmp_path)


def test_imagenet_is_split_by_class_and_read_from_its_file(tmp_path):
    write_imagenet(tmp_path)
    paths = data.pack("imagenet", tmp_path, tmp_path / "packs")
    assert paths == [tmp_path / "packs/imagenet.npy", tmp_path / "packs/imagenet.npz"]
    sets = {split: data.load("imagenet", split, path=paths[0]) for split in ("train", "val", "test", "all")}
    assert [s.class_names for s in sets.values()][:3] == [
        ["n01440764", "n01532829"], ["n01855672"], ["n01930112", "n07613480"]]
    assert sets["train"].superclasses == ["no mini", "mini_imagenet train"]
    assert sets["all"].class_names == sum([sets[split].class_names for split in ("train", "val", "test")], [])
    for s in sets.values():
        assert s.mapped and s.images.dtype == torch.uint8 and s.images.shape == (4 * s.n_classes, 3, 224, 224)
        assert s.labels.tolist() == [c for c in range(s.n_classes) for _ in range(4)]
    with Image.open(tmp_path / "train/n07613480/n07613480_2.JPEG") as image:
        expected = np.asarray(image.resize((224, 224), Image.LANCZOS)).transpose(2, 0, 1)
    assert np.array_equal(sets["test"].images[4 + 2], expected)
    # Tasks draw on the file; on another device only labels and tasks would be there.
    tasks = PartitionTasks(sets["test"]).sample(2, 2, 1, 3, torch.Generator().manual_seed(0))
    seen = torch.cat([tasks.support, tasks.query], 2).mul(255).round().to(torch.uint8)
    wanted = sets["test"].images.unflatten(0, (2, 4))
    for task in seen:
        first = 0 if (task[0, 0] == wanted[0]).flatten(1).all(1).any() else 1
        for shown, members in zip(task, wanted[[first, 1 - first]], strict=True):
            assert all((image == members).flatten(1).all(1).any() for image in shown)
    moved = sets["train"].to("meta")
    assert moved.images.device.type == "cpu" and moved.labels.device.type == "meta"


def test_imagenet_is_mapped_however_large(tmp_path):
    """As many images as ImageNet has, in a file without content: 193 GB that no memory holds."""
    path, shape = tmp_path / "imagenet.npy", (1281167, 3, 224, 224)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        try:
            file.truncate(file.tell() + int(np.prod(shape)))
        except OSError:
            pytest.skip("needs a file system that keeps files with holes of 193 GB")
    np.savez(tmp_path / "imagenet.npz", labels=np.zeros(shape[0], np.int16), class_names=np.array(["n01440764"]))
    train = data.load("imagenet", "train", path=tmp_path)
    assert train.images.shape == shape
    tasks = PartitionTasks(train).sample(3, 1, 1, 5, torch.Generator().manual_seed(0))
    assert tasks.query.shape == (3, 1, 5, 3, 224, 224) and not tasks.query.any()
    path.unlink()


def test_packing_imagenet_goes_on_after_an_interruption(tmp_path, monkeypatch):
    write_imagenet(tmp_path)
    whole = data.load("imagenet", "all", path=data.pack("imagenet", tmp_path, tmp_path / "whole")[0])
    out, read, decoded = tmp_path / "packs", packs.read_image, []

    def until(limit):
        def one(source, *arguments):
            if len(decoded) >= limit:
                raise KeyboardInterrupt
            decoded.append(source)
            return read(source, *arguments)
        return one

    monkeypatch.setattr(storage.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(packs, "read_image", until(7))
    with pytest.raises(KeyboardInterrupt):
        data.pack("imagenet", tmp_path, out)
    (part,) = out.glob("*.part")
    assert data.locate("imagenet", path=out) is None and not (out / "imagenet.npy").exists()  # nothing looks complete
    written = part.stat().st_size // (3 * 224 * 224)
    with open(part, "ab") as file:
        file.write(b"torn")
    monkeypatch.setattr(packs, "read_image", until(100))
    paths = data.pack("imagenet", tmp_path, out)
    assert 0 < written <= 7 and len(decoded) == 7 + 20 - written and sorted(out.glob("[!.]*")) == paths
    resumed = data.load("imagenet", "all", path=out)
    assert torch.equal(resumed.images, whole.images) and torch.equal(resumed.labels, whole.labels)
    decoded.clear()
    assert data.pack("imagenet", tmp_path, out) == paths and not decoded  # packed already


@pytest.mark.parametrize("code, passes", [(errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_without_locks_is_let_through(tmp_path, monkeypatch, code, passes):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(code, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    with nullcontext() if passes else pytest.raises(OSError, match="no"), storage.alone(tmp_path / "file"):
        pass


def test_of_several_runs_one_packs_imagenet(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    write_imagenet(tmp_path)
    whole = data.pack("imagenet", tmp_path, tmp_path / "whole")[0]
    read, decoded = packs.read_image, []
    monkeypatch.setattr(packs, "read_image", lambda source, *rest: decoded.append(source) or read(source, *rest))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(data.pack, "imagenet", tmp_path, tmp_path / "packs") for _ in range(2)]
    (first, _), (second, _) = (run.result() for run in runs)
    assert first == second and first.read_bytes() == whole.read_bytes() and len(decoded) == 20


def test_imagenet_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no images in .*n01440764.*unpack ILSVRC2012_img_train.tar"):
        data.pack("imagenet", tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="(?s)imagenet.npz.*image-net.org.*umeta data pack imagenet FOLDER"):
        data.load("imagenet", path=tmp_path)
    write_imagenet(tmp_path / "folder")
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
        with pytest.raises(OSError, match="0.0 GB free, imagenet.npy needs 0.0 GB: .*--out"):
            data.pack("imagenet", tmp_path / "folder", tmp_path)
    array, archive = data.pack("imagenet", tmp_path / "folder" / "train", tmp_path)  # the folder train/ itself will do
    with pytest.raises(ValueError, match="224x224 images and not resized to 84"):
        data.load("imagenet", path=tmp_path, size=84)
    (line,) = data.check("imagenet", tmp_path)
    assert line["ok"] is False and "5 classes, 20 images (4 to 4 a class), 224x224, uint8" in line["detail"]
    assert data.info("imagenet")["size"] == 224
    labels, names, stamp = storage.read_archive(archive, "labels", "class_names", "stamp")
    storage.write_archive(archive, labels=labels[:-1], class_names=names, stamp=stamp)
    with pytest.raises(ValueError, match="20 images in imagenet.npy and 19 labels"):
        data.load("imagenet", path=tmp_path)
    array.write_bytes(array.read_bytes()[:-100])
    with pytest.raises(ValueError, match="imagenet.npy is truncated or corrupt"):
        data.load("imagenet", path=tmp_path)
    only_train = tmp_path / "few"
    (only_train / "n01440764").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(only_train / "n01440764" / "a.JPEG")
    data.pack("imagenet", only_train, only_train)
    with pytest.raises(ValueError, match="imagenet 'val' is empty"):
        data.load("imagenet", "val", path=only_train)


def test_imagenet_leaves_out_the_classes_of_mini_imagenet():
    assert {split: len(ids) for split, ids in readers.MINI_IMAGENET.items()} == {"train": 64, "val": 16, "test": 20}
    assert len({wnid for ids in readers.MINI_IMAGENET.values() for wnid in ids}) == 100
    for split, ids in readers.MINI_IMAGENET.items():
        found = data.locate("mini_imagenet", split)
        if not found or found[1] != "pack":
            pytest.skip("needs the packs of mini-ImageNet: set UMETA_DATA to a folder that has them")
        wnids = storage.read_archive(found[0] / f"mini_imagenet_{split}.npz", "wnids")[0]
        assert sorted(map(str, wnids)) == sorted(ids)


def test_images_are_decoded_once_and_memory_mapped(tmp_path, cache, monkeypatch):
    write_mini_imagenet(tmp_path / "folder", "csv")
    train, *_ = data.pack("mini_imagenet", tmp_path / "folder", tmp_path / "packs")
    decoded = packs.decode_pack(train, 84)
    assert isinstance(decoded, np.memmap) and len(list(cache.rglob("*.npy"))) == 4  # three splits of the folder, this
    with monkeypatch.context() as patch:
        patch.setattr(packs, "decode", lambda *args: pytest.fail("decoded again"))
        assert np.array_equal(packs.decode_pack(train, 84), decoded)
    decoded[:] = 0  # copy on write: the cached file is as it was
    assert packs.decode_pack(train, 84).any()
    packs.encode_pack(train, random_images(5, seed=9), labels=np.zeros(5, np.int16), class_names=np.array(["a"]))
    assert len(packs.decode_pack(train, 84)) == 5  # another file: decoded anew


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-100], lambda b: b.replace(b"(5, 3", b"(5< 3")])
def test_a_damaged_cached_array_is_named(tmp_path, cache, damage):
    packs.encode_pack(tmp_path / "a.npz", random_images(5))
    packs.decode_pack(tmp_path / "a.npz", 84)
    (array,) = cache.rglob("*.npy")
    array.write_bytes(damage(array.read_bytes()))
    with pytest.raises(ValueError, match=f"{array.name} is truncated or corrupt .*delete it"):
        packs.decode_pack(tmp_path / "a.npz", 84)


def test_mnist_from_torchvision_files(tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, n in (("train", 5020), ("t10k", 10)):
        images, labels = random.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        header = np.array([2051, n, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, n], ">i4").tobytes() + labels.tobytes())
        if part == "train":
            train = torch.from_numpy(images)[:, None]
    found = {split: data.load("mnist", split, path=tmp_path) for split in ("train", "val", "test", "all")}
    assert [len(images) for images in found.values()] == [20, 5000, 10, 5030]
    assert torch.equal(found["train"].images, train[:20]) and torch.equal(found["val"].images, train[20:])
    assert found["test"].labels.tolist() == list(range(10))


def test_cifar10_validation_has_every_class_of_a_sorted_copy(tmp_path):
    names = np.array([f"class{i}" for i in range(10)])
    for part, n in (("train", 20), ("test", 1)):
        packs.encode_pack(tmp_path / f"cifar10_{part}.npz", random_images(10 * n, size=32), class_names=names,
                          labels=np.repeat(np.arange(10), n).astype(np.int16))
    for split, n in (("train", 18), ("val", 2), ("test", 1), ("all", 21)):
        images = data.load("cifar10", split, path=tmp_path)
        assert torch.bincount(images.labels).tolist() == [n] * 10 and images.images.shape[1:] == (3, 32, 32)


def test_celeba_packs(tmp_path):
    write_celeba(tmp_path)
    train = data.load("celeba", "train", path=tmp_path)
    assert train.class_names == ["3", "7"] and train.labels.tolist() == [1, 1, 0, 1]
    assert train.attribute_names == CELEBA_NAMES
    assert train.attributes.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]]
    assert len(data.load("celeba", "train", path=tmp_path, part="identity")) == 2
    assert data.load("celeba", "test", path=tmp_path).class_names == ["9"]
    with pytest.raises(ValueError, match="'val' is empty"):
        data.load("celeba", "val", path=tmp_path)
    with pytest.raises(ValueError, match="unknown part"):
        data.load("celeba", "val", path=tmp_path, part="faces")


def test_celeba_official_files(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    faces = random_images(3, size=218)[..., 20:198]  # 178 wide, 218 high
    for i, face in enumerate(faces, start=1):
        Image.fromarray(face.transpose(1, 2, 0)).save(tmp_path / "img_align_celeba" / f"00000{i}.jpg", quality=95)
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n")
    (tmp_path / "identity_CelebA.txt").write_text("000001.jpg 5\n000002.jpg 2\n000003.jpg 5\n")
    (tmp_path / "list_attr_celeba.txt").write_text(
        "3\n" + " ".join(CELEBA_NAMES) + "\n" + "".join(f"00000{i}.jpg  1 -1 -1\n" for i in (1, 2, 3)))
    train = data.load("celeba", "train", path=tmp_path)
    assert train.class_names == ["2", "5"] and train.labels.tolist() == [1, 0]
    assert train.attributes.tolist() == [[1, 0, 0]] * 2 and train.attribute_names == CELEBA_NAMES
    square = Image.fromarray(faces[0, :, 20:198].transpose(1, 2, 0)).resize((84, 84), Image.LANCZOS)
    difference = train.images[0].float() - torch.from_numpy(np.array(square)).permute(2, 0, 1)
    assert difference.abs().mean() < 3
    assert len(data.load("celeba", "val", path=tmp_path)) == 1


def test_digits_splits_are_disjoint_and_stratified():
    pytest.importorskip("sklearn")
    sets = [data.load("digits", split) for split in ("train", "val", "test")]
    assert sum(map(len, sets)) == len(data.load("digits", "all")) == 1797
    for images in sets:
        counts = torch.bincount(images.labels)
        assert images.images.shape[1:] == (1, 8, 8) and counts.max() - counts.min() <= 6
    assert sets[0].images.max() == 255
    assert data.load("digits", "val", size=28).images.shape[1:] == (1, 28, 28)


def test_glyphs_splits_are_by_script(monkeypatch):
    drawn = {"images28": np.arange(3 * 2 * 784, dtype=np.int64).astype(np.uint8).reshape(3, 2, 28, 28),
             "images105": np.packbits(np.ones((3, 2, 105, 105), np.uint8), axis=-1),
             "class_names": np.array(["a", "b", "c"]), "scripts": np.array(["S", "T", "S"]),
             "split": np.array([0, 2, 0], np.int8)}
    from umeta_core import glyphs

    monkeypatch.setattr(glyphs, "glyphs", lambda folder: drawn, raising=False)
    train = data.load("glyphs", "train")
    assert train.class_names == ["a", "c"] and train.superclasses == ["S", "S"]
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(train.images[2, 0], torch.from_numpy(drawn["images28"][2, 0]))
    large = data.load("glyphs", "test", size=105)
    assert large.images.shape == (2, 1, 105, 105) and (large.images == 255).all()


def test_image_set_moves_to_a_device(tmp_path):
    write_celeba(tmp_path)
    images = data.load("celeba", "train", path=tmp_path, device="cpu").to("meta")
    assert {images.images.device.type, images.labels.device.type, images.attributes.device.type} == {"meta"}
    assert len(images) == 4 and images.n_classes == 2


def test_only_bytes_are_shown_as_floats():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert data.as_floats(images).tolist() == pytest.approx([0, 0.2, 1]) and images.tolist() == [0, 51, 255]
    faces = labeled_faces()
    assert faces.shown(torch.tensor([[0, 3]])).shape == (1, 2, 3, 1, 1)
    faces.images = torch.rand(200, 3, 1, 1)
    with pytest.raises(ValueError, match="images are uint8, 0 to 255, not torch.float32"):
        faces.shown(torch.tensor([0]))


# Omniglot protocols


def character_names():
    return [f"alphabet{i % 50}" for i in range(1623)], [f"character{i}" for i in range(1623)]


@pytest.mark.parametrize("protocol", ["cactus", "lasium", "meta_gmvae"])
def test_protocols_split_by_hash(protocol):
    alphabets, names = character_names()
    split = omniglot.character_split(alphabets, names, protocol)
    assert tuple(np.bincount(split)) == omniglot.PROTOCOLS[protocol][0]
    # The split of a character does not depend on the order of the listing.
    backwards = omniglot.character_split(alphabets[::-1], names[::-1], protocol)
    assert np.array_equal(backwards[::-1], split)


def test_protocols_are_fixed_and_nested():
    alphabets, names = character_names()
    cactus, lasium = (omniglot.character_split(alphabets, names, protocol) for protocol in ("cactus", "lasium"))
    assert (cactus[lasium == 2] == 2).all() and (lasium[cactus == 0] == 0).all()
    # The same on every machine, whatever the versions of NumPy and PyTorch.
    assert np.flatnonzero(cactus == 1)[:5].tolist() == [19, 45, 51, 57, 78]


def test_rotations_are_classes(tmp_path, monkeypatch):
    write_omniglot(tmp_path)
    monkeypatch.setattr(omniglot, "PROTOCOLS", {"cactus": ((2, 1, 1), False), "meta_gmvae": ((2, 1, 1), True)})
    plain = data.load("omniglot", "train", path=tmp_path)
    rotated = data.load("omniglot", "train", path=tmp_path, protocol="meta_gmvae")
    assert plain.n_classes == 2 and rotated.n_classes == 8 and len(rotated) == 24
    assert rotated.class_names[:4] == [f"{plain.class_names[0]}/rotated{angle}" for angle in (0, 90, 180, 270)]
    assert len(rotated.superclasses) == 8 and torch.bincount(rotated.labels).tolist() == [3] * 8
    for turn in range(4):
        of_turn = rotated.images[rotated.labels % 4 == turn]
        assert torch.equal(of_turn, plain.images.rot90(turn, (-2, -1)))


def test_real_omniglot_protocols():
    real("omniglot")
    counts = {"cactus": (1100, 100, 423), "lasium": (1200, 100, 323), "meta_gmvae": (4800, 400, 1292),
              "vinyals": (4112, 688, 1692)}
    for protocol, expected in counts.items():
        names = []
        for split, n in zip(("train", "val", "test"), expected, strict=True):
            images = data.load("omniglot", split, protocol=protocol)
            assert images.n_classes == len(images.superclasses) == n and len(images) == 20 * n
            names += images.class_names
        assert len(set(names)) == sum(expected)
    assert data.load("omniglot", "all").n_classes == 1623
    ours = [omniglot.vinyals(*name.split("/")) for name in data.load("omniglot", "all").class_names]
    folder, layout = data.locate("omniglot")
    if layout == "pack":
        assert ours == storage.read_archive(folder / "omniglot.npz", "vinyals_split")[0].tolist()


@pytest.mark.parametrize("name, splits", [
    ("mini_imagenet", {"val": (16, 9600)}), ("mnist", {"train": (10, 55000), "val": (10, 5000), "test": (10, 10000)}),
    ("fashion_mnist", {"test": (10, 10000)})])
def test_real_counts(name, splits):
    for split, expected in splits.items():
        real(name, split)
        images = data.load(name, split)
        assert (images.n_classes, len(images)) == expected and images.images.dtype == torch.uint8


# Attribute tasks of CelebA


def labeled_faces(n=200, attributes=5):
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(n, attributes, generator=generator) < 0.4).to(torch.uint8)
    images = torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    return data.ImageSet(images, torch.zeros(n, dtype=torch.int64), ["1"], [], "celeba", "train", values,
                         [f"a{i}" for i in range(attributes)])


def test_attribute_prototypes_equal_counting_by_hand():
    faces = labeled_faces()
    columns = [4, 0, 2, 3]
    prototypes = attribute_prototypes(faces, [f"a{i}" for i in columns], r=20)
    values, expected = faces.attributes.tolist(), []
    for i in range(4):
        for j in range(i + 1, 4):
            for k in range(j + 1, 4):
                for booleans in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)):
                    triple = [columns[i], columns[j], columns[k]]
                    agree = [sum(row[c] == b for c, b in zip(triple, booleans, strict=True)) for row in values]
                    if agree.count(3) >= 20 and agree.count(0) >= 20:
                        expected.append([list(pair) for pair in zip(triple, booleans, strict=True)])
    assert 0 < len(expected) < 16 and prototypes.tolist() == expected


def test_attribute_errors():
    faces = labeled_faces()
    with pytest.raises(ValueError, match="unknown attributes Bald"):
        attribute_prototypes(faces, ["Bald"], 10)
    faces.attributes = None
    with pytest.raises(ValueError, match="no attributes"):
        attribute_prototypes(faces, ["a0"], 10)


@pytest.mark.parametrize("split, attributes, expected", [
    ("train", slice(0, 20), 4287), ("val", slice(20, 30), 391), ("test", slice(30, 40), 402)])
def test_celeba_attribute_counts_of_the_paper(split, attributes, expected):
    found = data.locate("celeba", split)
    if not found or found[1] != "full":
        pytest.skip("needs the full CelebA (img_align_celeba/ and lists in $UMETA_DATA/celeba); the packs hold a part")
    _, values, names = readers.celeba_labels(found[0], split)[1:]
    faces = data.ImageSet(torch.zeros(len(values), 0), torch.zeros(len(values)), [], [], "celeba", split,
                          torch.from_numpy(values), names)
    assert len(attribute_prototypes(faces, names[attributes], r=10)) == expected


# What is said when something is wrong


@pytest.mark.parametrize("arguments, message", [
    ({"name": "omniglott"}, "unknown data set 'omniglott'.*glyphs, omniglot, mini_imagenet"),
    ({"name": "omniglot", "split": "validation"}, "unknown split 'validation'.*train, val, test"),
    ({"name": "omniglot", "protocol": "finn"}, "unknown Omniglot protocol 'finn'.*cactus, lasium"),
    ({"name": "mnist", "protocol": "cactus"}, "mnist has no protocols"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


def test_protocol_on_part_of_omniglot(tmp_path):
    write_omniglot(tmp_path)
    with pytest.raises(ValueError, match="1623 characters.*this copy has 4.*split='all'"):
        data.load("omniglot", path=tmp_path)


@pytest.mark.parametrize("name", [name for name, about in data.ABOUT.items() if about.layouts])
def test_missing_data_names_what_where_and_how(name, no_data, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("UMETA_DATA", str(tmp_path / "mine"))
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, download=False)
    message = str(error.value)
    file = next(iter(data.required(name, "train").values()))[0]
    assert message.startswith(f"{name} (train) not found: looked for {file}")
    assert str(tmp_path / "mine" / name) in message and str(cache / name) in message and "To get it:" in message
    with pytest.raises(FileNotFoundError, match=f"{name}.* not found"):
        data.check(name)
    assert data.info(name)["found"] is None


def test_failed_download_is_the_same_clear_error(no_data, cache, monkeypatch):
    torchvision = pytest.importorskip("torchvision")

    def no_network(root, **options):
        (cache / "omniglot").mkdir()
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", no_network)
    with pytest.raises(FileNotFoundError, match="omniglot .*UMETA_DATA is not set.*download failed.*no route") as error:
        data.load("omniglot")
    assert error.value.__cause__ is None and list(cache.glob("[!.]*")) == [cache / "omniglot"]


def test_download_goes_to_the_cache_and_nowhere_else(no_data, cache, monkeypatch):
    from pathlib import Path

    torchvision = pytest.importorskip("torchvision")
    written = []

    def pretend(root, background, download):
        if not written:
            write_omniglot(Path(root) / "omniglot-py")
        written.append(Path(root))

    monkeypatch.setattr(torchvision.datasets, "Omniglot", pretend)
    assert data.load("omniglot", "all").n_classes == 4
    assert len(written) == 2 and all(root.parent == cache for root in written)
    there = {entry.name for entry in cache.iterdir()}
    assert there == {"omniglot", ".omniglot.lock", "arrays"}  # the temporary folder is gone
    assert data.load("omniglot", "all").n_classes == 4 and len(written) == 2  # found, not downloaded again
    assert data.info("omniglot")["found"] == str(cache / "omniglot" / "omniglot-py")


def test_a_folder_of_one_s_own_images(cache, tmp_path):
    from PIL import Image

    with pytest.raises(FileNotFoundError, match="one folder for each class"):
        data.from_folder(tmp_path / "mine")
    for name, value in (("b", 200), ("a", 100)):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (30, 20), (value, value + i, value - i)).save(tmp_path / "mine" / name / f"{i}.png")
    images = data.from_folder(tmp_path / "mine", size=8)
    assert images.images.shape == (6, 3, 8, 8) and images.images.dtype == torch.uint8
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1] and images.class_names == ["a", "b"]
    gray = data.from_folder(tmp_path / "mine", size=8, gray=True).images
    assert gray.shape == (6, 1, 8, 8) and (gray[:3] == 100).all() and (gray[3:] == 200).all()


def test_places_are_searched_in_order(no_data, cache, tmp_path, monkeypatch):
    write_celeba(cache / "celeba")
    assert data.info("celeba")["found"] == str(cache / "celeba")
    write_celeba(tmp_path / "mine" / "celeba")
    monkeypatch.setenv("UMETA_DATA", str(tmp_path / "mine"))
    assert data.info("celeba")["found"] == str(tmp_path / "mine" / "celeba")
    write_celeba(tmp_path / "given")
    assert data.locate("celeba", path=tmp_path / "given" / "celeba_identity.npz") == (tmp_path / "given", "pack")
    with pytest.raises(FileNotFoundError):  # an explicit path is the only place
        data.load("celeba", path=tmp_path / "elsewhere")


def test_truncated_pack(tmp_path):
    write_celeba(tmp_path)
    path = tmp_path / "celeba_identity.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="celeba_identity.npz is truncated or corrupt .*get it again"):
        data.load("celeba", path=tmp_path)
    assert [line["ok"] for line in data.check("celeba", tmp_path)] == [None, None, False]


def test_flipped_byte_in_a_pack(tmp_path):
    write_omniglot(tmp_path / "folder")
    (path,) = data.pack("omniglot", tmp_path / "folder", tmp_path / "packs")
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="omniglot.npz is truncated or corrupt"):
        data.load("omniglot", "all", path=path)


def test_damaged_image_files(tmp_path, cache):
    write_mini_imagenet(tmp_path / "mini", "csv")
    image = next((tmp_path / "mini" / "images").glob("n0*"))
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(ValueError, match=f"{image.name} is truncated or corrupt"):
        data.load("mini_imagenet", path=tmp_path / "mini")
    assert not any(cache.rglob("*.npy"))  # nothing half decoded is left
    image.unlink()
    with pytest.raises(FileNotFoundError, match="6 images are named, 1 of them are not there"):
        data.load("mini_imagenet", path=tmp_path / "mini")
    write_omniglot(tmp_path / "omniglot")
    drawing = tmp_path / "omniglot/images_background/Latin/character01/0001_02.png"
    drawing.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="0001_02.png is truncated or corrupt"):
        data.load("omniglot", "all", path=tmp_path / "omniglot")
    drawing.unlink()
    with pytest.raises(ValueError, match="incomplete: its characters have 2 to 3 drawings"):
        data.load("omniglot", "all", path=tmp_path / "omniglot")


@pytest.mark.parametrize("damage", ["length", "size"])
def test_an_image_that_pillow_calls_broken_or_a_bomb_is_named(tmp_path, damage, monkeypatch):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "1.png"
    Image.new("RGB", (30, 20)).save(file)
    if damage == "length":  # of the first piece of data: what comes next is none, and Pillow raises a SyntaxError
        content = bytearray(file.read_bytes())
        content[content.index(b"IDAT") - 1] = 9
        file.write_bytes(content)
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="1.png is truncated or corrupt"):
        data.from_folder(tmp_path, size=8)


def test_damaged_torchvision_copy(tmp_path):
    pytest.importorskip("torchvision")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match="truncated or corrupt copy of cifar10"):
        data.load("cifar10", path=tmp_path)


def test_writes_are_atomic(tmp_path):
    path = tmp_path / "pack.npz"
    storage.write_archive(path, a=np.arange(3))

    def interrupted():
        with storage.atomic(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == [path] and storage.read_archive(path, "a")[0].tolist() == [0, 1, 2]


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    left, fresh, other = (tmp_path / name for name in (".0123abcd-a[b].pt", ".89abcdef-a[b].pt", ".0123abcd-ab.pt"))
    for file in (left, fresh, other):
        file.write_text("half")
        if file is not fresh:
            os.utime(file, (0, 0))
    storage.write_json([1], tmp_path / "a[b].pt")
    assert not left.exists() and fresh.exists() and other.exists()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(state, file):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672]")  # noqa: B904, as torch.save does

    storage.save_tensors({"a": torch.zeros(2)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*a.pt: .*No space left on device"):
        storage.save_tensors({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert storage.load_tensors(tmp_path / "a.pt", "file")["a"].sum() == 0 and len(list(tmp_path.iterdir())) == 1


def test_a_renamed_folder_is_read_anew(tmp_path, cache):
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for i in range(2):
            file = tmp_path / "animals" / name / f"{i}.bmp"
            Image.new("L", (8, 8), 200 if name == "cat" else 10).save(file)
            os.utime(file, (0, 0))  # an archive may leave all times equal
    before = data.from_folder(tmp_path / "animals")
    (tmp_path / "animals" / "cat").rename(tmp_path / "animals" / "zebra")
    after = data.from_folder(tmp_path / "animals")
    assert before.images[before.labels == before.class_names.index("cat")].float().mean() > 100
    assert after.images[after.labels == after.class_names.index("zebra")].float().mean() > 100


def test_an_atomic_write_syncs_a_file_that_is_open_for_writing(tmp_path, monkeypatch):
    """Windows refuses others."""
    monkeypatch.setattr(storage.os, "fsync", lambda descriptor: os.write(descriptor, b""))
    storage.write_archive(tmp_path / "pack.npz", a=np.arange(3))
    assert storage.read_archive(tmp_path / "pack.npz", "a")[0].tolist() == [0, 1, 2]


def test_unwritable_cache_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UMETA_CACHE", str(tmp_path / "file"))
    write_omniglot(tmp_path / "omniglot")
    with pytest.raises(OSError, match="cannot write to .*UMETA_CACHE"):
        data.load("omniglot", "all", path=tmp_path / "omniglot")


def test_pack_refuses_what_it_cannot_pack(tmp_path):
    with pytest.raises(ValueError, match="no pack is made of mnist"):
        data.pack("mnist", tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="omniglot .* not found"):
        data.pack("omniglot", tmp_path, tmp_path)


# umeta data list, check


def test_every_data_set_is_listed():
    for about in data.datasets():
        assert about["what"] and about["license"] and (about["found"] == "built in" or about["get"])
    assert data.info("omniglot")["protocols"] == ["cactus", "lasium", "meta_gmvae", "vinyals"]


def test_check_counts_what_is_there(tmp_path):
    write_omniglot(tmp_path)
    (line,) = data.check("omniglot", tmp_path)
    assert line["ok"] is False and "4 classes, 12 images (3 to 3 a class)" in line["detail"]
    assert "1623 classes, 32460 images" in line["detail"]


def test_check_of_the_real_omniglot():
    real("omniglot")
    assert all(line["ok"] is not False for line in data.check("omniglot"))


def test_import_needs_only_torch_and_numpy(cache):
    code = ("import sys\n"
            "for name in ('PIL', 'torchvision', 'sklearn', 'tqdm', 'platformdirs', 'matplotlib'):\n"
            "    sys.modules[name] = None\n"
            "import umeta_core.data, umeta_core.attributes; print(umeta_core.storage.cache_folder())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(cache), done.stderr


def test_no_image_of_cifar10_is_trained_and_validated_on(tmp_path):
    for part, n in (("train", 20), ("test", 1)):
        packs.encode_pack(tmp_path / f"cifar10_{part}.npz", random_images(10 * n, size=32), class_names=np.arange(10),
                          labels=np.repeat(np.arange(10), n).astype(np.int16))  # fmt: skip
    train, val = ({image.numpy().tobytes() for image in data.load("cifar10", split, path=tmp_path).images}
                  for split in ("train", "val"))  # fmt: skip
    assert len(train) == 180 and len(val) == 20 and not train & val


def test_a_pack_whose_offsets_do_not_fit_is_refused(tmp_path):
    packs.encode_pack(tmp_path / "a.npz", random_images(3))
    header, rest, offsets = storage.read_archive(tmp_path / "a.npz", "jpeg_header", "jpeg_data", "offsets")
    storage.write_archive(tmp_path / "a.npz", jpeg_header=header, jpeg_data=np.append(rest, rest[:9]), offsets=offsets)
    with pytest.raises(ValueError, match="offsets do not fit its data"):
        packs.decode_pack(tmp_path / "a.npz", 84)


def test_classes_of_joined_splits_stay_apart():
    parts = [data.load("glyphs", split) for split in ("train", "val")]
    both = data.join(parts)
    for images, first in zip(parts, (0, parts[0].n_classes)):
        chosen = both.labels == first + 3
        assert torch.equal(both.images[chosen], images.images[images.labels == 3])
        assert both.class_names[first + 3] == images.class_names[3]
    assert both.labels.unique().tolist() == list(range(both.n_classes))


def test_official_splits_are_parts_of_the_whole():
    assert sum(data.CELEBA.values()) == data.COUNTS["celeba"]["all"][1]
    for name in ("mnist", "fashion_mnist"):
        assert [data.official(name, split) for split in ("train", "val", "test")] == [55_000, 5_000, 10_000]
    assert sum(data.official("mini_imagenet", split) for split in ("train", "val", "test")) == 60_000
    assert sum(data.official("tiered_imagenet", split) for split in ("train", "val", "test")) == 779_165
