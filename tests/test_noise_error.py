"""Noise prediction errors: resumed measurements, reproducible images, and known shifts."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.noise_error.error import ErrorCurve, check_timesteps
from scaledreamer.noise_error.image_sources import (
    FIG1,
    CurveProtocol,
    PriorSamples,
    ToyboxRenders,
    ddim,
)
from scaledreamer.noise_error.measure import ImageBatch, measure_curve, read_partial, stream_errors
from scaledreamer.noise_error.solved_shift import (
    eq3_table,
    errors_at,
    fit_schedules,
    schedule_range,
    plot_shift,
    solve_shift,
)
from scaledreamer.distill.shift import RangedShift, constant_shift, deterministic_shift
from scaledreamer.distill.shift import random_shift, shifted, sqrt_shift
from scaledreamer.prior.clip_text import TextCache
from scaledreamer.prior.mixture import MixturePrior
from scaledreamer.prior.pipelines import random_pipeline
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior
from scaledreamer.prior.toybox_mixture import toybox_mixture
from scaledreamer.toybox.captions import TOYBOX_15
from fixtures import DOUBLE, draw

PRIOR = MixturePrior(
    {
        "a": torch.tensor([[1.0, -2.0], [0.0, 1.0]], dtype=DOUBLE),
        "b": torch.tensor([[0.0, 3.0]], dtype=DOUBLE),
    },
    std=0.4,
)
TIMES = torch.tensor([0, 150, 320, 550, 700, 930, 999])


def batch(n, seed=0):
    return ImageBatch(draw(n, 2, seed=seed), tuple("ab"[i % 2] for i in range(n)), latents=True)


IMAGES = batch(40)
WHOLE = measure_curve(PRIOR, IMAGES, TIMES, show=False)


def small_sd(seed=0, kind="epsilon"):
    torch.manual_seed(seed)
    pipe = random_pipeline(kind)
    return StableDiffusionPrior(
        pipe.unet, pipe.vae, TextCache(pipe.tokenizer, pipe.text_encoder), pipe.scheduler
    )


# the curve and its file ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_file_gives_the_curve_back(tmp_path, n, dtype):
    curve = ErrorCurve(TIMES, WHOLE.errors[:n].to(dtype), "e of ü", WHOLE.texts[:n])
    curve.save(tmp_path / "new" / "curve.json")
    again = ErrorCurve.load(tmp_path / "new" / "curve.json")
    assert torch.equal(again.errors, curve.errors.double()) and torch.equal(again.timesteps, TIMES)
    assert (again.label, again.texts) == (curve.label, curve.texts)
    stored = json.loads((tmp_path / "new" / "curve.json").read_text())
    assert {"timesteps", "error_mean", "error_low", "error_high"} <= stored.keys()
    assert stored["error_mean"] == curve.mean.tolist()
    if n == 1:
        assert stored["error_low"] is None and stored["error_high"] is None
    else:
        assert [stored["error_low"], stored["error_high"]] == [
            edge.tolist() for edge in curve.band()
        ]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "curve.json"
    WHOLE.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ErrorCurve(TIMES, WHOLE.errors + 1, "other", WHOLE.texts).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, fault",
    [
        ("", r"is not JSON \(it is empty\)"),
        ("[]", r"is \[\], not an object"),
        ("{}", r"holds no curve \(.*\)"),
        ('{"label": "e"}', r"holds no curve \(.*\)"),
        ("\x00\x01", r"is not JSON \(line 1, column 1: Expecting value\)"),
    ],
)
def test_what_is_no_curve(tmp_path, content, fault):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(RunError, match=rf"x\.json {fault}: measure it again"):
        ErrorCurve.load(tmp_path / "x.json")


def test_the_band_is_students():
    errors = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], dtype=DOUBLE)
    low, high = ErrorCurve(TIMES[:2], errors, "", ("",) * 3).band(0.9)
    half = (
        2.919986 * (7 / 3) ** 0.5
    )  # t quantile .95 at 2 degrees of freedom; variance 7 over 3 images
    torch.testing.assert_close(
        torch.stack([low, high]),
        torch.tensor([[max(0, 3 - half), 5], [3 + half, 5]], dtype=DOUBLE),
        atol=1e-5,
        rtol=0,
    )


@given(st.integers(2, 30), st.sampled_from([0.5, 0.9, 0.99]))
@settings(max_examples=20, deadline=None)
def test_a_wider_level_is_a_wider_band(n, level):
    curve = ErrorCurve(TIMES, WHOLE.errors[:n], "", WHOLE.texts[:n])
    (low, high), (lower, higher) = curve.band(level), curve.band(0.999)
    assert (
        (lower <= low).all()
        and (low <= curve.mean).all()
        and (curve.mean <= high).all()
        and (high <= higher).all()
    )


# measuring ----------------------------------------------------------------------------------------


@given(st.integers(1, 120), st.integers(0, 39), st.sampled_from([None, 1.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_rows_and_beginning_change_nothing(rows, first, guidance):
    calls = []

    def predict(x_t, t, tokens):
        calls.append(len(x_t))
        return PRIOR.predict_noise(x_t, t, tokens)

    if guidance == 3.0:
        rows += 1
    found = list(stream_errors(PRIOR, IMAGES, TIMES, predict, guidance, rows=rows, first=first))
    assert [i for i, *_ in found] == list(range(first, 40)) and max(calls) <= rows
    wanted = (
        WHOLE.errors
        if guidance != 3.0
        else measure_curve(PRIOR, IMAGES, TIMES, guidance=3.0, show=False).errors
    )
    torch.testing.assert_close(
        torch.stack([errors for *_, errors in found]), wanted[first:], atol=1e-12, rtol=1e-9
    )


def test_the_noise_belongs_to_the_number():
    "Other neighbours, other timesteps: the same error. Another seed: another."
    some = measure_curve(PRIOR, IMAGES[:9], TIMES[2:4], show=False)
    torch.testing.assert_close(some.errors, WHOLE.errors[:9, 2:4], atol=1e-12, rtol=1e-9)
    other = measure_curve(PRIOR, IMAGES[:9], TIMES, seed=1, show=False)
    assert ((other.errors - WHOLE.errors[:9]).abs() > 1e-6)[:, :-2].all()


def test_a_network_in_any_batch():
    prior, rgb = small_sd(), torch.rand(5, 3, 24, 24, generator=make_rng(1))
    images = ImageBatch(rgb, ("a red ball", "a blue cube", "", "a ball", "a red cube"))
    curves = [
        measure_curve(prior, images, [3, 500, 990], guidance=2.0, rows=rows, show=False).errors
        for rows in (2, 7, 100)
    ]
    torch.testing.assert_close(curves[0], curves[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(curves[0], curves[2], atol=1e-5, rtol=1e-4)
    latents = ImageBatch(prior.encode_image(rgb), images.texts, latents=True)
    torch.testing.assert_close(
        measure_curve(prior, latents, [3, 500, 990], guidance=2.0, show=False).errors,
        curves[0],
        atol=1e-5,
        rtol=1e-4,
    )


def test_images_are_asked_for_in_small_blocks_and_late():
    class Source:
        def __init__(self):
            self.latest = []

        def __len__(self):
            return 10_000

        def __getitem__(self, rows):
            self.latest.append((rows.start, rows.stop))
            return batch(rows.stop - rows.start, seed=rows.start)

    source = Source()
    stream = stream_errors(PRIOR, source, torch.arange(0, 1000, 10), rows=50)
    assert [next(stream)[0] for _ in range(40)] == list(range(40))
    assert source.latest == [(0, 16), (16, 32), (32, 48)]


def test_no_graph_and_the_camera_comes_along():
    weight, seen = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True), []

    def predict(x_t, t, tokens, camera):
        seen.append((t.tolist(), camera[:, 0].tolist()))
        return weight * x_t

    images = ImageBatch(
        IMAGES.images[:2].clone().requires_grad_(),
        IMAGES.texts[:2],
        True,
        torch.arange(32.0).view(2, 16),
    )
    rows = [errors for *_, errors in stream_errors(PRIOR, images, [10, 20], predict, rows=3)]
    assert not any(errors.requires_grad for errors in rows)
    assert seen == [([10, 20], [0, 0]), ([10, 20], [16, 16])]
    seen.clear()
    next(stream_errors(PRIOR, images, [10, 20], predict, guidance=5.0, rows=4))
    assert seen == [([10, 20] * 2, [0] * 4)]
    with pytest.raises(UsageError, match="a mixture sees no camera"):
        next(stream_errors(PRIOR, images, [10]))


def test_the_prior_of_the_images_errs_least():
    "E[eps | x_t] minimises the error: any other prior is worse on average at each t."
    means = PRIOR.components.table + PRIOR.components.center
    data = means[torch.arange(600) % 2] + 0.4 * draw(600, 2, seed=5)
    images = ImageBatch(data, ("a",) * 600, latents=True)
    right = measure_curve(PRIOR, images, TIMES, rows=5000, show=False)
    for wrong in (
        MixturePrior({"a": means[:2]}, 0.25),
        MixturePrior({"a": means[:2] + 0.3}, 0.4),
        MixturePrior({"a": means[:1]}, 0.4),
    ):
        gap = measure_curve(wrong, images, TIMES, rows=5000, show=False).errors - right.errors
        assert (gap.mean(0) > -3 * gap.std(0) / 600**0.5).all() and gap.mean() > 0


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 9])
def test_ctrl_c_keeps_what_is_finished(tmp_path, stop):
    calls, path = [], tmp_path / "partial.jsonl"

    def predict(*question):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(len(question[0]))
        return PRIOR.predict_noise(*question)

    with pytest.raises(KeyboardInterrupt):
        measure_curve(PRIOR, IMAGES, TIMES, partial=path, predict=predict, rows=28, show=False)
    head, kept = read_partial(path)
    assert len(kept) == 4 * stop and head["images"] == 40  # four images a call
    assert [errors for _, errors in kept] == WHOLE.errors[: len(kept)].tolist()
    assert torch.equal(
        measure_curve(PRIOR, IMAGES, TIMES, partial=path, show=False, rows=28).errors, WHOLE.errors
    )


@given(st.floats(0, 1))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_file_cut_anywhere_below_its_first_line(tmp_path, place):
    path = tmp_path / "partial.jsonl"
    path.unlink(missing_ok=True)
    measure_curve(PRIOR, IMAGES, TIMES, partial=path, show=False)
    content = path.read_bytes()
    head = content.index(b"\n") + 1
    path.write_bytes(content[: head + int(place * (len(content) - head))])
    assert torch.equal(
        measure_curve(PRIOR, IMAGES, TIMES, partial=path, show=False).errors, WHOLE.errors
    )
    assert path.read_bytes() == content


def test_another_measurement_does_not_go_on(tmp_path):
    path = tmp_path / "partial.jsonl"
    measure_curve(PRIOR, IMAGES, TIMES, partial=path, show=False)
    before = path.read_bytes()

    def again(prior=PRIOR, images=IMAGES, times=TIMES, **options):
        return measure_curve(prior, images, times, partial=path, show=False, **options)

    other = ImageBatch(IMAGES.images, ("a",) * 40, latents=True)
    wrong = [
        ({"seed": 3}, "seed 0, not 3"),
        ({"guidance": 2.0}, "guidance None, not 2.0"),
        ({"label": "x"}, "label 'e', not 'x'"),
        ({"times": [1, 2]}, "timesteps"),
        ({"images": IMAGES[:39]}, "images 40, not 39"),
        ({"images": batch(40, seed=9)}, "image 39 of .* on another"),
        ({"prior": MixturePrior({"a": draw(2, 2), "b": draw(1, 2)})}, "another image"),
        ({"images": other}, "than this one \\('a'\\)"),
    ]
    for options, message in wrong:
        with pytest.raises(UsageError, match=message):
            again(**options)
        assert path.read_bytes() == before
    path.write_text("no json\n")
    with pytest.raises(RunError, match="is no partial measurement .*: delete it"):
        again()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stops_with_image_and_t(tmp_path, value):
    rows = []  # (image, t) pairs come in order

    def predict(x_t, t, tokens):
        eps, numbers = (
            PRIOR.predict_noise(x_t, t, tokens),
            torch.arange(len(rows), len(rows) + len(t)),
        )
        rows.extend(t.tolist())
        return torch.where(((numbers % (40 * 7)) == 17 * 7 + 3)[:, None], value, eps)

    path = tmp_path / "partial.jsonl"
    with pytest.raises(
        RunError,
        match=r"image 17 \('b'\) at t = 550 is not finite; the 17 images before it are kept in "
        rf".*{path.name}",
    ):
        measure_curve(PRIOR, IMAGES, TIMES, partial=path, predict=predict, show=False)
    assert len(read_partial(path)[1]) == 17
    rows.clear()
    with pytest.raises(RunError, match="nothing is kept"):
        measure_curve(PRIOR, IMAGES, TIMES, predict=predict, show=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: measure_curve(PRIOR, IMAGES[:0], TIMES, show=False), "0 images"),
        (lambda: measure_curve(PRIOR, IMAGES, TIMES, rows=0, show=False), "0 rows a call"),
        (
            lambda: measure_curve(PRIOR, IMAGES, TIMES, rows=1, guidance=2.0, show=False),
            "1 rows a call",
        ),
        (
            lambda: check_timesteps(PRIOR, [-1, 3]),
            r"\[-1, 3\]: expected rising integers from 0 to 999",
        ),
        (lambda: check_timesteps(PRIOR, []), r"timesteps are \[\]"),
        (lambda: check_timesteps(PRIOR, [3, 3]), r"timesteps are \[3, 3\]"),
        (lambda: check_timesteps(PRIOR, torch.tensor([3, 1000])), "expected rising integers"),
        (
            lambda: measure_curve(PRIOR, ImageBatch(draw(1, 3), ("a",), True), TIMES, show=False),
            r"latents are \[3\], the prior's are \[2\]",
        ),
        (
            lambda: measure_curve(
                PRIOR, ImageBatch(torch.rand(1, 3, 4, 4), ("a",)), TIMES, show=False
            ),
            "give it latents",
        ),
        (
            lambda: measure_curve(PRIOR, ImageBatch(draw(1, 2), ("c",), True), TIMES, show=False),
            "the mixture knows no 'c'",
        ),
        (lambda: ErrorCurve(TIMES, WHOLE.errors * torch.nan, "", WHOLE.texts), "finite errors"),
        (lambda: WHOLE.band(1.0), "level 1.0"),
        (lambda: CurveProtocol(("a",), 1, 0).timesteps(), "0 timesteps"),
        (lambda: ToyboxRenders((), 3), "3 renders of 0 prompts"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UsageError, match=message):
        call()


# images -------------------------------------------------------------------------------------------


def test_the_preset_is_the_papers():
    assert (len(FIG1.prompts), FIG1.each, FIG1.count) == (15, 16, 100) and FIG1.prompts == TOYBOX_15
    for steps in (100, 1000, 1234):
        t = FIG1.timesteps(steps)
        assert len(set(t.tolist())) == 100 and 0 <= t[0] and t[-1] < steps


@pytest.mark.parametrize("views", ["tokens", "words"])
def test_renders_depend_on_number_and_seed(views):
    renders = ToyboxRenders(("a red car", "a blue cube", "a green mug"), 3, size=16, views=views)
    whole = renders[0:9]
    for rows in (slice(4, 5), slice(2, 7), slice(8, 9)):
        part = renders[rows]
        assert torch.equal(part.images, whole.images[rows]) and part.texts == whole.texts[rows]
    assert [text.partition(",")[0] for text in whole.texts] == [
        "a red car",
        "a blue cube",
        "a green mug",
    ] * 3
    assert (
        len({image.numpy().tobytes() for image in whole.images}) == 9
        and 0 <= whole.images.min()
        and whole.images.max() <= 1
    )
    assert (
        ToyboxRenders(renders.prompts, 3, 16, seed=1, views=views).text(0) != renders.text(0)
        or views == "words"
    )


def test_backgrounds_are_of_three_kinds():
    corners = ToyboxRenders(("a red ball",), 90, size=8)[0:90].images[:, :, 0, 0]
    white = (corners == 1).all(1)
    grey = ((corners - corners[:, :1]).abs() < 1e-6).all(1) & ~white
    for kind in (white, grey, ~white & ~grey):
        assert 15 <= kind.sum() <= 45  # a third of 90, give or take 3.3 standard deviations


def test_renders_are_what_the_exact_prior_expects():
    "The texts are captions of the mixture over renders, and its error on them falls."
    prompts = ("a red ball", "a green mug")
    prior = toybox_mixture(prompts, each=1, size=16)
    curve = measure_curve(prior, ToyboxRenders(prompts, 4), [100, 300, 500, 700, 900], show=False)
    assert (curve.mean.diff() < 0).all()


def test_samples_depend_on_number_and_seed():
    prior = small_sd()
    samples = PriorSamples(
        prior, ("a red ball", "a cube", "", "a blue ball"), guidance=2.0, steps=3
    )
    whole = samples[0:4]
    torch.testing.assert_close(samples[1:3].images, whole.images[1:3], atol=1e-4, rtol=1e-4)
    assert whole.latents and whole.texts == samples.texts and len(samples) == 4
    assert not torch.allclose(
        PriorSamples(prior, samples.texts, 2.0, 3, seed=1)[0:4].images, whole.images, atol=0.1
    )


def test_ddim_knows_when_guidance_asks_nothing():
    noise = draw(6, 2)
    plain = ddim(PRIOR, list("ababab"), noise, steps=8)
    torch.testing.assert_close(
        ddim(PRIOR, list("ababab"), noise, guidance=1.0 + 1e-12, steps=8),
        plain,
        atol=1e-8,
        rtol=1e-8,
    )
    for i in range(6):
        torch.testing.assert_close(
            ddim(PRIOR, ["ababab"[i]], noise[i : i + 1], steps=8)[0], plain[i], atol=1e-9, rtol=1e-9
        )


def test_ddim_draws_the_data():
    "Modes by weight, spread by width: 1500 samples of an exact prior."
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=DOUBLE)
    prior = MixturePrior({"x": means}, 0.3, {"x": torch.tensor([0.25, 0.75], dtype=DOUBLE)})
    samples = ddim(prior, ["x"] * 1500, draw(1500, 2, seed=3), steps=100)
    right = samples[:, 0] > 0
    assert (
        abs(right.double().mean() - 0.75) < 4 * (0.75 * 0.25 / 1500) ** 0.5 + 0.01
    )  # and what the start N(0, I) is off
    for mode, mean in ((~right, means[0]), (right, means[1])):
        torch.testing.assert_close(samples[mode].mean(0), mean, atol=0.06, rtol=0)
        torch.testing.assert_close(
            samples[mode].std(0), torch.full((2,), 0.3, dtype=DOUBLE), atol=0.03, rtol=0
        )


# the shift ----------------------------------------------------------------------------------------

GRID = torch.arange(5, 1000, 10)


@dataclass(frozen=True, eq=False)
class GivenRange(RangedShift):
    "A shift schedule whose range is a given function."

    def range(self, t, t_min, last):
        return self.length(t, t_min, last)


def falling(n=30, k=100, seed=0, noise=0.0):
    scale = 1 + 0.3 * torch.rand(n, 1, generator=make_rng(seed), dtype=DOUBLE)
    line = (-torch.linspace(-4, 5, k, dtype=DOUBLE)).sigmoid()
    return ErrorCurve(
        GRID[:k], scale * line * (1 + noise * draw(n, k, seed=seed + 1)).abs(), "e_PT", ("x",) * n
    )


@given(st.floats(0, 0.5), st.floats(0, 60), st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_known_shift_is_recovered(linear, constant, root):
    base = falling()
    shift_schedule = linear * GRID.double() + constant + root * GRID.double().sqrt()
    known = GRID + shift_schedule <= 995
    tuned = ErrorCurve(
        GRID,
        errors_at(base, (GRID + shift_schedule).clamp(max=995)) * torch.where(known, 1, 0.5),
        "e_FT",
        base.texts,
    )
    solved = solve_shift(base, tuned, draws=5)
    torch.testing.assert_close(solved.shift[known], shift_schedule[known], atol=1e-6, rtol=0)
    assert torch.equal(solved.solved, known) and (solved.side[~known] == 1).all()
    assert torch.equal(solved.shift[~known], 999 - GRID[~known].double())
    torch.testing.assert_close(
        solved.low[known], shift_schedule[known], atol=1e-6, rtol=0
    )  # errors are in proportion, so every resampling has the same shift


def test_the_solution_solves():
    "For curves that are not in proportion either: e_PT at the shifted time is e_FT."
    base, tuned = falling(noise=0.001), falling(seed=7, noise=0.02)
    tuned = ErrorCurve(GRID, 0.8 * tuned.errors, "e_FT", tuned.texts)
    solved = solve_shift(base, tuned, draws=50)
    at = GRID[solved.solved] + solved.shift[solved.solved]
    falls = (base.mean.diff() < 0).all()
    assert falls, "the noise of this test is too strong"
    torch.testing.assert_close(
        errors_at(base, at).mean(0), tuned.mean[solved.solved], atol=1e-9, rtol=1e-6
    )
    assert (solved.low <= solved.shift + 1e-6).double().mean() > 0.95 and (
        solved.high >= solved.shift - 1e-6
    ).double().mean() > 0.95
    assert ((0 <= solved.low) & (solved.high <= 999 - GRID)).all() and (
        (0 <= solved.share) & (solved.share <= 1)
    ).all()


def test_a_worse_curve_has_no_shift():
    base = falling()
    solved = solve_shift(base, ErrorCurve(GRID, 1.1 * base.errors, "worse", base.texts), draws=5)
    assert (solved.side == -1).all() and (solved.shift == 0).all() and (solved.share == 0).all()
    with pytest.raises(RunError, match="has no solution at any t"):
        fit_schedules(solved, {"paper": random_shift()})


def test_the_interval_holds_the_shift():
    """Paired images of random difficulty, against the shift of the curves' expectations.
    Over 300 repetitions the interval contains it in a share between .90 and .99."""
    k, n, repeats = 40, 40, 300
    t, line = GRID[:k], torch.linspace(1, 0.2, k, dtype=DOUBLE)
    held = torch.zeros(k, dtype=DOUBLE)
    for repeat in range(repeats):
        skill = 1 + 0.3 * draw(n, 1, seed=2 * repeat).clamp(-3, 3)
        own = 0.05 * draw(n, 2, 1, seed=2 * repeat + 1)
        pre = ErrorCurve(t, (skill * line + own[:, 0]).clamp(min=0), "e_PT", ("x",) * n)
        post = ErrorCurve(t, (skill * (line - 0.1) + own[:, 1]).clamp(min=0), "e_FT", ("x",) * n)
        solved = solve_shift(pre, post, draws=100, seed=repeat)
        truth = 0.1 / (0.8 / (k - 1)) * 10
        held += ((solved.low <= truth) & (truth <= solved.high)).double()
    inner = (held / repeats)[:30]  # away from the curve's end, where both are cut
    assert 0.9 <= inner.min() and inner.max() <= 0.99


def test_pairing_narrows_the_interval():
    "Difficult images are difficult for both curves: resampled together, the interval is narrower."
    skill = 1 + 0.4 * draw(60, 1).clamp(-2, 2)
    line = torch.linspace(1, 0.2, 40, dtype=DOUBLE)
    pre, post = (
        ErrorCurve(GRID[:40], skill * values, name, ("x",) * 60)
        for values, name in ((line, "pt"), (0.9 * line, "ft"))
    )
    mixed = ErrorCurve(GRID[:40], post.errors.roll(1, 0), "ft", post.texts)
    widths = [
        (s.high - s.low)[5:25].mean() for s in (solve_shift(pre, post), solve_shift(pre, mixed))
    ]
    assert widths[0] < widths[1] / 5


def test_the_seed_decides():
    base, tuned = (
        falling(noise=0.1),
        ErrorCurve(GRID, 0.8 * falling(seed=3, noise=0.1).errors, "ft", ("x",) * 30),
    )
    one, same, other = (solve_shift(base, tuned, seed=seed) for seed in (0, 0, 1))
    assert (
        torch.equal(one.low, same.low)
        and not torch.equal(one.low, other.low)
        and torch.equal(one.shift, other.shift)
    )


def test_eq3_by_counting():
    curve = falling(n=11, noise=0.3)
    table = eq3_table(curve, [15, 405, 700], [0, 10, 50])
    for i, t in enumerate((15, 405, 700)):
        for j, dt in enumerate((0, 10, 50)):
            now, later = (
                [float(np.interp(at, GRID, row)) for row in curve.errors] for at in (t, t + dt)
            )
            assert table[i, j] == sum(b <= a for a, b in zip(now, later)) / 11
    assert torch.equal(errors_at(curve, GRID.double()), curve.errors)


@given(
    st.floats(0, 1),
    st.integers(0, 500),
    st.lists(st.integers(0, 999), min_size=1, max_size=8),
    st.floats(0, 1),
)
@settings(max_examples=80, deadline=None)
def test_the_ranges_are_those_of_training(eta, t_min, times, place):
    "Training's shift is a place in our range, cut to an integer in float32 and kept off 0."
    t = torch.tensor(times)
    low, high = schedule_range(random_shift(eta), t.double(), t_min)
    ours = t + low + place * (high - low)
    assert ((shifted(t, t_min, 999, eta, place) - ours).abs() <= 1 + 1e-3).all()
    exact = schedule_range(deterministic_shift(eta), t.double(), t_min)
    assert torch.equal(exact[0], high) and torch.equal(exact[1], high)


def test_every_range_stays_in_the_schedule():
    t = torch.arange(1000, dtype=DOUBLE)
    long = RangedShift(lambda t, t_min, last: 5 * t)
    for schedule in (deterministic_shift(1.0), sqrt_shift(1.0), constant_shift(999), long):
        for random in (True, False):
            schedule_range(replace(schedule, random=random), t)
    root, line = (s.length(t, 20, 999) for s in (sqrt_shift(0.3), deterministic_shift(0.3)))
    torch.testing.assert_close(root[-1:], line[-1:])
    assert (root[21:-1] > line[21:-1]).all()


def test_fits_of_a_constant_shift():
    base = falling()
    shift_schedule = torch.full((100,), 30.0, dtype=DOUBLE)
    tuned = ErrorCurve(
        GRID,
        errors_at(base, (GRID + shift_schedule).clamp(max=995))
        * torch.where(GRID + shift_schedule <= 995, 1, 0.5),
        "ft",
        base.texts,
    )
    solved = solve_shift(base, tuned, draws=5)
    fits = fit_schedules(
        solved,
        {
            "paper": random_shift(0.1),
            "right": constant_shift(30),
            "near": constant_shift(32),
            "own": GivenRange(lambda t, *_: (0 * t + 20, 0 * t + 34)),
        },
        t_min=5,
    )
    t = GRID[solved.solved].double()
    assert (
        fits["paper"].inside == pytest.approx(float((0.1 * (t - 5) >= 29.5).double().mean()))
        and fits["paper"].count == 97
    )
    assert fits["paper"].distance == pytest.approx(
        float((torch.minimum(0.1 * (t - 5), 999 - t) / 2 - 30).abs().mean())
    )
    assert (fits["right"].inside, fits["right"].overlaps, fits["near"].inside) == (1, 1, 0)
    assert fits["right"].distance == pytest.approx(0, abs=1e-6) and fits[
        "near"
    ].distance == pytest.approx(2, abs=1e-6)
    assert fits["own"].inside == 1 and fits["own"].distance == pytest.approx(3, abs=1e-6)
    axis = plot_shift(solved, {"paper": random_shift()}).axes[0]
    assert [line.get_label() for line in axis.get_lines()] == ["solved", "paper"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_shift(-0.1), "eta is -0.1: expected a part"),
        (lambda: sqrt_shift(1.1), "eta is 1.1"),
        (lambda: constant_shift(-1), "dt is -1: expected 0 or more timesteps"),
        (
            lambda: schedule_range(GivenRange(lambda t, *_: (1000.0 + 0 * t,) * 2), GRID.double()),
            r"expected 0 <= low <= high <= 999 - t",
        ),
        (
            lambda: schedule_range(
                GivenRange(lambda t, *_: (0 * t, 0 * t + 50)), torch.tensor([960.0])
            ),
            r"dt from \[0, 50\] at t = 960",
        ),
        (
            lambda: schedule_range(
                GivenRange(lambda t, *_: (0 * t - 1, 0 * t)), torch.tensor([9.0])
            ),
            r"dt from \[-1, 0\] at t = 9",
        ),
        (
            lambda: schedule_range(
                GivenRange(lambda t, *_: (0 * t + 2, 0 * t + 1)), torch.tensor([9.0])
            ),
            r"dt from \[2, 1\]",
        ),
        (
            lambda: schedule_range(
                GivenRange(lambda t, *_: (0 * t, t * torch.nan)), torch.tensor([9.0])
            ),
            r"dt from \[0, nan\]",
        ),
        (
            lambda: eq3_table(falling(), [4], [0]),
            "t = 4 lies outside the curve 'e_PT', which goes from 5 to 995",
        ),
        (lambda: eq3_table(falling(), [900], [96]), "t = 996 lies outside"),
        (lambda: eq3_table(falling(), [900], [-1]), "a shift of -1"),
        (lambda: solve_shift(falling(), falling(k=50)), "expected the same, at least two"),
        (lambda: solve_shift(falling(), falling(n=3)), "'e_PT' has 30 images, 'e_PT' 3"),
        (lambda: solve_shift(falling(), falling(), last=994), "the schedule ends at 994"),
        (lambda: solve_shift(falling(), falling(), level=0.0), "level 0.0"),
    ],
)
def test_shift_refusals(call, message):
    with pytest.raises(UsageError, match=message):
        call()
