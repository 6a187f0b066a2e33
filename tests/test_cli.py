"""The command line, the plan and the reproduction engine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from umeta_core import cli, costs, experiments, results, rows, snapshots, stages
from umeta_core.cli import main
from umeta_core.storage import save_tensors

SMALL = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(results.REPOSITORY)}


def umeta(*arguments):
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "umeta_core.cli", *map(str, arguments)]
    return subprocess.run(command, env=SMALL, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["results", "catcus"], "no published numbers for 'catcus'; known papers: cactus"),
        (["results", "cactus", "--table", "99"], "cactus has no table '99'; its tables: 7, 8"),
        (["train", "oracle-maml", "--scale", "enormous"], "invalid choice: 'enormous'"),
        (["train", "oracel-maml"], "unknown row 'oracel-maml'; near: oracle-maml"),
        (["train", "oracle-maml", "--dataset", "onmiglot"], "unknown data set 'onmiglot'"),
        (["train", "oracle-maml", "--dataset", "glyphs", "--device", "gpu"], "unknown device 'gpu'; use cpu, cuda"),
        (["train", "oracle-maml", "--dataset", "glyphs", "--device", "mps"], "unknown device 'mps'; use cpu, cuda"),
        (["train", "oracle-maml", "--threads", "0"], "must be at least 1, not 0"),
        (["train", "oracle-maml", "--seed", "-1"], "must be 0 to 4294967295, not -1"),
        (["train", "knn-bigan"], "knn-bigan trains nothing: umeta reproduce cactus --rows knn-bigan"),
        (["data", "features", "cactus-maml-bigan", "folder"], "cactus-maml-bigan does not learn on LEO's features"),
        (["data", "features", "leo-1shot-small", "folder"], "leo-1shot-small does not learn on LEO's features"),
        (["data", "features", "leo-1shot-glyphs", "folder"], "leo-1shot-glyphs does not learn on LEO's features"),
        (["data", "features", "leo-1shot", "folder"], "no folder/train_embeddings.pkl; folder should be the folder of"),
        (["reproduce", "cactus", "--rows", ",", "--dry-run"], "--rows is empty; give parts"),
        (["evaluate", "oracle-maml", "--dataset", "glyphs", "--checkpoint", "no.pt"], "no checkpoint no.pt"),
        (["reproduce", "cactus", "--rows", "orcale", "--dry-run"], "no row of cactus fits --rows orcale; near: oracle"),
        (["reproduce", "cactus", "--table", "77", "--dry-run"], "cactus has no table '77'"),
        (["data", "info", "onmiglot"], "unknown data set 'onmiglot'"),
        (["train", "oracle-maml-glyphs", "--checkpoint", "."], ". is a folder; --checkpoint is a file"),
        (["train", "oracle-maml-glyphs", "--results", "here"], "--results is the folder of the record; say --record"),
        (["reproduce", "cactus", "--rows", "oracle-maml-glyphs", "--dry-run"], "to another dataset by --rows NAME"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("UMETA_DEBUG", raising=False)
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("umeta") and ": error: " in error and message in error
    assert error.count("\n") == 1 and "Traceback" not in error


def test_a_mistake_in_a_process_of_its_own():
    done = umeta("results", "catcus")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("umeta: error: no published numbers")


def test_results_print_published_numbers_and_ours(tmp_path, capsys):
    assert main(["results", "cactus", "--table", "8", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "98.35 ± 0.22" in text and "92 numbers: 92 not run" in text


def test_results_need_no_torch():
    code = "import sys; from umeta_core.cli import main; main(['results', 'cactus']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=SMALL, capture_output=True, check=False).returncode == 0


def test_the_plan_of_a_table(tmp_path, capsys):
    plan = ["reproduce", "cactus", "--table", "8", "--dry-run", "--results", str(tmp_path)]
    assert main([*plan, "--scale", "full", "--seeds", "0", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[:-1] if not line.startswith("  before")][::2]
    assert len(names) == 24 and {"scratch", "knn-acai", "cactus-maml-bigan"} <= set(names)
    assert "oracle-maml-5way" not in names and "ridge-acai" not in names  # only what the paper prints
    assert "30,000 steps  about 68 min" in lines[0]
    assert lines[-1].startswith("48 of 48 runs to do on cpu and 24 stages before; one after another")
    assert main([*plan, "--rows", "oracle-protonets,scratch", "--dataset", "glyphs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["oracle-protonets-glyphs", "scratch-glyphs"]
    assert not list(tmp_path.iterdir())


def test_the_plan_counts_what_must_be_made_first(tmp_path, capsys):
    def planned(*names):
        arguments = ["--rows", ",".join(names), "--scale", "full", "--results", str(tmp_path), "--runs", str(tmp_path)]
        assert main(["reproduce", "cactus", "--table", "8", "--dry-run", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    *_, fit, total = planned("knn-acai")
    assert fit == "  before: embedding short ACAI of omniglot, 50 epochs: about 46 min"
    assert total == "2 of 2 runs to do on cpu and 2 stages before; one after another about 12.4 h"
    row = rows.find_row("cactus-protonets-bigan")
    assert [what.split(",")[0] for what, _ in costs.missing_stages(row, "full", 0, folder=tmp_path).values()] == [
        "embedding BiGAN of omniglot", "100 partitions of BiGAN of omniglot by 500 clusters"]  # fmt: skip
    save_tensors({"epoch": 100}, stages.fit_file(row, "full", tmp_path))
    what, seconds = costs.missing_stages(row, "full", 0, folder=tmp_path)[stages.fit_file(row, "full", tmp_path)]
    assert what.endswith("400 epochs of which 100 are done") and seconds == 300 * row.plan.seconds
    for file in (stages.vectors_file(row, "train", "full", tmp_path), *stages.stage_files(row, "full", 0, tmp_path)):
        assert len(costs.missing_stages(row, "full", 0, folder=tmp_path)) > 0
        file.touch()
    assert costs.missing_stages(row, "full", 0, folder=tmp_path) == {}
    assert costs.embedding_seconds(rows.find_row("lr-simclr-mini-imagenet"), "full") is None  # not known
    view, fit = (costs.missing_stages(rows.find_row(name), "full", 0, folder=tmp_path / "none")
                 for name in ("knn-bigan-logits", "knn-bigan"))  # fmt: skip
    costs_of = [{file: seconds for file, (_, seconds) in stages.items()} for stages in (view, fit)]
    assert costs_of[0] == costs_of[1]
    assert [what.split(",")[0] for what, _ in view.values()] == ["embedding BiGAN of omniglot"]


def test_a_run_that_stopped_early_goes_on(tmp_path, capsys):
    committed = results.results_folder() / "cactus" / "oracle-protonets-glyphs-quick-seed0.json"
    (tmp_path / "cactus").mkdir()
    short = json.loads(committed.read_text()) | {"steps": 10}
    (tmp_path / "cactus" / committed.name).write_text(json.dumps(short))
    plan = ["reproduce", "cactus", "--rows", "oracle-protonets", "--dataset", "glyphs", "--scale", "quick"]
    arguments = cli.parser().parse_args([*plan, "--results", str(tmp_path)])
    chosen = rows.select_rows("cactus", None, "oracle-protonets", "glyphs")
    assert cli._print_plan(arguments, chosen, tmp_path) == [tmp_path / "cactus" / committed.name]
    said = capsys.readouterr().out
    assert "again from the start: the record has 10 steps" in said and "1 of 1 runs to do" in said
    assert main([*plan, "--dry-run", "--results", str(results.results_folder())]) == 0
    assert "0 of 1 runs to do" in capsys.readouterr().out


@pytest.mark.parametrize("rows", ["scratch", "bigan"])
def test_the_columns_of_a_plan_are_aligned(rows, capsys, tmp_path):
    assert main(["reproduce", "cactus", "--rows", rows, "--dry-run", "--results", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines()[:-1] if not line.startswith("  before")]
    assert {line.index(" steps  ") for line in lines} == {lines[0].index(" steps  ")}
    assert lines[0].index("quick") == 2 + max(len(line.split()[0]) for line in lines)


def test_the_list_of_rows(capsys, tmp_path):
    assert main(["reproduce", "cactus", "--table", "8", "--list", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("cactus-maml-bigan "))
    assert "58.18 / 78.66 / 35.56 / 58.62" in line and "not run" in line and "one GPU" in line
    assert any("embedding BiGAN of omniglot: 400 epochs" in line for line in lines)
    at = lines.index("more rows, by name (--rows):")
    first, more = ({line.split()[0] for line in part} for part in (lines[:at], lines[at:]))
    assert "knn-acai" in first and {"oracle-maml-5way", "knn-acai-short", "ridge-bigan"} <= more and not first & more
    assert main(["reproduce", "cactus", "--list", "--results", str(tmp_path)]) == 0
    slugs = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {row.slug for row in rows.ROWS if row.paper == "cactus"} <= slugs
    assert main(["reproduce", "cactus", "--table", "8", "--list", "--rows", "oracle-maml-5way"]) == 0
    assert "not printed" not in capsys.readouterr().out


def test_the_list_says_what_is_unknown_and_what_stopped_early(capsys):
    assert main(["reproduce", "cactus", "--list", "--rows", "scratch-imagenet,cactus-protonets-bigan"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "2 cores time unknown, one GPU time unknown" in lines["scratch-imagenet"]
    assert "(7 of 30,000 steps)" in cli._state({"scale": "full", "seed": 0, "steps": 7}, 30_000)
    assert cli._state({"scale": "full", "seed": 0, "steps": 9, "budget": 20}, 20) == \
        "full seed 0"  # fmt: skip


def test_expected_times_fit_the_records():
    """Within a factor of two for MAML on Omniglot at 5 ways, the cheapest and the most often run."""
    for record in results.read_records("cactus"):
        if record["row"] in ("oracle-maml-5way", "random-maml-5way", "pixels-maml-5way") and record["scale"] == "full":
            row = replace(rows.find_row(record["row"]), at_most=record["steps"])
            ratio = costs.expected_seconds(row, "full") / (record["seconds"] + record["test_seconds"])
            assert 0.5 < ratio < 2


def test_a_missing_engine_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["reproduce", "cactus", "--rows", "scratch", "--scale", "smoke"]) == 2
    assert "snakemake and papermill not installed; pip install -e '.[reproduce]'" in capsys.readouterr().err


def test_two_reproductions_do_not_share_a_folder(tmp_path, capsys):
    pytest.importorskip("snakemake")
    pytest.importorskip("papermill")
    command = ["reproduce", "cactus", "--rows", "scratch", "--scale", "smoke", "--runs", str(tmp_path)]
    with cli._only_one(tmp_path):
        assert main(command) == 2
    assert f"another umeta reproduce is at work in {tmp_path}" in capsys.readouterr().err
    with cli._only_one(tmp_path):  # free again
        pass


@pytest.mark.parametrize("ending, restart, next_time", [
    (signal.SIGTERM, False, "goes on from the last checkpoints"), (signal.SIGHUP, True, "starts all over"),
])  # fmt: skip
def test_an_interrupt_ends_all_that_was_started(tmp_path, capsys, monkeypatch, ending, restart, next_time):
    psutil = pytest.importorskip("psutil")
    kernel = [sys.executable, "-c", "import time; time.sleep(60)"]
    engine = f"import pathlib, subprocess; p = subprocess.Popen({kernel}, start_new_session=True); " \
             f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); p.wait()"  # fmt: skip

    def interrupt():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), ending)

    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # under nohup the end of a terminal is ignored
    threading.Thread(target=interrupt).start()
    with open(tmp_path / "lock", "w") as lock, pytest.raises(KeyboardInterrupt):
        cli._run_to_the_end([sys.executable, "-c", engine], dict(os.environ), lock, restart)
    assert next_time in capsys.readouterr().err
    pid = int((tmp_path / "pid").read_text())
    for _ in range(600):  # what is killed takes a moment to go on a busy machine; the kernel would sleep for a minute
        if ended := not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    assert ended


def test_the_classes_of_celeba_by_identity_are_a_place_for_rows(capsys):
    assert main(["reproduce", "lasium", "--dataset", "celeba_identity", "--list"]) == 0
    assert "supervised-maml-celeba-identity" in capsys.readouterr().out
    assert rows.find_row("supervised-maml", "celeba_identity").slug == "supervised-maml-celeba-identity"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = cli.parser().parse_args(["train", "oracle-maml", "--runs=~/runs", "--checkpoint=~/c.pt"])
    assert (given.runs, given.checkpoint) == (tmp_path / "runs", tmp_path / "c.pt")
    assert stages.stages_folder("~/stages") == tmp_path / "stages"


def test_rows_move_to_other_datasets():
    row = rows.find_row("oracle-maml-mini-imagenet")  # a row of Table 9
    assert (row.table, row.dataset, row.split_protocol, row.way) == ("9", "mini_imagenet", None, 5)
    assert rows.find_row("oracle-maml", "mini_imagenet") == row
    moved = rows.find_row("oracle-maml-glyphs")
    assert (moved.slug, moved.dataset, moved.split_protocol) == ("oracle-maml-glyphs", "glyphs", None)
    assert rows.find_row("oracle-maml", "glyphs") == moved
    assert not moved.departs
    other = rows.find_row("oracle-maml-mini-imagenet", "omniglot")
    assert other.departs == "settings of mini_imagenet", "Table 8 has numbers that are not this row's"
    assert rows.find_row("oracle-maml").split_protocol == "cactus"
    for slug in ("mnist", "oracle-maml-", "oracle-maml-nowhere", ""):
        with pytest.raises(ValueError, match="unknown row"):
            rows.find_row(slug)


def test_every_scale_is_no_larger_than_the_next():
    for row in rows.ROWS:
        assert row.steps["smoke"] <= row.steps["quick"] <= row.steps["full"]
        assert row.test_tasks["smoke"] <= row.test_tasks["quick"] <= row.test_tasks["full"]
        assert row.paper != "cactus" or row.test_tasks["full"] == 1000
        if row.network.get("residual"):
            assert costs.expected_seconds(row, "full") is None  # nobody has timed it
            continue
        smoke, quick, full = (costs.expected_seconds(row, scale) for scale in results.SCALES)
        assert 0 < smoke <= quick <= full and smoke < 400


@pytest.mark.parametrize("paper", sorted({row.paper for row in rows.ROWS}))
def test_the_experiment_notebook_has_every_parameter_and_no_outputs(paper):
    notebook = json.loads((experiments.NOTEBOOKS / f"{paper}.ipynb").read_text())
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_an_unknown_notebook_parameter_is_an_error(tmp_path):
    pytest.importorskip("papermill")
    with pytest.raises(ValueError, match="cactus.ipynb has no parameter sed; it has checkpoint, device"):
        experiments.run_notebook(experiments.NOTEBOOKS / "cactus.ipynb", tmp_path / "out.ipynb", {"sed": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_then_evaluate_from_the_checkpoint(tmp_path, capsys):
    rest = ["--dataset", "glyphs", "--scale", "smoke", "--checkpoint", str(tmp_path / "p.pt")]
    assert main(["train", "oracle-protonets", *rest]) == 0
    trained = capsys.readouterr().out.splitlines()
    assert main(["evaluate", "oracle-protonets", *rest]) == 0
    evaluated = capsys.readouterr().out.splitlines()
    assert len(trained) == 5 and trained[1:] == evaluated[1:]
    assert main(["train", "oracle-protonets", *rest, "--steps", "1"]) == 2  # the checkpoint is further
    assert "beyond the 1 asked for" in capsys.readouterr().err.splitlines()[-1]
    assert main(["evaluate", "oracle-maml", *rest]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "p.pt is of the row oracle-protonets-glyphs, not of oracle-maml-glyphs" in error


def test_what_went_wrong_in_a_run_is_said_though_its_table_has_no_records(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise ValueError("a run failed")

    monkeypatch.setattr(cli, "_snakefile", lambda: tmp_path)
    monkeypatch.setattr(cli, "_snakemake", fail)
    assert main(["reproduce", "cactus", "--table", "curves", "--results", str(tmp_path)]) == 2
    assert "a run failed" in capsys.readouterr().err


def test_a_run_has_no_more_steps_than_its_row(capsys):
    assert main(["train", "scratch", "--dataset", "glyphs", "--steps", "5"]) == 2
    assert capsys.readouterr().err.endswith("scratch-glyphs has 0 steps\n")
    assert main(["train", "leo-1shot-small", "--dataset", "glyphs", "--scale", "full", "--steps", "50000"]) == 2
    assert "has 20,000 steps" in capsys.readouterr().err


@pytest.mark.slow
def test_reproduce_runs_records_and_resumes(tmp_path):
    pytest.importorskip("snakemake")
    pytest.importorskip("papermill")
    tmp_path = tmp_path / "run #2: with spaces"  # Snakemake reads what it is given as YAML
    arguments = ("reproduce", "cactus", "--table", 8, "--rows", "oracle-protonets", "--dataset", "glyphs",
                 "--scale", "smoke", "--cores", 1, "--runs", tmp_path / "runs",
                 "--results", tmp_path / "results")  # fmt: skip
    done = umeta(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = results.read_records("cactus", tmp_path / "results")
    assert (record["row"], record["scale"], record["steps"]) == ("oracle-protonets-glyphs", "smoke", 3)
    assert [(cell["way"], cell["shot"]) for cell in record["cells"]] == [(5, 1), (5, 5), (20, 1), (20, 5)]
    folder = tmp_path / "runs" / "cactus"
    executed = json.loads((folder / "oracle-protonets-glyphs-smoke-seed0.ipynb").read_text())
    assert any(cell.get("outputs") for cell in executed["cells"])
    assert "table-8-glyphs-smoke.md" in {path.name for path in folder.iterdir()}
    assert "no published number" in done.stdout

    again = umeta(*arguments)
    assert again.returncode == 0 and "0 of 1 runs to do" in again.stdout
    assert results.read_records("cactus", tmp_path / "results") == [record]

    path = Path(record["file"])  # as if that run had stopped early; and another row of the same table
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 1, "budget": 1}))
    both = "oracle-protonets,matching-random-network"
    other = umeta(*((both if a == "oracle-protonets" else a) for a in arguments))
    assert other.returncode == 0 and "goes on: the record has 1 steps" in other.stdout, other.stdout + other.stderr
    found = {r["row"]: r["steps"] for r in results.read_records("cactus", tmp_path / "results")}
    assert found == {"oracle-protonets-glyphs": 3, "matching-random-network-glyphs": 0}
    vectors = {path.stem.split("-")[-1] for path in folder.glob("stages/*-vectors-*.pt")}
    assert vectors == {"train", "test"}  # what is not tuned needs no validation images

    before = {r["row"]: r["created"] for r in results.read_records("cactus", tmp_path / "results")}
    for path in folder.glob("stages/*-vectors-*.pt"):  # a row that is new makes them anew: no reason to redo others
        path.unlink()
    rest = "matching-random-network,nearest-mean-random-network"
    more = umeta(*((rest if a == "oracle-protonets" else a) for a in arguments))
    assert more.returncode == 0, more.stdout + more.stderr
    after = {r["row"]: r["created"] for r in results.read_records("cactus", tmp_path / "results")}
    assert after.keys() - before.keys() == {"nearest-mean-random-network-glyphs"} and before.items() <= after.items()


def test_force_forgets_a_shared_training_once(tmp_path):
    """Before any row runs: a row that comes later must not delete what an earlier one has trained."""
    both = [rows.find_row("gmvae-20way-1shot"), rows.find_row("gmvae-20way-5shot")]
    files = {experiments.training_file(row, tmp_path / "meta_gmvae" / f"{row.slug}-full-seed1.pt") for row in both}
    (file,) = files
    other = file.with_name(file.name.replace("seed1", "seed0"))
    for path in (file, other):
        save_tensors({"step": 1}, path)
    snapshots.take(torch.nn.Linear(1, 1), snapshots.snapshots_of(file), 1000)
    cli._forget_trainings(both, SimpleNamespace(scale="full", seeds=[1]), tmp_path)
    assert other.exists() and not file.exists() and not any(snapshots.snapshots_of(file).glob("*.pt"))


def test_a_plan_for_a_gpu_needs_no_gpu(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = ["reproduce", "cactus", "--rows", "oracle-protonets", "--device", "cuda", "--runs", str(tmp_path)]
    assert main([*arguments, "--dry-run"]) == 0 and "to do on cuda" in capsys.readouterr().out
    assert main(arguments) == 2 and "torch finds no CUDA GPU" in capsys.readouterr().err
    assert main([*arguments[:-3], "gpu", "--dry-run"]) == 2 and "unknown device 'gpu'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["leo-1shot-search", "ro-vae-maml-02", "gmvae-5way-1shot-decode1"])
def test_the_experiment_notebooks_run_to_their_end(slug, tmp_path):
    pytest.importorskip("papermill")
    row = rows.find_row(slug, "glyphs")
    copy = experiments.execute_notebook(row, "smoke", 0, folder=tmp_path / "results", runs=tmp_path / "out")
    (record,) = results.read_records(row.paper, tmp_path / "results")
    assert record["row"] == row.slug and record["notebook"] == f"out/{row.paper}/{copy.name}"


def test_a_shortened_run_is_recorded_as_a_reduced_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UMETA_RESULTS", str(tmp_path))
    arguments = ["train", "oracle-protonets", "--dataset", "glyphs", "--scale", "smoke", "--steps", "1", "--record"]
    assert main([*arguments, "--checkpoint", str(tmp_path / "run.pt")]) == 0
    assert "5-way 1-shot" in capsys.readouterr().out
    record = results.read_record(tmp_path / "cactus" / "oracle-protonets-glyphs-smoke-seed0.json")
    assert (record["steps"], record["paper_steps"]) == (1, 30_000) and results.is_reduced(record)
