"""`scaledreamer lab` as installed from a wheel: from the shell to a finished tour in a real
JupyterLab in headless Chromium. Screenshots are in pytest's folder, whose path a failure prints."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import CELLS, CURRENT, ROOT, own_environment, run_all, watched

from scaledreamer.commands.cli import run_command

EXPOSED = "c.LabApp.expose_app_in_browser = True\n"  # for `window.jupyterapp`
RUN_CELL = '[data-command="notebook:run-cell-and-select-next"]'


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    "What a wheel puts into site-packages."
    folder = tmp_path_factory.mktemp("site-packages")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@contextmanager
def started(home: Path, installed: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    "The command in a folder that has nothing of the project, and the address that it prints."
    environment = own_environment(home) | {"PYTHONPATH": str(installed)}
    (home / ".config").mkdir()
    (home / ".config/jupyter_lab_config.py").write_text(EXPOSED)
    command = [sys.executable, "-m", "scaledreamer", "lab", "--no-browser"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=home, env=environment, **pipes)
    try:
        for line in process.stdout:
            print(line, end="")
            if line.startswith("open "):
                break
        else:
            raise AssertionError(process.stderr.read())
        yield process, line.split()[1]
    finally:
        process.kill()


def open_notebook(page, path: str) -> None:
    "Open a notebook as a click on its name does."
    page.evaluate("(path) => window.jupyterapp.commands.execute('docmanager:open', {path})", path)
    page.wait_for_function(f"(path) => {CURRENT}?.context?.path === path", arg=path)
    page.wait_for_function(CELLS)
    page.evaluate(f"() => {CURRENT}.sessionContext.ready")


def unchanged(page) -> bool:
    "Whether JupyterLab closes the notebook without a question."
    page.wait_for_timeout(1000)  # the kernel's name and language have arrived
    return not page.evaluate(f"() => {CURRENT}.content.model.dirty")


POINT = "document.querySelector('.js-plotly-plot')?._fullData?.[0]?.x?.[0]"


def wait_until_moving(page) -> None:
    "Until a point of the first page's figure is at another place than it was."
    first = page.wait_for_function(f"() => {POINT}", timeout=120_000).json_value()
    page.wait_for_function(f"(first) => {POINT} !== first", arg=first)


def test_a_wheel_has_every_file_of_the_notebooks(installed):
    listed = ["git", "ls-files", "-z", "nbs"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in tracked.split("\0")[:-1]:
        assert (installed / "scaledreamer/assets/notebooks" / path[4:]).is_file(), path


def test_from_the_command_to_a_finished_tour(browser, installed, tmp_path):
    begun = time.monotonic()
    with started(tmp_path, installed) as (process, address), watched(browser, tmp_path) as page:
        page.goto(address)
        page.wait_for_function(CELLS)
        page.evaluate(f"() => {CURRENT}.sessionContext.ready")
        page.screenshot(path=tmp_path / "first.png")
        shown = time.monotonic() - begun
        assert unchanged(page)  # for one second, in which somebody finds the button
        busy = os.getloadavg()[0] > 2
        page.locator(RUN_CELL).locator("visible=true").first.click()
        clicked = time.monotonic()
        wait_until_moving(page)
        seconds, waited = time.monotonic() - begun, time.monotonic() - clicked
        print(f"from the command to the first page: {shown:.1f} s; to something that moves, one")
        print(f"click: {seconds:.1f} s (at most 10 on an idle machine), {waited:.1f} s after it")
        assert waited < 10 or busy
        page.screenshot(path=tmp_path / "moving.png")
        for name in ("index.ipynb", "tour.ipynb"):
            open_notebook(page, name)
            assert unchanged(page), name

        begun = time.monotonic()
        run_all(page)
        print(f"the tour took {time.monotonic() - begun:.0f} s")
        assert time.monotonic() - begun < 300
        for name in ("CurveExplorer", "job = sd.train", "compare_runs", "show_mesh"):
            cell = page.locator(".jp-CodeCell", has_text=name).locator("visible=true").last
            cell.screenshot(path=tmp_path / f"{name.split()[0]}.png")
        assert not page.errors, page.errors

        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert rest.splitlines()[-1] == "lab: ended; your notebooks are in scaledreamer-notebooks"


@pytest.mark.parametrize("missing", ["jupyterlab", "anywidget"])
def test_a_missing_package_is_one_sentence(missing, monkeypatch, tmp_path, capsys):
    from scaledreamer.commands import lab

    monkeypatch.setattr(lab, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.chdir(tmp_path)
    assert run_command(["lab"]) == 1
    assert capsys.readouterr().err == (
        f"scaledreamer: {missing} is not installed: pip install {missing}\n"
    )
    assert not list(tmp_path.iterdir())


def test_bad_places_are_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for options, expected in (
            (["--folder", str(tmp_path / "file")], "is a file, give a path in a folder"),
            (["--folder", "/proc/notebooks"], "nothing can be written to /proc"),
            (["--folder", str(tmp_path / "new"), "--port", port], "cannot be used (in use)"),
            (
                ["--folder", str(tmp_path / "new"), "--port", "0"],
                "expected an integer from 1 to 65535",
            ),
        ):
            assert run_command(["lab", *options]) == 2
            error = capsys.readouterr().err
            assert expected in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists()


def test_what_the_user_changed_is_never_overwritten(installed, tmp_path):
    from scaledreamer.commands.notebook_copies import copy_notebooks, notebook_source

    source, mine = notebook_source(), tmp_path / "mine"
    written = copy_notebooks(source, mine, "1")
    assert {file for _, file in written} >= {mine / "start.ipynb", mine / "images/flow.png"}
    (mine / "tour.ipynb").write_text("my tour")
    (mine / "note.ipynb").write_text("my note")
    record = json.loads((mine / ".scaledreamer.json").read_text())
    record["digests"]["tour.ipynb"] = "another version's"
    (mine / ".scaledreamer.json").write_text(json.dumps(record))
    assert [file.name for _, file in copy_notebooks(source, mine, "2")] == [
        "tour (scaledreamer 2).ipynb"
    ]
    assert not copy_notebooks(source, mine, "2")
    assert (mine / "tour.ipynb").read_text() == "my tour"
    assert (mine / "note.ipynb").read_text() == "my note"
