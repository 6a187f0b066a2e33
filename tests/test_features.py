"""The features that LEO learns on: the wide residual network, its training and views, and the published embeddings."""

import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from umeta_core.data import load
from umeta_core.embeddings.supervised import Supervised, augment, distort, look, random_boxes
from umeta_core.pickles import read_embeddings, read_pickle
from umeta_core.wide_resnet import Block, WideResNet


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0, **changes):
    """WRN-10-1 on 23x23 images, whose central and corner crops are 20x20 pixels."""
    settings = dict(classes=6, depth=10, width=1, input=20, dropout=0.3, lr=0.05) | changes
    return Supervised(1, 23, generator=generator(seed), **settings)


def random_images(n=48, size=23, channels=1, seed=0):
    return torch.randint(256, (n, channels, size, size), dtype=torch.uint8, generator=generator(seed))


# The network


def test_wrn_28_10_has_the_published_size():
    """36.5 million weights for 10 classes (Zagoruyko & Komodakis), scales, shifts and the head counted."""
    with torch.device("meta"):
        net = WideResNet()
        count = sum(p.numel() for p in net.parameters())
        assert count == 36_513_808 and count - 54 * 641 == 36_479_194 and len(net.blocks) == 12
        assert net.features(torch.empty(2, 3, 80, 80)).shape == (2, 640)
        assert net(torch.empty(2, 3, 80, 80)).shape == (2, 64)


@pytest.mark.parametrize("depth, layer", [(28, 21), (22, 15), (16, 11), (10, 7)])
def test_position_and_size_of_the_features(depth, layer):
    """3x3 convolutions up to the features, and the map's side there: three halvings of 24."""
    net = WideResNet(1, 24, depth, 1, 5, 0.0, rectified=False, generator=generator()).eval()
    convolutions, sides = [], []
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda m, i, out: convolutions.append(m) or sides.append(out.shape[-1]))
    x = torch.rand(2, 1, 24, 24, generator=generator(1))
    z = net.features(x)
    assert z.shape == (2, 64) and len(convolutions) == layer and sides[-1] == 3
    assert sides.count(24) == 1  # the first convolution; every group halves
    convolutions.clear()
    net(x)
    assert len(convolutions) == depth - 3 and convolutions[0] is net.stem  # the depth counts the three projections


def test_features_are_the_literal_residual_sum():
    net = WideResNet(3, 16, 16, 1, 5, 0.4, generator=generator()).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator(1))
            module.running_var.uniform_(0.5, 2, generator=generator(2))
    x = torch.rand(3, 3, 16, 16, generator=generator(3))
    y = net.stem(x)
    for block in net.blocks[:5]:
        a = F.relu(block.norm1(y))
        shortcut = y if block.shortcut is None else block.shortcut(a)
        y = shortcut + block.conv2(F.relu(block.norm2(block.conv1(a))))
    torch.testing.assert_close(net.features(x), F.relu(net.blocks[5].norm1(y)).mean((2, 3)))
    net.rectified = False
    torch.testing.assert_close(net.features(x), y.mean((2, 3)))
    assert len(net.blocks) == 6 and [b.shortcut is None for b in net.blocks] == [False, True] * 3


def test_dropout_is_drawn_from_the_generator_and_only_in_training():
    net = WideResNet(1, 16, 10, 1, 5, 0.5, generator=generator())
    x = torch.rand(4, 1, 16, 16, generator=generator(1))
    first, again, other = (net(x, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    net.eval()
    assert torch.equal(net(x, generator(0)), net(x, generator(1)))
    a, b = (WideResNet(1, 16, 10, 1, 5, generator=generator(3)).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


# Views


def test_test_views_are_the_crops_by_hand():
    images = random_images(5)
    x = images.float() / 255
    crops = [x[:, :, 1:21, 1:21], *(x[:, :, i : i + 20, j : j + 20] for i in (0, 3) for j in (0, 3))]
    crops[0] = (x[:, :, 1:21, 1:21] + x[:, :, 2:22, 2:22] + x[:, :, 1:21, 2:22] + x[:, :, 2:22, 1:21]) / 4
    center, multi = small().eval(), small(views="multi").eval()
    expected = [center.net.features((crop - 0.5) / 0.25) for crop in (*crops, *(crop.flip(3) for crop in crops))]
    torch.testing.assert_close(center.embed(images), expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(multi.embed(images), sum(expected) / 10, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("views", ["center", "multi"])
def test_an_image_is_embedded_on_its_own(views):
    model, images = small(views=views), random_images(7)
    whole = model.embed(images)
    torch.testing.assert_close(torch.cat([model.embed(image[None]) for image in images]), whole, atol=1e-5, rtol=1e-4)
    assert whole.shape == (7, model.d) and whole.dtype == torch.float32 and not model.embed(images, 3).requires_grad


def test_a_view_shrinks_without_aliasing():
    x = torch.rand(2, 3, 84, 84, generator=generator())
    whole = torch.tensor([[0.0, 0, 1, 1]]).expand(2, 4)
    torch.testing.assert_close(look(x, whole, 84), x)
    torch.testing.assert_close(look(x, whole, 42), F.avg_pool2d(x, 2))
    torch.testing.assert_close(look(x, whole * torch.tensor([1, 1, -1, 1]), 42), F.avg_pool2d(x, 2).flip(3))


def test_augmentation_range_and_reproducibility():
    images = random_images(64, 30, 3)
    settings = dict(area=0.3, aspect=4 / 3, color=0.4, flip=True)
    a, b, c = (augment(images, 16, generator(seed), **settings) for seed in (0, 0, 1))
    assert a.shape == (64, 3, 16, 16) and a.dtype == torch.float32 and 0 <= a.min() < a.max() <= 1
    assert torch.equal(a, b) and not torch.equal(a, c)
    plain = dict(area=1, aspect=1, color=0, flip=False)
    torch.testing.assert_close(augment(images, 30, generator(), **plain), images / 255)


def test_random_boxes_are_inside_and_of_the_asked_size():
    boxes = random_boxes(2000, generator(), area=0.3, aspect=4 / 3, flip=True)
    half = boxes[:, 2:].abs()
    assert (boxes[:, :2].abs() + half).max() <= 1 + 1e-6
    area, ratio = half.prod(1), half[:, 0] / half[:, 1]
    assert area.min() > 0.3 * 0.75 and 0.95 < area.max() <= 1
    assert 0.75 <= ratio.min() < 0.76 and 1.32 < ratio.max() <= 4 / 3 + 1e-5
    assert 0.45 < (boxes[:, 2] < 0).float().mean() < 0.55


def test_distortion_is_one_image_at_a_time():
    x = torch.rand(6, 3, 5, 5, generator=generator(1))
    u = torch.rand(3, 6, generator=generator())
    expected = []
    for i, image in enumerate(x):
        brightness, contrast, saturation = (1 - 0.4 + 0.8 * u[:, i]).tolist()
        y = (image * brightness).clamp(0, 1)
        y = (contrast * y + (1 - contrast) * y.mean()).clamp(0, 1)
        expected.append((saturation * y + (1 - saturation) * y.mean(0)).clamp(0, 1))
    torch.testing.assert_close(distort(x, generator(), 0.4), torch.stack(expected))


# Training


def few_shot_accuracy(z, y, shot=5, tasks=100, way=5):
    """Nearest mean of normalized features on random tasks."""
    g, right = generator(9), 0
    z = F.normalize(z, dim=1)
    members = [z[y == c] for c in y.unique()]
    for _ in range(tasks):
        classes = torch.randperm(len(members), generator=g)[:way]
        drawn = torch.stack([members[c][torch.randperm(len(members[c]), generator=g)[: shot + 5]] for c in classes])
        distance = torch.cdist(drawn[:, shot:].flatten(0, 1), drawn[:, :shot].mean(1))
        right += (distance.argmin(1) == torch.arange(way).repeat_interleave(5)).float().mean().item()
    return right / tasks


def test_training_on_some_classes_helps_on_others():
    glyphs = load("glyphs", "train")
    trained = glyphs.labels < 60
    images, labels = glyphs.images[trained], glyphs.labels[trained]
    model = Supervised(1, 28, classes=60, depth=10, width=1, input=16, dropout=0.0, color=0.0, flip=False, area=0.7,
                       generator=generator())  # fmt: skip
    others = (glyphs.labels >= 60) & (glyphs.labels < 120)
    before = few_shot_accuracy(model.embed(glyphs.images[others]), glyphs.labels[others], shot=1)
    history = model.fit(images, labels=labels, epochs=6, batch=32, progress=False)
    after = few_shot_accuracy(model.embed(glyphs.images[others]), glyphs.labels[others], shot=1)
    assert history["accuracy"][-1] > history["accuracy"][0] and history["loss"][-1] < history["loss"][0]
    assert after > before + 0.05, (before, after)
    x = images.float() / 255
    assert (model.logits(x).argmax(1) == labels).float().mean() > 0.1


def test_resume_is_bit_identical(tmp_path, monkeypatch):
    images, labels = random_images(), torch.arange(48) % 6
    settings = dict(labels=labels, epochs=3, batch=16, seed=2, progress=False)
    whole = small()
    history = whole.fit(images, **settings)

    class Stop(Exception):
        pass

    step, done = Supervised.step, []

    def interrupted(self, *arguments):
        if len(done) == 5:
            raise Stop
        done.append(1)
        return step(self, *arguments)

    path = tmp_path / "features.pt"
    monkeypatch.setattr(Supervised, "step", interrupted)
    with pytest.raises(Stop):
        small().fit(images, checkpoint=path, save_every=0, **settings)
    monkeypatch.setattr(Supervised, "step", step)
    resumed = small(seed=5)
    again = resumed.fit(images, checkpoint=path, **settings)
    a, b = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert history["loss"] == again["loss"] and history["accuracy"] == again["accuracy"]
    assert torch.equal(small().restore(path).embed(images), whole.embed(images))


def test_the_rate_falls_at_shares_of_the_training(monkeypatch):
    model, rates = small(lr=0.1, drops=(0.3, 0.5, 0.7, 0.8, 0.9), decay=5e-4), []
    monkeypatch.setattr(Supervised, "step", lambda self, *_: rates.append(self.opt[0].param_groups[0]["lr"]) or {})
    model.fit(random_images(), labels=torch.arange(48) % 6, epochs=10, batch=48, progress=False)
    expected = [0.1] * 3 + [0.02] * 2 + [0.004] * 2 + [0.0008, 0.00016, 0.000032]
    assert rates == pytest.approx(expected)
    (group,) = model.opt[0].param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)


def test_autocast_on_the_cpu_gives_nearly_the_same():
    images = random_images(8)
    plain, half = small(), small(autocast=True)
    half.load_state_dict(plain.state_dict())
    z, approximate = plain.embed(images), half.embed(images)
    assert approximate.dtype == torch.float32 and not torch.equal(z, approximate)
    assert (z - approximate).abs().max() < 0.05 * z.abs().max()


@pytest.mark.parametrize("call, message", [
    (lambda: small(views="five"), "views='five' is not known; use center or multi"),
    (lambda: small(depth=12), "no wide residual network has a depth of 12; use 10, 16"),
    (lambda: small(input=6), "6x6 are too small for three halvings"),
    (lambda: small().embed(random_images(2, 28)), r"takes images of \(1, 23, 23\), these are \(1, 28, 28\)"),
    (lambda: small().fit(random_images(), labels=torch.arange(48), epochs=1),
     "48 images need as many labels from 0 to 5; got 48 from 0 to 47"),
    (lambda: small().fit(random_images(), labels=torch.zeros(47, dtype=torch.int64), epochs=1), "got 47 from 0 to 0"),
])  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Pickles


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 with an old NumPy does: byte strings without a type, and `numpy.core`."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        self.save_bytes(text.encode("latin1"))

    def save_bytes(self, content):
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch.update({str: save_str, bytes: save_bytes, type: save_global, type(len): save_global})


def python2_pickle(content):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(content)
    return file.getvalue()


KEYS = ["0-n0002-n0002_1.JPEG", "1-n0001-n0001_5.JPEG", "2-n0002-n0002_9.JPEG"]


@pytest.mark.parametrize("keys", [KEYS, np.array(KEYS), np.array(KEYS, object), np.array([k.encode() for k in KEYS])])
@pytest.mark.parametrize("write", [python2_pickle, lambda c: pickle.dumps(c, 2), pickle.dumps,
                                   lambda c: pickle.dumps(c, 5)])  # fmt: skip
def test_published_embeddings_are_read(tmp_path, keys, write):
    vectors = np.random.default_rng(0).random((3, 640))
    path = tmp_path / "train_embeddings.pkl"
    path.write_bytes(write({"embeddings": vectors, "keys": keys}))
    z, labels, classes, images = read_embeddings(path)
    assert torch.equal(z, torch.from_numpy(vectors.astype(np.float32))) and z.dtype == torch.float32
    assert labels.tolist() == [1, 0, 1] and labels.dtype == torch.int64 and classes == ["n0001", "n0002"]
    assert images == ["n0002_1.JPEG", "n0001_5.JPEG", "n0002_9.JPEG"]


def test_python2_pickle_is_one():
    content = python2_pickle({"embeddings": np.zeros((1, 2), np.float32), "keys": np.array(["0-a-a_1"], object)})
    assert b"numpy.core.multiarray\n_reconstruct" in content and b"_codecs" not in content
    read = pickle.loads(content, encoding="latin1")
    assert read["keys"].tolist() == ["0-a-a_1"]


class Call:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("function, arguments, name", [
    (os.system, ("touch {}",), "posix.system|nt.system"), (eval, ("1",), "builtins?(__)?.eval"),
    (getattr, ("a", "upper"), "builtins?(__)?.getattr"), (torch.load, ("x",), "torch.serialization.load"),
    (np.load, ("x",), "numpy.load"), (np.lib.npyio.NpzFile, ("x",), "NpzFile"), (open, ("{}", "w"), "open"),
])  # fmt: skip
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle_is_refused_not_run(tmp_path, function, arguments, name, protocol):
    made, path = tmp_path / "made", tmp_path / "x.pkl"
    call = Call(function, *(a.format(made) for a in arguments))
    path.write_bytes(pickle.dumps({"embeddings": np.zeros((1, 2)), "keys": [call]}, protocol))
    with pytest.raises(ValueError, match=f"asks for .*({name}).*malicious"):
        read_embeddings(path)
    assert not made.exists()


class Raw:
    """An array as a pickle may describe it, whether or not such an array can be."""

    def __init__(self, dtype, data, shape=(1,)):
        self.state = dtype, data, shape

    def __reduce__(self):
        dtype, data, shape = self.state
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data)


class Type(Call):
    def __init__(self, name, state):
        super().__init__(np.dtype, name, False, True)
        self.made = (*self.made, state)


@pytest.mark.parametrize("array, message", [
    # raw bytes as pointers to objects: NumPy's own functions would follow them
    (Raw(Type("V8", (3, "|", None, ("a",), {"a": (np.dtype(object), 0)}, 8, 1, 0)), b"A" * 8), "arrays of type 'V8'"),
    (Raw(Type("O8", (3, "|", None, None, None, -1, -1, 0)), b"A" * 8), "objects that are not strings"),
    (Raw(Type("i8", (3, "<", None, ("a",), {"a": (np.dtype("i8"), 0)}, 8, 1, 0)), b"A" * 8), "arrays with fields"),
    (np.array([{}], object), "objects that are not strings"), (np.zeros(1, "M8[s]"), "arrays of type 'M8'"),
    (Raw(Type("f4", (3, "<", None, None, None, -1, -1, 0)), b"A" * 8, (1 << 40,)), "truncated or corrupt"),
    (Call(np.ndarray, (1 << 40,)), "truncated or corrupt"),
])  # fmt: skip
def test_arrays_that_lie_about_memory_are_refused(tmp_path, array, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"embeddings": array, "keys": ["0-a-a_1"]}, 2))
    with pytest.raises(ValueError, match=message):
        read_embeddings(path)


@pytest.mark.parametrize("content, message", [
    # a name, and an order to give what it stands for another state: it would outlast the reading
    (b"c_codecs\nencode\n(dX\x0c\x00\x00\x00__defaults__(X\x06\x00\x00\x00latin1tsb.", "a function with another state"),
    (b"c_codecs\nencode\n.", "asks for a function"), (pickle.dumps({"embeddings": {1, 2}}), "asks for a set"),
    (pickle.dumps([bytearray(b"x")], 5), "asks for a bytearray"), (pickle.dumps(np.dtype("f4")), "asks for a type"),
])  # fmt: skip
def test_only_numbers_strings_and_arrays_come_out(tmp_path, content, message):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pickle(tmp_path / "x.pkl")


def test_lists_that_share_lists_are_read_once(tmp_path):
    content = ["end"]
    for _ in range(60):
        content = [content, content]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    read = read_pickle(tmp_path / "x.pkl")
    for _ in range(60):
        assert read[0] is read[1]
        read = read[0]
    assert read == ["end"]


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_are_read_as_they_were_written(tmp_path, protocol):
    g = np.random.default_rng(0)
    content = {
        "f": g.normal(size=(3, 4)).astype(np.float32), "big": np.arange(6).astype(">i4").reshape(2, 3),
        "fortran": np.asfortranarray(g.normal(size=(3, 2))), "text": np.array(["ab", "c"]),
        "bytes": np.array([b"x", b"yz"]), "objects": np.array(["ab", "c"], object), "scalar": np.float64(1.5),
        "flag": np.array([True, False]), "tuple": (1, [2]), "empty": np.zeros((0, 5)),
        "half": np.zeros(2, np.float16), "point": np.array(3),
    }  # fmt: skip
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    read = read_pickle(path)
    assert read.keys() == content.keys()
    for key, value in content.items():
        assert np.array_equal(read[key], value) if key != "tuple" else read[key] == value, key
        assert getattr(read[key], "shape", ()) == getattr(value, "shape", ())


@pytest.mark.parametrize("content, message", [
    ({"embeddings": np.array([["a"]]), "keys": ["0-a-a_1"]}, "embeddings that are not numbers"),
    ({"embeddings": np.ones((1, 2)), "keys": 5}, "has no list of keys"),
    ({"embeddings": np.ones((0, 2)), "keys": []}, "has no list of keys"),
    ({"embeddings": np.full((1, 2), np.nan), "keys": ["0-a-a_1"]}, "embeddings that are not finite"),
    ([1, 2], "not a dict of 'embeddings' and 'keys'"), ({"embeddings": np.zeros((1, 2))}, "not a dict"),
    ({"embeddings": np.zeros((2, 3)), "keys": ["0-a-a_1"]}, r"shape \(2, 3\) and 1 keys"),
    ({"embeddings": np.zeros((1, 3)), "keys": ["a_1"]}, "has the key 'a_1'; expected index-class-image"),
])  # fmt: skip
def test_other_pickles_are_told_apart(tmp_path, content, message):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_embeddings(path)
    path.write_bytes(pickle.dumps(content)[:-5])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        read_embeddings(path)
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "absent.pkl")


def test_dropout_of_a_block_keeps_the_mean():
    plain, dropping = (Block(8, 8, 1, share).train() for share in (0.0, 0.5))
    dropping.load_state_dict(plain.state_dict())
    x, g = torch.rand(4, 8, 6, 6, generator=generator()), generator(1)
    with torch.no_grad():
        wanted, found = plain(x), torch.stack([dropping(x, g) for _ in range(400)]).mean(0)
    assert (found - wanted).norm() < 0.15 * (wanted - x).norm()


def test_an_update_is_a_step_of_sgd_on_the_cross_entropy():
    model, twin, y = small(dropout=0.0), small(dropout=0.0), torch.arange(12) % 6
    model.labels, model.opt = y, [torch.optim.SGD(model.parameters(), lr=0.1)]
    model.step(random_images(12), torch.arange(12), generator())
    x = augment(random_images(12), 20, generator(), **twin.augmentation)
    F.cross_entropy(twin.net((x - 0.5) / 0.25), y).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-4, atol=1e-5)


def test_boxes_lie_anywhere_in_the_image():
    boxes = random_boxes(4000, generator(), area=0.3, aspect=1.0, flip=False)
    place = boxes[:, :2] / (1 - boxes[:, 2:]).clamp_min(1e-6)
    assert (place.mean(0).abs() < 0.05).all() and place.std(0).tolist() == pytest.approx([3**-0.5] * 2, rel=0.05)


def test_training_views_and_rates_are_those_of_the_docstring():
    model = Supervised(3, 84, depth=10, width=1)
    assert model.augmentation == {"area": 0.35, "aspect": 4 / 3, "color": 0.4, "flip": True}
    assert model.optimizers()[0].defaults["lr"] == 0.1 and model.optimizers()[0].defaults["weight_decay"] == 5e-4
