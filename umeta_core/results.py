"""Records of our runs, the published numbers, and the comparison between them.

A *record* is one JSON file per experiment row and seed, ``results/<paper>/<row>-<scale>-seed<k>.json``.
A *published number* is one line of ``results/paper/<paper>.csv``; how those files were made and checked is told in
``results/paper/NOTES.md``. All accuracies and intervals here are percentages, and every interval is the half-width of
a 95 % interval over tasks (LEO's published ones are standard deviations over five runs).
"""

import base64
import csv
import datetime
import json
import math
import os
import platform
import re
import statistics
import struct
import subprocess
import zlib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# The copy that comes with the package: under the prefix that it was installed with, be it --user or --prefix.
_PREFIXES = Path(__file__).resolve().parents[3:5]  # PREFIX/Lib/site-packages on Windows, else .../lib/python3.x/...
_PLACES = [prefix / "share" / "umeta" / "results" for prefix in _PREFIXES] or [Path("share/umeta/results")]
INSTALLED = next((place for place in _PLACES if place.is_dir()), _PLACES[-1])
RECORDS_URL = "https://github.com/umeta-book/umeta/blob/main/results"
VERDICTS = ("reproduced", "higher", "lower", "reduced budget", "not run", "no published number")
TOLERANCE = 1.5  # percentage points: a difference this small is called reproduced whatever the intervals say

# The papers' dataset names and ours. A name that is missing here is its own.
DATASETS = {"Omniglot": "omniglot", "miniImageNet": "mini_imagenet", "MNIST": "mnist", "CelebA-attributes": "celeba",
            "tieredImageNet": "tiered_imagenet", "CelebA-identity": "celeba_identity",
            "miniImageNet (ImageNet meta-training)": "imagenet"}  # fmt: skip

_NUMBER, _TEXT = (int, float), (str,)
FIELDS = {
    "paper": _TEXT, "table": _TEXT, "row": _TEXT, "method": _TEXT, "embedding": _TEXT, "variant": _TEXT,
    "dataset": _TEXT, "scale": _TEXT, "seed": (int,), "steps": (int,), "paper_steps": (int,),
    "tasks_per_step": (int,), "cells": (list,), "seconds": _NUMBER, "device": _TEXT,
    "commit": (str, type(None)), "versions": (dict,), "protocol": (dict,), "notebook": (str, type(None)),
    "created": _TEXT,
}  # fmt: skip
CELL_FIELDS = {"way": (int,), "shot": (int,), "query": (int,), "accuracy": _NUMBER, "ci95": _NUMBER, "tasks": (int,)}
SCALES = ("smoke", "quick", "full")


def results_folder(folder=None) -> Path:
    """The records: the argument, ``$UMETA_RESULTS``, the repository's folder, the installed copy, or ``./results``."""
    if folder is not None:
        return Path(folder).expanduser()
    if os.environ.get("UMETA_RESULTS"):
        return Path(os.environ["UMETA_RESULTS"]).expanduser()
    return next((own for own in (REPOSITORY / "results", INSTALLED) if own.is_dir()), Path("results"))


def own_folder(folder=None) -> Path:
    """Where new records go: `results_folder`, but never into the installed copy, ``./results`` then."""
    found = results_folder(folder)
    return Path("results") if found == INSTALLED else found


# Published numbers -------------------------------------------------------------------------------------------------


def published(paper: str, folder=None) -> list[dict]:
    """Every published number of ``paper``, in the order of its CSV file.

    Returns dicts with the CSV's columns. ``value`` is a float in percent, or the printed text where the paper gives
    none; ``ci`` is a float or None; ``way`` and ``shot`` are ints or None.

    Raises FileNotFoundError, naming the papers there are, when there is no such file.
    """
    roots = (results_folder(folder), REPOSITORY / "results", INSTALLED)
    for root in roots:
        path = root / "paper" / f"{paper}.csv"
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                return [_typed(row) for row in csv.DictReader(file)]
    files = (path for root in roots for path in (root / "paper").glob("*.csv"))
    known = sorted({path.stem for path in files if "hparams" not in path.stem})
    hint = f"known papers: {', '.join(known)}" if known else "run in a clone of the repository, or set UMETA_RESULTS"
    raise FileNotFoundError(f"no published numbers for {paper!r}; {hint}")


def _typed(row: dict) -> dict:
    row = dict(row, table=row["table"].strip())
    for name, convert in (("value", float), ("ci", float), ("way", int), ("shot", int)):
        text = row.get(name, "")
        try:
            row[name] = convert(text)
        except ValueError:
            row[name] = text if name == "value" else None
    return row


# Records -----------------------------------------------------------------------------------------------------------


def check_record(record: dict, source: str = "record") -> None:
    """Raise ValueError, naming the field, unless ``record`` has every required field with a sensible value."""
    if not isinstance(record, dict):
        raise ValueError(f"{source}: a record is a JSON object, not {type(record).__name__}")
    _check_fields(record, FIELDS, source)
    if record["scale"] not in SCALES:
        raise ValueError(f"{source}: scale is {record['scale']!r}, must be one of {', '.join(SCALES)}")
    if not record["cells"]:
        raise ValueError(f"{source}: cells is empty, a record needs at least one measured number")
    for number, cell in enumerate(record["cells"]):
        _check_fields(cell, CELL_FIELDS, f"{source}: cell {number}")
        if not 0 <= cell["accuracy"] <= 100 or not 0 <= cell["ci95"] <= 100:
            raise ValueError(f"{source}: cell {number}: accuracy and ci95 are percentages, between 0 and 100")


def _check_fields(mapping: dict, fields: dict, source: str) -> None:
    for name, types in fields.items():
        if name not in mapping:
            raise ValueError(f"{source}: field {name!r} is missing")
        value = mapping[name]
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{source}: field {name!r} is {value!r}, must be {wanted}")


def record_path(paper: str, row: str, scale: str, seed: int, folder=None) -> Path:
    """Where a record lives: ``<folder>/<paper>/<row>-<scale>-seed<seed>.json``."""
    return results_folder(folder) / paper / f"{row}-{scale}-seed{seed}.json"


def check_writable(folder) -> None:
    """Raise OSError, before any work is done, if no file can be written to the folder, which is made if need be."""
    probe = Path(folder) / f".{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another folder") from None


def write_record(record: dict, folder=None) -> Path:
    """Check ``record``, write it in one step (a reader never sees half a file), and return its path."""
    from .storage import write_json

    check_record(record)
    path = record_path(record["paper"], record["row"], record["scale"], record["seed"], own_folder(folder))
    return write_json(record, path)


def read_record(path) -> dict:
    """Read and check one record. Raises ValueError that names the file when it is not a valid record."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete the file and run the row again") from None
    check_record(record, str(path))
    return record


def read_records(paper: str, folder=None) -> list[dict]:
    """All records of ``paper``, sorted by file name; each has its path in an extra field ``file``."""
    paths = sorted((results_folder(folder) / paper).glob("*.json"))
    return [dict(read_record(path), file=str(path)) for path in paths]


def pack_counts(counts: list[int]) -> str:
    """Right answers of every task, each below 65,536, as a short text for a record: 16 bits, zlib, base64."""
    return base64.b64encode(zlib.compress(struct.pack(f"<{len(counts)}H", *counts), 9)).decode()


def unpack_counts(text: str) -> list[int]:
    """The inverse of `pack_counts`. Raises ValueError if the text is damaged."""
    try:
        raw = zlib.decompress(base64.b64decode(text, validate=True))
        return list(struct.unpack(f"<{len(raw) // 2}H", raw))
    except (ValueError, zlib.error, struct.error) as error:
        raise ValueError(f"the answers of a record are damaged ({error}); run the row again") from None


def difference(a: dict, b: dict) -> tuple[float, float]:
    """Accuracy of a cell less that of another, of rows on one dataset, and the half-width of its 95 % interval.

    The interval is of the differences task by task where both cells keep their answers to the same tasks
    (eq-paired), else that of two independent means, which is too wide for rows that have met the same tasks.
    """
    gap = a["accuracy"] - b["accuracy"]
    if any("answers" not in cell for cell in (a, b)) or _tasks_of(a) != _tasks_of(b):
        return gap, math.hypot(a["ci95"], b["ci95"])
    left, right = (unpack_counts(cell["answers"]["correct"]) for cell in (a, b))
    of_tasks = [100 * (x - y) / (a["way"] * a["query"]) for x, y in zip(left, right, strict=True)]
    return gap, 1.96 * statistics.pstdev(of_tasks) / math.sqrt(len(of_tasks))


def _tasks_of(cell: dict) -> tuple:
    return (*(cell[name] for name in ("way", "shot", "query", "tasks")), cell["answers"]["seed"])


def provenance(device="cpu") -> dict:
    """Where a number came from: commit, whether the code differed from it, versions, device name, time (UTC).

    A preloaded library, which may replace PyTorch's matrix products, is named, too.
    """
    import numpy
    import torch

    here = _git("ls-files", "--error-unmatch", "umeta_core/__init__.py")  # not some other repository around a copy
    commit = here and _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "umeta_core")
    return {
        "commit": commit,
        "dirty": bool(changes) or commit is None,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": numpy.__version__},
        "device": device_name(device),
        **({"tf32": torch.backends.cudnn.allow_tf32} if torch.device(device).type == "cuda" else {}),
        **({"preloaded": preloaded} if (preloaded := _preloaded()) else {}),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _preloaded() -> list[str]:
    return [Path(library).name for library in re.split(r"[:\s]+", os.environ.get("LD_PRELOAD", "")) if library]


def _git(*arguments):
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=30,
                              check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def device_name(device) -> str:
    """The name of the GPU, or of the processor with the number of threads that torch uses."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name} ({torch.get_num_threads()} threads)"


# Comparison --------------------------------------------------------------------------------------------------------


def verdict(paper, paper_ci, ours, ci95=0.0, spread=None, reduced=False) -> str:
    """Say in a word how a measured number stands beside the published one (all arguments in percent).

    *reproduced*: the difference is at most the largest of 1.5 points, twice the standard deviation over seeds
    (``spread``; None for fewer than three), and the two intervals together (eq-verdict-tolerance). *higher* and
    *lower* are what they say. *reduced budget*: the run was smaller than the paper's, so the difference is shown but
    not judged.
    """
    if ours is None:
        return "not run"
    if not isinstance(paper, _NUMBER):
        return "no published number"
    if reduced:
        return "reduced budget"
    if abs(ours - paper) <= max(TOLERANCE, 2 * (spread or 0.0), (paper_ci or 0.0) + ci95):
        return "reproduced"
    return "higher" if ours > paper else "lower"


def matches(number: dict, record: dict) -> bool:
    """Whether a record measures a published number (the cell aside).

    In the record's own table every setting has to agree. Main-text tables repeat appendix numbers with fewer
    settings printed, so there the printed settings have to be among the record's.
    """
    if record["dataset"] != DATASETS.get(number["dataset"], number["dataset"]):
        return False
    if (record["method"], record["embedding"]) != (number["method"], number["embedding"]):
        return False
    if record["table"] == number["table"]:
        return record["variant"] == number["variant"]
    if "ledger" in (record["table"], number["table"]):  # where choices stand that are not the paper's
        return False
    return _settings(number["variant"]) <= _settings(record["variant"])


def _settings(variant: str) -> set:
    """The settings of a variant, "a;b: remark" -> {"a", "b"}."""
    return {part.split(":")[0].strip() for part in variant.split(";") if part.strip()}


def is_reduced(record: dict, cell: dict | None = None) -> bool:
    """Whether a run was smaller than the paper's: a smaller scale, a smaller budget, or a departure that is stated.

    A `cell` of the record is reduced also if it was measured on fewer tasks than another one.
    """
    few = cell is not None and cell["tasks"] < _most_tasks(record)
    return few or record["scale"] != "full" or budget(record) < record["paper_steps"] or bool(record.get("deviation"))


def _most_tasks(record: dict) -> int:
    return max(cell["tasks"] for cell in record["cells"])


def budget(record: dict) -> int:
    """The steps that a run was given; it made fewer if early stopping ended it."""
    return record.get("budget", record["steps"])


def compare(paper: str, table=None, dataset: str | None = None, folder=None) -> list[dict]:
    """Join every published number of a table with our records.

    Returns one dict per number with ``paper, paper_ci, ours, ci95, spread, difference, verdict``, the settings of the
    number, and ``seeds, scale, steps, budget, paper_steps, tasks, deviation, files`` of the records behind ``ours``
    (the mean over seeds); ``tasks`` is a pair, those of the cell and those of the record's largest cell. Where several
    runs measure the same number the largest counts. What we ran and the paper lacks follows, without a published value.
    ``dataset`` keeps one dataset by our name; it may be one that the paper does not have.

    Raises ValueError, naming the tables there are, for an unknown table.
    """
    numbers = published(paper, folder)
    records = read_records(paper, folder)
    tables = list(dict.fromkeys(entry["table"] for entry in [*numbers, *records]))
    records = [r for r in records if r["table"] != "search"]  # trials, on validation tasks
    if table is not None and str(table) not in tables:
        raise ValueError(f"{paper} has no table {table!r}; its tables: {', '.join(tables)}")
    places = {dataset} if dataset else {DATASETS.get(number["dataset"], number["dataset"]) for number in numbers}
    numbers = numbers + _unpublished(records, numbers, places)
    if table is not None:
        numbers = [number for number in numbers if number["table"] == str(table)]
    numbers = [number for number in numbers if DATASETS.get(number["dataset"], number["dataset"]) in places]
    return [_compared(number, records) for number in numbers]


def _unpublished(records: list[dict], numbers: list[dict], datasets: set) -> list[dict]:
    """Stand-ins for published numbers, from the records of what the paper does not print."""
    names = ("table", "dataset", "method", "embedding", "variant")
    ours = [(r, c) for r in records if r["dataset"] in datasets for c in r["cells"]
            if not any(matches(n, r) and n["metric"] == "accuracy" and (n["way"], n["shot"]) == (c["way"], c["shot"])
                       for n in numbers)]  # fmt: skip
    keys = dict.fromkeys((*(r[name] for name in names), c["way"], c["shot"]) for r, c in ours)
    rest = {"value": None, "ci": None, "metric": "accuracy", "notes": ""}
    return [dict(zip((*names, "way", "shot"), key, strict=True), **rest) for key in keys]


def _compared(number: dict, records: list[dict]) -> dict:
    settings = ("table", "dataset", "method", "embedding", "variant", "way", "shot", "metric", "notes")
    row = {name: number[name] for name in settings}
    row.update(paper=number["value"], paper_ci=number["ci"], ours=None, ci95=None, spread=None, difference=None)
    row.update(seeds=[], scale=None, steps=None, budget=None, paper_steps=None, tasks=None, deviation="", files=[])
    runs = _largest_run(number, records)
    if runs:
        cells = [cell for _, cell in runs]
        first = runs[0][0]
        row["ours"] = statistics.fmean(cell["accuracy"] for cell in cells)
        row["ci95"] = math.sqrt(sum(cell["ci95"] ** 2 for cell in cells)) / len(cells)
        row["spread"] = statistics.stdev(cell["accuracy"] for cell in cells) if len(cells) > 2 else None
        if isinstance(row["paper"], _NUMBER):
            row["difference"] = row["ours"] - row["paper"]
        row.update(seeds=[record["seed"] for record, _ in runs], files=[record["file"] for record, _ in runs])
        row.update(scale=first["scale"], steps=min(record["steps"] for record, _ in runs))
        row.update(budget=budget(first), paper_steps=first["paper_steps"], deviation=first.get("deviation", ""))
        row["tasks"] = min((cell["tasks"], _most_tasks(record)) for record, cell in runs)
    reduced = any(is_reduced(record, cell) for record, cell in runs)
    row["verdict"] = verdict(row["paper"], row["paper_ci"], row["ours"], row["ci95"], row["spread"], reduced)
    return row


def _largest_run(number: dict, records: list[dict]) -> list[tuple[dict, dict]]:
    """The (record, cell) pairs, one per seed, of the largest run that measures a published number; maybe none."""
    runs: dict = {}
    for record in records:
        if number["metric"] == "accuracy" and matches(number, record):
            for cell in record["cells"]:
                if (cell["way"], cell["shot"]) == (number["way"], number["shot"]):
                    size = (SCALES.index(record["scale"]), not record.get("deviation"), budget(record))
                    runs.setdefault((*size, record["row"]), []).append((record, cell))
    return runs[max(runs)] if runs else []


# Tables ------------------------------------------------------------------------------------------------------------

_HEADER = ("method", "way, shot", "paper", "ours", "difference", "verdict")


def _label(row: dict) -> str:
    return ", ".join(part for part in (row["method"], row["embedding"], row["variant"].replace(";", ", ")) if part)


def _interval(value, ci) -> str:
    if not isinstance(value, _NUMBER):
        return value or "-"
    return f"{value:.2f} ± {ci:.2f}" if ci is not None else f"{value:.2f}"


def _cells(row: dict) -> tuple:
    """One line of a table as text: what was measured, published, measured by us, difference, verdict."""
    verdict_text = row["verdict"]
    if row["scale"] not in (None, "full"):
        verdict_text += f" ({row['scale']})"
    if row["ours"] is not None and row["steps"] < row["paper_steps"]:
        early = "stopped early, " if row["steps"] < row["budget"] else ""
        verdict_text += f"; {early}{row['steps']:,} of {row['paper_steps']:,} steps"
    if row["tasks"] and row["tasks"][0] < row["tasks"][1]:
        verdict_text += f"; {row['tasks'][0]} of {row['tasks'][1]} tasks"
    if row["deviation"]:
        verdict_text += f"; {row['deviation']}"
    if len(row["seeds"]) > 1:
        verdict_text += f"; {len(row['seeds'])} seeds" + ("" if row["spread"] is None else f", std {row['spread']:.2f}")
    difference = "-" if row["difference"] is None else f"{row['difference']:+.2f}"
    place = f"{row['way']}, {row['shot']}" if row["way"] else row["metric"]
    return _label(row), place, _interval(row["paper"], row["paper_ci"]), _interval(row["ours"], row["ci95"]), \
        difference, verdict_text  # fmt: skip


def table_rows(paper, table=None, dataset=None, measured_only=False, folder=None, methods=()) -> list[dict]:
    """The rows of ``compare``, if asked only those that were run or whose method starts with one of `methods`."""
    rows = compare(paper, table, dataset, folder)
    rows = [row for row in rows if not methods or row["method"].startswith(tuple(methods))]
    return [row for row in rows if row["ours"] is not None] if measured_only else rows


def table_text(paper: str, table=None, dataset=None, measured_only: bool = False, folder=None) -> str:
    """The comparison for the terminal: aligned columns, then a count of each verdict."""
    rows = table_rows(paper, table, dataset, measured_only, folder)
    if not rows:
        return f"Nothing of this is {'measured' if measured_only else 'published'} in {results_folder(folder)}."
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    counts = [f"{sum(row['verdict'] == name for row in rows)} {name}" for name in VERDICTS]
    return "\n".join([*text, "", f"{len(rows)} numbers: " + ", ".join(c for c in counts if not c.startswith("0 "))])


def table_markdown(
    paper: str, table=None, dataset=None, measured_only=False, folder=None, name=None, caption=None, methods=()
) -> str:
    """The comparison as a Markdown table with a name and a caption; measured cells link to their records."""
    rows = table_rows(paper, table, dataset, measured_only, folder, methods)
    place = "" if table is None else f" Table {table}"
    name = name or "-".join(str(part) for part in ("tab", paper, table, dataset) if part is not None).replace(" ", "-")
    caption = caption or f"{paper}{place}: published and measured accuracy (%, 95 % interval over tasks)."
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + " --- |" * len(_HEADER)]
    ours = results_folder(folder).resolve() in ((REPOSITORY / "results").resolve(), INSTALLED.resolve())
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in _cells(row)]
        if row["files"]:
            first, *others = (f"{RECORDS_URL}/{paper}/{Path(file).name}" if ours else Path(file).resolve().as_uri()
                              for file in row["files"])
            more = "".join(f" [{number}]({url})" for number, url in enumerate(others, start=2))
            cells[3] = f"[{cells[3]}]({first}){more}"
        lines.append("| " + " | ".join(cells) + " |")
    return captioned(lines, caption, name)


def captioned(lines: list[str], caption: str, name: str) -> str:
    """A Markdown table with its caption: a numbered MyST ``table`` in the book, bold text above it in a notebook.

    A notebook does not understand MyST: roles in the caption (``{cite:t}``) are reduced to their text.
    """
    if os.environ.get("UMETA_BOOK"):
        return "\n".join([f":::{{table}} {caption}", f":name: {name}", "", *lines, ":::", ""])
    plain = re.sub(r"\{[\w:-]+\}`([^`]*)`", r"\1", caption)
    return "\n".join([f"**{plain}**", "", *lines, ""])
