import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from umeta_core.baselines import (
    ClusterMatching,
    LinearClassifier,
    MLPClassifier,
    NearestMean,
    NearestNeighbors,
    Ridge,
    tune,
)
from umeta_core.episodes import Episodes

SHAPES = [(5, 1), (5, 5), (20, 1), (10, 3), (2, 5)]


def episodes(way=5, shot=1, query=5, tasks=6, d=24, seed=0, scale=1.0, shift=0.0, spread=1.5):
    """Embeddings around one center per class, close enough for plenty of mistakes."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(tasks, way, 1, d, generator=g)
    draw = lambda n: shift + scale * (centers + spread * torch.randn(tasks, way, n, d, generator=g))  # noqa: E731
    return Episodes(draw(shot), draw(query))


def each_task(e):
    for xs, ys, xq, _ in zip(*e.flat()):
        yield xs.double().numpy(), ys.numpy(), xq.double().numpy()


def fitted(e, make):
    """scikit-learn's predictions ``[T, N*Q]``, one fit per task."""
    return torch.stack([torch.from_numpy(make().fit(xs, ys).predict(xq)) for xs, ys, xq in each_task(e)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("way, shot", SHAPES)
@pytest.mark.parametrize("neighbors", [1, 2])
def test_nearest_neighbors_equal_scikit_learn_vote_ties_included(way, shot, neighbors):
    from sklearn.neighbors import KNeighborsClassifier

    e = episodes(way, shot, shift=30.0)  # far from the origin: float32 distances must survive it
    assert torch.equal(
        NearestNeighbors(neighbors).predict(e).argmax(2), fitted(e, lambda: KNeighborsClassifier(neighbors))
    )


def test_more_neighbors_vote_and_equal_votes_go_to_the_lowest_label():
    from sklearn.neighbors import KNeighborsClassifier

    e = episodes(5, 5, tasks=20)
    votes = NearestNeighbors(7).predict(e)
    assert (votes.sum(2) == 7).all()
    assert torch.equal(votes.argmax(2), fitted(e, lambda: KNeighborsClassifier(7)))
    top = votes.sort(2, descending=True).values
    assert (top[..., 0] == top[..., 1]).any()  # there were ties to break


@pytest.mark.parametrize("way, shot", SHAPES)
def test_nearest_mean_equals_nearest_centroid(way, shot):
    from sklearn.neighbors import NearestCentroid

    e = episodes(way, shot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scikit-learn's variance of a single image
        assert torch.equal(NearestMean().predict(e).argmax(2), fitted(e, NearestCentroid))


@pytest.mark.parametrize("way, shot", SHAPES)
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_ridge_equals_ridge_classifier(way, shot, strength):
    from sklearn.linear_model import RidgeClassifier

    e = episodes(way, shot, shift=2.0)
    scores = Ridge(strength).predict(e)
    assert torch.equal(scores.argmax(2), fitted(e, lambda: RidgeClassifier(alpha=strength)))
    xs, ys, xq = next(each_task(e))
    want = torch.from_numpy(RidgeClassifier(alpha=strength).fit(xs, ys).decision_function(xq))
    if way == 2:  # one column of targets -1, 1
        want = torch.stack([-want, want], 1)
    torch.testing.assert_close(2 * scores[0].double() - 1, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way, shot", SHAPES)
@pytest.mark.parametrize("c, scale", [(0.01, 1.0), (1.0, 1.0), (10.0, 0.1), (1.0, 3.0)])
def test_linear_classifier_is_the_optimum_that_scikit_learn_finds(way, shot, c, scale):
    from sklearn.linear_model import LogisticRegression

    e = episodes(way, shot, tasks=3, scale=scale, shift=1.0)
    # for two classes scikit-learn fits one weight vector, whose decay counts half as much
    make = lambda: LogisticRegression(C=c if way > 2 else 2 * c, tol=1e-10, max_iter=20_000)  # noqa: E731
    logits = LinearClassifier(c).predict(e)
    for found, (xs, ys, xq) in zip(logits, each_task(e)):
        want = torch.from_numpy(make().fit(xs, ys).predict_proba(xq))
        torch.testing.assert_close(found.double().softmax(1), want, rtol=0, atol=2e-4)
        assert torch.equal(found.argmax(1), want.argmax(1))


def test_standardized_linear_classifier_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    e = episodes(5, 3, tasks=3, shift=1.0)
    e = Episodes(e.support * torch.logspace(-1, 1, e.support.shape[3]), e.query)
    e.support[..., 2] = 0.3  # a feature that never changes, as those that a ReLU has switched off
    seen = torch.cat([e.flat()[0].flatten(0, 1), torch.zeros(5, e.support.shape[3]) + 0.3])  # what sets the scale
    deviation = seen.std(0, correction=0)
    deviation[2] = 1.0
    seen[:, 2] = 0.3
    plain, logits = (LinearClassifier(deviation=d).predict(e) for d in (None, deviation))
    scaler = StandardScaler().fit(seen)
    for found, (xs, ys, xq) in zip(logits, each_task(e)):
        fitted = LogisticRegression(tol=1e-10, max_iter=20_000).fit(scaler.transform(xs), ys)
        want = torch.from_numpy(fitted.predict_proba(scaler.transform(xq)))
        torch.testing.assert_close(found.double().softmax(1), want, rtol=0, atol=2e-4)
    assert (plain.softmax(2) - logits.softmax(2)).abs().max() > 0.1


def test_linear_classifier_has_no_gradient_left():
    e = episodes(5, 5, tasks=4)
    learner = LinearClassifier(c=2.0, tolerance=1e-8)
    xs, ys, _, _ = e.flat()
    xs = xs.double()
    probe = torch.cat([torch.zeros_like(xs[:, :1]), torch.eye(xs.shape[2]).double().expand(4, -1, -1)], 1)
    b, unit = learner.predict(Episodes(xs.unflatten(1, (5, 5)), probe.unflatten(1, (5, 5)))).split([1, 24], 1)
    w = (unit - b).requires_grad_()
    b = b.clone().requires_grad_()
    losses = F.cross_entropy((xs @ w + b).flatten(0, 1), ys.flatten(), reduction="sum")
    (2.0 * losses + w.square().sum() / 2).backward()
    assert w.grad.abs().max() < 1e-7 and b.grad.abs().max() < 1e-7


def test_linear_classifier_solves_each_task_as_if_it_were_alone(monkeypatch):
    e = episodes(5, 5, tasks=5)
    together = LinearClassifier().predict(e)
    alone = torch.cat([LinearClassifier().predict(e[t : t + 1]) for t in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)
    monkeypatch.setattr("umeta_core.baselines.GROUP", 2 * 25**2)
    torch.testing.assert_close(LinearClassifier().predict(e), alone, rtol=0, atol=2e-3)


def test_a_collapsed_embedding_leaves_chance_not_nan():
    e = Episodes(torch.ones(2, 5, 3, 8), torch.ones(2, 5, 4, 8))
    for learner in (LinearClassifier(), Ridge(), NearestMean(), NearestNeighbors(3)):
        assert learner.predict(e).isfinite().all()
    assert not LinearClassifier().predict(e).any()


def test_linear_classifier_warns_when_it_gives_up():
    with pytest.warns(UserWarning, match="c=1.0: the weights of 6 of 6 tasks may be off .* 3 steps"):
        LinearClassifier(steps=3).predict(episodes())


def torch_mlp(weights, t):
    w1, b1, w2, b2 = (w[t].detach() for w in weights)
    net = nn.Sequential(nn.Linear(*w1.shape), nn.ReLU(), nn.Linear(*w2.shape))
    for layer, w, b in ((net[0], w1, b1), (net[2], w2, b2)):
        layer.weight.data, layer.bias.data = w.T.clone(), b[0].clone()
    return net


def trained_alone(e, learner, weights, t):
    """Query logits after every epoch of a plain training loop of task t."""
    xs, ys, xq, _ = (x[t] for x in e.flat())
    net, curve = torch_mlp(weights, t), []
    adam = torch.optim.Adam(net.parameters(), learner.learning_rate, eps=1e-7)
    for _ in range(learner.epochs):
        adam.zero_grad()
        F.cross_entropy(net(xs), ys).backward()
        adam.step()
        curve.append(net(xq).detach())
    return curve


@pytest.mark.parametrize("epochs", [1, 40])
def test_mlp_trains_every_task_as_if_it_were_alone(epochs):
    e = episodes(5, 3, tasks=3)
    settings = {"hidden": 16, "dropout": 0.0, "epochs": epochs, "learning_rate": 0.01}
    logits = MLPClassifier(generator=generator(), **settings).predict(e)
    twin = MLPClassifier(generator=generator(), **settings)
    weights = twin.initial(3, 24, 5, e.support)
    for t in range(3):
        torch.testing.assert_close(logits[t], trained_alone(e, twin, weights, t)[-1], rtol=1e-4, atol=1e-4)
    assert not logits.requires_grad


def test_mlp_weights_start_glorot_uniform():
    weights = MLPClassifier(generator=generator()).initial(50, 60, 5, torch.zeros(()))
    for w, bound in ((weights[0], (6 / (60 + 128)) ** 0.5), (weights[2], (6 / (128 + 5)) ** 0.5)):
        assert 0.99 * bound < w.abs().max() <= bound
        assert w.detach().std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not weights[1].any() and not weights[3].any()


def test_mlp_stops_each_task_two_epochs_after_its_best_query_loss():
    e = episodes(5, 1, tasks=6, seed=3)
    settings = {"hidden": 16, "dropout": 0.0, "epochs": 200, "learning_rate": 0.02, "stop_on_query": True}
    logits = MLPClassifier(generator=generator(), **settings).predict(e)
    twin = MLPClassifier(generator=generator(), **settings)
    weights, ends = twin.initial(6, 24, 5, e.support), []
    for t in range(6):
        curve, best, waited = trained_alone(e, twin, weights, t), float("inf"), 0
        for end, alone in enumerate(curve):  # noqa: B007
            loss = F.cross_entropy(alone, e.flat()[3][t]).item()
            best, waited = (loss, 0) if loss < best else (best, waited + 1)
            if waited == 2:
                break
        torch.testing.assert_close(logits[t], curve[end], rtol=1e-3, atol=1e-3)
        ends.append(end)
    assert len(set(ends)) > 1 and min(ends) < 199  # they did stop, and not together


def test_mlp_dropout_keeps_the_mean_and_the_generator_decides():
    learner = MLPClassifier(generator=generator(), hidden=2000, dropout=0.75)
    x = torch.ones(1, 400, 1)
    weights = [torch.ones(1, 1, 2000), torch.zeros(1, 1, 2000), torch.ones(1, 2000, 1), torch.zeros(1, 1, 1)]
    out = learner._forward(weights, x, 0.75) / 2000
    assert out.mean() == pytest.approx(1, abs=0.01)
    assert out.var() == pytest.approx(0.75 / 0.25 / 2000, rel=0.2)  # variance of one kept or dropped unit: p / (1 - p)
    e = episodes()
    one, same, other = (MLPClassifier(generator=generator(s), epochs=3).predict(e) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def matched(e, centroids):
    """Cluster matching, literally."""
    answers = []
    for xs, ys, xq, _ in zip(*e.flat()):
        members = {}
        for x, y in zip(xs, ys.tolist()):
            members.setdefault((x - centroids).norm(dim=1).argmin().item(), []).append(y)
        name = {c: min(set(labels), key=lambda y: (-labels.count(y), y)) for c, labels in members.items()}
        answers.append([name[min(name, key=lambda c: (x - centroids[c]).norm().item())] for x in xq])
    return torch.tensor(answers)


@pytest.mark.parametrize("way, shot", SHAPES)
@pytest.mark.parametrize("k", [1, 4, 50])
def test_cluster_matching_equals_a_literal_loop(way, shot, k):
    e = episodes(way, shot, d=6, shift=5.0)
    centroids = 5 + 2 * torch.randn(k, 6, generator=generator(1))
    scores = ClusterMatching(centroids).predict(e)
    assert torch.equal(scores.argmax(2), matched(e, centroids))
    assert (scores.sum(2) == 1).all()


def test_cluster_matching_ignores_unnamed_clusters_and_takes_the_plurality():
    centroids = torch.tensor([[0.0], [10.0], [20.0]])
    support = torch.tensor([[[0.0], [1.0], [19.0]], [[2.0], [18.0], [21.0]]]).unsqueeze(0)
    query = torch.tensor([[[9.0]], [[11.0]]]).unsqueeze(0)  # both in the cluster at 10, which nobody named
    assert ClusterMatching(centroids).predict(Episodes(support, query)).argmax(2).tolist() == [[0, 1]]


class Given:
    """A task source that has nothing but hand-made episodes."""

    def __init__(self, **settings):
        self.settings = settings

    def sample(self, tasks, way, shot, query, generator):
        seed = torch.randint(1 << 30, (), generator=generator).item()
        return episodes(way, shot, query, tasks, seed=seed, **self.settings)


def test_tune_picks_the_best_value_on_the_same_tasks():
    # with much noise and little signal many neighbors beat one; strong decay beats none at all
    source = Given(d=4, spread=2.5)
    cell = {"way": 2, "shot": 20, "query": 5, "tasks": 200, "seed": 1}
    best, accuracies = tune(NearestNeighbors, (1, 9), source, **cell)
    assert best == 9 and set(accuracies) == {1, 9} and accuracies[9] > accuracies[1] + 2
    again = tune(NearestNeighbors, (9, 1), source, **cell)
    assert again == (best, accuracies)
    best, accuracies = tune(lambda value: NearestNeighbors(1), ("a", "b"), source, **cell)
    assert best == "a" and accuracies["a"] == accuracies["b"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NearestNeighbors(0), "neighbors=0"),
        (lambda: LinearClassifier(c=0.0), "c=0.0.* must be positive"),
        (lambda: LinearClassifier(c=float("nan")), "c=nan"),
        (lambda: Ridge(-1.0), "strength=-1.0"),
        (lambda: MLPClassifier(generator=generator(), dropout=1.0), r"dropout=1.0 is not in \[0, 1\)"),
        (lambda: MLPClassifier(generator=generator(), dropout=-0.1), "dropout=-0.1"),
        (lambda: MLPClassifier(generator=generator(), epochs=0), "epochs=0"),
        (lambda: ClusterMatching(torch.zeros(5)), r"centroids \[5\]"),
        (lambda: ClusterMatching(torch.full((2, 3), torch.nan)), "finite"),
        (lambda: NearestNeighbors(6).predict(episodes(5, 1)), "6 neighbors of 5 support embeddings .5-way 1-shot"),
        (lambda: ClusterMatching(torch.zeros(3, 7)).predict(episodes()), "24 dimensions but the centroids 7"),
        (lambda: tune(NearestNeighbors, (), Given(), way=5, shot=1), "no values"),
        (lambda: tune(NearestNeighbors, (1, 9), Given(), way=5, shot=1, tasks=20), "9 neighbors of 5"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "learner",
    [
        NearestNeighbors(),
        NearestMean(),
        Ridge(),
        LinearClassifier(),
        MLPClassifier(generator=generator()),
        ClusterMatching(torch.zeros(2, 24)),
    ],
)
def test_bad_embeddings_are_counted(learner):
    e = episodes(5, 2, tasks=2)
    e.support[0, 0, 0, 3:5] = torch.nan
    e.query[1, 2, 1, 0] = torch.inf
    e.query[1, 2, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 20 support and 2 of 50 query embeddings hold NaN"):
        learner.predict(e)


def test_images_are_taken_as_flat_vectors():
    e = episodes(d=48)
    images = Episodes(e.support.unflatten(3, (3, 4, 4)), e.query.unflatten(3, (3, 4, 4)))
    for learner in (NearestNeighbors(), NearestMean(), Ridge(), LinearClassifier()):
        assert torch.equal(learner.predict(images), learner.predict(e))


def test_mlp_trains_with_dropout():
    without, much = (MLPClassifier(generator=generator(), epochs=3, dropout=share).predict(episodes())
                     for share in (0.0, 0.9))  # fmt: skip
    assert (without - much).abs().max() > 1e-3  # from the same weights
