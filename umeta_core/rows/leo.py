"""The rows of LEO: Tables 1 and 2, the multi-view features of section 4.3, and the controls that the paper lacks.

Every row learns on features of a network trained on the meta-training classes, has its own 1-shot and 5-shot training,
and is tested on all other images of the classes. Hyper-parameters are those of the released code (its README), which
belong to its loss conventions; the paper's Table 6 is far from them (see the chapter's ledger).
"""

from __future__ import annotations

from dataclasses import replace

from .base import Row

FEATURES = "WRN-28-10 layer-21 640-d center crop"
MULTI_VIEW = "multi-view WRN-28-10 (Qiao et al. 2017 style)"

# Outer learning rate and options by dataset and shot.
_README = {
    ("mini_imagenet", 1): (2.739071e-4, dict(l2=3.623413e-10, orthogonality=0.188103, dropout=0.307651, kl=0.756143,
                                             encoder_penalty=5.756821e-6)),
    ("mini_imagenet", 5): (4.102361e-4, dict(l2=8.540338e-9, orthogonality=1.523998e-3, dropout=0.300299, kl=0.466387,
                                             encoder_penalty=2.661608e-7)),
    ("tiered_imagenet", 1): (8.659053e-4, dict(l2=4.148858e-10, orthogonality=5.451078e-3, dropout=0.475126,
                                               kl=2.034189e-3, encoder_penalty=8.302962e-5)),
    ("tiered_imagenet", 5): (6.110314e-4, dict(l2=1.690399e-10, orthogonality=2.481216e-2, dropout=0.415158,
                                               kl=1.622811, encoder_penalty=2.672450e-5)),
}  # fmt: skip
_COMMON = dict(
    paper="leo", split_protocol=None, embedding=FEATURES, inputs="embeddings", source="labels", way=5, query=15,
    tasks=12, test_query=None, train_splits=("train", "val"), validation={"every": 1000, "tasks": 2000, "query": 15},
    steps={"smoke": 3, "quick": 1000, "full": 100_000}, test_tasks={"smoke": 5, "quick": 200, "full": 10_000},
)  # fmt: skip

# Table 2: what each variant leaves out, as arguments of `leo.LEO`.
_VARIANTS = (
    ("generator", "conditional generator only (no latent adaptation, no fine-tuning)",
     {"latent_steps": 0, "weight_steps": 0}),
    ("generator-tuned", "conditional generator + fine-tuning (no latent adaptation)", {"latent_steps": 0}),
    ("random-prior", "random prior (encoder replaced by p(z)=N(0,I))", {"prior": "random"}),
    ("deterministic", "deterministic (no sampling of z or w)", {"stochastic": False}),
    ("no-tuning", "no fine-tuning", {"weight_steps": 0}),
)  # fmt: skip
_CONTROLS = (("nearest-mean", "Nearest class mean"), ("ridge", "Ridge"), ("linear", "Logistic regression"))


def _leo(dataset: str, shot: int, slug: str, method: str, table: str, variant: str, options=None, **more) -> Row:
    lr, tuned = _README[dataset, shot]
    slug = f"{slug}-{shot}shot" + ("" if dataset == "mini_imagenet" else f"-{dataset.replace('_', '-')}")
    common = dict(dataset=dataset, shot=shot, tests=((5, shot),), lr=lr, options=tuned | (options or {}))
    return Row(slug=slug, method=method, learner="leo", table=table, variant=variant, **(_COMMON | common | more))


def _meta_sgd(dataset: str, shot: int) -> Row:
    """Meta-learned weights and step sizes of a linear classifier, on the same features."""
    options = {"inner_lr": 1.0, "inner_steps": 5, "test_steps": 5, "inner_loss": "sum", "meta_sgd": True}
    row = _leo(dataset, shot, "meta-sgd", "Meta-SGD (our features)", "1", "full")
    return replace(row, learner="maml", network={"linear": True}, lr=1e-3, options=options,
                   deviation="settings not searched for")  # fmt: skip


def _controls(dataset: str, shot: int) -> list[Row]:
    rows = (_leo(dataset, shot, f"{learner}-features", method, "2", "control") for learner, method in _CONTROLS)
    untrained = dict(steps={"smoke": 0, "quick": 0, "full": 0}, tasks=0, query=0, options={}, validation={})
    return [replace(row, learner=c[0], train_splits=("train",), **untrained) for row, c in zip(rows, _CONTROLS)]


def _dataset(dataset: str, shot: int) -> list[Row]:
    full = _leo(dataset, shot, "leo", "LEO (ours)", "1", "full")
    multi = replace(full, slug=full.slug.replace("leo-", "leo-multi-view-"), table="Text sec. 4.3",
                    embedding=MULTI_VIEW, deviation="settings of the center crop")  # fmt: skip
    return [
        _meta_sgd(dataset, shot),
        *(_leo(dataset, shot, f"leo-{slug}", "LEO", "2", variant, options, deviation="settings of full LEO")
          for slug, variant, options in _VARIANTS),
        full,
        *([multi] if dataset == "mini_imagenet" else []),
        replace(full, slug=full.slug.replace("leo-", "leo-train-only-"), table="ledger",
                variant="meta-training classes only", train_splits=("train",)),
        *_controls(dataset, shot),
    ]  # fmt: skip


_PUBLISHED = [row for dataset in ("mini_imagenet", "tiered_imagenet") for shot in (1, 5) for row in
              _dataset(dataset, shot)]  # fmt: skip


_RANGES = dict(lr=("log", 1e-4, 1e-2), l2=("log", 1e-10, 1e-4), orthogonality=("log", 1e-3, 1e2),
               dropout=("uniform", 0.0, 0.6), kl=("log", 1e-3, 3.0), encoder_penalty=("log", 1e-9, 1e-1))  # fmt: skip
_META_SGD_RANGES = dict(lr=("log", 1e-4, 1e-1), inner_lr=("log", 0.1, 100.0))


# The best 1-shot trials on small features: seeds of the rows "leo-1shot-small-search", "meta-sgd-1shot-small-search".
# They serve both shots and all of LEO's variants; the paper searched for each.
BEST_TRIAL = {"leo": 5, "maml": 7}


def _small(row: Row) -> Row:
    """The same on features of a network that two processor cores can train, with the hyper-parameters found there.

    20,000 of the paper's 100,000 steps; `_long` rows show what the others would change.
    """
    row = replace(row, slug=f"{row.slug}-small", fitted="small features")
    if not row.trained:
        return row
    row = replace(row, at_most=20_000)
    found = replace(row, search=_ranges(row)).configuration(BEST_TRIAL[row.learner])
    other = ["settings found at one shot"] if row.shot > 1 else []
    other = [row.deviation, *other] if row.deviation and row.learner == "leo" else other
    return replace(found, search={}, deviation="; ".join(other))


def _long(row: Row) -> Row:
    """The same for up to 100,000 steps. LEO ends once 15 validations in a row brought nothing better."""
    patience = {"patience": 15} if row.learner == "leo" else {}
    return replace(row, slug=f"{row.slug}-long", table="ledger", variant="up to 100,000 steps", at_most=None,
                   validation=row.validation | patience)  # fmt: skip


def _ranges(row: Row) -> dict:
    return _META_SGD_RANGES if row.learner == "maml" else _RANGES


def _search(row: Row) -> Row:
    """Trials of the paper's random search: drawn by the seed, trained shortly without the validation classes."""
    return replace(row, slug=f"{row.slug}-search", table="search", variant=f"random search; {row.variant}",
                   at_most=None, steps={"smoke": 3, "quick": 300, "full": 5000}, train_splits=("train",),
                   search=_ranges(row), test_tasks=row.test_tasks | {"full": 2000})  # fmt: skip


_ON_CENTER_CROPS = [row for row in _PUBLISHED if row.dataset == "mini_imagenet" and row.embedding == FEATURES]
_SMALL = [_small(row) for row in _ON_CENTER_CROPS]

ROWS = (
    *_PUBLISHED, *_SMALL, *(_long(row) for row in _SMALL if row.trained and row.table in ("1", "2")),
    *(_search(row) for row in (*_ON_CENTER_CROPS, *_SMALL) if row.trained and row.table in ("1", "2")),
)  # fmt: skip
