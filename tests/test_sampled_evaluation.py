"""`evaluate --max-prompts`: the evaluation of a sample is that of its prompts."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures import two_prompts

from scaledreamer.camera.rays import camera_rays
from scaledreamer.commands import evaluate as command
from scaledreamer.commands.cli import run_command
from scaledreamer.commands.evaluate import EVALUATED_PROMPTS, evaluate_run, evaluated_prompts
from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import make_rng, seed_everything
from scaledreamer.eval import captures, report, view_metrics
from scaledreamer.eval.captures import VolumeRenderer
from scaledreamer.eval.clip import ClipScorer
from scaledreamer.eval.report import evaluate_scenes
from scaledreamer.training.corpora import Prompt
from scaledreamer.training.run import Run, build

TEXTS = ["a red ball", "a blue cube", "a green cone", "a pink head"]


class Letters(ClipScorer):
    "In place of a CLIP model: features of the mean colour, and of the letters."

    def __init__(self):
        self.name = "letters"

    def image_features(self, rgb):
        wide = torch.nn.functional.pad(rgb.mean((2, 3)) - 0.5, (0, 5), value=0.1)
        return torch.nn.functional.normalize(wide, dim=-1)

    def text_features(self, texts):
        seeds = (sum(text.encode()) for text in texts)
        drawn = torch.stack([torch.randn(8, generator=make_rng(seed)) for seed in seeds])
        return torch.nn.functional.normalize(drawn, dim=-1)

    def check(self, texts):
        pass


class Sketch(VolumeRenderer):
    "In place of volume rendering: one sample per ray, where it is nearest to the origin."

    def __call__(self, scene, cameras, size):
        rays = camera_rays(cameras, size, size)
        origins, directions = rays.flat()
        points = origins - (origins * directions).sum(-1, keepdim=True) * directions
        opacity = torch.sigmoid(-50 * scene.sdf(points))[..., None]
        rgb = opacity * scene.color(points) + 1 - opacity
        return SimpleNamespace(rgb=rays.image(rgb), opacity=rays.image(opacity))


@pytest.fixture
def run(tmp_path, monkeypatch):
    "An untrained run on a few prompts, whose evaluation is small and writes no report."
    monkeypatch.setattr(command, "evaluate_scenes", partial(evaluate_scenes, size=12))
    monkeypatch.setattr(command, "write_report", lambda run, result: None)
    for module in (captures, report, view_metrics):
        monkeypatch.setattr(module, "CELL", 1 / 8)
    monkeypatch.setattr(command, "VolumeRenderer", Sketch)
    settings = two_prompts(tmp_path, generator="hyper-ingp")
    (tmp_path / "run").mkdir()
    yield build(tmp_path / "run", settings, tuple(map(Prompt, "0123", TEXTS)))
    captures.known_truth.cache_clear()


# the sample ---------------------------------------------------------------------------------------


def numbered(count):
    "A run that has prompts and nothing else."
    run = Run.__new__(Run)
    run.prompts = tuple(Prompt(str(i), f"prompt {i}") for i in range(count))
    return run


def places(count, most):
    return [int(prompt.id) for prompt in evaluated_prompts(numbered(count), most)]


@pytest.mark.parametrize("count, most", [(7, 3), (100, 99), (1001, 1000), (5000, 17)])
def test_a_sample_has_each_prompt_once_in_the_order_of_the_corpus(count, most):
    found = places(count, most)
    assert found == sorted({*found}) and len(found) == most
    assert {*found} <= {*range(count)} and {*found} <= {*places(count, most + 1)}


def test_the_sample_is_the_same_every_time():
    "Whatever was drawn before, in every version: evaluations of one corpus can be compared."
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    before = places(5000, 6)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    seed_everything(5)
    assert places(5000, 6) == before == [871, 1070, 2260, 2274, 2474, 3522]


def test_the_sample_does_not_depend_on_the_run(run):
    chosen = evaluated_prompts(run, 2)
    for options in ({"seed": 3}, {"method": "sds"}, {"steps": 7}):
        other = replace(run, settings=replace(run.settings, **options), step=4)
        assert evaluated_prompts(other, 2) == chosen


def test_of_a_large_corpus_a_thousand():
    assert len(places(EVALUATED_PROMPTS + 1, EVALUATED_PROMPTS)) == EVALUATED_PROMPTS == 1000
    assert evaluated_prompts(many := numbered(1000)) is many.train_prompts


# the evaluation -----------------------------------------------------------------------------------


def test_measures_of_a_sample_are_those_of_its_prompts(run, tmp_path, capsys):
    chosen = evaluated_prompts(run, 3)
    sampled = evaluate_run(run, Letters(), views=8, max_prompts=3)
    said = capsys.readouterr().out
    assert said.startswith("3 of 4 prompts are evaluated; for all: scaledreamer evaluate ")
    assert said.endswith("--max-prompts 4\n") and said.count("\n") == 1
    assert json.loads((run.folder / "eval.json").read_text()) == sampled
    (tmp_path / "few").mkdir()
    few = replace(run, folder=tmp_path / "few", prompts=tuple(chosen))
    want = evaluate_run(few, Letters(), views=8)
    assert capsys.readouterr().out == "" and "n_train_prompts" not in want
    assert sampled.pop("n_train_prompts") == len(TEXTS)
    assert sampled == want
    assert [row["text"] for row in sampled["per_prompt"]] == [prompt.text for prompt in chosen]
    assert sampled["gallery_size"] == 3 and sampled["chance"]["psnr"] is not None
    whole = {row["text"]: row for row in evaluate_run(run, Letters(), views=8)["per_prompt"]}
    for row in sampled["per_prompt"]:
        for name in row.keys() - {"r_at_1", "r_at_1_object"}:  # among other texts
            want = whole[row["text"]][name]
            if isinstance(want, float):
                want = pytest.approx(want, rel=1e-4)
            assert row[name] == want, name


def test_as_many_as_there_are_or_more_are_the_whole_evaluation(run):
    evaluate_run(run, None, views=2)
    whole = (run.folder / "eval.json").read_bytes()
    assert b"n_train_prompts" not in whole
    for most in (len(TEXTS), 10**8):
        evaluate_run(run, None, views=2, max_prompts=most)
        assert (run.folder / "eval.json").read_bytes() == whole


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "1e3", "many", "", "100000001"])
def test_a_wrong_number_is_refused_in_a_sentence(tmp_path, capsys, value):
    assert run_command(["evaluate", str(tmp_path), "--max-prompts", value]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "max-prompts" in told.err
    assert told.err.count("\n") == 1 and told.err.startswith("scaledreamer: ")


def test_no_prompt_is_no_evaluation(run):
    with pytest.raises(UsageError, match="0 prompts"):
        evaluate_run(run, None, views=2, max_prompts=0)
    assert not (run.folder / "eval.json").exists()
