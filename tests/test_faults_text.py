"View vocabulary, texts that are lost or merged, CLIP models, and the defaults of each method."

import json
import re
import warnings
from dataclasses import replace
from functools import cache
from inspect import signature

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from open_clip import get_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scaledreamer.commands.cli import run_command
from scaledreamer.core.settings import UsageError
from scaledreamer.distill.conditioning import resolve_view_prompting
from scaledreamer.distill.distill_settings import DEFECTS, DESCRIPTION, DistillSettings
from scaledreamer.prior.clip_text import unread_parts
from scaledreamer.prior.mixture import MixturePrior
from scaledreamer.prior.pipelines import random_unet, random_vae, small_tokenizer
from scaledreamer.prior.stable_diffusion import TINY, StableDiffusionPrior
from scaledreamer.toy.toy_settings import ToySettings
from scaledreamer.training.method_defaults import resolve_settings
from scaledreamer.training.run import build
from scaledreamer.training.corpora import number_prompts
from scaledreamer.training.presets import PRESETS
from scaledreamer.training.train_settings import METHODS, TrainSettings, build_prior
from scaledreamer.training.earlier_settings import read_settings
from scaledreamer.training.train_settings import method_of
from scaledreamer.training.trainer import open_run, run_training

QUICK = ["--generator", "ingp", "--prompts-per-step", "1", "--resolution", "8"]
CORGI = (
    "a DSLR photo of a corgi wearing a beret and holding a baguette, standing up on its two hind "
    "legs in front of a cafe in Paris"
)


@cache
def clip_tokenizer() -> CLIPTokenizer:
    "The tokenizer of CLIP and Stable Diffusion, of 77 tokens, from the vocabulary in open_clip."
    source = get_tokenizer("ViT-B-32")
    name = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {name.get(token, token): i for token, i in source.encoder.items()}
    merges = [pair for pair, _ in sorted(source.bpe_ranks.items(), key=lambda item: item[1])]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


@cache
def tiny_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(TINY), subfolder="tokenizer")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    "A small Stable Diffusion of random weights that reads 77 tokens and knows no view tokens."
    torch.manual_seed(0)
    words = " ".join([CORGI, DEFECTS, DESCRIPTION, "red car blue ball view front side"])
    tokenizer = small_tokenizer(re.findall("[a-z]+", words.lower()), window=77)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=random_vae(),
        unet=random_unet(),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler.from_pretrained(str(TINY), subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("photos") / "sd"
    pipeline.save_pretrained(folder)
    return str(folder)


def corpus_of(tmp_path, *prompts: str) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return str(path)


def command(capsys, *argv) -> tuple[int, str, str]:
    code = run_command([str(word) for word in argv])
    return code, *capsys.readouterr()


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["distill"]


# view vocabulary ----------------------------------------------------------------------------------


def test_the_vocabulary_of_views_belongs_to_the_prior(photos, tmp_path, capsys):
    prior = StableDiffusionPrior.from_pretrained(photos)
    assert prior.view_vocabulary == "words" and resolve_view_prompting(prior, "auto") == "words"
    assert StableDiffusionPrior.from_pretrained().view_vocabulary == "tokens"
    corpus = corpus_of(tmp_path, "a corgi")
    out = tmp_path / "run"
    argv = ["train", "--corpus", corpus, "--prior", photos, "--steps", 1, *QUICK, "--out", out]
    code, printed, _ = command(capsys, *argv, "--eval-views", 0)
    assert code == 0 and "view prompting words" in printed and "guidance 100" in printed
    assert config_of(out)["view_prompting"] == "words" and config_of(out)["guidance"] is None
    code, _, error = command(
        capsys, *argv[:-1], tmp_path / "no", "--distill.view-prompting", "tokens"
    )
    assert code == 2 and "<az+180> <el+15>" in error and "give words" in error
    assert error.count("\n") == 1 and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("prior", "view", "expected"),
    [
        ("mixture", "auto", "tokens"),
        ("mixture", "perp-neg", "perp-neg"),
        ("tiny-sd", "plain", "plain"),
    ],
)
def test_views_are_said_at_the_start_and_stored(tmp_path, capsys, prior, view, expected):
    corpus, out = corpus_of(tmp_path, "a red car"), tmp_path / "run"
    options = [] if view == "auto" else ["--distill.view-prompting", view]
    code, printed, _ = command(
        *(capsys, "train", "--corpus", corpus, "--prior", prior, "--steps", 1, *QUICK),
        *("--eval-views", 0, "--out", out, *options),
    )
    assert code == 0 and f"view prompting {expected}" in printed
    assert config_of(out)["view_prompting"] == expected


def test_a_prior_that_takes_cameras_gets_plain_prompts():
    prior = MixturePrior({"a car": torch.zeros(1, 2)})
    prior.view_vocabulary = "plain"
    assert resolve_settings(TrainSettings(), prior).distill.view_prompting == "plain"
    with pytest.raises(UsageError, match="are no tokens of this prior"):
        resolve_view_prompting(prior, "tokens")


def test_a_run_that_read_view_tokens_as_letters_still_opens(photos, tmp_path):
    "Earlier versions trained so, and wrote no loss weight."
    corpus, out = corpus_of(tmp_path, "a corgi"), tmp_path / "run"
    settings = TrainSettings(
        prior=photos, corpus=corpus, generator="ingp", steps=2, prompts_per_step=1, resolution=8
    )
    run_training(out, settings, stop=lambda: True, show=False)
    config = json.loads((out / "config.json").read_text())
    config["distill"] |= {"view_prompting": "tokens", "guidance": 1.5}
    del config["distill"]["weight"]
    (out / "config.json").write_text(json.dumps(config))
    distill = open_run(out).settings.distill
    assert (distill.view_prompting, distill.guidance, distill.weight) == ("tokens", 1.5, 1.0)
    with pytest.raises(UsageError, match="are no tokens of this prior"):
        run_training(out, settings, resume=True, show=False)


# texts that are lost or merged --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tiny", "photos"),
    [
        ("a red car, <az+45> <el+15>", [], []),
        ("A Red\u3000CAR,\t3 (not 4)!", [], []),
        ("a caf\u00e9", ["\u00e9"], []),
        ("a cafe\u0301", ["\u00e9"], []),
        ("\u8eca", ["\u8eca"], []),
        ("\U0001f697 a car", ["\U0001f697"], []),
        ("a\u200bcar", ["\u200b"], []),
        ("\u0130stanbul \u03a3\u0391\u03a3 \u00df", None, []),
        ("\uff21\uff22", ["\uff21", "\uff22"], []),
        ("a car<|endoftext|> on a cube", ["<|endoftext|>"], ["<|endoftext|>"]),
        ("don't \"quote\" it's n't", [], []),
        ("", [], []),
    ],
)
def test_what_a_tokenizer_loses_is_found(text, tiny, photos):
    assert unread_parts(clip_tokenizer(), text) == photos
    if tiny is None:
        assert unread_parts(tiny_tokenizer(), text)
    else:
        assert unread_parts(tiny_tokenizer(), text) == tiny


@pytest.mark.parametrize("text", ["a caf\u00e9 red car", "\u8eca", "a red car <|endoftext|> ball"])
def test_a_prompt_that_the_prior_cannot_read_is_refused_before_training(tmp_path, capsys, text):
    argv = ["train", "--corpus", corpus_of(tmp_path, "a red car", text), "--steps", 3, *QUICK]
    code, _, error = command(capsys, *argv, "--out", tmp_path / "run")
    lost = next(part for part in unread_parts(tiny_tokenizer(), text))
    assert code == 2 and error.count("\n") == 1
    assert f"cannot read {lost!r} in the text {text!r}: leave it out" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--distill.negative-prompt", "--distill.nfsd-negative-prompt"])
def test_other_texts_are_checked_as_prompts_are(tmp_path, capsys, option):
    argv = ["train", "--corpus", corpus_of(tmp_path, "a red car"), "--method", "nfsd", *QUICK]
    code, _, error = command(capsys, *argv, option, "na\u00efve", "--out", tmp_path / "run")
    assert code == 2 and "cannot read '\u00ef' in the text 'na\u00efve'" in error
    toy = ["toy", "images", "--methods", "sds", "--text", "na\u00efve", "--out", tmp_path / "toy"]
    code, _, error = command(capsys, *toy)
    assert code == 2 and "cannot read '\u00ef'" in error and not (tmp_path / "toy").exists()


def test_texts_outside_the_package_are_warned_of_and_not_refused():
    prior = StableDiffusionPrior.from_pretrained()
    with pytest.warns(
        UserWarning, match="cannot read '\u00e9' in the text 'a caf\u00e9'; it is lost"
    ):
        prior.encode_text(["a caf\u00e9"])
    with pytest.raises(UsageError, match="no character"):
        prior.encode_text(["a \udcff"])


def test_prompts_that_are_one_text_to_the_prior_are_named_before_training(tmp_path, capsys, photos):
    prompts = "A red car", "a red car", "a blue ball", "a  Red\tcar"
    for name, prior in (("tiny", "tiny-sd"), ("photos", photos)):
        corpus, out = corpus_of(tmp_path, *prompts), tmp_path / name
        code, _, error = command(
            *(capsys, "train", "--corpus", corpus, "--prior", prior, "--steps", 1, *QUICK),
            *("--eval-views", 0, "--out", out),
        )
        assert code == 0 and "each group trains as one object: 'A red car' = 'a red car' =" in error
        assert "blue" not in error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(tmp_path, TrainSettings(generator="ingp"), number_prompts([("a red car", "train")]))


# CLIP models --------------------------------------------------------------------------------------


def test_a_long_prompt_trains_and_is_evaluated_with_a_word_about_it(photos, tmp_path, capsys):
    corpus, out = corpus_of(tmp_path, CORGI, "a corgi"), tmp_path / "run"
    argv = ["train", "--corpus", corpus, "--prior", photos, "--steps", 1, *QUICK, "--out", out]
    code, printed, error = command(capsys, *argv, "--eval-views", 1, "--clip", "tiny-clip")
    assert code == 0 and printed.endswith(f"run: {out}\n") and "R@1" in printed
    assert "tiny-clip reads at most 24 tokens" in error and "1 of the texts" in error
    result = json.loads((out / "eval.json").read_text())
    assert result["clip_model"] == "tiny-clip" and result["sim"] is not None


def test_without_a_clip_that_knows_the_prior_its_metrics_are_left_out(
    photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("scaledreamer.commands.evaluate.is_downloaded", lambda name: False)
    corpus, out = corpus_of(tmp_path, CORGI), tmp_path / "run"
    argv = ["train", "--corpus", corpus, "--prior", photos, "--steps", 1, *QUICK, "--out", out]
    code, printed, _ = command(capsys, *argv, "--eval-views", 1)
    assert code == 0 and "no CLIP metrics: tiny-clip knows Toybox only" in printed
    assert f"scaledreamer evaluate {out} --clip ViT-L-14:openai" in printed
    result = json.loads((out / "eval.json").read_text())
    assert result["clip_model"] is None and result["sim"] is None
    assert (out / "report.html").exists()
    assert command(capsys, "evaluate", out, "--views", 1)[0] == 0
    code, printed, _ = command(capsys, "evaluate", out, "--views", 1, "--clip", "tiny-clip")
    assert code == 0 and "Sim" in printed


def test_a_wrong_clip_is_refused_before_the_prior_is_opened(tmp_path, capsys):
    code, _, error = command(
        capsys, "train", "--prior", "no/such", "--clip", "ViT-L-14:mine", "--out", tmp_path / "run"
    )
    assert code == 2 and "its weights are openai" in error and not (tmp_path / "run").exists()


# defaults of a method -----------------------------------------------------------------------------


def test_each_method_has_its_own_defaults(photos):
    tiny, other = (
        StableDiffusionPrior.from_pretrained(),
        StableDiffusionPrior.from_pretrained(photos),
    )
    for name, method in METHODS.items():
        settings = TrainSettings(method=name)
        own = resolve_settings(settings, tiny).distill
        assert 1 <= own.guidance <= 10 and own.weight > 0 and own.view_prompting == "tokens"
        papers = resolve_settings(settings, other)
        assert papers.distill.guidance is None and papers.distill.weight == 1.0
        if name not in ("vsd", "esd"):
            assert method_of(papers, step=10**9) is method  # with the guidance of its paper
    assert signature(METHODS["sds"]).parameters["guidance"].default == 100.0
    assert resolve_settings(TrainSettings(), tiny).distill.guidance == 1.15
    sds = resolve_settings(TrainSettings(method="sds"), tiny).distill
    assert sds.guidance == 5.0
    mine = DistillSettings(guidance=3.0, weight=0.5, view_prompting="words", timestep_per="image")
    assert resolve_settings(TrainSettings(distill=mine), tiny).distill == mine


@pytest.mark.parametrize("method", METHODS)
def test_each_method_starts_with_no_other_option(method, tmp_path, capsys):
    corpus, out = corpus_of(tmp_path, "a red car"), tmp_path / "run"
    code, printed, _ = command(
        *(capsys, "train", "--corpus", corpus, "--method", method, "--steps", 1, *QUICK),
        *("--eval-views", 0, "--out", out, "--log-every", 1),
    )
    assert code == 0 and printed.startswith(f"{method}: guidance {config_of(out)['guidance']:g}, ")
    (row,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert row[f"loss_{method}"] > 0 and torch.tensor(row["gradient_norm"]).isfinite()


def test_the_loss_weight_scales_the_distillation_loss_only(tmp_path):
    corpus, rows = corpus_of(tmp_path, "a red car"), {}
    for weight in (1.0, 0.25):
        settings = TrainSettings(
            corpus=corpus, generator="ingp", steps=1, prompts_per_step=1, resolution=8, log_every=1
        )
        own = replace(settings, distill=DistillSettings(weight=weight))
        run_training(tmp_path / str(weight), own, show=False)
        rows[weight] = json.loads((tmp_path / f"{weight}/metrics.jsonl").read_text())
    assert rows[0.25]["loss_asd"] == rows[1.0]["loss_asd"] / 4
    assert rows[0.25]["loss_sparsity"] == rows[1.0]["loss_sparsity"]
    assert rows[0.25]["gradient_norm"] == rows[1.0]["gradient_norm"]


def test_texts_of_nfsd_and_bridge_fit_the_prior(photos):
    tiny, other = (
        StableDiffusionPrior.from_pretrained(strict=True),
        build_prior(TrainSettings(prior=photos), ()),
    )
    nfsd, bridge = TrainSettings(method="nfsd"), TrainSettings(method="bridge")
    assert resolve_settings(nfsd, tiny).distill.nfsd_negative_prompt == ""
    assert resolve_settings(bridge, tiny, ["a car"]).distill.bridge_source_prompt == ""
    # "-" is not in the vocabulary
    read = resolve_settings(nfsd, other).distill.nfsd_negative_prompt
    assert DEFECTS == f"{read}, low-resolution, gloomy"
    assert resolve_settings(bridge, other, ["a corgi"]).distill.bridge_source_prompt == DESCRIPTION
    behind = resolve_settings(bridge, other, ["a corgi", CORGI + " in front of a cafe" * 6]).distill
    assert behind.bridge_source_prompt and DESCRIPTION.startswith(
        behind.bridge_source_prompt + ", "
    )
    assert resolve_settings(TrainSettings(), other).distill.nfsd_negative_prompt is None


def test_toys_of_nfsd_and_bridge_start_with_their_default_texts(tmp_path, capsys):
    code, printed, _ = command(
        *(capsys, "toy", "images", "--methods", "nfsd,bridge"),
        *("--seeds", 1, "--steps", 1, "--count", 1, "--out", tmp_path / "toy"),
    )
    assert code == 0 and "nfsd_negative_prompt: ''" in printed


def test_a_run_keeps_the_defaults_it_was_started_with(tmp_path):
    corpus, out = corpus_of(tmp_path, "a red car"), tmp_path / "run"
    old = DistillSettings(  # of earlier versions
        guidance=1.5, weight=1.0, view_prompting="tokens", timestep_per="image"
    )
    settings = TrainSettings(
        corpus=corpus,
        method="sds",
        generator="ingp",
        steps=2,
        prompts_per_step=1,
        resolution=8,
        distill=old,
    )
    run_training(out, settings, stop=lambda: True, show=False)
    run = run_training(out, replace(settings, distill=DistillSettings()), resume=True, show=False)
    assert run.settings.distill == old and run.step == 2
    with pytest.raises(UsageError, match="distill.guidance"):
        run_training(
            out, replace(settings, distill=DistillSettings(guidance=7)), resume=True, show=False
        )


def test_settings_of_earlier_versions_are_read():
    assert read_settings("{}").distill == DistillSettings(
        guidance=1.5, weight=1.0, view_prompting="tokens", timestep_per="image"
    )
    text = '{"distill": {"guidance": null, "views": "perp-neg", "defects": "fog"}}'
    distill = read_settings(text).distill
    assert (distill.guidance, distill.view_prompting) == (None, "perp-neg")
    assert (distill.nfsd_negative_prompt, distill.weight) == ("fog", 1.0)
    for preset in PRESETS.values():
        assert preset().distill.weight in ("auto", 1.0)


def test_a_guidance_can_be_auto_none_or_a_number_on_the_command_line(tmp_path, capsys):
    corpus = corpus_of(tmp_path, "a red car")
    argv = ["train", "--corpus", corpus, "--method", "sds", "--steps", 1, *QUICK, "--eval-views", 0]
    for word, guidance in (("auto", 5.0), ("None", None)):
        out = tmp_path / word
        assert command(capsys, *argv, "--out", out, "--distill.guidance", word)[0] == 0
        assert config_of(out)["guidance"] == guidance
    for word in ("high", "nan", "1e30"):
        code, _, error = command(capsys, *argv, "--out", out, "--distill.guidance", word)
        assert code == 2 and "guidance" in error


def test_an_unknown_shift_is_refused():
    for settings, words in (
        (DistillSettings(), "random, deterministic"),
        (ToySettings(), "random, deterministic, none"),
    ):
        assert settings.shift_schedule().random
        assert not replace(settings, shift="deterministic").shift_schedule().random
        object.__setattr__(settings, "shift", "square")  # past the type checks of a test run
        with pytest.raises(UsageError, match=f"^shift is 'square': expected one of {words}$"):
            settings.shift_schedule()
