"""How every embedding of the papers is fitted to every dataset."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EmbeddingPlan:
    """How an embedding is fitted to a dataset. `epochs` maps a scale to epochs; "full" is the paper's.

    `kind` names what is fitted (see `stages.build_embedding`), `options` are its keyword arguments. `whiten` asks for
    PCA whitening of the vectors before they are clustered and compared (ACAI on MNIST; CACTUs, App. D), `normalize`
    for vectors of length 1 (LEO; reference code, not in the paper). `weights_of` names the embedding whose fitted
    network this one uses. `seconds` is what one epoch took with one thread of an AMD EPYC (Zen 5), for the printed
    plan; None where nobody has measured. `deviation` says where the full fit departs from the paper.
    """

    kind: str
    options: dict
    epochs: dict
    batch: int = 128
    whiten: bool = False
    normalize: bool = False
    weights_of: str = ""
    seconds: float | None = None
    deviation: str = ""

    @property
    def brought(self) -> bool:
        """Whether others have fitted it."""
        return self.kind in ("file", "given", "vgg19")


def _epochs(smoke: int, quick: int, full: int) -> dict:
    return {"smoke": smoke, "quick": quick, "full": full}


_SMALL = {"clusters": 500, "width": 0.25, "stride": 2, "dropout": 0.0}
_SMALL_DEVIATION = "DeepCluster of a quarter of the width, stride 2, 40 epochs"

EMBEDDINGS = {
    ("BiGAN", "omniglot"): EmbeddingPlan("bigan", {"d": 200}, _epochs(1, 10, 400), seconds=13.7),
    # other views of that fit, for the ledger
    ("logits BiGAN", "omniglot"): EmbeddingPlan("bigan", {"d": 200, "logits": True}, _epochs(1, 10, 400),
                                               weights_of="BiGAN", deviation="codes before their squashing"),
    ("unit BiGAN", "omniglot"): EmbeddingPlan("bigan", {"d": 200}, _epochs(1, 10, 400), normalize=True,
                                             weights_of="BiGAN", deviation="codes scaled to length 1"),
    ("BiGAN", "mnist"): EmbeddingPlan("bigan", {"d": 50}, _epochs(1, 4, 400), seconds=32),
    ("BiGAN", "mini_imagenet"): EmbeddingPlan("conv-bigan", {"d": 200}, _epochs(1, 1, 400), seconds=1700),
    ("BiGAN", "celeba"): EmbeddingPlan("conv-bigan", {"d": 200}, _epochs(1, 1, 400), seconds=7100),
    ("ACAI", "omniglot"): EmbeddingPlan("acai", {}, _epochs(1, 1, 763), batch=64, seconds=55),  # 2^24 images in all
    ("ACAI", "mnist"): EmbeddingPlan("acai", {}, _epochs(1, 1, 305), batch=64, whiten=True, seconds=140),
    ("InfoGAN", "mnist"): EmbeddingPlan("infogan", {}, _epochs(1, 3, 50), seconds=31),
    ("logits InfoGAN", "mnist"): EmbeddingPlan("infogan", {"logits": True}, _epochs(1, 3, 50), weights_of="InfoGAN",
                                               deviation="codes before their softmax"),
    # the images that are embedded give the statistics of the whitening (CACTUs, 4.1); "inductive": the training images
    ("DeepCluster", "mini_imagenet"): EmbeddingPlan(
        "deepcluster", {"whiten": "own"}, _epochs(1, 1, 200), batch=256, seconds=3600),
    ("DeepCluster", "celeba"): EmbeddingPlan(
        "deepcluster", {"view": "resize", "whiten": "own"}, _epochs(1, 1, 200), batch=256),
    ("inductive DeepCluster", "mini_imagenet"): EmbeddingPlan(
        "deepcluster", {}, _epochs(1, 1, 200), batch=256, weights_of="DeepCluster",
        deviation="whitened by the statistics of the training images"),
    # what a processor can do: not the paper's
    ("small DeepCluster", "mini_imagenet"): EmbeddingPlan(
        "deepcluster", _SMALL | {"whiten": "own"}, _epochs(1, 1, 40), batch=64, seconds=60, deviation=_SMALL_DEVIATION),
    ("small inductive DeepCluster", "mini_imagenet"): EmbeddingPlan(
        "deepcluster", _SMALL, _epochs(1, 1, 40), batch=64, seconds=60, weights_of="small DeepCluster",
        deviation=f"{_SMALL_DEVIATION}, whitened by the statistics of the training images"),
    ("small untrained DeepCluster", "mini_imagenet"): EmbeddingPlan(
        "deepcluster", _SMALL | {"whiten": "own"}, _epochs(0, 0, 0), batch=64,
        deviation="DeepCluster of a quarter of the width, stride 2, not trained"),
    ("short ACAI", "omniglot"): EmbeddingPlan("acai", {}, _epochs(1, 1, 50), batch=64, seconds=55,
                                              deviation="ACAI for 50 epochs"),
    # a VGG-16 that others have fitted: see `stages.wanted_vectors`
    ("DeepCluster", "imagenet"): EmbeddingPlan("file", {}, _epochs(1, 1, 500)),
    # LEO, App. B.2: features of a classifier of the meta-training classes, 10,000 and 50,000 steps
    ("WRN-28-10 layer-21 640-d center crop", "mini_imagenet"): EmbeddingPlan(
        "supervised", {}, _epochs(1, 1, 270), batch=1024, normalize=True),
    ("multi-view WRN-28-10 (Qiao et al. 2017 style)", "mini_imagenet"): EmbeddingPlan(
        "supervised", {"views": "multi"}, _epochs(1, 1, 270), batch=1024, normalize=True,
        weights_of="WRN-28-10 layer-21 640-d center crop"),
    ("WRN-28-10 layer-21 640-d center crop", "tiered_imagenet"): EmbeddingPlan(
        "supervised", {"classes": 351, "drops": (0.4, 0.5, 0.6, 0.7, 0.8)}, _epochs(1, 1, 114), batch=1024,
        normalize=True),
    ("WRN-28-10 layer-21 640-d center crop", "glyphs"): EmbeddingPlan(  # for the book
        "supervised", {"classes": 1064, "depth": 10, "width": 1, "input": 28, "dropout": 0.0, "area": 0.8, "color": 0.0,
                       "flip": False, "drops": (0.67,)}, _epochs(1, 3, 20), batch=128, normalize=True,
        deviation="features of a WRN-10-1 at 28x28 pixels"),
    ("small features", "mini_imagenet"): EmbeddingPlan(
        "supervised", {"depth": 16, "width": 4, "input": 40, "dropout": 0.0, "autocast": True, "area": 0.5,
                       "color": 0.2}, _epochs(1, 1, 30), batch=128, normalize=True, seconds=115,
        deviation="features of a WRN-16-4 at 40x40 pixels"),
    # LASIUM, section 4.2 and code: generators; a few epochs are enough (see the chapter)
    ("VAE", "omniglot"): EmbeddingPlan("vae", {}, _epochs(1, 5, 1000), seconds=88),
    ("GAN", "omniglot"): EmbeddingPlan("msgan", {}, _epochs(1, 1, 500), seconds=256),
    ("short VAE", "omniglot"): EmbeddingPlan("vae", {"autocast": True}, _epochs(1, 5, 50), seconds=40,
                                              deviation="VAE for 50 epochs"),
    ("short GAN", "omniglot"): EmbeddingPlan("msgan", {"autocast": True}, _epochs(1, 1, 40), seconds=85,
                                              deviation="GAN for 40 epochs"),
    ("untrained GAN", "omniglot"): EmbeddingPlan("msgan", {}, _epochs(0, 0, 0)),
    ("DeepCluster", "celeba_identity"): EmbeddingPlan("deepcluster", {"view": "resize"}, _epochs(1, 1, 200), batch=256),
    ("VGG-19", "omniglot"): EmbeddingPlan("vgg19", {}, _epochs(0, 0, 0)),
    ("VGG-19", "celeba_identity"): EmbeddingPlan("vgg19", {}, _epochs(0, 0, 0)),
    ("VGG-19", "celeba"): EmbeddingPlan("vgg19", {}, _epochs(0, 0, 0)),
    ("VAE", "celeba_identity"): EmbeddingPlan("vae", {}, _epochs(1, 1, 1000)),
    ("GAN", "celeba_identity"): EmbeddingPlan("given", {"latent": 512, "sphere": True}, _epochs(0, 0, 0)),
    ("GAN", "celeba"): EmbeddingPlan("given", {"latent": 512, "sphere": True}, _epochs(0, 0, 0)),
    ("GAN", "mini_imagenet"): EmbeddingPlan("given", {"latent": 120}, _epochs(0, 0, 0)),
    # Meta-GMVAE, App. B.1
    ("SimCLR", "mini_imagenet"): EmbeddingPlan("simclr", {"normalize": True}, _epochs(1, 1, 400), batch=512),
    ("plain SimCLR", "mini_imagenet"): EmbeddingPlan(
        "simclr", {"normalize": True, "schedule": "cosine"}, _epochs(1, 1, 400), batch=512,
        deviation="SimCLR with a plain cosine"),
    ("short SimCLR", "mini_imagenet"): EmbeddingPlan(
        "simclr", {"normalize": True, "autocast": True, "schedule": "cosine"}, _epochs(1, 1, 10), batch=512,
        deviation="SimCLR for 10 epochs, with a plain cosine, in bfloat16"),
    ("PCA pixels", "omniglot"): EmbeddingPlan("pca", {"d": 256}, _epochs(1, 1, 1), seconds=2),
    ("PCA-16 pixels", "omniglot"): EmbeddingPlan("pca", {"d": 16}, _epochs(1, 1, 1), seconds=2),
    ("PCA-16 pixels", "mnist"): EmbeddingPlan("pca", {"d": 16}, _epochs(1, 1, 1), seconds=3),
    ("random network", "omniglot"): EmbeddingPlan("random", {}, _epochs(1, 1, 1), seconds=5),
}  # fmt: skip


def embedding_plan(name: str, dataset: str) -> EmbeddingPlan:
    """How `name` is fitted to `dataset`; a dataset that the paper does not have takes Omniglot's plan.

    ValueError: no such embedding, or CACTUs did not use it there.
    """
    papers = {d for _, d in EMBEDDINGS} - {"glyphs"}
    place = dataset if dataset in papers or (name, dataset) in EMBEDDINGS else "omniglot"
    if (name, place) not in EMBEDDINGS:
        there = ", ".join(f"{n} ({d})" for n, d in EMBEDDINGS)
        raise ValueError(f"no plan for {name!r} on {dataset}; there are: {there}")
    return EMBEDDINGS[name, place]
