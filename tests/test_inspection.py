"""Purity and NMI against scikit-learn, and what a partition looks like."""

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from umeta_core import inspection


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_purity_and_nmi():
    g = seeded()
    labels = torch.randint(6, (400,), generator=g)
    partition = torch.where(torch.rand(400, generator=g) < 0.6, labels * 2, torch.randint(15, (400,), generator=g))
    partition[:30] = -1
    found = inspection.inspect(partition.to(torch.int16), labels)
    p, y = partition[30:].numpy(), labels[30:].numpy()
    assert found.nmi == pytest.approx(normalized_mutual_info_score(y, p))
    assert found.purity == pytest.approx(sum(np.bincount(y[p == c]).max() for c in np.unique(p)) / 370)
    assert found.left_out == 30 and found.sizes.tolist() == [int((p == c).sum()) for c in np.unique(p)]
    assert f"{len(found.sizes)} classes of" in str(found) and "30 images left out" in str(found)


def test_nmi_at_its_ends():
    labels = torch.arange(40) % 4
    same, one = inspection.inspect(3 - labels, labels), inspection.inspect(torch.zeros(40).long(), labels)
    assert (same.purity, same.nmi) == (1, pytest.approx(1))
    assert (one.purity, one.nmi) == (0.25, pytest.approx(0, abs=1e-9))
    assert inspection.inspect(torch.zeros(5).long(), torch.zeros(5).long()).nmi == 1


def test_bad_comparisons_are_refused():
    with pytest.raises(ValueError, match=r"partition \[2, 4\] cannot be compared with labels \[4\]"):
        inspection.inspect(torch.zeros(2, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="leaves all 4 images out"):
        inspection.inspect(-torch.ones(4), torch.zeros(4))


def test_clusters_are_shown_from_the_purest_or_the_largest():
    pytest.importorskip("matplotlib").use("Agg")
    from umeta_core.plots import show_clusters

    partition = torch.tensor([0] * 4 + [1] * 6 + [2] * 5 + [3] * 2 + [-1])
    labels = torch.tensor([7, 7, 7, 7, 1, 1, 1, 2, 2, 3, 5, 5, 5, 5, 6, 8, 8, 9])
    images = partition.clamp(min=0).mul(60).byte().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)  # the cluster is its gray
    for given, order, numbers in ((labels, [0, 2, 1], ["1.00", "0.80", "0.50"]), (None, [1, 2, 0], ["6", "5", "4"])):
        figure = show_clusters(images, partition, given, clusters=3, members=4, generator=seeded())
        shown = [[round(float(ax.images[0].get_array().mean()) * 255 / 60) for ax in figure.axes[4 * i : 4 * i + 4]]
                 for i in range(3)]  # fmt: skip
        assert shown == [[c] * 4 for c in order]
        assert [figure.axes[4 * i].texts[0].get_text() for i in range(3)] == numbers
    with pytest.raises(ValueError, match="3 clusters have 4 members, 5 are to be shown"):
        show_clusters(images, partition, members=4)
