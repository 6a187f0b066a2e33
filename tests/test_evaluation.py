from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from test_training import source

from umeta_core.data import ImageSet
from umeta_core.episodes import Episodes, PartitionTasks
from umeta_core.evaluation import evaluate, evaluate_curve, evaluating, in_chunks, interval, sample_blocks
from umeta_core.maml import MAML
from umeta_core.networks import Conv4
from umeta_core.protonets import ProtoNet


class Guess:
    """Answers at random, and remembers what it was asked."""

    def __init__(self, seed=0):
        self.generator, self.seen = torch.Generator().manual_seed(seed), []

    def predict(self, episodes):
        self.seen.append(episodes.query)
        return torch.rand(
            len(episodes), episodes.query[0].flatten(0, 1).shape[0], episodes.way, generator=self.generator
        )


def test_guessing_is_at_chance_within_the_binomial_interval():
    result = evaluate(Guess(), source(), way=4, shot=1, query=5, tasks=400)
    assert len(result.accuracies) == 400
    assert abs(result.mean - 25) < 3 * result.ci95 / 1.96
    binomial = 196 * (0.25 * 0.75 / 20) ** 0.5 / 400**0.5
    assert abs(result.ci95 / binomial - 1) < 0.15


def test_interval_is_the_normal_interval_of_scipy():
    a = torch.rand(500, generator=torch.Generator().manual_seed(0))
    half = stats.norm.interval(0.95, scale=np.std(a.double().numpy()) / 500**0.5)[1]
    assert abs(interval(a) - 100 * half) < 1e-3


def test_tasks_do_not_depend_on_chunks_or_count():
    wide, narrow, more = Guess(), Guess(), Guess()
    evaluate(wide, source(), way=3, shot=1, query=2, tasks=30, seed=4)
    evaluate(narrow, source(), way=3, shot=1, query=2, tasks=30, seed=4, max_images=20)
    evaluate(more, source(), way=3, shot=1, query=2, tasks=50, seed=4)
    assert len(narrow.seen) > len(wide.seen)
    assert torch.equal(torch.cat(wide.seen), torch.cat(narrow.seen))
    assert torch.equal(torch.cat(wide.seen), torch.cat(more.seen)[:30])


def test_chunks_respect_the_bound_and_the_order():
    e = Episodes(torch.arange(7.0).view(7, 1, 1, 1, 1, 1), torch.rand(7, 1, 3, 1, 1, 1))
    sizes = []
    out = in_chunks(lambda c: sizes.append(len(c)) or c.support.view(len(c), 1, 1), e, max_images=8)
    assert sizes == [2, 2, 2, 1] and out.flatten().tolist() == list(range(7))


def test_curve_ends_where_evaluate_does():
    maml = MAML(Conv4(1, 16, 4, way=3, norm="shift", generator=torch.Generator().manual_seed(0)), 0.1, test_steps=4)
    task = {"way": 3, "shot": 1, "query": 2, "tasks": 25, "seed": 1}
    curve = evaluate_curve(maml, source(), [0, 2, 4], **task)
    assert torch.equal(curve[2].accuracies, evaluate(maml, source(), **task).accuracies)
    with pytest.raises(ValueError, match=r"steps \[4, 0\] are not ascending"):
        evaluate_curve(maml, source(), [4, 0], **task)


@pytest.mark.parametrize("none", ["tasks", "way", "shot", "query"])
def test_nothing_to_evaluate_is_refused(none):
    task = {"tasks": 20, "way": 3, "shot": 1, "query": 2} | {none: 0}
    with pytest.raises(ValueError, match="{tasks} tasks of {way} classes with {shot} . {query} images".format(**task)):
        evaluate(Guess(), source(), **task)


def test_a_module_is_tested_in_evaluation_mode_and_goes_back():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(256)

        def predict(self, episodes):
            return self.norm(episodes.flat()[2].flatten(0, 1).flatten(1))[:, :3].unflatten(0, (len(episodes), -1))

    learner = Normed()
    before = learner.norm.running_mean.clone()
    evaluate(learner, source(), way=3, shot=1, query=2, tasks=20)
    assert torch.equal(learner.norm.running_mean, before) and learner.training


def test_images_that_were_embedded_before_get_the_same_answers():
    """As tests do with the whole test set, where every image is in many tasks."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 28, 28), generator=g).byte()
    data = ImageSet(images, torch.arange(8).repeat_interleave(5), [str(i) for i in range(8)], [], "noise", "test")
    model = ProtoNet(Conv4(1, 28, 8, generator=g))
    model.loss(PartitionTasks(data).sample(4, 5, 1, 2, g))
    seen = PartitionTasks(data, features=model.embed(images, chunk=7))
    tested = SimpleNamespace(predict=model.predict_embedded)
    once, again = (evaluate(learner, source, way=5, shot=2, query=3, tasks=30)
                   for learner, source in ((tested, seen), (model, PartitionTasks(data))))  # fmt: skip
    assert torch.equal(once.accuracies, again.accuracies)
    assert not ProtoNet(Conv4(1, 28, 8), batch_norm="transductive").sees_one
    assert not ProtoNet(Conv4(1, 28, 8), apart=True).sees_one


def test_a_block_knows_the_number_of_its_first_task():
    """By which a learner that samples gives each task noise of its own."""
    assert [block.first for block in sample_blocks(source(), 50, 3, 1, 2, seed=0)] == [0, 20, 40]


def test_a_learner_that_diverges_is_no_learner_at_chance():
    """The largest of logits that are NaN is the first: accuracy would be exactly chance, without any spread."""
    learner = SimpleNamespace(predict=lambda e: torch.full((len(e), 9, 3), torch.nan))
    with pytest.raises(ArithmeticError, match="logits are NaN.*lower its inner rate"):
        evaluate(learner, source(), way=3, shot=1, query=3, tasks=4)


def test_evaluation_mode_ends_with_an_error():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError), evaluating(module):
        assert not module.training
        raise KeyError
    assert module.training
