"""Logged steps: their renders are recorded, recomputed as the method saw them, and shown."""

import io
import json
import shutil
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
from PIL import Image

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.training import step as training
from scaledreamer.training import trainer
from scaledreamer.training.job import TrainingJob
from scaledreamer.training.step_inspection import inspect_step
from scaledreamer.training.step_renders import read_renders
from scaledreamer.training.train_settings import METHODS, TrainSettings
from scaledreamer.training.trainer import open_run, run_training
from scaledreamer.widgets.step_viewer import StepViewer, step_figure, step_pictures

SMALL = TrainSettings(
    prompt=("a red car", "a blue house"),
    generator="ingp",
    prompts_per_step=2,
    views_per_prompt=2,
    resolution=16,
    steps=3,
    log_every=2,
)
PARTS = ("t", "t_shifted", "target", "unguided", "source", "weight", "gradient")


def train_and_remember(folder, settings):
    "A run, and for each step the renders, latents and query of the training."
    started, shown, true, query_prior = [], {}, {}, training.query_prior

    def remember(run, batch, latents, step, rng):
        true[step] = latents.detach(), query_prior(run, batch, latents, step, rng)
        return true[step][1]

    def keep(step, _):
        shown[step] = started[0].renders.flatten(0, 1)

    with mock.patch.object(training, "query_prior", remember):
        run = run_training(folder, settings, show=False, on_start=started.append, on_step=keep)
    return run, {step: (shown[step], *true[step]) for step in true}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    "A run of the exact prior, and what its training computed."
    folder = tmp_path_factory.mktemp("steps") / "run"
    return train_and_remember(folder, replace(SMALL, prior="mixture"))


# ---------------------------------------------------------------- what is recomputed


CASES = [(method, "tiny-sd") for method in METHODS] + [("asd", "mixture"), ("sdi", "mixture")]


@pytest.mark.parametrize("method, prior", CASES)
def test_a_step_is_recomputed_as_the_training_computed_it(tmp_path, method, prior):
    """To the bit from the true render; from its 8 bits, which are rounded by at most 1/510, within
    5 % of the guided prediction, apart from SDI, whose inversion amplifies it in a mixture."""
    steps = 1 if method in ("vsd", "esd") else 3  # their estimator is kept in checkpoints only
    checkpoints = {"checkpoint_every": 1} if steps == 1 else {}
    settings = replace(SMALL, method=method, prior=prior, steps=steps, log_every=1, **checkpoints)
    run, true = train_and_remember(tmp_path / "run", settings)
    opened = open_run(run.folder)
    for step in range(steps):
        renders, latents, query = true[step]
        exact = inspect_step(opened, step, renders)
        assert torch.equal(exact.latents, latents)
        assert torch.equal(exact.query.sample.noise, query.sample.noise)
        estimated = method in ("vsd", "esd")
        for part in ("t", "unguided", "target") if estimated else PARTS:
            assert torch.equal(getattr(exact.score, part), getattr(query.score, part)), part
        assert estimated == ("are not kept" in str(exact.notes))
        found = inspect_step(opened, step)
        assert (found.render - renders).abs().max() <= 1 / 510 + 1e-6
        off = (found.score.target - query.score.target).norm() / query.score.target.norm()
        assert off < 0.05 or (method, prior) == ("sdi", "mixture")
        assert found.logged["t"] == query.score.t.float().mean()


def test_x_t_is_where_the_noise_was_predicted(tmp_path):
    "What the prior was queried with, in the order of the method's calls, is in the inspection."
    for method in METHODS:
        if method in ("vsd", "esd"):
            continue
        settings = replace(SMALL, method=method, prior="mixture", steps=1)
        run = run_training(tmp_path / method, settings, show=False)
        queries, predict = [], run.prior.predict_noise

        def record(x_t, t, *args):
            queries.extend(zip(x_t, t.tolist()))
            return predict(x_t, t, *args)

        with mock.patch.object(run.prior, "predict_noise", record):
            found = inspect_step(run, 0)
        for x, times in ((found.x_t, found.score.t), (found.x_shifted, found.score.t_shifted)):
            for item, t in zip(x if x is not None else (), times.tolist()):
                assert any(t == s and torch.equal(item, y) for y, s in queries), method
        assert (found.x_shifted is None) == (method not in ("asd", "ism"))


def test_order_of_the_images_is_that_of_the_batch(mixture):
    run, true = mixture
    found = inspect_step(run, 2)
    assert found.prompts == [prompt for prompt in found.batch.prompts for _ in range(2)]
    for i, text in enumerate(found.texts):
        assert text.positive[0][1].startswith(found.prompts[i] + ", <az")
    renders = true[2][0]
    distance = torch.cdist(found.render.flatten(1), renders.flatten(1))
    assert distance.argmin(1).tolist() == [0, 1, 2, 3]


def test_the_texts_are_those_that_were_encoded(tmp_path):
    "For each way to name a view, shares of the texts give the embeddings of the query."
    cases = ("tokens", "asd"), ("words", "nfsd"), ("plain", "bridge"), ("perp-neg", "asd")
    for views, method in cases:
        distill = replace(
            SMALL.distill,
            view_prompting=views,
            negative_prompt="a green mug" if method == "asd" else "",
            nfsd_negative_prompt="a pink head" if method == "nfsd" else None,
            bridge_start=0.0,
            bridge_source_prompt="" if method == "bridge" else None,
        )
        settings = replace(SMALL, method=method, distill=distill, prompts_per_step=1, steps=1)
        run = run_training(tmp_path / views, settings, show=False)
        found = inspect_step(run, 0)
        text, same = found.query.text, lambda a, b: torch.allclose(a, b, atol=1e-5)
        encode = lambda text: run.prior.encode_text([text]).tokens[0]
        blend = lambda shares: sum(share * encode(text) for share, text in shares)
        for i, sent in enumerate(found.texts):
            assert same(blend(sent.positive), text.positive[i])
            assert same(encode(sent.unconditional), text.unconditional[i])
            assert len(sent.negatives) == (2 if views == "perp-neg" else 0)
            for k, (weight, negative) in enumerate(sent.negatives):
                assert weight == text.negative_weights[i, k]
                assert same(blend(negative), text.negatives[i, k])
            source = {"nfsd": text.nfsd_negative, "bridge": text.bridge_source}.get(method)
            assert (source is None) == (sent.subtracted is None)
            assert source is None or same(encode(sent.subtracted), source[i])


# ---------------------------------------------------------------- what is recorded


def test_recording_changes_no_number(tmp_path, mixture):
    run, _ = mixture
    with mock.patch.object(trainer, "record_renders"):
        plain = run_training(tmp_path / "plain", run.settings, show=False)
    assert not (plain.folder / "renders.jsonl").read_bytes()
    log = (plain.folder / "metrics.jsonl").read_bytes()
    assert log == (run.folder / "metrics.jsonl").read_bytes()
    for one, other in zip(plain.generator.parameters(), run.generator.parameters()):
        assert torch.equal(one, other)


def test_renders_that_cannot_be_written_stop_a_run_like_metrics(tmp_path):
    "The disk that has no space for them has none for a checkpoint either."
    for log in ("metrics.jsonl", "renders.jsonl"):
        folder = tmp_path / log
        make = lambda run: ((folder / log).unlink(missing_ok=True), (folder / log).mkdir())
        settings = replace(SMALL, prior="mixture")
        with pytest.raises(RunError, match=f"{log} cannot be written"):
            run_training(folder, settings, show=False, on_start=make)


def test_a_run_without_renders_says_so(mixture, tmp_path):
    run, _ = mixture
    shutil.copytree(run.folder, tmp_path / "old")
    (tmp_path / "old/renders.jsonl").unlink()
    old = open_run(tmp_path / "old")
    with pytest.raises(RunError, match="has no renders: a version that did not record any"):
        inspect_step(old, 0)
    longer = replace(old.settings, steps=7)
    with warnings.catch_warnings(action="ignore"):
        resumed = run_training(tmp_path / "old", longer, resume=True, show=False)
    assert [*read_renders(tmp_path / "old")] == [4, 6]
    assert inspect_step(resumed, 4).steps == 7
    viewer = StepViewer(tmp_path / "old")
    viewer.wait()
    assert (viewer.steps, viewer.shown) == ([4, 6], [6, 0])


# ---------------------------------------------------------------- the widget


def test_the_viewer_shows_what_was_inspected(mixture):
    run, _ = mixture
    viewer = StepViewer(run, step=0)
    viewer.wait()
    found = inspect_step(run, 0)
    for image in (0, 3):
        viewer.image = image
        viewer.wait()
        expected = step_pictures(found, image)
        assert viewer.labels == [*expected]
        for data, picture in zip(viewer.pictures, expected.values()):
            with Image.open(io.BytesIO(data)) as opened:
                assert opened.size == (picture.shape[-1], picture.shape[-2])
        assert dict(viewer.details)["prompt"] == found.prompts[image]
    label = list(step_pictures(found, 3))[-1]
    assert label == f"gradient, 0 to {found.gradient_map[3].max():.2g}"
    viewer.image = 9  # out of range
    viewer.wait()
    assert (viewer.image, viewer.shown) == (3, [0, 3])
    assert len(step_figure(found, images=3).axes) == 3 * 7


def test_the_viewer_of_a_job_computes_between_two_steps(tmp_path, mixture):
    "It sees new steps, and the numbers of the training stay those of a run that nobody watches."
    settings = replace(SMALL, prior="mixture", steps=12)
    plain = run_training(tmp_path / "plain", settings, show=False)
    job = TrainingJob(tmp_path / "job", settings)
    viewer = StepViewer(job)
    for _ in range(40):
        viewer._look()
        viewer.show(viewer.steps[-1] if viewer.steps else 0)
        viewer.wait()
    run = job.wait(60, show=False)
    viewer._look()
    viewer.show(999)
    viewer.wait()
    assert (viewer.steps, viewer.shown, viewer.failed) == ([0, 2, 4, 6, 8, 10], [10, 0], False)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        json.loads(line) for line in (plain.folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_errors_are_sentences_in_the_viewer(mixture, tmp_path):
    shutil.copytree(mixture[0].folder, tmp_path / "run")
    viewer = StepViewer(tmp_path / "run")
    viewer.wait()
    shutil.rmtree(tmp_path / "run")
    viewer.show(0)
    viewer.wait()
    assert viewer.failed and "renders.jsonl has no renders" in viewer.message
    for folder in ("none", "a\0b"):
        viewer = StepViewer(tmp_path / folder)
        viewer.wait()
        assert viewer.failed and "is no run folder" in viewer.message
    job = TrainingJob(tmp_path / "bad", replace(SMALL, prior="mixture", prompt=("no such thing",)))
    with pytest.raises(UsageError) as refused:
        job.wait(60, show=False)
    viewer = StepViewer(job)
    viewer.wait()
    assert viewer.failed and viewer.message == str(refused.value)


# ---------------------------------------------------------------- in the browser

CELLS = (
    "import scaledreamer as sd\n"
    "from scaledreamer.training.trainer import run_training\n"
    "from scaledreamer.widgets.step_viewer import StepViewer\n"
    "s = sd.TrainSettings(prompt=('a red car', 'a blue house'), prompts_per_step=2, steps=21)\n"
    "run = run_training('step_run', s, show=False)",
    "viewer = StepViewer('step_run')\nviewer",
)


def test_a_walk_through_the_steps(browser, lab, tmp_path):
    "Keys, buttons and the choice of an image; a reload with a live kernel shows the same step."
    with lab.notebook(browser, tmp_path, CELLS) as page:
        view = page.locator(".scaledreamer-step").first
        state = lambda text: view.locator(f".message:has-text('{text}')").wait_for()
        state("step 20 of 21, image 1 of 2")
        assert view.locator("img").count() == 7
        sizes = view.evaluate("el => [...el.querySelectorAll('img')].map(i => i.naturalWidth)")
        assert sizes == [64] * 6 + [16]
        view.locator("input[type=range]").focus()
        page.keyboard.press("ArrowLeft")
        state("step 10 of 21")
        view.get_by_label("image of the batch").select_option(index=1)
        state("step 10 of 21, image 2 of 2")
        view.get_by_label("previous step").click()
        state("step 0 of 21")
        alt = view.locator("img").first.get_attribute("alt")
        assert alt.startswith("render (step 0, a ")
        view.screenshot(path=tmp_path / "steps.png")
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        view.wait_for()
        state("step 0 of 21, image 2 of 2")
        assert view.locator("output").inner_text() == "0"
