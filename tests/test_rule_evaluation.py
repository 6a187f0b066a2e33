"""Trials, the rivals of the learned rule, and the records of its figures."""

import json
import sys

import numpy as np
import pytest
import torch

from umeta_core import rule_baselines, rule_figures, rule_runs
from umeta_core.data import load
from umeta_core.episodes import PartitionTasks
from umeta_core.learned_rule import UpdateRule, initial_phi, meta_objective, run_network
from umeta_core.rule_baselines import (
    ProtoMLP,
    ShuffledTasks,
    log_likelihood,
    supervised_accuracy,
    vae_path,
)
from umeta_core.rule_evaluation import (
    explained_variance,
    pca_accuracy,
    pixel_accuracy,
    rule_curve,
    rule_path,
    trial,
)
from umeta_core.rule_tasks import Curriculum


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load("digits", "all")


@pytest.fixture(scope="module")
def task(digits):
    return trial(digits, networks=2, hidden=(16,), draws=3, seed=1)


def test_a_trial_is_reproducible_and_judges_with_other_images(digits):
    train, test = load("digits", "train"), load("digits", "test")
    one, two = (trial(train, test, networks=2, draws=2, seed=3) for _ in range(2))
    assert torch.equal(one.x, two.x) and torch.equal(one.phi.w[0], two.phi.w[0])
    known = test.images.flatten(1).float() / 255
    for t in range(2):
        back = one.state["order"][t].argsort()
        assert torch.cdist(one.x[t].flatten(0, 2)[:, back], known).min(1).values.max() < 1e-2
    with pytest.raises(ValueError, match="a bucket asks for 11"):
        trial(test, way=11)


def test_a_curve_begins_with_the_random_network_and_is_the_steps(task):
    rule = UpdateRule("small", lr=0.1)
    curve = rule_curve(rule, task, (0, 2), batch=8)
    assert torch.equal(curve[0], meta_objective(task.phi, task.x, task.labels, task.bucket.way).accuracy)
    assert curve.shape == (2, 2) and (curve > 1 / task.bucket.way).all()
    g, phi = generator(task.seed + 1), task.phi
    for _ in range(2):
        phi = rule.step(phi, task.batch(8, g))
    (_, first), (end, second) = rule_path(rule, task, (0, 2), batch=8)
    assert torch.equal(end.w[0], phi.w[0]) and torch.equal(torch.stack([first, second]), curve)


def test_controls_do_not_depend_on_the_order_of_the_pixels(digits):
    both = [trial(digits, networks=2, draws=3, seed=1, shuffle=s) for s in (True, False)]
    for control in (pixel_accuracy, pca_accuracy):
        a, b = (control(each) for each in both)
        assert (a - b).abs().max() < 1e-3 and a.min() > 0.6


def test_pca_is_scikit_learns(task):
    from sklearn.decomposition import PCA

    x = task.batch(1000, generator(task.seed + 1))[0].double().numpy()
    pca = PCA(8, svd_solver="full").fit(x)
    features = pca.transform(task.x[0].flatten(0, 2).double().numpy())
    expected = task.readout(torch.as_tensor(features).float().view(1, *task.x.shape[1:-1], 8))[0]
    assert pca_accuracy(task, components=8)[0] == pytest.approx(expected.item(), abs=0.02)


def test_supervised_learns_the_labels(task):
    accuracy = supervised_accuracy(task, steps=60)
    assert accuracy.shape == (2,) and accuracy.min() > 0.6
    assert accuracy.max() < 1  # on the other half


def test_bins_of_gray_levels_have_mass_one():
    levels = torch.arange(256) / 255
    for mean, std in ((0.3, 0.2), (0.0, 0.05), (1.2, 1.0)):
        mass = log_likelihood(levels, torch.full((256,), mean), torch.full((256,), std).log()).exp()
        assert mass.sum() == pytest.approx(1, abs=2e-3)


def test_a_vae_lowers_its_loss(task):
    (first, _), (second, accuracy) = vae_path(task, (1, 60), width=32, lr=1e-2, batch=32)
    assert (second < first).all() and accuracy.min() > 0.2


def test_shuffled_tasks_have_one_order_per_task():
    source = PartitionTasks(load("glyphs", "val", size=8))
    plain, shuffled = source.sample(3, 4, 2, 3, generator()), ShuffledTasks(source).sample(3, 4, 2, 3, generator())
    for a, b in ((plain.support, shuffled.support), (plain.query, shuffled.query)):
        assert a.shape == b.shape and not torch.equal(a, b)
        assert torch.equal(a.flatten(3).sort(-1).values, b.flatten(3).sort(-1).values)
    # distances between the images of a task stay what they are
    torch.testing.assert_close(torch.cdist(plain.support.flatten(3), plain.query.flatten(3)),
                               torch.cdist(shuffled.support.flatten(3), shuffled.query.flatten(3)))  # fmt: skip


def test_the_prototypical_network_learns():
    from umeta_core.training import train

    source = PartitionTasks(load("glyphs", "train", size=8))
    learner = ProtoMLP(64, width=64)
    history = train(learner, source, steps=60, tasks=4, way=5, shot=5, query=5, lr=3e-3, progress=False, log_every=10)
    assert history["accuracy"][-1] > history["accuracy"][0] + 0.03


def test_explained_variance_is_scikit_learns():
    from sklearn.decomposition import PCA

    phi = initial_phi(1, (10, 16, 32), generator())
    x = torch.rand(1, 200, 10, generator=generator(1))
    found = explained_variance(phi, x)[0]
    u = run_network(phi, x)[0][-1][0].double()
    expected = PCA(32).fit(u.numpy()).explained_variance_ratio_.cumsum()
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_a_figure_is_a_record_with_its_theta(tmp_path, monkeypatch):
    rule = UpdateRule("small", lr=1e-3)
    rule.save(tmp_path / "000003.pt", plan="cpu", seed=4, steps=3)
    monkeypatch.setattr(rule_figures, "STEPS", (0, 1, 2, 3, 4))
    monkeypatch.setitem(rule_figures.FIGURES, "datasets", lambda theta: rule_figures.datasets(
        theta, ("digits, 8x8", "IMDB, 1000 words"), networks=2, vae_steps=(1, 2)))  # fmt: skip
    monkeypatch.setenv("UMETA_DATA", str(tmp_path))
    monkeypatch.setenv("UMETA_CACHE", str(tmp_path / "cache"))
    argv = ["x", "datasets", "--theta", str(tmp_path / "000003.pt"), "--folder", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    rule_figures.main()
    record = json.loads((tmp_path / "out" / "datasets-cpu-3-seed4.json").read_text())
    assert record["theta"]["steps"] == 3 and "not found" in record["data"]["IMDB, 1000 words"]["missing"]
    done = record["data"]["digits, 8x8"]
    assert np.shape(done["rule"]) == (5, 2) and done["random network"] == done["rule"][0]
    assert {"PCA", "pixels", "supervised", "VAE", "theta at its start"} <= set(done) and record["commit"]


def test_variance_of_both_estimators(monkeypatch):
    """Of gradients that are known: mean 3 or 0 in each of 50 numbers, variance 1."""
    for mean, expected in ((3.0, 1 / 9), (0.0, None)):
        noise = generator(7)
        monkeypatch.setattr(rule_figures, "_gradient", lambda *_: mean + torch.randn(50, generator=noise))  # noqa: B023
        done = rule_figures.variance(UpdateRule("small", lr=1e-3), unrolls=(1,), samples=200)
        for v in (*done["backpropagation"], *done["evolution"]):
            assert v["variance"] == pytest.approx(50, rel=0.05)
            assert v["relative"] == (None if expected is None else pytest.approx(expected, rel=0.05))


def test_a_gradient_is_that_of_a_truncation():
    found = rule_figures.variance(UpdateRule("small", lr=1e-3), unrolls=(1,), samples=3)
    assert all(v["variance"] > 0 for kind in ("backpropagation", "evolution") for v in found[kind])


def test_judging_on_other_classes_is_refused(digits):
    with pytest.raises(ValueError, match="other classes"):
        trial(load("glyphs", "train", size=8), digits, networks=1)


def test_the_pretrained_rule_improves_a_network_on_data_it_never_saw(digits):
    """The headline at the smallest scale: unseen data set, unseen orders of pixels, no labels."""
    rule = UpdateRule.pretrained()
    assert rule.about["steps"] > 1000 and rule.about["commit"]
    before, after = rule_curve(rule, trial(digits, networks=4, draws=5, seed=2), (0, 100)).mean(1)
    assert after > before + 0.1


def test_a_run_leaves_its_last_theta_whatever_every_says(tmp_path, monkeypatch):
    argv = ["x", "book", "--steps", "1", "--checkpoint", str(tmp_path / "c.pt"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    rule_runs.main()
    theta = UpdateRule.restore(tmp_path / "out" / "000001.pt")
    assert (theta.about["plan"], theta.about["steps"]) == ("book", 1)


def test_rates_of_a_plan_fall_where_it_says():
    rate = rule_runs.PLANS["paper"].rate
    assert [rate(step) for step in (0, 99_999, 100_000, 150_000)] == [3e-4, 3e-4, 1e-4, 2e-5]


def test_the_divergence_of_the_vae_is_never_negative(task, monkeypatch):
    """Without pixels to explain it is all of the loss, and goes to 0."""
    monkeypatch.setattr(rule_baselines, "log_likelihood", lambda x, mean, log_std: 0 * mean)
    (first, _), (last, _) = vae_path(task, (1, 150), width=32, lr=1e-2, batch=32)
    assert (last > 0).all() and (last < 0.1 * first).all()


def test_the_rule_is_shown_other_images_than_it_is_judged_on():
    train, test = load("digits", "train"), load("digits", "test")
    shown = trial(train, test, networks=1, draws=1, shuffle=False).batch(200, generator())[0]
    assert torch.cdist(shown, train.images.flatten(1).float() / 255).amin(1).max() < 1e-2


def test_the_paper_s_plan_has_the_numbers_of_its_appendices():
    p = rule_runs.PLANS["paper"]
    assert (p.size, p.lr, p.tasks, p.batch, p.draws, p.steps) == ("full", 3e-4, 256, 128, 5, 200_000)
    assert p.rates == ((0, 3e-4), (100_000, 1e-4), (150_000, 2e-5)) and p.curriculum == Curriculum()


def test_a_run_has_the_rule_the_tasks_and_the_seed_of_its_plan(monkeypatch):
    asked, p = [], rule_runs.PLANS["book"]
    monkeypatch.setattr(rule_runs, "train", lambda learner, source, **how: asked.append((learner, source, how)) or {})
    rules = [rule_runs.meta_train("book", seed)[0] for seed in (0, 3)]
    learner, source, how = asked[1]
    assert (source.batch, source.draws, source.curriculum) == (p.batch, p.draws, p.curriculum)
    assert (learner.rule.lr, learner.clip) == (p.lr, 5.0) and source.buckets[0].images.split == "train"
    assert (how["steps"], how["tasks"], how["shot"], how["seed"]) == (p.steps, p.tasks, 10, 3)
    first, other = (next(w for w in rule.parameters() if w.dim() > 1) for rule in rules)
    assert not torch.equal(first, other)


def test_a_run_is_judged_on_characters_that_it_does_not_see(tmp_path, monkeypatch):
    argv = ["x", "book", "--checkpoint", str(tmp_path / "c.pt"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    seen = []
    monkeypatch.setattr(rule_runs, "trial", lambda images, **_: seen.append(images.class_names) or {}["stop"])
    with pytest.raises(KeyError):
        rule_runs.main()
    assert seen == [load("glyphs", "val").class_names]
