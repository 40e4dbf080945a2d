"""All methods: identities on exact priors, independent items, the estimator of VSD and ESD."""

from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scaledreamer.distill.method_checks import check_method
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.distill.estimator import (
    Estimator,
    LoRAEstimator,
    predict_with_prior,
    estimator_loss,
)
from scaledreamer.distill.gradient import (
    fantasia3d_weight,
    prescribed_gradient_loss,
    sds_weight,
    uniform_weight,
)
from scaledreamer.distill.later_methods import invert, ism, nfsd, sdi, sds_bridge
from scaledreamer.distill.methods import asd, cosine, csd, norms, sds, projection_share
from scaledreamer.distill.shift import deterministic_shift
from scaledreamer.distill.vsd import EstimatorTrainer, esd, vsd
from scaledreamer.prior.base import Conditioning
from scaledreamer.prior.mixture import MixturePrior
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior
from fixtures import (
    DOUBLE,
    NOISE,
    SHAPE,
    T,
    X,
    draw,
    make,
    plane,
    texts_with_negatives,
    rows,
    say,
    texts_of,
)


class Renders:
    "An exact estimator: a mixture that stands for the renders, moved by the camera."

    prediction_type = "epsilon"

    def __init__(self, prior):
        self.prior, self.weight = prior, nn.Parameter(torch.zeros(()))

    def predict_noise(self, x_t, t, tokens, camera=None):
        told = (
            0 if camera is None else 0.1 * camera.to(x_t).sum(1).reshape(-1, *[1] * (x_t.ndim - 1))
        )
        return self.prior.predict_noise(x_t - told, t, tokens)

    def parameters(self):
        return iter([self.weight])


PRIOR, RENDERS = make(a=4, b=3, c=2, bad=3), Renders(make(z=1, y=2, x=2, w=4))
CAMERA = draw(3, 16, seed=13).float()
TEXTS = {
    "plain": say(PRIOR, "c", "c", "b"),
    "nfsd_negative": say(PRIOR, "bad", "bad", "bad"),
    "bridge_source": say(PRIOR, "c", "bad", "bad"),
}
BARE, FULL, PUSHED = texts_of(PRIOR), texts_of(PRIOR, **TEXTS), texts_with_negatives(PRIOR, **TEXTS)


def with_shift(prior, latents, text, t, noise, camera=None, **options):
    return asd(
        prior, latents, text, t, noise, deterministic_shift(0.1)(t, 20, 999, make_rng(0)), **options
    )


def blind(method):
    "For the methods that hand the camera to the prior, which a mixture refuses."
    return lambda *args, camera=None, **options: method(*args, **options)


METHODS = {
    "sds": blind(sds),
    "csd": blind(csd),
    "asd": with_shift,
    "vsd": partial(vsd, estimator=RENDERS),
    "esd": partial(esd, estimator=RENDERS),
    "nfsd": blind(nfsd),
    "bridge": blind(sds_bridge),
    "sdi": blind(sdi),
    "ism": blind(ism),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def eps(tokens, t=T, x=X):
    return PRIOR.predict_noise(PRIOR.schedule.add_noise(x, NOISE, t), t, tokens)


# every method -------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("text", [FULL, PUSHED], ids=["plain", "perp-neg"])
def test_the_pieces_fit(method, text):
    step = method(PRIOR, X, text, T, NOISE, camera=CAMERA)
    wide = step.weight.reshape(3, 1, 1, 1)
    torch.testing.assert_close(step.gradient, wide * (step.target - step.source))
    torch.testing.assert_close(step.classifier + step.non_guidance, step.gradient)
    torch.testing.assert_close(
        projection_share(step.classifier, step.gradient)
        + projection_share(step.non_guidance, step.gradient),
        torch.ones(3, dtype=DOUBLE),
    )
    assert not any(
        getattr(step, name).requires_grad for name in ("gradient", "classifier", "target", "source")
    )


@every_method
def test_the_surrogate_carries_it_exactly(method):
    latents = X.clone().requires_grad_()
    gradient = method(PRIOR, latents, FULL, T, NOISE, camera=CAMERA).gradient
    (carried,) = torch.autograd.grad(prescribed_gradient_loss(latents, gradient), latents)
    torch.testing.assert_close(3 * carried, gradient, atol=1e-14, rtol=1e-13)
    assert torch.equal(latents, X)


@given(
    st.permutations(range(3)),
    st.integers(1, 3),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from([FULL, PUSHED]),
)
@settings(max_examples=40, deadline=None)
def test_a_batch_is_its_items(order, count, name, text):
    index = torch.tensor(order[:count])
    whole = METHODS[name](PRIOR, X, text, T, NOISE, camera=CAMERA)
    some = METHODS[name](
        PRIOR, X[index], rows(text, index), T[index], NOISE[index], camera=CAMERA[index]
    )
    for part in ("gradient", "classifier", "target", "source", "weight", "t", "t_shifted"):
        torch.testing.assert_close(
            getattr(some, part), getattr(whole, part)[index], atol=1e-9, rtol=1e-9
        )


@every_method
def test_all_that_is_random_is_the_noise(method):
    state = torch.get_rng_state()
    once, again, other = (
        method(PRIOR, X, FULL, T, n, camera=CAMERA).gradient
        for n in (NOISE, NOISE, draw(3, *SHAPE, seed=99))
    )
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert torch.equal(state, torch.get_rng_state())


@every_method
@pytest.mark.parametrize("weight", [uniform_weight, fantasia3d_weight])
def test_the_weight_only_weighs(method, weight):
    one, other = (
        method(PRIOR, X, FULL, T, NOISE, camera=CAMERA, weight=w) for w in (sds_weight, weight)
    )
    ratio = (weight(PRIOR.schedule, T) / sds_weight(PRIOR.schedule, T)).reshape(3, 1, 1, 1)
    for part in ("gradient", "classifier"):
        torch.testing.assert_close(getattr(other, part), ratio * getattr(one, part))


@every_method
def test_a_method_of_points(method):
    points, empty = plane(), say(plane(), "", "", "")
    text = texts_of(points, nfsd_negative=empty, bridge_source=empty)
    own = {"estimator": Renders(points)} if getattr(method, "func", None) in (vsd, esd) else {}
    assert method(
        points, draw(3, 2), text, T, draw(3, 2, seed=3), camera=CAMERA, **own
    ).gradient.shape == (3, 2)


@pytest.mark.parametrize("name", ["sds", "csd", "asd", "nfsd", "bridge", "sdi", "ism", "vsd"])
def test_the_contract(name):
    check_method(METHODS[name], PRIOR, PUSHED)


# one by one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sds", "asd", "vsd", "esd", "nfsd"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_classifier_is_guidance_less_one(name, guidance):
    w = PRIOR.schedule.sigma(T, X).square()
    step = METHODS[name](PRIOR, X, FULL, T, NOISE, camera=CAMERA, guidance=guidance)
    torch.testing.assert_close(
        step.classifier,
        w * (guidance - 1) * (eps(FULL.positive) - eps(FULL.unconditional)),
        atol=1e-10,
        rtol=1e-9,
    )
    torch.testing.assert_close(
        step.non_guidance, w * (eps(FULL.positive) - step.source), atol=1e-10, rtol=1e-9
    )


def test_perp_neg_is_part_of_the_classifier():
    pushed, plain = (with_shift(PRIOR, X, text, T, NOISE) for text in (PUSHED, FULL))
    torch.testing.assert_close(pushed.non_guidance, plain.non_guidance, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(
        pushed.classifier - plain.classifier,
        pushed.gradient - plain.gradient,
        atol=1e-10,
        rtol=1e-9,
    )
    assert (norms(pushed.classifier - plain.classifier) > 1e-3).all()


@pytest.mark.parametrize("guidance", [0.0, 2.5, 7.5, 100.0])
def test_asd_without_shift_is_csd(guidance):
    ours, theirs = (
        asd(PRIOR, X, PUSHED, T, NOISE, T, guidance).gradient,
        (guidance - 1) * csd(PRIOR, X, FULL, T, NOISE).gradient,
    )
    plain = asd(PRIOR, X, FULL, T, NOISE, T, guidance).gradient
    assert ((norms(plain - theirs) / norms(theirs)) < 1e-6).all()
    assert guidance == 0 or not torch.allclose(ours, plain)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_nfsd(guidance):
    w, text = PRIOR.schedule.sigma(T, X).square(), FULL
    cfg = eps(text.unconditional) + guidance * (eps(text.positive) - eps(text.unconditional))
    early = torch.tensor([0, 120, 199])
    now = eps(text.unconditional, early) + guidance * (
        eps(text.positive, early) - eps(text.unconditional, early)
    )
    torch.testing.assert_close(
        nfsd(PRIOR, X, text, early, NOISE, guidance=guidance).gradient,
        PRIOR.schedule.sigma(early, X).square() * now,
        atol=1e-10,
        rtol=1e-9,
    )
    late = nfsd(PRIOR, X, text, T, NOISE, guidance=guidance, clean=0).gradient
    torch.testing.assert_close(late, w * (cfg - eps(text.nfsd_negative)), atol=1e-10, rtol=1e-9)


def test_bridge_from_the_empty_text_is_csd():
    text = Conditioning(BARE.positive, BARE.unconditional, bridge_source=BARE.unconditional)
    torch.testing.assert_close(
        sds_bridge(PRIOR, X, text, T, NOISE).gradient,
        csd(PRIOR, X, text, T, NOISE, guidance=40.0).gradient,
    )


def test_a_ddim_step_goes_back():
    seen = eps(BARE.positive)
    up = PRIOR.schedule.ddim_step(X, seen, T, T + 40)
    torch.testing.assert_close(PRIOR.schedule.ddim_step(up, seen, T + 40, T), X)
    torch.testing.assert_close(PRIOR.schedule.ddim_step(X, seen, T, T), X)


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_inversion_takes_the_steps_that_it_says(eta):
    asked = []

    def see(x, t, rows):
        asked.append((t.tolist(), rows.tolist()))
        return torch.zeros_like(x)

    until = torch.tensor([0, 250, 100])
    found = invert(PRIOR.schedule, see, X, until, NOISE, 100, eta)
    assert asked == [([0, 0], [1, 2]), ([100], [1]), ([200], [1])]
    torch.testing.assert_close(found[0], PRIOR.schedule.add_noise(X, NOISE, until)[0])
    spread = (found - invert(PRIOR.schedule, see, X, until, NOISE, 100)).flatten(1).norm(dim=1)
    assert spread[0] == 0 and bool((spread[1:] > 0).all()) == (eta > 0)


@pytest.mark.parametrize("stride", [20, 2])
def test_sources_of_sdi_and_ism_on_one_gaussian(stride):
    """The path of one Gaussian is x_t = alpha_t m + sqrt(v_t / v_0) (x_0 - alpha_0 m).

    The inversion is of first order in its stride.
    """
    bound = 0.02 * stride
    mean = draw(1, *SHAPE, seed=5)
    prior, schedule = MixturePrior({"a": mean}, 0.5), PRIOR.schedule
    text = Conditioning(*(prior.encode_text(["a"] * 3).tokens,) * 2)

    def path(t):
        zero = torch.zeros_like(t)
        v, v_0 = (
            schedule.alpha(s, X).square() / 4 + schedule.sigma(s, X).square() for s in (t, zero)
        )
        return schedule.alpha(t, X) * mean + (v / v_0).sqrt() * (
            schedule.add_noise(X, NOISE, zero) - schedule.alpha(zero, X) * mean
        )

    inverted = sdi(prior, X, text, T, NOISE, stride=stride, eta=0.0).source
    exact = schedule.eps_from_x0(path(T), X, T)
    assert (norms(inverted - exact) < bound * norms(exact)).all()
    below = ism(prior, X, text, T, NOISE, stride=stride)
    exact = prior.predict_noise(path(below.t_shifted), below.t_shifted, text.positive)
    assert (norms(below.source - exact) < bound * norms(exact)).all() and torch.equal(
        below.t_shifted, T - 50
    )


@pytest.mark.parametrize(
    "method, message",
    [
        (vsd, "vsd has no estimator: give one"),
        (partial(esd, camera=CAMERA), "esd has no estimator: give one"),
        (partial(esd, estimator=RENDERS), "esd has no camera"),
        (nfsd, "nfsd has no text of bad images"),
        (sds_bridge, "sds_bridge has no text of the renders"),
        (asd, "asd has no t_shifted"),
    ],
)
def test_what_is_missing_is_said(method, message):
    with pytest.raises(UsageError, match=message):
        method(PRIOR, X, BARE, T, NOISE)


def test_cosines_and_shares():
    one, other = draw(3, *SHAPE, seed=1), draw(3, *SHAPE, seed=2)
    torch.testing.assert_close(cosine(one, 5 * one), torch.ones(3, dtype=DOUBLE))
    torch.testing.assert_close(
        norms(one + other).square(),
        norms(one).square()
        + norms(other).square()
        + 2 * cosine(one, other) * norms(one) * norms(other),
    )
    torch.testing.assert_close(
        projection_share(one, one + other), 1 - projection_share(other, one + other)
    )


# the estimator ------------------------------------------------------------------------------------


def test_vsd_with_the_true_model_of_the_renders():
    "On the prior's own data only guidance remains; with a camera, the source moves."
    own = partial(vsd, estimator=Renders(PRIOR))
    text = Conditioning(BARE.positive, BARE.unconditional)
    torch.testing.assert_close(
        own(PRIOR, X, text, T, NOISE).gradient,
        6.5 * csd(PRIOR, X, text, T, NOISE).gradient,
        atol=1e-10,
        rtol=1e-9,
    )
    assert (norms(own(PRIOR, X, text, T, NOISE, camera=CAMERA).non_guidance) > 1e-3).all()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_esd_lies_between(share):
    told, untold = (
        vsd(PRIOR, X, FULL, T, NOISE, camera=camera, estimator=RENDERS).source
        for camera in (CAMERA, None)
    )
    step = esd(PRIOR, X, FULL, T, NOISE, camera=CAMERA, estimator=RENDERS, camera_guidance=share)
    torch.testing.assert_close(step.source, share * told + (1 - share) * untold)
    by_default = esd(PRIOR, X, FULL, T, NOISE, camera=CAMERA, estimator=RENDERS).source
    torch.testing.assert_close(by_default, (told + untold) / 2)


@pytest.fixture(scope="module")
def tiny():
    return StableDiffusionPrior.from_pretrained()


@pytest.fixture(scope="module")
def words(tiny):
    told = [
        tiny.encode_text(texts).tokens
        for texts in (
            ["a red mug, <az+0> <el+15>", "a blue cube, <az+90> <el+15>"],
            ["", ""],
            ["a red mug", "a blue cube"],
        )
    ]
    return Conditioning(*told[:2], plain=told[2])


def latents_of(tiny, seed):
    return torch.randn(2, *tiny.latent_shape, generator=make_rng(seed))


def shaken(estimator):
    with torch.no_grad():
        for weight in estimator.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=make_rng(3)))
    return estimator


def test_an_untrained_estimator_is_the_prior(tiny, words):
    plain = Conditioning(words.positive, words.unconditional)
    args = tiny, latents_of(tiny, 0), plain, torch.tensor([200, 800]), latents_of(tiny, 1)
    expected = 6.5 * csd(*args).gradient
    for camera in (torch.zeros(2, 16), CAMERA[:2]):
        for method in (vsd, esd):
            ours = method(*args, camera=camera, estimator=LoRAEstimator(tiny)).gradient
            assert (norms(ours - expected) < 1e-4 * norms(expected)).all()


def test_the_prior_is_untouched_to_the_bit(tiny, words):
    z, t = latents_of(tiny, 0), torch.tensor([200, 800])
    before, weights = (
        tiny.predict_noise(z, t, words.positive),
        {name: w.clone() for name, w in tiny.unet.state_dict().items()},
    )
    trainer = EstimatorTrainer(shaken(LoRAEstimator(tiny)), lr=1e-2)
    trainer.step(tiny.schedule, z, words.plain, CAMERA[:2], make_rng(0))
    vsd(tiny, z, words, t, latents_of(tiny, 1), camera=CAMERA[:2], estimator=trainer.estimator)
    assert torch.equal(tiny.predict_noise(z, t, words.positive), before)
    assert weights.keys() == tiny.unet.state_dict().keys()
    assert all(
        torch.equal(w, weights[name]) and not w.requires_grad
        for name, w in tiny.unet.named_parameters()
    )


def test_a_camera_is_left_out_of_one_step_in_ten():
    "Of 2,000 steps, by default; four standard deviations."
    blind = []

    class Sees:
        prediction_type = "epsilon"

        def __init__(self):
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def parameters(self):
            return iter([self.weight])

        def predict_noise(self, x_t, t, tokens, camera=None):
            blind.append(camera is None)
            return self.weight * x_t

    trainer, rng = EstimatorTrainer(Sees()), make_rng(0)
    for _ in range(2000):
        trainer.step(PRIOR.schedule, X, FULL.positive, CAMERA, rng)
    assert abs(sum(blind) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5


def test_one_call_for_prior_and_estimator(tiny, words):
    estimator, z, t = shaken(LoRAEstimator(tiny)), latents_of(tiny, 0), torch.tensor([200, 800])
    assert isinstance(estimator, Estimator)
    calls = []
    hook = estimator.network.register_forward_pre_hook(
        lambda network, args: calls.append(len(args[0]))
    )
    with torch.no_grad():
        theirs, own = predict_with_prior(
            tiny,
            estimator,
            [(z, t, words.positive), (z, t, words.unconditional)],
            [(z, t, words.plain, CAMERA[:2]), (z, t, words.plain, None)],
        )
        hook.remove()
        assert calls == [8]
        torch.testing.assert_close(
            theirs[0], tiny.predict_noise(z, t, words.positive), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            own[0], estimator.predict_noise(z, t, words.plain, CAMERA[:2]), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            own[1], estimator.predict_noise(z, t, words.plain), atol=1e-5, rtol=1e-4
        )
    assert (own[0] - own[1]).abs().max() > 1e-2 and (
        own[1] - tiny.predict_noise(z, t, words.plain)
    ).abs().max() > 1e-2


def test_fine_tuning_on_an_image_beats_the_prior_there(tiny, words):
    x = tiny.encode_image(torch.rand(1, 3, 64, 64, generator=make_rng(0)).round()).expand(
        4, -1, -1, -1
    )
    y, trainer = words.plain[:1].expand(4, -1, -1), EstimatorTrainer(LoRAEstimator(tiny), lr=3e-3)
    rng = make_rng(1)

    def loss(model):
        t, noise = torch.tensor([100, 350, 600, 850]), torch.randn(x.shape, generator=make_rng(2))
        return float(estimator_loss(model, tiny.schedule, x, y, t, noise).detach())

    before = loss(trainer.estimator)
    for _ in range(30):
        trainer.step(tiny.schedule, x, y, CAMERA[:1].expand(4, -1), rng)
    assert loss(trainer.estimator) < 0.8 * before
    assert abs(before - loss(LoRAEstimator(tiny))) < 1e-6


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_in_the_networks_own_words(tiny, words, kind):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind
    )
    prior = StableDiffusionPrior(tiny.unet, tiny.vae, tiny.text, scheduler)
    x, noise, t = latents_of(tiny, 0), latents_of(tiny, 1), torch.tensor([150, 750])
    said = tiny.unet(
        prior.schedule.add_noise(x, noise, t), t, encoder_hidden_states=words.plain
    ).sample
    wanted = {
        "epsilon": noise,
        "v_prediction": prior.schedule.alpha(t, x) * noise - prior.schedule.sigma(t, x) * x,
        "sample": x,
    }[kind]
    loss = estimator_loss(
        LoRAEstimator(prior), prior.schedule, x.requires_grad_(), words.plain, t, noise
    )
    torch.testing.assert_close(loss, (said - wanted).square().mean(), atol=1e-4, rtol=1e-4)
    loss.backward()
    assert x.grad is None  # the renders are not moved by it


def test_saved_weights_are_the_trained_ones_alone(tiny, words):
    one, other = shaken(LoRAEstimator(tiny)), LoRAEstimator(tiny, seed=7)
    saved = {name: weight.detach().clone() for name, weight in one.state_dict().items()}
    assert all("lora" in name or "class_embedding" in name for name in saved) and len(saved) == len(
        list(one.parameters())
    )
    other.load_state_dict(saved)
    z, t = latents_of(tiny, 0), torch.tensor([200, 800])
    assert torch.equal(
        one.predict_noise(z, t, words.plain, CAMERA[:2]),
        other.predict_noise(z, t, words.plain, CAMERA[:2]),
    )


def test_refusals_of_estimators(tiny, words):
    with pytest.raises(
        UsageError, match="MixturePrior has no U-Net for LoRA: give an estimator of your own"
    ):
        LoRAEstimator(PRIOR)
    trainer = EstimatorTrainer(LoRAEstimator(tiny))
    before = [weight.detach().clone() for weight in trainer.estimator.parameters()]
    with pytest.raises(RunError, match=r"the estimator's loss is nan at t = \["):
        trainer.step(tiny.schedule, latents_of(tiny, 0) * torch.nan, words.plain, None, make_rng(0))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.estimator.parameters()))
