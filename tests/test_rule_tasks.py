"""Truncations, their source, and the two learners of the rule."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from umeta_core.data import load
from umeta_core.learned_rule import UpdateRule, meta_objective
from umeta_core.rule_learners import PESLearner, RuleLearner
from umeta_core.rule_tasks import Bucket, Curriculum, RuleTasks, turned
from umeta_core.training import train

SHORT = Curriculum(unroll=((1, 2), (2, 3)), unroll_steps=4, length=(4.0, 6.0), length_steps=4)


@pytest.fixture(scope="module")
def glyphs():
    return load("glyphs", "val", size=8)


def source(glyphs, **options):
    buckets = [Bucket(glyphs, way=3, hidden=(6,)), Bucket(glyphs, way=4, hidden=(5, 4), turned=True)]
    return RuleTasks(buckets, SHORT, batch=6, draws=2, **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_buckets_take_turns_and_have_the_promised_shapes(glyphs):
    tasks, g = source(glyphs), generator()
    first, second = (tasks.sample(3, 0, 5, 0, g) for _ in range(2))
    unroll = first.x.shape[1]
    assert first.x.shape == (3, unroll, 6, 64) and unroll in (1, 2)
    assert first.labeled.shape == (3, 2, 2, 15, 64) and first.labels.shape == (3, 2, 2, 15) and first.extra is None
    assert [w.shape[1:] for w in first.phi.w] == [(64, 6), (6, 32)]
    assert second.classes == 4 and second.extra.shape == (3, 2, 2, 20, 4) and len(second.phi.w) == 3
    assert first.x.min() >= 0 and first.x.max() <= 1
    part = first[1:]
    assert len(part) == 2 and torch.equal(part.phi.w[0], first.phi.w[0][1:])


def test_networks_live_on_until_their_time_is_up(glyphs):
    tasks, g = RuleTasks([Bucket(glyphs, 3, (6,))], SHORT, batch=6, draws=1), generator()
    learner = RuleLearner(UpdateRule("small", lr=1e-2))
    ended, lived = 0, 0
    before = alive = None
    for _ in range(12):
        truncation = tasks.sample(4, 0, 5, 0, g)
        if before is not None:
            same = torch.stack([torch.equal(a, b) * torch.ones(()) for a, b in zip(truncation.phi.w[0], before)]).bool()
            assert torch.equal(same, alive)
            ended, lived = ended + int((~same).sum()), lived + int(same.sum())
        start = truncation.phi.w[0].clone()
        learner.loss(truncation)
        assert not torch.equal(start, truncation.phi.w[0])
        before, alive = truncation.phi.w[0].clone(), tasks.alive[0]["left"] > 0
    assert ended > 3 and lived > 3


def test_a_network_that_is_not_finite_is_replaced(glyphs):
    tasks, g = source(glyphs), generator()
    tasks.curriculum = replace(SHORT, length=(1e6, 1e6))
    tasks.sample(2, 0, 5, 0, g)
    tasks.alive[0]["phi"][0][1][0, 0, 0] = float("nan")
    kept = tasks.alive[0]["phi"][0][0][1].clone()
    tasks.sample(2, 0, 5, 0, g)
    again = tasks.sample(2, 0, 5, 0, g)
    assert again.phi.w[1].isfinite().all() and torch.equal(again.phi.w[0][1], kept)


def test_pixels_of_a_task_have_one_order(glyphs):
    """Without dropping and moving, a task's batches are the images under one fixed permutation."""
    bucket = Bucket(glyphs, way=3, hidden=(6,), drop=0.0, moved=0)
    tasks = RuleTasks([bucket], SHORT, batch=20, draws=1)
    truncation = tasks.sample(2, 0, 5, 0, generator())
    state, flat = tasks.alive[0], glyphs.images.flatten(1).float() / 255
    for t in range(2):
        wanted = flat[:, state["order"][t]]
        rows = truncation.x[t].flatten(0, 1)
        distance = torch.cdist(rows, wanted).min(1)
        assert distance.values.max() < 1e-2
        assert set(glyphs.labels[distance.indices].tolist()) <= set(state["classes"][t].tolist())
    assert not torch.equal(*state["order"])


def test_halves_of_a_draw_share_no_image(glyphs):
    bucket = Bucket(glyphs, way=3, hidden=(6,), drop=0.0, moved=0)
    truncation = RuleTasks([bucket], SHORT, batch=4, draws=3).sample(2, 0, 10, 0, generator())
    halves = truncation.labeled.flatten(0, 1)
    for a, b in halves:
        for c in range(3):
            rows = torch.cat([a[10 * c : 10 * c + 10], b[10 * c : 10 * c + 10]])
            assert torch.cdist(rows, rows).add(torch.eye(20)).min() > 1e-3


def test_turned_images_say_how():
    x = torch.zeros(200, 1, 15, 15)
    x[:, :, 7, 10] = 1  # a dot right of the center
    moved, how = turned(x, generator())
    assert how.shape == (200, 4) and torch.allclose(how[:, 0] ** 2 + how[:, 1] ** 2, torch.ones(200), atol=1e-5)
    inside = moved.flatten(1).sum(1) > 0.9
    grid = torch.arange(15.0)
    column, row = (moved.sum((1, 2)) * grid).sum(1), (moved.sum((1, 3)) * grid).sum(1)
    mass = moved.flatten(1).sum(1)
    sine, cosine, right, down = how[inside].T
    # The picture moves, and is then turned by -angle about the center.
    reach = 15 * 5 / 14
    shift_right, shift_down = right * reach, down * reach
    expected = torch.stack([7 + 3 * cosine, 7 - 3 * sine], 1)
    moved_by = torch.stack([cosine * shift_right + sine * shift_down, -sine * shift_right + cosine * shift_down], 1)
    found = torch.stack([column / mass, row / mass], 1)[inside]
    assert (found - expected - moved_by).abs().max() < 0.8 and inside.sum() > 30


def test_curriculum_grows_linearly():
    paper = Curriculum()
    assert paper.unroll_at(0) == (2, 4) and paper.unroll_at(50_000) == paper.unroll_at(10**6) == (8, 15)
    assert paper.unroll_at(25_000) == (5, 10) and paper.length_at(2_500) == pytest.approx(10_010)


def test_too_few_classes_or_images_are_named(glyphs):
    with pytest.raises(ValueError, match="a bucket asks for 200"):
        RuleTasks([Bucket(glyphs, way=200)], SHORT).sample(1, 0, 5, 0, generator())
    with pytest.raises(ValueError, match="classes of 22 images"):
        RuleTasks([Bucket(glyphs, way=3)], SHORT).sample(1, 0, 11, 0, generator())
    with pytest.raises(ValueError, match="at least one"):
        RuleTasks([])


def meta_train(glyphs, steps, learner=None, tasks=2, lr=1e-3, **options):
    learner = learner or RuleLearner(UpdateRule("small", lr=1e-2, generator=generator(3)))
    history = train(learner, source(glyphs, theta=getattr(learner, "size", 0)), steps=steps, tasks=tasks, way=0, shot=5,
                    query=0, lr=lr, seed=1, progress=False, prepare=learner.prepare_gradients, log_every=1,
                    **options)  # fmt: skip
    return learner, history


@pytest.mark.parametrize("kind", [RuleLearner, PESLearner])
def test_a_resumed_run_is_the_same_run(glyphs, tmp_path, kind):
    def fresh():
        return kind(UpdateRule("small", lr=1e-2, generator=generator(3)))

    whole, _ = meta_train(glyphs, 6, fresh())
    meta_train(glyphs, 3, fresh(), checkpoint=tmp_path / "ck.pt")
    rest, history = meta_train(glyphs, 6, fresh(), checkpoint=tmp_path / "ck.pt")
    assert history["step"] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(whole.rule.parameters(), rest.rule.parameters()):
        assert torch.equal(a, b)


def test_a_step_without_a_finite_gradient_is_skipped(glyphs):
    learner = RuleLearner(UpdateRule("small"))
    loss, _ = learner.loss(source(glyphs).sample(2, 0, 5, 0, generator()))
    loss.mean().backward()
    learner.rule.merge.grad[0] = float("inf")
    learner.prepare_gradients(loss.mean())
    assert all(p.grad is None for p in learner.parameters())


def test_the_norm_of_the_gradient_is_bounded(glyphs):
    learner = RuleLearner(UpdateRule("small"), clip=1e-3)
    loss, _ = learner.loss(source(glyphs).sample(2, 0, 5, 0, generator()))
    loss.mean().backward()
    learner.prepare_gradients(loss.mean())
    norm = torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_budget_leaves_tasks_out_but_never_all(glyphs):
    rule = UpdateRule("small", lr=1e-2)
    one, all_ = (source(glyphs).sample(3, 0, 5, 0, generator()) for _ in range(2))
    losses, _ = RuleLearner(rule, seconds=0.0).loss(one)
    complete, _ = RuleLearner(rule, seconds=1e6).loss(all_)
    together, _ = RuleLearner(rule).loss(source(glyphs).sample(3, 0, 5, 0, generator()))
    assert len(losses) == 1 and len(complete) == 3
    torch.testing.assert_close(complete, together, rtol=1e-3, atol=1e-4)
    learner, seen = RuleLearner(rule, seconds=0.0), []
    for _ in range(4):  # the next call begins where the time ran out
        seen.append(learner.loss(source(glyphs).sample(3, 0, 5, 0, generator()))[0])
    torch.testing.assert_close(torch.cat(seen), together[[0, 1, 2, 0]], rtol=1e-3, atol=1e-4)


def test_tasks_that_were_left_out_come_first_in_their_bucket_and_do_not_age(glyphs):
    tasks = source(glyphs)
    tasks.buckets, tasks.pools, tasks.alive = 2 * tasks.buckets[:1], 2 * tasks.pools[:1], [None, None]
    learner, first = RuleLearner(UpdateRule("small", lr=1e-2), seconds=0.0), {0: [], 1: []}
    for _ in range(4):  # two turns of each bucket
        truncation = tasks.sample(3, 0, 5, 0, generator())
        before, index = tasks.alive[truncation.bucket]["left"] + truncation.x.shape[1], truncation.bucket
        learner.loss(truncation)
        aged = (tasks.alive[index]["left"] < before).nonzero().flatten().tolist()
        assert len(aged) == 1
        first[index] += aged
    assert first == {0: [0, 1], 1: [0, 1]}


def test_processes_have_noise_of_their_own(monkeypatch):
    drawn = []
    for rank, seed in (("0", 0), ("1", 0), ("0", 1), ("0", 0)):
        monkeypatch.setenv("RANK", rank)
        drawn.append(torch.randn(5, generator=PESLearner(UpdateRule("small"), seed=seed)._noise()))
    assert torch.equal(drawn[0], drawn[3]) and len({tuple(d.tolist()) for d in drawn}) == 3


def test_one_of_several_processes_resumes_with_fresh_networks(glyphs, monkeypatch):
    tasks, resumed = source(glyphs), source(glyphs)
    tasks.sample(2, 0, 5, 0, generator())
    state = tasks.state_dict()
    resumed.load_state_dict(state)
    assert resumed.alive[0] is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    resumed.load_state_dict(state)
    assert resumed.alive == [None] * len(resumed.buckets) and resumed.steps == 1


def test_pes_on_a_fresh_pair_is_the_antithetic_estimate(glyphs):
    """And from the second truncation on it weighs with all noise since the pair began."""
    learner = PESLearner(UpdateRule("small", lr=1e-2), sigma=0.1)
    lasting = replace(SHORT, length=(1e6, 1e6))
    tasks = RuleTasks([Bucket(glyphs, 3, (6,))], lasting, batch=6, draws=1, theta=learner.size)
    g, params = generator(), [learner.rule.get_parameter(name) for name in learner.names]
    twin = PESLearner(learner.rule, sigma=0.1)
    total = torch.zeros(learner.size)
    for _ in range(2):
        truncation = tasks.sample(1, 0, 5, 0, g)
        before = [truncation.phi.map(torch.clone), type(truncation.phi)(*truncation.noise["below"]).map(torch.clone)]
        losses, _ = learner.loss(truncation)
        grads = torch.autograd.grad(losses.sum(), params)
        e = 0.1 * torch.randn(learner.size, generator=twin._noise())
        total += e
        values = []
        for sign, phi in zip((1, -1), before):
            with torch.no_grad():
                start = torch.nn.utils.parameters_to_vector(params)
                torch.nn.utils.vector_to_parameters(start + sign * e, params)
                end = learner.rule(phi, truncation.x)
                values.append(meta_objective(end, truncation.labeled, truncation.labels, 3).loss.item())
                torch.nn.utils.vector_to_parameters(start, params)
        expected = (values[0] - values[1]) / (2 * 0.1**2) * total
        torch.testing.assert_close(torch.cat([p.flatten() for p in grads]), expected, rtol=2e-3, atol=2e-3)
        assert losses.item() == pytest.approx(sum(values) / 2, rel=1e-4)


class Recorder(RuleLearner):
    """Keeps the gradients that Adam would see."""

    def __init__(self):
        # The budget makes it run tasks one by one: rounding in float32 then does not depend on who is with whom.
        super().__init__(UpdateRule("small", lr=1e-2, generator=generator(3)), seconds=1e9)
        self.seen = []

    def prepare_gradients(self, loss):
        self.seen.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))
        super().prepare_gradients(loss)


SCRIPT = """
import os, sys, torch
from tests.test_rule_tasks import Recorder, meta_train
from umeta_core.data import load
torch.set_num_threads(1)
seen = {}
for tasks in (2, 3):
    seen[tasks] = meta_train(load("glyphs", "val", size=8), 4, Recorder(), tasks=tasks, lr=0.0)[0].seen
if os.environ["RANK"] == "0":
    torch.save(seen, sys.argv[1])
"""


@pytest.fixture
def one_thread():
    """As the processes that are compared have; two threads add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_are_one(glyphs, tmp_path, one_thread):
    """Two gloo ranks, each with its own networks (2 and 1 of three), have the gradients of one process on all tasks."""
    (tmp_path / "run.py").write_text(SCRIPT)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, tmp_path / "run.py", tmp_path / "two.pt"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = torch.load(tmp_path / "two.pt", weights_only=True)
    for tasks, tolerance in ((2, 1e-6), (3, 1e-5)):  # of three, the sums of float32 are in another order
        one, _ = meta_train(glyphs, 4, Recorder(), tasks=tasks, lr=0.0)
        for a, b in zip(one.seen, saved[tasks]):
            assert (a - b).abs().max() < tolerance * a.abs().max()


def test_pixels_are_dropped_with_the_stated_probability(glyphs):
    """From all images of half of the tasks, and for each example of half of the tasks."""
    white = replace(glyphs, images=torch.full_like(glyphs.images, 255))
    tasks = RuleTasks([Bucket(white, way=3, hidden=(6,), drop=0.2, moved=0)], SHORT, batch=50, draws=1)
    truncation = tasks.sample(40, 0, 5, 0, generator())
    state = tasks.alive[0]
    expected = state["seen"].float().mean(1) * torch.where(state["drops"], 0.8, 1.0)
    torch.testing.assert_close((truncation.x > 0).float().mean((1, 2, 3)), expected, rtol=0, atol=0.05)
    assert 0.7 < expected.mean() < 0.9 and 5 < state["drops"].sum() < 35


def test_the_first_networks_differ_in_age(glyphs):
    """A life is normal with mean and deviation 1000, at least 1: 1083 on average, of which half is left."""
    tasks = RuleTasks([Bucket(glyphs, 3, (6,))], replace(SHORT, length=(1000.0, 1000.0)), batch=6, draws=1)
    tasks.sample(300, 0, 5, 0, generator())
    assert tasks.alive[0]["left"].mean().item() == pytest.approx(540, rel=0.2)


def test_networks_age_by_their_inner_steps(glyphs):
    curriculum = replace(SHORT, unroll=((3, 3), (3, 3)), length=(1e4, 1e4))
    tasks, g = RuleTasks([Bucket(glyphs, 3, (6,))], curriculum, batch=6, draws=1), generator()
    first, second = (tasks.sample(4, 0, 5, 0, g).left.clone() for _ in range(2))
    alive = first > 0
    assert alive.any()
    torch.testing.assert_close((first - second)[alive], torch.full((int(alive.sum()),), 3.0), rtol=0, atol=0.1)


def test_tasks_and_rule_start_from_the_settings_of_the_code(glyphs):
    """128 images and 5 labeled draws (App. H.2, code); what moves and drops pixels is not in the paper."""
    tasks, rule = RuleTasks([Bucket(glyphs)]), UpdateRule("small")
    assert (tasks.batch, tasks.draws) == (128, 5)
    assert (tasks.buckets[0].drop, tasks.buckets[0].moved, tasks.buckets[0].way) == (0.2, 2, 10)
    assert (rule.lr, rule.guard) == (3e-4, pytest.approx(1 / 7))
