"""The rows of LASIUM: Tables 1 to 4 and 7, and the switches of the ledger.

Which constant belongs to a row of Tables 1 to 4, and how long it trained, is not printed: see `_BEST` and the lengths
in `_PLACES`.
Rows on CelebA and mini-ImageNet need generators that others have trained (ProGAN, BigBiGAN), see
`stages.given_generator`.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Row

_DRAWINGS = {"filters": 64, "downsample": "stride", "norm": "shift", "eps": 1e-3}
_PHOTOS = {"filters": 32, "downsample": "pool", "head": "flatten", "norm": "shift", "eps": 1e-3, "padding": 0}
_MAML = {"inner_steps": 5, "test_steps": 50, "inner_loss": "mean", "adapt_norm": True}
_PROTONETS = {"distance": "mean", "apart": True}

# Where the rows live: network of MAML, inner learning rate, tests, queries of a test, meta-training steps by learner.
_PLACES = {
    "omniglot": dict(table="1", split="lasium", way=5, rate=0.4, network=_DRAWINGS, norm="transductive",
                     tests=((5, 1), (5, 5)), test_query=15, length={"maml": 5000, "protonets": 8000}),
    "celeba_identity": dict(table="2", split=None, way=5, rate=0.05, network=_PHOTOS, norm="inductive",
                            tests=((5, 1), (5, 5), (5, 15)), test_query=15,
                            length={"maml": 60_000, "protonets": 15_000}),
    "celeba": dict(table="3", split=None, way=2, rate=0.05, network=_PHOTOS, norm="transductive", tests=((2, 5),),
                   test_query=5, length={"maml": 105_000, "protonets": 60_000}),
    "mini_imagenet": dict(table="4", split=None, way=5, rate=0.05, network=_PHOTOS, norm="inductive",
                          tests=((5, 1), (5, 5), (5, 20), (5, 50)), test_query=15,
                          length={"maml": 60_000, "protonets": 30_000}),
}  # fmt: skip
_STRENGTH = {"N": (0.5, 1.0, 2.0), "RO": (0.2, 0.4), "OC": (0.2, 0.4)}
_BEST = {"N": 0.5, "RO": 0.2, "OC": 0.2}  # of Table 7 with MAML
_ON_SPHERE = {"N": 0.08, "RO": 0.6, "OC": 0.37}  # ProGAN's latents are unit vectors


def _row(dataset: str, slug: str, method: str, learner: str, source: str, **more) -> Row:
    """A row with LASIUM's learners: 4 tasks of 1 support image and 5 queries."""
    place = _PLACES[dataset]
    full = place["length"][learner]
    head = {"head": "mean"} if dataset == "omniglot" else {}
    maml = dict(network=place["network"] | head, options=_MAML | {"inner_lr": place["rate"]})
    protonets = dict(network=place["network"], options=_PROTONETS | {"batch_norm": place["norm"]})
    common = dict(
        paper="lasium", table=place["table"], dataset=dataset, split_protocol=place["split"], way=place["way"], shot=1,
        query=5, tasks=4, tests=place["tests"], test_query=place["test_query"], source=source,
        variant=f"Kval={place['test_query']}", embedding="" if dataset == "celeba_identity" else "N/A",
        steps={"smoke": 2, "quick": 300, "full": full}, **(maml if learner == "maml" else protonets),
    )  # fmt: skip
    slug = slug if dataset == "omniglot" else f"{slug}-{dataset.replace('_', '-')}"
    return Row(slug=slug, method=method, learner=learner, **(common | more))


def _latent(policy: str, generator: str, strength: float, **switches) -> dict:
    """Arguments of `latent_tasks.LatentTasks`."""
    anchors = "encoded" if generator == "VAE" else "prior"
    return {"policy": policy, "strength": strength, "anchors": anchors, **switches}


def _lasium(dataset: str, policy: str, generator: str, learner: str, strength: float, suffix="", **more) -> Row:
    name = {"maml": "MAML", "protonets": "ProtoNets"}[learner]
    switches = {} if dataset == "omniglot" else {"shift": 0, "fill": None}
    latent = _latent(policy, generator, strength, **(switches | more.pop("switches", {})))
    slug, method = f"{policy}-{generator}-{learner}{suffix}".lower(), f"LASIUM-{policy}-{generator}-{name}"
    return _row(dataset, slug, method, learner, "latent", fitted=generator, latent=latent, **more)


def _ablation() -> list[Row]:
    """Table 7: every policy, constant, generator and learner, 1000 meta-iterations, 1-shot."""
    rows = []
    for policy, strengths in _STRENGTH.items():
        for strength in strengths:
            symbol = "sigma^2" if policy == "N" else "alpha"  # the code takes sigma^2 as sigma
            rows += [
                _lasium("omniglot", policy, generator, learner, strength, f"-{strength:g}".replace(".", ""), table="7",
                        variant=f"{symbol}={strength};1000 meta-iterations", tests=((5, 1),),
                        steps={"smoke": 2, "quick": 300, "full": 1000})
                for generator in ("GAN", "VAE") for learner in ("maml", "protonets")
            ]  # fmt: skip
    return rows


def _headline(dataset: str, generators: dict[str, str]) -> list[Row]:
    """Tables 1 to 4: supervised, from scratch, UMTRA and LASIUM. `generators`: which policy each pair has there."""
    scratch = _row(dataset, "lasium-scratch", "Training from scratch", "maml", "labels",
                   steps={"smoke": 0, "quick": 0, "full": 0},
                   test_tasks={"smoke": 2, "quick": 40, "full": 1000})  # fmt: skip
    labels = "attributes" if dataset == "celeba" else "labels"
    quoted = {"deviation": "the published number is CACTUs' or UMTRA's, of their network and training"}
    of_others = {} if dataset == "celeba_identity" else quoted
    guessed = {"deviation": "the paper prints no settings of this rival"}
    umtra = "UMTRA" if dataset == "celeba_identity" else "UMTRA-MAML"
    rows = [
        replace(scratch, tasks=0, query=0, **(quoted if dataset in ("celeba", "mini_imagenet") else guessed)),
        _row(dataset, "supervised-maml", "Supervised MAML", "maml", labels, **of_others),
        _row(dataset, "supervised-protonets", "Supervised ProtoNets", "protonets", labels, **of_others),
    ]
    if dataset != "mini_imagenet":  # a linear layer on frozen features, trained on each support set
        rows.append(_row(dataset, "transfer-vgg", "Transfer Learning (VGG-19)", "maml", "labels", fitted="VGG-19",
                         inputs="embeddings", network={"hidden": ()}, steps={"smoke": 0, "quick": 0, "full": 0},
                         options=_MAML | {"inner_lr": 0.05, "adapt_norm": False}))  # fmt: skip
    if dataset == "celeba_identity":  # whose embedding the paper does not name
        rows.append(_row(dataset, "cactus-maml", "CACTUs", "maml", "clusters", fitted="DeepCluster", clusters=500,
                         partitions=50, **guessed))  # fmt: skip
    if dataset != "celeba":
        more = quoted if dataset == "mini_imagenet" else guessed
        rows.append(_row(dataset, "umtra-maml", umtra, "maml", "augmented", **more))
    for pair, policy in generators.items():
        generator, learner = pair.split("-")
        strength = _ON_SPHERE[policy] if dataset.startswith("celeba") and generator == "GAN" else _BEST[policy]
        strength = 1.0 if dataset == "mini_imagenet" else strength
        more = {"deviation": "one support image in training (code); Table 5 has five"} if dataset == "celeba" else {}
        rows.append(_lasium(dataset, policy, generator, learner, strength, **more))
    return rows


def _ledger() -> list[Row]:
    """What the paper does not say, each switch on one row of Table 7."""
    def changed(what: str, policy="RO", generator="VAE", learner="maml", strength=None, **more) -> Row:
        strength = _BEST[policy] if strength is None else strength
        return _lasium("omniglot", policy, generator, learner, strength, f"-{what}", table="ledger",
                       variant=what.replace("-", " "), tests=((5, 1),), steps={"smoke": 2, "quick": 300, "full": 1000},
                       **more)  # fmt: skip

    summed = {"options": _PROTONETS | {"batch_norm": "transductive", "distance": "sum"}}
    return [
        changed("background", switches={"fill": "background"}),
        changed("background", generator="GAN", switches={"fill": "background"}),
        changed("no-shift", switches={"fill": None}),
        changed("no-perturbation", strength=0.0),
        changed("no-perturbation", generator="GAN", strength=0.0),
        changed("outwards", switches={"sign": -1}),
        changed("sum-of-distances", learner="protonets", **summed),
        changed("sum-of-distances", generator="GAN", learner="protonets", **summed),
        changed("clean-queries", policy="OC", switches={"own_noise": 0.0}),
        replace(changed("untrained", generator="GAN"), fitted="untrained GAN"),
    ]


_FOUR = {"GAN-maml": "RO", "VAE-maml": "RO", "GAN-protonets": "RO", "VAE-protonets": "RO"}
_OMNIGLOT = [
    *_headline("omniglot", _FOUR | {"VAE-maml": "N", "VAE-protonets": "OC"}), *_ablation(), *_ledger(),
]  # fmt: skip


def _short(row: Row) -> Row:
    """The same with a generator that was trained for a tenth of the paper's epochs or less."""
    return replace(row, slug=f"{row.slug}-short", fitted=f"short {row.fitted}")


ROWS = (
    *_OMNIGLOT, *(_short(row) for row in _OMNIGLOT if row.fitted in ("GAN", "VAE")),
    *_headline("celeba_identity", _FOUR),
    *_headline("celeba", {"GAN-maml": "N", "GAN-protonets": "N"}),
    *_headline("mini_imagenet", {"GAN-maml": "N", "GAN-protonets": "N"}),
)  # fmt: skip
