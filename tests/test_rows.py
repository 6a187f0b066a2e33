"""What a row says is what is run: its splits, seeds, rates, switches, and the rules of its clusters."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from umeta_core import experiments, stages
from umeta_core.attributes import AttributeTasks
from umeta_core.augmentation import auto_augment, umtra_drawings
from umeta_core.baselines import NearestMean
from umeta_core.data import ImageSet, load
from umeta_core.embeddings.deepcluster import pca_whitening
from umeta_core.episodes import PartitionTasks
from umeta_core.evaluation import Evaluation, evaluate
from umeta_core.experiments import early_stopping, run_row, training_tasks
from umeta_core.results import matches, published
from umeta_core.rows import EMBEDDINGS, ROWS, find_row, select_rows
from umeta_core.storage import save_tensors
from umeta_core.training import read_checkpoint, train


def test_tuning_sees_the_validation_classes_alone(tmp_path):
    """Where test vectors tell the classes apart and validation vectors do not, the recorded tuning is at chance."""
    row, g = dataclasses.replace(find_row("ridge-bigan", "glyphs"), tests=((5, 1),)), torch.Generator().manual_seed(0)
    for split in ("val", "test"):
        labels = stages.images_of(row, split).labels
        classes = torch.randn(int(labels.max()) + 1, 200, generator=g)[labels]
        z = classes if split == "test" else torch.randn(classes.shape, generator=g)
        save_tensors({"z": z}, stages.vectors_file(row, split, "smoke", tmp_path))
    (cell,) = run_row(row, "smoke", folder=tmp_path, stages=tmp_path)["cells"]
    assert cell["accuracy"] == 100 and max(cell["tuned"]["validation"].values()) < 60


def test_vectors_are_whitened_by_the_statistics_of_the_training_images(tmp_path, monkeypatch):
    row, sets = find_row("knn-acai-mnist"), {split: load("glyphs", split, size=8) for split in ("train", "test")}
    model = SimpleNamespace(d=5, embed=lambda images: images.flatten(1)[:, ::4].float())
    monkeypatch.setattr(stages, "images_of", lambda row, split, *_: sets[split])
    monkeypatch.setattr(stages, "fit_embedding", lambda *_: model)
    mean, matrix = pca_whitening(model.embed(sets["train"].images), 5)
    for split, images in sets.items():
        wanted = (model.embed(images.images) - mean) @ matrix
        torch.testing.assert_close(stages.vectors(row, split, "smoke", folder=tmp_path), wanted)


def test_hyperplanes_have_the_margin_and_the_spread_of_their_row(monkeypatch):
    asked = []
    monkeypatch.setattr(stages.parts, "hyperplane_partitions",
                        lambda z, **more: asked.append((more["margin"], more["spread"])))  # fmt: skip
    for slug in ("hyperplanes-bigan", "hyperplanes-bigan-margin", "hyperplanes-deepcluster-margin-mini-imagenet"):
        row = find_row(slug)
        stages._partitions(row, "full", 0, 10, row.least(), torch.zeros(9, 2), torch.Generator())
    assert asked == [(0.0, 0.8), (0.5, 0.8), (0.1, 0.0)]


def test_clusters_follow_the_rule_of_the_learner(monkeypatch):
    """The ProtoNets code wants 80 % of the clusters with R members, the best of three."""
    asked = []
    monkeypatch.setattr(stages.parts, "cluster_partitions", lambda z, k, many, g, **more: asked.append(more))
    for slug in ("cactus-protonets-bigan", "cactus-maml-bigan"):
        row = find_row(slug)
        stages._partitions(row, "full", 500, row.stack("full"), row.least(), torch.zeros(22_000, 2), torch.Generator())
    assert asked == [{"enough": 0.8, "sizable": 16, "restarts": 3, "least": 16, "way": 20}, {"least": 6, "way": 20}]


@pytest.mark.parametrize("paper, table", [("leo", "1"), ("leo", "2"), ("meta_gmvae", "2-left"), ("meta_gmvae", "9")])
def test_a_table_asks_for_the_rows_that_measure_its_numbers_and_no_other(paper, table):
    numbers = [n for n in published(paper) if n["table"] == table]

    def measures(number, row):
        return matches(number, vars(row)) and (number["way"], number["shot"]) in row.tests

    rows = select_rows(paper, table)
    assert all(any(measures(n, row) for n in numbers) for row in rows)
    assert all(any(measures(n, row) for row in rows) for n in numbers
               if any(measures(n, row) for row in ROWS if row.paper == paper))


def test_centroids_are_the_best_of_ten(tmp_path, monkeypatch):
    asked, row = [], find_row("matching-bigan", "glyphs")
    monkeypatch.setattr(stages, "vectors", lambda *_: torch.zeros(9, 2))
    monkeypatch.setattr(stages, "kmeans", lambda z, k, g, restarts: asked.append(restarts)
                        or SimpleNamespace(centroids=z[:3]))  # fmt: skip
    for scale in ("smoke", "full"):
        stages.centroids(row, scale, folder=tmp_path)
    assert asked == [1, 10]


def test_celeba_trains_validates_and_tests_on_other_attributes(monkeypatch):
    """20, 10 and 10 of them, in the order of their names (CACTUs, App. B)."""
    values = torch.randint(2, (400, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    faces = ImageSet(torch.zeros(400, 3, 1, 1, dtype=torch.uint8), torch.zeros(400, dtype=torch.int64), ["1"], [],
                     "celeba", "train", values, [f"a{i:02}" for i in range(40)])  # fmt: skip
    monkeypatch.setattr(experiments, "shown", lambda *_: (faces, None))
    row = find_row("oracle-maml-celeba")
    sources = [training_tasks(row, "smoke", 0), *(experiments.testing_tasks(row, "smoke", s) for s in ("val", "test"))]
    columns = [source.prototypes[..., 0].unique().tolist() for source in sources]
    assert columns == [list(range(20)), list(range(20, 30)), list(range(30, 40))]


def test_a_mixed_task_is_labeled_with_the_probability_of_its_row(monkeypatch):
    row, images = find_row("mixed-protonets-10", "glyphs"), load("glyphs", "train")
    monkeypatch.setattr(experiments, "make_partitions", lambda *_: torch.arange(len(images)) % 50)
    source = training_tasks(row, "smoke", 0)
    assert source.share == row.mix and source.second.size.shape[1] == 50
    assert int(source.first.usable(16)[1]) == round(0.1 * images.n_classes)


def test_maml_on_codes_has_the_network_of_the_reference_code():
    network = experiments.build_learner(find_row("cactus-maml-bigan-codes-mnist"), 1, 28, 0, features=50).network
    assert [tuple(w.shape) for w in network.weights] == [(64, 50), (64, 64), (10, 64)]
    assert network.norm == "shift" and all(0.01 < w.abs().max() <= 0.02 for w in network.weights)


def test_a_reading_is_compared_with_the_first_test_task_by_task():
    """The same learner on the same tasks differs by 0, and that is certain."""
    source, task = PartitionTasks(load("glyphs", "val")), {"way": 5, "shot": 1, "tasks": 60}
    first = evaluate(NearestMean(), source, **task)
    found = experiments._reading(NearestMean(), {"tasks": 40}, source, first, **task)
    assert (found["tasks"], found["difference"], found["difference_ci95"]) == (40, 0, 0)


@pytest.mark.parametrize("calibrated", [False, True])
def test_features_are_decoded_as_the_row_says(calibrated):
    row = find_row("gmvae-mini-imagenet")
    row = dataclasses.replace(row, options=row.options | {"calibrated": calibrated})
    assert experiments.build_learner(row, 3, 84, 0, features=16).decoder.calibrated is calibrated


def test_other_seeds_meet_other_test_tasks(monkeypatch):
    asked, row = [], dataclasses.replace(find_row("oracle-protonets", "glyphs"), tests=((5, 1),))
    monkeypatch.setattr(experiments, "evaluate",
                        lambda *_, seed, **__: asked.append(seed) or Evaluation(torch.ones(2)))  # fmt: skip
    learner = experiments.untrained(row, 0)
    for seed in (0, 3):
        experiments.measure(row, learner, "smoke", seed)
    assert asked == [0, 3]


def test_a_row_is_trained_with_its_rate_and_its_clipping(monkeypatch):
    asked = []
    monkeypatch.setattr(experiments, "train", lambda learner, source, **how: asked.append(how) or {})
    monkeypatch.setattr(experiments, "training_tasks", lambda *_: None)
    learners = []
    for slug, shape in (("oracle-maml-mini-imagenet", (3, 84, 0)), ("oracle-maml", (1, 28, 0)),
                        ("leo-1shot", (0, 0, 0, 640))):  # fmt: skip
        learners.append(experiments.build_learner(find_row(slug), *shape))
        experiments._train(learners[-1], find_row(slug), "smoke", 0, "cpu", None, None)
    assert [how["clip"] for how in asked] == [2.0, None, None]  # 10 for the summed loss of 5 classes (reference code)
    assert [how["prepare"] for how in asked] == [None, None, learners[2].prepare_gradients]
    assert [how["lr"] for how in asked] == [1e-3, 1e-3, find_row("leo-1shot").lr]


def test_latent_tasks_have_every_switch_of_their_row(monkeypatch):
    monkeypatch.setattr(experiments, "fit_embedding",
                        lambda *_: SimpleNamespace(latent=4, generate=None, posterior=None))  # fmt: skip
    for slug in ("ro-gan-maml-02", "oc-vae-protonets-04"):
        row = find_row(slug, "glyphs")
        source = training_tasks(row, "smoke", 0)
        known = vars(source) | source.switches
        assert "strength" in row.latent and {name: known[name] for name in row.latent} == row.latent


def test_trials_of_a_search_are_measured_on_the_validation_classes(monkeypatch):
    asked, row = [], find_row("leo-1shot-search", "glyphs")
    monkeypatch.setattr(experiments, "testing_tasks", lambda row, scale, split, *_: asked.append(split) or {}["stop"])
    for each in (row, dataclasses.replace(row, search={})):
        with pytest.raises(KeyError):
            experiments.measure(each, None, "smoke", 0)
    assert asked == ["val", "test"]


def test_a_checkpoint_gives_the_best_weights_of_its_run(tmp_path):
    row, file, values = find_row("oracle-protonets", "glyphs"), tmp_path / "run.pt", iter([1.0, 0.0])
    train(experiments.untrained(row, 0), PartitionTasks(load("glyphs", "val")), steps=2, tasks=1, way=5, shot=1,
          query=1, validate=lambda _: next(values), validate_every=1, keep_best=True, checkpoint=file,
          config={"row": row.slug}, progress=False)  # fmt: skip
    state, (found, step) = read_checkpoint(file), experiments.trained(row, file)
    assert step == 2 and all(torch.equal(value, state["best"][name]) for name, value in found.state_dict().items())
    assert not all(torch.equal(value, state["learner"][name]) for name, value in found.state_dict().items())


def test_a_checkpoint_is_tested_on_the_embedding_it_learned_on(tmp_path):
    row, file = find_row("leo-1shot", "glyphs"), tmp_path / "run.pt"
    empty = dict.fromkeys(("step", "learner", "optimizer", "generator", "history"))
    save_tensors(empty | {"config": {"row": row.slug, "scale": "smoke"}}, file)
    with pytest.raises(ValueError, match="learned on the embedding of scale smoke; test it with --scale smoke"):
        experiments.trained(row, file, scale="quick", stages=tmp_path)
    with pytest.raises(ValueError, match="scratch-glyphs trains nothing and has no checkpoint"):
        experiments.trained(find_row("scratch", "glyphs"), file)


def test_a_shortened_run_is_validated_at_the_steps_of_the_whole():
    row = find_row("leo-1shot")
    assert dataclasses.replace(row, at_most=2000).checks("full") == row.checks("full") == (2000, 1000)


def test_a_skipped_interval_of_losses_stays_empty_in_the_record():
    history = {"step": [100, 200], "loss": [None, 0.123456], "accuracy": [None, 50.0], "seconds": 1.0}
    assert experiments._thinned(history) == {"step": [100, 200], "loss": [None, 0.1235], "accuracy": [None, 50.0]}


@pytest.mark.parametrize("dataset", ["glyphs", "celeba_identity"])
def test_a_moved_row_is_found_by_its_name(dataset):
    for row in select_rows("cactus", "8", "oracle,scratch", dataset):
        assert find_row(row.slug) == row


def test_selection_is_on_the_validation_classes():
    row, seen = find_row("gmvae-20way-5shot-glyphs"), []

    class Learner(torch.nn.Module):
        def predict(self, episodes):
            seen.append(episodes.query.flatten(0, 2).mul(255).round().byte())
            return torch.zeros(len(episodes.query), episodes.way * 15, episodes.way)

    row = dataclasses.replace(row, validation=row.validation | {"tasks": 2})
    early_stopping(row, "quick", 0)["validate"](Learner())
    known = {image.numpy().tobytes() for image in load("glyphs", "val").images}
    assert seen and {image.numpy().tobytes() for image in torch.cat(seen)} <= known


# The settings that the papers print, or where they are silent their code


def test_rows_of_cactus_have_the_networks_and_switches_of_its_code():
    """Tables 5 and 11, App. E; the scripts of training from scratch."""
    small = {"filters": 32, "downsample": "stride", "head": "mean", "norm": "shift", "eps": 1e-3, "head_init": "normal"}
    large = small | {"downsample": "pool", "head": "flatten", "head_init": "glorot"}
    maml = {"inner_lr": 0.05, "inner_steps": 5, "test_steps": 50, "inner_loss": "sum", "adapt_norm": False}
    scratch = {"inner_lr": 0.1, "test_steps": 200, "inner_loss": "sum", "adapt_norm": False}
    for slug, network, options in (
        ("oracle-maml", small, maml), ("oracle-maml-mnist", small, maml), ("oracle-maml-mini-imagenet", large, maml),
        ("oracle-maml-celeba", large, maml), ("scratch", small, scratch), ("scratch-mini-imagenet", large, scratch),
        ("oracle-protonets", {"filters": 64}, {"distance": "sum", "batch_norm": "inductive"}),
        ("oracle-maml-imagenet", {"residual": True}, maml | {"inner_lr": 1e-3, "test_steps": 100}),
        ("mlp-bigan", {}, {"stop_on_query": True}),
    ):  # fmt: skip
        row = find_row(slug)
        assert (row.network, row.options) == (network, options), slug
    row = find_row("cactus-maml-deepcluster-imagenet")
    assert (row.lr, row.clip, row.tasks, row.way, row.query, row.steps["full"]) == (1e-4, 2.0, 3, 5, 5, 240_000)
    sizes = {slug: (find_row(slug).clusters, find_row(slug).partitions) for slug in (
        "random-maml", "pixels-maml", "matching-bigan", "matching-bigan-mnist", "cactus-maml-deepcluster-imagenet",
        "curve-protonets-k50")}  # fmt: skip
    assert list(sizes.values()) == [(500, 2400), (500, 1), (500, 0), (10, 0), (10_000, 1), (50, 10)]
    half, curve = find_row("mixed-half-protonets-1"), find_row("curve-protonets-k50")
    assert (half.share, half.mix) == (0.01, 0.5) and (curve.query, curve.steps["full"]) == (5, 10_000)


def test_rows_of_lasium_have_the_settings_of_its_code():
    drawings = {"filters": 64, "downsample": "stride", "norm": "shift", "eps": 1e-3}
    photos = {"filters": 32, "downsample": "pool", "head": "flatten", "norm": "shift", "eps": 1e-3, "padding": 0}
    maml = {"inner_steps": 5, "test_steps": 50, "inner_loss": "mean", "adapt_norm": True}
    for place, rate, norm, steps in (
        ("", 0.4, "transductive", (5000, 8000)), ("-celeba-identity", 0.05, "inductive", (60_000, 15_000)),
        ("-celeba", 0.05, "transductive", (105_000, 60_000)), ("-mini-imagenet", 0.05, "inductive", (60_000, 30_000)),
    ):  # fmt: skip
        one, two = (find_row(f"supervised-{learner}{place}") for learner in ("maml", "protonets"))
        assert one.network == (photos if place else drawings | {"head": "mean"}), place
        assert one.options == maml | {"inner_lr": rate}, place
        assert two.network == (photos if place else drawings), place
        assert two.options == {"distance": "mean", "apart": True, "batch_norm": norm}, place
        assert {(row.tasks, row.shot, row.query, row.lr) for row in (one, two)} == {(4, 1, 5, 1e-3)}, place
        assert (one.steps["full"], two.steps["full"]) == steps, place


def test_latent_tasks_of_lasium_have_the_constants_of_their_place():
    """Table 7 for Omniglot; for CelebA's ProGAN, of unit latents, and BigBiGAN the scripts."""
    upright, shifted = {"shift": 0, "fill": None}, {}
    for slug, policy, strength, anchors, more in (
        ("n-vae-maml", "N", 0.5, "encoded", shifted), ("ro-gan-maml", "RO", 0.2, "prior", shifted),
        ("oc-vae-protonets", "OC", 0.2, "encoded", shifted), ("n-gan-maml-2", "N", 2.0, "prior", shifted),
        ("ro-gan-maml-celeba-identity", "RO", 0.6, "prior", upright),
        ("ro-vae-maml-celeba-identity", "RO", 0.2, "encoded", upright),
        ("n-gan-maml-celeba", "N", 0.08, "prior", upright), ("n-gan-maml-mini-imagenet", "N", 1.0, "prior", upright),
        ("ro-vae-maml-outwards", "RO", 0.2, "encoded", {"sign": -1}),
        ("ro-vae-maml-no-shift", "RO", 0.2, "encoded", {"fill": None}),
        ("ro-gan-maml-background", "RO", 0.2, "prior", {"fill": "background"}),
        ("oc-vae-maml-clean-queries", "OC", 0.2, "encoded", {"own_noise": 0.0}),
    ):  # fmt: skip
        wanted = {"policy": policy, "strength": strength, "anchors": anchors, **more}
        assert find_row(slug).latent == wanted, slug


def test_rows_of_leo_have_the_settings_of_its_code():
    """App. B and the README; what each line of Table 2 leaves out."""
    for slug in ("leo-1shot", "leo-5shot", "leo-5shot-tiered-imagenet", "meta-sgd-1shot"):
        row = find_row(slug)
        assert (row.tasks, row.way, row.query, row.steps["full"]) == (12, 5, 15, 100_000), slug
        assert row.test_tasks["full"] == 10_000 and row.test_query is None, slug
        assert row.validation == {"every": 1000, "tasks": 2000, "query": 15}, slug
    whole = find_row("leo-1shot").options
    assert {slug: dict(find_row(f"leo-{slug}-1shot").options.items() - whole.items()) for slug in (
        "generator", "generator-tuned", "random-prior", "deterministic", "no-tuning")} == {
            "generator": {"latent_steps": 0, "weight_steps": 0}, "generator-tuned": {"latent_steps": 0},
            "random-prior": {"prior": "random"}, "deterministic": {"stochastic": False},
            "no-tuning": {"weight_steps": 0}}  # fmt: skip
    assert find_row("meta-sgd-1shot").options == {"inner_lr": 1.0, "inner_steps": 5, "test_steps": 5,
                                                  "inner_loss": "sum", "meta_sgd": True}  # fmt: skip
    assert find_row("leo-1shot-small-long").validation["patience"] == 15


def test_rows_of_meta_gmvae_have_the_settings_of_its_appendix():
    """App. A.1 and B.1: sets of a step, images of a set, samples, components, steps; weight decay of the code."""
    columns = {
        "gmvae-5way-1shot": (4, 200, 32, 5, 60_000, 1e-3, 1e-6),
        "gmvae-20way-5shot": (4, 300, 32, 20, 60_000, 1e-3, 1e-6),
        "gmvae-mini-imagenet": (16, 5, 256, 5, 15_000, 1e-4, 5e-2),
        "gmvae-50shot-mini-imagenet": (4, 200, 256, 5, 30_000, 1e-4, 5e-2),
    }
    for slug, wanted in columns.items():
        row = find_row(slug)
        known = [row.options[name] for name in ("samples", "components", "weight_decay")]
        assert (row.tasks, row.shot, *known[:2], row.steps["full"], row.lr, known[2]) == wanted, slug
        assert (row.options["iterations"], row.options["e_step"], row.test_query) == (10, "identity", 15), slug
        assert {name: row.validation[name] for name in ("every", "tasks", "query")} == {
            "every": 1000, "tasks": 1000, "query": 15}, slug  # fmt: skip
    for slug, query in (("cactus-maml-simclr-mini-imagenet", 5), ("umtra-maml-simclr-mini-imagenet", 1)):
        row = find_row(slug)
        assert (row.network, row.clip, row.tasks, row.query) == ({"hidden": ()}, 2.0, 8, query), slug
        assert row.options == {"inner_lr": 0.05, "inner_steps": 5, "test_steps": 50, "inner_loss": "sum"}, slug
    assert find_row("lr-simclr-mini-imagenet").options == {"c": 1.0, "standardize": "train"}


WRN, VIEWS = "WRN-28-10 layer-21 640-d center crop", "multi-view WRN-28-10 (Qiao et al. 2017 style)"


@pytest.mark.parametrize("name, dataset, kind, options, epochs, batch", [
    ("BiGAN", "omniglot", "bigan", {"d": 200}, 400, 128), ("BiGAN", "mnist", "bigan", {"d": 50}, 400, 128),
    ("BiGAN", "mini_imagenet", "conv-bigan", {"d": 200}, 400, 128),
    ("BiGAN", "celeba", "conv-bigan", {"d": 200}, 400, 128),
    ("InfoGAN", "mnist", "infogan", {}, 50, 128),
    ("DeepCluster", "mini_imagenet", "deepcluster", {"whiten": "own"}, 200, 256),
    ("DeepCluster", "celeba", "deepcluster", {"view": "resize", "whiten": "own"}, 200, 256),
    ("inductive DeepCluster", "mini_imagenet", "deepcluster", {}, 200, 256),
    (WRN, "mini_imagenet", "supervised", {}, 270, 1024),
    (VIEWS, "mini_imagenet", "supervised", {"views": "multi"}, 270, 1024),
    (WRN, "tiered_imagenet", "supervised", {"classes": 351, "drops": (0.4, 0.5, 0.6, 0.7, 0.8)}, 114, 1024),
    ("VAE", "omniglot", "vae", {}, 1000, 128), ("VAE", "celeba_identity", "vae", {}, 1000, 128),
    ("GAN", "omniglot", "msgan", {}, 500, 128), ("untrained GAN", "omniglot", "msgan", {}, 0, 128),
    ("GAN", "celeba_identity", "given", {"latent": 512, "sphere": True}, 0, 128),
    ("GAN", "celeba", "given", {"latent": 512, "sphere": True}, 0, 128),
    ("GAN", "mini_imagenet", "given", {"latent": 120}, 0, 128),
    ("SimCLR", "mini_imagenet", "simclr", {"normalize": True}, 400, 512),
    ("small untrained DeepCluster", "mini_imagenet", "deepcluster",
     {"clusters": 500, "width": 0.25, "stride": 2, "dropout": 0.0, "whiten": "own"}, 0, 64),
])  # fmt: skip
def test_an_embedding_is_fitted_as_its_paper_says(name, dataset, kind, options, epochs, batch):
    plan = EMBEDDINGS[name, dataset]
    assert (plan.kind, plan.options, plan.epochs["full"], plan.batch) == (kind, options, epochs, batch)


@pytest.mark.parametrize("dataset, images", [("omniglot", 22_000), ("mnist", 55_000)])
def test_acai_sees_2_to_the_24_images(dataset, images):
    plan = EMBEDDINGS["ACAI", dataset]
    assert plan.batch == 64 and abs(plan.epochs["full"] * images / 2**24 - 1) < 1e-3


# What reaches what


def test_images_are_split_as_the_paper_of_the_row_splits_them(monkeypatch):
    asked = []
    monkeypatch.setattr(stages, "load", lambda name, split, *, protocol, device: asked.append((name, split, protocol)))
    for slug, split in (("oracle-maml", "train"), ("supervised-maml", "val"), ("gmvae-5way-1shot", "test"),
                        ("ro-gan-maml-celeba-identity", "train")):  # fmt: skip
        stages.images_of(find_row(slug), split)
    assert asked == [("omniglot", "train", "cactus"), ("omniglot", "val", "lasium"), ("omniglot", "test", "meta_gmvae"),
                     ("celeba", "train", None)]  # fmt: skip


def test_an_embedding_is_fitted_to_all_training_images(tmp_path, monkeypatch):
    """At smoke to about 2000 of them."""
    seen, row = {}, find_row("nearest-mean-bigan", "glyphs")
    model = SimpleNamespace(fit=lambda x, *, epochs, batch, **_: seen.update({epochs: (x, batch)}), to=lambda _: model)
    monkeypatch.setattr(stages, "build_embedding", lambda *_, **__: model)
    for scale in ("smoke", "full"):
        stages.fit_embedding(row, scale, folder=tmp_path)
    train = load("glyphs", "train").images
    assert seen.keys() == {1, 400} and {batch for _, batch in seen.values()} == {128}
    assert torch.equal(seen[400][0], train) and 2000 <= len(seen[1][0]) < 3000 < len(train)


def test_other_seeds_have_other_partitions(tmp_path):
    row = find_row("random-maml", "glyphs")
    first, again, other = (stages.make_partitions(row, "smoke", seed, folder=tmp_path) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pixels_are_whitened_and_clustered_once(monkeypatch):
    asked, row = [], find_row("pixels-maml", "glyphs")
    monkeypatch.setattr(stages.parts, "zca", lambda images: asked.append(len(images)) or "whitened")
    monkeypatch.setattr(stages.parts, "cluster_partitions",
                        lambda z, k, many, g, **more: asked.append((z, k, many, more)))  # fmt: skip
    stages._partitions(row, "full", row.clusters, row.stack("full"), row.least(), None, torch.Generator())
    rule = {"enough": 0.0, "restarts": 1, "least": 6, "way": 20}
    assert asked == [len(load("glyphs", "train")), ("whitened", 500, 1, rule)]


def test_other_labels_are_other_images():
    images = load("glyphs", "val")
    turned = dataclasses.replace(images, labels=images.labels.flip(0))
    assert stages.fingerprint(images) != stages.fingerprint(turned)


def test_other_seeds_have_other_weights_and_other_noise():
    for slug, shape in (("oracle-protonets", (1, 28)), ("oracle-maml", (1, 28)), ("leo-1shot", (0, 0, 640)),
                        ("gmvae-5way-1shot", (1, 28))):  # fmt: skip
        channels, size, features = (*shape, None)[:3]
        made = [experiments.build_learner(find_row(slug), channels, size, seed, features) for seed in (0, 3)]
        first, other = (next(p for p in learner.parameters() if p.dim() > 1) for learner in made)
        assert not torch.equal(first, other), slug
        assert [getattr(learner, "seed", seed) for learner, seed in zip(made, (0, 3))] == [0, 3], slug


def test_a_training_draws_the_tasks_of_its_seed(monkeypatch):
    asked, row = [], find_row("oracle-protonets")
    monkeypatch.setattr(experiments, "train", lambda learner, source, **how: asked.append(how) or {})
    monkeypatch.setattr(experiments, "training_tasks", lambda row, scale, seed, *_: asked.append(seed))
    experiments._train(None, row, "full", 3, "cpu", None, None)
    assert asked[0] == asked[1]["seed"] == 3
    assert [asked[1][name] for name in ("steps", "tasks", "way", "shot", "query")] == [30_000, 1, 20, 1, 15]


def test_early_stopping_keeps_the_best_and_meets_other_tasks_than_the_test(monkeypatch):
    asked, row = [], find_row("leo-5shot-small-long")
    monkeypatch.setattr(experiments, "testing_tasks", lambda *_: SimpleNamespace(features=None))
    monkeypatch.setattr(experiments, "evaluate", lambda *_, **task: asked.append(task) or Evaluation(torch.ones(2)))
    found = early_stopping(row, "full", 3)
    assert found.pop("validate")(None) == 100
    assert found == {"validate_every": 1000, "keep_best": True, "patience": 15}
    assert asked == [{"way": 5, "shot": 5, "query": 15, "tasks": 2000, "seed": 4}]


def test_baselines_are_tuned_over_their_grids_on_other_tasks_than_the_test(monkeypatch):
    """CACTUs, section 4.1: neighbors, regularization and dropout; those of ridge are ours."""
    asked, tested = {}, []
    source = SimpleNamespace(features=torch.zeros(1, 4))
    monkeypatch.setattr(experiments, "testing_tasks", lambda *_: source)

    def tune(make, values, source, *, seed, tasks, shot, **_):
        asked[make, shot] = (values, seed, tasks)
        return values[0], dict.fromkeys(values, 0.5)

    monkeypatch.setattr(experiments, "tune", tune)
    monkeypatch.setattr(experiments, "evaluate",
                        lambda *_, seed, **__: tested.append(seed) or Evaluation(torch.ones(2)))  # fmt: skip
    for name in ("knn", "linear", "mlp", "ridge"):
        row = dataclasses.replace(find_row(f"{name}-bigan"), tests=((5, 1), (5, 5)))
        experiments.measure_baseline(row, "full", 3)
    assert [values for values, _, _ in asked.values()] == [
        [1, 3, 5], [1, 3, 5, 10], *[[10.0**p for p in range(-5, 5)]] * 2, *[[0.0, 0.25, 0.5, 0.75]] * 2,
        *[[10.0**p for p in range(-2, 5)]] * 2]  # fmt: skip
    assert {(seed, tasks) for _, seed, tasks in asked.values()} == {(4, 200)} and set(tested) == {3}
    make, _ = experiments._baseline(find_row("mlp-bigan"), "full", 3, 5, "cpu", None)
    assert make(0.5).generator.initial_seed() == 3


def test_attribute_tasks_have_ten_images_of_each_class(monkeypatch):
    """Also where a task takes fewer: the same prototypes for all rows."""
    asked, names = [], [f"a{i:02}" for i in range(40)]
    faces = ImageSet(torch.zeros(4, 3, 1, 1, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ["1"], [], "celeba",
                     "train", torch.zeros(4, 40, dtype=torch.uint8), names)  # fmt: skip
    monkeypatch.setattr(experiments, "shown", lambda *_: (faces, None))
    one = torch.zeros(1, 3, 2, dtype=torch.int64)
    monkeypatch.setattr(experiments, "attribute_prototypes", lambda images, names, r: asked.append(r) or one)
    row = find_row("oracle-maml-celeba")
    for source in (experiments.training_tasks(row, "full", 0), experiments.testing_tasks(row, "full", "val")):
        assert isinstance(source, AttributeTasks)
    experiments.training_tasks(find_row("oracle-protonets-celeba"), "full", 0)
    assert asked == [10, 10, 16]


def test_labels_of_imagenet_are_those_of_mini_imagenets_training_classes():
    homes = ["no mini", "mini_imagenet train", "mini_imagenet val", "no mini", "mini_imagenet train"]
    images = ImageSet(torch.zeros(10, 3, 1, 1, dtype=torch.uint8), torch.arange(5).repeat_interleave(2), list("abcde"),
                      homes, "imagenet", "train")  # fmt: skip
    assert experiments.some_labels(images, 0.2, 0).unique().tolist() == [-1, 1, 4]


def test_one_missing_image_makes_a_part_of_the_data(monkeypatch):
    counts = {"train": 38_399, "test": 12_000}
    monkeypatch.setattr(experiments, "shown", lambda row, split, *_, **__: ([0] * counts[split], None))
    found = experiments.images_record(find_row("oracle-maml-mini-imagenet"), "full")
    assert found["deviation"] == "a part of the data (38,399 of 38,400 train images)"


@pytest.mark.parametrize("channels, augment", [(1, umtra_drawings), (3, auto_augment)])
def test_drawings_and_photographs_are_augmented_each_in_its_way(monkeypatch, channels, augment):
    images = SimpleNamespace(images=torch.zeros(2, channels, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(experiments, "images_of", lambda *_: images)
    assert experiments.training_tasks(find_row("umtra-maml"), "full", 0).augment is augment
