"""Rows of Meta-GMVAE: what each trains, on which numbers of the paper it bears, and a run from end to end."""

import json
from dataclasses import replace

import pytest
import torch

from umeta_core import experiments, stages
from umeta_core.baselines import NearestMean
from umeta_core.costs import expected_seconds
from umeta_core.data import ImageSet
from umeta_core.episodes import PartitionTasks
from umeta_core.evaluation import evaluate
from umeta_core.experiments import early_stopping, measure, run_row, train_row, training_file, training_tasks, untrained
from umeta_core.meta_gmvae import MetaGMVAE
from umeta_core.results import matches, published
from umeta_core.rows import ROWS, find_row
from umeta_core.snapshots import last_weights, select, selected, snapshots_of, take
from umeta_core.storage import save_tensors

OURS = [row for row in ROWS if row.paper == "meta_gmvae"]


def test_every_own_number_of_the_paper_has_one_model():
    """Of its rows at the paper's settings; numbers quoted from other papers have none."""
    rows = [row for row in OURS if not row.departs]
    for number in published("meta_gmvae"):
        own = number["method"].startswith(("Meta-GMVAE", "Vanilla", "LR (SimCLR)"))
        fit = [r for r in rows if matches(number, vars(r)) and (number["way"], number["shot"]) in r.tests]
        expected = 1 if own or number["table"] == "10" else 0
        assert len(fit) == expected, (number, [row.slug for row in fit])


def test_ablations_leave_out_one_part_each():
    found = {row.variant: untrained(replace(row, dataset="glyphs", split_protocol=None), 0)
             for row in OURS if row.table == "2-left" and row.dataset == "omniglot" and not row.departs}  # fmt: skip
    parts = {variant: (m.episodic, m.set_level, m.covariance) for variant, m in found.items()}
    assert parts == {"": (False, False, "identity"), "Ep": (True, False, "identity"),
                     "Ep+Set": (True, True, "identity"), "Ep+sigma2": (True, False, "diagonal")}  # fmt: skip


def small(slug, **options):
    """A row that fits into seconds: few images in a set, few samples."""
    row = find_row(slug)
    options = row.options | {"samples": 4, "decoded": 2} | options
    return replace(row, shot=20, tasks=2, tests=((5, 1), (5, 5)), options=options)


def test_a_model_is_trained_selected_and_read_in_four_ways(tmp_path):
    row = small("gmvae-5way-1shot-decode1-glyphs", test_samples=8)
    record = run_row(row, "smoke", folder=tmp_path)
    assert record["steps"] == 2 and len(record["validation"]) == 2
    for cell, extra in zip(record["cells"], ({"last weights"}, set()), strict=True):
        assert 0 < cell["accuracy"] < 100
        assert set(cell["readings"]) == {"diagonal E-step", "identity covariance", "inductive"} | extra
        for reading in cell["readings"].values():
            assert abs(reading["accuracy"] - cell["accuracy"] - reading["difference"]) < 1e-3, "on the same tasks"
    model = untrained(row, 0)
    assert (model.covariance, model.e_step, model.inference) == ("diagonal", "identity", "transductive")


def test_the_last_weights_are_tested_on_the_tasks_of_the_chosen_ones(tmp_path):
    row = small("gmvae-5way-1shot-decode1-glyphs", test_samples=8)
    run_row(row, "smoke", folder=tmp_path, checkpoint=tmp_path / f"{row.slug}.pt")
    folder = snapshots_of(training_file(row, tmp_path / f"{row.slug}.pt"))
    validated = folder / f"{row.slug}.json"  # as if the first snapshot had been the best
    validated.write_text(json.dumps(json.loads(validated.read_text()) | {"values": [[1, 99.0], [2, 0.0]]}))
    record = run_row(row, "smoke", folder=tmp_path / "again", checkpoint=tmp_path / f"{row.slug}.pt")
    model = untrained(row, 0)
    model.load_state_dict(last_weights(folder, 2))
    cell = measure(replace(row, readings={}), model, "smoke", 0)[0]
    reading = record["cells"][0]["readings"]["last weights"]
    assert reading["accuracy"] == cell["accuracy"] != record["cells"][0]["accuracy"]
    assert reading["difference"] == pytest.approx(cell["accuracy"] - record["cells"][0]["accuracy"], abs=1e-3)


def test_selection_is_on_tasks_of_the_setting_and_not_of_training():
    row = find_row("gmvae-20way-5shot-glyphs")
    assert (row.way, row.shot) == (1, 300)
    seen = []

    class Learner(torch.nn.Module):
        def predict(self, episodes):
            seen.append((episodes.way, episodes.support.shape[2]))
            return torch.zeros(len(episodes.query), episodes.way * 15, episodes.way)

    early_stopping(replace(row, validation=row.validation | {"tasks": 2}), "quick", 0)["validate"](Learner())
    assert set(seen) == {(20, 5)}


def test_mini_imagenet_rows_learn_on_features(tmp_path):
    row = replace(find_row("gmvae-mini-imagenet"), dataset="glyphs", slug="gmvae-on-vectors", tests=((5, 1),))
    row = replace(row, embedding="BiGAN", options=row.options | {"samples": 4})
    for split in ("train", "val", "test"):
        labels = stages.images_of(row, split).labels
        means = 3 * torch.rand(int(labels.max()) + 1, 16, generator=torch.Generator().manual_seed(0))
        save_tensors({"z": means[labels]}, stages.vectors_file(row, split, "smoke", tmp_path))
    record = run_row(row, "smoke", folder=tmp_path, stages=tmp_path)
    assert record["protocol"]["latent"] == 32 and record["cells"][0]["accuracy"] > 30
    assert set(record["cells"][0]["readings"]) == {
        "diagonal E-step", "identity covariance", "inductive", "last weights"}  # fmt: skip


def test_umtra_on_features_embeds_every_copy(tmp_path):
    row = replace(find_row("umtra-maml-simclr-mini-imagenet"), dataset="glyphs", embedding="BiGAN", tests=((5, 1),))
    row = replace(row, steps={"smoke": 10, "full": 10}, options=row.options | {"test_steps": 5})
    record = run_row(row, "smoke", folder=tmp_path, stages=tmp_path)
    assert record["protocol"]["source"] == "augmented" and record["cells"][0]["accuracy"] > 20
    source = training_tasks(row, "smoke", 0, stages=tmp_path)
    episodes = source.sample(2, 5, 1, 3, torch.Generator().manual_seed(0))
    z = stages.vectors(row, "train", "smoke", folder=tmp_path)
    found = [(z - s).abs().amax(1).min() < 1e-4 for s in episodes.support.flatten(0, 2)]
    assert all(found), "the support is the images' own vectors"
    assert episodes.query.shape == (2, 5, 3, z.shape[1])
    assert (episodes.query - episodes.support).abs().amax(3).min() > 1e-2, "the queries are those of changed copies"



# Rows that share a training ------------------------------------------------------------------------------------------


def test_rows_share_a_training_where_only_validation_and_test_differ():
    """The columns of a table are checkpoints of one run (reference code)."""
    own = {row.slug: row.training_of for row in OURS if row.dataset == "omniglot" and not row.departs}
    assert own == {
        "gmvae-5way-1shot": "gmvae-5way-1shot", "gmvae-5way-5shot": "gmvae-5way-1shot",
        "gmvae-20way-1shot": "gmvae-20way-1shot", "gmvae-20way-5shot": "gmvae-20way-1shot",
        "gmvae-episodes-sets": "gmvae-20way-1shot", "gmvae-episodes": "gmvae-episodes",
        "gmvae-episodes-variances": "gmvae-episodes", "vanilla-vae": "",
    }  # fmt: skip
    for row in OURS:
        if row.training_of:
            other = find_row(row.training_of)
            assert row.training() == other.training() and row.steps == other.steps, row.slug
            assert (row.tasks, row.dataset, row.plan if row.fitted else "") == (
                other.tasks, other.dataset, other.plan if other.fitted else "")  # fmt: skip
    trainings = [(r.training(), r.steps["full"], r.tasks, r.dataset, r.fitted) for r in OURS if r.learner == "gmvae"
                 if r.training_of in ("", r.slug)]  # fmt: skip
    assert all(a not in trainings[:i] for i, a in enumerate(trainings)), "no training is done twice"


@pytest.fixture
def looked(monkeypatch):
    """Validation at once: a number that depends on the weights and the row; which rows have been looked at."""
    rows = []

    def early(row, *_):
        def validate(learner):
            rows.append(row.slug)
            return torch.sin(1e4 * row.validation["shot"] * learner.set_encoder[0].out.weight.sum()).item()

        return {"validate": validate, "validate_every": 2, "keep_best": True, "patience": None}

    monkeypatch.setattr("umeta_core.experiments.early_stopping", early)
    return rows


def quick(slug, **changes):
    """A row of eight steps, of which every second is looked at."""
    row = replace(small(slug), tasks=1, shot=6, readings={}, tests=((5, 1),), steps={"smoke": 8, "full": 8})
    options = {"components": 2, "samples": 2, "decoded": 1}
    return replace(row, test_tasks={"smoke": 1}, options=row.options | options, **changes)


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first if name != "_extra_state")


def test_a_second_row_takes_the_training_of_the_first(tmp_path, looked, monkeypatch):
    first, second = quick("gmvae-5way-1shot-decode1-glyphs"), quick("gmvae-5way-5shot-decode1-glyphs")
    alone, history = train_row(second, "smoke", 0)
    train_row(first, "smoke", 0, checkpoint=tmp_path / f"{first.slug}-smoke-seed0.pt")
    monkeypatch.setattr(MetaGMVAE, "loss", None)  # nothing is trained from here on
    learner, shared = train_row(second, "smoke", 0, checkpoint=tmp_path / f"{second.slug}-smoke-seed0.pt")
    assert shared["validation"] == history["validation"] and same_weights(alone, learner)
    assert [path.name for path in tmp_path.glob("*.pt")] == [f"{first.slug}-smoke-seed0.pt"]
    del looked[:]
    record = run_row(second, "smoke", folder=tmp_path, checkpoint=tmp_path / f"{second.slug}-smoke-seed0.pt")
    assert record["training_of"] == first.slug and record["row"] == second.slug and not looked
    assert record["validation"] == [list(pair) for pair in history["validation"]]


def test_the_best_snapshot_is_that_of_training_with_validation(tmp_path, looked):
    row = quick("gmvae-5way-5shot-decode1-glyphs")
    one, first = train_row(row, "smoke", 0)
    other, second = train_row(replace(row, training_of=""), "smoke", 0)
    assert first["validation"] == second["validation"] and same_weights(one, other)


def test_a_shared_training_that_was_interrupted_goes_on_bit_identically(tmp_path, looked):
    row = quick("gmvae-5way-1shot-decode1-glyphs")
    whole, history = train_row(row, "smoke", 0, checkpoint=tmp_path / "whole.pt")
    train_row(replace(row, at_most=3), "smoke", 0, checkpoint=tmp_path / "parts.pt")
    parts, again = train_row(row, "smoke", 0, checkpoint=tmp_path / "parts.pt")
    assert again["validation"] == history["validation"] and same_weights(whole, parts)
    assert [step for step, _ in history["validation"]] == [2, 4, 6, 8]
    states = [torch.load(tmp_path / f"{name}-snapshots" / "step-00000006.pt") for name in ("whole", "parts")]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0] if n != "_extra_state")


def test_an_interrupted_selection_goes_on_and_a_lost_snapshot_is_named(tmp_path, looked):
    row, file = quick("gmvae-5way-1shot-decode1-glyphs"), tmp_path / "run.pt"
    _, history = train_row(row, "smoke", 0, checkpoint=file)
    values = snapshots_of(file) / f"{row.slug}.json"
    done = json.loads(values.read_text())
    values.write_text(json.dumps(done | {"values": done["values"][:3]}))
    del looked[:]
    assert train_row(row, "smoke", 0, checkpoint=file)[1]["validation"] == history["validation"]
    assert len(looked) == 1
    train_row(replace(row, validation=row.validation | {"tasks": 10}), "smoke", 0, checkpoint=file)
    assert len(looked) == 5, "values of another plan are not used"
    (snapshots_of(file) / "step-00000004.pt").unlink()
    with pytest.raises(ValueError, match="no snapshot of step 4; delete the checkpoint"):
        train_row(row, "smoke", 0, checkpoint=file)


def test_a_damaged_snapshot_and_a_damaged_list_of_values_are_named(tmp_path):
    learner = torch.nn.Linear(1, 1)
    take(learner, tmp_path, 2)
    select(learner, tmp_path, lambda model: 0.5, steps=2, every=2, row="a", plan={})
    (snapshot,) = tmp_path.glob("*.pt")
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-00000002.pt is not a readable snapshot; delete it"):
        selected(tmp_path, "a")
    (tmp_path / "a.json").write_text('{"plan": ')
    with pytest.raises(ValueError, match="a.json is damaged .*; delete it to validate afresh"):
        selected(tmp_path, "a")


def test_weights_that_are_no_longer_due_are_not_chosen(tmp_path):
    """The last step of a shortened training is looked at; once it has gone on, it is between the steps that count."""
    learner, rated = torch.nn.Linear(1, 1), {2: 0.1, 3: 0.9, 4: 0.6, 6: 0.5}
    for step in rated:
        torch.nn.init.constant_(learner.weight, step)
        take(learner, tmp_path, step)
    for steps, best in ((3, 3), (6, 4)):
        select(learner, tmp_path, lambda model: rated[int(model.weight)], steps=steps, every=2, row="a", plan={})
        assert int(learner.weight) == int(selected(tmp_path, "a")["weight"]) == best


def test_a_shortened_shared_training_is_selected_up_to_its_last_step(tmp_path, looked):
    rows = [quick(f"gmvae-5way-{shot}shot-decode1-glyphs", at_most=5) for shot in (1, 5)]
    for row in rows:
        _, history = train_row(row, "smoke", 0, checkpoint=tmp_path / f"{row.slug}.pt")
        assert [step for step, _ in history["validation"]] == [2, 4, 5]
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_expected_seconds_are_those_that_were_measured():
    """On one core: 1.05 s for a 20-way step with one sample decoded, 2.2 s with four."""
    row = find_row("gmvae-20way-1shot-decode1")
    for decoded, seconds in ((1, 1.05), (4, 2.2)):
        changed = replace(row, options=row.options | {"decoded": decoded})
        short, long = (expected_seconds(replace(changed, at_most=steps), "full") for steps in (100, 900))
        assert abs((long - short) / 800 / seconds - 1) < 0.1
    other = find_row("gmvae-20way-5shot-decode1")
    assert expected_seconds(other, "full", training=False) < 0.5 * expected_seconds(other, "full")


def test_a_reading_on_some_classes_alone():
    """Turned characters are classes of their own, so that upright ones can be asked for."""
    names = [f"a/{c}/rotated{turn}" for c in range(6) for turn in (0, 90)]
    labels = torch.arange(12).repeat_interleave(8)
    images = ImageSet(torch.zeros(96, 1, 4, 4).byte(), labels, names, [], "turned", "test")
    z = torch.nn.functional.one_hot(labels, 12).float()
    z[labels % 2 == 1] = 0  # what is turned cannot be told apart
    first = evaluate(NearestMean(), PartitionTasks(images, features=z), way=5, shot=1, tasks=50)
    task = {"way": 5, "shot": 1, "tasks": 50}
    source = PartitionTasks(images, features=z)
    found = experiments._reading(NearestMean(), {"classes": "/rotated0"}, source, first, **task)
    assert found["accuracy"] == 100 > first.mean and found["difference_ci95"] == round(first.ci95, 4)
    assert experiments._reading(NearestMean(), {"classes": "/mirrored"}, source, first, **task) is None
