"""The built-in dataset: the recipe's parts, the shape of the whole, its splits, its hash and its cache."""

import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from umeta_core import glyphs as glyphs_module
from umeta_core.glyphs import (
    CONTENT_SHA256,
    FACES,
    REFERENCE_FACES,
    alike,
    content_hash,
    draw,
    fill,
    font_files,
    glyphs,
    make_glyphs,
    open_faces,
    outline,
    shrink,
    signed_distance,
    unpack,
)
from umeta_core.storage import cache_folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="session")
def data(cache):
    """From the reader's cache, if the book has drawn them."""
    made = glyphs(cache_folder(), progress=False)
    for path in cache_folder().glob("glyphs-*.npz"):
        (cache / path.name).symlink_to(path.resolve())
    return made


@pytest.fixture(scope="module")
def sans():
    return open_faces()[FACES.index("DejaVuSans")]


def code_points(data):
    return [ord(unicodedata.lookup(name)) for name in data["class_names"]]


def polygon(*corners):
    corners = np.array(corners, float)
    return np.stack([corners, np.roll(corners, -1, 0)], 1)


def test_fill_follows_the_winding_rule():
    square = polygon((0, 0), (0, 100), (100, 100), (100, 0))
    hole = polygon((25, 25), (75, 25), (75, 75), (25, 75))
    ink = fill([square, np.concatenate([square, hole]), np.concatenate([square, hole[:, ::-1]])])
    assert ink.sum((1, 2)).tolist() == [80 * 80, 80 * 80 - 40 * 40, 80 * 80]
    assert ink[0, 24:104, 24:104].all()


def test_fill_agrees_with_the_font_renderer(sans):
    """Against FreeType's own bitmap of the same letters, scaled alike: only pixels on the edge may differ."""
    for letter in "AgQ&":
        ink = fill([outline(sans, ord(letter))])[0]
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        ours = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        sans.clear()
        sans.set_text(letter)
        sans.draw_glyphs_to_bitmap(antialiased=True)
        theirs = np.asarray(sans.get_image())
        theirs = theirs[np.flatnonzero(theirs.any(1))][:, np.flatnonzero(theirs.any(0))]
        y, x = (((np.arange(n) + 0.5) / n * m).astype(int) for n, m in zip(ours.shape, theirs.shape, strict=True))
        assert (ours != (theirs[np.ix_(y, x)] > 127)).mean() < 0.03, letter


def test_signed_distance_is_euclidean(sans):
    ndimage = pytest.importorskip("scipy.ndimage")
    ink = fill([outline(sans, ord(letter)) for letter in "R@"])
    for one, distance in zip(ink, signed_distance(ink), strict=True):
        exact = np.where(one, ndimage.distance_transform_edt(one) - 0.5, 0.5 - ndimage.distance_transform_edt(~one))
        near = np.abs(exact) < glyphs_module.REACH
        assert np.abs(exact - distance / 8)[near].max() <= 1 / 16
        assert np.abs(distance[~near]).min() >= 8 * glyphs_module.REACH - 4


def test_shrink_averages_areas():
    random = np.random.default_rng(0).random((3, 105, 105)) > 0.5
    fine = np.repeat(np.repeat(random, 4, -1), 4, -2).reshape(3, 28, 15, 28, 15)
    assert np.array_equal(shrink(random), np.rint(255 * fine.mean((2, 4))))
    assert (shrink(np.ones((105, 105), bool)) == 255).all()


def test_look_alikes_are_found(sans):
    letters = "oOAΑАeèDĐ8B"
    same = alike(signed_distance(fill([outline(sans, ord(letter)) for letter in letters])))
    pairs = {letters[i] + letters[j] for i, j in np.argwhere(np.triu(same, 1))}
    assert pairs == {"oO", "AΑ", "AА", "ΑА"}


def test_a_drawing_depends_on_its_character_and_the_seed_alone(sans):
    lines = [outline(sans, ord("R"))]
    first, again, other = draw(82, lines, 5, seed=3), draw(82, lines, 5, seed=3), draw(82, lines, 5, seed=4)
    assert first.tobytes() == again.tobytes()
    assert (first != other).any((1, 2)).all()
    assert (first[0] != first[1]).any()


def test_remaking_gives_the_same_bytes(data, monkeypatch):
    wanted = [*range(0, len(data["split"]), 200), len(data["split"]) - 1]
    classes = [(code_points(data)[i], data["scripts"][i]) for i in wanted]
    monkeypatch.setattr(glyphs_module, "choose_classes", lambda faces: classes)
    again = make_glyphs(progress=False)
    for name in data:
        assert np.array_equal(again[name], data[name][wanted]), name


def test_shapes_and_sizes(data):
    classes = len(data["class_names"])
    assert classes >= 1200 and len(set(data["scripts"])) >= 12
    assert len(set(data["class_names"])) == classes == len(data["scripts"]) == len(data["split"])
    assert data["images28"].shape == (classes, 20, 28, 28) and data["images28"].dtype == np.uint8
    assert data["images105"].shape == (classes, 20, 105, 14)
    some = unpack(data["images105"][::50])
    assert some.shape[2:] == (105, 105) and set(np.unique(some)) == {0, 255}
    assert np.array_equal(shrink(some > 0), data["images28"][::50])


def test_splits_are_by_script(data):
    parts = [set(data["scripts"][data["split"] == part]) for part in (0, 1, 2)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    train, val, test = np.bincount(data["split"])
    assert train >= 0.6 * len(data["split"]) and val >= 100 and test >= 250
    assert len(parts[1]) >= 3 and len(parts[2]) >= 5
    assert max(np.unique(data["scripts"], return_counts=True)[1]) <= 60


def test_every_drawing_shows_something(data):
    ink = (data["images28"] / 255).sum((2, 3))  # in pixels of 28x28
    assert ink.min() > 8 and ink.max() < 0.5 * 28 * 28
    drawings = data["images28"].reshape(-1, 28 * 28)
    assert len({drawing.tobytes() for drawing in drawings}) == len(drawings)


def test_no_two_classes_have_the_same_clean_raster(data):
    """In each reference face, two filled outlines share under 98 % of their union (a dot may tell them apart)."""
    codes = code_points(data)
    for name, face in zip(FACES, open_faces(), strict=True):
        if name not in REFERENCE_FACES:
            continue
        known = face.get_charmap()
        lines = [outline(face, code) for code in codes if code in known]
        ink = np.concatenate([fill(lines[i : i + 64])[:, 1::2, 1::2] for i in range(0, len(lines), 64)])
        ink = ink.reshape(len(ink), -1).astype(np.float32)
        both = ink @ ink.T
        overlap = both / (ink.sum(1)[:, None] + ink.sum(1) - both)
        np.fill_diagonal(overlap, 0)
        assert overlap.max() < 0.98, name


def test_pixels_are_not_enough(data):
    """Nearest neighbor on pixels, 5-way 1-shot on the test scripts: about as hard as Omniglot, far above chance."""
    random = np.random.default_rng(0)
    images = data["images28"][data["split"] == 2].reshape(-1, 20, 28 * 28) / np.float32(255)
    right = []
    for _ in range(300):
        chosen = images[random.permutation(len(images))[:5]][:, random.permutation(20)[:6]]
        support, query = chosen[:, 0], chosen[:, 1:].reshape(25, -1)
        nearest = ((query[:, None] - support) ** 2).sum(-1).argmin(1)
        right.append((nearest == np.arange(25) // 5).mean())
    assert 0.40 < np.mean(right) < 0.60


def test_content_hash(data):
    assert content_hash(data) == CONTENT_SHA256


def test_cached_reload_is_equal_and_silent(data, cache, monkeypatch):
    monkeypatch.setattr(glyphs_module, "make_glyphs", lambda *_, **__: pytest.fail("made again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = glyphs(cache, progress=False)
    assert all(np.array_equal(again[name], data[name]) for name in data)
    assert [path.suffix for path in cache.glob("[!.]*")] == [".npz"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "encrypted", "compressed"])
def test_a_damaged_cache_is_made_again(data, tmp_path, monkeypatch, damage):
    few = {name: array[::100] for name, array in data.items()}
    monkeypatch.setattr(glyphs_module, "make_glyphs", lambda *_, **__: few)
    glyphs(tmp_path, seed=1)
    (path,) = tmp_path.glob("*.npz")
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")  # its first entry: 8 bytes on, flags; 10 bytes on, the compression
    at = {"flipped": len(content) // 2, "encrypted": directory + 8, "compressed": directory + 10}.get(damage)
    if at:
        content[at] ^= 255 if damage == "flipped" else 1
    path.write_bytes({"cut": content[:1000], "text": b"not an archive"}.get(damage, content))
    with pytest.warns(UserWarning, match="damaged"):
        glyphs(tmp_path, seed=1)
    again = glyphs(tmp_path, seed=1)
    assert all(np.array_equal(again[name], few[name]) for name in few)


def test_of_several_runs_one_draws(data, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    drawn, few = [], {name: array[::100] for name, array in data.items()}
    monkeypatch.setattr(glyphs_module, "make_glyphs", lambda *_, **__: drawn.append(time.sleep(0.2)) or few)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: glyphs(tmp_path, seed=1), range(2)))
    assert len(drawn) == 1 and all(np.array_equal(each["images28"], few["images28"]) for each in found)


def test_other_content_warns(data, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs_module, "make_glyphs", lambda *_, **__: {name: data[name][::100] for name in data})
    with pytest.warns(UserWarning, match="differ from the reference"):
        glyphs(tmp_path)


def test_missing_fonts_are_named(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="DejaVuSans.ttf.*install matplotlib"):
        font_files()
