"""Grids of trainings in processes: killed, resumed, refused, and their table."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.grids.experiments import run_grid
from scaledreamer.grids.named_grids import EXPERIMENTS
from scaledreamer.grids.named_searches import SEARCHES
from scaledreamer.grids.grid import Grid, Training, seed_axis
from scaledreamer.grids.commands import read_outcome
from scaledreamer.grids.search import Search, cma_es, generation_values, log_dimension
from scaledreamer.grids.search import run_search
from scaledreamer.grids.results import read_grid_results, results_table, write_grid_results
from scaledreamer.training.presets import PRESETS

SHORT = {"prompt": ["a red ball"], "resolution": 16, "steps": 4, "eval-views": 1}
GRID = Grid(
    "Two methods.",
    {**SHORT, "generator": "ingp", "prompts-per-step": 1},
    {"seed": seed_axis([0]), "method": {"ASD": {"method": "asd"}, "SDS": {"method": "sds"}}},
)
RUN = """
import sys
from test_grids import GRID
from scaledreamer.grids.experiments import run_grid
run_grid(GRID.trainings(), sys.argv[1], show=False)
"""


def start(folder):
    "A process that runs the grid."
    return subprocess.Popen([sys.executable, "-c", RUN, folder], cwd=__file__.rpartition("/")[0])


def ended(folder):
    return [t.name for t in GRID.trainings() if read_outcome(folder, t.name)]


def test_a_grid_that_is_killed_goes_on_and_has_the_same_table(tmp_path):
    process = start(tmp_path / "grid")
    while not ended(tmp_path / "grid"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = ended(tmp_path / "grid")
    stamps = {name: (tmp_path / "grid" / name / "eval.json").stat().st_mtime_ns for name in first}
    rows = run_grid(GRID.trainings(), tmp_path / "grid", show=False)
    for name, stamp in stamps.items():
        assert (tmp_path / "grid" / name / "eval.json").stat().st_mtime_ns == stamp
    assert [(row["seed"], row["method"]) for row in rows] == [("0", "ASD"), ("0", "SDS")]
    assert all(0 <= row["volume_iou"] <= 1 and row["step"] == 4 for row in rows)
    assert read_grid_results(tmp_path / "grid" / "results.parquet") == rows
    table = results_table(rows, "method", {"volume_iou": "IoU"}, control="ASD")
    names = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert names[:3] == ["ASD", "SDS", "truth"] and "| SDS | 1 |" in table


def test_a_grid_goes_on_from_the_table_of_another_machine(tmp_path):
    first, second = GRID.trainings()
    other = {**SHORT, "generator": "ingp", "prompts-per-step": 1, "method": "asd", "seed": 1}
    rows = run_grid([first, second], tmp_path / "one", show=False)
    more = [first, Training({"seed": "1", "method": "ASD"}, other), second]
    table = tmp_path / "one/results.parquet"
    joined = run_grid(more, tmp_path / "two", show=False, earlier=table)
    assert [joined[0], joined[2]] == rows and joined[1]["seed"] == "1"
    assert read_grid_results(tmp_path / "two/results.parquet") == joined
    assert [path.name for path in (tmp_path / "two/outcomes").iterdir()] == ["1_ASD.json"]
    with pytest.raises(RunError, match="nothing.parquet"):
        run_grid(more, tmp_path / "three", earlier=tmp_path / "nothing.parquet")
    assert not (tmp_path / "three").exists()


def test_an_interrupted_grid_stops_its_trainings_and_a_second_one_is_refused(tmp_path):
    process = start(tmp_path / "grid")
    while not (tmp_path / "grid" / "grid.json").exists():
        time.sleep(0.05)
    with pytest.raises(UsageError, match="is in use by another run"):
        run_grid(GRID.trainings(), tmp_path / "grid", show=False)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    listed = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True)
    assert not listed.stdout


def test_a_failed_training_says_why_and_is_tried_again(tmp_path):
    wrong = Grid("", {**SHORT, "steps": 0}, {"seed": seed_axis([0])}).trainings()
    rows = run_grid(wrong, tmp_path, show=False)
    assert "--steps" in rows[0]["failure"] and "volume_iou" not in rows[0]
    assert "| 0 | 0 × |" in results_table(rows, "seed", {"volume_iou": "IoU"})
    before = read_outcome(tmp_path, "0")
    assert before.code == 2
    run_grid(wrong, tmp_path, show=False)
    log = (tmp_path / "logs" / "0.log").read_text()
    assert log.count("--steps") == 2


SEARCH = Search(
    "The learning rate.",
    {**SHORT, "generator": "ingp", "prompts-per-step": 1},
    {"optim.lr": log_dimension(1e-3, 2)},
    metric="volume_iou",
    population=2,
    generations=2,
)


def test_a_search_goes_on_from_another_table_and_proposes_the_same(tmp_path):
    first = SEARCH.trainings(0, cma_es(1, 2)[0])
    known = [
        {**training.labels, "id": "0", "text": "", "volume_iou": iou, "command": training.command}
        for training, iou in zip(first, (0.2, 0.6))
    ]
    write_grid_results(tmp_path / "known.parquet", known)
    rows = run_search(SEARCH, tmp_path / "one", show=False, earlier=tmp_path / "known.parquet")
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1"]
    assert not [*(tmp_path / "one/generation-0/outcomes").iterdir()]
    second = SEARCH.trainings(1, cma_es(1, 2, [[0.2, 0.6]])[0])
    assert [row["command"] for row in rows] == [t.command for t in (*first, *second)]
    assert len({row["command"] for row in rows}) == 4
    assert generation_values(SEARCH, rows)[1] == [row["volume_iou"] for row in rows[2:]]
    assert len(read_grid_results(tmp_path / "one/results.parquet")) == 4
    again = run_search(SEARCH, tmp_path / "one", show=False, earlier=tmp_path / "known.parquet")
    assert [row["volume_iou"] for row in again] == [row["volume_iou"] for row in rows]


def test_a_search_without_its_package_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(RunError, match="needs the package cma"):
        run_search(SEARCH, tmp_path / "one", show=False)
    assert not any(tmp_path.iterdir())


def test_a_search_refuses_other_tables_and_folders(tmp_path):
    write_grid_results(tmp_path / "other.parquet", [{"command": "scaledreamer train", "id": "0"}])
    with pytest.raises(UsageError, match="no training with a command of this grid"):
        run_search(SEARCH, tmp_path / "one", earlier=tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="has a grid in which 0_0_all is"):
        run_search(SEARCHES["law"](), tmp_path / "one", show=False)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", [*EXPERIMENTS, *SEARCHES])
def test_the_options_of_named_grids_are_those_of_train(name, quick):
    from scaledreamer.commands.cli import parse
    from scaledreamer.grids.grid import option_words

    if name in EXPERIMENTS:
        trainings = EXPERIMENTS[name]().trainings(quick)
    else:
        search = SEARCHES[name]()
        corners = np.array([[-2.0], [2.0]]).repeat(len(search.dimensions), axis=1)
        trainings = search.trainings(1, list(corners), quick)
    for training in trainings:
        command = parse(["train", *option_words(training.options)])
        assert command.settings.seed == int(training.labels["seed"])
        assert command.settings != PRESETS["toybox"]()


def test_a_damaged_outcome_is_named(tmp_path):
    (tmp_path / "outcomes").mkdir()
    (tmp_path / "outcomes" / "0.json").write_text(json.dumps({"code": "?"}))
    with pytest.raises(RuntimeError, match="is no outcome of a command: delete it"):
        read_outcome(tmp_path, "0")
