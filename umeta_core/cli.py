"""The command line: ``umeta data | train | evaluate | reproduce | results``.

A user's mistake is one line on standard error and exit code 2. Set ``UMETA_DEBUG=1`` for the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import urllib.parse
from pathlib import Path

from . import results
from .results import REPOSITORY, SCALES
from .speed import cores, rank

TWO_CORES = 0.6  # of the time with one thread, measured for MAML on 20-way tasks
_RECORDS = "folder of records (default: $UMETA_RESULTS, else the repository's)"
EPILOG = "Example: umeta reproduce cactus --table 8 --rows oracle --scale quick --dataset glyphs"


class _Parser(argparse.ArgumentParser):
    """argparse prints the usage before an error; here the error alone, in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The argument parser; every command sets ``run``, the function that carries it out."""
    top = _Parser(prog="umeta", description="Unsupervised meta-learning, rebuilt and reproduced.", epilog=EPILOG)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_data(commands)
    _add_row_command(commands, "train", _train, "meta-train one row and test it")
    _add_row_command(commands, "evaluate", _evaluate, "test one row from a checkpoint")
    _add_reproduce(commands)
    _add_results(commands)
    return top


def _add_data(commands) -> None:
    data = commands.add_parser("data", help="list, describe, pack and check datasets")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the datasets and where each was found").set_defaults(run=_data_list)
    for name, run, text in (("info", _data_info, "what a dataset is and where it comes from"),
                            ("check", _data_check, "verify counts and checksums")):  # fmt: skip
        action = actions.add_parser(name, help=text)
        action.add_argument("name")
        action.set_defaults(run=run)
    pack = actions.add_parser("pack", help="make one compact file from a folder of images")
    pack.add_argument("name")
    pack.add_argument("folder", type=_path, help="the dataset in its usual folder layout")
    pack.add_argument("--out", type=_path, default=None, help="where to write (default: the user's cache folder)")
    pack.set_defaults(run=_data_pack)
    features = actions.add_parser("features", help="take the published embeddings of LEO instead of computing features")
    features.add_argument("row", help="any row that learns on them: leo-1shot, or leo-1shot-tiered-imagenet")
    features.add_argument("folder", type=_path, help="holds train_, val_ and test_embeddings.pkl of one crop")
    fitted = actions.add_parser("fitted", help="take the fitted embedding that comes with the repository")
    fitted.add_argument("row", help="any row on it, for example cactus-protonets-bigan; a plan names it")
    for action, run in ((features, _data_features), (fitted, _data_fitted)):
        action.add_argument("--runs", type=_path, default=Path("runs"),
                            help="that of `umeta reproduce` (default: runs)")  # fmt: skip
        action.set_defaults(run=run)


def _add_machine(command) -> None:
    command.add_argument("--dataset", help="run the rows on another dataset, for example glyphs (built in)")
    command.add_argument("--scale", choices=SCALES, default="quick",
                         help="smoke: seconds; quick: minutes (default); full: the paper's")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")
    command.add_argument("--threads", type=_positive, default=None,
                         help="processor threads of one run (default: 1 for reproduce, else all cores)")  # fmt: skip


def _add_row_command(commands, name: str, run, text: str) -> None:
    command = commands.add_parser(name, help=text)
    command.add_argument("row", help="for example oracle-protonets; umeta reproduce cactus --list shows all")
    _add_machine(command)
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument("--checkpoint", type=_path, required=name == "evaluate",
                         help="file to save to and resume from")  # fmt: skip
    command.add_argument("--runs", type=_path, default=Path("runs"), help="embeddings and partitions are in its stages")
    if name == "train":
        command.add_argument("--steps", type=_positive, help="stop earlier than the scale says; a reduced budget")
        command.add_argument("--record", action="store_true", help="write the record that `umeta results` compares")
        command.add_argument("--results", type=_path, help=_RECORDS)
    command.set_defaults(run=run)


def _add_reproduce(commands) -> None:
    command = commands.add_parser("reproduce", help="run rows of a paper's table and compare them with it")
    command.add_argument("paper", help="for example cactus")
    command.add_argument("--table", help="all its rows (default: every row of the paper)")
    command.add_argument("--rows", help="only rows whose name contains one of these, comma-separated: oracle,scratch")
    _add_machine(command)
    command.add_argument("--seeds", type=_seed, nargs="+", default=[0], metavar="SEED",
                         help="one run each (default: 0)")
    command.add_argument("--cores", type=_positive, default=cores(), help="processor cores for all runs")
    command.add_argument("--gpus", type=_positive, default=1, help="runs that may share --device (default: 1)")
    command.add_argument("--runs", type=_path, default=Path("runs"), help="executed notebooks and checkpoints go here")
    command.add_argument("--results", type=_path, help=_RECORDS)
    command.add_argument("--profile", help="Snakemake profile, for a cluster")
    command.add_argument("--force", action="store_true", help="run again what has a record, from the beginning")
    command.add_argument("--list", action="store_true", help="list the rows and stop")
    command.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    command.set_defaults(run=_reproduce)


def _add_results(commands) -> None:
    command = commands.add_parser("results", help="published numbers beside ours")
    command.add_argument("paper", help="for example cactus")
    command.add_argument("--table", help="one table of the paper, for example 8")
    command.add_argument("--dataset", help="one dataset, also one that the paper does not have, as glyphs")
    command.add_argument("--measured", action="store_true", help="leave out what was not run")
    command.add_argument("--markdown", action="store_true", help="print the table as the book shows it")
    command.add_argument("--results", type=_path, help=_RECORDS)
    command.set_defaults(run=_results)


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be 0 to 4294967295, not {value}")
    return value


def _path(text: str) -> Path:
    return Path(text).expanduser()  # a shell leaves --runs=~/x as it is


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


_seed.__name__ = _positive.__name__ = "whole number"  # what argparse calls them in its messages


# Commands ----------------------------------------------------------------------------------------------------------
# Each imports what it needs: `umeta results` should not wait for torch.


def _data_list(arguments) -> None:
    from .data import datasets

    for about in datasets():
        print(f"{about['name']:14} {about['found'] or 'not found'}\n{'':14} {about['what']}")


def _data_info(arguments) -> None:
    from .data import info

    for name, value in info(arguments.name).items():
        if isinstance(value, list):
            value = ("\n" + " " * 11 if name == "get" else ", ").join(map(str, value))
        print(f"{name:10} {value if value not in (None, '') else '-'}")


def _data_check(arguments) -> int:
    from .data import check

    report = check(arguments.name)
    for line in report:
        word = {True: "ok", False: "WRONG", None: "?"}[line["ok"]]
        print(f"{word:6} {line['what']}: {line['detail']}")
    return 1 if any(line["ok"] is False for line in report) else 0


def _data_pack(arguments) -> None:
    from .data import pack
    from .storage import cache_folder

    for path in pack(arguments.name, arguments.folder, arguments.out or cache_folder() / arguments.name):
        print(path)


def _data_features(arguments) -> None:
    from .rows import find_row
    from .stages import import_embeddings

    row = find_row(arguments.row)
    for path in import_embeddings(row, arguments.folder, _stages(row, arguments)):
        print(path)


def _data_fitted(arguments) -> None:
    from .rows import find_row
    from .stages import take_fit

    row = find_row(arguments.row)
    print(take_fit(row, _stages(row, arguments)))


def _prepare(arguments) -> None:
    """Set the threads and the allocator, and refuse a device that is not there."""
    import torch

    from .speed import device_of_process, tune_cpu

    arguments.device = device_of_process(arguments.device)
    check_device(arguments.device)
    tune_cpu()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def check_device(name: str, present=True) -> None:
    """Raise ValueError unless torch knows the device and, if it is to be `present`, can use it."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; use cpu, cuda or cuda:0")
    if not present:
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but torch finds no CUDA GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} asked for, but there are {torch.cuda.device_count()} GPUs, counted from 0")


def _train(arguments) -> None:
    from dataclasses import replace

    from .costs import expected_seconds
    from .experiments import BASELINES, run_row, train_row
    from .rows import find_row

    whole = find_row(arguments.row, arguments.dataset).configuration(arguments.seed)
    row = whole if arguments.steps is None else replace(whole, at_most=arguments.steps)
    _prepare(arguments)
    if arguments.checkpoint and arguments.checkpoint.is_dir():
        raise ValueError(f"{arguments.checkpoint} is a folder; --checkpoint is a file")
    if arguments.results and not arguments.record:
        raise ValueError("--results is the folder of the record; say --record, too")
    first = rank() == 0  # under torchrun one process tests
    if row.learner in BASELINES:
        raise ValueError(_tuned_and_tested(row))
    if arguments.steps is not None and arguments.steps > whole.budget(arguments.scale):
        more = next((scale for scale in SCALES if whole.budget(scale) >= arguments.steps), None)
        raise ValueError(f"--steps {arguments.steps}: at scale {arguments.scale} {row.slug} has "
                         f"{whole.budget(arguments.scale):,} steps" + (f"; take --scale {more}" if more else ""))
    seconds = expected_seconds(row, arguments.scale, arguments.device)
    if not arguments.checkpoint and (seconds or 0) > 600:
        print(f"without --checkpoint an interruption loses all of {_duration(seconds)}", file=sys.stderr)
    folder = results.own_folder(arguments.results)
    old = results.record_path(row.paper, row.slug, arguments.scale, arguments.seed, folder)
    if arguments.record and old.exists() and results.budget(results.read_record(old)) > row.budget(arguments.scale):
        raise ValueError(f"{old} is of more than {row.budget(arguments.scale):,} steps; move it away first")
    if arguments.record and first:
        record = run_row(row, arguments.scale, arguments.seed, arguments.device, folder=folder,
                         checkpoint=arguments.checkpoint, stages=_stages(row, arguments))  # fmt: skip
        _print_cells(record["cells"])
        seen = folder == results.results_folder(arguments.results)
        print(f"record: {old}" + ("" if seen else f"; umeta results {row.paper} --results {folder} shows it"))
        return
    learner, history = train_row(row, arguments.scale, arguments.seed, arguments.device, arguments.checkpoint,
                                 _stages(row, arguments))  # fmt: skip
    if first:
        steps = history.get("stopped", row.budget(arguments.scale))
        print(f"{row.slug}: {steps:,} steps in {history['seconds']:.0f} s")
        _print_tests(row, learner, arguments)


def _evaluate(arguments) -> None:
    from .experiments import BASELINES, trained
    from .rows import find_row

    row = find_row(arguments.row, arguments.dataset)
    _prepare(arguments)
    if row.learner in BASELINES:
        raise ValueError(_tuned_and_tested(row))
    learner, steps = trained(row, arguments.checkpoint, arguments.seed, arguments.device, arguments.scale,
                             _stages(row, arguments))  # fmt: skip
    print(f"{row.slug}: after {steps:,} steps")
    _print_tests(row, learner, arguments)


def _tuned_and_tested(row) -> str:
    base = row.slug.removesuffix(f"-{row.dataset.replace('_', '-')}")
    place = f"--rows {row.slug}" if row.slug == base else f"--rows {base} --dataset {row.dataset}"
    return f"{row.slug} trains nothing: umeta reproduce {row.paper} {place} tunes and tests it"


def _stages(row, arguments) -> Path:
    """Where `umeta reproduce` keeps embeddings and partitions."""
    return arguments.runs / row.paper / "stages"


def _print_tests(row, learner, arguments) -> None:
    from .experiments import measure

    stages = _stages(row, arguments)
    _print_cells(measure(row, learner, arguments.scale, arguments.seed, arguments.device, stages))


def _print_cells(cells: list[dict]) -> None:
    for cell in cells:
        task = f"{cell['way']}-way {cell['shot']}-shot"
        print(f"{task:14}  {cell['accuracy']:.2f} ± {cell['ci95']:.2f} %  ({cell['tasks']} tasks)", flush=True)


def _reproduce(arguments) -> None:
    from .rows import more_rows, select_rows

    rows = select_rows(arguments.paper, arguments.table, arguments.rows, arguments.dataset)
    if arguments.list:
        more = [] if arguments.rows else more_rows(arguments.paper, arguments.table, arguments.dataset)
        _print_list(rows, more, results.results_folder(arguments.results))
        return
    folder = results.results_folder(arguments.results).resolve()
    arguments.seeds = list(dict.fromkeys(arguments.seeds))
    check_device(arguments.device, present=not (arguments.dry_run or arguments.profile))
    shortened = _print_plan(arguments, rows, folder)
    if arguments.dry_run:
        return
    snakefile = _snakefile()
    results.check_writable(folder / arguments.paper)
    again = {results.record_path(row.paper, row.slug, arguments.scale, seed, folder)
             for row in rows for seed in arguments.seeds if arguments.force}  # fmt: skip
    for path in set((folder / arguments.paper).glob("*.json")) - again:
        results.read_record(path)  # a damaged one would hide the table at the end
    try:
        _snakemake(arguments, rows, folder, shortened, snakefile)
    finally:
        with contextlib.suppress(ValueError):  # no record of such a table yet: the error of the run is the one to see
            print(results.table_text(arguments.paper, arguments.table, arguments.dataset, True, folder))


def _get_data(rows, arguments) -> None:
    """Get the data before the runs, which work side by side; FileNotFoundError: it is missing and has to be brought."""
    from .data import find, locate
    from .stages import published_file

    for row in rows:
        stages = arguments.runs / row.paper / "stages"
        for split in ("train", *row.splits) if row.needs_embedding or row.trained else row.splits:
            brought = row.inputs == "embeddings" and published_file(row, split, stages).is_file()
            name = row.dataset.removesuffix("_identity")
            if not brought and name not in ("glyphs", "digits") and not locate(name, split):
                find(name, split)


def _print_list(rows, more, folder: Path) -> None:
    """What each row is, what the paper prints, what has been measured, and what it costs; then the embeddings.

    `more` rows follow, which run when they are asked for by name.
    """
    from .costs import embedding_seconds

    paper = rows[0].paper
    numbers, records = results.published(paper, folder), results.read_records(paper, folder)
    width = max(len(row.slug) for row in (*rows, *more))
    for row in (*rows, *more):
        if row in more[:1]:
            print("more rows, by name (--rows):")
        print(f"{row.slug:{width}}  {_row_line(row, numbers, [r for r in records if r['row'] == row.slug])}")
    embedded = [row for row in (*rows, *more) if row.needs_embedding]
    for row in {(row.fitted or row.embedding, row.dataset): row for row in embedded}.values():
        if row.plan.weights_of or not row.plan.epochs["full"]:
            continue  # a view of another fit, or no fit
        epochs, known = row.plan.epochs["full"], _duration(embedding_seconds(row, "full"))
        cost = f"{epochs} epochs, one thread {known}" if not row.plan.brought else "fitted by others"
        print(f"  embedding {row.fitted or row.embedding} of {row.dataset}: {cost}; shared by its rows")
    print("costs are full runs on a Zen 5, up to twice as long elsewhere, without the embedding and its partitions; "
          "GPU figures are planned, not measured")


def _row_line(row, numbers: list[dict], records: list[dict]) -> str:
    """What the list says of a row: table, published numbers, its records, time."""
    from .costs import expected_seconds

    mine = [n for n in numbers if (n["way"], n["shot"]) in row.tests and results.matches(n, vars(row))]
    cells = {(n["way"], n["shot"]): n["value"] for n in sorted(mine, key=lambda n: n["table"] == row.table)}
    printed = " / ".join(str(value) for value in cells.values()) or "not printed"
    runs = sorted(records, key=lambda r: (r["scale"], r["seed"]))
    state = ", ".join(_state(r, row.budget(r["scale"])) for r in runs) or "not run"
    core, gpu = (expected_seconds(row, "full", device) for device in ("cpu", "cuda"))
    cost = f"2 cores {_duration(core and TWO_CORES * core)}, one GPU {_duration(gpu)}"
    return f"table {row.table:6} paper {printed:30} {state}; {cost}"


def _state(record: dict, steps: int) -> str:
    """Scale and seed of a record, and how far it went if that is less than the row's steps."""
    ran = results.budget(record)
    return f"{record['scale']} seed {record['seed']}" + (f" ({ran:,} of {steps:,} steps)" if ran < steps else "")


def _print_plan(arguments, rows, folder: Path) -> list[Path]:
    """One line per run, one per stage that must be made first, and their time. Returns records that stopped early."""
    from .costs import expected_seconds, missing_stages
    from .experiments import training_file

    todo, stages, shortened, width = [], {}, [], max(len(row.slug) for row in rows)
    counted = set()  # trainings that rows before have done
    for row in rows:
        seconds = expected_seconds(row, arguments.scale, arguments.device, row.training_of not in counted)
        counted.add(row.training_of or row.slug)
        for seed in arguments.seeds:
            record = results.record_path(row.paper, row.slug, arguments.scale, seed, folder)
            there = record.exists() and not arguments.force
            ran = results.budget(results.read_record(record)) if there else 0
            steps = row.budget(arguments.scale)
            done = there and ran >= steps
            state = "done" if done else _duration(seconds)
            if not done:
                todo.append(seconds)
                made = arguments.runs / row.paper / "stages"
                stages |= missing_stages(row, arguments.scale, seed, arguments.device, made)
            if there and ran < steps:
                checkpoint = f"{row.slug}-{arguments.scale}-seed{seed}.pt"
                checkpoint = training_file(row, arguments.runs / row.paper / checkpoint)
                again = "goes on" if checkpoint.exists() else "again from the start"
                state += f", {again}: the record has {ran:,} steps"
                shortened.append(record)
            print(f"{row.slug:{width}}  {arguments.scale:6} seed {seed}  {steps:>7,} steps  {state}")
    for what, seconds in stages.values():
        print(f"  before: {what}: {_duration(seconds)}")
    times = [*todo, *(seconds for _, seconds in stages.values())]
    known = [seconds for seconds in times if seconds is not None]
    unknown = f", and {len(times) - len(known)} of unknown time" if len(known) < len(times) else ""
    runs = f"{len(todo)} of {len(rows) * len(arguments.seeds)} runs"
    first = f" and {len(stages)} {'stages' if len(stages) > 1 else 'stage'} before" if stages else ""
    print(f"{runs} to do on {arguments.device}{first}; one after another {_duration(sum(known))}{unknown}", flush=True)
    return shortened


def _duration(seconds) -> str:
    if not seconds:
        return "time unknown" if seconds is None else "nothing to wait for"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _snakefile() -> Path:
    """The engine's rules. ValueError or FileNotFoundError: what runs need is not installed."""
    missing = [name for name in ("snakemake", "papermill") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed; pip install -e '.[reproduce]' (Python 3.11 or newer)")
    snakefile = REPOSITORY / "workflow" / "Snakefile"
    if not snakefile.is_file():
        raise FileNotFoundError(f"{snakefile} not found; pip install -e '.[reproduce]' in a clone")
    return snakefile


def _snakemake(arguments, rows: list, folder: Path, again: list[Path], snakefile: Path) -> None:
    """Hand the plan to Snakemake, with `--runs` as its working directory; the records `again` are made anew.

    Raises ValueError when a run failed.
    """
    runs = arguments.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    slugs = ",".join(row.slug for row in rows)
    config = {"paper": arguments.paper, "rows": slugs, "scale": arguments.scale, "device": arguments.device,
              "seeds": ",".join(map(str, arguments.seeds)), "threads": arguments.threads or 1,
              "results": urllib.parse.quote(str(folder)),  # Snakemake reads values as YAML
              "table": arguments.table, "dataset": arguments.dataset, "restart": arguments.force or None,
              "again": ",".join(path.stem for path in again) or None}  # fmt: skip
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--directory", str(runs),
        "--cores", str(arguments.cores), "--resources", f"gpu={arguments.gpus}", "--rerun-triggers", "mtime",
        "--rerun-incomplete", "--keep-incomplete", "--nolock", "--keep-going", "--quiet", "rules", "--config",
        *(f"{key}={value}" for key, value in config.items() if value is not None),
    ]  # fmt: skip
    command += ["--profile", arguments.profile] if arguments.profile else []
    # the table always: an older one of other rows would hide that records are missing
    command += ["--forcerun", "table", *(["row"] if arguments.force else map(str, again))]
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for name in ("UMETA_DATA", "UMETA_CACHE"):  # the runs have another working directory
        environment |= {name: os.path.abspath(os.path.expanduser(environment[name]))} if environment.get(name) else {}
    with _only_one(runs) as lock:
        if not arguments.profile:
            _get_data(rows, arguments)
        if arguments.force:
            _forget_trainings(rows, arguments, runs)
        failed = _run_to_the_end(command, environment, lock, arguments.force)
    if failed:
        raise ValueError(f"a run failed (above); its notebook and checkpoint are in {runs / arguments.paper}. Once the "
                         f"cause is mended, {_same_command(arguments.force)}")


def _same_command(restart: bool) -> str:
    """What repeating a command does."""
    return "the same command " + ("starts all over; without --force, rows that have a record stay as they are"
                                  if restart else "goes on from the last checkpoints")  # fmt: skip


def _run_to_the_end(command: list[str], environment: dict, lock, restart: bool) -> int:
    """The exit code of a command. An interrupt, a SIGTERM or the end of the terminal ends all that it started.

    Snakemake alone would leave its jobs running, and the kernel of a notebook has a session of its own.
    """
    import psutil  # Snakemake needs it, too

    def stop(*_):
        raise KeyboardInterrupt

    ending = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]  # nohup
    before = {each: signal.signal(each, stop) for each in ending}
    process = subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()], start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        there = psutil.Process(process.pid)
        for each in (there, *there.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        print(f"what was running is stopped; {_same_command(restart)}", file=sys.stderr)
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _forget_trainings(rows: list, arguments, runs: Path) -> None:
    """Delete the checkpoints of the rows, with their snapshots: all before the first run, as rows share some."""
    from .experiments import training_file
    from .snapshots import clear, snapshots_of

    for row in rows:
        for seed in arguments.seeds:
            file = training_file(row, runs / row.paper / f"{row.slug}-{arguments.scale}-seed{seed}.pt")
            file.unlink(missing_ok=True)
            clear(snapshots_of(file))


@contextlib.contextmanager
def _only_one(runs: Path):
    """Yield a file whose lock keeps a second `umeta reproduce` out of the folder; ValueError if there is a first one.

    Snakemake's own lock outlives a killed process and then has to be removed by hand; this one goes with the process.
    """
    import fcntl

    with open(runs / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another umeta reproduce is at work in {runs}; wait for it, or use another --runs"
            raise ValueError(message) from None
        yield lock


def _results(arguments) -> None:
    if arguments.dataset is not None:
        from .data import known

        known(arguments.dataset.removesuffix("_identity"))
    if arguments.results is not None and not arguments.results.is_dir():
        raise FileNotFoundError(f"no folder {arguments.results}; --results is the folder of records")
    table = results.table_markdown if arguments.markdown else results.table_text
    print(table(arguments.paper, arguments.table, arguments.dataset, arguments.measured, arguments.results))
    if arguments.paper == "learned_rule":  # it has no rows, so that all of its numbers look as if they were not run
        print("The chapter on its tables sets what python -m umeta_core.rule_figures measures beside these numbers.")


def main(argv=None) -> int:
    """Run a command; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if os.environ.get("UMETA_DEBUG"):
            raise
        print(f"umeta: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("umeta: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
