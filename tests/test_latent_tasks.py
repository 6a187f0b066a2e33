"""Tasks out of a latent space, and UMTRA's, against what LASIUM's released code does, written out per sample."""

import pytest
import torch
from torch import nn

from umeta_core.augmentation import AugmentedTasks, auto_augment, shift, umtra_drawings, zero_out
from umeta_core.data import ImageSet
from umeta_core.generators import MSGAN, VAE, mode_seeking
from umeta_core.latent_tasks import LatentTasks, in_class
from umeta_core.maml import MAML
from umeta_core.networks import MLP, Conv4
from umeta_core.protonets import ProtoNet
from umeta_core.training import train

SIDE = 6


class Linear:
    """A generator whose images are its latents, a few to a channel, and whose encoder is exact up to `std`."""

    def __init__(self, latent=2 * SIDE * SIDE, std=None):
        self.latent, self.std, self.batches = latent, std, []

    def generate(self, z):
        self.batches.append(len(z))
        return z.view(len(z), -1, SIDE, SIDE)

    def encode(self, x):
        return x.flatten(1)


class Variational(Linear):
    def posterior(self, x):
        return x.flatten(1), torch.full_like(x.flatten(1), self.std)


def photos(n=40, channels=2, side=SIDE, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, channels, side, side), generator=g, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) // 4, [str(c) for c in range(n // 4)], [], "noise", "train")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sources(**options):
    return LatentTasks(photos(), Linear(), fill=None, **options)


def squared(a):
    return a.square().sum(-1)


# Where the policies put their samples


@pytest.mark.parametrize(
    ("policy", "strength", "distance", "norm"),
    [
        ("N", 0.5, 0.25, 1.25),
        ("N", 2.0, 4.0, 5.0),  # the paper's "sigma squared = 2" is a standard deviation
        ("RO", 0.2, 2 * 0.04, 0.68),
        ("RO", 0.4, 2 * 0.16, 0.52),
        ("OC", 0.2, 2 * 0.04, 0.68),
    ],
)
def test_latent_geometry_of_the_policies(policy, strength, distance, norm):
    """In units of L: N is at L sigma^2 from the anchor, RO and OC at 2 L alpha^2; OC and RO end up below the shell."""
    z = LatentTasks(photos(), Linear(128), policy, strength, own_noise=0).latents(300, 5, 6, seeded())[0]
    anchor, samples = z[:, :, :1], z[:, :, 1:]
    assert squared(anchor).mean().item() / 128 == pytest.approx(1, rel=0.02)
    assert squared(samples - anchor).mean().item() / 128 == pytest.approx(distance, rel=0.02)
    assert squared(samples).mean().item() / 128 == pytest.approx(norm, rel=0.02)
    assert squared(anchor[:, 0] - anchor[:, 1]).mean().item() / 128 == pytest.approx(2, rel=0.03)


def test_random_out_of_class_latents_are_standard_normal_and_of_no_class():
    z = LatentTasks(photos(), Linear(64), "RO", 0.4).latents(200, 5, 6, seeded())[0]
    anchor = z[:, :, :1]
    v = anchor + (z[:, :, 1:] - anchor) / 0.4
    assert abs(v.mean()) < 0.01 and v.std().item() == pytest.approx(1, rel=0.01)
    for other in (anchor, anchor.roll(1, 1), v.roll(1, 2)):  # neither an anchor nor the v of another sample
        cosine = nn.functional.cosine_similarity(v, other.expand_as(v), dim=-1)
        assert abs(cosine.mean()) < 0.01


def test_sign_extrapolates():
    both = [sources(policy="RO", strength=0.2, sign=s).latents(50, 5, 3, seeded())[0] for s in (1, -1)]
    anchor = both[0][:, :, :1]
    torch.testing.assert_close(both[0][:, :, 1:] + both[1][:, :, 1:], 2 * anchor.expand(-1, -1, 2, -1))
    assert squared(both[1][:, :, 1:]).mean() > 1.3 * squared(anchor).mean()  # 1.2^2 + 0.2^2


@pytest.mark.parametrize(("way", "count"), [(5, 5), (5, 12), (3, 4), (2, 3)])
def test_other_classes_take_turns_as_in_the_released_code(way, count):
    z = torch.randn(2, way, 7, generator=seeded())
    made = in_class(z, count, "OC", 0.4, seeded(1))
    for t in range(2):
        for c in range(way):
            for i in range(1, count + 1):
                want = z[t, c] + 0.4 * (z[t, (c + i) % way] - z[t, c])
                close = torch.allclose(made[t, c, i - 1], want, atol=1e-6)
                assert close == (i % way != 0)  # there its target would be itself; it is noise


def test_own_noise_has_unit_variance_around_the_anchor_and_can_be_left_out():
    z = torch.randn(100, 5, 64, generator=seeded())
    noise = in_class(z, 10, "OC", 0.2, seeded(1))[:, :, 4::5] - z.unsqueeze(2)
    assert noise.shape == (100, 5, 2, 64) and noise.std().item() == pytest.approx(1, rel=0.01)
    assert abs(nn.functional.cosine_similarity(noise[:, :, 0], noise[:, :, 1], dim=-1).mean()) < 0.02
    clean = in_class(z, 9, "OC", 0.2, seeded(1), own_noise=0)
    for c in range(5):
        for i in range(9):
            other = (c + 1 + i % 4) % 5
            torch.testing.assert_close(clean[:, c, i], z[:, c] + 0.2 * (z[:, other] - z[:, c]))


@pytest.mark.parametrize(("policy", "strength"), [("N", 0.08), ("RO", 0.6), ("OC", 0.37)])
def test_latents_on_the_sphere_stay_there(policy, strength):
    model = Linear(512)
    model.sphere = True
    z = LatentTasks(photos(), model, policy, strength, own_noise=0.03).latents(20, 2, 6, seeded())[0]
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(20, 2, 6))
    if policy == "N":  # before it is put back the noise has norm 0.08 sqrt(512) = 1.81
        assert (z[:, :, :1] * z[:, :, 1:]).sum(-1).mean().item() == pytest.approx(1 / (1 + 1.81**2) ** 0.5, abs=0.02)


# Anchors


def test_encoded_anchors_keep_the_real_image_as_first_sample():
    data = photos()
    for policy in ("N", "RO", "OC"):
        episodes = LatentTasks(data, Linear(), policy, 0.1, anchors="encoded", shift=0).sample(6, 5, 1, 5, seeded())
        real = (episodes.support.mul(255).round().byte().unsqueeze(3) == data.images).flatten(4).all(-1)
        assert (real.sum(-1) == 1).all()  # each is one image of the set
        index = real.float().argmax(-1)[..., 0]
        assert all(len(set(task.tolist())) == 5 for task in index)
        z, drawn = LatentTasks(data, Linear(), policy, 0.1, anchors="encoded").latents(6, 5, 6, seeded())
        assert torch.equal(drawn, index)
        torch.testing.assert_close(z[:, :, 0].view(6, 5, 2, SIDE, SIDE), episodes.support[:, :, 0])
        torch.testing.assert_close(z[:, :, 1:].view(episodes.query.shape), episodes.query)


def test_posterior_is_drawn_once_for_noise_and_anew_for_each_sample_between_classes():
    data, model = photos(), Variational(std=0.3)
    code = model.encode(data.images.float() / 255)
    z, index = LatentTasks(data, model, "N", 0.0, anchors="encoded").latents(100, 5, 4, seeded())
    assert (z[:, :, 0] - code[index]).std().item() == pytest.approx(0.3, rel=0.02)
    assert (z == z[:, :, :1]).all()
    z, index = LatentTasks(data, model, "OC", 0.2, anchors="encoded").latents(100, 5, 4, seeded())
    for i in range(1, 4):
        v = code[index].roll(-i, 1)
        residual = z[:, :, i] - (code[index] + 0.2 * (v - code[index]))
        assert residual.std().item() == pytest.approx(0.3 * (0.8**2 + 0.2**2) ** 0.5, rel=0.02)


def test_rejection_keeps_anchors_apart():
    epsilon = 246.09**0.5  # of the later code, which compares squares; 3.8 % of draws pass
    tasks = LatentTasks(photos(), Linear(128), "RO", 0.2, epsilon=epsilon)
    z = tasks.latents(50, 5, 2, seeded())[0][:, :, 0]
    assert len(z) == 50 and all(torch.pdist(task).min() > epsilon for task in z)
    free = LatentTasks(photos(), Linear(128), "RO", 0.2).latents(2000, 5, 2, seeded())[0][:, :, 0]
    share = torch.stack([torch.pdist(task).min() > epsilon for task in free]).float().mean()
    assert 0.025 < share < 0.055
    assert z.norm(dim=-1).mean() > free.norm(dim=-1).mean() + 0.3  # the test prefers long latents
    encoded = LatentTasks(photos(), Linear(), "RO", 0.2, anchors="encoded", epsilon=3.3)
    z, index = encoded.latents(20, 5, 2, seeded())
    assert all(torch.pdist(task).min() > 3.3 for task in z[:, :, 0])
    torch.testing.assert_close(z[:, :, 0], encoded.network.encode(photos().images.float() / 255)[index])


def test_impossible_rejection_is_an_error():
    with pytest.raises(ValueError, match=r"0 of \d+ draws had 5 anchors .* epsilon=40 .* nearest are 1\d"):
        LatentTasks(photos(), Linear(128), epsilon=40.0).sample(4, 5, 1, 5, seeded())


# Shifts


@pytest.mark.parametrize("fill", [0, 1])
def test_shift_equals_pad_and_crop(fill):
    x = torch.rand(9, 2, 7, 5, generator=seeded())
    right, down = torch.randint(-5, 5, (2, 9), generator=seeded())
    moved = shift(x, right, down, fill)
    for image, dx, dy, got in zip(x, right.tolist(), down.tolist(), moved):
        padded = nn.functional.pad(image, (5, 5, 5, 5), value=fill)
        assert torch.equal(got, padded[:, 5 - dy : 5 - dy + 7, 5 - dx : 5 - dx + 5])


@pytest.mark.parametrize(("fill", "value"), [("ink", 1.0), ("background", 0.0)])
def test_only_queries_are_shifted_each_by_minus_5_to_4_pixels(fill, value):
    class Dot(Linear):
        def generate(self, z):
            x = torch.full((len(z), 1, 15, 15), 0.5)
            x[:, :, 7, 7] = 0.25
            return x

    tasks = LatentTasks(photos(channels=1, side=15), Dot(), "N", 0.5, fill=fill).sample(40, 5, 1, 5, seeded())
    assert (tasks.support[..., 7, 7] == 0.25).all() and (tasks.support[..., 7, 7].numel() == 200)
    y, x = ((tasks.query.flatten(0, 3) == 0.25).nonzero()[:, 1:] - 7).T
    assert len(x) == 1000  # one dot in each query
    assert set(x.tolist()) == set(y.tolist()) == set(range(-5, 5))
    assert (x != y).any() and abs(torch.corrcoef(torch.stack([x, y]).float())[0, 1]) < 0.1
    border = tasks.query[(tasks.query != 0.5) & (tasks.query != 0.25)]
    assert len(border) > 1000 and (border == value).all()
    unmoved = LatentTasks(photos(channels=1, side=15), Dot(), fill=None).sample(4, 5, 1, 5, seeded())
    assert (unmoved.query[..., 7, 7] == 0.25).all()


# The stream of tasks


@pytest.mark.parametrize("ahead", [1, 4])
def test_same_generator_same_tasks(ahead):
    options = dict(policy="OC", anchors="encoded", ahead=ahead)
    a, b = (LatentTasks(photos(), Variational(std=0.1), **options) for _ in range(2))
    ga, gb, gc = seeded(3), seeded(3), seeded(4)
    for _ in range(6):
        x, y, other = (s.sample(2, 5, 1, 3, g) for s, g in ((a, ga), (b, gb), (b, gc)))
        assert torch.equal(x.support, y.support) and torch.equal(x.query, y.query)
        assert not torch.equal(x.support, other.support)
    assert x.support.shape == (2, 5, 1, 2, SIDE, SIDE) and x.query.shape == (2, 5, 3, 2, SIDE, SIDE)


def test_blocks_are_generated_at_once_and_served_without_repetition():
    source, g = sources(policy="N", strength=0.5, ahead=4), seeded()
    supports = torch.cat([source.sample(3, 5, 1, 5, g).support for _ in range(10)])
    assert source.network.batches == [4 * 3 * 5 * 6] * 3
    assert len(supports.flatten(1).unique(dim=0)) == 30


def test_tasks_depend_on_the_state_of_the_generator_only():
    """A generator restored in the middle of a block, another source, and calls in between: the same tasks follow."""
    g, first = seeded(5), sources(ahead=4)
    states, tasks = [], []
    for _ in range(9):
        states.append(g.get_state())
        tasks.append(first.sample(2, 5, 1, 5, g).query)
    for step in (6, 1, 8, 3):
        restored, fresh = torch.Generator(), sources(ahead=4)
        restored.set_state(states[step])
        for want in tasks[step:]:
            assert torch.equal(fresh.sample(2, 5, 1, 5, restored).query, want)
    one, two = seeded(6), seeded(6)
    torch.rand(1, generator=two)  # a generator that was used before is another one
    assert not torch.equal(first.sample(2, 5, 1, 5, one).query, first.sample(2, 5, 1, 5, two).query)


@pytest.mark.parametrize("ahead", [1, 7])
def test_interrupted_and_resumed_training_equals_uninterrupted(tmp_path, ahead):
    def run(steps, checkpoint=None):
        learner = MAML(MLP([2 * SIDE * SIDE, 8, 5], seeded()), 0.1, inner_steps=1)
        train(learner, sources(ahead=ahead), steps=steps, tasks=2, way=5, shot=1, query=3, checkpoint=checkpoint,
              progress=False)  # fmt: skip
        return learner.network.weights[0]

    file = tmp_path / "run.pt"
    run(10, file)  # stops in the middle of the second block
    resumed = run(17, file)
    assert torch.equal(resumed, run(17))


def test_a_vae_makes_tasks_in_evaluation_mode_whatever_is_made_with_them():
    data = photos(channels=1, side=28)
    vae = VAE(generator=seeded()).train()
    source = LatentTasks(data, vae, "OC", 0.2, anchors="encoded")
    many = source.sample(3, 5, 1, 5, seeded())
    assert not vae.training and many.query.shape == (3, 5, 5, 1, 28, 28)
    z, index = source.latents(3, 5, 6, seeded())
    torch.testing.assert_close(many.support[:, :, 0], data.images[index] / 255)
    assert not many.query.requires_grad


# UMTRA


def test_umtra_has_n_different_images_and_copies_of_its_own_for_each_query():
    data = photos()
    tasks = AugmentedTasks(data, lambda x, g: x).sample(50, 5, 1, 3, seeded())
    assert tasks.support.shape == (50, 5, 1, 2, SIDE, SIDE)
    index = (tasks.support.mul(255).round().byte().unsqueeze(3) == data.images).flatten(4).all(-1).float().argmax(-1)
    assert all(len(set(task.flatten().tolist())) == 5 for task in index)
    assert len(index.unique()) == 40
    assert torch.equal(tasks.query, tasks.support.expand(-1, -1, 3, -1, -1, -1))
    changed = AugmentedTasks(data).sample(50, 5, 1, 3, seeded())
    assert torch.equal(changed.support, tasks.support)
    assert not torch.equal(changed.query[:, :, 0], changed.query[:, :, 1])
    again = AugmentedTasks(data).sample(50, 5, 1, 3, seeded())
    assert torch.equal(changed.query, again.query)


def test_umtra_drawings_are_zeroed_and_shifted():
    x = torch.full((4000, 1, 13, 13), 200, dtype=torch.uint8)
    x[:, :, 6, 6] = 100
    half = zero_out(x, 0.5, seeded())
    assert half.dtype == torch.uint8 and set(half.unique().tolist()) == {0, 100, 200}
    assert (half == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    rgb = zero_out(torch.full((9, 3, 8, 8), 7), 0.5, seeded())
    assert ((rgb == 0).sum(1) % 3 == 0).all()  # all channels of a pixel
    moved = umtra_drawings(x, seeded(), zeroed=0)
    down, right = ((moved == 100).nonzero()[:, 2:] - 6).T
    assert len(down) == 4000 and set(down.tolist()) == set(right.tolist()) == set(range(-6, 7))
    assert (down.abs() == 6).float().mean().item() == pytest.approx(1 / 12, abs=0.02)  # half as often each as others
    assert set(moved.unique().tolist()) == {0, 100, 200}


def test_auto_augment_is_seeded_and_leaves_the_global_generator_alone():
    pytest.importorskip("torchvision")
    x = photos(n=12, channels=3, side=20).images
    before = torch.get_rng_state()
    a, b, c = (auto_augment(x, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.dtype == torch.uint8 and a.shape == x.shape
    same = auto_augment(x[:1].expand(12, -1, -1, -1), seeded())
    assert len(same.flatten(1).unique(dim=0)) > 4  # a policy for each image
    tasks = AugmentedTasks(photos(n=12, channels=3, side=20), auto_augment).sample(1, 5, 1, 2, seeded())
    assert tasks.query.min() >= 0 and tasks.query.max() <= 1


def test_photographs_are_augmented_by_the_policy_of_imagenet(monkeypatch):
    transforms = pytest.importorskip("torchvision.transforms")
    asked, real = [], transforms.AutoAugment
    monkeypatch.setattr(transforms, "AutoAugment", lambda policy: asked.append(policy) or real(policy))
    auto_augment(photos(n=2, channels=3, side=20).images, seeded())
    assert asked == [transforms.AutoAugmentPolicy.IMAGENET]


def test_both_learners_train_on_both_sources():
    data = photos(channels=1, side=16)

    class Small(Linear):
        def generate(self, z):
            return torch.sigmoid(z).view(len(z), 1, 16, 16)

    for source in (LatentTasks(data, Small(256)), AugmentedTasks(data)):
        for learner in (MAML(Conv4(1, 16, 4, way=5), 0.4, 1, inner_loss="mean"), ProtoNet(Conv4(1, 16, 4))):
            history = train(learner, source, steps=2, tasks=2, way=5, shot=1, query=2, progress=False)
            assert history["loss"][-1] > 0


# Errors


def test_bad_options_are_refused():
    data = photos()
    for options, message in (
        ({"policy": "noise"}, "policy='noise' is not known; use N, RO or OC"),
        ({"anchors": "real"}, "anchors='real'"),
        ({"sign": 2}, "sign=2"),
        ({"fill": "white"}, "fill='white' is not known; use ink, background or None"),
        ({"ahead": 0}, "ahead=0"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentTasks(data, Linear(), **options)
    with pytest.raises(ValueError, match="Conv4 is no generator"):
        LatentTasks(data, Conv4())

    class Blind:
        latent, generate = 3, None

    for model in (Blind(), MSGAN(latent=4, width=8)):
        with pytest.raises(ValueError, match=f"{type(model).__name__} cannot encode"):
            LatentTasks(data, model, anchors="encoded")
    with pytest.raises(ValueError, match=r"codes of \(72,\) numbers but latents have 36"):
        LatentTasks(data, Linear(36), anchors="encoded").sample(2, 5, 1, 5, seeded())
    with pytest.raises(ValueError, match=r"images of \(1, 6, 6\) but noise has \(2, 6, 6\)"):
        LatentTasks(data, Linear(36)).sample(2, 5, 1, 5, seeded())
    with pytest.raises(ValueError, match="41-way tasks need 41 images; noise train has 40"):
        LatentTasks(data, Linear(), anchors="encoded").sample(2, 41, 1, 5, seeded())
    with pytest.raises(ValueError, match="1 support image, not 5"):
        AugmentedTasks(data).sample(2, 5, 5, 5, seeded())
    with pytest.raises(ValueError, match="41-way tasks need 41 images"):
        AugmentedTasks(data).sample(2, 41, 1, 5, seeded())


def test_an_unknown_policy_or_ratio_is_not_taken_for_another():
    with pytest.raises(ValueError, match="policy='ocean' is not known"):
        in_class(torch.zeros(1, 2, 4), 3, "ocean", 0.5, torch.Generator())
    with pytest.raises(ValueError, match="ratio='realesed' is not known"):
        mode_seeking(*torch.rand(4, 2, 3), "realesed")


def test_umtra_zeroes_half_of_the_pixels():
    x = torch.full((2000, 1, 13, 13), 200, dtype=torch.uint8)
    center = umtra_drawings(x, seeded())[:, :, 6, 6]  # no shift of up to 6 leaves it uncovered
    assert (center == 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
