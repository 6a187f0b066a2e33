import pytest
import torch
import torch.nn.functional as F
from torch import nn

from umeta_core.episodes import Episodes
from umeta_core.networks import Conv4
from umeta_core.protonets import ProtoNet, squared_distances


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def episodes(tasks=2, way=3, shot=2, query=4, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Episodes(
        torch.rand(tasks, way, shot, 1, size, size, generator=g),
        torch.rand(tasks, way, query, 1, size, size, generator=g),
    )


def torch_twin(net):
    """The network out of torch's own layers, with the same weights."""
    layers, c = [], 1
    for w, scale, shift in zip(net.weights, net.scales, net.shifts):
        conv, norm = nn.Conv2d(c, w.shape[0], 3, padding=1, bias=False), nn.BatchNorm2d(w.shape[0])
        conv.weight.data, norm.weight.data, norm.bias.data = w.data.clone(), scale.data.clone(), shift.data.clone()
        layers += [conv, norm, nn.ReLU(), nn.MaxPool2d(2)]
        c = w.shape[0]
    return nn.Sequential(*layers, nn.Flatten())


def network(seed=0):
    g = torch.Generator().manual_seed(seed)
    net = Conv4(1, 16, 6, generator=g)
    for p in [*net.scales, *net.shifts]:
        p.data += torch.randn(p.shape, generator=g)
    return net


def plain_logits(embed, e, t):
    z = embed(torch.cat([e.support[t].flatten(0, 1), e.query[t].flatten(0, 1)]))
    n = e.way * e.shot
    prototypes = z[:n].view(e.way, e.shot, -1).mean(1)
    return -torch.cdist(z[n:], prototypes).square()


def test_loss_gradient_and_running_statistics_equal_torch_layers():
    net, e = network(), episodes(tasks=1)
    twin, learner = torch_twin(net), ProtoNet(net)
    for _ in range(3):  # running averages must agree over several updates
        losses, accuracies = learner.loss(e)
        logits = plain_logits(twin, e, 0)
        want = F.cross_entropy(logits, e.flat()[3][0])
    torch.testing.assert_close(losses[0], want)
    assert accuracies[0] == (logits.argmax(1) == e.flat()[3][0]).float().mean()
    losses.sum().backward(), want.backward()
    for b in range(4):
        torch.testing.assert_close(net.weights[b].grad, twin[4 * b].weight.grad)
        torch.testing.assert_close(net.scales[b].grad, twin[4 * b + 1].weight.grad)
        torch.testing.assert_close(net.shifts[b].grad, twin[4 * b + 1].bias.grad)
        torch.testing.assert_close(net.running_mean[b], twin[4 * b + 1].running_mean)
        torch.testing.assert_close(net.running_var[b], twin[4 * b + 1].running_var)
    e2 = episodes(seed=1)
    for t in range(2):
        torch.testing.assert_close(learner.predict(e2)[t], plain_logits(twin.eval(), e2, t).detach())


def test_transductive_statistics_are_those_of_the_task_alone():
    net, e = network(), episodes()
    logits = ProtoNet(net, batch_norm="transductive").predict(e)
    for t in range(2):
        torch.testing.assert_close(logits[t], plain_logits(torch_twin(net).train(), e, t).detach())


def test_inductive_prediction_of_a_query_does_not_depend_on_the_others():
    net, e = network(), episodes()
    learner = ProtoNet(net)
    learner.loss(episodes(seed=3))
    alone = Episodes(e.support, e.query[:, :, :1])
    whole = learner.predict(e).view(2, 3, 4, 3)[:, :, 0]
    torch.testing.assert_close(learner.predict(alone).view(2, 3, 3), whole)
    transductive = ProtoNet(net, batch_norm="transductive")
    assert not torch.allclose(
        transductive.predict(alone).view(2, 3, 3), transductive.predict(e).view(2, 3, 4, 3)[:, :, 0]
    )


def test_predict_does_not_change_the_learner():
    learner = ProtoNet(network())
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    learner.predict(episodes())
    assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())


def test_mean_distance_is_a_temperature():
    net, e = network(), episodes()
    summed, mean = ProtoNet(net).predict(e), ProtoNet(net, distance="mean").predict(e)
    torch.testing.assert_close(mean, summed / net.features)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="distance='cosine'"):
        ProtoNet(network(), distance="cosine")
    with pytest.raises(ValueError, match="batch_norm='frozen'"):
        ProtoNet(network(), batch_norm="frozen")
    with pytest.raises(ValueError, match="reduce='average' is not known; use sum or mean"):
        squared_distances(torch.rand(1, 2, 3), torch.rand(1, 2, 3), "average")


def test_a_network_of_vectors_is_used_in_the_test_as_in_training():
    """Tasks that show vectors are not tasks of finished features."""

    class Doubled(torch.nn.Module):
        def embed(self, x, stats="batch", update=False):
            return torch.stack([x[:, 0], 3 * x[:, 1]], 1)

    g = torch.Generator().manual_seed(0)
    e = Episodes(torch.randn(4, 3, 2, 2, generator=g), torch.randn(4, 3, 5, 2, generator=g))
    model = ProtoNet(Doubled())
    xs, _, xq, _ = e.flat()
    z = torch.tensor([1.0, 3.0]) * torch.cat([xs, xq], 1)
    assert torch.equal(model.predict(e), model._logits(z, e))
    assert not torch.equal(model.predict(e), model.predict_embedded(e))


def test_a_network_with_a_head_is_refused():
    with pytest.raises(ValueError, match="give the network no head"):
        ProtoNet(Conv4(1, 28, 8, way=5))
