"""Data sets as tensors: `load(name, split)` finds a data set, reads it and gives an ImageSet."""

import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from . import omniglot, packs, readers, storage

SPLITS = (*readers.SPLITS, "all")


@dataclass
class ImageSet:
    """Labeled images. images uint8 [n, channels, height, width]; labels int64 [n], an index into `class_names`.

    `superclasses` has one name per class (the alphabet or script), or is empty. CelebA also has `attributes`, uint8
    [n, 40] in {0, 1}, and their names. `mapped`: the images lie in a read-only file (ImageNet) and stay there, on the
    CPU, when the set is moved to another device; index them with few rows at a time.
    """

    images: Tensor
    labels: Tensor
    class_names: list[str]
    superclasses: list[str]
    name: str
    split: str
    attributes: Tensor | None = None
    attribute_names: list[str] = field(default_factory=list)
    mapped: bool = False

    def __len__(self):
        return len(self.images)

    @property
    def n_classes(self):
        return len(self.class_names)

    def shown(self, index):
        """The images at `index` [...] as floats in [0, 1], [..., channels, height, width], on its device."""
        return as_floats(self.images[index.to(self.images.device)].to(index.device))

    def to(self, device):
        """The same set with its tensors on `device`, but for images that are mapped from a file."""
        images = self.images if self.mapped else self.images.to(device)
        attributes = None if self.attributes is None else self.attributes.to(device)
        return replace(self, images=images, labels=self.labels.to(device), attributes=attributes)


def as_floats(images):
    """uint8 images as floats in [0, 1]. ValueError: another type."""
    if images.dtype != torch.uint8:  # others may be in [0, 1] already, and float() of floats is no copy to divide
        raise ValueError(f"images are uint8, 0 to 255, not {images.dtype}")
    return images.float().div_(255)


@dataclass(frozen=True)
class About:
    """What is known of a data set. `layouts`: for each readable layout the files that must be there."""

    what: str
    size: int
    license: str
    layouts: dict
    steps: tuple = ()


VISION = "with a network connection and torchvision (pip install torchvision) it is downloaded on first use"

ABOUT = {
    "glyphs": About("characters of many scripts, drawn from the fonts that ship with matplotlib (built in)", 28,
                    "fonts: Bitstream Vera and DejaVu license, SIL Open Font License", {}),
    "omniglot": About(
        "1623 characters of 50 alphabets x 20 drawings (Lake et al. 2015)", 28, "MIT",
        {"pack": ("omniglot.npz",), "folders": ("images_background", "images_evaluation"),
         "torchvision": ("omniglot-py/images_background", "omniglot-py/images_evaluation")},
        (VISION, "or: git clone https://github.com/brendenlake/omniglot",
         "unzip omniglot/python/images_background.zip -d {home}",
         "unzip omniglot/python/images_evaluation.zip -d {home}")),
    "mini_imagenet": About(
        "100 ImageNet classes x 600 photographs at 84x84 (Vinyals et al. 2016; split of Ravi & Larochelle 2017)", 84,
        "ImageNet terms of access: non-commercial research and education only",
        {"pack": ("mini_imagenet_{split}.npz",), "csv": ("{split}.csv", "images"), "folders": ("{split}",)},
        ("sign up at https://image-net.org and download the training images of ILSVRC 2012",
         "take train.csv, val.csv, test.csv from https://github.com/twitter-research/meta-learning-lstm",
         "and follow https://github.com/yaoyao-liu/mini-imagenet-tools to cut out the 60,000 images",
         "put the CSVs and the folder images/ (or folders train/ val/ test/ of class folders) into {home}",
         "umeta data pack mini_imagenet {home} makes compact files of them (optional)")),
    "tiered_imagenet": About(
        "608 ImageNet classes, 779,165 photographs at 84x84, split by category: 351, 97, 160 (Ren et al. 2018)", 84,
        "ImageNet terms of access: non-commercial research and education only",
        {"pickles": ("{split}_images_png.pkl", "{split}_labels.pkl"), "folders": ("{split}",)},
        ("sign up at https://image-net.org, whose terms hold for this part too",
         "download tiered-imagenet.tar (12.9 GB), see https://github.com/renmengye/few-shot-ssl-public",
         "and unpack it so that train_images_png.pkl, train_labels.pkl and so on lie in {home}",
         "or make folders train/ val/ test/ of class folders in {home} from ILSVRC2012_img_train.tar",
         "with https://github.com/yaoyao-liu/tiered-imagenet-tools",
         "the images are decoded once, into files of 16.5 GB in the cache folder ($UMETA_CACHE)")),
    "imagenet": About(
        "1000 classes, 1.28 million photographs at 224x224 (ILSVRC 2012); val and test are those of mini-ImageNet", 224,
        "ImageNet terms of access: non-commercial research and education only",
        {"raw": ("imagenet.npz", "imagenet.npy")},
        ("sign up at https://image-net.org and download ILSVRC2012_img_train.tar (138 GB)",
         "unpack it and the 1000 archives in it into FOLDER/train/n01440764/*.JPEG and so on, a folder for each class",
         "umeta data pack imagenet FOLDER --out {home} (makes one file of 193 GB; can be interrupted)")),
    "mnist": About(
        "70,000 handwritten digits (LeCun, Cortes, Burges)", 28, "CC BY-SA 3.0, as commonly stated",
        {"pack": ("mnist.npz",),
         "torchvision": ("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-images-idx3-ubyte")},
        (VISION,)),
    "fashion_mnist": About(
        "70,000 pictures of clothes in 10 classes (Xiao et al. 2017)", 28, "MIT",
        {"pack": ("fashion_mnist.npz",),
         "torchvision": ("FashionMNIST/raw/train-images-idx3-ubyte", "FashionMNIST/raw/t10k-images-idx3-ubyte")},
        (VISION,)),
    "cifar10": About(
        "60,000 photographs in 10 classes at 32x32 (Krizhevsky 2009)", 32, "none stated by its authors",
        {"pack": ("cifar10_train.npz", "cifar10_test.npz"), "torchvision": ("cifar-10-batches-py",)},
        (VISION,)),
    "celeba": About(
        "faces with identity and 40 attributes (Liu et al. 2015)", 84,
        "CelebA agreement: non-commercial research only, no redistribution",
        {"pack": ("celeba_{part}.npz",),
         "full": ("img_align_celeba", "list_attr_celeba.txt", "identity_CelebA.txt", "list_eval_partition.txt")},
        ("download img_align_celeba.zip, list_attr_celeba.txt, identity_CelebA.txt and list_eval_partition.txt",
         "from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into {home}",
         "unzip {home}/img_align_celeba.zip -d {home}")),
    "digits": About("1797 handwritten digits at 8x8 (UCI, in scikit-learn)", 8, "CC BY 4.0", {}),
}


def load(name, split="train", *, path=None, size=None, protocol=None, device="cpu", part="both", download=True):
    """Load a data set as an ImageSet.

    name: "glyphs" (built in), "omniglot", "mini_imagenet", "tiered_imagenet", "imagenet", "mnist", "fashion_mnist",
        "cifar10", "celeba" or "digits".
    split: "train", "val", "test", or "all" (everything; Omniglot then without rotations).
    path: folder (or one of the files in it) to read from. Without it the data set is looked for in $UMETA_DATA, then in
        the cache folder (`storage.cache_folder`), then torchvision downloads it there, unless download=False.
    size: height and width in pixels; other than the data set's own, images are resized (antialiased bilinear).
        Omniglot and glyphs have 28 and 105, mini-ImageNet, tieredImageNet and CelebA 84, MNIST 28, CIFAR-10 32, digits
        8. ImageNet has 224 and is not resized: it does not fit memory and stays in its file (ImageSet.mapped). A split
        of tieredImageNet at 84 stays in its file too, until it is moved to a GPU (9.5 GB to train on); "all" does not.
    protocol: Omniglot only: "cactus" (default), "lasium", "meta_gmvae" or "vinyals": `umeta_core.omniglot`.
    part: CelebA packs only: "identity" (many faces a person), "aligned" (mostly one) or "both".

    Validation is the last 5000 training images of MNIST and Fashion-MNIST (CACTUs appendix D), the last tenth of each
    class of CIFAR-10 (a copy may be sorted by class); mini- and tieredImageNet and CelebA have their own; ImageNet's
    training images are split by class: 16 and 20 as in mini-ImageNet, 964 to train on (CACTUs appendix G); digits are
    cut 60/20/20 within each class. In every data set of drawings ink is 255.
    Raises ValueError for an unknown name, split, protocol or part and for a damaged file, FileNotFoundError (what was
    looked for where, and how to get it) for a missing data set.
    """
    about = known(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {name}: choose from {', '.join(SPLITS)}")
    if protocol is not None and name != "omniglot":
        raise ValueError(f"{name} has no protocols (only omniglot has): leave protocol out")
    if part not in ("identity", "aligned", "both"):
        raise ValueError(f"unknown part {part!r} of celeba: choose from identity, aligned, both")
    if part != "both" and name != "celeba":
        raise ValueError(f"{name} has no parts (only celeba has): leave part out")
    if name == "imagenet" and size not in (None, 224):
        raise ValueError(f"imagenet is read from a file of 224x224 images and not resized to {size}: leave size out")
    size = size or about.size
    if name == "glyphs":
        loaded = readers.glyphs(split, size)
    elif name == "digits":
        loaded = readers.digits(split)
    elif name == "omniglot":
        protocol = protocol or "cactus"
        if protocol not in omniglot.PROTOCOLS:
            raise ValueError(f"unknown Omniglot protocol {protocol!r}: choose from {', '.join(omniglot.PROTOCOLS)}")
        loaded = omniglot.load(*find(name, split, path, part, download), split, protocol, size)
    elif name in ("mini_imagenet", "tiered_imagenet"):
        wanted = readers.SPLITS if split == "all" else (split,)
        loaded = readers.part_of_imagenet(name, {each: find(name, each, path) for each in wanted})
    elif name == "imagenet":
        loaded = readers.imagenet(find(name, split, path)[0], split)
    elif name == "celeba":
        loaded = readers.celeba(*find(name, split, path, part, download), split, part)
    else:
        loaded = readers.vision(name, *find(name, split, path, part, download), split)
    images, labels, class_names, superclasses, *rest = loaded
    images = packs.resize(images, size)
    return ImageSet(images, labels, class_names, superclasses, name, split, *rest, mapped=name == "imagenet").to(device)


def from_folder(folder, size=84, gray=False):
    """Your own images, one folder for each class with image files in it, as an ImageSet of squares of `size` pixels.

    They are decoded once, into the cache folder. gray: one channel, the mean of the three; let ink be white.
    Raises FileNotFoundError if there are no such folders, ValueError that names a file which is no image.
    """
    folder = Path(folder).expanduser()
    files = packs.image_files(folder, "*/*")
    if not files:
        raise FileNotFoundError(f"no images in {folder}: it should hold one folder for each class, with images in it")
    names = sorted({file.parent.name for file in files})
    number = {name: i for i, name in enumerate(names)}
    images = torch.from_numpy(packs.decode_files(files, size, folder.name))
    if gray:
        images = torch.cat([x.float().mean(1, keepdim=True).round().byte() for x in images.split(2000)])
    labels = torch.tensor([number[file.parent.name] for file in files])
    return ImageSet(images, labels, names, [], folder.name, "all")


def join(sets):
    """Several splits of one data set as one ImageSet; classes are numbered on (splits of classes, not of images)."""
    if len(sets) == 1:
        return sets[0]
    first, starts = sets[0], torch.tensor([0] + [s.n_classes for s in sets]).cumsum(0).tolist()
    return replace(
        first, images=torch.cat([s.images for s in sets]),
        labels=torch.cat([s.labels + start for s, start in zip(sets, starts)]),
        class_names=[name for s in sets for name in s.class_names],
        superclasses=[name for s in sets for name in s.superclasses], split="+".join(s.split for s in sets),
        attributes=None if first.attributes is None else torch.cat([s.attributes for s in sets]),
    )  # fmt: skip


def known(name):
    """The About of a data set; ValueError names the known ones."""
    if name not in ABOUT:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(ABOUT)}")
    return ABOUT[name]


# Where a data set comes from


def places(name, path=None):
    """Folders to look in, in order: `path` and the folder `name` in it; else `name` in $UMETA_DATA and in the cache."""
    if path is not None:
        path = Path(path).expanduser()
        folder = path.parent if path.is_file() else path
        return [folder, folder / name]
    roots = [Path(os.environ["UMETA_DATA"]).expanduser()] if os.environ.get("UMETA_DATA") else []
    return [root / name for root in (*roots, storage.cache_folder())]


def required(name, split, part="both"):
    """{layout: the relative paths that must be there for `split`}."""
    splits = readers.SPLITS if split == "all" else (split,)
    parts = ("identity", "aligned") if part == "both" else (part,)
    return {
        layout: tuple(dict.fromkeys(file.format(split=s, part=p) for file in files for s in splits for p in parts))
        for layout, files in ABOUT[name].layouts.items()
    }


def locate(name, split="train", path=None, part="both"):
    """(folder, layout) of the first place that has the data set, or None."""
    for folder in places(name, path):
        for layout, files in required(name, split, part).items():
            if all((folder / file).exists() for file in files):
                if (name, layout) == ("omniglot", "torchvision"):
                    return folder / "omniglot-py", "folders"
                return folder, layout
    return None


def find(name, split="train", path=None, part="both", download=True):
    """(folder, layout) of a data set, downloaded if need be; FileNotFoundError tells where it was looked for."""
    found = locate(name, split, path, part)
    failure = ""
    if found is None and download and path is None and name in readers.TORCHVISION:
        with storage.alone(storage.cache_folder() / name):  # of several runs one downloads
            found = locate(name, split, path, part)
            failure = "" if found else fetch(name)
        found = found or locate(name, split, path, part)
    if found is None:
        raise FileNotFoundError(missing(name, split, path, part, failure))
    return found


def fetch(name):
    """Download a data set into the cache folder with torchvision. Returns what went wrong, or ""."""
    try:
        import torchvision
    except ImportError:
        return "torchvision is not installed"
    dataset = getattr(torchvision.datasets, readers.TORCHVISION[name])
    option = "background" if name == "omniglot" else "train"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with storage.atomic_folder(storage.cache_folder() / name) as folder:
            for value in (True, False):
                dataset(str(folder), **{option: value}, download=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; torchvision raises RuntimeError
        return f"the download failed: {' '.join(str(error).split())}"
    finally:
        socket.setdefaulttimeout(timeout)
    return ""


def missing(name, split, path, part, failure):
    """The message for a data set that is not there: what was looked for, where, and how to get it."""
    home = Path(path) if path is not None else Path(os.environ.get("UMETA_DATA") or storage.cache_folder()) / name
    wanted = " or ".join(" + ".join(files) for files in required(name, split, part).values())
    looked = ", ".join(str(folder) for folder in places(name, path))
    unset = "" if path is not None or os.environ.get("UMETA_DATA") else " ($UMETA_DATA is not set)"
    steps = "".join(f"\n  {step.format(home=home)}" for step in ABOUT[name].steps)
    return (f"{name} ({split}) not found: looked for {wanted} in {looked}{unset}"
            f"{'; ' + failure if failure else ''}. To get it:{steps}")


# What is there, and is it whole: the functions behind `umeta data`

# First 16 digits of the SHA-256 of the compact packs this project was measured on.
SHA256 = {
    "celeba_aligned": "4442e6648f4687bd", "celeba_identity": "de5b4af9184cc143",
    "cifar10_test": "f3db77fc9425772c", "cifar10_train": "f073050d36f16b2a", "fashion_mnist": "7da2b68ac5bb842b",
    "mini_imagenet_test": "92c653f3f170ce2b", "mini_imagenet_train": "1878985832d8daed",
    "mini_imagenet_val": "a94e40bf56b46cfd", "mnist": "06af5dfe73b70e3b", "omniglot": "9ccf197c7f38e9eb",
}
# {split: (classes, images)} of the whole data set.
COUNTS = {
    "omniglot": {"all": (1623, 32460)},
    "mini_imagenet": {"train": (64, 38400), "val": (16, 9600), "test": (20, 12000)},
    "tiered_imagenet": {"train": (351, 448695), "val": (97, 124261), "test": (160, 206209)},
    "imagenet": {"all": (1000, 1281167)},
    "mnist": {"train": (10, 55000), "val": (10, 5000), "test": (10, 10000)},
    "fashion_mnist": {"train": (10, 55000), "val": (10, 5000), "test": (10, 10000)},
    "cifar10": {"train": (10, 45000), "val": (10, 5000), "test": (10, 10000)},
    "celeba": {"all": (10177, 202599)},
    "digits": {"all": (10, 1797)},
}
CELEBA = {"train": 162_770, "val": 19_867, "test": 19_962}  # images of the official partition


def official(name, split):
    """How many images the whole split has, or None where that depends on a protocol (or on fonts)."""
    if name == "celeba":
        return CELEBA[split]
    return COUNTS.get(name, {}).get(split, (None, None))[1]


def datasets():
    """`info` of each data set."""
    return [info(name) for name in ABOUT]


def info(name):
    """What is known of a data set, where it was found and which splits are there. ValueError: unknown name."""
    about = known(name)
    there = available(name)
    folder, layout, _ = next(iter(there.values()), (None, None, None))
    return {
        "name": name, "what": about.what, "found": folder and str(folder), "layout": layout, "license": about.license,
        "splits": list(there), "size": about.size, "get": [step.format(home=places(name)[0]) for step in about.steps],
        "protocols": list(omniglot.PROTOCOLS) if name == "omniglot" else [],
    }


def available(name, path=None):
    """{split: (folder, layout, part)} of the splits that are there; "built in" where no file is needed."""
    if not ABOUT[name].layouts:
        return dict.fromkeys(readers.SPLITS, ("built in", "built in", "both"))
    there = {}
    for split in readers.SPLITS:
        for part in ("both", "identity", "aligned") if name == "celeba" else ("both",):
            if split not in there and (found := locate(name, split, path, part)):
                there[split] = (*found, part)
    return there


def pack(name, folder, out):
    """Make the packs of "omniglot", "mini_imagenet" or "imagenet" from a usual folder layout; returns the files.

    mini-ImageNet is written as 84x84 JPEGs of quality 75, which is lossy; ImageNet as 193 GB of 224x224 pixels. Raises
    ValueError for another name and FileNotFoundError if `folder` does not hold the data set.
    """
    known(name)
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    if name == "imagenet":
        return readers.pack_imagenet(folder, out)
    if name not in ("omniglot", "mini_imagenet"):
        raise ValueError(f"no pack is made of {name}: choose omniglot, mini_imagenet or imagenet")
    found = {split: find(name, split, folder) for split in readers.SPLITS}
    for there, layout in found.values():
        if layout == "pack":
            raise ValueError(f"{there} holds packs already: name the folder with the images")
    if name == "omniglot":
        return [omniglot.pack(found["train"][0], out)]
    return [readers.pack_mini_imagenet(*where, split, out) for split, where in found.items()]


def check(name, path=None):
    """Verify a data set. One dict for each thing verified: what, ok (True, False, or None: cannot be told), detail.

    A pack's SHA-256 is compared with that of the known pack (another sum is not an error: packs can be made anew);
    every split is read whole (of ImageNet only the labels), and its classes, images and image size are compared with
    the published ones. Raises ValueError for an unknown name, FileNotFoundError if nothing is there.
    """
    known(name)
    there = available(name, path)
    if not there:
        raise FileNotFoundError(missing(name, "train", path, "both", ""))
    files = [folder / file for split, (folder, layout, part) in there.items() if layout == "pack"
             for file in required(name, split, part)["pack"]]
    report = []
    for file in dict.fromkeys(files):
        found, wanted = storage.sha256(file)[:16], SHA256[file.stem]
        detail = f"{found}, the known pack" if found == wanted else f"{found}, not the known pack {wanted}"
        report.append({"what": f"sha256 of {file.name}", "ok": True if found == wanted else None, "detail": detail})
    for split, counts in COUNTS.get(name, dict.fromkeys(readers.SPLITS)).items():
        part = next(iter(there.values()))[2]
        try:
            images = load(name, split, path=path, part=part, download=False)
            report.append(check_content(images, known(name).size, counts))
        except (ValueError, OSError) as error:
            report.append({"what": split, "ok": False, "detail": str(error)})
    return report


def check_content(images, size, counts):
    """One line of `check`: what is in an ImageSet, against `counts` (classes, images) of the whole split, or None."""
    members = torch.bincount(images.labels, minlength=images.n_classes)
    height, width = images.images.shape[-2:]
    found = (images.n_classes, len(images))
    ok = (height, width) == (size, size) and int(members.min()) > 0
    detail = (f"{found[0]} classes, {found[1]} images ({int(members.min())} to {int(members.max())} a class), "
              f"{height}x{width}, {str(images.images.dtype).removeprefix('torch.')}")
    if counts is not None and found != counts:
        # The known packs of these two hold a part of the data set.
        partial = images.name in ("fashion_mnist", "celeba") and found < counts
        ok = None if ok and partial else False
        detail += f"; the whole split has {counts[0]} classes, {counts[1]} images"
    return {"what": images.split, "ok": ok, "detail": detail}
