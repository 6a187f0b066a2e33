"""Chapter 3: every labeled equation, written out, equals the function it names; scratch code equals the library."""

import pytest
import torch
from scratch import scratch_namespace

from umeta_core.episodes import Episodes
from umeta_core.networks import Conv4
from umeta_core.protonets import ProtoNet, prototypes, squared_distances

T, N, K, Q, D = 2, 3, 4, 5, 6


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/03_protonets.md")


@pytest.fixture
def z():
    return torch.randn(T, N, K, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def queries():
    return torch.randn(T, N * Q, D, generator=torch.Generator().manual_seed(1))


def learner_and_episodes():
    g = torch.Generator().manual_seed(2)
    images = torch.rand(T, N, K + Q, 1, 28, 28, generator=g)
    return ProtoNet(Conv4(filters=4, generator=g).double()), Episodes(images[:, :, :K], images[:, :, K:])


def batch_features(learner, episodes):
    """Features of all images of a batch with its own statistics: support [T, N, K, d] and query [T, N, Q, d]."""
    xs, _, xq, _ = episodes.flat()
    z = learner.network.embed(torch.cat([xs, xq], 1).flatten(0, 1)).unflatten(0, (T, N * (K + Q)))
    return z[:, : N * K].unflatten(1, (N, K)), z[:, N * K :].unflatten(1, (N, Q))


def literal_distance(z, c):
    """Sum over features of the squared differences, one number at a time."""
    return sum((z[j] - c[j]) ** 2 for j in range(len(z)))


def test_eq_prototype(z):
    c = prototypes(z)
    for t in range(T):
        for n in range(N):
            torch.testing.assert_close(c[t, n], sum(z[t, n, k] for k in range(K)) / K)


def test_eq_proto_distance(z, queries):
    c = prototypes(z)
    d = squared_distances(queries, c)
    mean = squared_distances(queries, c, "mean")
    for t in range(T):
        for i in range(N * Q):
            for n in range(N):
                torch.testing.assert_close(d[t, i, n], literal_distance(queries[t, i], c[t, n]))
                torch.testing.assert_close(mean[t, i, n], d[t, i, n] / D)


def test_eq_proto_linear(z, queries):
    c = prototypes(z)
    d = squared_distances(queries, c)
    for t in range(T):
        weight, bias = 2 * c[t], -c[t].square().sum(1)
        torch.testing.assert_close(-d[t], queries[t] @ weight.T + bias - queries[t].square().sum(1, keepdim=True))


def test_eq_proto_posterior():
    learner, episodes = learner_and_episodes()
    learner.loss(episodes)  # so that the running statistics are not the initial ones
    p = learner.predict(episodes).softmax(2)
    with torch.no_grad():
        tasks = (*episodes.support, *episodes.query)
        embed = [[learner.network.embed(x, stats="running") for x in task] for task in tasks]
    for t in range(T):
        c = [z.mean(0) for z in embed[t]]
        for i, z in enumerate(torch.cat(embed[T + t])):
            weights = torch.stack([torch.exp(-literal_distance(z, c[n])) for n in range(N)])
            torch.testing.assert_close(p[t, i], weights / weights.sum())


def test_eq_proto_loss():
    learner, episodes = learner_and_episodes()
    losses, _ = learner.loss(episodes)
    support, query = batch_features(learner, episodes)
    for t in range(T):
        p = torch.softmax(-squared_distances(query[t].flatten(0, 1)[None], support[t].mean(1)[None])[0], 1)
        total = sum(p[n * Q + q, n].log() for n in range(N) for q in range(Q))
        torch.testing.assert_close(losses[t], -total / (N * Q))


def test_scratch_parts_equal_the_library(scratch, z, queries):
    for t in range(T):
        c = scratch["prototypes"](z[t])
        torch.testing.assert_close(c, prototypes(z)[t])
        d = squared_distances(queries, prototypes(z))[t]
        torch.testing.assert_close(scratch["squared_distances"](queries[t], c), d)
        torch.testing.assert_close(scratch["posterior"](queries[t], c), (-d).softmax(1))
        torch.testing.assert_close(scratch["linear_logits"](queries[t], c).softmax(1), (-d).softmax(1))


def test_scratch_loss_and_gradient_equal_the_library(scratch):
    learner, episodes = learner_and_episodes()
    support, query = batch_features(learner, episodes)
    ours = torch.stack([scratch["proto_loss"](support[t], query[t]) for t in range(T)])
    theirs, _ = learner.loss(episodes)
    torch.testing.assert_close(ours, theirs)
    parameters = list(learner.parameters())
    for a, b in zip(torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(theirs.sum(), parameters)):
        torch.testing.assert_close(a, b)


def test_scratch_network_equals_the_library(scratch):
    learner, episodes = learner_and_episodes()
    net = scratch["conv4"](filters=4)
    with torch.no_grad():
        for b, weight in enumerate(learner.network.weights):
            net[4 * b].weight.copy_(weight)
    x = episodes.support.flatten(0, 2)
    torch.testing.assert_close(net(x), learner.network.embed(x, update=True))
    torch.testing.assert_close(net.eval()(x), learner.network.embed(x, stats="running"))
