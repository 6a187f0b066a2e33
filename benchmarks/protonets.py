"""One ProtoNet iteration (gradient and Adam step), 20-way 1-shot 15-query, Conv-4 with 64 filters, 28x28.

    python benchmarks/protonets.py
    python benchmarks/protonets.py --device cuda

umeta against learn2learn's PrototypicalClassifier and plain torch layers, compared in float64 first. Support and
query pass the network together, as in CACTUs' code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import arguments, interleaved, report
from torch import nn

from umeta_core.episodes import Episodes
from umeta_core.networks import Conv4
from umeta_core.protonets import ProtoNet

WAY, SHOT, QUERY = 20, 1, 15


def torch_network(net: Conv4):
    layers, c = [], net.channels
    for w in net.weights:
        conv = nn.Conv2d(c, len(w), 3, padding=1, bias=False)
        conv.weight.data = w.data.contiguous()
        layers += [conv, nn.BatchNorm2d(len(w)), nn.ReLU(), nn.MaxPool2d(2)]
        c = len(w)
    return nn.Sequential(*layers, nn.Flatten())


def entrants(device, dtype):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.rand(1, WAY, n, 1, 28, 28, generator=g).to(device, dtype)  # noqa: E731
    batch = Episodes(draw(SHOT), draw(QUERY))
    xs, ys, xq, yq = (t[0] for t in batch.flat())
    net = Conv4(generator=torch.Generator().manual_seed(0)).to(device, dtype)
    learner = ProtoNet(net)

    def ours():
        loss = learner.loss(batch)[0].mean()
        loss.backward()
        return loss.detach()

    def plain(twin):
        z = twin(torch.cat([xs, xq]))
        prototypes = z[: len(xs)].view(WAY, SHOT, -1).mean(1)
        loss = F.cross_entropy(-(z[len(xs) :, None] - prototypes).square().sum(2), yq)
        loss.backward()
        return loss.detach()

    def learn2learn_(twin, classifier):
        z = twin(torch.cat([xs, xq]))
        classifier.fit_(z[: len(xs)], ys)
        loss = F.cross_entropy(classifier(z[len(xs) :]), yq)
        loss.backward()
        return loss.detach()

    found = {"umeta": (list(net.weights), ours)}
    twin = torch_network(net).to(device, dtype)
    found["torch layers"] = ([m.weight for m in twin if isinstance(m, nn.Conv2d)], lambda: plain(twin))
    try:
        import learn2learn

        other, classifier = torch_network(net).to(device, dtype), learn2learn.nn.PrototypicalClassifier()
        found["learn2learn"] = (
            [m.weight for m in other if isinstance(m, nn.Conv2d)],
            lambda: learn2learn_(other, classifier),
        )
    except ImportError as error:
        print(f"  learn2learn: not installed ({error})")
    return found


def main():
    args = arguments(__doc__)
    results = {
        name: (run(), [p.grad for p in params]) for name, (params, run) in entrants("cpu", torch.float64).items()
    }
    want_loss, want = results["torch layers"]
    for name, (loss, grads) in results.items():
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, want))
        assert abs(loss - want_loss) < 1e-8 and error < 1e-6, f"{name}: loss {loss}, gradient off by {error:.1e}"
        print(f"  {name}: same loss, gradient within {error:.0e} (float64)")
    steps = {}
    for name, (params, run) in entrants(args.device, torch.float32).items():
        optimizer = torch.optim.Adam(params, lr=1e-3)
        steps[name] = lambda run=run, optimizer=optimizer: (optimizer.zero_grad(), run(), optimizer.step())
    size, gflop, c = 28, 0.0, 1
    for block in range(4):  # forward 1, backward 2; the first layer needs no input gradient
        gflop += 2 * 9 * c * 64 * size * size * (2 if block == 0 else 3) * WAY * (SHOT + QUERY) / 1e9
        size, c = size // 2, 64
    report(interleaved(steps, args.repeats, args.device), "umeta", {"learn2learn", "torch layers"}, gflop, args.device)


if __name__ == "__main__":
    main()
