"""One MAML meta-iteration (gradient and Adam step): umeta against learn2learn, higher and a plain loop over tasks.

    python benchmarks/maml.py --setting omni5
    python benchmarks/maml.py --setting mini5 --device cuda

Work: Conv-4 with 32 filters, max-pool, learned scale and shift, everything adapted; 8 tasks, 5 inner steps of 0.05,
1 shot, 5 queries, second order. "cactus5" and "cactus20" are the network and the inner loop of CACTUs on Omniglot:
stride 2, mean over the last map, no scale, shifts not adapted. Loss and meta-gradient of every entrant are compared
with the loop in float64 first. learn2learn and higher are optional installs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import arguments, interleaved, report
from torch import nn

from umeta_core.episodes import Episodes
from umeta_core.maml import MAML
from umeta_core.networks import Conv4

SETTINGS = {"omni5": (5, 1, 28, False), "omni20": (20, 1, 28, False), "mini5": (5, 3, 84, False),
            "cactus5": (5, 1, 28, True), "cactus20": (20, 1, 28, True)}  # fmt: skip
CACTUS = {"downsample": "stride", "head": "mean", "norm": "shift"}
TASKS, SHOT, QUERY, STEPS, LR = 8, 1, 5, 5, 0.05


def episodes(way, channels, size, cactus, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    classes = torch.rand(TASKS, way, 1, channels, size, size, generator=g)  # a class signal: the loss is not flat
    draw = lambda n: (classes + torch.rand(TASKS, way, n, channels, size, size, generator=g)) / 2  # noqa: E731
    return Episodes(draw(SHOT).to(device, dtype), draw(QUERY).to(device, dtype))


def learner(way, channels, size, cactus, device, dtype=torch.float32):
    shape = CACTUS if cactus else {}
    net = Conv4(channels, size, 32, way=way, **shape, generator=torch.Generator().manual_seed(0))
    return MAML(net, LR, STEPS, inner_loss="mean", adapt_norm=not cactus).to(device, dtype)


def torch_network(net: Conv4, device, dtype):
    """The same network out of torch's own layers, for the peers."""
    layers, c, cactus = [], net.channels, not net.geometry.pool
    for w, scale, shift in zip(net.weights, net.scales, net.shifts):
        conv = nn.Conv2d(c, len(w), 3, stride=1 + cactus, padding=1, bias=False)
        norm = nn.BatchNorm2d(len(w), track_running_stats=False)
        norm.weight.requires_grad_(not cactus)
        conv.weight.data, norm.weight.data, norm.bias.data = w.data.contiguous(), scale.data.clone(), shift.data.clone()
        layers += [conv, norm, nn.ReLU(), *([] if cactus else [nn.MaxPool2d(2)])]
        c = len(w)
    head = nn.Linear(net.features, net.way)
    head.weight.data, head.bias.data = net.head_weight.data.clone(), net.head_bias.data.clone()
    layers += [nn.AdaptiveAvgPool2d(1)] if cactus else []
    return nn.Sequential(*layers, nn.Flatten(), head).to(device, dtype)


def ours(maml, batch):
    losses, _ = maml.loss(batch)
    losses.mean().backward()
    return losses.detach().mean()


def loop(net, batch):
    """Per task: `functional_call` and `torch.autograd.grad`."""
    total, cactus = 0.0, any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in net)
    head = f"{len(net) - 1}."
    start = {n: p for n, p in net.named_parameters() if not cactus or p.dim() > 1 or n.startswith(head)}
    for xs, ys, xq, yq in zip(*batch.flat()):
        fast = start
        for _ in range(STEPS):
            loss = F.cross_entropy(torch.func.functional_call(net, fast, (xs,)), ys)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: p - LR * g for (n, p), g in zip(fast.items(), grads)}
        loss = F.cross_entropy(torch.func.functional_call(net, fast, (xq,)), yq) / TASKS
        loss.backward()
        total += loss.detach()
    return total


def with_higher(net, batch):
    import higher

    total, inner = 0.0, torch.optim.SGD(net.parameters(), lr=LR)
    for xs, ys, xq, yq in zip(*batch.flat()):
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(STEPS):
                optimizer.step(F.cross_entropy(fast(xs), ys))
            loss = F.cross_entropy(fast(xq), yq) / TASKS
            loss.backward()
            total += loss.detach()
    return total


def with_learn2learn(net, batch):
    import learn2learn

    maml, total = learn2learn.algorithms.MAML(net, lr=LR, first_order=False), 0.0
    for xs, ys, xq, yq in zip(*batch.flat()):
        fast = maml.clone()
        for _ in range(STEPS):
            fast.adapt(F.cross_entropy(fast(xs), ys))
        loss = F.cross_entropy(fast(xq), yq) / TASKS
        loss.backward()
        total += loss.detach()
    return total


def work(way, channels, size, cactus) -> float | None:
    """GFLOP of the convolutions of the leanest exact meta-iteration. Per support image, step and layer: forward 1,
    backward 2, Hessian-vector product 6 (first layer 4 in all: no input gradient); per query image: 1 + 2."""
    if cactus:
        return None
    inner = query = 0
    for block in range(4):
        once = 2 * 9 * (channels if block == 0 else 32) * 32 * size * size
        inner, query, size = inner + once * (4 if block == 0 else 9), query + once * (2 if block == 0 else 3), size // 2
    return TASKS * way * (SHOT * STEPS * inner + QUERY * query) / 1e9


def entrants(setting, device, dtype):
    """Name -> (parameters, function that leaves their meta-gradients and returns the mean loss)."""
    batch, maml = episodes(*setting, device, dtype), learner(*setting, device, dtype)
    found = {"umeta": ([p for p in maml.parameters() if p.requires_grad], lambda: ours(maml, batch))}
    peers = (("loop over tasks", loop), ("higher", with_higher), ("learn2learn", with_learn2learn))
    for name, run in peers[:1] if setting[3] else peers:  # the others adapt all that is trained
        net = torch_network(maml.network, device, dtype)
        if name in ("higher", "learn2learn"):
            try:
                __import__(name)
            except ImportError as error:
                print(f"  {name}: not installed ({error})")
                continue
        found[name] = ([p for p in net.parameters() if p.requires_grad], lambda net=net, run=run: run(net, batch))
    return found


def check(setting) -> None:
    """Every entrant has the loop's loss and meta-gradient, in float64 on the CPU."""
    results = {}
    for name, (params, run) in entrants(setting, "cpu", torch.float64).items():
        loss = run()
        results[name] = (
            loss,
            torch.cat(sorted((p.grad.flatten() for p in params), key=lambda g: (len(g), g.abs().sum()))),
        )
    want_loss, want = results["loop over tasks"]
    for name, (loss, grad) in results.items():
        error = ((grad - want).norm() / want.norm()).item()
        assert abs(loss - want_loss) < 1e-9 and error < 1e-7, (
            f"{name}: loss {loss} against {want_loss}, gradient off by {error:.1e}"
        )
        print(f"  {name}: same loss, meta-gradient within {error:.0e} (float64)")


def main():
    args = arguments(__doc__, setting={"default": "omni5", "choices": SETTINGS})
    setting = SETTINGS[args.setting]
    print(args.setting)
    check(setting)
    steps = {}
    for name, (params, run) in entrants(setting, args.device, torch.float32).items():
        optimizer = torch.optim.Adam(params, lr=1e-3)

        def step(run=run, optimizer=optimizer):
            optimizer.zero_grad()
            run()
            optimizer.step()

        steps[name] = step
    report(
        interleaved(steps, args.repeats, args.device), "umeta", set() if setting[3] else {"higher", "learn2learn"},
        work(*setting), args.device,
    )


if __name__ == "__main__":
    main()
