"""Trainings that are killed, lose power or find the disk full at any instant go on to the same end.

`KILLS=100` kills as many trainings as that; by default 4. `KILLS_SEED=1` chooses other instants."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import two_prompts

from scaledreamer.core.settings import to_json
from scaledreamer.training.checkpoints import checkpoint_steps
from scaledreamer.training.kept_checkpoints import best_checkpoint
from scaledreamer.training.run_logs import read_rows
from scaledreamer.training.save_settings import SaveSettings
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import open_run, run_training

posix = pytest.mark.skipif(os.name != "posix", reason="processes and signals of POSIX")
STEPS = 5


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return two_prompts(
        tmp_path_factory.mktemp("corpus"),
        steps=STEPS,
        validate_every=3,
        checkpoint_every=1,
        save=SaveSettings(keep_checkpoints=2),
    )


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    return run_training(tmp_path_factory.mktemp("whole") / "run", settings, show=False)


LASTING = ("metrics.jsonl", "renders.jsonl", "config.json", "prompts.jsonl")


def lasting(folder):
    "The content of what a training leaves, without its sessions: logs, checkpoints, pictures."
    names = [*LASTING, *sorted(os.listdir(folder / "checkpoints"))]
    checkpoints = sorted((folder / "checkpoints").rglob("*.*"))
    pictures = sorted((folder / "validation").glob("*"))
    files = [folder / name for name in LASTING] + checkpoints + pictures
    return names, {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---------------------------------------------------------------- kills

KILLED = """
import collections, json, os, random, shutil, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from scaledreamer.commands import evaluate
from scaledreamer.core.settings import from_json
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training

# metrics take seconds and write nothing; views, meshes and the report are written
evaluate.evaluate_scenes = lambda *_, **__: {"sim": 0.5, "per_prompt": []}
settings, home = from_json(TrainSettings, sys.argv[1]), Path(sys.argv[2])
kills, rng = int(sys.argv[3]), random.Random(int(sys.argv[4]))
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
NEW = {"sessions.jsonl", "eval.json", "report.html"}  # with times of this run
UNLIKE = {"train_seconds", "peak_memory_gb", "machine"}

def train(folder, at, where):
    "In a child: train and evaluate; at file event `at`, note it and die."
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event not in EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        name = os.fspath(arguments[0])
        if not name.startswith(str(folder)) and (os.path.isabs(name) or event == "open"):
            return
        if count == at:
            os.write(where, f"{event} {os.path.relpath(name, folder)}".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    try:
        sys.addaudithook(hook)
        run = run_training(folder, settings, resume=True, show=False)
        evaluate.evaluate_run(run, None, views=1)
        os.write(where, str(count).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(9)

def attempt(folder, at=None, seconds=300):
    "Whether a child came to its end, and what it wrote: its number of events, or the last one."
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        train(folder, at, writing)
    os.close(writing)
    end, done = time.monotonic() + seconds, (0, 0)
    while done == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
        else:
            time.sleep(0.002)
            done = os.waitpid(child, os.WNOHANG)
    code, said = os.waitstatus_to_exitcode(done[1]), os.read(reading, 1000).decode()
    os.close(reading)
    assert code in (0, -signal.SIGKILL), code
    return code == 0, said

def result(folder):
    evaluation = json.loads((folder / "eval.json").read_text())
    found = {"eval": {k: v for k, v in evaluation.items() if k not in UNLIKE}}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = path.name.startswith(".")  # temporary files, deleted when they are a minute old
        if path.is_file() and not hidden and name not in NEW:
            found[name] = path.read_bytes()
    return found

began = time.monotonic()
finished, events = attempt(home / "whole")
lasts, events, expected = time.monotonic() - began, int(events), result(home / "whole")
assert finished
made, runs, places, folder = 0, 0, collections.Counter(), home / "run"
while made < kills or folder.exists():
    by_event = rng.random() < 0.5
    how = {"at": rng.randrange(events)} if by_event else {"seconds": rng.uniform(0, 1.1 * lasts)}
    finished, said = attempt(folder, **(how if made < kills else {}))
    made += not finished
    if not finished and by_event:
        places[said.split("/")[0]] += 1
    if finished:
        found, runs = result(folder), runs + 1
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        unlike = [name for name in found if found[name] != expected[name]]
        assert not unlike, unlike
        shutil.rmtree(folder)
print(json.dumps({"kills": made, "runs": runs, "events": events, "seconds": lasts, "at": places}))
"""


@posix
def test_killed_at_random_instants_a_run_ends_with_the_same_bits(settings, tmp_path):
    """Kills while it trains, writes or deletes a checkpoint, draws a picture, is evaluated: half of
    them at a random instant, half before a random operation on a file of the run."""
    kills, seed = os.environ.get("KILLS", "4"), os.environ.get("KILLS_SEED", "0")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            KILLED,
            to_json(settings),
            str(tmp_path),
            kills,
            seed,
        ],
        capture_output=True,
        text=True,
        timeout=60 + 30 * int(kills),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["kills"] == int(kills) and found["runs"] >= 1


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)])
def test_a_batch_system_gets_a_checkpoint_within_ten_seconds(settings, tmp_path, number):
    "And may send its signal more than once; the exit code says that it was the signal."
    own = replace(settings, steps=10**6, checkpoint_every=10**6, validate_every=10**6)
    folder, config = tmp_path / "run", tmp_path / "settings.json"
    config.write_text(to_json(own))
    script = (
        "import sys; from scaledreamer.core.interrupts import *; import signal\n"
        "from scaledreamer.core.settings import from_json\n"
        "from scaledreamer.training.train_settings import TrainSettings\n"
        "from scaledreamer.training.trainer import run_training\n"
        "settings = from_json(TrainSettings, open(sys.argv[1]).read())\n"
        "try:\n    run_training(sys.argv[2], settings, show=False)\n"
        "except KeyboardInterrupt as stop:\n    sys.exit(interrupt_code(stop))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(config), str(folder)])
    end = time.monotonic() + 120
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    began = time.monotonic()
    for _ in range(3):
        process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert time.monotonic() - began < 10
    (step,) = checkpoint_steps(folder / "checkpoints")
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["step"] == step - 1 and read_rows(folder / "sessions.jsonl")[-1]["last"] == step


# ---------------------------------------------------------------- power failures


def test_after_a_power_failure_the_run_ends_with_the_same_bits(
    settings, whole, tmp_path, monkeypatch
):
    """A disk keeps only what was synchronised: of every other file the name, without its content.

    The folder is copied in this state at each renaming, just before and after it."""
    synced, states, folder = {}, [], tmp_path / "run"
    sync, rename = os.fsync, os.replace

    def fsync(descriptor):
        sync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def lose_power():
        copy = shutil.copytree(folder, tmp_path / f"state{len(states)}")
        for path in copy.rglob("*"):
            if path.is_file():
                os.truncate(path, synced.get((folder / path.relative_to(copy)).stat().st_ino, 0))
        states.append(copy)

    def replace_(source, destination, **options):
        if folder in Path(destination).parents:
            lose_power()
        rename(source, destination, **options)
        if folder in Path(destination).parents:
            lose_power()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_)
    monkeypatch.setattr(Path, "replace", lambda self, to: replace_(self, to))
    run_training(folder, settings, show=False)
    monkeypatch.undo()
    kept = [max(checkpoint_steps(state / "checkpoints"), default=0) for state in states]
    assert sorted(kept) == kept and {*kept} == {*range(STEPS + 1)}
    rng = random.Random(0)
    chosen = [
        rng.choice([i for i, step in enumerate(kept) if step == wanted]) for wanted in (1, 3, 5)
    ]
    for i in [0, *chosen]:
        run_training(states[i], settings, resume=True, show=False)
        (names, found), (expected, files) = lasting(states[i]), lasting(whole.folder)
        unlike = [
            name for name in found.keys() | files.keys() if found.get(name) != files.get(name)
        ]
        assert not unlike and names == expected, (states[i].name, unlike)


# ---------------------------------------------------------------- a disk that fails

FAILING = """
import errno, json, os, sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
from scaledreamer.core.settings import RunError, UsageError, from_json
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training

settings, home = from_json(TrainSettings, sys.argv[1]), Path(sys.argv[2])
fails, count, folder = None, 0, home
def hook(event, arguments):
    "The operations that change a file or folder of the run; number `fails` fails."
    global count
    if event not in ("open", "os.rename", "os.mkdir") or not isinstance(arguments[0], (str, Path)):
        return
    if not str(arguments[0]).startswith(str(folder)):
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    count += 1
    if count - 1 == fails:
        number = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO)[count % 5]
        raise OSError(number, os.strerror(number), str(arguments[0]))
sys.addaudithook(hook)
run_training(home / "whole", settings, show=False)
total, said = count, {}
every = max(1, total // int(sys.argv[3]))
for fails in range(0, total, every):
    count, folder = 0, home / f"run{fails}"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_training(folder, settings, show=False)
        said[fails] = str(caught[0].message) if caught else ""
    except (RunError, UsageError) as error:
        said[fails] = str(error)
    fails = None
    run_training(folder, settings, resume=True, show=False)
    last = f"checkpoints/00000{settings.steps}/state.json"  # which has the checksums
    assert (folder / last).read_bytes() == (home / "whole" / last).read_bytes()
    for name in ("metrics.jsonl", "renders.jsonl"):
        assert (folder / name).read_bytes() == (home / "whole" / name).read_bytes(), (fails, name)
print(json.dumps(said))
"""


def test_each_operation_on_a_file_may_fail_once(settings, tmp_path):
    "One sentence that says what to do, nothing lost, and the same end when the disk works again."
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", FAILING, to_json(settings), str(tmp_path)),
            os.environ.get("KILLS", "4"),
        ],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    print(*said.items(), sep="\n")
    for sentence in said.values():
        assert "\n" not in sentence and "Errno" not in sentence
        assert not sentence or ": " in sentence or "(" in sentence


# ---------------------------------------------------------------- what a step depends on


@pytest.mark.parametrize("change", [{}, {"prior": "tiny-sd", "method": "vsd", "steps": 3}])
def test_no_state_of_global_random_generators_is_used(settings, tmp_path, change):
    "So none has to be saved: only step, weights, optimisers, estimator and the count of skips."
    own = replace(settings, **change)
    first = run_training(tmp_path / "first", own, show=False)
    states = []

    global_state = lambda: (torch.get_rng_state().tolist(), repr(np.random.get_state()))

    def disturb(step, metrics):
        assert not step or global_state() == states[-1]
        torch.manual_seed(step + 7)
        np.random.seed(step + 7)
        random.seed(step + 7)
        states.append(global_state())

    run_training(tmp_path / "second", own, on_step=disturb, show=False)
    assert lasting(tmp_path / "first") == lasting(tmp_path / "second")
    assert first.step == own.steps


# ---------------------------------------------------------------- which checkpoints are kept


def test_the_newest_checkpoints_and_the_best_are_kept(settings, tmp_path, monkeypatch):
    gains = iter([0.1, 0.9, 0.3, 0.2, 0.4])
    monkeypatch.setattr("scaledreamer.training.trainer.text_gain", lambda run: next(gains))
    best = replace(settings, save=SaveSettings(keep_checkpoints=2, keep_best=True))
    run_training(tmp_path / "run", best, show=False)
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [2, 4, 5]
    assert best_checkpoint(tmp_path / "run/checkpoints") == 2
    assert open_run(tmp_path / "run", step=2).step == 2 and open_run(tmp_path / "run").step == 5


def test_the_score_changes_no_bit_and_is_that_of_the_weights(settings, whole, tmp_path):
    best = replace(settings, save=SaveSettings(keep_checkpoints=2, keep_best=True))
    run_training(tmp_path / "run", best, show=False)
    names = ("metrics.jsonl", f"checkpoints/00000{STEPS}/generator.safetensors")
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (whole.folder / name).read_bytes()


def test_all_checkpoints_are_kept_when_asked_for(settings, tmp_path):
    run_training(tmp_path / "run", replace(settings, save=SaveSettings(None)), show=False)
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [1, 2, 3, 4, 5]
    assert TrainSettings().steps // TrainSettings().checkpoint_every < 10  # the default keeps all


def test_leftovers_of_a_kill_are_deleted_when_the_run_goes_on(settings, whole, tmp_path):
    run = shutil.copytree(whole.folder, tmp_path / "run")
    for name in (".000002", ".000005"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "generator.safetensors").write_bytes(b"x")
    run_training(run, replace(settings, steps=STEPS), resume=True, show=False)
    assert sorted(os.listdir(run / "checkpoints")) == ["000004", "000005"]
