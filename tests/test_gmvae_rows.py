"""Rows of Meta-GMVAE: what each trains, on which numbers of the paper it bears, and a run from end to end."""

from dataclasses import replace

import torch

from umeta_core import stages
from umeta_core.embeddings.base import write_atomically
from umeta_core.experiments import early_stopping, run_row, untrained
from umeta_core.results import matches, published
from umeta_core.rows import ROWS, find_row

OURS = [row for row in ROWS if row.paper == "meta_gmvae"]


def test_every_own_number_of_the_paper_has_one_model():
    """Of its rows at the paper's settings; numbers quoted from other papers and UMTRA on features have none."""
    rows = [row for row in OURS if not row.departs]
    for number in published("meta_gmvae"):
        own = number["method"].startswith(("Meta-GMVAE", "Vanilla", "LR (SimCLR)"))
        fit = [r for r in rows if matches(number, vars(r)) and (number["way"], number["shot"]) in r.tests]
        expected = 1 if own or number["table"] == "10" and number["method"] == "CACTUs-MAML" else 0
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
    for cell in record["cells"]:
        assert 0 < cell["accuracy"] < 100
        assert set(cell["readings"]) == {"diagonal E-step", "identity covariance", "inductive"}
        for reading in cell["readings"].values():
            assert abs(reading["accuracy"] - cell["accuracy"] - reading["difference"]) < 1e-3, "on the same tasks"
    model = untrained(row, 0)
    assert (model.covariance, model.e_step, model.inference) == ("diagonal", "identity", "transductive")


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
        write_atomically({"z": means[labels]}, stages.vectors_file(row, split, "smoke", tmp_path))
    record = run_row(row, "smoke", folder=tmp_path, stages=tmp_path)
    assert record["protocol"]["latent"] == 32 and record["cells"][0]["accuracy"] > 30


