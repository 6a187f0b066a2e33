"""A row of a published table as data: what is embedded, where tasks come from, who learns, how it is tested."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from .plans import EmbeddingPlan, embedding_plan

TEST_QUERY = 5  # per class (CACTUs, App. E.1)
TEST_OPTIONS = ("covariance", "e_step", "inference", "test_samples")  # options of a learner that only tests look at


@dataclass(frozen=True)
class Row:
    """One row of a published table. `method`, `embedding` and `variant` are spelled as in ``results/paper``.

    `learner` is "protonets", "maml", "leo" or "gmvae", made with the keyword arguments `network` and `options`, or one
    of the baselines on embeddings: "knn", "linear", "mlp", "matching", "nearest-mean", "ridge". `source` is where
    training tasks come from: "labels", "clusters" (of the embedding, or of pixels), "hyperplanes", "random", "mixed"
    (clusters and the labels of a share of the classes), "attributes", "augmented" (UMTRA), "latent" (of the generator
    `fitted`, with the arguments `latent` of `latent_tasks.LatentTasks`), "unlabeled" (sets of `shot` images, `way` 1).
    `inputs` is what the learner sees, "images" or "embeddings"; `split_protocol` is Omniglot's (`omniglot.PROTOCOLS`).
    `clusters` and `partitions` are k and P, `margin` is that of hyperplanes; `share` of the classes are labeled, and
    `mix` is the probability that a task of "mixed" is of labels.

    `steps` maps a scale to the number of meta-training steps; "full" is the paper's. `tasks`, `way`, `shot`, `query`,
    `lr` and `clip` are those of meta-training; `tests` are (way, shot) pairs, each measured on `test_tasks` tasks of
    `test_query` queries per class (None: all other images of the class). `train_splits` are meta-trained on.
    `validation` asks for early stopping: "every" so many steps on "tasks" tasks of the validation classes with "query"
    queries per class, of the "way" and "shot" of training if it does not name others. The best weights are kept, and
    training ends after "patience" validations without a new best, if that is named.

    `training_of` is for rows that differ in validation and test alone: the slug of the row whose training they all
    take, that row included. It keeps snapshots, and each row selects among them by its own `validation`, without
    "patience".

    `readings` are other ways to test the same trained learner, by name, each as attributes of the learner, "tasks" if
    these are to be fewer, and "classes" for tasks of those whose names end so (left out where there are none), perhaps
    of another "query"; they are measured in the first two tests.

    `search` makes the row a random search: the seed draws a configuration (see `configuration`), which is trained and
    then measured on the validation classes, so that a record is a trial; all trials meet the same tasks. It maps "lr"
    or an option's name to (kind, least, most) with kind "log" or "uniform".
    `deviation` says where even the full run departs from the paper; such a run is never called reproduced. `fitted`
    names the plan of the embedding if it is not the paper's (see `EMBEDDINGS`). `at_most` shortens the training.
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
    mix: float = 0.5
    way: int = 20
    shot: int = 1
    lr: float = 1e-3
    clip: float | None = None
    tests: tuple = ((5, 1), (5, 5), (20, 1), (20, 5))
    test_tasks: dict = field(default_factory=lambda: {"smoke": 5, "quick": 100, "full": 1000})
    test_query: int | None = TEST_QUERY
    train_splits: tuple = ("train",)
    validation: dict = field(default_factory=dict)
    search: dict = field(default_factory=dict)
    readings: dict = field(default_factory=dict)
    latent: dict = field(default_factory=dict)
    deviation: str = ""
    fitted: str = ""
    at_most: int | None = None
    training_of: str = ""

    def renamed(self, suffix: str, **changes) -> Row:
        """The row with a suffix to its slug and to the name of a training that it shares, and with other changes."""
        shared = self.training_of and self.training_of + suffix
        return replace(self, slug=self.slug + suffix, training_of=shared, **changes)

    @property
    def trained(self) -> bool:
        """Whether anything is meta-trained."""
        return self.steps["full"] > 0

    @property
    def needs_embedding(self) -> bool:
        return bool(self.fitted) or self.embedding not in ("", "N/A", "pixels")

    @property
    def departs(self) -> str:
        """Where the row, or the embedding under it, departs from the paper even at full scale; "" if nowhere."""
        parts = (self.deviation, self.plan.deviation if self.needs_embedding else "")
        return "; ".join(part for part in parts if part)

    def checks(self, scale: str) -> tuple[int, int]:
        """Tasks of a validation, and after how many steps there is one: at least five times in a whole run.

        A shortened run is checked as if it were whole, as it may be gone on with.
        """
        tasks = {"smoke": self.test_tasks["smoke"], "quick": min(200, self.validation["tasks"]),
                 "full": self.validation["tasks"]}[scale]  # fmt: skip
        return tasks, min(self.validation["every"], -(-self.steps[scale] // 5))

    def configuration(self, seed: int) -> Row:
        """The row itself, or the trial that `seed` draws, always the same."""
        drawn, source = {}, random.Random(seed)
        for name, (kind, least, most) in self.search.items():
            u = source.random()
            drawn[name] = least * (most / least) ** u if kind == "log" else least + (most - least) * u
        lr = drawn.pop("lr", self.lr)
        return replace(self, lr=lr, options=self.options | drawn)

    def draws(self, seed: int) -> int:
        """The seed of initial weights and of all tasks: 0 for every trial of a search, so that only the configuration
        differs between trials."""
        return 0 if self.search else seed

    @property
    def test_split(self) -> str:
        return "val" if self.search else "test"

    @property
    def splits(self) -> tuple:
        """The splits whose images the row uses: "val" only if it is tuned, stopped early or trained on it."""
        trained = self.trained or self.learner == "matching" or self.options.get("standardize") == "train"
        used = {"test", self.test_split, *(self.train_splits if trained else ())}
        tuned = self.learner in ("knn", "mlp", "ridge") or self.learner == "linear" and not self.options
        used |= {"val"} if self.validation or tuned else set()
        return tuple(split for split in ("train", "val", "test") if split in used)

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

    def training(self) -> dict:
        """What of the protocol bears on the training: what rows that share one must agree in."""
        ours = ("test_query", "validation", *TEST_OPTIONS) if self.training_of else ()
        kept = {name: value for name, value in self.protocol().items() if name not in ours}
        if "validation" in kept:  # a longer patience may go on with the same run
            kept["validation"] = {name: value for name, value in self.validation.items() if name != "patience"}
        return kept

    def protocol(self) -> dict:
        """Every switch that moves a number, for the record."""
        training = {"train_way": self.way, "train_shot": self.shot, "train_query": self.query, "outer_lr": self.lr}
        training |= {} if self.clip is None else {"clip": self.clip}
        place = {"source": self.source, "split": self.split_protocol, "test_query": self.test_query}
        place |= {} if self.inputs == "images" else {"inputs": self.inputs}
        place |= {"clusters": self.clusters, "partitions": self.partitions} if self.partitions else {}
        place |= {} if self.margin is None else {"margin": self.margin}
        place |= self.latent
        place |= {"labeled_share": self.share} if self.share else {}
        place |= {"labeled_tasks": self.mix} if self.source == "mixed" else {}
        place |= {"train_splits": self.train_splits} if self.train_splits != ("train",) else {}
        place |= {"validation": self.validation} if self.validation else {}
        place |= {"draws": "shared"} if self.search else {}  # trials of before had seeds of their own
        normed = self.learner == "maml" and self.network.get("hidden") != () and not self.network.get("linear")
        norm = {"batch_norm": "transductive"} if normed else {}
        return place | (training if self.trained else {}) | self.network | norm | self.options
