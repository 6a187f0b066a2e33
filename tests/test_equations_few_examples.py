"""Chapter 2: its equations and its from-scratch code against the library, and the notation page against the code."""

import itertools
import re

import pytest
import torch
from scratch import ROOT, scratch_namespace

from umeta_core.data import ImageSet
from umeta_core.episodes import Episodes, PartitionTasks, sample_without_replacement
from umeta_core.evaluation import Evaluation, interval
from umeta_core.losses import accuracy
from umeta_core.plots import PALETTE
from umeta_core.protonets import prototypes, squared_distances
from umeta_core.results import VERDICTS


@pytest.fixture(scope="module")
def chapter():
    return scratch_namespace("book/02_few_examples.md")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def numbered():
    """Twelve classes of twenty one-pixel images that hold their own number."""
    numbers = torch.arange(240)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(images, numbers // 20, [str(c) for c in range(12)], [], "numbered", "train")


@pytest.fixture
def episodes(generator):
    shape = (6, 5, 3, 1, 4, 4), (6, 5, 4, 1, 4, 4)
    return Episodes(*(torch.rand(s, generator=generator) for s in shape))


def numbers_of(x):
    return (255 * x).round().long().flatten(2)


def test_eq_ci(chapter, generator):
    a = torch.rand(137, generator=generator)
    mean = sum(a.tolist()) / 137
    sigma = (sum((x - mean) ** 2 for x in a.tolist()) / 137) ** 0.5
    assert interval(a) == pytest.approx(100 * 1.96 * sigma / 137**0.5, rel=1e-5)
    assert Evaluation(a).ci95 == interval(a)
    assert chapter["half_width"](a).item() == pytest.approx(interval(a), rel=1e-4)


def test_eq_accuracy(chapter, generator):
    logits = torch.randn(7, 20, 5, generator=generator)
    truth = torch.arange(5).repeat_interleave(4).expand(7, -1)
    literal = [
        sum(max(range(5), key=lambda n: logits[t, i, n]) == truth[t, i] for i in range(20)) / 20 for t in range(7)
    ]
    assert torch.allclose(accuracy(logits, truth), torch.tensor(literal))
    by_hand = [chapter["task_accuracy"](predicted, 5, 4) for predicted in logits.argmax(2)]
    assert torch.equal(accuracy(logits, truth), torch.stack(by_hand))


@pytest.mark.parametrize(("m", "r"), [(6, 3), (20, 20), (1000, 7), (1, 1)])
def test_eq_floyd(chapter, m, r):
    """With the library's own draws, the equation chooses the same numbers; the library then shuffles them."""
    chosen = sample_without_replacement(torch.full((300,), m), r, torch.Generator().manual_seed(3))
    uniform = torch.rand(300, r, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draws = (uniform * torch.arange(m - r + 1, m + 1)).long()
    literal = torch.tensor([chapter["floyd"](m, row) for row in draws.tolist()])
    assert torch.equal(chosen.sort(1).values, literal.sort(1).values)


def test_floyd_gives_every_set_equally_often(chapter):
    outcomes = itertools.product(range(4), range(5), range(6))
    sets = [frozenset(chapter["floyd"](6, draws)) for draws in outcomes]
    assert {sets.count(frozenset(each)) for each in itertools.combinations(range(6), 3)} == {6}


def test_the_written_out_sampler_draws_like_the_library(chapter, numbered, generator):
    one_by_one = [
        torch.cat(chapter["sample_episode"](numbered.images, numbered.labels, 5, 2, 3, generator), 1)
        for _ in range(1000)
    ]
    batch = PartitionTasks(numbered).sample(1000, 5, 2, 3, generator)
    frequencies = []
    for x in (torch.stack(one_by_one), torch.cat([batch.support, batch.query], 2)):
        numbers = numbers_of(x)
        assert numbers.shape == (1000, 5, 5)
        assert (numbers // 20 == numbers[:, :, :1] // 20).all()
        assert (numbers.flatten(1).sort(1).values.diff(dim=1) > 0).all()
        frequencies.append((numbers // 20).flatten().bincount(minlength=12) / numbers.numel())
    assert (frequencies[0] - frequencies[1]).abs().max() < 0.01


def test_classifiers_on_pixels(chapter, episodes):
    for one, batch in (("nearest_neighbor", "neighbor_logits"), ("nearest_mean", "mean_logits")):
        loop = [chapter[one](s, q) for s, q in zip(episodes.support, episodes.query, strict=True)]
        assert torch.equal(torch.stack(loop), chapter[batch](episodes).argmax(2))
    support, query = chapter["pixels"](episodes)
    assert torch.allclose(chapter["mean_logits"](episodes), -squared_distances(query, prototypes(support)), atol=1e-5)


def test_shuffled_support_keeps_the_images(chapter, episodes, generator):
    shuffled = chapter["shuffled_support"](episodes, generator)
    assert shuffled.shape == episodes.support.shape and not torch.equal(shuffled, episodes.support)
    for before, after in zip(episodes.support, shuffled, strict=True):
        assert sorted(before.flatten(2).sum(2).flatten().tolist()) == sorted(after.flatten(2).sum(2).flatten().tolist())


def test_only_the_transductive_classifiers_change_their_answers(chapter, episodes):
    change = chapter["answers_that_change"]
    assert change(chapter["mean_logits"], episodes) == 0
    assert change(chapter["neighbor_logits"], episodes) == 0
    assert change(chapter["centered_logits"], episodes) > 0
    for name in ("soft_kmeans_logits", "balanced_logits"):
        assert change(lambda e, name=name: chapter[name](e, softness=0.5), episodes) > 0


def test_balanced_logits_are_balanced(chapter, episodes):
    share = chapter["balanced_logits"](episodes, softness=1.0).softmax(2)
    assert torch.allclose(share.sum(1), torch.full((6, 5), 4.0), atol=0.05)


def test_notation_names_the_verdicts_and_colors():
    page = (ROOT / "book" / "01_notation.md").read_text()
    assert all(f"\n| {verdict} |" in page for verdict in VERDICTS)
    colors = dict(re.findall(r"(\w+) `(#\w{6})`", page))
    assert colors == PALETTE
