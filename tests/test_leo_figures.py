"""The numbers behind LEO's figures, at a size that takes seconds."""

import json

import pytest
import torch

from umeta_core import leo_figures
from umeta_core.experiments import train_row
from umeta_core.rows import find_row


def test_percentiles_are_those_of_the_whole():
    values = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
    assert leo_figures.percentiles(values) == pytest.approx([0.05, 0.25, 0.5, 0.75, 0.95], abs=0.05)


@pytest.mark.slow
def test_analysis_of_trained_rows(tmp_path, monkeypatch):
    slugs = [f"{name}-1shot-glyphs" for name in leo_figures.ANALYZED]
    for slug in slugs:
        train_row(find_row(slug), "smoke", 0, checkpoint=tmp_path / f"{slug}-smoke-seed0.pt", stages=tmp_path)
    found = leo_figures.analysis(tmp_path, tmp_path, suffix="-glyphs", tasks=20, scale="smoke")
    codes, weights, sgd = (found["rows"][name] for name in leo_figures.ANALYZED)
    assert [s["of"] for s in codes["steps"]] == ["code"] * 5 + ["weights"] * 5
    assert [s["of"] for s in weights["steps"]] == [s["of"] for s in sgd["steps"]] == ["weights"] * 5
    assert len(codes["singular_values"]) == 64 and codes["curvature_of"] == "codes"
    assert all(row["curvature"] == sorted(row["curvature"]) for row in found["rows"].values())
    path = leo_figures.write(found, tmp_path)
    assert json.loads(path.read_text())["tasks"] == 20


@pytest.mark.slow
def test_regression_record(tmp_path):
    found = leo_figures.regression(0, (4, 2), tmp_path / "leo.pt", ambiguous=10)
    assert found["steps"] == 6 and found["history"]["step"][-1] == 6
    assert len(found["panels"]) == 4 and len(found["panels"][0]["curves"]) == 8
    assert 0 <= found["ambiguous"]["both"] <= 1 and found["ambiguous"]["ambiguous"] == 10
    assert leo_figures.write(found, tmp_path).exists()
