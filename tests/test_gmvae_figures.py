"""The numbers behind the figures of longer training and of components, at a size that takes seconds."""

import dataclasses
import json

import pytest
import torch

from umeta_core import gmvae_figures
from umeta_core.experiments import run_row
from umeta_core.gmvae_figures import MODELS, longer
from umeta_core.results import provenance
from umeta_core.rows import find_row


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gmvae_figures, "TEST", gmvae_figures.TEST | {"tasks": 20})
    monkeypatch.setattr(gmvae_figures, "TRAINING", gmvae_figures.TRAINING | {"shot": 30})


def test_every_model_is_measured_along_its_training_and_goes_on_where_it_stopped(tmp_path, small):
    whole = longer(tmp_path / "whole", (2, 4))
    first = longer(tmp_path / "parts", (2,))
    parts = longer(tmp_path / "parts", (2, 4))
    for name in MODELS:
        assert whole["models"][name] == parts["models"][name]
        assert whole["models"][name]["1"][:1] == first["models"][name]["1"]
        assert [len(whole["models"][name][shot]) for shot in ("1", "5")] == [2, 2]
    assert all(cell["difference"] == 0 for cell in whole["models"]["plain VAE"]["5"])
    others = [whole["models"][name]["5"][1] for name in ("Ep", "Meta-GMVAE")]
    assert all(cell["difference"] != 0 and cell["difference_ci95"] > 0 for cell in others)
    json.dumps(whole, allow_nan=False)


def test_measurements_of_another_protocol_are_not_taken_for_these(tmp_path, small, monkeypatch):
    record = longer(tmp_path, (2,))
    commits = [made["commit"] for made_by in record["trained_by"].values() for made in made_by]
    assert all(commits) or provenance()["commit"] is None
    for setting, value in (("TEST", {"tasks": 10}), ("OPTIONS", {"samples": 8})):
        with monkeypatch.context() as patch:
            patch.setattr(gmvae_figures, setting, getattr(gmvae_figures, setting) | value)
            with pytest.raises(ValueError, match="other settings"):
                longer(tmp_path, (2,))


def test_the_difference_is_that_of_the_means(tmp_path, small):
    cells = longer(tmp_path, (3,))["models"]
    for shot in ("1", "5"):
        gap = cells["Ep"][shot][0]["accuracy"] - cells["plain VAE"][shot][0]["accuracy"]
        assert cells["Ep"][shot][0]["difference"] == pytest.approx(gap, abs=2e-3)


def test_the_models_differ_in_their_switches_alone():
    models = [gmvae_figures.build(3, **gmvae_figures.OPTIONS, **switches) for switches in MODELS.values()]
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models[0].parameters(), strict=True))


def test_images_are_packed_and_unpacked():
    lists = [torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 2)]
    text = gmvae_figures.packed(lists)
    for images, found in zip(lists, gmvae_figures.unpacked(text, [3, 1, 2], 6), strict=True):
        assert torch.equal(found, (255 * images).round().byte())


def test_components_are_those_of_the_trained_row(tmp_path, monkeypatch):
    row = find_row("gmvae-5way-1shot-decode1-glyphs")
    row = dataclasses.replace(row, shot=40, tasks=2, tests=((5, 1),), options=row.options | {"samples": 4})
    monkeypatch.setattr(gmvae_figures, "find_row", lambda slug: row)
    file = tmp_path / f"{row.slug}.pt"
    run_row(row, "smoke", folder=tmp_path, checkpoint=file)
    found = gmvae_figures.components(row.slug, file, columns=3, scale="smoke")
    assert found["steps"] in (1, 2) and found["of"] == row.slug
    json.dumps(found, allow_nan=False)
    for part in ("training", "test"):
        real = gmvae_figures.unpacked(found[part]["real"], found["counts"][part], found["size"])
        made = gmvae_figures.unpacked(found[part]["generated"], [3] * 5, found["size"])
        assert len(real) == len(made) == 5 and all(len(images) <= 3 for images in real)
    assert [len(wrong) for wrong in found["test"]["wrong"]] == found["counts"]["test"]
    sizes = {name: len(points["place"]) for name, points in found["maps"].items()}
    assert sizes == {"training set": 40, "test task": 80, "one normal": 40}
    assert found["maps"]["test task"]["component"][:5] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("slug", ["vanilla-vae", "gmvae-mini-imagenet", "lr-simclr-mini-imagenet", "oracle-maml"])
def test_rows_without_components_of_images_are_refused(slug):
    with pytest.raises(ValueError, match=f"{slug} has no components"):
        gmvae_figures.components(slug, "nothing.pt")


def test_models_are_trained_on_the_training_scripts(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(gmvae_figures, "train",
                        lambda model, source, **_: seen.append(source.images.split) or {}["stop"])  # fmt: skip
    with pytest.raises(KeyError):
        longer(tmp_path, (2,))
    assert seen == ["train"]
