"""The dashboard of a training run: what it reads of jobs and folders, and in a real JupyterLab."""

import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CURRENT

from scaledreamer.core.files import json_lines, write_json_atomic
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.training.checkpoints import checkpoint_steps
from scaledreamer.training.job import TrainingJob
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training
from scaledreamer.widgets.dashboard import Dashboard, watch
from scaledreamer.widgets.folder_source import FolderSource
from scaledreamer.widgets.run_source import JobSource

ROOT = Path(__file__).resolve().parent.parent
TINY = TrainSettings(
    prior="mixture",
    prompt=("a red car", "a blue cube"),
    generator="ingp",
    prompts_per_step=1,
    resolution=16,
    steps=8,
    log_every=2,
    checkpoint_every=4,
    distill=DistillSettings(view_prompting="words"),
)
PROGRAM = f"""
import sys
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training
settings = TrainSettings(prior="mixture", prompt={TINY.prompt}, generator="ingp",
    prompts_per_step=1, resolution=16, steps=100_000, log_every=2, checkpoint_every=10,
    distill=DistillSettings(view_prompting="words"))
run_training(sys.argv[1], settings, show=False)
"""


def until(true, seconds=90):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A finished run of eight steps."
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    run_training(folder, TINY, show=False)
    return folder


@contextmanager
def shown(source):
    board = Dashboard(source)
    try:
        yield board
    finally:
        board.close()
        until(lambda: board._thread is None)


def test_a_run_of_another_process_is_followed_until_it_is_killed(tmp_path):
    folder = tmp_path / "run"
    with shown(FolderSource(folder)) as board:
        head = lambda: board.panel.head
        assert head()["status"] == "waiting" and "is not there yet" in head()["message"]
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, folder], cwd=ROOT)
        try:
            until(lambda: head()["status"] == "training" and board.state.rate)
            assert head()["actions"] == [] and f"process {process.pid} on" in head()["locked"]
            assert head()["message"] == head()["locked"]
            until(lambda: board.state.memory or sys.platform != "linux")
            until(lambda: all(board.panel.learnt))  # of the first checkpoint
            before = head()["step"]
            until(lambda: head()["step"] > before)
        finally:
            process.kill()
            process.wait()
        until(lambda: head()["status"] == "stopped")
        saved = checkpoint_steps(folder / "checkpoints")[-1]
        assert head()["step"] == saved and f"go on from step {saved}" in head()["message"]
        shutil.rmtree(folder)
        until(lambda: head()["status"] == "gone")
        assert head()["step"] == saved and "no longer there" in head()["message"]
        assert not head()["can_inspect"] and "Click a step" not in head()["note"]


def test_a_finished_run_is_as_it_was_logged_and_the_thread_ends(finished):
    write_json_atomic(finished / "eval.json", {"step": 8, "volume_iou": 0.5, "per_prompt": []})
    (finished / "report.html").write_text("")
    board = watch(finished)
    until(lambda: board._thread is None)
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert list(board.state.rows) == logged and board.panel.head["status"] == "finished"
    assert [caption["step"] for caption in board.panel.captions] == [8, 8]
    assert board.panel.head["results"] == {"evaluated at step": "8", "volume IoU": "0.500"}
    assert "run/report.html" in board.links.outputs[0]["data"]["text/html"]
    assert "dashboard" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.filterwarnings("ignore:.*its checksum differs")
def test_what_is_damaged_is_said_and_the_rest_is_shown(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write("{]\n")
    (folder / "eval.json").write_text("{")
    newest = folder / "checkpoints/000008/generator.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    source = FolderSource(folder)
    source.view = range(2)
    until(lambda: len(source.read().pictures) == 2)
    state = source.read()
    assert "damaged in 1 lines" in state.message and len(state.rows) == 4 and not state.results
    assert {picture.step for picture in state.pictures.values()} == {4}  # the one before
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in source.read().message


@pytest.mark.alone
def test_a_large_run_stays_small(finished, tmp_path):
    "100,000 prompts and 50,000 logged steps: the page gets one page of prompts, 500 points."
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished / "config.json", folder)
    prompts = [{"id": f"{i:06d}", "text": f"text {i}", "split": "train"} for i in range(100_000)]
    (folder / "prompts.jsonl").write_text(json_lines(prompts))
    rows = [{"step": step, "gradient_norm": 1.0, "opacity": 0.5} for step in range(50_000)]
    (folder / "metrics.jsonl").write_text(json_lines(rows))
    board = Dashboard(FolderSource(folder))
    board.panel.page = 6000
    took = []
    for _ in range(10):
        start = time.perf_counter()
        board.refresh()
        took.append(time.perf_counter() - start)
    board.close()
    assert statistics.median(took) < 0.1, took
    assert [caption["text"] for caption in board.panel.captions][0] == "text 96000"
    assert len(board.panel.captions) == 16 and len(board.panel.curves) < 15_000
    assert len(json.dumps(board.panel.head)) < 2_000


@pytest.mark.alone
def test_dashboards_of_two_jobs_and_at_most_four_updates_a_second(tmp_path):
    jobs = [TrainingJob(tmp_path / name, replace(TINY, steps=100_000)) for name in "ab"]
    boards = [Dashboard(JobSource(job)) for job in (*jobs, jobs[0])]
    until(lambda: all(board.panel.head["step"] > 4 for board in boards))
    updates = []
    boards[0].panel.observe(lambda change: updates.append(time.monotonic()), "head")
    start = time.monotonic()
    until(lambda: time.monotonic() > start + 2)
    assert 1 <= len(updates) <= 4 * (time.monotonic() - start) + 1
    boards[0].panel._handle_custom_msg({"action": "snapshot"}, [])
    until(lambda: "is saved in checkpoints/" in boards[0].panel.head["message"])
    place = boards[0].panel.head["message"].rpartition(" ")[2]
    assert (tmp_path / "a" / place).is_file() and place.startswith("validation/")
    boards[0].panel._handle_custom_msg({"action": "stop"}, [])
    until(lambda: boards[0]._thread is None and boards[2]._thread is None)
    assert [board.panel.head["status"] for board in boards] == ["stopped", "training", "stopped"]
    assert boards[0].panel.learnt == boards[2].panel.learnt  # one render for both
    jobs[1].stop()
    jobs[1].wait(show=False)
    until(lambda: boards[1]._thread is None)


def test_an_error_is_a_sentence_on_the_page_and_it_goes_on(tmp_path):
    job = TrainingJob(tmp_path / "run", replace(TINY, method="xyz"))
    board = Dashboard(JobSource(job))
    until(lambda: board._thread is None)
    assert board.panel.head["status"] == "failed" and "xyz" in board.panel.head["message"]
    with shown(FolderSource(tmp_path / "none")) as board:
        read = board.source.read
        board.source.read = lambda: 1 / 0
        until(lambda: board.panel.head["message"] == "ZeroDivisionError: division by zero")
        board.source.read = read
        until(lambda: "is not there yet" in board.panel.head["message"])


# in JupyterLab


TRAIN = """
import ipywidgets as widgets
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.training.job import TrainingJob
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.widgets.dashboard import Dashboard, watch
from scaledreamer.widgets.run_source import JobSource

settings = TrainSettings(prior="mixture", prompt=("a red car", "a blue cube", "a green tree"),
    generator="ingp", prompts_per_step=2, resolution=32, steps=100_000, log_every=2,
    distill=DistillSettings(view_prompting="words"))
job = TrainingJob("car", settings)
board = Dashboard(JobSource(job))
board
"""
SLIDER = """
slider, label = widgets.IntSlider(max=1000), widgets.Label("at 0")
slider.observe(lambda change: setattr(label, "value", f"at {change['new']}"), "value")
widgets.VBox([slider, label])
"""
BOARD = ".scaledreamer-dashboard"


def execute(page, code: str) -> str:
    "Run code in the kernel of the notebook in the page; returns what it prints."
    return page.evaluate(
        f"""async code => {{
        const kernel = {CURRENT}.sessionContext.session.kernel, texts = [];
        const future = kernel.requestExecute({{ code }});
        future.onIOPub = ({{ content }}) => texts.push(content.text ?? content.evalue ?? '');
        await future.done;
        return texts.join('');
        }}""",
        code,
    )


def status_is(page, text: str) -> None:
    page.wait_for_function(
        "([board, text]) => [...document.querySelectorAll(`${board} .status`)]"
        ".every(status => status.textContent === text)",
        arg=[BOARD, text],
    )


def slider_times(page, moves: int) -> list[float]:
    "Milliseconds from each key press on the slider until the label shows the kernel's answer."
    page.locator(".noUi-handle").focus()
    times = []
    for value in range(1, moves + 1):
        start = time.perf_counter()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "text => [...document.querySelectorAll('.widget-label')]"
            ".some(label => label.textContent === text)",
            arg=f"at {value}",
            polling=10,
        )
        times.append(1000 * (time.perf_counter() - start))
    return times


def share_of_speed(page, seconds: float = 2.0, turns: int = 3) -> tuple[float, float]:
    """The speed of training with the dashboard in parts of that without, in turns: of steps per
    second of the kernel's processor time, and of steps per second, which other programs disturb."""
    read = "import time; print(job.step, time.process_time(), time.monotonic())"
    sums = {True: [0.0] * 3, False: [0.0] * 3}  # of steps and both times
    for _ in range(turns):
        for followed in (False, True):
            execute(page, "del board.refresh" if followed else "board.refresh = lambda: True")
            page.wait_for_timeout(500)
            before = [float(text) for text in execute(page, read).split()]
            page.wait_for_timeout(1000 * seconds)
            after = [float(text) for text in execute(page, read).split()]
            sums[followed] = [x + b - a for x, a, b in zip(sums[followed], before, after)]
    rate = lambda i: (sums[True][0] / sums[True][i]) / (sums[False][0] / sums[False][i])
    return rate(1), rate(2)


def test_a_job_in_jupyterlab(browser, lab, tmp_path):
    "Watch, move a slider, pause, reload, resume, look at a step, stop; then without a kernel."
    with lab.notebook(browser, tmp_path, [TRAIN, SLIDER, "board", "watch('nothing')"]) as page:
        pictures = f"document.querySelectorAll('{BOARD} .tile img').length >= 12"  # of two views
        page.wait_for_function(pictures)
        times = slider_times(page, 50)
        by_processor, by_clock = share_of_speed(page)
        print(f"slider: {statistics.median(times):.0f} ms, median of {len(times)}")
        print(f"speed with dashboard: {by_processor:.2f} by processor, {by_clock:.2f} by clock")
        assert statistics.median(times) < 300
        assert by_processor > 0.85
        page.screenshot(path=tmp_path / "training.png")

        first, second = page.locator(BOARD).nth(0), page.locator(BOARD).nth(1)
        second.get_by_role("button", name="Pause").click()
        first.get_by_role("button", name="Resume").wait_for()
        step = int(execute(page, "print(job.step)"))
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        page.wait_for_selector(f"{BOARD} .status")
        assert first.locator(".status").text_content() == "paused"
        assert first.locator("dd").first.text_content() == f"{step:,} of 100,000"
        assert first.locator(".tile img").count() == 6
        chart = first.locator(".chart svg").first
        chart.click(position={"x": 60, "y": 70})
        page.wait_for_selector(".scaledreamer-step", state="visible")
        page.screenshot(path=tmp_path / "step.png")

        count = "at = []; stop = job.stop; job.stop = lambda: (at.append(job.step), stop())"
        execute(page, count)
        first.get_by_role("button", name="Resume").click()
        page.wait_for_function(
            f"document.querySelector('{BOARD} .status').textContent == 'training'"
        )
        first.get_by_role("button", name="Stop").click()
        page.wait_for_function(
            f"document.querySelector('{BOARD} .status').textContent == 'stopped'"
        )
        assert int(execute(page, "print(job.step - at[0])")) <= 2
        assert (lab.home / "car/checkpoints").exists()
        page.evaluate(
            f"() => {{ {CURRENT}.content.activeCellIndex = 2;"
            " return window.jupyterapp.commands.execute('notebook:run-cell'); }"
        )
        twin = page.locator("[class^=scaledreamer-] > img[alt*='stopped, step']").first
        twin.wait_for(state="attached")
        assert not twin.is_visible()  # where the widget lives
        page.screenshot(path=tmp_path / "stopped.png")

        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.evaluate(f"() => {CURRENT}.sessionContext.shutdown()")
        page.reload()
        twin.wait_for(state="visible")
        page.screenshot(path=tmp_path / "no_kernel.png")
        assert all("model not found" in error for error in page.errors), page.errors
        page.errors.clear()
