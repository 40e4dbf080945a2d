"""Texts for views and all texts of a step: smooth in the angle, independent per image."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scaledreamer.camera.view_words import VIEW_WORDS, view_prompts
from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.distill.methods import asd
from scaledreamer.prior.mixture import MixturePrior
from scaledreamer.distill.conditioning import (
    make_conditioning,
    perp_neg,
    perp_neg_coefficients,
    view_embeddings,
    view_index,
)

TURN = torch.linspace(-180, 179.5, 720, dtype=torch.float64)
LEVEL = torch.zeros_like(TURN)


@given(st.floats(-1000, 1000), st.floats(-90, 90), st.integers(-3, 3))
@settings(max_examples=100, deadline=None)
def test_full_turns_and_mirrors_change_nothing(azimuth, elevation, turns):
    "Perp-neg knows left from right no more than its words do."
    assume(abs(azimuth % 180 - 90) > 1e-9)  # a turn's rounding may move it across the border
    one = torch.tensor([azimuth], dtype=torch.float64)
    level = torch.tensor([elevation], dtype=torch.float64)
    for other in (one + 360 * turns, -one):
        for ours, theirs in zip(
            perp_neg_coefficients(one, level), perp_neg_coefficients(other, level)
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)


def test_blends_move_smoothly_around_the_object():
    """No jump of the positive text anywhere, also across 90 and 180 degrees.

    Half a degree moves a share by 1/180.
    """
    positive = perp_neg_coefficients(TURN, LEVEL)[0]
    step = (positive - positive.roll(1, 0)).abs().amax(1)
    assert step.max() < 1 / 180 + 1e-9
    assert torch.equal(
        positive.argmax(1)[[0, 180, 360, 540]], torch.tensor([2, 0, 1, 0])
    )  # back, side, front, side


def test_perp_neg_says_what_the_words_say():
    """In the middle of each view the blend is that view's own text.

    Elsewhere the word of a view is the text with the largest share.
    """
    azimuth, elevation = (
        torch.tensor([90.0, 0.0, 180.0, -90.0, 17.0]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 70.0]),
    )
    positive = perp_neg_coefficients(azimuth, elevation)[0]
    assert torch.equal(positive.argmax(1), view_index(azimuth, elevation))
    assert torch.equal(positive.amax(1), torch.ones(5))
    assert torch.equal(
        perp_neg_coefficients(TURN, LEVEL)[0].argmax(1)[::30], view_index(TURN, LEVEL, 45, 45)[::30]
    )


def test_embeddings_stand_in_the_order_of_the_words():
    prompts = ["a car", "a cat", "a red ball on a blue cube"]
    captions = {
        f"{p}, {v} view": torch.randn(2, 3, 4, 4, generator=make_rng(7))
        for p in prompts
        for v in VIEW_WORDS
    }
    prior = MixturePrior(captions)
    views = view_embeddings(prior, prompts)
    assert torch.equal(views[:, :, 0], torch.eye(12).reshape(3, 4, 12))
    azimuth, elevation = torch.tensor([10.0, 100.0, 170.0]), torch.tensor([0.0, 0.0, 80.0])
    picked = views[torch.arange(3), view_index(azimuth, elevation)]
    assert torch.equal(picked, prior.encode_text(view_prompts(prompts, azimuth, elevation)).tokens)


def test_each_view_gets_its_own_text_whatever_stands_beside_it():
    views, empty = (
        torch.randn(5, 4, 6, 8, generator=make_rng(0)),
        torch.randn(5, 6, 8, generator=make_rng(1)),
    )
    azimuth, elevation = (
        torch.tensor([0.0, 60, 120, -170, 30]),
        torch.tensor([0.0, 15, 30, -10, 75]),
    )
    whole = perp_neg(views, empty, azimuth, elevation)
    for i in range(5):
        row = slice(i, i + 1)
        alone = perp_neg(views[row], empty[row], azimuth[row], elevation[row])
        for name in ("positive", "unconditional", "negatives", "negative_weights"):
            torch.testing.assert_close(getattr(alone, name), getattr(whole, name)[row])


@pytest.mark.parametrize("strength", [0.0, -0.5, -1.0])
def test_perp_neg_leaves_the_front_view(strength):
    """A negative `front view` removes from a side view what front and side have in common.

    It removes nothing along the side's own direction; with strength 0 it is plain guidance.
    """
    means = {
        f"a car, {v} view": 3 * torch.randn(3, 2, 8, 8, generator=make_rng(i), dtype=torch.float64)
        for i, v in enumerate(VIEW_WORDS)
    }
    prior = MixturePrior(means, std=0.5)
    views, empty = view_embeddings(prior, ["a car"]), prior.encode_text([""]).tokens
    text = perp_neg(views, empty, torch.tensor([80.0]), torch.tensor([0.0]), strength)
    x, noise = (torch.randn(1, 2, 8, 8, generator=make_rng(i), dtype=torch.float64) for i in (8, 9))
    t = torch.tensor([900])
    pushed, plain = (
        asd(prior, x, text, t, noise, t + 9).target
        for text in (text, perp_neg(views, empty, torch.tensor([80.0]), torch.tensor([0.0]), 0.0))
    )
    x_t = prior.schedule.add_noise(x, noise, t)
    direction = prior.predict_noise(x_t, t, text.positive) - prior.predict_noise(x_t, t, empty)
    front = prior.predict_noise(x_t, t, text.negatives[:, 0]) - prior.predict_noise(x_t, t, empty)
    assert ((pushed - plain) * direction).sum().abs() < 1e-8
    assert ((pushed - plain) * front).sum() < 0 or strength == 0


# all texts of a step ------------------------------------------------------------------------------

SHARED = ("a car", "a cat", "a red ball on a blue cube")
AZIMUTH, ELEVATION = torch.tensor([10.0, 100.0, 170.0]), torch.tensor([0.0, 20.0, 80.0])


def step_prior(mode):
    "A prior whose captions are all texts of a step with views in `mode`; one-hot embeddings."
    with_views = view_prompts(list(SHARED), AZIMUTH, ELEVATION, mode)
    described = [f"{text}, foggy" for text in with_views]
    by_view = [f"{prompt}, {view} view" for prompt in SHARED for view in VIEW_WORDS]
    captions = dict.fromkeys([*SHARED, *with_views, *described, *by_view, "blurry", "ugly"])
    return MixturePrior({caption: torch.zeros(1, 2) for caption in captions}), with_views


@pytest.mark.parametrize("mode", ["tokens", "words", "plain", "perp-neg"])
def test_all_texts_of_a_step_are_the_encoded_prompts(mode):
    "Each text is that of its own image; perp-neg blends the words of the views."
    prior, with_views = step_prior("tokens" if mode == "tokens" else "words")
    encode = lambda texts: prior.encode_text(list(texts)).tokens
    text = (
        make_conditioning(prior, SHARED, AZIMUTH, ELEVATION, mode, "ugly", True, "blurry", "foggy")
        if mode != "plain"
        else make_conditioning(prior, SHARED, negative_prompt="ugly", plain=True)
    )
    assert torch.equal(text.unconditional, encode(["ugly"] * 3))
    assert torch.equal(text.plain, encode(SHARED))
    if mode == "plain":
        assert torch.equal(text.positive, encode(SHARED))
        assert text.nfsd_negative is None and text.bridge_source is None
        return
    assert torch.equal(text.nfsd_negative, encode(["blurry"] * 3))
    assert torch.equal(text.bridge_source, encode(f"{words}, foggy" for words in with_views))
    if mode == "perp-neg":
        views = view_embeddings(prior, SHARED)
        blend = perp_neg(views, text.unconditional, AZIMUTH, ELEVATION)
        for name in ("positive", "negatives", "negative_weights"):
            assert torch.equal(getattr(text, name), getattr(blend, name))
    else:
        assert torch.equal(text.positive, encode(with_views)) and text.negatives is None


def test_what_conditioning_refuses():
    prior, _ = step_prior("words")
    with pytest.raises(UsageError, match="needs azimuth and elevation"):
        make_conditioning(prior, SHARED, view_prompting="perp-neg")
    with pytest.raises(UsageError, match="3 prompts, 2 azimuths, 2 elevations"):
        make_conditioning(prior, SHARED, AZIMUTH[:2], ELEVATION[:2], "words")
