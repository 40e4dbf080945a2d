"""The shipped weights: standard formats, small files, and sufficient quality."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from scaledreamer.camera.poses import orbit
from scaledreamer.camera.view_words import view_prompts
from scaledreamer.eval.clip import ClipScorer
from scaledreamer.prior.open_prior import open_prior
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior
from scaledreamer.recipes.tiny_sd_training import note_cameras
from scaledreamer.toybox.captions import CORPORA, object_of
from scaledreamer.toybox.renders import render_object

ASSETS = Path(str(files("scaledreamer"))) / "assets"


@pytest.mark.parametrize("name, megabytes", [("tiny-sd", 16), ("tiny-mv", 16), ("tiny-clip", 12)])
def test_size(name, megabytes):
    assert (
        sum(path.stat().st_size for path in (ASSETS / name).rglob("*") if path.is_file())
        <= megabytes * 1e6
    )


def test_diffusers_itself_samples_from_the_prior():
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny-sd", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red ball, <az+0> <el+15>",
        num_inference_steps=15,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert image.shape == (1, 3, 64, 64)
    scorer = ClipScorer.load()
    texts = scorer.text_features(list(CORPORA["toybox-15"]))
    chosen = (scorer.image_features(image) @ texts.T).argmax()
    assert CORPORA["toybox-15"][chosen] == "a red ball"


def test_the_prior_has_learnt_the_azimuth():
    "At t = 900 a wrong azimuth raises the noise error by over a tenth, a wrong object by more."
    prior, rng = StableDiffusionPrior.from_pretrained(), torch.Generator().manual_seed(3)
    t, cameras = torch.full((16,), 900), orbit(16, elevation=20.0)
    right, others = ["a red chair"] * 16, ["a yellow ball"] * 16
    images = render_object(object_of(right[0]), cameras, 64).over(torch.ones(3)).movedim(-1, 1)
    latents = prior.encode_image(images)
    noise = torch.randn(latents.shape, generator=rng)
    x_t = prior.schedule.add_noise(latents, noise, t)

    def error(texts, turn):
        azimuth, elevation = cameras.azimuth[0] + turn, cameras.elevation[0]
        with torch.no_grad():
            prompts = view_prompts(texts, azimuth, elevation, "tokens")
            tokens = prior.encode_text(prompts).tokens
            return float((prior.predict_noise(x_t, t, tokens) - noise).square().mean())

    wrong = min(error(right, turn) for turn in (90, 180, -90))
    assert error(right, 0) < 0.9 * wrong < error(others, 0)


def test_the_multi_view_prior_has_learnt_its_cameras():
    "At t = 900 cameras that are turned raise the noise error by over a tenth."
    prior, rng = open_prior(ASSETS / "tiny-mv"), torch.Generator().manual_seed(3)
    text, azimuths, t = ["a red chair"] * 4, torch.arange(4) * 90.0, torch.full((4,), 900)
    images = render_object(object_of(text[0]), orbit(4), 64).over(torch.ones(3)).movedim(-1, 1)
    latents = prior.encode_image(images)
    noise = torch.randn(latents.shape, generator=rng)
    x_t = prior.schedule.add_noise(latents, noise, t)

    @torch.no_grad()
    def error(turn):
        camera = note_cameras([(text[0], float(azimuth) + turn, 15.0) for azimuth in azimuths])
        tokens = prior.encode_text(text).tokens
        return float((prior.predict_noise(x_t, t, tokens, camera) - noise).square().mean())

    right = error(0)
    assert all(error(turn) > 1.1 * right for turn in (90, 180, 270))


@pytest.mark.parametrize("corpus, views, least", [("toybox-15", 12, 0.97), ("toybox-800", 1, 0.8)])
def test_clip_retrieves_captions_of_new_renders(corpus, views, least):
    scorer, captions = ClipScorer.load(), CORPORA[corpus]
    texts = scorer.text_features(list(captions))
    hits = []
    for i, caption in list(enumerate(captions))[:: 1 if views > 1 else 4]:
        cameras = orbit(views if views > 1 else 24)
        if views == 1:
            cameras = type(cameras)(
                *(
                    x[:, i % 24 : i % 24 + 1]
                    for x in (cameras.elevation, cameras.azimuth, cameras.distance, cameras.fovy)
                )
            )
        rgb = render_object(object_of(caption), cameras, 64).over(torch.ones(3)).movedim(-1, 1)
        hits += (scorer.image_features(rgb) @ texts.T).argmax(1).eq(i).tolist()
    assert sum(hits) / len(hits) >= least
