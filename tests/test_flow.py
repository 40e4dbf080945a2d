"""Flow-matching priors: their schedule, the shift rule in log-SNR, pooled text, and SD3 folders."""

import json
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from fixtures import DOUBLE, NOISE, SHAPE, T, X, draw, make, texts_of, texts_with_negatives
from torch import nn

from scaledreamer.commands.cli import run_command
from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import make_rng, seed_everything, seeded
from scaledreamer.distill.conditioning import make_conditioning
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.distill.estimator import LoRAEstimator, estimator_loss, predict_with_prior
from scaledreamer.distill.flow_methods import pfd, rfds
from scaledreamer.distill.gradient import fantasia3d_weight, sds_weight, uniform_weight
from scaledreamer.distill.later_methods import ism, nfsd, sdi, sds_bridge
from scaledreamer.distill.log_snr_shift import LogSNRShift, log_snr_timesteps
from scaledreamer.distill.method_checks import check_method
from scaledreamer.distill.methods import asd, csd, sds
from scaledreamer.distill.shift import constant_shift, deterministic_shift, random_shift, sqrt_shift
from scaledreamer.distill.shift_identity import sds_share
from scaledreamer.distill.vsd import esd, vsd
from scaledreamer.noise_error.image_sources import ddim
from scaledreamer.prior.base import Conditioning, pack_text, unpack_text
from scaledreamer.prior.flow_schedule import FlowSchedule, flow_loss, flow_schedule
from scaledreamer.prior.mixture import MixturePrior
from scaledreamer.prior.open_prior import open_prior
from scaledreamer.prior.pipelines import quiet, random_pipeline
from scaledreamer.prior.prior_checks import check_prior
from scaledreamer.prior.schedule import NoiseSchedule, scaled_linear
from scaledreamer.prior.sd3_text import random_sd3_pipeline
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior
from scaledreamer.prior.stable_diffusion_3 import StableDiffusion3Prior
from scaledreamer.recipes.tiny_sd import make_autoencoder
from scaledreamer.recipes.tiny_sd_recipe import model_card, prior_renders, save_pipeline
from scaledreamer.recipes.tiny_sd_training import RecipeSettings, TinyTraining
from scaledreamer.recipes.tiny_sd_state import load_training, save_training
from scaledreamer.toy.point_estimator import PointEstimator
from scaledreamer.toybox.render_sets import RenderSet, make_renders

STABLE, FLOW, SD3 = scaled_linear(), flow_schedule(), flow_schedule(shift=3.0)
FLOWS = pytest.mark.parametrize("schedule", [FLOW, SD3], ids=["flow", "sd3"])
TEXTS = ["a red ball", "a blue cube"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Folders of a small Stable Diffusion 3 without and with T5, as diffusers writes them."
    seed_everything(0)
    folder = tmp_path_factory.mktemp("sd3")
    with quiet():
        random_sd3_pipeline().save_pretrained(folder / "plain")
        random_sd3_pipeline(t5=True).save_pretrained(folder / "t5")
    return folder


@pytest.fixture(scope="module")
def sd3(folders):
    return open_prior(folders / "plain")


@pytest.fixture(scope="module")
def unet_flow(tmp_path_factory):
    "The folder of a small Stable Diffusion whose U-Net predicts the velocity of a flow."
    seed_everything(1)
    folder, pipe = tmp_path_factory.mktemp("unet_flow"), random_pipeline()
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    with quiet():
        pipe.save_pretrained(folder)
    return folder


# the schedule -------------------------------------------------------------------------------------


def test_weights_of_stable_diffusion_are_bit_for_bit_those_of_its_table():
    t = torch.arange(1000)
    abar = STABLE.alphas_cumprod
    assert torch.equal(sds_weight(STABLE, t), 1 - abar)
    assert torch.equal(fantasia3d_weight(STABLE, t), abar.sqrt() * (1 - abar))
    assert torch.equal(STABLE.added_variance(t[:-1], t[1:]), 1 - abar[1:] / abar[:-1])


@FLOWS
def test_a_flow_is_a_schedule(schedule):
    t, s = torch.arange(1000), schedule.levels
    assert isinstance(schedule, NoiseSchedule) and schedule.steps == 1000
    assert (s.diff() > 0).all() and s[-1] == 1
    torch.testing.assert_close(sds_weight(schedule, t), s.square())
    torch.testing.assert_close(fantasia3d_weight(schedule, t), (1 - s) * s.square())
    torch.testing.assert_close(schedule.abar(t), (1 - s).square())
    torch.testing.assert_close(schedule.log_snr(t[:-1]), 2 * ((1 - s) / s)[:-1].log())


@FLOWS
def test_noise_added_in_two_steps_is_noise_added_in_one(schedule):
    "Mean and variance of x_u from x_t, against those from x_0."
    t, u = torch.tensor([0, 100, 500]), torch.tensor([600, 101, 998])
    ratio = schedule.levels.neg().add(1)[u] / schedule.levels.neg().add(1)[t]
    variance = ratio.square() * schedule.variance(t) + schedule.added_variance(t, u)
    torch.testing.assert_close(variance, schedule.variance(u))
    assert (schedule.added_variance(t, u) > 0).all()


@FLOWS
def test_the_velocity_of_a_mixture_is_that_of_its_points(schedule):
    "E[eps - x_0 | x_t] by summing over the points, without the prior's own formulas."
    points = draw(5, 2)
    prior = MixturePrior({"a": points}, 0.0, schedule=schedule)
    t, x_t = torch.tensor([100, 500, 900]), draw(3, 2, seed=1)
    s = schedule.levels[t][:, None]
    log_p = -(((x_t[:, None] - (1 - s[..., None]) * points) / s[..., None]) ** 2).sum(-1) / 2
    x0 = log_p.softmax(1) @ points
    eps = prior.predict_noise(x_t, t, prior.encode_text(["a"]).tokens.expand(3, -1, -1))
    torch.testing.assert_close(schedule.v_from_eps(x_t, eps, t), (x_t - x0) / s)


def test_sampling_ends_at_the_data():
    points = 2 * draw(4, *SHAPE)
    for schedule in (STABLE, FLOW, SD3):
        prior = MixturePrior({"a": points}, 0.05, schedule=schedule)
        found = ddim(prior, ["a"] * 6, draw(6, *SHAPE, seed=3), steps=40)
        nearest = torch.cdist(found.flatten(1), points.flatten(1)).min(1).values
        assert nearest.max() < 0.05 * (48**0.5) * 1.6


def test_the_loss_of_a_flow():
    "A linear velocity of Gaussian data has its least squares at the known slope."
    x, noise = 0.5 * draw(20_000, 1), draw(20_000, 1, seed=1)
    for level in (0.2, 0.7):
        slope = torch.zeros((), dtype=DOUBLE, requires_grad=True)
        s = torch.full((len(x),), level, dtype=DOUBLE)
        loss = flow_loss(lambda x_s, s: slope * x_s, x, noise, s)
        (gradient,) = torch.autograd.grad(loss, slope, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient, slope)
        best = (level - 0.25 * (1 - level)) / (level**2 + 0.25 * (1 - level) ** 2)
        assert (-gradient / curvature).item() == pytest.approx(best, abs=0.06)


@FLOWS
def test_an_estimator_of_velocities_has_the_loss_of_a_flow(schedule):
    prior = make(schedule)
    tokens = texts_of(prior).positive

    eps = lambda x_s: Renders(prior).predict_noise(x_s, T, tokens)
    velocity = lambda x_s, s: schedule.v_from_eps(x_s, eps(x_s), T)
    torch.testing.assert_close(
        estimator_loss(Renders(prior), schedule, X, tokens, T, NOISE),
        flow_loss(velocity, X, NOISE, schedule.levels[T]),
    )


def test_a_network_of_points_predicts_velocities_on_a_flow():
    net = PointEstimator(FLOW, 1, dim=2)
    x_t, tokens = draw(3, 2).float(), torch.ones(3, 1, 1)
    torch.testing.assert_close(net.predict_noise(x_t, T, tokens), x_t)  # v = 0 at first


# ASD's shift --------------------------------------------------------------------------------------


def test_one_eta_moves_a_flow_four_times_as_far():
    t, rule = torch.tensor([900]), deterministic_shift(0.1)
    fall = lambda schedule: (
        schedule.log_snr(t) - schedule.log_snr(rule(t, 20, 999, make_rng(0)))
    ).item()
    assert fall(STABLE) == pytest.approx(1.0, abs=0.05)
    assert fall(FLOW) == pytest.approx(4.6, abs=0.05)
    assert fall(SD3) == pytest.approx(fall(FLOW))


@pytest.mark.parametrize("t_min", [0, 20, 333, 500])
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.37, 1.0])
def test_the_rule_in_log_snr_is_the_papers_on_the_papers_schedule(t_min, eta):
    t = torch.arange(1000)
    for shift in (random_shift(eta), deterministic_shift(eta), sqrt_shift(eta), constant_shift(31)):
        carried = LogSNRShift(STABLE, shift)
        for seed in range(3):
            draws = [rule(t, t_min, 999, make_rng(seed)) for rule in (shift, carried)]
            assert torch.equal(*draws)


@FLOWS
@pytest.mark.parametrize("t_min", [60, 300])
def test_the_step_in_log_snr_is_that_of_stable_diffusion(schedule, t_min):
    "Solved by bisection on the reference's own table, in place of an inverse."
    table = STABLE.log_snr(torch.arange(1000))
    at = lambda tau: torch.lerp(
        table[int(tau)], table[min(int(tau) + 1, 999)], float(tau) - int(tau)
    ).item()

    def solve(value):
        low, high = 0.0, 999.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle) > value else (low, middle)
        return low

    own = lambda t: schedule.log_snr(torch.tensor([t])).item()
    shift = LogSNRShift(schedule, deterministic_shift(0.1))
    checked = 0
    for t in range(t_min, 990, 37):
        tau, lowest = solve(own(t)), solve(max(own(t_min), table[-1]))
        after = tau + 0.1 * (tau - lowest)
        if not table[-1] < own(t) < table[0] or not own(t_min) < table[0] or after > 998:
            continue
        (found,) = shift(torch.tensor([t]), t_min, 999, make_rng(0)).tolist()
        assert own(found) >= at(after) - 1e-6 > own(found + 1) - 2e-6
        checked += 1
    assert checked > 5


def test_beyond_the_reference_it_goes_on():
    ends = torch.tensor([0, 999])
    for extra, end in ((0.5, 0), (-0.5, 1)):
        value = STABLE.log_snr(ends)[end] + extra
        neighbours = STABLE.log_snr(torch.tensor([[0, 1], [998, 999]][end]))
        slope = (neighbours[1] - neighbours[0]).item()
        found = log_snr_timesteps(STABLE, value[None]).item()
        assert found == pytest.approx(ends[end] + extra / slope)


def test_settings_choose_the_rule_by_the_schedule():
    auto, t = DistillSettings(), torch.arange(1000)
    assert auto.shift_schedule(STABLE)(t, 20, 999, make_rng(0)).equal(
        random_shift(0.1)(t, 20, 999, make_rng(0))
    )
    assert isinstance(auto.shift_schedule(SD3), LogSNRShift)
    assert not isinstance(DistillSettings(shift_in="timesteps").shift_schedule(SD3), LogSNRShift)
    carried = DistillSettings(shift_in="log-snr").shift_schedule(STABLE)
    assert carried(t, 20, 999, make_rng(0)).equal(random_shift(0.1)(t, 20, 999, make_rng(0)))


def test_the_share_of_sds_in_asd_reads_any_schedule():
    window, rule = (20, 980), random_shift(0.1)
    assert 0 < sds_share(rule, STABLE, window) < 0.2
    assert 0 < sds_share(rule, FLOW, window) < 1


# pooled text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5, 6, 7, 12, 13])
def test_pooled_text_comes_back(width):
    tokens, pooled = draw(3, 4, 6), draw(3, width, seed=1)
    packed = pack_text(tokens, pooled)
    assert packed.shape == (3, 4 + -(-width // 6), 6)
    for found, given in zip(unpack_text(packed, width), (tokens, pooled)):
        assert torch.equal(found, given)
    mixed = unpack_text(0.3 * packed + 0.7 * packed.flip(0), width)[1]
    torch.testing.assert_close(mixed, 0.3 * pooled + 0.7 * pooled.flip(0))


# methods on a flow --------------------------------------------------------------------------------


class Renders:
    "An estimator: what another mixture predicts."

    prediction_type = "v_prediction"

    def __init__(self, prior):
        self.prior, self.weight = prior, nn.Parameter(torch.zeros(()))

    def predict_noise(self, x_t, t, tokens, camera=None):
        return 0.9 * self.prior.predict_noise(x_t, t, tokens)

    def parameters(self):
        return iter([self.weight])


def methods_of(prior):
    "Every method, with what it needs besides a prior, latents, texts, timesteps and noise."
    shift = LogSNRShift(prior.schedule, deterministic_shift(0.1))

    def shifted(prior, latents, text, t, noise, **options):
        return asd(prior, latents, text, t, noise, shift(t, 20, 999, make_rng(0)), **options)

    def with_camera(*given, **options):
        camera = torch.ones(len(given[1]), 16).to(given[1])
        return esd(*given, camera=camera, estimator=Renders(prior), **options)

    learned = partial(vsd, estimator=Renders(prior))
    more = {"vsd": learned, "esd": with_camera, "nfsd": nfsd, "bridge": sds_bridge, "sdi": sdi}
    return {"sds": sds, "csd": csd, "asd": shifted, **more, "ism": ism, "rfds": rfds, "pfd": pfd}


NAMES = ["sds", "csd", "asd", "vsd", "esd", "nfsd", "bridge", "sdi", "ism", "rfds", "pfd"]


@FLOWS
@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_their_contract_on_a_flow(name, schedule):
    prior = make(schedule)
    more = {"nfsd_negative": texts_of(prior).unconditional, "bridge_source": texts_of(prior).plain}
    more["bridge_source"] = texts_of(prior).unconditional
    check_method(methods_of(prior)[name], prior, texts_of(prior, **more))


@FLOWS
def test_guidance_is_the_same_in_noise_and_in_velocity(schedule):
    prior = make(schedule)
    text, x_t = texts_with_negatives(prior), schedule.add_noise(X, NOISE, T)
    at = lambda y: schedule.v_from_eps(x_t, prior.predict_noise(x_t, T, y), T)
    v_y, v_0 = at(text.positive), at(text.unconditional)
    plain = texts_of(prior)
    step = rfds(prior, X, plain, T, NOISE, guidance=7.5)
    torch.testing.assert_close(step.gradient, v_0 + 7.5 * (v_y - v_0) - (NOISE - X))
    s = schedule.sigma(T, X)
    torch.testing.assert_close((step.target - step.source) / step.gradient, (1 - s).expand_as(X))
    # with negatives as well: perp-neg takes directions, which noise and velocity share
    pushed = rfds(prior, X, text, T, NOISE, guidance=7.5)
    both = sds(prior, X, text, T, NOISE, guidance=7.5, weight=uniform_weight)
    torch.testing.assert_close(both.gradient, (1 - s) * pushed.gradient)


@FLOWS
def test_identities_of_the_methods_hold_on_a_flow(schedule):
    prior = make(schedule)
    text = texts_of(prior)
    classifier = csd(prior, X, text, T, NOISE).gradient
    step = lambda method, **options: method(prior, X, text, T, NOISE, **options).gradient
    torch.testing.assert_close(step(sds, guidance=8.0) - step(sds, guidance=1.0), 7 * classifier)
    torch.testing.assert_close(
        asd(prior, X, text, T, NOISE, T, guidance=8.0).gradient, 7 * classifier
    )
    torch.testing.assert_close(
        pfd(prior, X, text, T, NOISE, steps=1, inversion_guidance=-7.5).gradient, step(sdi, eta=0.0)
    )


def test_rfds_on_stable_diffusion_weighs_velocities_too():
    prior = make()
    text, x_t = texts_of(prior), STABLE.add_noise(X, NOISE, T)
    eps = prior.predict_noise(x_t, T, text.positive)
    found = rfds(prior, X, text, T, NOISE, guidance=1.0).gradient
    v = STABLE.v_from_eps(x_t, eps, T) - STABLE.v_from_eps(x_t, NOISE, T)
    torch.testing.assert_close(found, v)


# a U-Net of a flow --------------------------------------------------------------------------------


def test_a_unet_of_a_flow_is_that_of_diffusers(unet_flow):
    "Its velocity, at the timesteps of the scheduler, and the pipeline's own samples."
    prior = open_prior(unet_flow)
    assert type(prior) is StableDiffusionPrior and type(prior.schedule) is FlowSchedule
    check_prior(prior, TEXTS)
    pipe = StableDiffusionPipeline.from_pretrained(unet_flow, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    x_t, t = torch.randn(3, 4, 8, 8, generator=make_rng(0)), torch.tensor([0, 470, 998])
    tokens = prior.encode_text([*TEXTS, ""]).tokens
    with torch.no_grad():
        velocity = pipe.unet(x_t, pipe.scheduler.timesteps.flip(0)[t], tokens).sample
    s = prior.schedule.levels[t].float().view(3, 1, 1, 1)
    eps = prior.predict_noise(x_t, t, tokens)
    torch.testing.assert_close(eps, x_t + (1 - s) * velocity, atol=1e-5, rtol=1e-5)
    pipe.scheduler.init_noise_sigma = 1.0  # Stable Diffusion's pipeline scales its noise by it
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    theirs = pipe("a red ball", height=16, width=16, latents=x_t[:1], **options).images
    at = (pipe.scheduler.sigmas[:, None] - prior.schedule.levels).abs().argmin(1)[:-1]
    pair, x = prior.encode_text(["", "a red ball"]).tokens, x_t[:1]
    with torch.no_grad():
        for now, to in zip(at, [*at[1:], None]):
            found = prior.predict_noise(x.repeat(2, 1, 1, 1), now.expand(2), pair)
            v = prior.schedule.v_from_eps(x, found[:1] + 5 * (found[1:] - found[:1]), now[None])
            levels = prior.schedule.levels.float()
            if to is None:
                x = x - levels[now] * v
            elif now == 999:  # v has no eps there
                x = x + (levels[to] - 1) * _velocity(prior, x, now, pair)
            else:
                x = x + (levels[to] - levels[now]) * v
    torch.testing.assert_close(x, theirs, atol=0.01, rtol=0.01)


def _velocity(prior, x, now, pair):
    v = prior.raw_output(prior.unet, x.repeat(2, 1, 1, 1), now.expand(2), pair)
    return v[:1] + 5 * (v[1:] - v[:1])


@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_their_contract_on_a_unet_of_a_flow(unet_flow, name):
    "In float64, since RFDS at guidance 100 divides differences of noise by 1 - s, here .007."
    prior = open_prior(unet_flow).to("cpu", DOUBLE)
    text = make_conditioning(
        prior, [*TEXTS, "a cube"], nfsd_negative_prompt="a ball", bridge_source_prompt=""
    )
    parts = (getattr(text, field.name) for field in fields(text))
    text = Conditioning(*(part if part is None else part.to(DOUBLE) for part in parts))
    check_method(methods_of(prior)[name], prior, text)


def test_the_estimator_of_a_unet_of_a_flow_learns_its_velocity(unet_flow):
    prior = open_prior(unet_flow)
    estimator = LoRAEstimator(prior)
    x, noise = (torch.randn(3, 4, 8, 8, generator=make_rng(i)) for i in range(2))
    tokens = prior.encode_text([*TEXTS, ""]).tokens
    s = prior.schedule.levels[T].float()
    velocity = lambda x_s, s: prior.raw_output(prior.unet, x_s, T, tokens)
    with torch.no_grad():
        found = estimator_loss(estimator, prior.schedule, x, tokens, T, noise)
        torch.testing.assert_close(found, flow_loss(velocity, x, noise, s))


# the recipe ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def renders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("renders")
    make_renders(folder, 12, prior_renders(0), show=False)
    return RenderSet(folder)


def tiny_training(renders, **settings):
    with seeded(0):
        vae = make_autoencoder(renders.batch(list(range(12)), make_rng(0)))
    return TinyTraining(renders, vae, RecipeSettings(**{"steps": 40, "batch": 8} | settings))


@pytest.mark.parametrize("views", [1, 4])
def test_the_recipe_trains_a_flow_and_its_folder_opens(renders, tmp_path, views):
    tiny = tiny_training(renders, objective="flow", views=views)
    losses = [tiny.step() for _ in range(12)]
    assert sum(losses[-3:]) < sum(losses[:3])
    save_training(tiny, tmp_path)
    again = tiny_training(renders, objective="flow", views=views)
    load_training(again, tmp_path)
    assert again.step() == tiny.step()
    save_pipeline(tiny, tmp_path / "made")
    prior = open_prior(tmp_path / "made")
    assert type(prior.schedule) is FlowSchedule and getattr(prior, "views", 1) == views
    assert "flow matching" in model_card(tiny, "made")


def test_a_training_with_another_objective_is_refused(renders, tmp_path):
    save_training(tiny_training(renders), tmp_path)
    with pytest.raises(UsageError, match="has a training whose objective differ"):
        load_training(tiny_training(renders, objective="flow"), tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    del state["settings"]["objective"]  # as in an older version
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match="has a training whose objective differ"):
        load_training(tiny_training(renders), tmp_path)


# Stable Diffusion 3 -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "t5"])
def test_a_folder_opens_and_keeps_the_contract(folders, name):
    prior = open_prior(folders / name)
    assert type(prior) is StableDiffusion3Prior and prior.view_vocabulary == "words"
    check_prior(prior, TEXTS)
    assert not any(p.requires_grad for network in prior.networks for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_their_contract_on_stable_diffusion_3(sd3, name):
    text = make_conditioning(
        sd3, [*TEXTS, "a cube"], nfsd_negative_prompt="a ball", bridge_source_prompt=""
    )
    check_method(methods_of(sd3)[name], sd3, text)


def test_identities_on_stable_diffusion_3(sd3):
    angles = torch.tensor([0.0, 50.0, 170.0])
    latents, noise = (torch.randn(3, 4, 8, 8, generator=make_rng(i)) for i in range(2))
    t = torch.tensor([60, 470, 900])
    alpha, x_t = sd3.schedule.alpha(t, latents), sd3.schedule.add_noise(latents, noise, t)
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)
    for view in ("perp-neg", "words"):
        text = make_conditioning(sd3, [*TEXTS, "a cube"], angles, 0 * angles, view)
        step = rfds(sd3, latents, text, t, noise, guidance=7.5)
        close(step.target - step.source, alpha * step.gradient)
    velocity = sd3.velocity(x_t, t, text.positive)
    close(rfds(sd3, latents, text, t, noise, guidance=1.0).gradient, velocity - (noise - latents))
    classifier = csd(sd3, latents, text, t, noise).gradient
    difference = (
        sds(sd3, latents, text, t, noise, guidance=8.0).gradient
        - sds(sd3, latents, text, t, noise, guidance=1.0).gradient
    )
    close(difference, 7 * classifier)


def test_the_pooled_text_reaches_the_network(sd3):
    x_t, t = torch.randn(1, 4, 8, 8, generator=make_rng(0)), torch.tensor([500])
    tokens = sd3.encode_text(["a red ball"]).tokens
    other = tokens.clone()
    other[:, -1] += 1.0
    assert not torch.allclose(sd3.velocity(x_t, t, tokens), sd3.velocity(x_t, t, other))


def test_the_estimator_of_a_transformer(sd3):
    "It begins as the prior, sees the camera once it is trained, and VSD and ESD run on it."
    latents, noise = (torch.randn(3, 4, 8, 8, generator=make_rng(i)) for i in range(2))
    t, text = torch.tensor([60, 470, 900]), make_conditioning(sd3, [*TEXTS, "a cube"])
    x_t, poses = sd3.schedule.add_noise(latents, noise, t), torch.ones(3, 16)
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)
    estimator, weights = LoRAEstimator(sd3), [*sd3.transformer.parameters()]
    before = [weight.clone() for weight in weights]
    close(
        vsd(sd3, latents, text, t, noise, guidance=8.0, estimator=estimator).gradient,
        7 * csd(sd3, latents, text, t, noise).gradient,
    )
    loss = estimator_loss(estimator, sd3.schedule, latents, text.positive, t, noise, poses)
    velocity = lambda x_s, s: sd3.velocity(x_s, t, text.positive)
    close(loss, flow_loss(velocity, latents, noise, sd3.schedule.levels[t].float()))
    optimizer = torch.optim.Adam(estimator.parameters(), 0.01)
    for _ in range(2):  # after the first step, all weights have gradients
        optimizer.zero_grad()
        loss = estimator_loss(estimator, sd3.schedule, latents, text.positive, t, noise, poses)
        loss.backward()
        optimizer.step()
    assert all(weight.grad.abs().max() > 0 for weight in estimator.parameters())
    with torch.no_grad():
        given = (x_t, t, text.positive)
        own, blind = (estimator.predict_noise(*given, pose) for pose in (poses, None))
        beside = predict_with_prior(sd3, estimator, [given], [(*given, poses), (*given, None)])
        close(beside[0][0], sd3.predict_noise(*given))
        for found, alone in zip(beside[1], (own, blind)):
            close(found, alone)
    assert (own - blind).abs().max() > 1e-3
    assert all(torch.equal(*pair) for pair in zip(weights, before))
    again = LoRAEstimator(sd3, seed=1)
    again.load_state_dict(estimator.state_dict())
    close(again.predict_noise(*given, poses), own)
    for method in (vsd, esd):
        check_method(
            lambda *args: method(*args, estimator=estimator, camera=torch.ones(len(args[1]), 16)),
            sd3,
            text,
        )


def test_a_training_run_on_a_flow(folders, tmp_path, capsys):
    corpus = tmp_path / "prompts.txt"
    corpus.write_text("a red ball\na blue cube\n")
    for method in ("asd", "rfds", "vsd"):
        out = tmp_path / method
        argv = ["train", "--corpus", corpus, "--prior", folders / "plain", "--method", method]
        argv += ["--steps", 2, "--generator", "ingp", "--prompts-per-step", 2, "--resolution", 8]
        argv += ["--eval-views", 0, "--log-every", 1, "--out", out]
        argv += ["--distill.view-prompting", "plain"]
        assert run_command([str(word) for word in argv]) == 0, capsys.readouterr()
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)[f"loss_{method}"] > 0 for line in lines) and len(lines) == 2
        guidance = json.loads((out / "config.json").read_text())["distill"]["guidance"]
        assert guidance is None  # that of the method's paper


def test_pipelines_that_cannot_be_read_are_named(folders, tmp_path, capsys):
    corpus, folder = tmp_path / "prompts.txt", tmp_path / "flux"
    corpus.write_text("a red ball\n")
    folder.mkdir()
    index = json.loads((folders / "plain/model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    argv = ["train", "--corpus", corpus, "--prior", folder, "--out", tmp_path / "run"]
    assert run_command([str(word) for word in argv]) == 2
    error = capsys.readouterr()[1]
    assert "a FluxPipeline has a second text encoder" in error
    assert "expected a StableDiffusionPipeline" in error and "StableDiffusion3Pipeline" in error


def test_what_is_downloaded_of_a_transformer(folders, monkeypatch):
    "All parts of a Stable Diffusion 3; of another model its index alone."
    names = [
        path.relative_to(folders / "t5").as_posix()
        for path in (folders / "t5").rglob("*")
        if path.is_file()
    ]
    found, index = {}, {"file": folders / "t5/model_index.json"}

    def snapshot_download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        found["files"] = allow_patterns
        return str(index["file"].parent)

    siblings = [SimpleNamespace(rfilename=name) for name in [*names, "sd3_medium.safetensors"]]
    info = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **options: str(index["file"]))
    assert open_prior("owner/name").text.t5 is not None
    assert sorted(found["files"]) == sorted(names)
    other = json.loads(index["file"].read_text()) | {"_class_name": "FluxPipeline"}
    index["file"] = folders / "flux/model_index.json"
    index["file"].parent.mkdir()
    index["file"].write_text(json.dumps(other))
    with pytest.raises(UsageError, match="a FluxPipeline has a third text encoder"):
        open_prior("owner/name")
    assert found["files"] == ["model_index.json"]
