"""Steps that are not finite are counted and skipped up to a limit; then the run has diverged."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from fixtures import two_prompts

from scaledreamer.commands import evaluate
from scaledreamer.commands.cli import run_command
from scaledreamer.core.async_metrics import Diverged, FiniteMonitor
from scaledreamer.distill import vsd
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.training.checkpoints import checkpoint_steps
from scaledreamer.training.divergence import divergence_text, read_divergence
from scaledreamer.training.optimizer_state import optimizer_tensors
from scaledreamer.training.run import build
from scaledreamer.training.run_logs import read_rows
from scaledreamer.training.save_settings import SaveSettings
from scaledreamer.training.trainer import open_run, run_training
from scaledreamer.view.run_comparison import metric_differences, read_record

pytestmark = pytest.mark.filterwarnings(
    "ignore:step . is skipped", "ignore:.* diverged at step", "ignore:.* starts anew"
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    save = SaveSettings(max_skipped_steps=2)
    return two_prompts(folder, steps=6, validate_every=99, checkpoint_every=2, save=save)


@pytest.fixture
def poison(monkeypatch):
    "Makes the gradients of some steps NaN."

    def at(*steps):
        def made(*arguments, **options):
            run = build(*arguments, **options)
            for weight in run.generator.parameters():
                weight.register_hook(lambda g: g * (torch.nan if run.step in steps else 1.0))
            return run

        monkeypatch.setattr("scaledreamer.training.trainer.build", made)

    return at


def state(run):
    "Weights and averages of Adam."
    adam = sorted(optimizer_tensors(run.optimizer).items())
    return torch.cat([x.flatten() for x in (*run.generator.parameters(), *dict(adam).values())])


def limited(settings, most):
    return replace(settings, save=SaveSettings(max_skipped_steps=most))


def test_a_skipped_step_changes_no_weight_and_is_counted(settings, poison, tmp_path):
    poison(2)
    states = []
    run_training(
        tmp_path / "run",
        settings,
        on_start=lambda run: states.append((run, state(run).clone())),
        on_step=lambda step, metrics: states.append(state(states[0][0]).clone()),
        show=False,
    )
    changed = [not torch.equal(a, b) for a, b in zip(states[2:], states[3:])]  # by steps 2 ... 5
    assert changed == [False, True, True, True][: len(changed)]
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row.get("skipped") for row in rows] == [None, None, 1, 1, 1, 1]
    assert read_rows(tmp_path / "run/sessions.jsonl")[-1]["skipped"] == 1
    newest = json.loads((tmp_path / "run/checkpoints/000006/state.json").read_text())
    assert newest["skipped"] == 1 and read_divergence(tmp_path / "run") is None


@pytest.mark.parametrize("late", [False, True])
def test_one_step_too_many_ends_the_run_as_diverged(settings, poison, tmp_path, monkeypatch, late):
    "Also where numbers are read late, as on a GPU: no checkpoint is behind the last good step."
    if late:
        monkeypatch.setattr(FiniteMonitor, "check_if_cheap", lambda self: None)
    poison(1, 3, 4)
    with pytest.raises(Diverged, match="diverged at step 4: the gradient is not finite, t ") as end:
        run_training(tmp_path / "run", replace(settings, log_every=6), show=False)
    assert "its last checkpoint is of step 4" in str(end.value)
    found = read_divergence(tmp_path / "run")
    assert (found["step"], found["bad"], found["checkpoint"]) == (4, "the gradient", 4)
    assert 0 < found["t"] < 1000 and found["gradient_norm"] > 0
    assert found["weight_gradient"] is None  # NaN
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [2, 4]


def test_late_and_early_reading_end_with_the_same_weights(settings, poison, tmp_path, monkeypatch):
    poison(1, 4)
    early = run_training(tmp_path / "early", settings, show=False)
    monkeypatch.setattr(FiniteMonitor, "check_if_cheap", lambda self: None)
    late = run_training(tmp_path / "late", replace(settings, log_every=5), show=False)
    assert torch.equal(state(early), state(late)) and late.monitor.skipped == 2


def test_after_the_limit_nothing_changes_until_it_is_read(settings, poison, tmp_path, monkeypatch):
    monkeypatch.setattr(FiniteMonitor, "check_if_cheap", lambda self: None)
    poison(2, 3)
    states = []
    own = replace(limited(settings, 0), log_every=99, checkpoint_every=6)
    with pytest.raises(Diverged, match="diverged at step 2: .+; it has no checkpoint"):
        run_training(
            tmp_path / "run",
            own,
            on_start=lambda run: states.append(run),
            on_step=lambda step, metrics: states.append(state(states[0]).clone()),
            show=False,
        )
    assert len(states) > 4 and all(torch.equal(states[2], later) for later in states[3:])


def test_a_resumed_run_counts_on_and_says_that_it_had_diverged(settings, poison, tmp_path):
    poison(1, 3, 4)
    whole = run_training(tmp_path / "whole", limited(settings, 3), show=False)
    done = []
    stop = lambda: len(done) == 2
    run_training(
        tmp_path / "run", settings, stop=stop, on_step=lambda *step: done.append(step), show=False
    )
    with pytest.raises(Diverged, match="at step 4: .+; steps skipped before it: 2; "):
        run_training(tmp_path / "run", settings, resume=True, show=False)
    assert read_divergence(tmp_path / "run")["step"] == 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = run_training(tmp_path / "run", limited(settings, 3), resume=True, show=False)
    said = " ".join(str(one.message) for one in caught)
    assert "diverged at step 4: it goes on from step 4" in said and "--max-skipped-steps" in said
    assert torch.equal(state(run), state(whole)) and read_divergence(tmp_path / "run") is None
    metrics = (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics


def test_a_run_that_diverged_at_once_is_kept_and_named(settings, poison, tmp_path, capsys):
    poison(0)
    with pytest.raises(Diverged, match="it has no checkpoint"):
        run_training(tmp_path / "run", limited(settings, 0), show=False)
    assert read_divergence(tmp_path / "run")["checkpoint"] is None
    assert run_command(["evaluate", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "run: × diverged at step 0 (the gradient not finite), it has no checkpoint: " in error
    poison()
    assert run_training(tmp_path / "run", settings, resume=True, show=False).step == 6


def test_a_diverged_estimator_is_the_same(settings, tmp_path, monkeypatch):
    "Its loss is not finite: neither it nor the generator changes."
    own = replace(settings, prior="tiny-sd", method="vsd", steps=3, distill=DistillSettings())
    states = []

    def made(*arguments):
        run = build(*arguments)
        states.append((run, next(iter(run.estimator.estimator.parameters()))))
        return run

    monkeypatch.setattr("scaledreamer.training.trainer.build", made)
    gradients = vsd.add_estimator_gradients
    bad = lambda *a: gradients(*a) * (torch.nan if states[0][0].step == 1 else 1.0)
    monkeypatch.setattr(vsd, "add_estimator_gradients", bad)
    kept = []
    run = run_training(
        tmp_path / "run",
        own,
        on_step=lambda *_: kept.append([state(states[0][0]).clone(), states[0][1].clone()]),
        show=False,
    )
    assert run.monitor.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[1]))
    assert not torch.equal(kept[1][0], kept[2][0])


def test_the_words_of_a_table():
    assert divergence_text({"step": 731, "bad": "asd"}) == "× diverged at step 731 (asd not finite)"


def test_opening_a_diverged_run_gives_its_last_good_checkpoint(settings, poison, tmp_path):
    poison(3, 4)
    with pytest.raises(Diverged):
        run_training(tmp_path / "run", limited(settings, 1), show=False)
    run = open_run(tmp_path / "run")
    assert run.step == 4 and all(weight.isfinite().all() for weight in run.generator.parameters())


def test_evaluation_and_comparison_show_the_cross(settings, poison, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluate, "evaluate_scenes", lambda *_, **__: {"sim": 0.5, "per_prompt": []}
    )
    good = run_training(tmp_path / "good", settings, show=False)
    poison(2, 4)
    with pytest.raises(Diverged):
        run_training(tmp_path / "bad", limited(settings, 1), show=False)
    results = [evaluate.evaluate_run(run, None) for run in (good, open_run(tmp_path / "bad"))]
    cross = "× diverged at step 4 (the gradient not finite)"
    assert evaluate.summary(results[0]) == "Sim 0.500"
    assert evaluate.summary(results[1]) == f"{cross}; at step 4: Sim 0.500"
    stored = json.loads((tmp_path / "bad/eval.json").read_text())
    assert stored["diverged"]["step"] == 4 and "diverged" not in results[0]
    records = [read_record(tmp_path / name) for name in ("good", "bad")]
    assert metric_differences(records)["CLIP similarity"] == ["0.500", "×", ""]
    assert any(note.startswith(cross) for note in records[1].notes) and not records[0].diverged
