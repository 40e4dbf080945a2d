"""Training jobs: controls, interrupts, two at once, and no change of the process's global state."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from browser import cells as cells_of

import scaledreamer as sd
from scaledreamer.core.settings import RunError, UsageError, to_json
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.training.checkpoints import checkpoint_steps
from scaledreamer.training.job import live_job
from scaledreamer.training.run_logs import read_rows
from scaledreamer.training.trainer import open_run, run_training
from scaledreamer.widgets.jobs import train

CAR = sd.TrainSettings(
    prior="mixture",
    prompt=("a red car",),
    generator="ingp",
    prompts_per_step=1,
    resolution=16,
    steps=6,
    log_every=1,
    distill=DistillSettings(view_prompting="words"),
)
BALL = replace(CAR, prompt=("a blue ball",), generator="hyper-ingp", seed=3)
LONG = replace(CAR, steps=100_000)


def weights(run) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in run.generator.parameters()])


def metrics(folder) -> str:
    return (folder / "metrics.jsonl").read_text()


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The runs of the blocking call."
    home = tmp_path_factory.mktemp("alone")
    return [run_training(home / s.generator, s, show=False) for s in (CAR, BALL)]


def test_two_jobs_at_once_are_those_of_the_blocking_call(alone, tmp_path, threads):
    threads(1)
    jobs = [train(tmp_path / s.generator, s) for s in (CAR, BALL)]
    draws = threading.Event()

    def disturb():  # the reader's own cells: renders, seeds and random numbers
        while not draws.is_set():
            torch.manual_seed(0)
            torch.rand(10)
            for job in jobs:
                job.submit(lambda run: run.scene(list(run.settings.prompt)).colors).exception(60)

    reader = threading.Thread(target=disturb)
    reader.start()
    together = [job.wait(show=False) for job in jobs]
    draws.set()
    reader.join()
    for job, ours, run in zip(jobs, together, alone):
        assert metrics(ours.folder) == metrics(run.folder)
        assert torch.equal(weights(ours), weights(run))
        assert job.rows == read_rows(run.folder / "metrics.jsonl")
        assert {"gradient_norm_low", "gradient_norm", "gradient_norm_high"} <= set(job.rows[0])


def test_pause_holds_resume_goes_on_and_stop_answers_within_two_steps(tmp_path):
    job = train(tmp_path / "run", LONG)
    assert job.status == "starting" and job.run is None and job.step == 0
    job.submit(lambda run: None).result(60)
    assert job.eta is None or job.eta > 0
    job.pause()
    paused_after = job.step
    until(lambda: job.status == "paused")
    step = job.step
    assert step <= paused_after + 2 and checkpoint_steps(tmp_path / "run/checkpoints") == [step]
    assert job.message == f"paused; step {step} is saved"
    before = job.submit(weights).result(60)
    time.sleep(0.3)
    assert job.step == step and torch.equal(before, job.submit(weights).result(60))

    job.snapshot()
    until(lambda: "picture" in job.message)
    assert (tmp_path / f"run/validation/{step:06d}.png").exists()
    assert job.status == "paused" and job.step == step
    job.resume()
    until(lambda: job.step > step + 3)
    assert job.status == "training" and job.rate > 0 and job.eta > 0
    step = job.step
    job.stop()
    assert job.status == "stopping"
    run = job.wait(show=False)
    assert run.step <= step + 2 and job.status == "stopped"
    assert checkpoint_steps(tmp_path / "run/checkpoints")[-1] == run.step
    assert job.message.startswith(f"stopped at step {run.step} of 100000, which is saved in ")
    assert len(job.rows) == run.step == len(read_rows(tmp_path / "run/metrics.jsonl"))
    assert torch.equal(weights(open_run(tmp_path / "run")), job.submit(weights).result(60))


def test_stop_and_snapshot_during_a_pause_or_the_start(tmp_path):
    job = train(tmp_path / "run", LONG)
    job.stop()  # while it starts
    assert job.wait(show=False).step <= 2
    again = train(tmp_path / "run", LONG)
    again.pause()
    until(lambda: again.status == "paused")
    again.stop()
    assert again.wait(show=False).step <= 4 and again.status == "stopped"
    for control in (again.pause, again.resume, again.snapshot, again.stop):
        control()  # of a job that has ended
    assert again.status == "stopped" and again.run is again.wait()


def test_the_cell_again(tmp_path, alone):
    first = train(tmp_path / "run", CAR)
    first.pause()
    assert train(tmp_path / "run", CAR) is first is live_job(tmp_path / "run/../run")
    with pytest.raises(UsageError, match="run is in training here with other settings"):
        train(tmp_path / "run", BALL)
    first.stop()
    second = train(str(tmp_path / "run"), CAR)
    assert second is not first and first.status == "stopped"
    assert torch.equal(weights(second.wait(show=False)), weights(alone[0]))
    assert metrics(tmp_path / "run") == metrics(alone[0].folder)
    third = train(tmp_path / "run", CAR)
    assert third.wait(show=False).step == CAR.steps == third.step and third.status == "finished"
    assert third.rows == second.rows and live_job(tmp_path / "run") is None
    with pytest.raises(UsageError, match="started with seed = 0, not 4: go on with the same"):
        train(tmp_path / "run", replace(CAR, seed=4))
    with pytest.warns(UserWarning, match="goes on with 8 steps, not 6"):
        assert train(tmp_path / "run", replace(CAR, steps=8)).wait(show=False).step == 8
    with pytest.raises(UsageError, match="is no folder: give a folder"):
        train(tmp_path / "run/config.json", CAR)


def test_await_and_waiting_no_longer_than_is_said(tmp_path):
    job = train(tmp_path / "run", CAR)

    async def cells():
        ticks = 0
        waiting = asyncio.ensure_future(awaited(job))
        while not waiting.done():
            ticks += 1
            await asyncio.sleep(0.01)
        return ticks, waiting.result()

    async def awaited(job):
        return await job

    with ThreadPoolExecutor(1) as thread:  # in this one playwright's event loop may run
        ticks, run = thread.submit(asyncio.run, cells()).result()
    assert run is job.run and run.step == CAR.steps and ticks > 3  # other tasks ran meanwhile
    long = train(tmp_path / "long", LONG)
    with pytest.raises(TimeoutError, match="is not done after 0.2 s, and goes on"):
        long.wait(timeout=0.2)
    long.stop()
    long.wait(show=False)


def test_a_job_that_fails_says_why(tmp_path):
    job = train(tmp_path / "none", replace(CAR, prior="no-such"))
    with pytest.raises(UsageError, match="no prior 'no-such'") as raised:
        job.wait(show=False)
    assert job.error is raised.value and job.message == str(raised.value)
    assert job.status == "failed" and job.run is None and not (tmp_path / "none").exists()
    with pytest.raises(RunError, match="has not started"):
        job.submit(weights).result(60)

    own = replace(LONG, generator="mine")
    job = train(tmp_path / "raises", own, make_generator=lambda width: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.wait(show=False)
    assert (job.status, job.message) == ("failed", "division by zero")

    job = train(tmp_path / "function", CAR)
    with pytest.raises(KeyError):  # only the function fails
        job.submit(lambda run: {}["no"]).result(60)
    assert job.wait(show=False).step == CAR.steps


def test_a_deleted_folder_and_a_full_disk(tmp_path, monkeypatch):
    job = train(tmp_path / "deleted", LONG)
    job.submit(lambda run: shutil.rmtree(run.folder)).result(60)
    with pytest.raises(RunError, match="deleted was deleted during the training: start anew"):
        job.wait(show=False)
    assert job.status == "failed" and not (tmp_path / "deleted").exists()
    assert train(tmp_path / "deleted", CAR).wait(show=False).step == CAR.steps

    full = OSError(28, "No space left on device")

    def no_space(*arguments):
        raise full

    job = train(tmp_path / "full", LONG)
    job.submit(lambda run: None).result(60)
    with monkeypatch.context() as patch:
        patch.setattr("scaledreamer.training.checkpoints.save_file", no_space)
        job.pause()
        until(lambda: job.status == "paused")
        assert "could not be written" in job.message and "free some space" in job.message
        job.snapshot()
        until(lambda: not job.wants_snapshot and "could not be" in job.message)
    job.resume()
    job.stop()  # there is space again
    assert job.wait(show=False).step == checkpoint_steps(tmp_path / "full/checkpoints")[-1]


SCRIPT = """
import sys, threading, time
import scaledreamer as sd
from scaledreamer.core.settings import from_json
job = sd.train(sys.argv[2], from_json(sd.TrainSettings, sys.argv[1]))
job.submit(lambda run: None).result()
print("trains", flush=True)
"""


def script(end: str, settings, folder) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT + end, to_json(settings), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TQDM_DISABLE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, env=environment, **pipes)
    assert started.stdout.readline() == "trains\n", started.communicate()
    return started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_script_that_waits_saves_and_interrupts(tmp_path, number):
    waiting = script("job.wait()", LONG, tmp_path / "run")
    time.sleep(0.3)
    waiting.send_signal(number)
    printed, failed = waiting.communicate(timeout=60)
    assert failed.startswith("stopped at step ") and failed.endswith("KeyboardInterrupt\n")
    (step,) = checkpoint_steps(tmp_path / "run/checkpoints")
    assert f"stopped at step {step} of 100000, which is saved in " in failed


def test_the_end_of_a_script_saves_its_jobs_with_a_line_each(tmp_path):
    ending = script("time.sleep(0.3)", LONG, tmp_path / "run")
    printed, line = ending.communicate(timeout=60)
    assert ending.returncode == 0
    (step,) = checkpoint_steps(tmp_path / "run/checkpoints")
    assert line == (
        f"scaledreamer: stopped at step {step} of 100000, which is saved in {tmp_path}/run\n"
    )
    done = script("job.wait(show=False)", CAR, tmp_path / "done")
    assert done.communicate(timeout=60) == ("", "")  # it had ended


BUSY = "import time\nprint('works', flush=True)\ntime.sleep(600)"
FIRST = (
    "import torch\nimport scaledreamer as sd\nfrom scaledreamer.training import run_logs\n"
    "from scaledreamer import train\nassert train is sd.train\n"
    "sd.curves([0, 1], {'ours': [1, 2]})"
)
THEIRS = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nNone"
STARTS = (
    "from scaledreamer.core.settings import from_json\n"
    "settings = from_json(sd.TrainSettings, {settings!r})\n"
    "job = sd.train('interrupted', settings)\njob"
)


def output(page, index: int) -> str:
    "The outputs of a cell, as JSON."
    return json.dumps(cells_of(page)[index]["outputs"])


def start(page, index: int) -> None:
    "Run a cell without waiting for it."
    page.evaluate(
        "i => { const lab = window.jupyterapp;"
        " lab.shell.currentWidget.content.activeCellIndex = i;"
        " lab.commands.execute('notebook:run-cell'); }",
        index,
    )


def shows(page, index: int, text: str) -> None:
    end = time.monotonic() + 60
    while text not in output(page, index):
        assert time.monotonic() < end, f"cell {index} has no {text!r}: {output(page, index)}"
        page.wait_for_timeout(100)


def test_a_notebook_trains_is_interrupted_and_goes_on(browser, lab, tmp_path):
    starts = STARTS.format(settings=to_json(LONG))
    waits = ("job.wait(show=False).step", "run = await job\nrun.step", "job.status")
    cells = [FIRST, THEIRS, starts, *waits, BUSY]
    with lab.notebook(browser, tmp_path, cells, run=False) as page:
        page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
        for index in (0, 1):
            start(page, index)
            shows(page, index, "image/png")  # our figure, and then the reader's own
        for waiting in (3, 4):
            start(page, 2)
            shows(page, 2, "widget-view")  # the dashboard
            start(page, 5)
            shows(page, 5, "ing'")  # starting or training
            start(page, waiting)
            page.wait_for_timeout(1500)
            page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
            shows(page, waiting, "stopped at step ")
            start(page, 5)
            shows(page, 5, "stopped")
            assert '"error"' not in output(page, waiting) + output(page, 2)
            page.screenshot(path=tmp_path / f"interrupted_{waiting}.png")
        steps = checkpoint_steps(lab.home / "interrupted/checkpoints")
        assert len(steps) == 2
        start(page, 2)  # goes on; then another cell is interrupted, which the job does not notice
        start(page, 6)
        shows(page, 6, "works")
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
        shows(page, 6, "KeyboardInterrupt")
        page.wait_for_timeout(1000)  # the kernel drops what it is sent right after an error
        start(page, 5)
        shows(page, 5, "training")
        page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        folder = lab.home / "interrupted/checkpoints"
        until(lambda: any(step % 500 for step in checkpoint_steps(folder)[2:]))  # not a regular one
