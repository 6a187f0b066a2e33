"""The numbers behind LEO's figures, at a size that takes seconds."""

import json

import pytest
import torch

from umeta_core import leo_figures
from umeta_core.data import ImageSet
from umeta_core.episodes import PartitionTasks
from umeta_core.experiments import train_row
from umeta_core.leo import LEO
from umeta_core.leo_regression import RegressionTasks
from umeta_core.rows import find_row


def test_percentiles_are_those_of_the_whole():
    values = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
    assert leo_figures.percentiles(values) == pytest.approx([0.05, 0.25, 0.5, 0.75, 0.95], abs=0.05)


def test_eigenvalues_are_compared_within_their_task():
    """A task with little curvature keeps its eigenvalues beside one with much."""
    eigenvalues = torch.tensor([[1.0, 0.5, 1e-7], [1e-8, 5e-9, 0.0]])
    assert leo_figures.not_zero(eigenvalues).tolist() == pytest.approx([1.0, 0.5, 1e-8, 5e-9])


def test_curvature_in_codes_needs_no_latent_steps():
    """gen+ft of Fig. 5a: it takes no step on codes, but it has codes to be measured in."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1)
    images = ImageSet(torch.empty(60, 0), torch.arange(6).repeat_interleave(10), list("abcdef"), [], "x", "test")
    learner, found = LEO(8, 4, latent_steps=0, generator=generator), {}
    for c in (1, 10):
        with torch.no_grad():
            learner.decoder *= c
            learner.relation[2] /= c
        found[c] = leo_figures.analyze(learner, PartitionTasks(images, features=features), 1, 40, 0)["curvature"]
    assert found[10]["weights"] == pytest.approx(found[1]["weights"], rel=1e-2)
    assert found[10]["codes"] == pytest.approx([100 * v for v in found[1]["codes"]], rel=1e-2)


@pytest.mark.slow
def test_analysis_of_trained_rows(tmp_path, monkeypatch):
    slugs = [f"{name}-1shot-glyphs" for name in leo_figures.ANALYZED]
    for slug in slugs:
        train_row(find_row(slug), "smoke", 0, checkpoint=tmp_path / f"{slug}-smoke-seed0.pt", stages=tmp_path)
    found = leo_figures.analysis(tmp_path, tmp_path, suffix="glyphs", tasks=20, scale="smoke")
    codes, weights, sgd = (found["rows"][name] for name in leo_figures.ANALYZED)
    assert [s["of"] for s in codes["steps"]] == ["code"] * 5 + ["weights"] * 5
    assert [s["of"] for s in weights["steps"]] == [s["of"] for s in sgd["steps"]] == ["weights"] * 5
    assert len(codes["singular_values"]) == 64
    assert codes["curvature"].keys() == weights["curvature"].keys() == {"weights", "codes"}
    assert sgd["curvature"].keys() == {"weights"}
    assert all(five == sorted(five) for row in found["rows"].values() for five in row["curvature"].values())
    path = leo_figures.write(found, tmp_path)
    assert path.name == "analysis-1shot-glyphs-smoke-seed0.json" and json.loads(path.read_text())["tasks"] == 20
    (tmp_path / f"{slugs[0]}-smoke-seed0.pt").replace(tmp_path / f"{slugs[1]}-smoke-seed0.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*leo-1shot-glyphs-smoke-seed0.pt; umeta train leo-1"):
        leo_figures.analysis(tmp_path, tmp_path, suffix="glyphs", tasks=20, scale="smoke")
    monkeypatch.setattr(leo_figures, "ANALYZED", ("leo-generator-tuned",))
    with pytest.raises(ValueError, match="is of the row leo-1shot-glyphs, not of leo-generator-tuned-1shot-glyphs"):
        leo_figures.analysis(tmp_path, tmp_path, suffix="glyphs", tasks=20, scale="smoke")


def test_neighbors_are_of_other_tasks_and_other_images():
    """Codes on a line: a neighbor in the same task, or of the same image, is passed over."""
    line = torch.tensor([0.0, 0.1, 1.0, 1.3, 5.0, 5.5]).unsqueeze(1)
    tasks, classes = torch.tensor([0, 0, 1, 2, 1, 2]), torch.tensor([0, 1, 0, 1, 2, 2])
    moved = torch.stack([line, line + 100])
    found = leo_figures.neighbor_shares(moved, classes, tasks)
    assert found["first"] == found["adapted"] == pytest.approx(3 / 6) and found["kind"] == 1
    found = leo_figures.neighbor_shares(moved, classes, tasks, torch.tensor([0, 1, 2, 3, 4, 4]))
    assert found["first"] == pytest.approx(1 / 6)  # 5.5 and 5.0 are one image


def test_codes_of_tasks_are_those_of_adaptation():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 8, generator=generator)
    images = ImageSet(torch.empty(60, 0), torch.arange(6).repeat_interleave(10), list("abcdef"), [], "x", "val")
    source, learner = PartitionTasks(images, features=features), LEO(8, 4, generator=generator)
    codes, shown, tasks = leo_figures.task_codes(learner, source, 30, 1, 0)
    assert codes.shape == (2, 150, 4) and tasks.tolist() == [i // 5 for i in range(150)]
    support = features[shown].view(30, 5, 1, 8)
    torch.testing.assert_close(codes[1], learner.adapt(support).codes[-1].detach().flatten(0, 2))
    torch.testing.assert_close(codes[0], learner.encode(support)[0].detach().flatten(0, 1))
    assert source.features is features


@pytest.mark.slow
def test_codes_record(tmp_path):
    train_row(find_row("leo-5shot-glyphs"), "smoke", 0, checkpoint=tmp_path / "leo-5shot-glyphs-smoke-seed0.pt",
              stages=tmp_path)  # fmt: skip
    found = leo_figures.codes(tmp_path, tmp_path, 5, tasks=30, suffix="glyphs", scale="smoke", mapped=10)
    assert len(found["classes"]) == 50 == len(found["map"]["first"]["x"]) == len(found["map"]["adapted"]["y"])
    assert max(found["classes"]) < len(found["class_names"]) and found["trained"].keys() == found["untrained"].keys()
    path = leo_figures.write(found, tmp_path)
    assert path.name == "codes-leo-5shot-glyphs-smoke-seed0.json" and json.loads(path.read_text()) == found


@pytest.mark.slow
def test_regression_record(tmp_path, monkeypatch):
    found = leo_figures.regression(0, (4, 2), tmp_path / "leo.pt", ambiguous=10)
    assert found["steps"] == 6 and found["history"]["step"][-1] == 6
    assert len(found["panels"]) == 4 and len(found["panels"][0]["curves"]) == 8
    assert 0 <= found["ambiguous"]["both"] <= 1 and found["ambiguous"]["ambiguous"] == 10
    assert [panel["line"] for panel in found["certain"]] == [False, True]
    assert 0 <= found["ambiguous"]["both_certain"] <= 1 and "both_elsewhere" not in found["ambiguous"]
    assert leo_figures.write(found, tmp_path).name == "regression-seed0.json"
    monkeypatch.setattr(leo_figures.LEORegression, "loss", None)  # a finished run is only examined again
    again = leo_figures.regression(0, (4, 2), tmp_path / "leo.pt", ambiguous=10)
    assert again | {"created": 0} == found | {"created": 0}


def test_certain_tasks_leave_no_doubt():
    batch, belief = leo_figures.certain_tasks(RegressionTasks(), 200, torch.Generator().manual_seed(0))
    assert len(batch) == len(belief) == 200 and torch.minimum(belief, 1 - belief).max() < 0.01
    assert (batch.line == (belief > 0.5)).float().mean() > 0.98
    sine, line = leo_figures.sine_and_line(batch)
    assert batch.line[line] and not batch.line[sine] and min(sine, line) == 0


@pytest.mark.parametrize("what", ["analysis", "codes"])
def test_figures_of_other_rows_are_asked_for_on_the_command_line(what, tmp_path, monkeypatch, capsys):
    """Rows on the paper's features have no suffix; a missing checkpoint is one line, not a traceback."""
    where = ["--suffix", "", "--shot", "5", "--checkpoints", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["leo_figures", what, *where])
    with pytest.raises(SystemExit) as stop:
        leo_figures.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"no checkpoint {tmp_path}/leo-5shot-full-seed0.pt; umeta train leo-5shot" in error


def test_the_regression_is_trained_at_two_rates(monkeypatch):
    asked = []
    monkeypatch.setattr(leo_figures, "train", lambda learner, source, **how: asked.append(how)
                        or {"step": [], "loss": [], "seconds": 0.0})  # fmt: skip
    monkeypatch.setattr(leo_figures, "examine", lambda *_: {})
    leo_figures.regression(seed=3)
    assert [[how[name] for name in ("steps", "lr", "tasks", "shot", "query", "seed")] for how in asked] == [
        [40_000, 1e-3, 12, 5, 10, 3], [20_000, 1e-4, 12, 5, 10, 1003]]  # fmt: skip


def test_codes_are_of_the_validation_classes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(leo_figures, "trained", lambda *_, **__: (None, 0))
    monkeypatch.setattr(leo_figures, "testing_tasks",
                        lambda row, scale, split, **_: asked.append((row, split)) or {}["stop"])  # fmt: skip
    with pytest.raises(KeyError):
        leo_figures.codes(tmp_path, tmp_path)
    assert asked == [(find_row("leo-1shot-small"), "val")]
