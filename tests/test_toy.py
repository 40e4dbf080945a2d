"""Toys with exact scores: the true source, measures by brute force, lock-step, every refusal."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledreamer.distill.method_checks import check_method
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.distill.estimator import Estimator
from scaledreamer.distill.later_methods import ism, nfsd, sdi, sds_bridge
from scaledreamer.distill.methods import Method, asd, csd, sds
from scaledreamer.distill.shift import constant_shift, deterministic_shift, no_shift, random_shift
from scaledreamer.distill.vsd import esd, vsd
from scaledreamer.prior.mixture import MixturePrior
from scaledreamer.prior.schedule import scaled_linear
from scaledreamer.toy.amortised import ImageMaker, PointMaker
from scaledreamer.toy.point_estimator import TrainsEstimator, PointEstimator
from scaledreamer.toy.image_toy import image_settings, image_start, shift_strategies
from scaledreamer.toy.lockstep import Particles, Lockstep, ToySettings, make_optimizer, move
from scaledreamer.toy.measures import (
    mode_coverage,
    energy_distance,
    gradient_norms,
    denoising_residual,
    owners,
    mode_shares,
    source_error,
    mode_width_ratio,
)
from scaledreamer.toy.source_match import match_source
from scaledreamer.toy.points import Modes, exact_vsd, modes_of, moons, ring, true_source, uneven
from scaledreamer.toy.lockstep_strips import norm_curves, strip
from scaledreamer.toy.study import plot_final, plot_study, run_images, run_points, save_study
from fixtures import DOUBLE
from fixtures import draw as double

WORLD, SCHEDULE = ring(), scaled_linear()
FEW = ToySettings(
    steps=40, stride=8, nfsd_negative_prompt="elsewhere", bridge_source_prompt="elsewhere"
)


def draw(*shape, seed=0, dtype=torch.float32):  # toys are made of single numbers
    return double(*shape, seed=seed, dtype=dtype)


def learning(method=vsd, count=12, seed=0, **options):
    estimator = PointEstimator(WORLD.schedule, len(WORLD.captions), seed=seed)
    if method is esd:
        options["camera"] = torch.zeros(count, 16)
    return TrainsEstimator(
        partial(method, estimator=estimator, **options), estimator, batch=8, seed=seed
    )


def all_methods(count=12):
    return {
        "sds": sds,
        "csd": csd,
        "asd": asd,
        "nfsd": nfsd,
        "bridge": sds_bridge,
        "sdi": sdi,
        "ism": ism,
        "exact": exact_vsd,
        "vsd": learning(count=count),
        "esd": learning(esd, count),
    }


# the true source ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4), (1,)])
def test_true_source_is_the_gradient_of_the_log_density(shape):
    particles, x, t = (
        draw(30, *shape, dtype=DOUBLE),
        draw(6, *shape, seed=1, dtype=DOUBLE).requires_grad_(),
        torch.tensor([0, 40, 200, 500, 800, 999]),
    )
    alpha, sigma = SCHEDULE.alpha(t, x)[:, None], SCHEDULE.sigma(t, x)[:, None]
    log_density = (
        -((x[:, None] - alpha * particles) / sigma).square().flatten(2).sum(2) / 2
    ).logsumexp(1)
    (slope,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(
        true_source(particles, x.detach(), t, SCHEDULE), -sigma[:, 0] * slope, rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("time", [0, 300, 999])
def test_the_true_source_of_one_particle_is_the_noise(time):
    x, noise, t = (
        draw(1, 3, 4, 4, dtype=DOUBLE),
        draw(1, 3, 4, 4, seed=1, dtype=DOUBLE),
        torch.tensor([time]),
    )
    torch.testing.assert_close(
        true_source(x, SCHEDULE.add_noise(x, noise, t), t, SCHEDULE), noise, rtol=1e-8, atol=1e-8
    )


def test_the_true_source_knows_no_order_and_counts_copies():
    particles, x, t = (
        draw(9, 2, dtype=DOUBLE),
        draw(4, 2, seed=1, dtype=DOUBLE),
        torch.tensor([10, 200, 600, 900]),
    )
    whole = true_source(particles, x, t, SCHEDULE)
    torch.testing.assert_close(true_source(particles.flip(0), x, t, SCHEDULE), whole)
    torch.testing.assert_close(true_source(particles.repeat(3, 1), x, t, SCHEDULE), whole)


def test_exact_vsd_rests_on_the_targets_own_samples():
    "Its two terms agree up to the finite number of particles; another source moves the particles."
    target = modes_of(WORLD, "ring")
    n = 3000
    pair = Lockstep(
        WORLD,
        {"exact": partial(exact_vsd, guidance=1.0), "sds": partial(sds, guidance=1.0)},
        "ring",
        target.sample(n, make_rng(0)),
        ToySettings(steps=10),
    )
    asked = pair.step()
    assert source_error(asked, "exact", WORLD) == 0
    assert (
        asked.scores["exact"].gradient.square().mean()
        < 0.01 * asked.scores["sds"].gradient.square().mean()
    )


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_distances_of_sources_by_hand(shape):
    particles, shifts = draw(6, *shape, dtype=DOUBLE), torch.tensor([0, 60, 300])
    prior = MixturePrior({"x": draw(4, *shape, seed=1, dtype=DOUBLE)}, std=0.3)
    found = match_source(prior, "x", particles, 400, shifts, make_rng(2), noises=5)
    noise = torch.randn(30, *shape, generator=make_rng(2), dtype=DOUBLE)
    x, tokens = particles.repeat(5, *[1] * len(shape)), prior.encode_text(["x"] * 30).tokens
    at = lambda u: (prior.schedule.add_noise(x, noise, torch.full((30,), u)), torch.full((30,), u))
    source = true_source(particles, *at(400), prior.schedule)
    others = [prior.predict_noise(*at(400 + int(dt)), tokens) for dt in shifts]
    apart = [(source - other).unflatten(0, (5, 6)) for other in [*others, noise]]
    per_draw = [d.square().mean().item() for d in apart]
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]  # different noises: no bias
    of_means = [sum((d[i] * d[j]).mean().item() for i, j in pairs) / 20 for d in apart]
    errors = [(other - noise).square().mean().item() for other in others]
    assert [*found.distance.tolist(), found.true_error] == pytest.approx(per_draw, rel=1e-9)
    assert [*found.of_means.tolist(), found.noise_of_means] == pytest.approx(of_means, abs=1e-12)
    assert found.error.tolist() == pytest.approx(errors, rel=1e-9)


def test_the_source_of_the_particles_own_prior_needs_no_shift():
    particles = draw(20, 2, dtype=DOUBLE)
    own = MixturePrior({"x": particles}, std=0.0)
    found = match_source(own, "x", particles, 300, torch.tensor([0, 50]), make_rng(0))
    assert found.distance[0] < 1e-20 < found.distance[1]
    assert (found.nearest, found.nearest_mean, found.equal_error) == (0, 0, 0)


@pytest.mark.parametrize("shifts, noises", [([-1], 4), ([0, 700], 4), ([0], 1)])
def test_shifts_off_the_schedule(shifts, noises):
    with pytest.raises(UsageError, match="timesteps from t to 999"):
        match_source(WORLD, "ring", draw(5, 2), 300, torch.tensor(shifts), make_rng(0), noises)


def test_shifted_particles_go_back():
    "The mean gradient points from the target to particles that were moved as a whole."
    target = modes_of(WORLD, "ring").sample(1000, make_rng(0))
    for shift in ([0.3, 0.0], [0.0, -0.3]):
        run = Lockstep(
            WORLD,
            {"exact": partial(exact_vsd, guidance=1.0)},
            "ring",
            target + torch.tensor(shift),
            ToySettings(steps=10),
        )
        mean = run.step().scores["exact"].gradient.mean(0)
        assert torch.nn.functional.cosine_similarity(mean, torch.tensor(shift), dim=0) > 0.98


# worlds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prior, text",
    [
        (ring(), "ring"),
        (ring(6), "ring, odd"),
        (moons(), "moons"),
        (uneven(), "uneven"),
        (ring(), ""),
    ],
)
def test_samples_have_the_moments_of_the_mixture(prior, text):
    target = modes_of(prior, text)
    x, mean = target.sample(40_000, make_rng(0)), target.weights @ target.means
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
    spread_out = target.weights @ (target.means - mean).square() + target.std**2
    torch.testing.assert_close(x.var(0), spread_out, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("text", ["ring", "ring, even", "ring, odd"])
def test_what_is_elsewhere_has_the_rings_moments(text):
    some, other = modes_of(WORLD, text), modes_of(WORLD, "elsewhere")
    for modes in (some, other):
        torch.testing.assert_close(modes.weights @ modes.means, torch.zeros(2), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            (modes.means.T * modes.weights) @ modes.means, 1.125 * torch.eye(2), rtol=0, atol=1e-5
        )


def test_fast_tokens_are_the_slow_ones():
    "Groups of equal texts, in runs or mixed, against one item at a time."
    texts = ["ring", "", "ring, even", "ring", "ring", "elsewhere", "", "ring, odd"] * 5
    x, t = draw(40, 2), torch.randint(0, 1000, (40,), generator=make_rng(1))
    tokens = WORLD.encode_text(texts).tokens
    whole, density = WORLD.predict_noise(x, t, tokens), WORLD.log_density(x, t, tokens)
    for i in range(40):
        item = slice(i, i + 1)
        torch.testing.assert_close(
            WORLD.predict_noise(x[item], t[item], tokens[item]), whole[item], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            WORLD.log_density(x[item], t[item], tokens[item]), density[item], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("modes", [0, 1, 5])
def test_a_ring_without_halves(modes):
    with pytest.raises(UsageError, match=f"a ring of {modes} modes"):
        ring(modes)


# measures -----------------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_energy_distance_by_brute_force(n, m, d, seed):
    x, y = draw(n, d, seed=seed, dtype=DOUBLE), 2 * draw(m, d, seed=seed + 1, dtype=DOUBLE)
    total = lambda a, b: sum(float((p - q).norm()) for p in a for q in b)
    biased = 2 * total(x, y) / (n * m) - total(x, x) / n**2 - total(y, y) / m**2
    unbiased = 2 * total(x, y) / (n * m) - total(x, x) / (n * (n - 1)) - total(y, y) / (m * (m - 1))
    assert abs(energy_distance(x, y) - biased) < 1e-9 and biased > -1e-9
    assert abs(energy_distance(x, y, unbiased=True) - unbiased) < 1e-9
    assert energy_distance(x, x[torch.randperm(n)]) < 1e-12
    assert abs(energy_distance(x, y) - energy_distance(y, x)) < 1e-12


def test_measures_know_no_order():
    x, target, order = (
        draw(200, 2),
        modes_of(WORLD, "ring"),
        torch.randperm(200, generator=make_rng(3)),
    )
    for measure in (mode_coverage, mode_width_ratio):
        assert measure(x, target) == pytest.approx(measure(x[order], target), rel=1e-12)
    torch.testing.assert_close(mode_shares(x, target), mode_shares(x[order], target))


@pytest.mark.parametrize("scale", [0.3, 0.6, 1.0])
def test_spread_is_the_width_of_the_modes(scale):
    target = modes_of(WORLD, "ring")
    narrow = Modes(target.means, target.weights, scale * target.std).sample(20_000, make_rng(0))
    cut = (
        1 - 4.5 * torch.tensor(-4.5).exp() / (1 - torch.tensor(-4.5).exp())
        if scale == 1
        else torch.tensor(1.0)
    )  # a Gaussian cut off at 3 std
    assert mode_width_ratio(narrow, target) == pytest.approx(scale * float(cut.sqrt()), rel=0.02)


def test_ownership():
    target = modes_of(uneven(), "uneven")
    nearest, owned = owners(
        torch.cat([target.means, target.means + 0.44, target.means * 0]), target
    )
    assert nearest[:4].tolist() == [0, 1, 2, 3] and owned[:4].all() and not owned[4:].any()
    assert mode_coverage(target.means[[0, 0, 1, 2]], target) == 0.75
    assert mode_width_ratio(torch.zeros(5, 2), target) is None


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1)])
def test_the_unbiased_distance_wants_two(sizes):
    with pytest.raises(UsageError, match="at least 2 each"):
        energy_distance(draw(sizes[0], 2), draw(sizes[1], 2), unbiased=True)


def test_norms_add_up():
    asked = Lockstep(
        WORLD,
        {"csd": csd, "asd": asd, "asd, 1": partial(asd, guidance=1.0)},
        "ring",
        draw(50, 2),
        FEW,
    ).step()
    found = {name: gradient_norms(score) for name, score in asked.scores.items()}
    assert found["csd"]["non_guidance"] < 1e-6 * found["csd"]["norm"] + 1e-9
    assert found["asd, 1"]["classifier"] < 1e-6 and found["asd, 1"]["norm"] == pytest.approx(
        found["asd"]["non_guidance"], rel=1e-3
    )
    assert found["asd"]["classifier"] == pytest.approx(6.5 * found["csd"]["norm"], rel=1e-3)


def test_misfit_of_a_point_is_its_distance():
    "One component of width 0: the prior's guess is that component, whatever the noise."
    prior = MixturePrior({"a": torch.zeros(1, 3, 4, 4)}, std=0.0)
    x = draw(5, 3, 4, 4)
    torch.testing.assert_close(
        denoising_residual(prior, x, prior.encode_text(["a"] * 5).tokens, make_rng(0)),
        x.flatten(1).square().mean(1).sqrt(),
        rtol=1e-4,
        atol=1e-5,
    )


# lock-step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("one_t", [False, True])
def test_together_is_each_alone_bit_for_bit(optimizer, one_t):
    how = replace(FEW, optimizer=optimizer, one_t=one_t, lr=0.02)
    together = Lockstep(WORLD, all_methods(), "ring", draw(12, 2), how).run(20)
    for name in together.methods:
        alone = (
            Lockstep(WORLD, {name: all_methods()[name]}, "ring", draw(12, 2), how).run(7).run(13)
        )
        assert torch.equal(alone.points[name], together.points[name]), name
        for a, b in zip(alone.frames, together.frames, strict=True):
            assert a.step == b.step and torch.equal(a.t, b.t) and a.norms[name] == b.norms[name]
            assert torch.equal(a.points[name], b.points[name]) and torch.equal(
                a.gradients[name], b.gradients[name]
            )


def test_the_seed_decides():
    runs = [
        Lockstep(WORLD, {"asd": asd}, "ring", draw(12, 2), replace(FEW, seed=seed))
        .run(10)
        .points["asd"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_one_t_is_one():
    assert (
        Lockstep(WORLD, {"csd": csd}, "ring", draw(12, 2), replace(FEW, one_t=True))
        .step()
        .draw.t.unique()
        .numel()
        == 1
    )


def test_plain_steps_are_gradient_descent():
    start, run = (
        draw(12, 2),
        Lockstep(WORLD, {"asd": asd}, "ring", draw(12, 2), replace(FEW, optimizer="sgd", lr=0.1)),
    )
    gradient = run.step().scores["asd"].gradient
    torch.testing.assert_close(run.points["asd"], start - 0.1 * gradient, rtol=0, atol=1e-6)
    free = Particles(start)
    move(free(make_rng(0)), gradient, make_optimizer(free, replace(FEW, optimizer="sgd")), 0.5)
    torch.testing.assert_close(free.items.detach(), start - 0.5 * gradient, rtol=0, atol=1e-6)


def test_frames_are_before_the_step_and_keep_their_values():
    run = Lockstep(WORLD, {"csd": csd}, "ring", draw(12, 2), FEW).run(17)
    assert [frame.step for frame in run.frames] == [0, 8, 16]
    torch.testing.assert_close(run.frames[0].points["csd"], draw(12, 2), rtol=0, atol=0)
    assert not torch.equal(run.frames[2].points["csd"], run.points["csd"])
    for frame in run.frames:
        assert frame.norms["csd"] == pytest.approx(
            float(frame.gradients["csd"].norm(dim=1).mean()), rel=1e-6
        )
        assert not frame.points["csd"].requires_grad and not frame.gradients["csd"].requires_grad


def test_laws_of_shift():
    shift_schedules = {
        "none": no_shift,
        "far": deterministic_shift(0.5),
        "constant": constant_shift(30),
    }
    run = Lockstep(
        WORLD,
        {name: asd for name in (*shift_schedules, "own")},
        "ring",
        draw(12, 2),
        FEW,
        shift_schedules,
    )
    asked = run.step()
    shift = {name: score.t_shifted - score.t for name, score in asked.scores.items()}
    assert (shift["none"] == 0).all() and (shift["far"] >= shift["own"]).all()
    assert ((shift["constant"] == 30) | (asked.scores["constant"].t_shifted == 999)).all()
    torch.testing.assert_close(
        asked.scores["none"].gradient,
        6.5 * csd(WORLD, asked.points["none"], run.text, asked.draw.t, asked.draw.noise).gradient,
        rtol=1e-3,
        atol=1e-5,
    )


class Broken:
    def __init__(self, good):
        self.good = good

    def __getattr__(self, name):
        return getattr(WORLD, name)

    def predict_noise(self, x_t, t, tokens, camera=None):
        self.good -= 1
        return WORLD.predict_noise(x_t, t, tokens, camera) * (
            1.0 if self.good >= 0 else float("nan")
        )


def test_nan_of_a_prior_stops_the_run_and_keeps_everything():
    run = Lockstep(Broken(2 * 11), {"csd": csd, "asd": asd}, "ring", draw(12, 2), FEW)
    with pytest.raises(
        RunError,
        match=r"step 11: the gradient of csd is not finite at t = \d+ and 11 more; "
        "kept are 2 frames up to step 8",
    ):
        run.run(40)
    good = Lockstep(WORLD, {"csd": csd, "asd": asd}, "ring", draw(12, 2), FEW).run(11)
    assert run.done == 11 and all(
        torch.equal(run.points[name], good.points[name]) for name in good.methods
    )
    with pytest.raises(RunError, match="kept are no frame"):
        Lockstep(Broken(0), {"csd": csd}, "ring", draw(12, 2), FEW).run(1)


def test_an_interrupt_keeps_the_frames():
    def stop(asked):
        if asked.step == 9:
            raise KeyboardInterrupt

    run = Lockstep(WORLD, {"csd": csd}, "ring", draw(12, 2), FEW).run(40, on_step=stop)
    assert run.done == 10 and [frame.step for frame in run.frames] == [0, 8]
    rest = run.run(10).points["csd"]
    assert torch.equal(
        rest, Lockstep(WORLD, {"csd": csd}, "ring", draw(12, 2), FEW).run(20).points["csd"]
    )


@pytest.mark.parametrize(
    "change, says",
    [
        ({"methods": {}}, "there are 0 methods"),
        ({"start": torch.zeros(3, 5)}, r"the start is \[3, 5\]"),
        ({"start": torch.zeros(0, 2)}, r"the start is \[0, 2\]"),
        ({"text": ["ring"] * 4}, "4 texts for 12 items"),
        ({"text": "rang"}, "knows no 'rang'"),
        ({"shift_schedules": {"sds": no_shift}}, r"shift schedules for \['sds'\]"),
    ],
)
def test_what_a_lock_step_refuses(change, says):
    given = {
        "prior": WORLD,
        "methods": {"csd": csd},
        "text": "ring",
        "start": draw(12, 2),
        "settings": FEW,
    } | change
    with pytest.raises(UsageError, match=says):
        Lockstep(**given)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"steps": 0}, "steps is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1"),
    ],
)
def test_settings_that_cannot_be(change, says):
    with pytest.raises(UsageError, match=says):
        replace(FEW, **change)


def test_eta_and_dt_out_of_range():
    with pytest.raises(UsageError, match="eta is 1.5"):
        Lockstep(WORLD, {"asd": asd}, "ring", draw(12, 2), replace(FEW, eta=1.5))
    with pytest.raises(UsageError, match="dt is -1"):
        constant_shift(-1)
    with pytest.raises(UsageError, match="asd has no t_shifted"):
        asd(
            WORLD,
            draw(1, 2),
            Lockstep(WORLD, {"csd": csd}, "ring", draw(1, 2), FEW).text,
            torch.tensor([5]),
            draw(1, 2),
        )


def test_strips():
    run = Lockstep(WORLD, {"csd": csd, "asd": asd}, "ring", draw(12, 2), FEW)
    for picture in (partial(strip, run, [0]), partial(norm_curves, run)):
        with pytest.raises(UsageError, match="0 frames"):
            picture()
    run.run(17)
    assert len(strip(run, [0, 16], draw(5, 2)).axes) == 4 and len(norm_curves(run).axes) == 1
    images = MixturePrior({"a": torch.zeros(1, 3, 4, 4)})
    with pytest.raises(UsageError, match="are no points"):
        strip(Lockstep(images, {"csd": csd}, "a", draw(2, 3, 4, 4), ToySettings()).run(1), [0])


# learning, making ---------------------------------------------------------------------------------


def test_the_estimator_starts_as_a_standard_normal_and_keeps_items_apart():
    net, t = PointEstimator(WORLD.schedule, 3), torch.tensor([0, 100, 999])
    x, tokens = draw(3, 2), WORLD.encode_text(["ring", "", "elsewhere"]).tokens
    assert isinstance(net, Estimator) and isinstance(TrainsEstimator(csd, net), Method)
    torch.testing.assert_close(net.predict_noise(x, t, tokens), WORLD.schedule.sigma(t, x) * x)
    torch.nn.init.normal_(net.net[-1].weight, generator=make_rng(0))
    whole = net.predict_noise(x, t, tokens)
    for i in range(3):
        torch.testing.assert_close(
            net.predict_noise(x[i : i + 1], t[i : i + 1], tokens[i : i + 1]), whole[i : i + 1]
        )


def test_an_estimator_learns_the_true_source():
    "Particles that stand still at two points; the error falls to a small part of what it was."
    start = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(40, 1)
    run = Lockstep(
        WORLD,
        {
            "vsd": TrainsEstimator(
                partial(vsd, estimator=(net := PointEstimator(WORLD.schedule, 3)), guidance=1.0),
                net,
            )
        },
        "ring",
        start,
        ToySettings(steps=500, lr=1e-12),
    )
    errors = [
        source_error(asked, "vsd", WORLD) if asked.step in (0, *range(480, 500)) else None
        for asked in (run.step() for _ in range(500))
    ]
    assert 0 < sum(errors[480:]) / 20 < 0.1 * errors[0]


def test_methods_keep_their_contract():
    "Those that learn answer differently the second time, and are left out."
    prior = MixturePrior({"a": draw(4, 2), "b": draw(3, 2, seed=1)}, std=0.4)
    text = Lockstep(prior, {"csd": csd}, ["a", "b", "a"], draw(3, 2)).text
    check_method(partial(vsd, estimator=PointEstimator(prior.schedule, 2)), prior, text)


def test_makers():
    rows = WORLD.encode_text(["ring, even", "ring, odd"] * 3).pooled
    maker = PointMaker(rows)
    assert torch.equal(maker(make_rng(1)), torch.randn(6, 4, generator=make_rng(1))[:, :2])
    together = Lockstep(
        WORLD,
        {"csd": csd, "asd": asd},
        ["ring, even", "ring, odd"] * 3,
        lambda: PointMaker(rows),
        FEW,
    ).run(9)
    alone = Lockstep(
        WORLD, {"asd": asd}, ["ring, even", "ring, odd"] * 3, lambda: PointMaker(rows), FEW
    ).run(9)
    assert torch.equal(together.points["asd"], alone.points["asd"])
    images = MixturePrior({"a": draw(3, 3, 8, 8), "b": draw(2, 3, 8, 8, seed=1)})
    run = Lockstep(
        images, {"asd": asd}, ["a", "b"], lambda: ImageMaker(torch.eye(2), (3, 8, 8)), ToySettings()
    )
    before = run.points["asd"]
    assert before.shape == (2, 3, 8, 8) and not torch.equal(run.run(3).points["asd"], before)
    with pytest.raises(UsageError, match="latents of side 6"):
        ImageMaker(torch.eye(2), (3, 6, 6))


# images, studies ----------------------------------------------------------------------------------

IMAGES = MixturePrior(
    {"a": draw(5, 3, 8, 8).clamp(-1, 1), "b": draw(5, 3, 8, 8, seed=1).clamp(-1, 1)}, std=0.1
)


def test_without_a_shift_the_background_stays():
    """CSD never changes what the two texts agree on; the shift does.

    Half of each image is the same in all components.
    """
    means = {
        c: torch.cat(
            [IMAGES.components.table[i : i + 5].view(5, 3, 8, 8)[..., :4], torch.zeros(5, 3, 8, 4)],
            3,
        )
        for c, i in (("a", 0), ("b", 5))
    }
    prior = MixturePrior(means, std=0.1)
    shift_schedules = shift_strategies(0.1, 50)
    start = image_start(prior, 2)
    run = Lockstep(
        prior,
        {name: asd for name in shift_schedules},
        "a",
        start,
        image_settings(60),
        shift_schedules,
    ).run(60)
    left = {
        name: float(x[..., 4:].square().mean() / start[..., 4:].square().mean())
        for name, x in run.points.items()
    }
    assert left["none"] > 0.9 and all(
        left[name] < 0.6 for name in shift_schedules if name != "none"
    ), left


def test_images_refuse_none():
    with pytest.raises(UsageError, match="0 images"):
        image_start(IMAGES, 0)


def test_a_study_of_points(tmp_path):
    def methods(seed):
        return {"sds": sds, "vsd": learning(seed=seed), "exact": partial(exact_vsd, guidance=1.0)}

    study = run_points(
        methods, [0, 1], count=30, settings=replace(FEW, steps=12), every=5, show=False
    )
    assert study["steps"] == [0, 5, 10, 11] and study["seeds"] == [0, 1]
    assert study["methods"]["exact"]["end"]["source error"] == [0.0, 0.0]
    again = run_points(methods, [1], count=30, settings=replace(FEW, steps=12), every=5, show=False)
    for name, method in again["methods"].items():
        for figure, rows in method["series"].items():
            assert rows[0] == study["methods"][name]["series"][figure][1], (name, figure)
    save_study(study, tmp_path / "deep" / "toy.json")
    read = json.loads((tmp_path / "deep" / "toy.json").read_text())
    assert read == study
    assert len(plot_study(read).axes) == 7 and len(plot_final(read).axes) == 3
    with pytest.raises(UsageError, match="no \\['speed'\\]"):
        plot_study(read, ["speed"])
    with pytest.raises(UsageError, match="0 seeds"):
        run_points(methods, [], show=False)


def test_a_study_of_images(tmp_path):
    study = run_images(
        lambda seed: {"sds": sds, "none": asd},
        [3],
        IMAGES,
        "a",
        count=2,
        settings=image_settings(6),
        every=3,
        shift_schedules={"none": no_shift},
        show=False,
    )
    assert study["steps"] == [0, 3, 5] and set(study["images"]) == {"sds", "none"}
    save_study(study, tmp_path / "toy.json")
    assert len(plot_final(json.loads((tmp_path / "toy.json").read_text())).axes) == 2


def test_random_laws_of_one_step_draw_one_place():
    run = Lockstep(
        WORLD,
        {"near": asd, "far": asd},
        "ring",
        draw(40, 2),
        FEW,
        {"near": random_shift(0.1), "far": random_shift(0.4)},
    )
    near, far = (score.t_shifted - score.t for score in run.step().scores.values())
    room = (run.latest.draw.t.float() - 20) * 0.4 < 999 - run.latest.draw.t
    assert (4 * near[room] <= far[room]).all() and (far[room] - 4 * near[room] <= 4).all()
