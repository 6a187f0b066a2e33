"""The rows of CACTUs: Tables 7 to 10 and 12, more baselines and embeddings, cheaper variants, mixing, curves.

Tables 5, 6 and 11 of the paper say how; what they do not say is from its code (see the chapter's ledger).
"""

from __future__ import annotations

from dataclasses import replace

from .base import Row

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
          ("PCA-16 pixels", "omniglot"): 16, ("PCA-16 pixels", "mnist"): 16,
          ("random network", "omniglot"): 256}  # fmt: skip


def _row(dataset: str, slug: str, method: str, learner: str, **more) -> Row:
    place = _PLACES[dataset]
    slug = slug if dataset == "omniglot" else f"{slug}-{dataset.replace('_', '-')}"
    common = dict(table=place["table"], dataset=dataset, split_protocol=place["split"], tests=place["tests"],
                  way=place["way"])  # fmt: skip
    return Row(slug=slug, method=method, learner=learner, **(common | more))


def _maml(dataset: str, slug: str, method: str, **more) -> Row:
    place = _PLACES[dataset]
    clip = None if dataset in ("omniglot", "mnist") else 10.0 / place["way"]  # the code's loss is N times ours
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
    for p in (1, 100)[: 2 if embedding in ("BiGAN", "InfoGAN") else 1]:
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


def _inductive() -> list[Row]:
    """The baselines on DeepCluster's vectors, whitened without a look at the test images."""
    probes = _probes("mini_imagenet", "DeepCluster", 500)
    return [replace(_with_plan(row, f"{size}inductive DeepCluster", f"{size}inductive".replace(" ", "-")),
                    table="ledger") for size in ("", "small ") for row in probes]  # fmt: skip


def _views() -> list[Row]:
    """What classifiers on codes owe to the squashing at the encoder's end, and to the codes' lengths."""
    bigan = [row for row in _probes("omniglot", "BiGAN", 500) if row.learner in ("knn", "linear", "nearest-mean")]
    infogan = [row for row in _probes("mnist", "InfoGAN", 10) if row.learner != "ridge"]
    views = (("logits", "BiGAN", bigan), ("unit", "BiGAN", bigan), ("logits", "InfoGAN", infogan))
    return [replace(_with_plan(row, f"{view} {of}", view), table="ledger") for view, of, rows in views for row in rows]


def _untrained() -> list[Row]:
    """What a network without any training gives to classifiers of photographs."""
    probes = [row for row in _probes("mini_imagenet", "DeepCluster", 500) if row.learner not in ("mlp", "matching")]
    return [replace(_with_plan(row, "small untrained DeepCluster", "untrained"), table="ledger") for row in probes]


def _labeled(share: float) -> dict:
    """Labels for a share of the classes, and tasks in proportion to the images behind them: share to 1 (App. G)."""
    return {"share": share, "mix": share / (1 + share)}


def _imagenet() -> list[Row]:
    """Table 12: for who has ImageNet; see `umeta data info imagenet`."""
    options = _MAML | {"inner_lr": 0.001, "test_steps": 100}
    maml = dict(network={"residual": True}, options=options, lr=1e-4, tasks=3, clip=2.0)
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
        _maml("imagenet", "semi-supervised", "Semi-supervised MAML", source="mixed", **_labeled(64 / 964),
              variant="CACTUs tasks + 64 labeled miniImageNet classes", **maml, **clusters),
        _maml("imagenet", "oracle-maml", "Oracle-MAML (control)", variant="supervised;964 ImageNet classes", **maml),
    ]  # fmt: skip


def _mixing() -> list[Row]:
    """Labels of a few characters, alone and mixed with cluster tasks (CACTUs, App. G, hints at it)."""
    common = dict(way=5, steps={"smoke": 3, "quick": 400, "full": 10_000}, tests=((5, 1), (5, 5)), table="mixing")
    rows = []
    for percent in (1, 5, 10, 50):
        share = percent / 100
        rows += [
            _protonets("omniglot", f"mixed-protonets-{percent}", "Semi-supervised ProtoNets", source="mixed",
                       **_labeled(share), embedding="BiGAN", clusters=500, partitions=100,
                       variant=f"CACTUs tasks + {percent} % of the characters labeled", **common),
            _protonets("omniglot", f"few-labels-protonets-{percent}", "Supervised ProtoNets", share=share,
                       variant=f"{percent} % of the characters labeled", **common),
        ]  # fmt: skip
    alone = dict(source="clusters", embedding="BiGAN", clusters=500, partitions=100)
    half = alone | dict(source="mixed", share=0.01, mix=0.5)
    rows.append(_protonets("omniglot", "mixed-half-protonets-1", "Semi-supervised ProtoNets", **half, **common,
                           variant="every other task of 1 % of the characters, labeled"))  # fmt: skip
    rows.append(_protonets("omniglot", "mixed-protonets-0", "Semi-supervised ProtoNets", variant="CACTUs tasks alone",
                           **alone, **common))  # fmt: skip
    return rows


def _curves() -> list[Row]:
    """Numbers of clusters with P = 10, and of partitions with k = 500, in short trainings; the paper has P = 1 and 100.

    Five queries per class in training, too, so that a cluster needs 6 images and not 16, of which 2000 clusters would
    have 340. The name of the method keeps them apart from the paper's numbers, of which some tables print neither k
    nor P.
    """
    settings = [(f"k{k}", k, 10) for k in (50, 200, 1000, 2000)] + [(f"p{p}", 500, p) for p in (1, 10, 100)]
    common = dict(way=5, query=5, tests=((5, 1), (5, 5)), steps={"smoke": 3, "quick": 400, "full": 10_000})
    return [
        _protonets("omniglot", f"curve-protonets-{name}", "CACTUs-ProtoNets (curve)", embedding="BiGAN",
                   source="clusters", clusters=k, partitions=p, variant=f"d=200;P={p};k={k}", table="curves", **common)
        for name, k, p in settings
    ]  # fmt: skip


def _five_way(row: Row) -> Row:
    """The same trained on 5-way tasks: a quarter of the cost, and another experiment; but not for random tasks, where
    the authors' script for the 5-way numbers trains so, too."""
    deviation = "" if row.source == "random" else "trained on 5-way tasks"
    return replace(row, slug=f"{row.slug}-5way", way=5, tests=((5, 1), (5, 5)), deviation=deviation)


_RANDOM = _maml("omniglot", "random-maml", "Random-MAML", source="random", clusters=500, partitions=2400,
                variant="P=2400;k=500", tests=((20, 1), (20, 5)))  # fmt: skip
_PIXELS = _maml("omniglot", "pixels-maml", "Pixels CACTUs-MAML", source="clusters", embedding="pixels", clusters=500,
                partitions=1, variant="P=1;k=500")  # fmt: skip

_OMNIGLOT = [
    *_controls("omniglot"), _RANDOM, _PIXELS,
    *(row for e in ("ACAI", "BiGAN") for row in (*_probes("omniglot", e, 500), *_hyperplanes("omniglot", e),
                                                 *_cactus("omniglot", e))),
    *(row for e in ("PCA pixels", "PCA-16 pixels", "random network") for row in (*_probes("omniglot", e, 500),
                                                                                 *_cactus("omniglot", e))),
]  # fmt: skip

ROWS = (
    *_OMNIGLOT,
    *(_five_way(row) for row in _OMNIGLOT if row.learner == "maml" and row.trained),
    *_mixing(), *_curves(), *_views(),
    *_controls("mnist"), *_mnist("ACAI"), *_mnist("BiGAN"), *_mnist("InfoGAN"), *_mnist("PCA-16 pixels"),
    *(_with_plan(row, "short ACAI", "short") for row in _OMNIGLOT if row.embedding == "ACAI"),
    *(_with_plan(row, "small DeepCluster", "small") for row in (*_probes("mini_imagenet", "DeepCluster", 500),
                                                                *_cactus("mini_imagenet", "DeepCluster"))),
    *_controls("mini_imagenet"),
    *(row for e in ("BiGAN", "DeepCluster") for row in (*_probes("mini_imagenet", e, 500),
                                                        *_hyperplanes("mini_imagenet", e),
                                                        *_cactus("mini_imagenet", e))),
    *_inductive(), *_untrained(),
    *_controls("celeba"),
    *(row for e in ("BiGAN", "DeepCluster") for row in (*_probes("celeba", e, 500), *_cactus("celeba", e))),
    *_imagenet(),
)  # fmt: skip
