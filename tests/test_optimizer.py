"""Adan against the paper's release, and gradient accumulation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from released import fixture
from scaledreamer.core.settings import UsageError
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.field.background import BackgroundAugmentation
from scaledreamer.training.optimizer_state import load_optimizer, optimizer_tensors
from scaledreamer.training.corpora import number_prompts
from scaledreamer.training.optim_settings import OptimSettings
from scaledreamer.training.presets import PRESETS, dl17k_triplane_mv
from scaledreamer.training.run import build
from scaledreamer.training.step import training_step
from scaledreamer.training.step_update import generator_optimizer, update_weights
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training

TEXTS = ("a red ball", "a blue cube", "a green chair", "a yellow car")
ADAN = OptimSettings("adan", eps=1e-15)
GUIDED = DistillSettings(guidance=1.5)  # less leaves gradients that are small sums of large numbers
SMALL = TrainSettings(
    prior="mixture", prompt=TEXTS, steps=10, resolution=12, views_per_prompt=2, distill=GUIDED
)


def start(settings):
    prompts = number_prompts([(text, "train") for text in TEXTS])
    run = build(Path("unused"), settings, prompts)
    run.optimizer = generator_optimizer(run.settings, run.generator)
    return run, run.prior.encode_text(list(TEXTS))


# ---------------------------------------------------------------- Adan


@pytest.mark.parametrize("resumed_after", [0, 1, 5, None])
def test_adan_is_that_of_the_release(resumed_after):
    meta, data = fixture("11_adan")
    rates = {"p0": meta["settings"]["lr"]["p0"], "p1": meta["settings"]["lr"]["others"]}
    options = {"betas": tuple(meta["settings"]["betas"]), "eps": meta["settings"]["eps"]}
    settings = TrainSettings(optim=OptimSettings("adan", adan_betas=options["betas"], eps=1e-15))
    for name, rate in rates.items():
        net = nn.ParameterList([data[f"{name}/init"].clone()])
        optimizer = generator_optimizer(settings, net)
        assert optimizer.param_groups[0]["betas"] == options["betas"]
        assert optimizer.param_groups[0]["eps"] == options["eps"]
        assert optimizer.param_groups[0]["weight_decay"] == 0
        for k, gradient in enumerate(data[f"{name}/grads"]):
            if k == resumed_after:
                tensors = optimizer_tensors(optimizer)
                optimizer = generator_optimizer(settings, net)
                load_optimizer(optimizer, tensors)
            net[0].grad = gradient.clone()
            update_weights(optimizer, rate, torch.tensor(True))
            want = data[f"{name}/trajectory"][k]
            torch.testing.assert_close(net[0].detach(), want, rtol=0, atol=1e-6)


def whole_and_resumed(folder, settings):
    "A run, and the same one stopped on the way and continued, which has the same weights."
    whole = run_training(folder / "whole", settings, show=False)
    steps = iter([False, True])
    run_training(folder / "parts", settings, stop=lambda: next(steps), show=False)
    parts = run_training(folder / "parts", settings, resume=True, show=False)
    for a, b in zip(whole.generator.parameters(), parts.generator.parameters()):
        assert torch.equal(a, b)
    return whole, parts


def test_a_run_by_adan_resumes_exactly(tmp_path):
    settings = replace(SMALL, optim=ADAN, steps=4, generator="triplane", checkpoint_every=2)
    whole, parts = whole_and_resumed(tmp_path, settings)
    rows = [(folder / "metrics.jsonl").read_text() for folder in (whole.folder, parts.folder)]
    assert rows[0] == rows[1]


def test_a_state_of_another_optimiser_is_refused(tmp_path):
    run, texts = start(SMALL)
    training_step(run, texts)
    adan = generator_optimizer(replace(SMALL, optim=ADAN), run.generator)
    with pytest.raises(ValueError, match="exp_avg_diff is missing"):
        load_optimizer(adan, optimizer_tensors(run.optimizer))
    run_training(tmp_path / "run", replace(SMALL, steps=1), show=False)
    with pytest.raises(UsageError, match="was started with optim.optimizer = adam, not adan"):
        run_training(tmp_path / "run", replace(SMALL, steps=2, optim=ADAN), resume=True, show=False)


def test_a_step_of_adan_that_is_not_finite_changes_no_weight():
    run, texts = start(replace(SMALL, optim=ADAN))
    run.monitor.check_if_cheap = lambda: None  # as on a GPU
    table = run.generator.encoder.table
    table.register_hook(lambda gradient: gradient * float("nan"))
    before = table.detach().clone()
    training_step(run, texts)
    assert torch.equal(before, table) and not run.optimizer.state


# accumulation


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    "generator, method",
    [("hyper-ingp", "asd"), ("conv3d", "asd"), ("triplane", "asd"), ("hyper-ingp", "vsd")],
)
def test_a_step_in_parts_is_the_step(generator, method, parts):
    settings = replace(SMALL, generator=generator, method=method)
    if method == "vsd":
        settings = replace(settings, prior="tiny-sd")
    if generator == "triplane":
        settings = replace(settings, background=BackgroundAugmentation(0.5, each_image=True))
    whole, texts = start(settings)
    split, _ = start(replace(settings, optim=OptimSettings(accumulate=parts)))
    logged = [dict(training_step(run, texts)) for run in (whole, split)]
    assert logged[0].keys() == logged[1].keys()
    for name, value in logged[0].items():
        assert logged[1][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    torch.testing.assert_close(whole.renders, split.renders, rtol=0, atol=1e-5)
    pairs = [*zip(whole.generator.parameters(), split.generator.parameters())]
    if method == "vsd":
        estimators = [run.estimator.estimator.parameters() for run in (whole, split)]
        pairs += zip(*estimators)
    assert all((a.grad is None) == (b.grad is None) for a, b in pairs)
    pairs = [(a.grad, b.grad) for a, b in pairs if a.grad is not None]
    zero = 1e-7 * max(a.abs().max().item() for a, _ in pairs)
    for a, b in pairs:  # float32 sums in another order
        torch.testing.assert_close(a, b, rtol=0, atol=zero + 2e-5 * a.abs().max().item())


def test_a_run_in_parts_resumes_whole(tmp_path):
    halves = OptimSettings(accumulate=2)
    settings = replace(SMALL, optim=halves, steps=4, checkpoint_every=2)
    _, parts = whole_and_resumed(tmp_path, settings)
    longer = replace(settings, steps=5, optim=OptimSettings())  # more memory at hand
    with pytest.warns(UserWarning, match="goes on with 5 steps"):
        assert run_training(parts.folder, longer, resume=True, show=False).step == 5


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"optim": OptimSettings(accumulate=3)},
            "optim.accumulate is 3: expected a divisor of the 4",
        )
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        TrainSettings(**changes)


# the recipe of the Triplane-Transformer


def test_the_recipe_of_the_release():
    recipe = dl17k_triplane_mv()
    assert (recipe.optim.optimizer, recipe.optim.adan_betas) == ("adan", (0.98, 0.92, 0.99))
    late = {"opaque": 0.0, "orientation": 0.0}
    assert recipe.loss.at(5, 100) == {"sparsity": 20.0, "eikonal": 0.01} | late
    assert recipe.loss.at(100, 100)["opaque"] == 1.0
    assert recipe.background.probability == 0 and recipe.render.near_far is None


def test_the_small_triplane_preset_trains():
    settings = replace(PRESETS["triplane"](), prior="mixture", prompt=TEXTS, resolution=12)
    run, texts = start(settings)
    losses = [training_step(run, texts)["loss_asd"] for run.step in range(3)]
    assert run.renders.shape == (2, 4, 3, 12, 12) and all(loss > 0 for loss in losses)


def test_the_recipe_of_the_release_sees_its_objects_from_afar():
    large = dl17k_triplane_mv()
    plain = replace(large.distill, negative_prompt="")
    small = {"generator": "triplane", "prior": "mixture", "prompt": TEXTS, "resolution": 8}
    parts = replace(large.optim, accumulate=2)
    settings = replace(large, **small, prompts_per_step=2, optim=parts, distill=plain)
    run, texts = start(settings)
    metrics = dict(training_step(run, texts))
    assert run.renders.shape == (2, 4, 3, 8, 8) and metrics["loss_eikonal"] > 0
    seen = (run.renders < 0.9).flatten(2).float().mean(-1)  # in front of white
    assert (seen > 0.1).all()  # fixed planes from 0.1 to 4.0 leave one scene of seven empty
    assert torch.isfinite(run.renders).all()
