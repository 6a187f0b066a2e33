import pytest
import torch

from umeta_core.attributes import AttributeTasks, attribute_prototypes
from umeta_core.data import ImageSet
from umeta_core.episodes import Episodes, MixedTasks, PartitionTasks, UnlabeledSets, sample_without_replacement


def numbered(classes=6, each=8, channels=1):
    """Image i is filled with the value i, so that an image can be recognized after sampling."""
    n = classes * each
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, channels, 4, 4).contiguous()
    labels = torch.arange(classes).repeat_interleave(each)
    return ImageSet(images, labels, [str(c) for c in range(classes)], [], "numbered", "train")


def identity(x):
    return (x[..., 0, 0, 0] * 255).round().long()


def test_sampling_without_replacement_is_uniform_over_ordered_draws():
    counts = torch.full((60_000,), 4)
    draws = sample_without_replacement(counts, 2, torch.Generator().manual_seed(0))
    code = draws[:, 0] * 4 + draws[:, 1]
    tally = torch.bincount(code, minlength=16).float()
    assert (tally[[0, 5, 10, 15]] == 0).all()  # never the same number twice
    expected = 60_000 / 12
    chi2 = ((tally - expected).square() / expected).sum() - 4 * expected
    assert chi2 < 31.3  # 99.9 % point with 11 degrees of freedom


def test_sampling_all_of_a_set_gives_each_once():
    counts = torch.tensor([5, 7, 9])
    draws = sample_without_replacement(counts, 5, torch.Generator().manual_seed(1))
    assert draws[0].sort().values.tolist() == [0, 1, 2, 3, 4]
    assert all(len(set(row.tolist())) == 5 and row.max() < c for row, c in zip(draws, counts))


def test_support_and_query_are_disjoint_and_of_the_right_class():
    images = numbered()
    episodes = PartitionTasks(images).sample(50, 5, 2, 3, torch.Generator().manual_seed(0))
    assert episodes.support.shape == (50, 5, 2, 1, 4, 4) and episodes.query.shape == (50, 5, 3, 1, 4, 4)
    drawn = torch.cat([identity(episodes.support), identity(episodes.query)], 2)
    classes = drawn // 8
    assert (classes == classes[:, :, :1]).all()
    assert all(len(set(t.tolist())) == 5 for t in classes[:, :, 0])
    assert all(len(set(c.tolist())) == 5 for t in drawn for c in t)
    assert len({tuple(t.tolist()) for t in classes[:, :, 0]}) > 25  # class order varies: the label permutation


def test_flat_labels_are_positions_on_the_way_axis():
    xs, ys, xq, yq = Episodes(torch.rand(2, 3, 2, 1, 4, 4), torch.rand(2, 3, 1, 1, 4, 4)).flat()
    assert xs.shape == (2, 6, 1, 4, 4) and xq.shape == (2, 3, 1, 4, 4)
    assert ys.tolist() == [[0, 0, 1, 1, 2, 2]] * 2 and yq.tolist() == [[0, 1, 2]] * 2


def test_a_slice_knows_the_number_of_its_first_task():
    tasks = Episodes(torch.rand(5, 2, 1, 3), torch.rand(5, 2, 1, 3), first=20)
    assert [part.first for part in (tasks[:2], tasks[3:], tasks[-2:], tasks[-9:], tasks[9:])] == [20, 23, 23, 20, 25]


def test_partition_leaves_out_and_prunes():
    images = numbered()
    partition = torch.full((48,), -1)
    partition[:3], partition[3:20], partition[20:40] = 0, 1, 2  # class 0 is too small for R = 4
    source = PartitionTasks(images, partition)
    drawn = identity(source.sample(200, 2, 1, 3, torch.Generator().manual_seed(0)).support)
    assert drawn.min() >= 3 and drawn.max() < 40
    with pytest.raises(ValueError, match=r"3-way tasks .* need 3 classes of at least 4 images.*has 2"):
        source.sample(1, 3, 1, 3, torch.Generator())


def test_stacked_partitions_are_drawn_uniformly_and_not_mixed():
    images = numbered(4, 6)
    parts = torch.stack([images.labels, torch.arange(24) % 4])
    episodes = PartitionTasks(images, parts).sample(2000, 3, 1, 2, torch.Generator().manual_seed(3))
    drawn = torch.cat([identity(episodes.support), identity(episodes.query)], 2)
    by_label = (drawn // 6 == drawn[..., :1] // 6).all(2).all(1)
    by_stripe = (drawn % 4 == drawn[..., :1] % 4).all(2).all(1)
    assert (by_label ^ by_stripe).all()
    assert 900 < by_label.sum() < 1100


def test_classes_are_drawn_uniformly_not_by_size():
    images = numbered(6, 8)
    partition = torch.tensor([0] * 4 + [1] * 40 + [2] * 4)
    episodes = PartitionTasks(images, partition).sample(3000, 1, 1, 1, torch.Generator().manual_seed(0))
    share = ((identity(episodes.support) >= 4) & (identity(episodes.support) < 44)).float().mean()
    assert 0.30 < share < 0.37


def test_same_seed_same_episodes():
    source = PartitionTasks(numbered())
    a, b = (source.sample(4, 3, 1, 2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.support, b.support) and torch.equal(a.query, b.query)


def test_bad_partitions_are_refused():
    images = numbered()
    with pytest.raises(ValueError, match="partition is of 7 images but numbered train has 48"):
        PartitionTasks(images, torch.zeros(7, dtype=torch.long))
    with pytest.raises(ValueError, match="leaves every image out"):
        PartitionTasks(images, torch.full((48,), -1))


def test_features_show_the_same_tasks():
    images = numbered()
    features = torch.stack([torch.arange(48.0), -torch.arange(48.0)], 1)
    seen = PartitionTasks(images).sample(9, 3, 2, 3, torch.Generator().manual_seed(2))
    told = PartitionTasks(images, None, features).sample(9, 3, 2, 3, torch.Generator().manual_seed(2))
    assert told.support.shape == (9, 3, 2, 2) and torch.equal(told.query[..., 1], -told.query[..., 0])
    assert torch.equal(told.support[..., 0].long(), identity(seen.support))


@pytest.mark.parametrize("source", ["partition", "attributes", "unlabeled"])
def test_bad_features_are_refused(source):
    images, z = numbered(), torch.zeros(48, 3)
    images.attributes, one = torch.ones(48, 4, dtype=torch.uint8), torch.zeros(1, 3, 2, dtype=torch.int64)
    make = {"partition": lambda z: PartitionTasks(images, None, z), "unlabeled": lambda z: UnlabeledSets(images, z),
            "attributes": lambda z: AttributeTasks(images, one, z)}[source]  # fmt: skip
    with pytest.raises(ValueError, match="features are of 47 images but numbered train has 48"):
        make(z[1:])
    z[3, 1], z[7, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="2 of 48 features are not finite"):
        make(z)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_mixed_tasks_come_from_each_source_in_proportion(share):
    images = numbered(4, 12)
    mixed = MixedTasks(PartitionTasks(images), PartitionTasks(images, torch.arange(48) % 4), share)
    episodes = mixed.sample(2000, 3, 1, 2, torch.Generator().manual_seed(0))
    drawn = torch.cat([identity(episodes.support), identity(episodes.query)], 2)
    by_label = (drawn // 12 == drawn[..., :1] // 12).all(2).all(1)
    by_stripe = (drawn % 4 == drawn[..., :1] % 4).all(2).all(1)
    assert (by_label ^ by_stripe).all()
    assert abs(by_label.float().mean() - share) < 0.03
    with pytest.raises(ValueError, match="share=2 is not a probability"):
        MixedTasks(mixed, mixed, 2)


def test_attribute_tasks_put_all_three_values_against_none():
    images = numbered(1, 200)
    images.attributes = (torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    images.attribute_names = list("abcde")
    prototypes = attribute_prototypes(images, list("abcde"), 6)
    episodes = AttributeTasks(images, prototypes).sample(300, 2, 2, 4, torch.Generator().manual_seed(1))
    drawn = torch.cat([identity(episodes.support), identity(episodes.query)], 2)  # [T, 2, 6]
    assert all(len(set(row.tolist())) == 6 for row in drawn.flatten(0, 1))
    values = images.attributes[drawn].float().mean(2)  # [T, 2, 5]: 0 or 1 where the six members agree
    opposed = ((values[:, 0] == 0) & (values[:, 1] == 1)) | ((values[:, 0] == 1) & (values[:, 1] == 0))
    assert (opposed.sum(1) >= 3).all()
    assert 0.4 < values[:, 0].mean() < 0.6  # which of the two classes comes first is a coin
    with pytest.raises(ValueError, match=r"no three attributes of .* \(200 images\) make two classes"):
        AttributeTasks(images, attribute_prototypes(images, list("abcde"), 150))
    with pytest.raises(ValueError, match="have 2 classes, not 3"):
        AttributeTasks(images, prototypes).sample(1, 3, 2, 4, torch.Generator())
    with pytest.raises(ValueError, match=r"fewer than 50 \+ 60 images"):
        AttributeTasks(images, prototypes).sample(1, 2, 50, 60, torch.Generator())


def test_one_s_own_partition_and_features_may_be_of_numpy():
    images, generator = numbered(), torch.Generator
    ours = PartitionTasks(images, images.labels.numpy(), torch.arange(48.0).view(48, 1).numpy())
    episodes = ours.sample(4, 3, 2, 2, generator().manual_seed(0))
    assert torch.equal(episodes.support, PartitionTasks(images, None, torch.arange(48.0).view(48, 1)).sample(
        4, 3, 2, 2, generator().manual_seed(0)).support)  # fmt: skip


def test_images_that_are_divided_by_255_already_are_refused():
    images = numbered()
    images.images = images.images / 255
    with pytest.raises(ValueError, match="uint8, 0 to 255, not torch.float32; pass other numbers as features"):
        PartitionTasks(images)


@pytest.mark.parametrize("numbers", [(0, 2, 1, 1), (1, 0, 1, 1), (1, 2, 0, 1), (1, 2, 1, 0)])
def test_an_episode_needs_one_or_more_of_each(numbers):
    images = ImageSet(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.arange(8) // 4, ["a", "b"], [], "x", "train")
    with pytest.raises(ValueError, match="use 1 or more of each"):
        PartitionTasks(images).sample(*numbers, torch.Generator())
