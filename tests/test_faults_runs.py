"""Run folders that are damaged, moved, shared, killed or resumed with other settings.

Seeded damage of every kind is in `test_fuzz.py`."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import call, quick_commands
from damage import DEEP
from fixtures import two_prompts

from scaledreamer.commands import cli
from scaledreamer.commands.evaluate import Evaluate, training_cost
from scaledreamer.commands.export import Export
from scaledreamer.commands.train import Train
from scaledreamer.core.interrupts import interrupt_code
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.prior.stable_diffusion import TINY
from scaledreamer.training.checkpoints import checkpoint_steps
from scaledreamer.training.run_folder import read_run_settings
from scaledreamer.training.run_logs import read_rows
from scaledreamer.training.trainer import open_run, run_training

STEPS, STOPPED = 4, 3  # of the whole run, and of the one in `folder`, with checkpoints 2 and 3
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, links and signals of POSIX")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return two_prompts(folder, steps=STEPS, validate_every=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    "A run of all steps."
    return run_training(tmp_path_factory.mktemp("whole") / "run", settings, show=False)


@pytest.fixture(scope="module")
def folder(settings, tmp_path_factory):
    "A run folder with three of the four steps; never changed."
    folder, done = tmp_path_factory.mktemp("stopped") / "run", []
    stop = lambda: len(done) == STOPPED
    run_training(folder, settings, stop=stop, on_step=lambda *step: done.append(step), show=False)
    for name in ("eval.json", "report.html", "views/0000/000.png", "meshes/0000.glb"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


def weights(run):
    return torch.cat([value.flatten() for value in run.generator.state_dict().values()])


def warned(call, *arguments, **options):
    "The result of a call, and its warnings."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*arguments, **options)
    return result, " / ".join(str(one.message) for one in caught)


@pytest.fixture
def commands(settings, monkeypatch, tmp_path):
    "Runs a command without parsing and slow parts: its exit code, and the lines of stderr."
    quick_commands(monkeypatch)
    made = {
        "train": lambda run: Train(settings, out=run, resume=True, eval_views=0),
        "export": lambda run: Export(run, "a red ball", tmp_path / "mesh.ply", resolution=8),
        "evaluate": lambda run: Evaluate(run, views=1),
    }
    monkeypatch.setattr(cli, "parse", lambda argv: made[argv[0]](Path(argv[1])))

    def run(name, folder):
        called = call(name, str(folder))
        return called.code, called.lines

    return run


# ---------------------------------------------------------------- single kinds of damage


@posix
@pytest.mark.parametrize("name", ["metrics.jsonl", "renders.jsonl", "sessions.jsonl"])
@pytest.mark.parametrize("what", ["null\n", DEEP + b"\n", b"\xff\xfe\n", "folder", "pipe", "link"])
def test_a_damaged_log_is_set_aside_and_stops_nothing(copy, settings, commands, name, what):
    log = copy / name
    log.unlink()
    if what == "folder":
        log.mkdir()
    elif what == "pipe":
        os.mkfifo(log)
    elif what == "link":
        log.symlink_to("nowhere")
    else:
        log.write_bytes(what if isinstance(what, bytes) else what.encode())
    for command in ("evaluate", "export"):
        code, lines = commands(command, copy)
        used = command == "evaluate" and name != "renders.jsonl"
        assert code == 0 and ("damaged" in str(lines) or not used or not log.is_file())
        assert not (copy / f"{name}.damaged").exists()  # a reader changes nothing
    code, lines = commands("train", copy)
    assert code == 0 and f"it is now {name}.damaged" in "\n".join(lines)
    assert os.path.lexists(copy / f"{name}.damaged")
    key, steps = ("last", [4]) if name.startswith("s") else ("step", [3])
    assert [row[key] for row in read_rows(log)] == steps


def test_only_damaged_rows_of_a_log_are_lost(copy, settings, whole):
    log = copy / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([lines[0], b'{"step": 0.5', b"\xff", lines[2], b'{"st']))
    rows, line = warned(read_rows, log, "step")
    assert [row["step"] for row in rows] == [0, 2] and "damaged in 2 lines, first in 2" in line
    _, line = warned(run_training, copy, settings, resume=True, show=False)
    assert "it is now metrics.jsonl.damaged, 2 rows are kept" in line
    assert [row["step"] for row in read_rows(log)] == [0, 2, 3]


def test_damaged_weights_fall_back_to_the_newest_whole_checkpoint(copy, settings, whole):
    "One bit of one weight is enough; without a checksum it could not be known."
    file = copy / "checkpoints/000003/generator.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    opened, line = warned(open_run, copy)
    assert opened.step == 2
    assert "is damaged (its checksum differs); the checkpoint of step 2 is used" in line
    with pytest.raises(RunError, match="its checksum differs.; put it back from a copy"):
        open_run(copy, step=3)
    run, _ = warned(run_training, copy, settings, resume=True, show=False)
    assert torch.equal(weights(run), weights(whole))
    for log in ("metrics.jsonl", "renders.jsonl"):
        assert (copy / log).read_bytes() == (whole.folder / log).read_bytes()
    assert sorted(os.listdir(copy / "checkpoints")) == ["000002", "000003.damaged", "000004"]


@pytest.mark.parametrize("content", [b"", b"null", b"{", DEEP, b"\xff", b'{"step": "x"}', b"{}"])
def test_a_damaged_state_costs_only_the_comparison(copy, content):
    (copy / "checkpoints/000003/state.json").write_bytes(content)
    opened, line = warned(open_run, copy)
    assert opened.step == 3
    assert "state.json" in line


def test_when_no_checkpoint_is_whole_the_newest_is_named(copy, settings, commands):
    for step in (2, 3):
        (copy / f"checkpoints/00000{step}/generator.safetensors").write_bytes(b"x")
    for command in ("export", "train", "evaluate"):
        code, lines = commands(command, copy)
        assert code == 1 and len(lines) == 1 and "000003/generator.safetensors" in lines[0]


def test_an_optimiser_of_other_shapes_is_not_resumed(copy, settings, whole):
    place = "checkpoints/00000{}/optimizer.safetensors"
    shutil.copy(copy / "checkpoints/000003/generator.safetensors", copy / place.format(3))
    os.remove(copy / "checkpoints/000003/state.json")
    (copy / "checkpoints/000003/state.json").write_text('{"step": 3}')  # of an earlier version
    run, line = warned(run_training, copy, settings, resume=True, show=False)
    assert "is of another optimiser" in line and "the checkpoint of step 2 is used" in line
    assert torch.equal(weights(run), weights(whole))


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"\xff", "is not UTF-8"),
        (b"", "it is empty"),
        (b"null", "is null, not an object"),
        (DEEP, "nested more than 100 deep"),
        (b'{"prior": "mixture"}', "corpus is missing"),
    ],
)
def test_a_damaged_config_is_one_sentence(copy, commands, content, cause):
    (copy / "config.json").write_bytes(content)
    for command in ("export", "train", "evaluate"):
        code, lines = commands(command, copy)
        assert code == 1 and len(lines) == 1 and cause in lines[0] and "put it back" in lines[0]


# ---------------------------------------------------------------- one writer


def test_a_second_writer_is_refused_and_the_first_is_not_disturbed(settings, tmp_path, whole):
    refused = []

    def second(step, metrics):
        for resume in (False, True):
            with pytest.raises(UsageError, match=r"run is in use by another run \(process \d+ on "):
                run_training(tmp_path / "run", settings, resume=resume, show=False)
            refused.append(step)

    run_training(tmp_path / "run", settings, on_step=second, show=False)
    assert len(refused) == 2 * STEPS and not (tmp_path / "run/.lock").exists()
    metrics = (whole.folder / "metrics.jsonl").read_bytes()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    assert len(read_rows(tmp_path / "run/sessions.jsonl")) == 1


def test_threads_exclude_each_other_too(settings, tmp_path):
    errors = []

    def start():
        try:
            run_training(tmp_path / "run", settings, show=False)
        except UsageError as error:
            errors.append(str(error))

    both = [threading.Thread(target=start) for _ in range(2)]
    [thread.start() for thread in both]
    [thread.join() for thread in both]
    assert len(errors) == 1 and ("in use" in errors[0] or "not empty" in errors[0])
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [*range(STEPS)]


def test_a_run_that_died_before_its_first_checkpoint_is_in_nobodys_way(settings, tmp_path):
    def die(step, metrics):
        if step == 1:
            raise MemoryError

    for resume in (False, True):
        with pytest.raises((MemoryError, RunError, UsageError)):
            run_training(tmp_path / "run", settings, on_step=die, show=False)
        assert {"config.json", "metrics.jsonl"} <= {*os.listdir(tmp_path / "run")}
        other = replace(settings, seed=7, steps=1, checkpoint_every=1)
        run = run_training(tmp_path / "run", other, resume=resume, show=False)
        assert read_run_settings(run.folder).seed == 7
        assert [row["step"] for row in read_rows(run.folder / "metrics.jsonl")] == [0]
        shutil.rmtree(tmp_path / "run")
    with pytest.raises((MemoryError, RunError, UsageError)):
        run_training(tmp_path / "run", settings, on_step=die, show=False)
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        run_training(tmp_path / "run", replace(settings, seed=7), show=False)
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_a_run_opens_without_the_files_that_are_only_for_training(copy, whole):
    newest = max((copy / "checkpoints").glob("[0-9]*"))
    expected = weights(open_run(copy))
    (newest / "optimizer.safetensors").write_bytes(b"damaged")
    found, lines = warned(open_run, copy)
    assert torch.equal(weights(found), expected) and not lines
    (newest / "state.json").write_text('{"prior": "tiny-sd"}', encoding="utf-8")
    found, lines = warned(open_run, copy)
    assert torch.equal(weights(found), expected)
    assert "state.json has no step: the files beside it" in lines


# ---------------------------------------------------------------- moved and resumed


@posix
def test_a_run_is_moved_with_or_without_its_prior(settings, tmp_path, monkeypatch):
    (tmp_path / "a/models").mkdir(parents=True)
    shutil.copytree(TINY, tmp_path / "a/models/sd")
    (tmp_path / "a/link").symlink_to("models/sd")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    own = replace(settings, prior="models/sd/", steps=1)
    run = run_training("run", own, show=False)
    for prior in ("link", "models/sd", str(tmp_path / "a/link/")):
        run_training("run", replace(own, prior=prior), resume=True, show=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(weights(open_run("../a/run")), weights(run))
    (tmp_path / "a").rename(tmp_path / "b")  # together
    assert torch.equal(weights(open_run(tmp_path / "b/run")), weights(run))
    (tmp_path / "b/models/sd").rename(tmp_path / "sd")
    argv = ["export", str(tmp_path / "b/run"), "--resolution", "16", "--to", "x.ply", "--prompt"]
    # in processes of their own: checks of types open the prior in this one
    alone = lambda text: subprocess.run(
        [sys.executable, "-m", "scaledreamer", *argv, text], capture_output=True, text=True
    )
    assert alone("0000").returncode == 0  # its text is stored in the run
    other = alone("a green cone")
    assert other.returncode == 1
    assert other.stderr.endswith("a/link): give its folder as the prior (--prior)\n")
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.run_command([*argv, "a green cone", "--prior", str(tmp_path / "sd")]) == 0
    moved = replace(own, prior=str(tmp_path / "sd"))
    assert run_training(tmp_path / "b/run", moved, resume=True, show=False).step == 1
    with pytest.raises(UsageError, match="prior = .+, not mixture"):
        run_training(tmp_path / "b/run", replace(own, prior="mixture"), resume=True, show=False)


def test_a_run_is_resumed_with_other_logging_saving_and_device(copy, settings, whole):
    free = {"log_every": 2, "checkpoint_every": 1, "validate_every": 9, "device": "auto"}
    run = run_training(copy, replace(settings, **free), resume=True, show=False)
    assert run.step == STEPS and torch.equal(weights(run), weights(whole))
    assert [row["step"] for row in read_rows(copy / "metrics.jsonl")] == [0, 1, 2]
    assert read_run_settings(copy).checkpoint_every == 1


def test_more_steps_go_on_with_the_schedules_of_the_new_length(copy, settings, whole):
    longer = replace(settings, steps=STEPS + 2)
    run, line = warned(run_training, copy, longer, resume=True, show=False)
    assert run.step == STEPS + 2 and f"goes on with {STEPS + 2} steps, not {STEPS}" in line
    rates = [row["lr"] for row in read_rows(copy / "metrics.jsonl")]
    assert rates[3:] == [settings.optim.lr_at(step, STEPS + 2) for step in range(3, STEPS + 2)]
    assert [row["steps"] for row in read_rows(copy / "sessions.jsonl")] == [STEPS, STEPS + 2]
    with pytest.raises(UsageError, match=f"has done {STEPS + 2} steps already, and steps is 4"):
        run_training(copy, settings, resume=True, show=False)


def test_all_that_differs_is_said(copy, settings):
    other = replace(settings, seed=1, method="sds", resolution=9)
    sentence = "method = asd, not sds; seed = 0, not 1; resolution = 8, not 9: go on with the same"
    with pytest.raises(UsageError, match=sentence):
        run_training(copy, other, resume=True, show=False)


# ---------------------------------------------------------------- signals and kills


@posix
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, getattr(signal, "SIGUSR1", None)]
)
def test_a_signal_to_end_finishes_the_step_and_saves_it(settings, tmp_path, whole, number):
    def send(step, metrics):
        if step == 0:
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_training(tmp_path / "run", settings, on_step=send, show=False)
    assert signal.getsignal(number) == before and interrupt_code(stopped.value) == 128 + number
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [1]
    run = run_training(tmp_path / "run", settings, resume=True, show=False)
    assert torch.equal(weights(run), weights(whole))


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from scaledreamer.core.settings import from_json
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training
settings, folder, kills = from_json(TrainSettings, sys.argv[1]), sys.argv[2], int(sys.argv[3])
rng, codes = random.Random(0), []
for i in range(kills + 1):
    child = os.fork()
    if not child:
        run_training(folder, settings, resume=True, show=False)
        os._exit(0)
    end = time.monotonic() + (rng.uniform(0.05, 1.5) if i < kills else 120)
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        done = os.waitpid(child, 0)
    codes.append(os.waitstatus_to_exitcode(done[1]))
print(codes)
"""


@posix
def test_kills_at_random_instants_lose_nothing(settings, tmp_path, whole):
    from scaledreamer.core.settings import to_json

    argv = [to_json(settings), str(tmp_path / "run"), os.environ.get("RUN_FOLDER_KILLS", "4")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *argv], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith(" 0]"), done.stderr
    assert torch.equal(weights(open_run(tmp_path / "run")), weights(whole))
    metrics = (whole.folder / "metrics.jsonl").read_bytes()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    assert not [path for path in (tmp_path / "run").rglob("*damaged*")]


def test_the_cost_of_training_leaves_out_damaged_sessions(tmp_path):
    log = tmp_path / "sessions.jsonl"
    log.write_text(
        '{"seconds": 2, "peak_memory_gb": null}\nnull\n{"seconds": "x"}\n{"seconds": 1}\n'
    )
    cost, line = warned(training_cost, log)
    assert cost == {"train_seconds": 3, "peak_memory_gb": None} and "damaged in 2 lines" in line
