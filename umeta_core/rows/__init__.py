"""The rows of the papers' tables as data, and how to find one."""

from __future__ import annotations

import difflib

from ..data import ABOUT, known
from ..results import matches, published
from . import cactus, lasium, leo, meta_gmvae
from .base import Row
from .plans import EMBEDDINGS, EmbeddingPlan, embedding_plan

__all__ = ["EMBEDDINGS", "ROWS", "EmbeddingPlan", "Row", "embedding_plan", "find_row", "more_rows", "on_dataset",
           "select_rows"]  # fmt: skip

ROWS = (*cactus.ROWS, *leo.ROWS, *lasium.ROWS, *meta_gmvae.ROWS)


def on_dataset(row: Row, dataset: str) -> Row:
    """The same experiment on another dataset that `load` knows; its slug then ends in the dataset's name.

    On one that the paper has, too, this is not the paper's row there, and says so.
    """
    if dataset == row.dataset:
        return row
    split = "cactus" if dataset == "omniglot" else None
    printed = dataset in {other.dataset for other in ROWS if other.paper == row.paper}
    departs = "; ".join(filter(None, [row.deviation, f"settings of {row.dataset}" if printed else ""]))
    return row.renamed(f"-{dataset.replace('_', '-')}", dataset=dataset, split_protocol=split, deviation=departs)


def find_row(slug: str, dataset: str | None = None) -> Row:
    """The row named `slug` (``oracle-maml``, or ``oracle-maml-glyphs`` for its move to another dataset).

    `dataset` asks for the paper's row on that dataset, or if it has none moves the row there. ValueError names the rows
    that are spelled alike.
    """
    by_slug = {row.slug: row for row in ROWS}
    if dataset is not None:
        _check_dataset(dataset)
        own = f"{slug}-{dataset.replace('_', '-')}"
        slug = own if own in by_slug else slug
    if slug in by_slug:
        return on_dataset(by_slug[slug], dataset or by_slug[slug].dataset)
    for place in dict.fromkeys((*ABOUT, *(row.dataset for row in ROWS))):
        row = by_slug.get(slug.removesuffix(f"-{place.replace('_', '-')}"))
        if row is not None:
            return on_dataset(row, dataset or place)
    near = difflib.get_close_matches(slug, by_slug, 5)
    raise ValueError(f"unknown row {slug!r}; " + (f"near: {', '.join(near)}; " if near else "")
                     + "umeta reproduce PAPER --list shows them all")  # fmt: skip


def select_rows(paper: str, table=None, names: str | None = None, dataset: str | None = None) -> list[Row]:
    """The rows of a paper's table, moved to `dataset` if given.

    Without `names` these are the rows that the paper prints. `names`, comma-separated parts of slugs, also finds what
    the paper lacks: more baselines and embeddings, cheaper variants (``-5way``), the mixing experiment.

    Raises ValueError, naming what there is, when nothing is left.
    """
    numbers = published(paper)
    rows = [row for row in ROWS if row.paper == paper]
    if table != "search":
        rows = [row for row in rows if not row.search or names and "search" in names]
    if table is not None:
        tables = {number["table"] for number in numbers} | {row.table for row in rows}
        if str(table) not in tables:
            raise ValueError(f"{paper} has no table {table!r}; its tables: {', '.join(sorted(tables))}")
        numbers = [number for number in numbers if number["table"] == str(table)]
        rows = [row for row in rows if row.table == str(table) or any(matches(n, vars(row)) for n in numbers)]
    if names is not None:
        parts = [part for name in names.split(",") if (part := name.strip())]
        rows = [row for row in rows if any(part in row.slug for part in parts)]
    elif numbers:
        rows = _closest(rows, numbers)
    if dataset is not None:
        _check_dataset(dataset)
        native = [row for row in rows if row.dataset == dataset]
        rows = native or [on_dataset(row, dataset) for row in rows if _moves(row, dataset)]
    if not rows:
        raise ValueError(_none_fits(paper, table, names, dataset))
    return rows


def _check_dataset(dataset: str) -> None:
    """ValueError for a name that neither a dataset has nor a row's classes, such as celeba_identity."""
    if dataset not in {row.dataset for row in ROWS}:
        known(dataset)


def _moves(row: Row, dataset: str) -> bool:
    """Whether a row can be moved: Omniglot's can, others where their embedding has a plan."""
    planned = row.needs_embedding and (row.fitted or row.embedding, dataset) in EMBEDDINGS
    return row.dataset == "omniglot" or row.dataset == "mini_imagenet" and planned


def _none_fits(paper: str, table, names: str | None, dataset: str | None) -> str:
    """Which filters left nothing, and what there is."""
    slugs = [row.slug for row in ROWS if row.paper == paper and table in (None, row.table)]
    if not any(row.paper == paper for row in ROWS):
        return f"{paper} has no rows to run; python -m umeta_core.rule_figures makes what its chapter shows"
    if names is not None and not names.strip(" ,"):
        return "--rows is empty; give parts of the rows' names, separated by commas, or leave it out"
    given = {"--table": table, "--rows": names, "--dataset": dataset}
    filters = " ".join(f"{name} {value}" for name, value in given.items() if value is not None)
    near = names and difflib.get_close_matches(names, slugs, 5, 0.5)
    return f"no row of {paper} fits {filters}; {'near' if near else 'there are'}: {', '.join(near or slugs)}; " \
           "a row is moved to another dataset by --rows NAME --dataset DATASET"


def _closest(rows: list[Row], numbers: list[dict]) -> list[Row]:
    """The rows that depart in nothing; for a number that none of them measures, the first row that does."""
    kept = set()
    for number in numbers:
        place = number["way"], number["shot"]
        there = [row for row in rows if matches(number, vars(row)) and place in row.tests]
        kept |= {row.slug for row in [row for row in there if not row.departs] or there[:1]}
    return [row for row in rows if row.slug in kept]


def more_rows(paper: str, table=None, dataset: str | None = None) -> list[Row]:
    """The rows that `select_rows` finds only by name."""
    every = ",".join(row.slug for row in ROWS if row.paper == paper)
    printed = {row.slug for row in select_rows(paper, table, None, dataset)}
    return [row for row in select_rows(paper, table, every, dataset) if row.slug not in printed]
