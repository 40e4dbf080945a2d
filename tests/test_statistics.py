"""Intervals over runs against scipy, and what the shift of ASD is in expectation."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scaledreamer.core.settings import UsageError
from scaledreamer.core.statistics import (
    bootstrap_difference,
    difference_text,
    equivalence_p,
    estimate,
    holm,
    share_interval,
    proportion_text,
    t_half_width,
)
from scaledreamer.distill.conditioning import make_conditioning
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.distill.gradient import sds_weight, uniform_weight
from scaledreamer.distill.methods import asd, csd, sds
from scaledreamer.distill.shift import RangedShift, constant_shift, deterministic_shift
from scaledreamer.distill.shift import random_shift, sqrt_shift
from scaledreamer.distill.shift_identity import (
    sds_guidance,
    sds_share,
    shift_probabilities,
    shift_weights,
)
from scaledreamer.distill.timesteps import annealed_window, sample_timesteps
from scaledreamer.distill.twins import asd_twin, sds_twin
from scaledreamer.noise_error.error import ErrorCurve
from scaledreamer.prior.schedule import scaled_linear
from scaledreamer.toy.measures import energy_distance
from scaledreamer.toy.points import ring
from scaledreamer.toy.study import PointMeasures, band

NBS = Path(__file__).resolve().parent.parent / "nbs"
SHIFTS = {
    "random": random_shift(0.1),
    "deterministic": deterministic_shift(0.2),
    "constant": constant_shift(50),
    "root": sqrt_shift(0.1),
    "none": constant_shift(0),
    "wide": random_shift(1.0),
}
WINDOWS = ((20, 980), (500, 980), (0, 999), (300, 300), (990, 999))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("count", [2, 3, 10, 100])
def test_estimate_is_student_s_interval(count, level):
    x = np.random.default_rng(count).normal(3.0, 2.0, count)
    found = estimate(list(x), level)
    expected = stats.ttest_1samp(x, 0).confidence_interval(level)
    assert np.allclose([found.low, found.high], [expected.low, expected.high], rtol=1e-10)
    assert math.isclose(found.std, stats.tstd(x)) and found.count == count
    assert math.isclose(t_half_width(found.std, count, level), found.high - found.mean)


def test_one_run_and_equal_runs_are_named():
    assert estimate([0.7621]).text() == "0.762 (one run)"
    assert estimate([0.7621]).std is None and estimate([0.7621]).low is None
    assert estimate([0.0, 0.0, 0.0]).text(2) == "0.00 (all 3 equal)"
    assert estimate([1, 2, 3]).text(1) == "2.0 ± 1.0 [-0.5, 4.5]"


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_estimate_refuses_what_has_no_mean(values):
    with pytest.raises(UsageError, match="expected finite numbers"):
        estimate(values)


@pytest.mark.parametrize("level", [0, 1, -0.1, 95, math.nan])
def test_levels_are_between_0_and_1(level):
    for call in (
        lambda: estimate([1.0, 2.0], level),
        lambda: estimate([1.0], level),
        lambda: share_interval(1, 2, level),
        lambda: bootstrap_difference([1.0], [2.0], level),
    ):
        with pytest.raises(UsageError, match="the level is"):
            call()


@pytest.mark.parametrize("count", [1, 3, 10, 15])
def test_share_interval_is_that_of_clopper_and_pearson(count):
    for successes in range(count + 1):
        expected = stats.binomtest(successes, count).proportion_ci(0.95, method="exact")
        assert np.allclose(share_interval(successes, count), expected, atol=1e-9)
    assert proportion_text(3, 3) == "3 of 3 [0.29, 1.00]"
    for bad in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(UsageError, match="expected 0 to all"):
            share_interval(*bad)


def test_paired_bootstrap_is_scipy_s_over_one_axis():
    draws = np.random.default_rng(0).normal(size=(2, 12)) + [[0.5], [0.0]]
    mean, low, high = bootstrap_difference(*draws, draws=100_000)
    expected = stats.bootstrap(
        tuple(draws),
        lambda a, b, axis: (a - b).mean(axis),
        paired=True,
        method="percentile",
        n_resamples=100_000,
        rng=1,
    ).confidence_interval
    assert math.isclose(mean, (draws[0] - draws[1]).mean())
    assert np.allclose([low, high], [expected.low, expected.high], atol=0.02)


def test_paired_bootstrap_crosses_runs_and_prompts():
    "Brute force: rows and columns are drawn with replacement, each on its own."
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 4, 6)) + rng.normal(size=(2, 4, 1))
    mean, low, high = bootstrap_difference(one, other)
    means = []
    for _ in range(6000):
        rows, columns = rng.integers(4, size=4), rng.integers(6, size=6)
        means.append((one - other)[rows][:, columns].mean())
    assert np.allclose([low, high], np.quantile(means, [0.025, 0.975]), atol=0.06)
    swapped = bootstrap_difference(other, one)
    assert np.allclose(swapped, [-mean, -high, -low], atol=0.03)
    assert difference_text([1.0], [3.0], 1) == "-2.0 [-2.0, -2.0]"
    with pytest.raises(UsageError, match="expected the same runs, prompts"):
        bootstrap_difference(one, other[:, :5])


def test_figures_and_curves_have_the_standard_deviation_of_samples():
    rows = [[1.0, 2.0], [4.0, None], [4.0, 8.0]]
    mean, std = band(rows)
    assert np.allclose(mean, [3.0, 5.0]) and np.allclose(std, [3**0.5, 18**0.5])
    errors = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    low, high = ErrorCurve(torch.tensor([5]), errors, "", ("a",) * 3).band()
    expected = estimate([1.0, 2.0, 6.0])
    assert math.isclose(float(high), expected.high) and float(low) == max(expected.low, 0.0)


def test_the_energy_distance_of_a_study_is_unbiased():
    measures, points = PointMeasures(ring(), "ring"), torch.randn(50, 2)
    expected = energy_distance(points, measures.fresh, unbiased=True)
    assert math.isclose(measures(points)["energy distance"], expected, abs_tol=1e-9)
    own = estimate(measures.of_fresh_data(100, range(60))["energy distance"])
    assert own.low < 0 < own.high


# the committed results


@pytest.mark.parametrize("path", sorted((NBS / "99_experiments/results/ring").glob("*.json")))
def test_committed_rings_hold_every_seed(path):
    study = json.loads(path.read_text())
    for method in study["methods"].values():
        for metric, rows in method["series"].items():
            assert len(rows) == len(study["seeds"]) == len(method["end"][metric])
    own = estimate(study["fresh"]["energy distance"])
    assert own.low < 0 < own.high, "biased: samples of the target have an expectation of 0"


# the identity


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_shift_probabilities_are_those_drawn(name, window):
    shift, rng = SHIFTS[name], torch.Generator().manual_seed(0)
    found = shift_probabilities(shift, window)
    count = window[1] - window[0] + 1
    assert found.shape == (count, 1000)
    assert torch.allclose(found.sum(1), torch.ones(count).double())
    for row in {0, count // 2, count - 1}:
        t = torch.full((20_000,), window[0] + row)
        drawn = shift(t, window[0], 999, rng).bincount(minlength=1000) / 20_000
        assert (drawn - found[row]).abs().max() < 0.02


@pytest.mark.parametrize("weight", [sds_weight, uniform_weight])
@pytest.mark.parametrize("name", SHIFTS)
def test_the_shift_term_is_the_weighted_sum_of_sds_for_every_noise(name, weight):
    "Exactly, on an exact prior: all t and u of one noise, no sampling."
    prior, rng = ring(), torch.Generator().manual_seed(1)
    x, noise = (torch.randn(1, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    u = torch.arange(1000)
    x_u = prior.schedule.add_noise(x.expand(1000, -1), noise.expand(1000, -1), u)
    eps = prior.predict_noise(x_u, u, prior.encode_text(["ring, even"] * 1000).tokens)
    for window in WINDOWS:
        W, plain = shift_weights(SHIFTS[name], prior.schedule, window, weight)
        t = slice(window[0], window[1] + 1)
        after = shift_probabilities(SHIFTS[name], window) @ eps.double()
        left = (plain[t, None] * (eps[t] - after)).sum(0)
        assert abs(float(W.sum())) < 1e-12
        assert torch.allclose(left, W @ (eps - noise).double(), atol=1e-7)
        one = ((W - plain)[:, None] * (eps - noise)).sum(0)
        assert torch.allclose(one, -(plain[t, None] * (after - noise)).sum(0), atol=1e-7)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_asd_is_csd_and_weighted_sds_within_sampling_error(guidance):
    prior, rng, count = ring(), torch.Generator().manual_seed(2), 80_000
    draw = lambda: torch.randn(count, 2, generator=rng)
    x = torch.tensor([[0.4, -0.3]]).expand(count, 2)
    text = make_conditioning(prior, ["ring, even"] * count)
    shift, window = random_shift(0.2), (20, 980)
    t, other = (sample_timesteps(window, count, rng, stratified=False) for _ in range(2))
    left = asd(prior, x, text, t, draw(), shift(t, 20, 999, rng), guidance).gradient
    W = shift_weights(shift, prior.schedule, window)[0]
    u = W.abs().multinomial(count, replacement=True, generator=rng)
    sign = (W.sign()[u] * W.abs().sum()).float()[:, None]
    right = sign * sds(prior, x, text, u, draw(), None, 1.0, uniform_weight).gradient
    right = right + (guidance - 1) * csd(prior, x, text, other, draw()).gradient
    apart = left - right
    assert (apart.mean(0).abs() < t_half_width(apart.std(0), count, 0.9999)).all()
    assert left.mean(0).norm() > 3 * t_half_width(apart.std(0), count, 0.9999).norm()


def test_the_matching_guidance_of_sds_by_window_and_shift():
    "The values that the notebooks cite, and the cases that are exact."
    schedule, fixed = scaled_linear(), (20, 980)
    share = lambda shift, window=fixed: sds_share(shift, schedule, window)
    assert math.isclose(share(random_shift(0.1)), 0.0725, abs_tol=1e-4)
    assert math.isclose(share(random_shift(0.2)), 0.134, abs_tol=6e-4)
    assert math.isclose(share(deterministic_shift(0.1)), 0.143, abs_tol=6e-4)
    assert math.isclose(share(deterministic_shift(0.2)), 0.256, abs_tol=6e-4)
    assert math.isclose(share(constant_shift(50)), 0.182, abs_tol=6e-4)
    release = [annealed_window(100)(step) for step in (0, 50, 100)]
    found = [share(random_shift(0.1), window) for window in release]
    assert np.allclose(found, [0.035, 0.036, 0.044], atol=6e-4)
    assert math.isclose(sds_guidance(7.5, share(random_shift(0.1))), 91, abs_tol=0.5)
    assert share(constant_shift(0)) == 0.0 and sds_guidance(7.5, 0.0) == math.inf
    to_the_end = RangedShift(lambda t, t_min, last: last - t.float())
    ratio = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).sqrt()
    w = sds_weight(schedule, torch.arange(20, 981))
    exact = 1 - w.sum() * ratio[-1] / (w @ ratio[20:981])
    assert math.isclose(share(to_the_end), float(exact), rel_tol=1e-9)
    for window in ((-1, 5), (5, 4), (0, 1000)):
        with pytest.raises(UsageError, match="expected 0 <= smallest <= largest <= 999"):
            shift_probabilities(random_shift(0.1), window)


@settings(max_examples=5, deadline=None)
@given(
    st.floats(1.1, 10),
    st.floats(0.01, 100),
    st.floats(0.01, 0.9),
    st.floats(0.01, 0.9),
    st.sampled_from(["random", "deterministic"]),
)
def test_twins_of_one_setting_are_twins_of_each_other(guidance, weight, eta, other, shift):
    schedule = scaled_linear()
    one = DistillSettings(guidance=guidance, weight=weight, eta=eta)
    two = asd_twin(one, schedule, eta=other, shift=shift)
    first, second = (sds_twin(x, schedule) for x in (one, two))
    assert math.isclose(first.guidance, second.guidance, rel_tol=1e-9)
    assert math.isclose(first.weight, second.weight, rel_tol=1e-9)
    back = asd_twin(two, schedule, eta=eta, shift="random")
    assert math.isclose(back.guidance, guidance, rel_tol=1e-9)
    assert math.isclose(back.weight, weight, rel_tol=1e-9)
    # the part along CSD has the same size in all of them
    for twin in (one, two):
        assert math.isclose(
            (twin.guidance - 1) * twin.weight, (first.guidance - 1) * first.weight, rel_tol=1e-9
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-0.1, 0.1), min_size=2, max_size=12), st.floats(0.001, 0.1))
def test_equivalence_is_the_larger_of_two_one_sided_tests(differences, margin):
    d = np.array(differences)
    if d.std(ddof=1) < 1e-6:
        return
    sides = [
        stats.ttest_1samp(d, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(d, margin, alternative="less").pvalue,
    ]
    assert math.isclose(equivalence_p(d, 0 * d, margin), max(sides), rel_tol=1e-6, abs_tol=1e-12)


def test_holm_claims_what_its_definition_claims():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.uniform(size=5) ** 3
        adjusted, order = holm(p.tolist()), np.argsort(p)
        claimed = []
        for rank, i in enumerate(order):  # stop at the first that is not below its bound
            if p[i] > 0.05 / (5 - rank):
                break
            claimed.append(i)
        assert {i for i, value in enumerate(adjusted) if value <= 0.05} == set(claimed)


def test_no_experiment_divides_by_the_number_of_runs():
    "numpy's default (ddof = 0) is that of a whole population, not of a sample of seeds."
    for folder in ("45_toy", "40_noise_error", "99_experiments"):
        for path in sorted((NBS / folder).glob("*.ipynb")):
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
            assert not re.findall(r"np\.std\((?![^\n]*ddof=1)", code), path.name


def test_the_default_run_shows_the_estimate_of_its_committed_results():
    folder = NBS / "99_experiments/results/main_job"
    runs = [
        json.loads((folder / f"{name}.json").read_text())
        for name in ("eval", "eval-seed1", "eval-seed2")
    ]
    for notebook in ("index.ipynb", "99_experiments/10_default_run.ipynb"):
        cells = json.loads((NBS / notebook).read_text(encoding="utf-8"))["cells"]
        shown = json.dumps([c.get("outputs") for c in cells], ensure_ascii=False)
        for key in ("volume_iou", "r_at_1_toybox_800", "silhouette_iou"):
            assert estimate([run[key] for run in runs]).text() in shown, (notebook, key)
