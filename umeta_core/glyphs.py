"""The built-in dataset: drawings of characters, made from the fonts that ship with matplotlib.

A stand-in for Omniglot that needs no download: a class is a character, a script is an alphabet, and every drawing is a
random face, pen width, rotation, shear, scale, shift and elastic distortion. The recipe is reference code, not in a
paper; its shape (20 drawings, 105x105 and 28x28, splits by alphabet) follows Omniglot (Lake et al., 2015).

One drawing: outline in font units -> filled on a 128x128 canvas -> signed distance to the outline -> warp -> threshold
(its level is the pen width) -> 105x105 ink -> 28x28 area averages.
"""

import hashlib
import os
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .storage import alone, atomic
from .storage import progress as with_progress

VERSION = 1
CONTENT_SHA256 = "2911c28d0beabe7ebf7b2ec8611e6c49f92ceeff266f2d5031dc751522fb9b1d"  # of images28 with seed 0
TRAIN, VAL, TEST = 0, 1, 2

# Script: (split, how many characters at most, ranges of code points). The order matters: of two characters that look
# alike the first stays, so the scripts held out for validation and test come early and keep theirs.
SCRIPTS = {
    "Latin": (TRAIN, 60, "0041-005A 0061-007A 0030-0039"),
    "Greek": (TRAIN, 60, "0391-03A9 03B1-03C9 0370-0377 03CF-03E1 03F0-03FF"),
    "Cyrillic": (TRAIN, 60, "0410-044F 0402-040F"),
    "Hebrew": (VAL, 60, "05D0-05EA FB29 FB4F"),
    "Armenian": (VAL, 60, "0531-0556 0561-0587"),
    "Old Italic": (VAL, 60, "10300-10323"),
    "Fraktur": (VAL, 60, "1D504-1D537 210C 2111 211C 2128 212D"),
    "Georgian Mkhedruli": (TEST, 60, "10D0-10FB"),
    "Georgian Asomtavruli": (TEST, 60, "10A0-10C5"),
    "Georgian Nuskhuri": (TEST, 60, "2D00-2D25"),
    "Arabic": (TEST, 60, "0621-064A 066E-06D5 0661-0669"),
    "Tifinagh": (TEST, 60, "2D30-2D65"),
    "Lao": (TEST, 60, "0E81-0EDD"),
    "N'Ko": (TEST, 60, "07C0-07FA"),
    "Ornaments": (TEST, 60, "2701-2767"),
    "Cree": (TRAIN, 60, "1401-14A0"),
    "Inuktitut": (TRAIN, 60, "14A1-150F"),
    "Blackfoot and Slavey": (TRAIN, 60, "1510-159F"),
    "Carrier": (TRAIN, 60, "15A0-1676"),
    "Extended Latin": (TRAIN, 60, "00C6 00D0 00D8 00DE-00DF 00E6 00F0 00F8 00FE 0110-0153 0180-024F"),
    "Phonetic": (TRAIN, 60, "0250-02AF"),
    "Medieval Latin": (TRAIN, 60, "2C60-2C7F A722-A7AA"),
    "Extended Cyrillic": (TRAIN, 60, "0460-0481 048A-052F A640-A66E"),
    "Calligraphic": (TRAIN, 60, "1D49C-1D4CF 210A-210B 2110 2112 211B 212C 212F-2131 2133-2134"),
    "Double-struck": (TRAIN, 60, "1D538-1D56B 2102 210D 2115 2119-211A 211D 2124 213C-2140"),
    "Letterlike": (TRAIN, 60, "20A0-20BD 2100-214B 00A2-00A9 00B5-00B6 0040 0026"),
    "Astrological": (TRAIN, 60, "263D-2653 26B3-26BC 2600-260D 2624-262F 2660-266F 2692-269C"),
    "Operators": (TRAIN, 60, "2200-226F"),
    "Relations": (TRAIN, 60, "2270-22FF"),
    "Functional": (TRAIN, 60, "2336-237A"),
    "Arrows": (TRAIN, 60, "2190-21FF"),
    "Geometric": (TRAIN, 60, "25A0-25FF"),
}

CANVAS, BOX = 128, 80  # pixels of the canvas, and of a glyph's longer side on it
REACH = 4  # distances are known up to this many canvas pixels
DRAWINGS = 20  # of each character
SIZE, SMALL = 105, 28  # pixels of the drawings
INK = 68  # pixels of a glyph's longer side on a 105x105 drawing, before its random size

# What is random in a drawing, uniform from minus to plus these: radians; ratio; log size; log of the aspect ratio;
# pixels to the side and down; canvas pixels at each knot of a 6x6 grid. The pen is so many canvas pixels wide.
ROTATION, SHEAR, GROWTH, ASPECT, SHIFT, ELASTIC, KNOTS = 0.25, 0.25, 0.2, 0.12, 7.0, 4.0, 6
PEN = (4.0, 9.0)

# Two characters look alike where, in one of these faces, less than this share of each one's ink is farther than so
# many canvas pixels from the other's.
REFERENCE_FACES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "STIXGeneralItalic")
ALIKE_PIXELS, ALIKE_SHARE = 3.5, 0.03

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmss10", "cmtt10"),
)


def glyphs(cache_dir: str | os.PathLike, seed: int = 0, progress: bool = True) -> dict[str, np.ndarray]:
    """The dataset as `make_glyphs` returns it, made once (about 20 seconds) and then read from `cache_dir`.

    The file is named after the recipe's version, the seed and a hash of the fonts; one that cannot be read is made
    again. For seed 0 the images are checked against `CONTENT_SHA256`. Another hash warns and does not fail: it means
    that matplotlib brought other fonts or that float64 rounded differently here, so a few pixels differ from those
    behind the published runs; the dataset is still sound, but accuracies may differ in the last digit.
    """
    path = Path(cache_dir) / f"glyphs-{VERSION}-{seed}-{_fonts_hash()[:12]}.npz"
    data = _read(path)
    if data is None:
        with alone(path):  # of several runs one draws, and the others read what it wrote
            data = _read(path)
            if data is None:
                if path.exists():
                    warnings.warn(f"{path} is damaged and is made again", stacklevel=2)
                data = make_glyphs(seed, progress)
                with atomic(path) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **data)
    if seed == 0 and content_hash(data) != CONTENT_SHA256:
        warnings.warn(
            "the glyphs differ from the reference ones: other fonts in this matplotlib, or other rounding; "
            "accuracies may differ slightly from those in the book",
            stacklevel=2,
        )
    return data


def content_hash(data: dict[str, np.ndarray]) -> str:
    """SHA-256 of `images28`, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(data["images28"])).hexdigest()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays in the file `path`; None: there is none, or it is damaged."""
    try:
        with np.load(path) as file:  # every array in it carries a checksum
            return {name: file[name] for name in ("images28", "images105", "class_names", "scripts", "split")}
    except Exception:  # a flipped bit may read as encryption or an unknown compression, each an error of its own
        return None


def make_glyphs(seed: int = 0, progress: bool = True) -> dict[str, np.ndarray]:
    """Draws every character 20 times; ink is 255 on 0. The same seed gives the same bytes.

    Returns `images28` uint8 `[classes, 20, 28, 28]`, `images105` uint8 `[classes, 20, 105, 14]` (packed bits:
    `unpack`), `class_names` and `scripts` (strings) `[classes]`, and `split` int8 `[classes]`: 0 train, 1
    validation, 2 test, the same for all classes of a script. Raises FileNotFoundError where matplotlib has no fonts.
    """
    faces = open_faces()
    classes = choose_classes(faces)
    outlines = [_outlines(face, [code for code, _ in classes]) for face in faces]
    small, packed = [], []
    for i, (code, _) in enumerate(with_progress(classes, len(classes), "drawing glyphs") if progress else classes):
        ink = draw(code, [of_face[i] for of_face in outlines if i in of_face], DRAWINGS, seed)
        small.append(shrink(ink))
        packed.append(np.packbits(ink, axis=-1))
    return {
        "images28": np.stack(small),
        "images105": np.stack(packed),
        "class_names": np.array([unicodedata.name(chr(code)) for code, _ in classes]),
        "scripts": np.array([script for _, script in classes]),
        "split": np.array([SCRIPTS[script][0] for _, script in classes], np.int8),
    }


def unpack(images105: np.ndarray) -> np.ndarray:
    """Packed bits `[..., 105, 14]` to uint8 `[..., 105, 105]`, ink 255."""
    return np.unpackbits(images105, axis=-1, count=SIZE) * np.uint8(255)


def font_files() -> list[Path]:
    """The font files of `FACES`. Raises FileNotFoundError where this matplotlib came without them."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    missing = [name for name in FACES if not (folder / f"{name}.ttf").exists()]
    if missing:
        raise FileNotFoundError(f"no {missing[0]}.ttf in {folder}: install matplotlib with pip, which brings its fonts")
    return [folder / f"{name}.ttf" for name in FACES]


def open_faces() -> list:
    """The faces as matplotlib's `FT2Font`, at a size of one pixel per font unit, where nothing needs rounding."""
    from matplotlib.ft2font import FT2Font

    faces = [FT2Font(str(path)) for path in font_files()]
    for face in faces:
        face.set_size(face.units_per_EM, 72)
    return faces


def _fonts_hash() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in font_files())).hexdigest()


# Which characters


def choose_classes(faces: list) -> list[tuple[int, str]]:
    """The classes as (code point, script), in the order of `SCRIPTS`, from the faces of `open_faces`.

    Candidates that a face can draw and that look like no earlier one; where a script has more than its limit, evenly
    spaced ones.
    """
    candidates = _candidates()
    confused = np.zeros((len(candidates), len(candidates)), bool)
    drawable = np.zeros(len(candidates), bool)
    for face in faces:
        outlines = _outlines(face, [code for code, _ in candidates])
        index = np.array(list(outlines))
        drawable[index] = True
        if Path(face.fname).stem in REFERENCE_FACES:
            distance = [signed_distance(fill(some)) for some in _batches(list(outlines.values()), 64)]
            confused[np.ix_(index, index)] |= alike(np.concatenate(distance))
    kept = []
    for i in np.flatnonzero(drawable):
        if not confused[i, kept].any():
            kept.append(i)
    classes = []
    for script, (_, most, _) in SCRIPTS.items():
        members = [candidates[i] for i in kept if candidates[i][1] == script]
        count = min(most, len(members))
        classes += [members[k * len(members) // count] for k in range(count)]
    return classes


def _candidates() -> list[tuple[int, str]]:
    """Letters, digits, punctuation and symbols, except letters with an accent, which are too near to the plain ones."""
    found = {}
    for script, (_, _, ranges) in SCRIPTS.items():
        for ends in ranges.split():
            first, last = int(ends.split("-")[0], 16), int(ends.split("-")[-1], 16)
            for code in range(first, last + 1):
                accented = unicodedata.decomposition(chr(code))[:1] not in ("", "<")
                if unicodedata.category(chr(code))[0] in "LNPS" and not accented:
                    found.setdefault(code, script)
    return list(found.items())


def alike(distance: np.ndarray) -> np.ndarray:
    """Which glyphs of one face look the same once they fill the same box: bool `[n, n]`, from `signed_distance`.

    o and O do, and Latin A and Greek Alpha; D and D with a stroke do not.
    """
    samples = torch.from_numpy(distance[:, 2::4, 2::4].reshape(len(distance), -1).copy())
    ink, far = (samples > 0).float(), (samples < -8 * ALIKE_PIXELS).float()
    stray = ink @ far.T / ink.sum(1, keepdim=True).clamp(min=1)
    return (torch.maximum(stray, stray.T) < ALIKE_SHARE).numpy()


def _batches(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


# Outlines, ink and distances


def _outlines(face, codes: list[int]) -> dict[int, np.ndarray]:
    """The outlines of the codes that this face can draw, by position in `codes`; blank glyphs are left out."""
    known = set(face.get_charmap())
    if Path(face.fname).stem.startswith("cm"):  # TeX's encodings: only letters and digits are where Unicode has them
        known = {code for code in known if code < 128 and chr(code).isalnum()}
    found = {i: outline(face, code) for i, code in enumerate(codes) if code in known}
    return {i: lines for i, lines in found.items() if len(lines)}


def outline(face, code: int) -> np.ndarray:
    """The outline of one character as lines `[n, 2, 2]` (start and end; x and y, up), in font units.

    Without hinting, so that every version of FreeType returns the same numbers. A quadratic curve becomes 8 lines. A
    blank glyph has none.
    """
    from matplotlib import ft2font

    face.load_char(code, flags=ft2font.LoadFlags.NO_HINTING if hasattr(ft2font, "LoadFlags") else 2)
    points, kinds = face.get_path()  # kinds: 1 move, 2 line, 3 quadratic (control point, then end), 79 close
    if not len(points):
        return np.zeros((0, 2, 2))
    begin = np.maximum.accumulate(np.where(kinds == 1, np.arange(len(kinds)), 0))
    points = np.where((kinds == 79)[:, None], points[begin], points)
    straight = np.flatnonzero((kinds == 2) | (kinds == 79))
    control = np.flatnonzero(kinds == 3)[::2]
    t = np.linspace(0, 1, 9)[:, None, None]
    curve = (1 - t) ** 2 * points[control - 1] + 2 * t * (1 - t) * points[control] + t**2 * points[control + 1]
    pieces = np.stack([curve[:-1], curve[1:]], 2).reshape(-1, 2, 2)
    return np.concatenate([np.stack([points[straight - 1], points[straight]], 1), pieces])


def fill(outlines: list[np.ndarray]) -> np.ndarray:
    """Ink of each outline, bool `[n, 128, 128]`: non-zero winding rule, the longer side 80 pixels, centered.

    All outlines at once, and our own scan conversion, so that no pixel depends on a rasterizer's version: every line
    adds its direction where it crosses a row of pixel centers, and the running sum along the row counts the turns.
    """
    glyph = np.repeat(np.arange(len(outlines)), [len(lines) for lines in outlines])
    lines = np.concatenate([_to_canvas(lines) for lines in outlines])
    (x0, y0), (x1, y1) = lines[:, 0].T, lines[:, 1].T
    first, last = np.ceil(np.minimum(y0, y1)).astype(int), np.ceil(np.maximum(y0, y1)).astype(int)
    crossed = last - first
    line = np.repeat(np.arange(len(lines)), crossed)
    row = first[line] + np.arange(len(line)) - np.repeat(np.cumsum(crossed) - crossed, crossed)
    x = x0[line] + (row - y0[line]) * ((x1 - x0)[line] / (y1 - y0)[line])
    pixel = (glyph[line] * CANVAS + row) * CANVAS + np.ceil(x).astype(int)
    turns = np.bincount(pixel, np.sign(y1 - y0)[line], len(outlines) * CANVAS**2)
    return np.cumsum(turns.reshape(-1, CANVAS, CANVAS), 2) != 0


def _to_canvas(lines: np.ndarray) -> np.ndarray:
    low, high = lines.min((0, 1)), lines.max((0, 1))
    return (lines - (low + high) / 2) * [1, -1] * (BOX / (high - low).max()) + (CANVAS - 1) / 2


def signed_distance(ink: np.ndarray) -> np.ndarray:
    """Distance to the ink's edge in eighths of a pixel, positive inside: bool to int8 `[n, 128, 128]`.

    Exact Euclidean distances between pixel centers, less half a pixel, cut off beyond `REACH`.
    """
    eighths = np.rint(8 * np.sqrt(np.arange((REACH + 1) ** 2 + 1)) - 4).astype(np.int8)
    return np.where(ink, eighths[_squared_distance(~ink)], -eighths[_squared_distance(ink)])


def _squared_distance(target: np.ndarray) -> np.ndarray:
    """To the nearest target pixel: along the rows, then along the columns, each a minimum over the shifts in reach."""
    distance = np.where(target, 0, (REACH + 1) ** 2).astype(np.uint8)
    for axis in (1, 2):
        nearest = distance.swapaxes(axis, 2)
        before = nearest.copy()
        for shift in range(1, REACH + 1):
            moved = before + np.uint8(shift**2)
            np.minimum(nearest[..., shift:], moved[..., :-shift], out=nearest[..., shift:])
            np.minimum(nearest[..., :-shift], moved[..., shift:], out=nearest[..., :-shift])
    return distance


# Drawings


def draw(code: int, outlines: list[np.ndarray], drawings: int, seed: int) -> np.ndarray:
    """Drawings of one character, bool `[drawings, 105, 105]`, from its outlines in the faces that have it.

    Depends on the arguments alone. Places are computed in float64 and rounded to 1/32 pixel, distances are in eighths
    and the canvas is a power of two wide: `grid_sample` then works on numbers that float32 holds exactly, and
    processors that add in another order draw the same ink.
    """
    generator = torch.Generator().manual_seed(seed * 0x110000 + code)
    random = 2 * torch.rand(drawings, 8 + 2 * KNOTS**2, generator=generator, dtype=torch.float64).numpy() - 1
    faces, choice = np.unique(((random[:, 0] + 1) / 2 * len(outlines)).astype(int), return_inverse=True)
    distance = signed_distance(fill([outlines[i] for i in faces]))
    thicker = _thicker(distance, random[:, 1], choice)
    places = _places(random[:, 2:8], random[:, 8:].reshape(-1, 2, KNOTS, KNOTS))
    warped = F.grid_sample(
        torch.from_numpy(distance[choice]).float()[:, None],
        torch.from_numpy(((2 * places + 1) / CANVAS - 1).astype(np.float32)),
        padding_mode="border",
        align_corners=False,
    )
    return warped[:, 0].numpy() > np.rint(-8 * thicker)[:, None, None]


def _thicker(distance: np.ndarray, random: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """How many canvas pixels outwards each drawing's edge moves, so that its strokes come near a random pen's width.

    A stroke of width w has w pixels of ink for every two at its rim. Hairlines must survive a thinner pen.
    """
    ink, rim = (distance > 0).sum((1, 2)), ((distance > 0) & (distance <= 4)).sum((1, 2))
    width = (2 * ink / rim)[choice]
    pen = PEN[0] + (random + 1) / 2 * (PEN[1] - PEN[0])
    return np.clip((pen - width) / 2, np.maximum(-0.2 * width, -2), 2)


def _places(random: np.ndarray, bumps: np.ndarray) -> np.ndarray:
    """Where on the canvas each pixel of a drawing looks, x and y: `[drawings, 105, 105, 2]`, whole 1/32 pixels.

    An affine map, and a smooth displacement: Gaussian bumps on a grid of knots (elastic distortion, Simard et al.,
    2003). `random` `[drawings, 6]` and `bumps` `[drawings, 2, 6, 6]` are uniform in [-1, 1].
    """
    angle, lean, growth, aspect = (random[:, :4] * [ROTATION, SHEAR, GROWTH, ASPECT]).T
    zero, one = np.zeros_like(lean), np.ones_like(lean)
    rotate = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)
    shear = np.stack([one, lean, zero, one], 1).reshape(-1, 2, 2)
    scale = BOX / INK * np.exp(np.stack([growth + aspect, growth - aspect], 1))
    affine = (scale[:, :, None] * (shear @ rotate))[..., None, None]
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    across, down = (axis - SHIFT * random[:, 4 + i, None] for i in (0, 1))
    linear = affine[:, :, 0] * across[:, None, None, :] + affine[:, :, 1] * down[:, None, :, None]
    knots = np.linspace(-SIZE / 2, SIZE / 2, KNOTS)
    bump = np.exp(-(((axis[:, None] - knots) / (knots[1] - knots[0])) ** 2))
    places = linear + ELASTIC * (bump @ bumps @ bump.T) + (CANVAS - 1) / 2
    return np.moveaxis(np.rint(32 * np.clip(places, 0, CANVAS - 1)) / 32, 1, -1)


def shrink(ink: np.ndarray) -> np.ndarray:
    """Ink, bool `[..., 105, 105]`, to gray area averages, uint8 `[..., 28, 28]`, all ink 255.

    A small pixel is 3.75 pixels wide, 15 quarters: with whole quarters as weights the sums are exact.
    """
    quarters = np.arange(4 * SIZE)
    weights = np.zeros((SMALL, SIZE), np.float32)
    np.add.at(weights, (quarters // 15, quarters // 4), 1)
    return np.rint(weights @ ink.astype(np.float32) @ weights.T * 255 / 15**2).astype(np.uint8)
