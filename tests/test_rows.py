"""What a row says is what is run: its splits, seeds, rates, switches, and the rules of its clusters."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from umeta_core import experiments, stages
from umeta_core.baselines import NearestMean
from umeta_core.data import ImageSet, load
from umeta_core.embeddings.deepcluster import pca_whitening
from umeta_core.episodes import PartitionTasks
from umeta_core.evaluation import Evaluation, evaluate
from umeta_core.experiments import early_stopping, run_row, training_tasks
from umeta_core.packs import save_tensors
from umeta_core.rows import find_row
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


def test_centroids_are_the_best_of_ten(tmp_path, monkeypatch):
    asked, row = [], find_row("matching-bigan", "glyphs")
    monkeypatch.setattr(stages, "vectors", lambda *_: torch.zeros(9, 2))
    monkeypatch.setattr(stages.parts, "kmeans", lambda z, k, g, restarts: asked.append(restarts)
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
