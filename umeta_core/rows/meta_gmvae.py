"""The rows of Meta-GMVAE: four models for Tables 1, 2 (right) and 5, the ablations of Table 2, mini-ImageNet.

Every model is selected on labeled validation tasks of its own way and shot (reference code, not in the paper). Rows
that differ in that alone, or in the covariance of the test, share a training, as the columns of the paper's tables do.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Row

_OMNIGLOT_SET = {5: 200, 20: 300}  # M, images of a training episode
_SWITCHES = {"inference": "transductive", "covariance": "diagonal", "e_step": "identity", "iterations": 10,
             "learn_weights": True}  # those of the released code, which a record is to name
_WAYS = (2, 5, 10, 15, 20, 30, 40, 50)  # of Table 2, right
_READINGS = {
    "diagonal E-step": {"e_step": "diagonal"},
    "identity covariance": {"covariance": "identity"},
    "inductive": {"inference": "inductive", "tasks": 200},  # 3 to 10 times the work of the others
    "upright characters": {"classes": "/rotated0"},
    "upright characters, 5 queries": {"classes": "/rotated0", "query": 5},  # as CACTUs, 323 of its 423 test characters
}
# Table 2, left: what is left out of the whole model, and whose training it then is ("": its own, "whole": all parts).
_ABLATIONS = (
    ("vanilla-vae", "Vanilla VAE", "", "", {"episodic": False, "set_level": False, "covariance": "identity"}),
    ("gmvae-episodes", "Meta-GMVAE", "Ep", "gmvae-episodes", {"set_level": False, "covariance": "identity"}),
    ("gmvae-episodes-sets", "Meta-GMVAE", "Ep+Set", "whole", {"covariance": "identity"}),
    ("gmvae-episodes-variances", "Meta-GMVAE", "Ep+sigma2", "gmvae-episodes", {"set_level": False}),
)
_TESTS = {"smoke": 3, "quick": 100, "full": 1000}


def _selected(way: int, shot: int) -> dict:
    return {"every": 1000, "tasks": 1000, "query": 15, "way": way, "shot": shot}


def _row(slug: str, method: str, dataset: str, way: int, shot: int, size: int, **more) -> Row:
    """A model trained on sets of `size` images with `way` components."""
    common = dict(
        paper="meta_gmvae", learner="gmvae", source="unlabeled", test_query=15, way=1, shot=size, query=0,
        test_tasks=_TESTS, dataset=dataset, split_protocol="meta_gmvae" if dataset == "omniglot" else None,
        validation=_selected(way, shot),
    )  # fmt: skip
    options = _SWITCHES | {"components": way, "samples": 32, "weight_decay": 1e-6} | more.pop("options", {})
    return Row(slug=slug, method=method, options=options, **(common | more))


def _omniglot(slug: str, method: str, way: int, shot: int, **more) -> Row:
    return _row(slug, method, "omniglot", way, shot, _OMNIGLOT_SET[way], tasks=4,
                steps={"smoke": 2, "quick": 20, "full": 60_000}, **more)  # fmt: skip


def _trained_on(way: int, shot: int) -> Row:
    tests = dict.fromkeys([(way, shot), (way, 1), (way, 5), *((w, 1) for w in _WAYS), (5, 5)])  # each once
    variant = f"Ep+Set+sigma2;trained on ({way}-way;{shot}-shot) setting"
    return _omniglot(f"gmvae-{way}way-{shot}shot", "Meta-GMVAE", way, shot, tests=tuple(tests), table="models",
                     variant=variant, readings=_READINGS, training_of=f"gmvae-{way}way-1shot")  # fmt: skip


def _ablation(slug: str, method: str, variant: str, shared: str, options: dict) -> Row:
    return _omniglot(slug, method, 20, 1, tests=((20, 1),), table="2-left", variant=variant, options=options,
                     training_of=shared.replace("whole", "gmvae-20way-1shot"))  # fmt: skip


def _mini(
    slug, method: str, table: str, tests, variant="", size=5, tasks=16, options=None, shared="", steps=15_000, **more
) -> Row:
    """On SimCLR features. Weight decay and 32 numbers in z are from the reference code; the paper says 64."""
    settings = {"samples": 256, "latent": 32, "weight_decay": 5e-2, "calibrated": False} | (options or {})
    return _row(slug, method, "mini_imagenet", 5, 1, size, tests=tests, table=table, variant=variant, options=settings,
                embedding="SimCLR", inputs="embeddings", lr=1e-4, tasks=tasks, training_of=shared,
                steps={"smoke": 2, "quick": 300, "full": steps}, **more)  # fmt: skip


def _mini_rows() -> list[Row]:
    shots = tuple((5, shot) for shot in (1, 5, 20))
    probe = Row(slug="lr-simclr-mini-imagenet", method="LR (SimCLR)", learner="linear", table="2-left",
                paper="meta_gmvae", dataset="mini_imagenet", split_protocol=None, embedding="SimCLR",
                inputs="embeddings", tests=(*shots, (5, 50)), test_query=15, test_tasks=_TESTS,
                options={"c": 1.0, "standardize": "train"})  # fmt: skip
    clusters = replace(probe, slug="cactus-maml-simclr-mini-imagenet", method="CACTUs-MAML", learner="maml", table="10",
                       source="clusters", clusters=500, partitions=50, way=5, tasks=8, query=5, clip=2.0,
                       network={"hidden": ()}, steps={"smoke": 2, "quick": 300, "full": 60_000},
                       options={"inner_lr": 0.05, "inner_steps": 5, "test_steps": 50, "inner_loss": "sum"})  # fmt: skip
    copies = replace(clusters, slug="umtra-maml-simclr-mini-imagenet", method="UMTRA", source="augmented", clusters=0,
                     partitions=0, query=1)  # fmt: skip
    ablations = [
        _mini(f"{slug}-mini-imagenet", "Vanilla VAE (SimCLR)" if slug == "vanilla-vae" else method, "2-left", ((5, 1),),
              variant, options=options, shared=shared and f"{shared.replace('whole', 'gmvae')}-mini-imagenet")
        for slug, method, variant, shared, options in _ABLATIONS
    ]  # fmt: skip
    return [
        probe, clusters, copies, *ablations,
        _mini("gmvae-mini-imagenet", "Meta-GMVAE", "9", shots, "Ep+Set+sigma2", shared="gmvae-mini-imagenet",
              readings=_READINGS),
        _mini("gmvae-50shot-mini-imagenet", "Meta-GMVAE", "9", ((5, 50),), "Ep+Set+sigma2", size=200, tasks=4,
              steps=30_000, readings={name: _READINGS[name] for name in ("diagonal E-step", "identity covariance")}),
    ]  # fmt: skip


def _few_decoded(row: Row) -> Row:
    """The same with 1 of the 32 samples of an image decoded, for a tenth of the time.

    The expected loss is the same but for the decoder's batch norm: in training its statistics are those of the images
    that are decoded, one of each image here.
    """
    return row.renamed("-decode1", deviation="1 of 32 samples decoded", steps=row.steps | {"quick": 200},
                       options=row.options | {"decoded": 1})  # fmt: skip


_MODELS = [_trained_on(way, shot) for way in (5, 20) for shot in (1, 5)]
_OMNIGLOT = [*_MODELS, *(_ablation(*ablation) for ablation in _ABLATIONS)]
_MINI = _mini_rows()

ROWS = (
    *_OMNIGLOT, *_MINI, *(_few_decoded(row) for row in _OMNIGLOT),
    *(row.renamed(f"-{kind}", fitted=f"{kind} SimCLR") for kind in ("short", "plain") for row in _MINI),
)  # fmt: skip
