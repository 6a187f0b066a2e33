"""Records, published numbers, verdicts: the numbers in the book's tables are right or these tests fail."""

import json
import math
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from umeta_core import results, storage
from umeta_core.experiments import paper_epochs, plain
from umeta_core.results import (
    compare,
    difference,
    pack_counts,
    published,
    read_records,
    table_markdown,
    table_text,
    unpack_counts,
    verdict,
    write_record,
)
from umeta_core.rows import ROWS, find_row

COUNTS = {
    "cactus": {"1": 60, "2": 75, "3": 40, "4": 32, "7": 60, "8": 92, "9": 84, "10": 15, "12": 24, "App.D text": 2},
    "meta_gmvae": {"1": 72, "2-left": 17, "2-right": 32, "5": 4, "9": 4, "10": 12},
    "lasium": {"1": 42, "2": 30, "3": 18, "4": 72, "7": 28},
    "leo": {"1": 42, "2": 32, "Text sec. 4.3": 2, "README": 8, "README overview": 12, "issue": 5},
    "learned_rule": {
        "Text 5.3 / Fig. 4 right": 2, "Text 5.3 / Fig. 4 left": 1, "Text 5.3 / Fig. 5 left": 2,
        "Text 5.3 / Fig. 5 right": 3, "Text 5.2 / Fig. 3": 2, "Text 5.4 / Fig. 6": 2, "Text 4.3 / App. C": 4,
        "Fig. 2 left": 1, "Fig. 2 right": 1, "derived": 1, "App. H.2": 1, "App. H.3.2": 1,
    },
}  # fmt: skip


def record(**changes):
    """A full-scale record of Oracle-ProtoNets on Omniglot with the published (5, 1) value, changed as asked."""
    cell = {"way": 5, "shot": 1, "query": 5, "accuracy": 98.35, "ci95": 0.2, "tasks": 1000}
    cell |= {name: changes.pop(name) for name in ("accuracy", "ci95", "way", "shot") if name in changes}
    return {
        "paper": "cactus", "table": "8", "row": "oracle-protonets", "method": "Oracle-ProtoNets (control)",
        "embedding": "", "variant": "supervised", "dataset": "omniglot", "scale": "full", "seed": 0, "steps": 30_000,
        "paper_steps": 30_000, "tasks_per_step": 1, "cells": [cell], "seconds": 10.0, "device": "test", "commit": None,
        "versions": {}, "protocol": {}, "notebook": None, "created": "2025-01-01T00:00:00+00:00", **changes,
    }  # fmt: skip


def number(folder, way=5, shot=1, table="8", method="Oracle-ProtoNets (control)"):
    """The compared number of one cell."""
    rows = [row for row in compare("cactus", table, folder=folder) if row["method"] == method]
    return next(row for row in rows if (row["way"], row["shot"]) == (way, shot))


@pytest.mark.parametrize("paper", COUNTS)
def test_every_published_number_is_there(paper):
    rows = published(paper)
    assert Counter(row["table"] for row in rows) == COUNTS[paper]
    accuracies = [row["value"] for row in rows if row["metric"] == "accuracy"]
    assert all(isinstance(value, float) and 0 < value < 100 for value in accuracies if value != "")


def test_published_totals():
    totals = {paper: len(published(paper)) for paper in COUNTS}
    assert totals == {"cactus": 484, "meta_gmvae": 141, "lasium": 190, "leo": 101, "learned_rule": 21}


def test_published_numbers_of_an_unknown_paper_name_the_known_ones():
    with pytest.raises(FileNotFoundError, match="cactus, lasium, learned_rule, leo, meta_gmvae"):
        published("catcus")


def test_every_published_number_has_its_row():
    """Tables 7, 8, 9, 10 and 12 of CACTUs are complete, way and shot included."""
    for n in published("cactus"):
        if n["table"] in ("7", "8", "9", "10", "12"):
            rows = [row for row in ROWS if row.table == n["table"] and results.matches(n, vars(row))]
            assert any((n["way"], n["shot"]) in row.tests and not row.departs for row in rows), n


@pytest.mark.parametrize("paper, methods", [("leo", ("LEO (ours)", "LEO", "Meta-SGD (our features)")),
                                            ("lasium", ("UMTRA", "UMTRA-MAML", "Training from scratch"))])  # fmt: skip
def test_every_number_of_a_paper_s_own_methods_has_its_row(paper, methods):
    own = [n for n in published(paper) if n["method"] in methods or n["method"].startswith(("LASIUM", "Supervised"))]
    rows = [row for row in ROWS if row.paper == paper and not row.search]
    assert len(own) > 20
    for n in own:
        fitting = [row for row in rows if results.matches(n, vars(row))]
        assert any((n["way"], n["shot"]) in row.tests for row in fitting), n


def test_records_on_one_embedding_stand_on_one_fit():
    """Two fits of one plan differ by points (a section of the book): a table must not mix them."""
    fits = {}
    for paper in ("cactus", "leo", "lasium"):
        for record in results.read_records(paper, results.REPOSITORY / "results"):
            fit = record.get("embedding_fit", {})
            made_by = [process["commit"] for process in fit.get("made_by", [])]
            if made_by:
                place = paper, record["embedding"], record["dataset"], fit["epochs"], record["scale"]
                fits.setdefault(place, {}).setdefault(str(made_by), []).append(record["row"])
    assert fits and not {place: found for place, found in fits.items() if len(found) > 1}


def test_curves_stand_for_no_number():
    curves = [row for row in ROWS if row.table == "curves"]
    assert {(row.clusters, row.partitions) for row in curves} == {
        (50, 10), (200, 10), (1000, 10), (2000, 10), (500, 1), (500, 10), (500, 100)}  # fmt: skip
    assert not any(results.matches(n, vars(row)) for n in published("cactus") for row in curves)


def test_trials_of_a_search_stand_for_no_number(tmp_path):
    trial = dict(row="leo-1shot-search", table="search", method="LEO (ours)", variant="random search; full",
                 paper="leo", dataset="mini_imagenet", embedding="WRN-28-10 layer-21 640-d center crop")  # fmt: skip
    write_record(record(**trial), tmp_path)
    assert all(row["ours"] is None for row in compare("leo", "1", folder=tmp_path))


def test_rows_have_names_of_their_own():
    assert len({row.slug for row in ROWS}) == len(ROWS)
    assert all(set(row.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for row in ROWS)


def test_what_the_paper_lacks_is_listed_after_what_it_prints(tmp_path):
    write_record(record(row="ridge-acai", method="Embedding ridge", embedding="ACAI", variant="d=256"), tmp_path)
    *rows, last = compare("cactus", "8", folder=tmp_path)
    assert len(rows) == 92 and last["method"] == "Embedding ridge" and last["verdict"] == "no published number"


def test_a_cell_that_the_paper_lacks_is_listed_although_others_are_printed(tmp_path):
    made = record()
    write_record(made | {"cells": [*made["cells"], made["cells"][0] | {"way": 50}]}, tmp_path)
    *rows, last = compare("cactus", "8", folder=tmp_path)
    assert len(rows) == 92 and (last["way"], last["ours"], last["verdict"]) == (50, 98.35, "no published number")


@pytest.mark.parametrize(
    ("ours", "ci95", "spread", "reduced", "word"),
    [
        (94.0 + 1.5, 0.1, 0.0, False, "reproduced"),  # within 1.5 points
        (94.0 + 1.6, 0.1, 0.0, False, "higher"),
        (94.0 - 1.6, 0.1, 0.0, False, "lower"),
        (94.0 - 1.6, 1.3, 0.0, False, "reproduced"),  # within both intervals: 0.35 + 1.3
        (94.0 - 1.6, 0.1, 0.9, False, "reproduced"),  # within twice the spread over seeds
        (94.0, 0.1, 0.0, True, "reduced budget"),
        (None, None, None, False, "not run"),
    ],
)
def test_verdict(ours, ci95, spread, reduced, word):
    assert verdict(94.0, 0.35, ours, ci95, spread, reduced) == word


def test_verdict_without_a_published_value_or_interval():
    assert verdict("~10", None, 10.0) == "no published number"
    assert verdict(None, None, 10.0) == "no published number"
    assert verdict(94.0, None, 95.0) == "reproduced"


def with_answers(counts, seed=0, way=5, query=5):
    """A cell whose tasks had so many right answers."""
    percent = [100 * count / (way * query) for count in counts]
    mean, spread = statistics.fmean(percent), statistics.pstdev(percent)
    return {"way": way, "shot": 1, "query": query, "tasks": len(counts), "accuracy": mean,
            "ci95": 1.96 * spread / len(counts) ** 0.5,
            "answers": {"seed": seed, "correct": pack_counts(counts)}}  # fmt: skip


def test_counts_of_right_answers_survive_packing():
    counts = torch.randint(65_536, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert unpack_counts(pack_counts(counts)) == counts and unpack_counts(pack_counts([])) == []
    for damaged in (pack_counts(counts)[:-8], "?", pack_counts(counts)[4:]):
        with pytest.raises(ValueError, match="answers of a record are damaged.*run the row again"):
            unpack_counts(damaged)


def test_rows_of_the_same_tasks_are_compared_task_by_task():
    hard = torch.randint(5, 21, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    a, b = with_answers([count + 2 + place % 2 for place, count in enumerate(hard)]), with_answers(hard)
    gap, half = difference(a, b)
    assert gap == pytest.approx(10) and half == pytest.approx(1.96 * 2 / 20)  # 2 or 3 of 25 answers: 8 or 12 points
    of_others = with_answers(hard, seed=1)
    for other in (of_others, {name: value for name, value in b.items() if name != "answers"}):
        assert difference(a, other) == pytest.approx((10, math.hypot(a["ci95"], b["ci95"])))


def test_compare_averages_seeds(tmp_path):
    for seed, accuracy in enumerate((97.0, 98.0, 99.0)):
        write_record(record(seed=seed, accuracy=accuracy, ci95=0.3), tmp_path)
    row = number(tmp_path)
    assert (row["paper"], row["paper_ci"], row["seeds"], row["verdict"]) == (98.35, 0.22, [0, 1, 2], "reproduced")
    assert row["ours"] == pytest.approx(98.0) and row["difference"] == pytest.approx(-0.35)
    assert row["spread"] == pytest.approx(1.0)  # the standard deviation over seeds
    assert row["ci95"] == pytest.approx(0.3 / 3**0.5)  # three times as many tasks
    assert number(tmp_path, 20, 5)["verdict"] == "not run"


def test_compare_takes_the_largest_run(tmp_path):
    write_record(record(scale="smoke", steps=3, accuracy=30.0), tmp_path)
    row = number(tmp_path)
    assert (row["ours"], row["verdict"], row["difference"]) == (30.0, "reduced budget", pytest.approx(-68.35))
    write_record(record(scale="quick", steps=400, accuracy=90.0), tmp_path)
    assert number(tmp_path)["ours"] == 90.0
    write_record(record(row="five-way", deviation="trained on 5-way tasks", accuracy=98.3), tmp_path)
    assert number(tmp_path)["verdict"] == "reduced budget"
    write_record(record(steps=20_000, accuracy=98.0), tmp_path)
    assert (number(tmp_path)["ours"], number(tmp_path)["verdict"]) == (98.0, "reduced budget")
    write_record(record(accuracy=91.0), tmp_path)
    assert (number(tmp_path)["ours"], number(tmp_path)["verdict"]) == (91.0, "lower")


def test_early_stopping_is_no_smaller_budget(tmp_path):
    write_record(record(seed=0, steps=12_000, budget=30_000, accuracy=98.0), folder=tmp_path)
    write_record(record(seed=1, steps=9_000, budget=30_000, accuracy=98.4), folder=tmp_path)
    write_record(record(seed=2, steps=20_000, accuracy=90.0), folder=tmp_path)  # merely shortened
    row = number(tmp_path)
    assert row["seeds"] == [0, 1] and row["ours"] == pytest.approx(98.2)
    assert (row["steps"], row["budget"], row["verdict"]) == (9_000, 30_000, "reproduced")
    assert "stopped early, 9,000 of 30,000 steps" in table_markdown("cactus", "8", folder=tmp_path)


def test_a_cell_of_fewer_tasks_is_reduced(tmp_path):
    few = record(row="scratch", method="Training from scratch", embedding="N/A", variant="", accuracy=52.5)
    published_ = next(n for n in published("cactus") if n["method"] == few["method"] and n["table"] == "8")
    few |= {name: published_[name] for name in ("embedding", "variant")}
    few["cells"].append(few["cells"][0] | {"way": 20, "accuracy": 24.91, "tasks": 300})
    write_record(few, tmp_path)
    assert number(tmp_path, method=few["method"])["verdict"] == "reproduced"
    assert number(tmp_path, way=20, method=few["method"])["verdict"] == "reduced budget"
    assert "| reduced budget; 300 of 1000 tasks |" in table_markdown("cactus", "8", folder=tmp_path)
    assert results.is_reduced(few) is False


def test_main_text_tables_join_with_fewer_settings(tmp_path):
    method = "CACTUs-MAML"
    write_record(record(row="cactus-maml", method=method, embedding="ACAI", variant="d=256;P=100;k=500"), tmp_path)
    write_record(record(row="p1", method=method, embedding="ACAI", variant="d=256;P=1;k=500", accuracy=1.0), tmp_path)
    rows = compare("cactus", "1", folder=tmp_path)
    assert [row["ours"] for row in rows if row["ours"] is not None] == [98.35]
    assert all(row["verdict"] == "not run" for row in compare("cactus", "2", folder=tmp_path))


def test_a_dataset_that_the_paper_does_not_have(tmp_path):
    write_record(record(row="oracle-protonets-glyphs", dataset="glyphs", scale="quick", accuracy=80.0), tmp_path)
    assert number(tmp_path)["verdict"] == "not run"
    (row,) = compare("cactus", "8", "glyphs", tmp_path)
    assert (row["ours"], row["paper"], row["verdict"]) == (80.0, None, "no published number")


def test_compare_names_the_tables_there_are(tmp_path):
    with pytest.raises(ValueError, match="cactus has no table 11; its tables: .*8, 9"):
        compare("cactus", 11, folder=tmp_path)


def test_records_are_written_in_one_step(tmp_path, monkeypatch):
    path = write_record(record(), tmp_path)
    assert path == tmp_path / "cactus" / "oracle-protonets-full-seed0.json"
    before = path.read_text()
    assert before.startswith('{\n "paper"') and json.loads(before) == record()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(record(accuracy=1.0), tmp_path)
    assert path.read_text() == before and [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "many"}, "field 'steps' is 'many', must be int"),
        ({"seed": True}, "field 'seed' is True"),
        ({"scale": "huge"}, "scale is 'huge', must be one of smoke, quick, full"),
        ({"cells": []}, "cells is empty"),
        ({"accuracy": 0.98, "ci95": -1.0}, "accuracy and ci95 are percentages"),
        ({"accuracy": float("nan")}, "percentages"),
    ],
)
def test_a_wrong_record_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_record(record(**changes), tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_a_malformed_record_is_named(tmp_path):
    path = write_record(record(), tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="oracle-protonets-full-seed0.json: not valid JSON"):
        read_records("cactus", tmp_path)
    path.write_text(json.dumps({name: value for name, value in record().items() if name != "device"}))
    with pytest.raises(ValueError, match="oracle-protonets-full-seed0.json: field 'device' is missing"):
        compare("cactus", "8", folder=tmp_path)


def test_tables_print_the_numbers_and_link_the_records(tmp_path, monkeypatch):
    for seed in (0, 1):
        write_record(record(seed=seed, accuracy=98.0), tmp_path)
    text = table_text("cactus", 8, folder=tmp_path)
    line = next(line for line in text.splitlines() if "98.35" in line)
    assert "98.00 ± 0.14" in line and "-0.35" in line and "reproduced; 2 seeds" in line
    assert text.endswith("92 numbers: 1 reproduced, 91 not run")
    cited = {"methods": ("Oracle-ProtoNets",), "caption": "By {cite:t}`hsu2019`."}
    notebook = table_markdown("cactus", 8, folder=tmp_path, **cited)
    assert notebook.startswith("**By hsu2019.**\n\n| method") and notebook.count("Oracle-ProtoNets") == 4
    monkeypatch.setenv("UMETA_BOOK", "1")
    page = table_markdown("cactus", 8, measured_only=True, folder=tmp_path)
    own = (tmp_path / "cactus" / "oracle-protonets-full-seed0.json").as_uri()  # a reader's records are not on the web
    assert f"[98.00 ± 0.14]({own}) [2]({own.replace('seed0', 'seed1')})" in page
    monkeypatch.setattr(results, "INSTALLED", tmp_path)
    page = table_markdown("cactus", 8, measured_only=True, folder=tmp_path)
    assert page.startswith(":::{table} ") and ":name: tab-cactus-8\n" in page and page.endswith(":::\n")
    base = "https://github.com/umeta-book/umeta/blob/main/results/cactus/oracle-protonets-full-seed"
    assert f"[98.00 ± 0.14]({base}0.json) [2]({base}1.json)" in page
    assert len([line for line in page.splitlines() if line.startswith("|")]) == 3


def test_results_folder_order(tmp_path, monkeypatch):
    monkeypatch.delenv("UMETA_RESULTS", raising=False)
    assert results.results_folder() == results.REPOSITORY / "results"
    monkeypatch.setenv("UMETA_RESULTS", str(tmp_path))
    assert results.results_folder() == tmp_path
    assert results.results_folder("here") == results.Path("here")
    monkeypatch.delenv("UMETA_RESULTS")
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    assert results.results_folder() == results.Path("results")


def test_provenance_names_versions_and_device():
    found = results.provenance("cpu")
    assert set(found) == {"commit", "dirty", "versions", "device", "created"}
    assert found["versions"]["torch"] and "thread" in found["device"] and found["created"].endswith("+00:00")


def test_committed_records_are_valid():
    for paper in COUNTS:
        for row in read_records(paper, results.REPOSITORY / "results"):
            assert row["file"].endswith(f"{row['row']}-{row['scale']}-seed{row['seed']}.json")


def test_every_folder_of_records_is_installed():
    """A chapter on Colab reads them from there. Fits are too large, and only a clone takes them."""
    tomllib = pytest.importorskip("tomllib")
    with open(results.REPOSITORY / "pyproject.toml", "rb") as file:
        installed = tomllib.load(file)["tool"]["setuptools"]["data-files"]
    tracked = subprocess.run(["git", "ls-files", "results"], cwd=results.REPOSITORY, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a clone")
    folders = {str(Path(line).parent) for line in tracked.stdout.splitlines()} - {"results/fits"}
    assert folders <= {folder.removeprefix("share/umeta/") for folder in installed}


def test_a_record_of_the_ledger_is_no_measurement_of_a_published_number():
    """However alike: the control without training has the method, the embedding and the settings of Table 9's row."""
    number = next(n for n in results.published("cactus") if (n["table"], n["method"], n["embedding"], n["shot"]) ==
                  ("9", "Embedding kNN", "DeepCluster", 1))  # fmt: skip
    small, untrained = (vars(find_row(f"knn-deepcluster-mini-imagenet-{which}")) for which in ("small", "untrained"))
    assert results.matches(number, small) and not results.matches(number, untrained)
    ours = {n["shot"]: n["files"] for n in results.compare("cactus", "9") if
            (n["method"], n["embedding"]) == ("Embedding kNN", "DeepCluster")}  # fmt: skip
    assert ours and not any("untrained" in str(file) for files in ours.values() for file in files)


def test_records_never_go_into_the_installed_copy(tmp_path, monkeypatch):
    """Which is read where nothing else is."""
    monkeypatch.delenv("UMETA_RESULTS", raising=False)
    installed = tmp_path / "share" / "umeta" / "results"
    installed.mkdir(parents=True)
    monkeypatch.setattr(results, "REPOSITORY", tmp_path / "no clone")
    monkeypatch.setattr(results, "INSTALLED", installed)
    assert results.results_folder() == installed and results.own_folder() == Path("results")
    assert results.own_folder(tmp_path) == tmp_path


def test_two_seeds_have_no_spread_that_could_excuse_a_difference(tmp_path):
    for seed, accuracy in enumerate((94.0, 98.0)):
        write_record(record(seed=seed, accuracy=accuracy, ci95=0.3), tmp_path)
    row = number(tmp_path)
    assert (row["spread"], row["verdict"]) == (None, "lower")


@pytest.mark.parametrize("paper", ["cactus", "lasium", "leo", "meta_gmvae"])
def test_records_were_made_with_what_their_rows_say(paper):
    """A row may not change under its records: no switch, length, test, or setting of its embedding."""
    for found in read_records(paper, results.REPOSITORY / "results"):
        row, scale, name = find_row(found["row"]).configuration(found["seed"]), found["scale"], found["file"]
        now, then = json.loads(json.dumps(plain(row.protocol()))), found["protocol"]
        renamed = {"draws", "hidden", "linear"} if row.search else set()  # since the first trials
        assert {k: now[k] for k in now.keys() - renamed} == {k: then[k] for k in then.keys() - renamed}, name
        assert (found["paper_steps"], found["tasks_per_step"]) == (row.steps["full"], row.tasks), name
        assert [(cell["way"], cell["shot"]) for cell in found["cells"]] == list(row.tests), name
        fit = found.get("embedding_fit", {})
        if "epochs" in fit:
            options = json.loads(json.dumps(row.plan.options))
            assert (fit["epochs"], fit["batch"], fit["options"]) == (row.plan.epochs[scale], row.plan.batch, options)
            assert fit["paper_epochs"] == paper_epochs(row), name


def test_one_seed_on_fewer_tasks_reduces_the_mean(tmp_path):
    for seed, tasks in enumerate((1000, 200)):
        made = record(seed=seed)
        small = made["cells"][0] | {"tasks": tasks}
        write_record(made | {"cells": [small, made["cells"][0] | {"shot": 5}]}, tmp_path)
    row = number(tmp_path)
    assert (row["verdict"], row["tasks"]) == ("reduced budget", (200, 1000))
