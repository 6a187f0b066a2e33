"""SimCLR: loss, views and schedule against their literal form; fitting, resuming, bad input."""

import colorsys
import math

import pytest
import torch

from umeta_core.embeddings import simclr
from umeta_core.embeddings.simclr import SimCLR, contrastive_loss, rate, turn_hue, views


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n=32, size=32, seed=0):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator(seed))


def test_loss_is_equation_1():
    h, t, n = torch.randn(8, 5, generator=generator(), dtype=torch.float64), 0.5, 4
    cosine = torch.cosine_similarity(h.unsqueeze(1), h.unsqueeze(0), dim=2)
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum(math.exp(cosine[i, k] / t) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(cosine[i, j] / t) / others) / (2 * n)
    loss, _ = contrastive_loss(h, t)
    assert loss.item() == pytest.approx(total, rel=1e-12)


def test_equal_views_are_found_and_shuffled_ones_are_not():
    h = torch.randn(20, 16, generator=generator())
    assert contrastive_loss(torch.cat([h, h]), 0.5)[1] == 1
    assert contrastive_loss(torch.cat([h, h.roll(1, 0)]), 0.5)[1] == 0


def test_hue_as_in_the_standard_library():
    x = torch.rand(50, 3, 1, 1, generator=generator(), dtype=torch.float64)
    x[0] = x[0, 0]  # gray has no hue
    turn = torch.rand(50, 1, 1, 1, generator=generator(1), dtype=torch.float64) - 0.5
    for pixel, angle, ours in zip(x.flatten(1), turn.flatten(), turn_hue(x, turn).flatten(1)):
        h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
        assert ours.tolist() == pytest.approx(colorsys.hsv_to_rgb((h + angle.item()) % 1, s, v), abs=1e-9)


def test_views_stay_in_range_and_one_fifth_is_gray():
    x = torch.rand(500, 3, 32, 32, generator=generator())
    seen = views(x, generator(1))
    assert seen.shape == x.shape and seen.min() >= 0 and seen.max() <= 1
    gray = (seen.amax(1) - seen.amin(1)).amax((1, 2)) < 1e-6
    assert 0.13 < gray.float().mean() < 0.27
    assert torch.equal(seen, views(x, generator(1)))


def test_a_view_shows_a_part():
    ramp = torch.arange(32.0).div(31).expand(200, 1, 32, 32)  # brightness is the column
    spread = views(ramp, generator()).amax((1, 2, 3)) - views(ramp, generator()).amin((1, 2, 3))
    assert spread.min() < 0.4 and spread.max() > 0.85


def test_the_released_schedule_climbs_again():
    factors = [rate("released", epoch, 400) for epoch in range(400)]
    assert factors[:11] == [1.0] * 11
    assert factors[85] == pytest.approx(0, abs=1e-12) and factors[160] == pytest.approx(1)
    assert rate("cosine", 0, 400) == 1 and rate("cosine", 399, 400) < 1e-4 and rate("constant", 399, 400) == 1


def test_fitting_learns_to_find_the_other_view_and_resumes_exactly(tmp_path):
    images, whole, part = random_images(128), SimCLR(size=32, generator=generator()), tmp_path / "fit.pt"
    history = whole.fit(images, epochs=6, batch=32, progress=False)
    assert history["loss"][-1] < history["loss"][0]
    again = SimCLR(size=32, generator=generator())

    def interrupted(images, epoch, epochs, source):
        if epoch == 3:
            raise KeyboardInterrupt
        return SimCLR.start_epoch(again, images, epoch, epochs, source)

    again.start_epoch = interrupted
    with pytest.raises(KeyboardInterrupt):
        again.fit(images, epochs=6, batch=32, checkpoint=part, save_every=0, progress=False)
    resumed = SimCLR(size=32, generator=generator(1))
    resumed.fit(images, epochs=6, batch=32, checkpoint=part, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_vectors_of_84_pixels_have_256_numbers_none_negative():
    z = SimCLR(generator=generator()).embed(random_images(4, 84))
    assert z.shape == (4, 256) and z.min() >= 0


def test_colors_are_normalized_by_imagenet():
    model = SimCLR(3, 32, generator=torch.Generator().manual_seed(0)).eval()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(model.encode(x), model.encoder((x - shift) / scale))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="20x20 are too small"):
        SimCLR(size=20)
    with pytest.raises(ValueError, match="'linear' is not known; use released, cosine or constant"):
        SimCLR(schedule="linear")
    with pytest.raises(ValueError, match=r"takes images of \(3, 32, 32\)"):
        SimCLR(size=32).embed(random_images(2, 40))


def test_the_schedule_sets_the_rate_of_adam():
    model, rates = SimCLR(size=32, lr=2e-3, schedule="cosine", generator=generator()), []
    model.opt = model.optimizers()
    for epoch in (0, 5):
        model.start_epoch(random_images(4), epoch, 10, generator())
        rates.append(model.opt[0].param_groups[0]["lr"])
    assert rates == pytest.approx([2e-3, 1e-3])


def test_four_of_five_views_change_their_colors():
    x = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1).expand(1000, 3, 32, 32)  # one color: a part looks like the whole
    same = (views(x, generator()) - x).abs().amax((1, 2, 3)) < 1e-4  # neither changed nor gray: 0.2 times 0.8
    assert 0.12 < same.float().mean() < 0.20


def test_the_loss_has_the_temperature_of_the_model():
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator())
    losses = []
    for temperature in (0.1, 0.5):
        model = SimCLR(size=32, temperature=temperature, generator=generator())
        model.opt = model.optimizers()
        losses.append(model.step(images, torch.arange(8), generator())["loss"].item())
    assert abs(losses[0] - losses[1]) > 0.05


def test_settings_are_those_of_the_released_code():
    """Temperature and projection are the paper's, too; the rate is ten times the paper's."""
    model = SimCLR(3, 32)
    assert (model.temperature, model.lr, model.schedule, model.area, model.color) == (0.5, 1e-3, "released", 0.08, 0.8)
    assert model.projection[-1].out_features == 128


def test_a_hue_turns_by_a_fifth_of_the_circle_at_most(monkeypatch):
    """``color / 4`` to either side: jitter of 0.8, 0.8, 0.8 and 0.2."""
    turns = []
    monkeypatch.setattr(simclr, "turn_hue", lambda x, turn: turns.append(turn) or x)
    views(torch.rand(500, 3, 8, 8, generator=generator()), generator())
    assert 0.19 < turns[0].max() <= 0.2 and -0.2 <= turns[0].min() < -0.19
