"""Chapter 5: the verdict's rule, written out, equals the function; the scratch code does what the text says."""

import itertools
import math

import pytest
import torch
from scratch import scratch_namespace

from umeta_core.evaluation import interval
from umeta_core.results import TOLERANCE, difference, pack_counts, verdict


@pytest.fixture(scope="module")
def scratch():
    return scratch_namespace("book/05_results.md")


GRID = list(itertools.product((49.0, 51.49, 51.51, 53.0, 54.1, 47.0), (0.2, 1.0), (0.3, 2.0), (0.0, 0.6, 2.0)))


def test_eq_verdict_tolerance():
    assert TOLERANCE == 1.5
    for ours, h_paper, h_ours, s in GRID:
        within = abs(ours - 50.0) <= max(1.5, 2 * s, h_paper + h_ours)
        assert (verdict(50.0, h_paper, ours, h_ours, s) == "reproduced") == within


def test_eq_paired(scratch):
    g = torch.Generator().manual_seed(0)
    common, *own = torch.randint(0, 9, (3, 300), generator=g)
    right = [common + each for each in own]  # of 5 x 5 answers
    a, b = (4.0 * r.double() for r in right)  # percent
    cells = [{"way": 5, "shot": 1, "query": 5, "tasks": 300, "accuracy": mean.mean().item(), "ci95": 1.0,
              "answers": {"seed": 0, "correct": pack_counts(r.tolist())}}
             for r, mean in zip(right, (a, b))]  # fmt: skip
    rho = torch.corrcoef(torch.stack([a, b]))[0, 1]
    (s_a, s_b), gap = (x.std(correction=0) for x in (a, b)), (a - b).mean().item()
    half = 1.96 * ((s_a**2 + s_b**2 - 2 * rho * s_a * s_b) / 300).sqrt().item()
    assert difference(*cells) == pytest.approx((gap, half))
    assert half == pytest.approx(scratch["paired_half_width"](a, b).item())


def test_scratch_verdict_equals_the_library(scratch):
    words = {scratch["verdict"](50.0, h, ours, h2, s) for ours, h, h2, s in GRID}
    assert words == {"reproduced", "higher", "lower"}
    for ours, h_paper, h_ours, s in GRID:
        assert scratch["verdict"](50.0, h_paper, ours, h_ours, s) == verdict(50.0, h_paper, ours, h_ours, s)


def test_implied_std_inverts_the_interval(scratch):
    accuracies = torch.rand(500, generator=torch.Generator().manual_seed(0))
    std = scratch["implied_std"](interval(accuracies), tasks=500)
    assert math.isclose(std, 100 * accuracies.std(correction=0).item(), rel_tol=1e-5)


def test_coin_std_is_that_of_simulated_coins(scratch):
    coins = (torch.rand(20_000, 25, generator=torch.Generator().manual_seed(0)) < 0.7).float().mean(1)
    assert math.isclose(scratch["coin_std"](70, 5, 5), 100 * coins.std().item(), rel_tol=0.03)


def test_paired_interval_follows_the_correlation(scratch):
    g = torch.Generator().manual_seed(0)
    common, a, b = torch.randn(3, 4000, generator=g)
    a, b = common + 0.5 * a, common + 0.5 * b
    paired, unpaired = scratch["paired_half_width"](a, b), scratch["unpaired_half_width"](a, b)
    torch.testing.assert_close(paired, torch.tensor(100 * interval((a - b) / 100) / 100).to(paired), rtol=1e-4, atol=0)
    assert paired < unpaired
    assert scratch["paired_half_width"](a, -b) > scratch["unpaired_half_width"](a, -b)
