import copy
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from umeta_core import training
from umeta_core.data import ImageSet
from umeta_core.episodes import PartitionTasks
from umeta_core.evaluation import evaluate
from umeta_core.maml import MAML
from umeta_core.networks import Conv4
from umeta_core.protonets import ProtoNet
from umeta_core.storage import alone
from umeta_core.training import NonFiniteLoss, read_checkpoint, train


def source(seed=0):
    """Twelve classes of noisy copies of a random pattern."""
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 180, (12, 1, 1, 16, 16), generator=g)
    images = patterns + torch.randint(0, 75, (12, 8, 1, 16, 16), generator=g)
    labels = torch.arange(12).repeat_interleave(8)
    return PartitionTasks(
        ImageSet(images.flatten(0, 1).byte(), labels, [str(i) for i in range(12)], [], "patterns", "train")
    )


def learner(kind="maml", seed=0, filters=4):
    g = torch.Generator().manual_seed(seed)
    if kind == "maml":
        return MAML(Conv4(1, 16, filters, way=3, norm="shift", generator=g), 0.1, inner_steps=1, test_steps=2)
    return ProtoNet(Conv4(1, 16, filters, generator=g))


TASK = {"tasks": 2, "way": 3, "shot": 1, "query": 2, "log_every": 5}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["maml", "protonets"])
def test_training_learns_and_same_seed_gives_same_numbers(kind):
    first, second = learner(kind), learner(kind)
    h1 = train(first, source(), steps=60, **TASK)
    h2 = train(second, source(), steps=60, **TASK)
    assert same(first, second) and h1["loss"] == h2["loss"]
    assert h1["step"] == list(range(5, 61, 5)) and h1["loss"][-1] < h1["loss"][0]
    other = learner(kind)
    train(other, source(), steps=60, **TASK, seed=1)
    assert not same(first, other)


def test_the_best_weights_are_kept_also_over_a_resume(tmp_path):
    values, seen = iter([1.0, 3.0, 2.0, 0.0]), []

    def validate(model):
        seen.append(copy.deepcopy(model.state_dict()))
        return next(values)

    more = dict(validate=validate, validate_every=2, keep_best=True, checkpoint=tmp_path / "r.pt")
    train(learner(), source(), steps=4, **more, **TASK)
    resumed = learner(seed=9)
    train(resumed, source(), steps=8, **more, **TASK)
    assert all(torch.equal(v, seen[1][k]) for k, v in resumed.state_dict().items())
    assert not torch.equal(seen[1]["network.weights.0"], seen[3]["network.weights.0"])


def test_training_stops_after_its_patience_and_a_resume_trains_no_further(tmp_path):
    values = iter([1.0, 2.0, 3.0, 2.5, 3.0, 9.0])
    more = dict(validate=lambda model: next(values), validate_every=2, keep_best=True, patience=2)
    first, again = learner(), learner(seed=9)
    history = train(first, source(), steps=100, checkpoint=tmp_path / "r.pt", **more, **TASK)
    assert history["stopped"] == 10 and [value for _, value in history["validation"]] == [1.0, 2.0, 3.0, 2.5, 3.0]
    assert train(again, source(), steps=100, checkpoint=tmp_path / "r.pt", **more, **TASK) == history
    assert same(first, again) and next(values) == 9.0, "neither run validated again"
    assert "stopped" not in train(learner(), source(), steps=4, **more | {"validate": lambda model: 0.0}, **TASK)


@pytest.mark.parametrize("kind", ["maml", "protonets"])
def test_interrupted_run_resumes_bit_identically(kind, tmp_path):
    whole, part = learner(kind), learner(kind)
    history = train(whole, source(), steps=23, **TASK)
    train(part, source(), steps=12, checkpoint=tmp_path / "run.pt", **TASK)
    resumed = learner(kind, seed=9)  # its weights must come from the file
    resumed_history = train(resumed, source(), steps=23, checkpoint=tmp_path / "run.pt", **TASK)
    assert same(whole, resumed)
    # the interrupted run also logged its last step, 12; from the next full interval on the numbers are the same
    at = [resumed_history["step"].index(s) for s in (5, 10, 20)]
    assert [resumed_history["loss"][i] for i in at] == [history["loss"][history["step"].index(s)] for s in (5, 10, 20)]


KILLED = """
import sys, torch
sys.path[:0] = {paths!r}
from test_training import TASK, learner, source
from umeta_core.training import train
class Slow:
    def __init__(self): self.inner = source()
    def sample(self, *a):
        import time; time.sleep(0.01); return self.inner.sample(*a)
train(learner(), Slow(), steps=int(sys.argv[2]), checkpoint=sys.argv[1], save_every=0.05, progress=False, **TASK)
"""


def test_a_killed_run_resumes_bit_identically(tmp_path):
    here = os.path.dirname(__file__)
    code = KILLED.format(paths=[here, os.path.dirname(here)])
    file, steps = tmp_path / "run.pt", 120
    process = subprocess.Popen([sys.executable, "-c", code, str(file), str(steps)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (file.exists() and read_checkpoint(file)["step"] >= 10):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_checkpoint(file)["step"]  # readable, whatever moment the kill came at
    assert 10 <= done < steps
    resumed, whole = learner(seed=5), learner()
    train(resumed, source(), steps=steps, checkpoint=file, **TASK)
    train(whole, source(), steps=steps, **TASK)
    assert same(resumed, whole)


def test_a_foreign_checkpoint_is_refused_and_kept(tmp_path):
    file = tmp_path / "run.pt"
    train(learner(), source(), steps=2, checkpoint=file, config={"network": "small"}, **TASK)
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"another run \(lr: 0.001 there, 0.01 here; network: 'small' there, 'large' here\)"
    ):
        train(learner(), source(), steps=4, checkpoint=file, config={"network": "large"}, lr=0.01, **TASK)
    with pytest.raises(ValueError, match="another network"):
        train(learner(filters=6), source(), steps=4, checkpoint=file, config={"network": "small"}, **TASK)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not a checkpoint", lambda b: b""])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    file = tmp_path / "run.pt"
    train(learner(), source(), steps=2, checkpoint=file, **TASK)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"run.pt is not a readable checkpoint; delete it"):
        train(learner(), source(), steps=4, checkpoint=file, **TASK)


@pytest.mark.parametrize("content", [{"step": 2}, [1]])
def test_a_file_of_something_else_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run.pt is not a readable checkpoint; delete it"):
        read_checkpoint(tmp_path / "run.pt")


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    file = tmp_path / "run.pt"
    train(learner(), source(), steps=5, checkpoint=file, **TASK)
    before = file.read_bytes()

    class Poisoned:
        def __init__(self):
            self.inner, self.calls = source(), 0

        def sample(self, *arguments):
            episodes = self.inner.sample(*arguments)
            self.calls += 1
            if self.calls == 3:
                episodes.query[0, 0, 0, 0, 0, 0] = float("nan")
            return episodes

    with pytest.raises(NonFiniteLoss, match=r"nan at step 7; the last checkpoint, .*run.pt, is from before"):
        train(learner(), Poisoned(), steps=50, checkpoint=file, save_every=1000, **TASK)
    assert file.read_bytes() == before


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    """The gradient can be NaN where the loss is finite."""

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    class Broken(type(learner())):
        def loss(self, episodes):
            losses, accuracies = super().loss(episodes)
            return Breaks.apply(losses), accuracies

    broken = learner()
    broken.__class__ = Broken
    with pytest.raises(NonFiniteLoss, match="a weight is not finite at step 1, though the loss is"):
        train(broken, source(), steps=1, checkpoint=tmp_path / "run.pt", **TASK)
    assert not (tmp_path / "run.pt").exists()


def test_a_checkpoint_beyond_the_steps_asked_for_is_refused(tmp_path):
    train(learner(), source(), steps=4, checkpoint=tmp_path / "run.pt", **TASK)
    with pytest.raises(ValueError, match="is at step 4, beyond the 2 asked for"):
        train(learner(), source(), steps=2, checkpoint=tmp_path / "run.pt", **TASK)


def test_the_history_names_every_process_that_trained(tmp_path):
    first = train(learner(), source(), steps=2, checkpoint=tmp_path / "r.pt", **TASK)["made_by"]
    second = train(learner(), source(), steps=4, checkpoint=tmp_path / "r.pt", **TASK)["made_by"]
    only_read = train(learner(), source(), steps=4, checkpoint=tmp_path / "r.pt", **TASK)["made_by"]
    assert len(first) == 1 and second[:1] == first and len(second) == 2 and only_read == second
    assert first[0].keys() == {"commit", "dirty", "versions", "device", "created"}


def test_snapshots_need_to_know_how_often(tmp_path):
    with pytest.raises(ValueError, match="snapshots come every `validate_every` steps; say how many"):
        train(learner(), source(), steps=1, snapshots=tmp_path, progress=False, **TASK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked, message", [
    ({"validate": lambda model: 0.0}, "every `validate_every` steps"), ({"keep_best": True}, "need `validate`"),
    ({"patience": 3, "validate_every": 2}, "need `validate`"),
])  # fmt: skip
def test_what_cannot_be_done_without_validations_is_not_ignored(asked, message):
    with pytest.raises(ValueError, match=message):
        train(learner(), source(), steps=1, progress=False, **asked, **TASK)


def test_a_folder_in_place_of_a_checkpoint_is_not_called_damaged(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_checkpoint(tmp_path)


def test_a_checkpoint_of_another_kind_of_device_is_named(tmp_path):
    """Its random numbers are other ones; a GPU's generator has 16 bytes of state."""
    file = tmp_path / "run.pt"
    trained = learner()
    train(trained, source(), steps=2, checkpoint=file, **TASK)
    torch.save(read_checkpoint(file) | {"generator": torch.zeros(16, dtype=torch.uint8)}, file)
    done = learner(seed=1)
    train(done, source(), steps=2, checkpoint=file, **TASK)  # nothing is left to draw
    assert all(torch.equal(a, b) for a, b in zip(done.parameters(), trained.parameters()))
    with pytest.raises(ValueError, match="another kind of device than cpu"):
        train(learner(), source(), steps=4, checkpoint=file, **TASK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["maml", "protonets"])
def test_a_run_on_a_gpu_resumes(kind, tmp_path):
    images = source().images
    tasks = PartitionTasks(images.to("cuda"))
    train(learner(kind).to("cuda"), tasks, steps=3, checkpoint=tmp_path / "run.pt", device="cuda", **TASK)
    resumed = learner(kind, seed=9).to("cuda")
    history = train(resumed, tasks, steps=7, checkpoint=tmp_path / "run.pt", device="cuda", **TASK)
    assert history["step"][-1] == 7


def test_clip_bounds_every_entry_of_the_gradient():
    clipped, free = learner(), learner()
    start = {k: v.clone() for k, v in clipped.state_dict().items()}
    train(clipped, source(), steps=1, clip=1e-12, **TASK)  # far below Adam's eps of 1e-8: hardly a step
    train(free, source(), steps=1, **TASK)
    moved = lambda m: max((v - start[k]).abs().max() for k, v in m.state_dict().items())  # noqa: E731
    assert moved(clipped) < 1e-5 < moved(free)


def test_validation_enters_the_history():
    h = train(
        learner(),
        source(),
        steps=6,
        validate=lambda m: evaluate(m, source(), way=3, shot=1, query=2, tasks=4).mean,
        validate_every=3,
        **TASK,
    )
    assert [s for s, _ in h["validation"]] == [3, 6] and all(0 <= v <= 100 for _, v in h["validation"])


TWO = """
import os, sys, torch
sys.path[:0] = {paths!r}
from test_training import TASK, learner, source
from umeta_core.training import train
torch.set_default_dtype(torch.float64)
class Double:
    def __init__(self): self.inner = source()
    def sample(self, *a):
        e = self.inner.sample(*a); e.support, e.query = e.support.double(), e.query.double(); return e
m = learner()
h = train(m, Double(), steps=3, checkpoint=sys.argv[1], **TASK)
p = learner("protonets")
train(p, Double(), steps=2, **TASK)
torch.save(list(p.buffers()), sys.argv[1] + ".rank" + os.environ.get("RANK", ""))
"""


def test_two_processes_equal_one(tmp_path):
    """Two gloo ranks, each with half of the tasks, make the same steps as one process with all of them."""
    here = os.path.dirname(__file__)
    script = tmp_path / "two.py"
    script.write_text(TWO.format(paths=[here, os.path.dirname(here)]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    subprocess.run([sys.executable, script, tmp_path / "one.pt"], check=True, env=environment, timeout=120)
    with socket.socket() as free:  # the variables that torchrun sets, without its agent
        free.bind(("127.0.0.1", 0))
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "two.pt"], env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(2)
    ]
    assert [r.wait(timeout=180) for r in ranks] == [0, 0]
    one, two = read_checkpoint(tmp_path / "one.pt"), read_checkpoint(tmp_path / "two.pt")
    assert one["step"] == two["step"] == 3
    for name, value in one["optimizer"]["state"].items():  # Adam's first moment: an average of the gradients
        torch.testing.assert_close(two["optimizer"]["state"][name]["exp_avg"], value["exp_avg"], rtol=1e-6, atol=1e-12)
    for name, value in one["learner"].items():
        torch.testing.assert_close(two["learner"][name], value, rtol=1e-6, atol=1e-9)
    averages = [torch.load(tmp_path / f"two.pt.rank{rank}") for rank in range(2)]  # of batch norm, each of its share
    torch.testing.assert_close(*averages, rtol=0, atol=0)
    torch.testing.assert_close(one["history"]["loss"], two["history"]["loss"], rtol=1e-6, atol=0)


def test_infinite_losses_that_are_answered_for_stop_nothing(monkeypatch):
    model = learner()
    usual = model.loss
    monkeypatch.setattr(model, "loss", lambda e: tuple(v * torch.inf for v in usual(e)))

    def prepare(mean):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    history = train(model, source(), steps=10, prepare=prepare, **TASK)
    assert history["skipped"] == 10 and set(history["loss"]) == set(history["accuracy"]) == {None}


def test_files_that_several_processes_make_are_made_one_at_a_time(tmp_path):
    code = """
import sys, time
from pathlib import Path
from umeta_core.storage import alone
path = Path(sys.argv[1])
with alone(path):
    if not path.exists():
        print("made", flush=True)
        path.touch()
"""
    path = tmp_path / "stage.pt"
    with alone(path):
        both = [subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
        assert all("waiting for another process" in process.stderr.readline() for process in both)
        assert not path.exists()
    assert sorted(process.communicate(timeout=60)[0] for process in both) == ["", "made\n"]


def test_a_finished_file_needs_no_lock(tmp_path):
    """As in a folder that cannot be written to: here a folder is in the lock's place."""
    for name in "ab":
        (tmp_path / f".{name}.pt.lock").mkdir()
    (tmp_path / "a.pt").touch()
    with alone(tmp_path / "a.pt"):
        pass
    with pytest.raises(IsADirectoryError), alone(tmp_path / "b.pt"):
        pass


def test_the_best_weights_are_given_only_where_they_were_asked_for_from_the_start(tmp_path):
    values = iter([3.0, 1.0, 2.0, 3.0, 1.0, 2.0])
    more = dict(validate=lambda model: next(values), validate_every=2, checkpoint=tmp_path / "r.pt", **TASK)
    train(learner(), source(), steps=4, keep_best=True, **more)
    on = learner()
    train(on, source(), steps=6, **more)
    last = read_checkpoint(tmp_path / "r.pt")["learner"]
    assert all(torch.equal(value, last[name]) for name, value in on.state_dict().items())
    (tmp_path / "r.pt").unlink()
    train(learner(), source(), steps=4, **more)
    with pytest.raises(ValueError, match="did not keep its best weights"):
        train(learner(), source(), steps=6, keep_best=True, **more)


def test_the_rate_may_depend_on_the_steps_done():
    """At a rate of 0 from the third step on nothing moves any more."""
    falling, longer, constant = learner(), learner(), learner()
    for model, steps, lr in ((falling, 2, lambda step: 1e-2 * (step < 2)), (longer, 5, lambda step: 1e-2 * (step < 2)),
                             (constant, 2, 1e-2)):  # fmt: skip
        train(model, source(), steps=steps, lr=lr, **TASK)
    assert same(falling, longer) and same(falling, constant)


def test_the_first_of_equals_is_the_best():
    seen = []
    model = learner()
    train(model, source(), steps=4, keep_best=True, validate_every=2, **TASK,
          validate=lambda m: seen.append(copy.deepcopy(m.state_dict())) or 1.0)  # fmt: skip
    assert all(torch.equal(v, seen[0][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrong", [{"tasks": 0}, {"log_every": 0}])
def test_numbers_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="both must be at least 1"):
        train(learner(), source(), steps=1, **(TASK | wrong))


def test_a_loss_of_the_history_is_the_mean_since_the_entry_before():
    each = train(learner(), source(), steps=6, progress=False, **TASK | {"log_every": 1})
    many = train(learner(), source(), steps=6, progress=False, **TASK | {"log_every": 3})
    for name in ("loss", "accuracy"):
        means = [sum(each[name][i : i + 3]) / 3 for i in (0, 3)]
        assert many[name] == pytest.approx(means, abs=1e-6) and many[name] != pytest.approx(each[name][2::3], abs=1e-6)


def test_the_seconds_of_a_run_are_those_of_all_its_steps(monkeypatch):
    now = iter(range(1000))  # a clock that ticks whenever it is looked at
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(now))
    assert train(learner(), source(), steps=4, progress=False, **TASK)["seconds"] == 4
