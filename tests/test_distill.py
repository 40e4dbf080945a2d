"""Distillation on priors with known noise: identities of methods, independent items, timesteps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledreamer.distill.method_checks import check_method
from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.distill.gradient import (
    fantasia3d_weight,
    prescribed_gradient_loss,
    sds_weight,
    uniform_weight,
)
from scaledreamer.distill.methods import asd, csd, sds
from scaledreamer.distill.timesteps import (
    LinearSchedule,
    annealed_window,
    fixed_window,
    sample_timesteps,
)
from scaledreamer.distill.shift import deterministic_shift, no_shift, random_shift, shifted
from scaledreamer.prior.schedule import NoiseSchedule, scaled_linear
from fixtures import NOISE, SHAPE, T, X, draw, make, plane, texts_with_negatives, rows, texts_of

PRIOR = make()
PLAIN, PUSHED = texts_of(PRIOR), texts_with_negatives(PRIOR)


# the surrogate ------------------------------------------------------------------------------------


def test_surrogate_by_finite_differences():
    "d/dx of the loss with its target held where it is."
    x, g, direction = (draw(2, 3, seed=i) for i in range(3))
    target, step = x - g, 1e-5

    def loss(s):
        return ((x + s * direction - target).square().sum() / 4).item()

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert abs(slope - (g * direction).sum().item() / 2) < 1e-8
    latents = x.clone().requires_grad_()
    torch.testing.assert_close(prescribed_gradient_loss(latents, g).item(), loss(0))


def test_surrogate_gives_each_item_its_own_gradient():
    x, g = draw(3, *SHAPE).requires_grad_(), draw(3, *SHAPE, seed=1)
    (whole,) = torch.autograd.grad(prescribed_gradient_loss(x, g), x)
    for i in range(3):
        (alone,) = torch.autograd.grad(prescribed_gradient_loss(x[i : i + 1], g[i : i + 1]), x)
        torch.testing.assert_close(whole[i], alone[i] / 3)


# identities of methods ----------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5, 7.5, 100.0])
@pytest.mark.parametrize("weight", [sds_weight, uniform_weight, fantasia3d_weight])
def test_asd_without_shift_is_csd(guidance, weight):
    t = deterministic_shift(0.0)(T, 20, 999, make_rng(0))
    assert torch.equal(t, no_shift(T, 20, 999, make_rng(0)))
    ours = asd(PRIOR, X, PLAIN, T, NOISE, t, guidance, weight).gradient
    torch.testing.assert_close(
        ours,
        (guidance - 1) * csd(PRIOR, X, PLAIN, T, NOISE, weight=weight).gradient,
        atol=1e-9,
        rtol=1e-9,
    )


@pytest.mark.parametrize("text", [PLAIN, PUSHED], ids=["plain", "perp-neg"])
def test_asd_is_guidance_plus_shift(text):
    later = T + 50
    both = asd(PRIOR, X, text, T, NOISE, later)
    shift_alone = asd(PRIOR, X, PLAIN, T, NOISE, later, guidance=1.0)
    guidance_alone = asd(PRIOR, X, text, T, NOISE, T)
    torch.testing.assert_close(
        both.gradient, shift_alone.gradient + guidance_alone.gradient, atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("text", [PLAIN, PUSHED], ids=["plain", "perp-neg"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_asd_shifted_to_pure_noise_is_sds(text, guidance):
    pure = make(NoiseSchedule(torch.cat([scaled_linear().alphas_cumprod[:-1], torch.zeros(1)])))
    last = torch.full_like(T, 999)
    torch.testing.assert_close(
        asd(pure, X, text, T, NOISE, last, guidance).gradient,
        sds(pure, X, text, T, NOISE, guidance=guidance).gradient,
        atol=1e-10,
        rtol=1e-10,
    )


@pytest.mark.parametrize("last", [800, 950, 999])
def test_what_is_left_of_the_noise(last):
    """At alpha > 0 ASD differs from SDS by w (eps_phi - eps).

    That is w [sigma alpha (x - E[m | x_t]) - alpha^2 s^2 eps] / v, with E by brute force.
    """
    later = torch.full_like(T, last)
    abar = PRIOR.schedule.abar(later[:1])
    alpha, sigma, v = abar.sqrt(), (1 - abar).sqrt(), abar * 0.16 + 1 - abar
    means = {
        c: draw(k, *SHAPE, seed=i) for i, (c, k) in enumerate({"a": 4, "b": 3, "c": 2}.items())
    }
    rest = []
    for x, noise, caption in zip(X, NOISE, "aba"):
        gaps = (alpha * x + sigma * noise - alpha * means[caption]).square().flatten(1).sum(1)
        center = torch.einsum("k,k...->...", (-gaps / (2 * v)).softmax(0), means[caption])
        rest.append((sigma * alpha * (x - center) - abar * 0.16 * noise) / v)
    step = asd(PRIOR, X, PLAIN, T, NOISE, later)
    difference = sds(PRIOR, X, PLAIN, T, NOISE, guidance=7.5).gradient - step.gradient
    torch.testing.assert_close(
        difference, step.weight.reshape(3, 1, 1, 1) * torch.stack(rest), atol=1e-9, rtol=1e-9
    )


def test_csd_scales_with_guidance_and_sees_no_noise_source():
    one, many = csd(PRIOR, X, PLAIN, T, NOISE), csd(PRIOR, X, PLAIN, T, NOISE, guidance=7.5)
    torch.testing.assert_close(many.gradient, 7.5 * one.gradient)
    assert torch.equal(
        one.source,
        PRIOR.predict_noise(PRIOR.schedule.add_noise(X, NOISE, T), T, PLAIN.unconditional),
    )


# items --------------------------------------------------------------------------------------------


@given(
    st.permutations(range(3)),
    st.integers(1, 3),
    st.sampled_from([sds, csd, asd]),
    st.sampled_from([PLAIN, PUSHED]),
)
@settings(max_examples=25, deadline=None)
def test_items_never_mix(order, count, method, text):
    """Any selection in any order gets the numbers of the whole batch.

    The release's perp-neg evaluates negatives on the image of another item.
    """
    index = torch.tensor(order[:count])
    whole = method(PRIOR, X, text, T, NOISE, T + 40)
    some = method(PRIOR, X[index], rows(text, index), T[index], NOISE[index], T[index] + 40)
    for name in ("gradient", "target", "source", "weight", "t", "t_shifted"):
        torch.testing.assert_close(
            getattr(some, name), getattr(whole, name)[index], atol=1e-10, rtol=1e-10
        )


def later_asd(prior, latents, text, t, noise):
    return asd(prior, latents, text, t, noise, shifted(t, 0, prior.schedule.steps - 1, 0.1))


@pytest.mark.parametrize("method", [sds, csd, later_asd])
def test_methods_keep_their_contract(method):
    check_method(method, PRIOR, PUSHED)


def test_latents_of_any_rank():
    points = plane()
    text = texts_of(points)
    for method in (sds, csd, later_asd):
        assert method(points, draw(3, 2), text, T, draw(3, 2, seed=3)).gradient.shape == (3, 2)


def test_no_graph_and_no_change():
    latents = X.clone().requires_grad_()
    step = later_asd(PRIOR, latents, PUSHED, T, NOISE)
    assert not any(getattr(step, name).requires_grad for name in ("gradient", "target", "source"))
    assert torch.equal(latents, X)
    with pytest.raises(UsageError, match="asd has no t_shifted"):
        asd(PRIOR, X, PLAIN, T, NOISE)


def test_what_is_not_finite_stays_so():
    "The release turns NaN into 0; here the trainer is to see it."
    broken = X.clone()
    broken[1, 0, 0, 0] = torch.nan
    gradient = sds(PRIOR, broken, PLAIN, T, NOISE).gradient
    assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()


# timesteps ----------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.integers(0, 999), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_shifts_stay_in_their_range(t, t_min, eta, seed):
    times = torch.full((5,), t)
    longest = max(0.0, eta * (t - t_min)) + 1e-4 * t  # float32
    random = random_shift(eta)(times, t_min, 999, make_rng(seed))
    fixed = deterministic_shift(eta)(times, t_min, 999, make_rng(seed))
    for later in (random, fixed):
        assert (later >= max(t, 1)).all() and (later <= min(999, max(t, 1) + longest)).all()
    assert (random <= fixed).all()


@given(
    st.integers(0, 998),
    st.integers(1, 300),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_drawn_timesteps_are_in_the_window_and_repeat(low, width, batch, stratified, seed):
    window = low, min(999, low + width)
    t = sample_timesteps(window, batch, make_rng(seed), stratified)
    assert (
        t.shape == (batch,)
        and t.dtype == torch.long
        and (t >= window[0]).all()
        and (t <= window[1]).all()
    )
    assert torch.equal(t, sample_timesteps(window, batch, make_rng(seed), stratified))
    if stratified:  # one item in each of `batch` equal parts
        size = (window[1] - window[0] + 1) / batch
        parts = [(t - window[0] + end) / size for end in (1, 0)]  # an integer t may touch two parts
        for k in range(batch):
            assert ((parts[0] > k) & (parts[1] < k + 1)).any()


@given(
    st.floats(-10, 10),
    st.floats(-10, 10),
    st.integers(-100, 100),
    st.integers(1, 200),
    st.floats(-300, 500),
)
@settings(max_examples=100, deadline=None)
def test_linear_schedules_are_linear_and_clamped(start, end, first, length, step):
    value = LinearSchedule(first, start, end, first + length)
    share = min(1.0, max(0.0, (step - first) / length))
    assert abs(value(step) - (start + share * (end - start))) < 1e-9
    assert min(start, end) - 1e-9 <= value(step) <= max(start, end) + 1e-9


def test_windows():
    window = annealed_window(25_000)
    assert [window(0), window(25_000), window(99_999)] == [(500, 980), (20, 500), (20, 500)]
    assert all(window(step)[0] <= window(step)[1] for step in range(0, 25_001, 97))
    assert annealed_window(0)(0) == (500, 980)
    assert fixed_window()(5, timesteps=500) == (10, 490)
    with pytest.raises(UsageError, match="window at step 3"):
        fixed_window(0.1, 1.0)(3)
