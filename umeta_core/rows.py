"""The rows of the papers' tables as data: what is embedded, where tasks come from, who learns, how it is tested."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .data import ABOUT, known
from .results import matches, published

TEST_QUERY = 5  # per class, always (CACTUs, section 4.1)


@dataclass(frozen=True)
class EmbeddingPlan:
    """How an embedding is fitted to a dataset. `epochs` maps a scale to epochs; "full" is the paper's.

    `kind` is the module of `umeta_core.embeddings`, `options` its keyword arguments. `whiten` asks for PCA whitening of
    the vectors before they are clustered and compared (ACAI on MNIST; CACTUs, App. D). `seconds` is what one epoch took
    with one thread of an AMD EPYC (Zen 5), for the printed plan; None where nobody has measured. `deviation` says where
    the full fit departs from the paper.
    """

    kind: str
    options: dict
    epochs: dict
    batch: int = 128
    whiten: bool = False
    seconds: float | None = None
    deviation: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a published table. `method`, `embedding` and `variant` are spelled as in ``results/paper``.

    `learner` is "protonets" or "maml", made with the keyword arguments `network` and `options`, or one of the
    baselines on embeddings: "knn", "linear", "mlp", "matching", "nearest-mean", "ridge". `source` is where training
    tasks come from: "labels", "clusters" (of the embedding, or of pixels), "hyperplanes", "random", "mixed" (clusters
    and the labels of a share of the classes), "attributes". `clusters` and `partitions` are k and P.

    `steps` maps a scale to the number of meta-training steps; "full" is the paper's. `tasks`, `way`, `shot`, `query`,
    `lr` and `clip` are those of meta-training; `tests` are (way, shot) pairs, each measured on `test_tasks` tasks.
    `deviation` says where even the full run departs from the paper; such a run is never called reproduced. `fitted`
    names the plan of the embedding if it is not the paper's (see `EMBEDDINGS`).
    """

    slug: str
    table: str
    method: str
    learner: str
    network: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    steps: dict = field(default_factory=lambda: {"smoke": 0, "quick": 0, "full": 0})
    tasks: int = 0
    query: int = 0
    variant: str = ""
    embedding: str = ""
    paper: str = "cactus"
    dataset: str = "omniglot"
    split_protocol: str | None = "cactus"
    source: str = "labels"
    inputs: str = "images"
    clusters: int = 0
    partitions: int = 0
    margin: float | None = None
    share: float = 0.0
    way: int = 20
    shot: int = 1
    lr: float = 1e-3
    clip: float | None = None
    tests: tuple = ((5, 1), (5, 5), (20, 1), (20, 5))
    test_tasks: dict = field(default_factory=lambda: {"smoke": 5, "quick": 100, "full": 1000})
    deviation: str = ""
    fitted: str = ""
    at_most: int | None = None

    @property
    def trained(self) -> bool:
        """Whether anything is meta-trained."""
        return self.steps["full"] > 0

    @property
    def needs_embedding(self) -> bool:
        return bool(self.embedding) and self.embedding != "pixels"

    @property
    def departs(self) -> str:
        """Where the row, or the embedding under it, departs from the paper even at full scale; "" if nowhere."""
        parts = (self.deviation, self.plan.deviation if self.needs_embedding else "")
        return "; ".join(part for part in parts if part)

    @property
    def plan(self) -> EmbeddingPlan:
        """How the row's embedding is fitted."""
        return embedding_plan(self.fitted or self.embedding, self.dataset)

    def budget(self, scale: str) -> int:
        """Training steps at `scale`, or `at_most` if that is fewer; the record then says "reduced budget"."""
        return min(self.steps[scale], self.steps[scale] if self.at_most is None else self.at_most)

    def stack(self, scale: str) -> int:
        """Partitions at `scale`: all P at full, ten at quick, two at smoke."""
        return min(self.partitions, {"smoke": 2, "quick": 10, "full": self.partitions}[scale])

    def least(self) -> int:
        """R: images of each class in a training task."""
        return self.shot + self.query

    def protocol(self) -> dict:
        """Every switch that moves a number, for the record."""
        training = {"train_way": self.way, "train_shot": self.shot, "train_query": self.query, "outer_lr": self.lr}
        training |= {} if self.clip is None else {"clip": self.clip}
        place = {"source": self.source, "split": self.split_protocol, "test_query": TEST_QUERY}
        place |= {} if self.inputs == "images" else {"inputs": self.inputs}
        place |= {"clusters": self.clusters, "partitions": self.partitions} if self.partitions else {}
        place |= {} if self.margin is None else {"margin": self.margin}
        place |= {"labelled_share": self.share} if self.source == "mixed" else {}
        norm = {"batch_norm": "transductive"} if self.learner == "maml" else {}
        return place | (training if self.trained else {}) | self.network | norm | self.options


# Embeddings --------------------------------------------------------------------------------------------------------
# CACTUs, App. E.4, and the authors' scripts for what it leaves out.

def _epochs(smoke: int, quick: int, full: int) -> dict:
    return {"smoke": smoke, "quick": quick, "full": full}


EMBEDDINGS = {
    ("BiGAN", "omniglot"): EmbeddingPlan("bigan", {"d": 200}, _epochs(1, 10, 400), seconds=13.7),
    ("BiGAN", "mnist"): EmbeddingPlan("bigan", {"d": 50}, _epochs(1, 4, 400), seconds=32),
    ("BiGAN", "mini_imagenet"): EmbeddingPlan("conv-bigan", {"d": 200}, _epochs(1, 1, 400)),
    ("BiGAN", "celeba"): EmbeddingPlan("conv-bigan", {"d": 200}, _epochs(1, 1, 400)),
    ("ACAI", "omniglot"): EmbeddingPlan("acai", {}, _epochs(1, 1, 763), batch=64, seconds=55),  # 2^24 images in all
    ("ACAI", "mnist"): EmbeddingPlan("acai", {}, _epochs(1, 1, 305), batch=64, whiten=True, seconds=140),
    ("InfoGAN", "mnist"): EmbeddingPlan("infogan", {}, _epochs(1, 3, 50), seconds=31),
    ("DeepCluster", "mini_imagenet"): EmbeddingPlan("deepcluster", {}, _epochs(1, 1, 200), batch=256),
    ("DeepCluster", "celeba"): EmbeddingPlan("deepcluster", {"view": "resize"}, _epochs(1, 1, 200), batch=256),
    # what a processor can do: not the paper's
    ("small DeepCluster", "mini_imagenet"): EmbeddingPlan(
        "deepcluster", {"clusters": 500, "width": 0.25, "stride": 2, "dropout": 0.0}, _epochs(1, 1, 40), batch=64,
        seconds=60, deviation="DeepCluster of a quarter of the width, stride 2, 40 epochs"),
    ("short ACAI", "omniglot"): EmbeddingPlan("acai", {}, _epochs(1, 1, 50), batch=64, seconds=55,
                                              deviation="ACAI for 50 epochs"),
    ("DeepCluster", "imagenet"): EmbeddingPlan("file", {"missing": (
        "the ImageNet rows need the vectors of DeepCluster's VGG-16 (github.com/facebookresearch/deepcluster): put "
        "{'z': float32 [n, 256]} with torch.save into deepcluster-imagenet-full-train.pt, -val.pt and -test.pt of the "
        "stages folder, rows in the order of load('imagenet', split)")}, _epochs(1, 1, 500)),
    ("PCA pixels", "omniglot"): EmbeddingPlan("pca", {"d": 256}, _epochs(1, 1, 1)),
    ("random network", "omniglot"): EmbeddingPlan("random", {}, _epochs(1, 1, 1)),
}  # fmt: skip


def embedding_plan(name: str, dataset: str) -> EmbeddingPlan:
    """How `name` is fitted to `dataset`; a dataset that the paper does not have takes Omniglot's plan.

    ValueError: no such embedding, or CACTUs did not use it there.
    """
    place = dataset if any(d == dataset for _, d in EMBEDDINGS) else "omniglot"
    if (name, place) not in EMBEDDINGS:
        there = ", ".join(f"{n} ({d})" for n, d in EMBEDDINGS)
        raise ValueError(f"no plan for {name!r} on {dataset}; there are: {there}")
    return EMBEDDINGS[name, place]


# CACTUs ------------------------------------------------------------------------------------------------------------
# Tables 5, 6 and 11 of the paper; what they do not say is from its code (see the chapter's ledger).

_SMALL = {"filters": 32, "downsample": "stride", "head": "mean", "norm": "shift", "eps": 1e-3, "head_init": "normal"}
_LARGE = {"filters": 32, "downsample": "pool", "head": "flatten", "norm": "shift", "eps": 1e-3, "head_init": "glorot"}
_MAML = {"inner_lr": 0.05, "inner_steps": 5, "test_steps": 50, "inner_loss": "sum", "adapt_norm": False}
_SCRATCH = {"inner_lr": 0.1, "test_steps": 200, "inner_loss": "sum", "adapt_norm": False}

# What changes with the dataset: its tables, the tasks of training and testing, the networks, P and the budget.
_PLACES = {
    "omniglot": dict(table="8", way=20, network=_SMALL, steps=30_000, partitions=100, split="cactus",
                     tests=((5, 1), (5, 5), (20, 1), (20, 5)), margins={"ACAI": 1.2, "BiGAN": 0.5}),
    "mini_imagenet": dict(table="9", way=5, network=_LARGE, steps=60_000, partitions=50, split=None,
                          tests=((5, 1), (5, 5), (5, 20), (5, 50)), margins={"BiGAN": 0.9, "DeepCluster": 0.1}),
    "mnist": dict(table="7", way=10, network=_SMALL, steps=30_000, partitions=100, split=None,
                  tests=((10, 1), (10, 5), (10, 10)), margins={}),
    "celeba": dict(table="10", way=2, network=_LARGE, steps=60_000, partitions=50, split=None, tests=((2, 5),),
                   margins={}),
    "imagenet": dict(table="12", way=5, network={}, steps=240_000, partitions=1, split=None,
                     tests=((5, 1), (5, 5), (5, 20), (5, 50)), margins={}),
}  # fmt: skip
_WIDTH = {("ACAI", "omniglot"): 256, ("ACAI", "mnist"): 256, ("BiGAN", "omniglot"): 200, ("BiGAN", "mnist"): 50,
          ("InfoGAN", "mnist"): 12, ("BiGAN", "mini_imagenet"): 200, ("BiGAN", "celeba"): 200,
          ("DeepCluster", "mini_imagenet"): 256, ("DeepCluster", "celeba"): 256, ("PCA pixels", "omniglot"): 256,
          ("random network", "omniglot"): 256}  # fmt: skip


def _row(dataset: str, slug: str, method: str, learner: str, **more) -> Row:
    place = _PLACES[dataset]
    slug = slug if dataset == "omniglot" else f"{slug}-{dataset.replace('_', '-')}"
    common = dict(table=place["table"], dataset=dataset, split_protocol=place["split"], tests=place["tests"],
                  way=place["way"])  # fmt: skip
    return Row(slug=slug, method=method, learner=learner, **(common | more))


def _maml(dataset: str, slug: str, method: str, **more) -> Row:
    place = _PLACES[dataset]
    clip = None if dataset in ("omniglot", "mnist") else 10.0
    steps = {"smoke": 2, "quick": 300, "full": place["steps"]}
    common = dict(network=place["network"], options=_MAML, steps=steps, tasks=8, query=5, clip=clip)
    return _row(dataset, slug, method, "maml", **(common | more))


def _protonets(dataset: str, slug: str, method: str, **more) -> Row:
    steps = {"smoke": 3, "quick": 400, "full": _PLACES[dataset]["steps"]}
    common = dict(network={"filters": 64}, options={"distance": "sum", "batch_norm": "inductive"}, steps=steps,
                  tasks=1, query=15)  # fmt: skip
    return _row(dataset, slug, method, "protonets", **(common | more))


def _controls(dataset: str) -> list[Row]:
    """Training from scratch and the oracles."""
    scratch = _row(dataset, "scratch", "Training from scratch", "maml", network=_PLACES[dataset]["network"],
                   options=_SCRATCH, test_tasks={"smoke": 2, "quick": 40, "full": 1000})  # fmt: skip
    source = {"source": "attributes" if dataset == "celeba" else "labels", "variant": "supervised"}
    oracles = [_protonets(dataset, "oracle-protonets", "Oracle-ProtoNets (control)", **source),
               _maml(dataset, "oracle-maml", "Oracle-MAML (control)", **source), scratch]  # fmt: skip
    return oracles[1:2] if dataset == "mnist" else oracles


_PROBES = (("knn", "Embedding kNN", ""), ("linear", "Embedding linear classifier", ""),
           ("mlp", "Embedding MLP with dropout", ";h=128"), ("matching", "Embedding cluster matching", ";k={k}"),
           ("nearest-mean", "Embedding nearest class mean", ""), ("ridge", "Embedding ridge", ""))  # fmt: skip


def _probes(dataset: str, embedding: str, k: int) -> list[Row]:
    """The baselines on an embedding: CACTUs' four, nearest class mean and ridge. MNIST has no MLP."""
    d, name = _WIDTH[embedding, dataset], _slug(embedding)
    return [
        _row(dataset, f"{learner}-{name}", method, learner, embedding=embedding, clusters=k * (learner == "matching"),
             inputs="embeddings", options={"stop_on_query": True} if learner == "mlp" else {},
             variant=f"d={d}{variant.format(k=k)}")
        for learner, method, variant in _PROBES if not (dataset == "mnist" and learner == "mlp")
    ]  # fmt: skip


def _cactus(dataset: str, embedding: str) -> list[Row]:
    """CACTUs on an embedding, with one partition and with P."""
    name, many, d = _slug(embedding), _PLACES[dataset]["partitions"], _WIDTH[embedding, dataset]
    rows = []
    for p in (1, many):
        more = dict(embedding=embedding, source="clusters", clusters=500, partitions=p, variant=f"d={d};P={p};k=500")
        short = "-p1" if p == 1 else ""
        if p > 1 or dataset != "celeba":
            rows.append(_maml(dataset, f"cactus-maml-{name}{short}", "CACTUs-MAML", **more))
        if p > 1:
            rows.append(_protonets(dataset, f"cactus-protonets-{name}", "CACTUs-ProtoNets", **more))
    return rows


def _hyperplanes(dataset: str, embedding: str) -> list[Row]:
    """Cells of random hyperplanes, 100 tasks to a partition: P = steps * 8 / 100."""
    d, p = _WIDTH[embedding, dataset], _PLACES[dataset]["steps"] * 8 // 100
    margins = (("", 0.0), ("-margin", _PLACES[dataset]["margins"][embedding]))
    return [
        _maml(dataset, f"hyperplanes-{_slug(embedding)}{short}", "Hyperplanes-MAML", embedding=embedding, partitions=p,
              source="hyperplanes", margin=m, variant=f"d={d};P={p};m={m:g}")
        for short, m in margins
    ]  # fmt: skip


def _mnist(embedding: str) -> list[Row]:
    """Table 7: ten clusters; MAML on images and, as an MLP, on the embeddings themselves."""
    rows, d = _probes("mnist", embedding, 10), _WIDTH[embedding, "mnist"]
    for p in (1, 100)[: 1 if embedding == "ACAI" else 2]:
        more = dict(embedding=embedding, source="clusters", clusters=10, partitions=p, variant=f"d={d};P={p};k=10")
        short = f"{_slug(embedding)}{'-p1' if p == 1 else ''}"
        rows += [
            _maml("mnist", f"cactus-maml-{short}", "CACTUs-MAML on images", **more),
            _maml("mnist", f"cactus-maml-{short}-codes", "CACTUs-MAML on embeddings", inputs="embeddings",
                  network={"hidden": (64, 64)}, **more),
        ]  # fmt: skip
    return rows


def _slug(embedding: str) -> str:
    return embedding.lower().replace(" ", "-")


def _with_plan(row: Row, fitted: str, suffix: str) -> Row:
    """The same on an embedding that was fitted by a cheaper plan."""
    return replace(row, slug=f"{row.slug}-{suffix}", fitted=fitted)


def _imagenet() -> list[Row]:
    """Table 12: for who has ImageNet; see `umeta data info imagenet`."""
    options = _MAML | {"inner_lr": 0.001, "test_steps": 100}
    maml = dict(network={"residual": True}, options=options, lr=1e-4, tasks=3, clip=10.0)
    clusters = dict(embedding="DeepCluster", clusters=10_000, partitions=1)
    probes = [replace(r, variant="d=256;VGG-16", embedding="DeepCluster")
              for r in (_row("imagenet", "knn-deepcluster", "Embedding kNN", "knn", inputs="embeddings"),
                        _row("imagenet", "linear-deepcluster", "Embedding linear classifier", "linear",
                             inputs="embeddings"))]  # fmt: skip
    return [
        _row("imagenet", "scratch", "Training from scratch", "maml", network={"residual": True}, options=_SCRATCH),
        *probes,
        _maml("imagenet", "cactus-maml-deepcluster", "CACTUs-MAML", source="clusters", variant="d=256;P=1;k=10000",
              **maml, **clusters),
        _maml("imagenet", "semi-supervised", "Semi-supervised MAML", source="mixed", share=64 / (64 + 964),
              variant="CACTUs tasks + 64 labelled miniImageNet classes", **maml, **clusters),
        _maml("imagenet", "oracle-maml", "Oracle-MAML (control)", variant="supervised;964 ImageNet classes", **maml),
    ]  # fmt: skip


def _mixing() -> list[Row]:
    """Labels of a few characters, alone and mixed with cluster tasks in proportion (CACTUs, App. G, hints at it)."""
    common = dict(way=5, steps={"smoke": 3, "quick": 400, "full": 10_000}, tests=((5, 1), (5, 5)), table="mixing")
    rows = []
    for percent in (1, 5, 10, 50):
        share = percent / 100
        rows += [
            _protonets("omniglot", f"mixed-protonets-{percent}", "Semi-supervised ProtoNets", source="mixed",
                       share=share, embedding="BiGAN", clusters=500, partitions=100,
                       variant=f"CACTUs tasks + {percent} % of the characters labelled", **common),
            _protonets("omniglot", f"few-labels-protonets-{percent}", "Supervised ProtoNets", share=share,
                       variant=f"{percent} % of the characters labelled", **common),
        ]  # fmt: skip
    alone = dict(source="clusters", embedding="BiGAN", clusters=500, partitions=100)
    rows.append(_protonets("omniglot", "mixed-protonets-0", "Semi-supervised ProtoNets", variant="CACTUs tasks alone",
                           **alone, **common))  # fmt: skip
    return rows


def _five_way(row: Row) -> Row:
    """The same trained on 5-way tasks: a quarter of the cost, and another experiment."""
    return replace(row, slug=f"{row.slug}-5way", way=5, tests=((5, 1), (5, 5)), deviation="trained on 5-way tasks")


_RANDOM = _maml("omniglot", "random-maml", "Random-MAML", source="random", clusters=500, partitions=2400,
                variant="P=2400;k=500")  # fmt: skip
_PIXELS = _maml("omniglot", "pixels-maml", "Pixels CACTUs-MAML", source="clusters", embedding="pixels", clusters=500,
                partitions=1, variant="P=1;k=500")  # fmt: skip

_OMNIGLOT = [
    *_controls("omniglot"), _RANDOM, _PIXELS,
    *(row for e in ("ACAI", "BiGAN") for row in (*_probes("omniglot", e, 500), *_hyperplanes("omniglot", e),
                                                 *_cactus("omniglot", e))),
    *(row for e in ("PCA pixels", "random network") for row in (*_probes("omniglot", e, 500)[:4],
                                                                *_cactus("omniglot", e))),
]  # fmt: skip

ROWS = (
    *_OMNIGLOT,
    *(_five_way(row) for row in _OMNIGLOT if row.learner == "maml" and row.trained),
    *_mixing(),
    *_controls("mnist"), *_mnist("ACAI"), *_mnist("BiGAN"), *_mnist("InfoGAN"),
    *(_with_plan(row, "short ACAI", "short") for row in _OMNIGLOT if row.embedding == "ACAI"),
    *(_with_plan(row, "small DeepCluster", "small") for row in (*_probes("mini_imagenet", "DeepCluster", 500),
                                                                *_cactus("mini_imagenet", "DeepCluster"))),
    *_controls("mini_imagenet"),
    *(row for e in ("BiGAN", "DeepCluster") for row in (*_probes("mini_imagenet", e, 500),
                                                        *_hyperplanes("mini_imagenet", e),
                                                        *_cactus("mini_imagenet", e))),
    *_controls("celeba"),
    *(row for e in ("BiGAN", "DeepCluster") for row in (*_probes("celeba", e, 500), *_cactus("celeba", e))),
    *_imagenet(),
)  # fmt: skip


# Finding rows ------------------------------------------------------------------------------------------------------


def on_dataset(row: Row, dataset: str) -> Row:
    """The same experiment on another dataset that `load` knows; its slug then ends in the dataset's name."""
    if dataset == row.dataset:
        return row
    split = "cactus" if dataset == "omniglot" else None
    return replace(row, slug=f"{row.slug}-{dataset.replace('_', '-')}", dataset=dataset, split_protocol=split)


def find_row(slug: str, dataset: str | None = None) -> Row:
    """The row named `slug` (``oracle-maml``, or ``oracle-maml-glyphs`` for its move to another dataset).

    `dataset` asks for the paper's row on that dataset, or if it has none moves the row there. ValueError lists the rows
    there are.
    """
    by_slug = {row.slug: row for row in ROWS}
    if dataset is not None:
        known(dataset)
        own = f"{slug}-{dataset.replace('_', '-')}"
        slug = own if own in by_slug else slug
    if slug in by_slug:
        return on_dataset(by_slug[slug], dataset or by_slug[slug].dataset)
    for place in ABOUT:
        row = by_slug.get(slug.removesuffix(f"-{place.replace('_', '-')}"))
        if row is not None:
            return on_dataset(row, dataset or place)
    raise ValueError(f"unknown row {slug!r}; rows: {', '.join(by_slug)}")


def select_rows(paper: str, table=None, names: str | None = None, dataset: str | None = None) -> list[Row]:
    """The rows of a paper's table, moved to `dataset` if given.

    Without `names` these are the rows that the paper prints. `names`, comma-separated parts of slugs, also finds what
    the paper lacks: more baselines and embeddings, cheaper variants (``-5way``), the mixing experiment.

    Raises ValueError, naming what there is, when nothing is left.
    """
    numbers = published(paper)
    rows = [row for row in ROWS if row.paper == paper]
    if table is not None:
        tables = {number["table"] for number in numbers} | {row.table for row in rows}
        if str(table) not in tables:
            raise ValueError(f"{paper} has no table {table!r}; its tables: {', '.join(sorted(tables))}")
        numbers = [number for number in numbers if number["table"] == str(table)]
        rows = [row for row in rows if row.table == str(table) or any(matches(n, vars(row)) for n in numbers)]
    if names is not None:
        rows = [row for row in rows if any(name.strip() in row.slug for name in names.split(","))]
    elif numbers:
        rows = [row for row in rows if not row.departs and any(matches(n, vars(row)) for n in numbers)]
    if dataset is not None:
        known(dataset)
        native = [row for row in rows if row.dataset == dataset]
        rows = native or [on_dataset(row, dataset) for row in rows if row.dataset == "omniglot"]
    if not rows:
        there = ", ".join(row.slug for row in ROWS if row.paper == paper) or "none yet"
        raise ValueError(f"no row of {paper} fits; its rows: {there}")
    return rows
