import math

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

import umeta_core.kmeans
from umeta_core.embeddings.deepcluster import (
    DeepCluster,
    Sobel,
    apply_whitening,
    fill_empty,
    last_side,
    pca_whitening,
    uniform_over_clusters,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bars(n=192, kinds=6, size=20, seed=0):
    """Noisy gratings of a few directions, with their direction as label."""
    g = generator(seed)
    y = torch.arange(n) % kinds
    angle = y * math.pi / kinds
    across = torch.arange(size) - size / 2
    phase = 6.28 * torch.rand(n, generator=g)
    wave = angle.cos()[:, None, None] * across[:, None] + angle.sin()[:, None, None] * across + phase[:, None, None]
    x = 128 + 90 * wave.sin() + 20 * torch.randn(n, size, size, generator=g)
    return x.clamp(0, 255).to(torch.uint8).unsqueeze(1), y


def small(seed=0, **changes):
    settings = dict(clusters=8, width=1 / 64, crop=18, dropout=0.25, flip=False) | changes
    return DeepCluster(1, 20, 12, generator=generator(seed), **settings)


def test_sobel_is_the_literal_sum():
    x = torch.rand(2, 3, 5, 6, generator=generator())
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    gray = torch.zeros(2, 7, 8)  # with a border of zeros
    gray[:, 1:-1, 1:-1] = sum((x[:, c] - mean[c]) / deviation[c] for c in range(3)) / 3
    weights = [(-1, 1), (0, 2), (1, 1)]
    horizontal = sum(w * (gray[:, 1 + i : 6 + i, :-2] - gray[:, 1 + i : 6 + i, 2:]) for i, w in weights)
    vertical = sum(w * (gray[:, :-2, 1 + i : 7 + i] - gray[:, 2:, 1 + i : 7 + i]) for i, w in weights)
    torch.testing.assert_close(Sobel(3)(x), torch.stack([horizontal, vertical], 1), atol=1e-5, rtol=1e-5)
    flat = Sobel(1)(torch.full((1, 1, 6, 6), 0.7))
    assert (flat[:, :, 1:-1, 1:-1].abs() < 1e-6).all() and not any(p.requires_grad for p in Sobel(3).parameters())


def test_features_are_those_of_torchs_layers():
    model = small().eval()
    for norm in model.norms:
        norm.running_mean.normal_(generator=generator(1))
        norm.running_var.uniform_(0.5, 2, generator=generator(2))
    layers = [model.sobel]
    for i, (conv, norm) in enumerate(zip(model.convs, model.norms)):
        layers += [conv, norm, nn.ReLU(), *([nn.MaxPool2d(3, 2)] if i in (0, 1, 4) else [])]
    twin = nn.Sequential(*layers, nn.Flatten(), model.hidden[0], nn.ReLU(), model.hidden[1])
    x = torch.rand(5, 1, 18, 18, generator=generator(3))
    torch.testing.assert_close(model.features(x), twin(x))


def test_the_papers_network_ends_in_6x6_maps():
    assert last_side(64, 5, 1, 1) == 6
    assert last_side(224, 11, 4, 2) == 6  # the authors' own
    with torch.device("meta"):
        model = DeepCluster()
    assert [c.out_channels for c in model.convs] == [96, 256, 384, 384, 256]
    assert [tuple(h.weight.shape) for h in model.hidden] == [(4096, 9216), (4096, 4096)]
    assert model.top.weight.shape == (500, 4096)


def test_whitening_agrees_with_scikit_learn():
    z = torch.randn(400, 20, generator=generator()) @ torch.randn(20, 20, generator=generator(1))
    mean, matrix = pca_whitening(z, 7)
    ours = (z - mean) @ matrix
    theirs = torch.from_numpy(PCA(7, whiten=True, svd_solver="full").fit_transform(z.numpy())).float()
    torch.testing.assert_close(ours * (ours * theirs).sum(0).sign(), theirs, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(torch.cov(ours.T), torch.eye(7), atol=1e-3, rtol=0)
    normalized = apply_whitening(z, mean, matrix)
    torch.testing.assert_close(normalized, ours / ours.norm(dim=1, keepdim=True))


def test_whitening_does_not_blow_up_directions_without_variance():
    z = torch.randn(50, 3, generator=generator()) @ torch.randn(3, 10, generator=generator(1))
    mean, matrix = pca_whitening(z, 6)
    assert ((z - mean) @ matrix).var(0)[3:].max() < 0.1


def test_every_cluster_is_drawn_equally_often():
    labels = torch.tensor([0] * 50 + [1] * 3 + [3] * 7)  # cluster 2 is empty
    index = uniform_over_clusters(labels, 4, generator())
    assert len(index) == len(labels)
    counts = torch.bincount(labels[index], minlength=4)
    assert counts[2] == 0 and counts.sum() == 60 and (counts[[0, 1, 3]] - 20).abs().max() <= 3
    assert len(index[labels[index] == 0].unique()) == counts[0]  # a large cluster without replacement
    assert len(index[labels[index] == 1].unique()) == 3
    first = labels[index][:30].bincount(minlength=4)
    assert (first > 0).sum() == 3  # shuffled
    seen = torch.cat([uniform_over_clusters(labels, 4, generator(s)) for s in range(20)])
    assert len(seen.unique()) == len(labels)


def test_empty_clusters_get_part_of_another():
    z = torch.randn(40, 4, generator=generator())
    labels = torch.arange(40) % 2
    filled = fill_empty(z, labels, 6, generator())
    assert (torch.bincount(filled, minlength=6) > 0).all()
    assert ((filled == labels) | (filled > 1)).all()
    same = fill_empty(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64), 3, generator())
    assert (same == 0).all()
    untouched = fill_empty(z, torch.arange(40) % 6, 6, generator())
    assert (untouched == torch.arange(40) % 6).all()


def test_views_are_pieces_of_their_image():
    x = torch.arange(2 * 3 * 20 * 20).view(2, 3, 20, 20).remainder(251).to(torch.uint8)
    for flip in (False, True):
        model = DeepCluster(3, 20, 8, clusters=4, width=1 / 64, crop=18, flip=flip, generator=generator())
        index = torch.arange(200) % 2
        views = model._views(x, index, generator(1)).mul(255).round().to(torch.uint8)
        pieces = x.unfold(2, 18, 1).unfold(3, 18, 1).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # [2, 9, 3, 18, 18]
        straight = (views.unsqueeze(1) == pieces[index]).flatten(2).all(2)
        mirrored = (views.unsqueeze(1) == pieces[index].flip(4)).flatten(2).all(2)
        assert (straight | mirrored).any(1).all()
        assert straight.any(0).all() and 0.3 < mirrored.any(1).float().mean() < 0.7 if flip else not mirrored.any()
    resized = DeepCluster(3, 20, 8, clusters=4, width=1 / 64, crop=18, view="resize", flip=False, generator=generator())
    assert resized._views(x, index, generator()).shape == (200, 3, 18, 18)
    torch.testing.assert_close(resized._views(x, index[:2], generator()), resized._center(x.float() / 255))


def test_clusters_are_learned_and_agree_more_and_more():
    x, y = bars(256)
    model, labels = small(dropout=0.0, clusters=12, width=1 / 32), []
    start = model.start_epoch
    model.start_epoch = lambda *a: (start(*a), labels.append(model.labels))[0]
    history = model.fit(x, epochs=6, batch=8, progress=False)
    assert history["epoch"] == [1, 2, 3, 4, 5, 6] and len(history["nmi"]) == 5 and len(history["loss"]) == 6
    for value, before, after in zip(history["nmi"], labels, labels[1:]):
        assert value == pytest.approx(normalized_mutual_info_score(before, after), abs=1e-5)
    assert history["accuracy"][-1] > 0.2  # chance is 1/12
    assert sum(history["nmi"][-2:]) / 2 > history["nmi"][0] + 0.1
    assert normalized_mutual_info_score(y, labels[-1]) > 0.7
    z = model.embed(x)
    assert z.shape == (256, 12) and z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(256))
    torch.testing.assert_close(model.embed(x[:7]), z[:7], atol=1e-4, rtol=1e-4)


def test_the_last_layer_starts_afresh():
    x, _ = bars(64)
    model, g = small(), generator(5)
    model.opt = model.optimizers()
    order = model.start_epoch(x, 0, 2, g)
    assert model.nmi is None
    for part in order.split(16):
        model.step(x, part, g)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    assert before["top.bias"].abs().max() > 0
    model.start_epoch(x, 1, 2, g)
    assert 0 < model.nmi <= 1
    assert (model.top.bias == 0).all() and (model.top.weight != before["top.weight"]).all()
    assert model.top.weight.std().item() == pytest.approx(0.01 * 8, rel=0.2)  # 1/64 of the units: 8 times wider
    for name, value in model.state_dict().items():
        if name.startswith(("convs", "norms", "hidden")):
            assert torch.equal(value, before[name]), name
    assert [o.param_groups[0]["momentum"] for o in model.opt] == [0.9, 0]


@pytest.mark.parametrize("stop", [5, 8, 9, 14])
def test_a_resumed_run_is_the_same(tmp_path, stop):
    """Stopped in the first epoch, between epochs, right after the second clustering, and later in the second epoch."""
    x, _ = bars(128)
    whole = small()
    expected = whole.fit(x, epochs=2, batch=16, seed=3, progress=False)

    class Stop(Exception):
        pass

    file, model = tmp_path / "dc.pt", small()
    step, count = model.step, iter(range(100))

    def interrupted(*a):
        if next(count) == stop:
            raise Stop
        return step(*a)

    model.step = interrupted
    with pytest.raises(Stop):
        model.fit(x, epochs=2, batch=16, seed=3, checkpoint=file, save_every=0, progress=False)
    resumed = small(seed=9)
    history = resumed.fit(x, epochs=2, batch=16, seed=3, checkpoint=file, progress=False)
    assert {k: v for k, v in history.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[name]), name
    assert torch.equal(whole.labels, resumed.labels)
    restored = small(seed=11).restore(file)  # the checkpoint has the final whitening
    assert torch.equal(restored.embed(x), whole.embed(x))


def test_save_and_restore(tmp_path):
    x, _ = bars(64)
    model = small()
    model.fit(x, epochs=1, batch=32, progress=False)
    model.save(tmp_path / "model.pt")
    assert torch.equal(small(seed=4).restore(tmp_path / "model.pt").embed(x), model.embed(x))
    with pytest.raises(ValueError, match="another network"):
        small(width=1 / 32).restore(tmp_path / "model.pt")


def test_statistics_of_the_images_themselves():
    x, _ = bars(64)
    model = small()
    model.fit(x, epochs=0, batch=32)
    other, _ = bars(48, seed=1)
    z = model._all_features(other)
    model.whiten = "own"
    torch.testing.assert_close(model.embed(other), apply_whitening(z, *pca_whitening(z, 12)))
    model.whiten = "train"
    torch.testing.assert_close(model.embed(other), apply_whitening(z, model.mean, model.whitening))
    assert not torch.equal(model.embed(other), apply_whitening(z, *pca_whitening(z, 12)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(crop=16), "16x16 is too small .* at least 17x17"),
        (dict(crop=18, stride=2), "at least 31x31"),
        (dict(crop=24), "24x24 crop does not fit into 20x20"),
        (dict(width=0.002), "d=12 is more than the 8 features"),
        (dict(view="zoom"), "view='zoom' is not known"),
        (dict(whiten="all"), "whiten='all' is not known"),
    ],
)
def test_impossible_networks(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_images_that_are_no_bytes_are_refused_and_stay_as_they_are():
    x = bars(64)[0] / 255
    before = x.clone()
    with pytest.raises(ValueError, match="images are uint8"):
        small(whiten="own").embed(x)
    assert torch.equal(x, before)


def test_impossible_images():
    x, _ = bars(64)
    with pytest.raises(ValueError, match="call fit first"):
        small().embed(x)
    with pytest.raises(ValueError, match="64 images cannot form 65 clusters"):
        small(clusters=65).fit(x, epochs=1, batch=32)
    with pytest.raises(ValueError, match=r"takes images of \(1, 20, 20\), these are \(1, 19, 20\)"):
        small().fit(x[:, :, 1:], epochs=1)
    with pytest.raises(ValueError, match="needs more than 12 images; got 12"):
        model = small(whiten="own")
        model.embed(x[:12])
    with pytest.raises(ValueError, match="2 channels have no gray"):
        DeepCluster(2, 20, 12, width=1 / 64, crop=18)


def test_a_checkpoint_of_another_rate_is_refused(tmp_path):
    """Rates are in a dict."""
    images = torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fit = dict(epochs=1, batch=30, checkpoint=tmp_path / "fit.pt", progress=False)
    options = dict(d=4, clusters=5, crop=28, width=0.02)
    DeepCluster(1, 28, **options).fit(images, **fit)
    with pytest.raises(ValueError, match="belongs to another run .*'lr': 0.5"):
        DeepCluster(1, 28, lr=0.5, **options).fit(images, **fit)


def test_a_view_of_a_fit_reads_it(tmp_path):
    """With the plan's options of the fit, and settings of its own: whitened by other statistics."""
    images = torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fit = dict(epochs=1, batch=30, checkpoint=tmp_path / "fit.pt", progress=False)
    own, inductive = (DeepCluster(1, 28, d=4, clusters=5, crop=28, width=0.02, whiten=w) for w in ("own", "train"))
    own.options = inductive.options = {"whiten": "own"}
    own.fit(images, **fit)
    inductive.fit(images, **fit)
    assert torch.equal(own.top.weight, inductive.top.weight) and inductive.whiten == "train"


def test_dropout_keeps_the_mean():
    dropped = small(dropout=0.25).train()._drop(torch.ones(200, 500), generator())
    assert dropped.mean().item() == pytest.approx(1, abs=0.01) and (dropped == 0).float().mean() > 0.2


def test_k_means_takes_the_iterations_asked_for(monkeypatch):
    asked, real = [], umeta_core.kmeans.kmeans
    monkeypatch.setattr(umeta_core.kmeans, "kmeans", lambda *a, **k: asked.append(k["iterations"]) or real(*a, **k))
    model = small(iterations=7)
    model.start_epoch(bars(64)[0], 0, 1, generator())
    assert asked == [7]
