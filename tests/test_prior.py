"""Priors against independent oracles: brute force, finite differences, diffusers, damaged files."""

import json
import shutil
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.tensors import make_rng, seed_everything
from scaledreamer.distill.conditioning import make_conditioning
from scaledreamer.distill.estimator import LoRAEstimator
from scaledreamer.distill.later_methods import ism, nfsd, sdi
from scaledreamer.distill.method_checks import check_method
from scaledreamer.distill.methods import asd, csd, sds
from scaledreamer.distill.shift import deterministic_shift
from scaledreamer.distill.vsd import vsd
from scaledreamer.prior.base import predict_noise_batched
from scaledreamer.prior.execution import PriorSettings
from scaledreamer.prior.guidance import classifier_free_guidance, perpendicular
from scaledreamer.prior.mixture import MixturePrior
from scaledreamer.prior.open_prior import open_prior
from scaledreamer.prior.pipelines import quiet, random_pipeline
from scaledreamer.prior.prior_checks import check_prior
from scaledreamer.prior.schedule import NoiseSchedule, scaled_linear
from scaledreamer.prior.stable_diffusion import TINY, StableDiffusionPrior
from scaledreamer.prior.stable_diffusion_xl import StableDiffusionXLPrior, random_sdxl_pipeline
from fixtures import DOUBLE, draw


# the schedule -------------------------------------------------------------------------------------


def test_published_variances():
    "The published values of sigma squared, to the digits given."
    published = {
        20: 0.0187,
        100: 0.106,
        200: 0.246,
        300: 0.410,
        400: 0.576,
        500: 0.724,
        600: 0.839,
        700: 0.917,
        800: 0.963,
        900: 0.986,
        980: 0.994,
        999: 0.995,
    }
    variance = 1 - scaled_linear().abar(torch.tensor(list(published)))
    torch.testing.assert_close(
        variance, torch.tensor(list(published.values()), dtype=DOUBLE), atol=6e-4, rtol=0
    )


@given(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=1, max_size=8), st.data())
@settings(max_examples=30, deadline=None)
def test_conversions_invert_each_other(abar, data):
    schedule = NoiseSchedule(torch.tensor(sorted(abar, reverse=True), dtype=DOUBLE))
    t = torch.tensor(data.draw(st.lists(st.integers(0, len(abar) - 1), min_size=1, max_size=4)))
    x0, eps = (draw(len(t), 2, 3, seed=i) for i in range(2))
    x_t = schedule.add_noise(x0, eps, t)
    v = schedule.v_from_eps(x_t, eps, t)
    for ours, true in (
        (schedule.x0_from_v(x_t, v, t), x0),
        (schedule.eps_from_v(x_t, v, t), eps),
        (schedule.eps_from_x0(x_t, x0, t), eps),
    ):
        torch.testing.assert_close(
            ours, true, atol=1e-6, rtol=0
        )  # 1e-16 over the smallest sigma and alpha, squared


def test_timesteps_are_checked():
    schedule = scaled_linear(10)
    for t in (torch.tensor([10]), torch.tensor([-1])):
        with pytest.raises(UsageError):
            schedule.add_noise(torch.zeros(1, 2), torch.zeros(1, 2), t)


# guidance -----------------------------------------------------------------------------------------


def test_guidance_of_one_item_does_not_see_the_others():
    eps, empty, *negatives = draw(4, 3, 4, 5, 5)
    weights = draw(3, 2, seed=1)
    whole = classifier_free_guidance(empty, eps, 7.5, negatives, weights)
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(
            classifier_free_guidance(
                empty[row], eps[row], 7.5, [n[row] for n in negatives], weights[row]
            ),
            whole[row],
        )


def test_perpendicular_is_finite_where_there_is_no_direction():
    x = torch.ones(2, 3, requires_grad=True)
    y = torch.zeros(2, 3, requires_grad=True)
    perpendicular(x, y).sum().backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


def test_camera_goes_along_with_every_evaluation():
    class Seeing(MixturePrior):
        def predict_noise(self, x_t, t, tokens, camera=None):
            self.seen = camera
            return x_t

    prior, camera = Seeing({"a": torch.zeros(1, 2)}), torch.arange(32.0).reshape(2, 16)
    y = prior.encode_text(["a", "a"]).tokens
    predict_noise_batched(prior, [(torch.zeros(2, 2), torch.tensor([1, 2]), y)] * 3, camera)
    assert torch.equal(prior.seen, torch.cat([camera] * 3))


# mixtures -----------------------------------------------------------------------------------------


def mixture(shape=(3, 2, 2), std=0.4, dtype=DOUBLE, scale=1.0):
    sizes = {"a cat, front view": 4, "a cat, side view": 2, "a dog": 3, "a cow": 1}
    rng = make_rng(5)
    means = {
        c: scale * torch.randn(k, *shape, generator=rng, dtype=dtype) for c, k in sizes.items()
    }
    weights = {c: torch.rand(k, generator=rng) + 0.1 for c, k in sizes.items()}
    return MixturePrior(means, std, weights), means, weights


def brute_force(means, weights, shares, std, schedule, x_t, t):
    "log p_t(x_t) of one item, component by component; `shares` of captions."
    abar = schedule.alphas_cumprod[t]
    v = abar * std**2 + 1 - abar
    terms = []
    for caption, share in shares.items():
        for mean, weight in zip(
            means[caption], weights[caption].double() / weights[caption].double().sum()
        ):
            gap = (x_t - abar.sqrt() * mean).square().sum()
            terms.append(
                (share * weight).log() - gap / (2 * v) - mean.numel() / 2 * (2 * torch.pi * v).log()
            )
    return torch.stack(terms).logsumexp(0)


VIEWS = ("a cat, front view", "a cat, side view")
TEXTS = {
    "a dog": {"a dog": 1.0},
    "a cat": {caption: 0.5 for caption in VIEWS},
    "": {caption: 0.25 for caption in (*VIEWS, "a dog", "a cow")},
}


@pytest.mark.parametrize("t", [0, 40, 500, 999])
def test_mixture_is_the_sum_over_its_components(t):
    prior, means, weights = mixture()
    x_t = draw(3, 3, 2, 2)
    tokens, times = prior.encode_text(list(TEXTS)).tokens, torch.full((3,), t)
    truth = [
        brute_force(means, weights, shares, 0.4, prior.schedule, x, t)
        for x, shares in zip(x_t, TEXTS.values())
    ]
    torch.testing.assert_close(
        prior.log_density(x_t, times, tokens), torch.stack(truth), atol=1e-9, rtol=1e-9
    )

    eps = prior.predict_noise(x_t, times, tokens)
    sigma = prior.schedule.sigma(times, x_t).flatten()
    step = 1e-5  # central differences: error about step^2 and 1e-16 / step
    for i, shares in enumerate(TEXTS.values()):
        for j in range(12):
            nudge = torch.zeros(12, dtype=DOUBLE)
            nudge[j] = step
            up, down = (
                brute_force(
                    means,
                    weights,
                    shares,
                    0.4,
                    prior.schedule,
                    x_t[i] + s * nudge.reshape(3, 2, 2),
                    t,
                )
                for s in (1, -1)
            )
            assert abs(-sigma[i] * (up - down) / (2 * step) - eps[i].flatten()[j]) < 1e-6


def test_mixture_in_float32_is_the_one_in_float64():
    wide, narrow = mixture((3, 8, 8), 0.05)[0], mixture((3, 8, 8), 0.05)[0]
    narrow.components.to(torch.float32)
    x0, noise = (torch.randn(2, 3, 8, 8, generator=make_rng(i)) for i in range(2))
    for t in (0, 20, 500, 999):
        times, tokens = torch.full((2,), t), wide.encode_text(["a cat", ""]).tokens
        x_t = wide.schedule.add_noise(x0.double(), noise.double(), times)
        exact = wide.predict_noise(x_t, times, tokens)
        ours = narrow.predict_noise(x_t.float(), times, tokens.float())
        # 2e-6 of x_t's noise and means, divided by the smallest deviation of p_t, .058
        torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=1e-4)


def test_mixture_does_not_depend_on_the_order_of_its_captions():
    prior, means, weights = mixture()
    turned = MixturePrior(dict(reversed(means.items())), 0.4, weights)
    x_t, t = draw(3, 3, 2, 2), torch.tensor([10, 400, 900])
    for text in TEXTS:
        ours, theirs = (
            p.predict_noise(x_t, t, p.encode_text([text] * 3).tokens) for p in (prior, turned)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("std", [0.0, 0.05, 10.0])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_mixture_is_finite_at_extremes(std, size):
    prior = mixture(std=std, dtype=torch.float32, scale=100.0)[0]
    x_t = (size * torch.randn(3, 3, 2, 2, generator=make_rng(0))).requires_grad_()
    eps = prior.predict_noise(
        x_t, torch.tensor([0, 500, 999]), prior.encode_text(["a cat", "", "a dog"]).tokens
    )
    eps.sum().backward()
    assert eps.isfinite().all() and x_t.grad.isfinite().all()


def test_mixture_keeps_the_contract_of_priors():
    seed_everything(0)
    prior = mixture((3, 4, 4), dtype=torch.float32)[0]
    check_prior(prior, ["a dog", "a cat"])
    with pytest.raises(UsageError, match="the nearest of its 3 prompts: 'a dog'"):
        prior.encode_text(["a dig"])


# Stable Diffusion ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["epsilon tiny", "v_prediction kl"])
def pipeline(request, tmp_path_factory):
    "A random pipeline and its folder."
    seed_everything(0)
    kind, vae = request.param.split()
    made, folder = random_pipeline(kind, vae == "kl"), tmp_path_factory.mktemp("pipeline")
    with quiet():
        made.save_pretrained(folder)
    return made, folder


def test_loaded_pipeline_is_the_saved_one(pipeline):
    made, folder = pipeline
    prior = StableDiffusionPrior.from_pretrained(folder)
    check_prior(prior, ["a red ball", "a blue cube, <az+45> <el+15>"])
    y, (theirs, _) = (
        prior.encode_text(["a ball", ""]),
        made.encode_prompt(["a ball", ""], "cpu", 1, False),
    )
    torch.testing.assert_close(y.tokens, theirs.detach(), atol=1e-5, rtol=1e-5)
    x, t = torch.randn(2, 4, 8, 8, generator=make_rng(0)), torch.tensor([100, 900])
    out = made.unet(x, t, y.tokens).sample.detach()
    expected = out if prior.prediction_type == "epsilon" else prior.schedule.eps_from_v(x, out, t)
    torch.testing.assert_close(prior.predict_noise(x, t, y.tokens), expected, atol=1e-5, rtol=1e-5)


def test_posterior_is_sampled_from_a_generator_alone(pipeline):
    prior = StableDiffusionPrior.from_pretrained(pipeline[1])
    rgb = torch.rand(2, 3, 24, 24, generator=make_rng(0))
    before = torch.get_rng_state()
    plain, one, again, other = (
        prior.encode_image(rgb, rng) for rng in (None, make_rng(1), make_rng(1), make_rng(2))
    )
    assert torch.equal(one, again) and torch.equal(torch.get_rng_state(), before)
    has_posterior = type(prior.vae).__name__ == "AutoencoderKL"
    assert torch.equal(one, other) == torch.equal(plain, one) == (not has_posterior)


def test_resizing_is_bilinear_without_aligned_corners(pipeline):
    prior = StableDiffusionPrior.from_pretrained(pipeline[1])
    small = torch.rand(1, 3, 16, 16, generator=make_rng(0))
    large = small.repeat_interleave(2, 2).repeat_interleave(
        2, 3
    )  # bilinear halving averages each 2 x 2
    torch.testing.assert_close(
        prior.encode_image(large), prior.encode_image(small), atol=1e-5, rtol=1e-5
    )


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_files_cut_short_are_named(pipeline, tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        folder = copy_of(pipeline[1], tmp_path / part)
        (file,) = (folder / part).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(
            RunError, match=f"{part}/{file.name} is no whole safetensors file .*: copy or download"
        ):
            StableDiffusionPrior.from_pretrained(folder)


class Hostile:
    "Creates a file when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_read_as_tensors_alone(pipeline, tmp_path):
    folder, mark = copy_of(pipeline[1], tmp_path), tmp_path / "executed"
    (file,) = (folder / "unet").glob("*.safetensors")
    file.unlink()
    state = pipeline[0].unet.state_dict()
    torch.save(state, file.with_suffix(".bin"))
    loaded = StableDiffusionPrior.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    torch.save({**state, "more": Hostile(mark)}, file.with_suffix(".bin"))
    with pytest.raises(RunError, match=r"unet/.*\.bin could not be read \(it holds more than tens"):
        StableDiffusionPrior.from_pretrained(folder)
    assert not mark.exists()


def test_other_models_are_refused(pipeline, tmp_path):
    folder = copy_of(pipeline[1], tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    for change in (
        {"unet": ["diffusers", "SD3Transformer2DModel"]},
        {"text_encoder_2": ["transformers", "CLIPTextModel"]},
    ):
        (folder / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(UsageError, match="expected a StableDiffusionPipeline"):
            StableDiffusionPrior.from_pretrained(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    with pytest.raises(UsageError, match=r"vae is \[null, null\] in this .*: expected a pair such"):
        StableDiffusionPrior.from_pretrained(folder)
    with pytest.raises(UsageError, match="no folder"):
        StableDiffusionPrior.from_pretrained(tmp_path / "absent")
    with pytest.raises(RunError, match="no/such-model could not be read"):
        StableDiffusionPrior.from_pretrained("no/such-model")  # offline: conftest.py


def test_long_prompts(pipeline):
    texts = ["a red ball on " * 5, "a blue ball on " * 5]
    prior = StableDiffusionPrior.from_pretrained(pipeline[1])
    with pytest.warns(UserWarning, match="more than 10 tokens"):
        pooled = prior.encode_text(texts).pooled
    assert not torch.allclose(
        pooled[0], pooled[1], atol=1e-3
    )  # the release gives all long prompts one vector
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.encode_text(["a blue cube on " * 5])  # said once
    with pytest.raises(UsageError, match="more than 10 tokens: shorten it"):
        StableDiffusionPrior.from_pretrained(pipeline[1], strict=True).encode_text(texts)


def test_text_cache_is_bounded_and_complete(pipeline):
    prior = StableDiffusionPrior.from_pretrained(pipeline[1])
    texts = [f"{'a ' * i}ball" for i in range(9)] * 2
    free = prior.encode_text(texts)
    prior.text.size = 4
    small = prior.encode_text(texts)
    assert torch.equal(free.tokens, small.tokens) and len(prior.text.known) == 4
    one = torch.cat([prior.encode_text([text]).pooled for text in texts])
    torch.testing.assert_close(one, free.pooled, atol=1e-5, rtol=1e-5)


# Stable Diffusion XL ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    "The folder of a small Stable Diffusion XL, as diffusers writes it, and its pipeline."
    seed_everything(0)
    folder, pipe = tmp_path_factory.mktemp("xl"), random_sdxl_pipeline()
    with quiet():
        pipe.save_pretrained(folder)
    return folder, pipe


XL_TEXTS = ["a red ball", "a blue cube", "a cube"]


def test_sdxl_is_that_of_diffusers(xl):
    "Its guided noise, from the texts and sizes that the pipeline makes."
    folder, pipe = xl
    prior = open_prior(folder)
    assert type(prior) is StableDiffusionXLPrior and prior.image_size == 16
    check_prior(prior, XL_TEXTS)
    x_t, t = torch.randn(3, 4, 8, 8, generator=make_rng(0)), torch.tensor([0, 470, 999])
    y, empty, pooled, no_text = pipe.encode_prompt(XL_TEXTS, device="cpu")  # frozen, as the U-Net
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).expand(3, -1)
    noise = lambda states, text: (
        pipe.unet(x_t, t, states, added_cond_kwargs={"text_embeds": text, "time_ids": sizes}).sample
    )
    found = predict_noise_batched(
        prior, [(x_t, t, prior.encode_text(words).tokens) for words in (XL_TEXTS, [""] * 3)]
    )
    for ours, theirs in zip(found, (noise(y, pooled), noise(empty, no_text))):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    sharing = open_prior(folder, PriorSettings(shared_text=True))
    again = predict_noise_batched(
        sharing, [(x_t, t, sharing.encode_text(XL_TEXTS).tokens) for _ in range(2)]
    )
    for ours in again:
        torch.testing.assert_close(ours, found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [sds, csd, asd, nfsd, sdi, ism])
def test_methods_keep_their_contract_on_sdxl(xl, method):
    prior = open_prior(xl[0])
    if method is asd:
        rule = deterministic_shift(0.1)
        method = lambda *given: asd(*given, rule(given[3], 20, 999, make_rng(0)))
    text = make_conditioning(prior, XL_TEXTS, nfsd_negative_prompt="a ball")
    check_method(method, prior, text)


def test_identities_and_the_estimator_on_sdxl(xl):
    prior = open_prior(xl[0])
    latents, noise = (torch.randn(3, 4, 8, 8, generator=make_rng(i)) for i in range(2))
    t, text = torch.tensor([60, 470, 900]), make_conditioning(prior, XL_TEXTS)
    step = lambda method, **options: method(prior, latents, text, t, noise, **options).gradient
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)
    classifier = step(csd)
    close(step(sds, guidance=8.0) - step(sds, guidance=1.0), 7 * classifier)
    close(asd(prior, latents, text, t, noise, t, guidance=8.0).gradient, 7 * classifier)
    estimator = LoRAEstimator(prior)  # begins as the prior, so that VSD is guidance alone
    close(step(vsd, estimator=estimator, guidance=8.0), 7 * classifier)


def test_what_is_downloaded_of_sdxl(xl, monkeypatch):
    "All of its parts; a file of the whole model beside them is left."
    names = [path.relative_to(xl[0]).as_posix() for path in xl[0].rglob("*") if path.is_file()]
    asked = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        asked.extend(allow_patterns)
        return str(xl[0])

    siblings = [SimpleNamespace(rfilename=name) for name in [*names, "sd_xl_base.safetensors"]]
    info, index = SimpleNamespace(siblings=siblings), str(xl[0] / "model_index.json")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **options: index)
    assert type(open_prior("owner/name")) is StableDiffusionXLPrior
    assert {*asked} == {*names}


def test_sdxl_folders_that_cannot_be_read_are_named(xl, tmp_path):
    folder = shutil.copytree(xl[0], tmp_path / "xl")

    def said(file="model_index.json", **values):
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(before) | values))
        with pytest.raises(UsageError) as caught:
            open_prior(folder)
        (folder / file).write_text(before)
        return str(caught.value)

    refiner = {"text_encoder": [None, None], "tokenizer": [None, None]}
    for kind in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"):
        found = said(_class_name=kind, **refiner)
        assert f"a {kind} without its first text encoder refines images" in found
        assert "expected a StableDiffusionPipeline" in found
    found = said("unet/config.json", addition_time_embed_dim=16)
    assert "projection_class_embeddings_input_dim is 56: expected 104" in found
    found = said("unet/config.json", addition_embed_type=None)
    assert "addition_embed_type is None: expected 'text_time', as in SDXL" in found
    with pytest.raises(UsageError, match="open it with open_prior"):
        StableDiffusionPrior.from_pretrained(folder)


@pytest.mark.skipif(
    not (TINY / "model_index.json").exists(), reason=f"the tiny prior is not built yet: {TINY}"
)
def test_shipped_prior():
    prior = StableDiffusionPrior.from_pretrained()
    check_prior(prior, ["a red ball, front view", "a blue cube, <az+45> <el+15>"])
