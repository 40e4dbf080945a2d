"""Trackers get what a training and its evaluation write, once, and never change or stop it."""

import json
import shutil
import signal
import struct
import sys
import threading
import time
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import trimesh
import wandb
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from fixtures import two_prompts
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from scaledreamer.commands import evaluate
from scaledreamer.commands.cli import parse, run_command
from scaledreamer.commands.train import evaluate_result
from scaledreamer.core.files import write_json_atomic
from scaledreamer.core.processes import World
from scaledreamer.core.settings import UsageError, flat_settings
from scaledreamer.training import trackers as module
from scaledreamer.training.run_folder import check_run_folder, write_run_settings
from scaledreamer.training.run_logs import read_rows
from scaledreamer.training.save_settings import SaveSettings
from scaledreamer.training.tracker_classes import check_trackers
from scaledreamer.training.tracker_kinds import read_glb
from scaledreamer.training.trackers import Trackers
from scaledreamer.training.trainer import run_training
from scaledreamer.view.mesh import save_mesh

BOTH = SaveSettings(track=("tensorboard", "wandb"))
STEPS = range(6)
PICTURES = [3, 6]


class Killed(Exception):
    "What ends a training without a checkpoint."


def kill(step, metrics):
    if step == 4:
        raise Killed


def evaluated(run, *_):
    "What an evaluation writes, in little time."
    ball = trimesh.creation.icosphere(subdivisions=1)
    ball.visual.vertex_colors = [230, 120, 60, 255]
    rows = [{"id": prompt.id, "sim": 0.5} for prompt in run.train_prompts]
    for row in rows:
        save_mesh(ball, run.folder / "meshes" / f"{row['id']}.glb")
    result = {"step": run.step, "sim": 0.3, "n_views": 4, "clip_model": "tiny", "lost": None}
    result |= {"truth": {"sim": 0.4}, "intervals": {"sim": [0.1, 0.5]}, "machine": {"cores": 2}}
    write_json_atomic(run.folder / "eval.json", result | {"per_prompt": rows})
    return result


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    options = {"steps": len(STEPS), "validate_every": 3, "checkpoint_every": 3}
    return two_prompts(tmp_path_factory.mktemp("corpus"), **options)


@pytest.fixture(scope="module")
def plain(settings, tmp_path_factory):
    "The run without trackers."
    return run_training(tmp_path_factory.mktemp("plain") / "run", settings, show=False)


@pytest.fixture(scope="module")
def tracked(settings, tmp_path_factory):
    "The folder of a run that was killed in step 4, went on from step 3, and was evaluated."
    folder, settings = tmp_path_factory.mktemp("tracked") / "run", replace(settings, save=BOTH)
    with pytest.raises(Killed):
        run_training(folder, settings, on_step=kill, show=False)
    with closing(Trackers()) as trackers:
        run = run_training(folder, settings, resume=True, show=False, trackers=trackers)
        with mock.patch("scaledreamer.commands.evaluate.evaluate_run", evaluated):
            evaluate_result(run, (), True, 1)
    return folder


@pytest.fixture(scope="module")
def board(tracked):
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(tracked / "track/tensorboard"), everything).Reload()


@pytest.fixture(scope="module")
def evaluation(tracked):
    return json.loads((tracked / "eval.json").read_text())


def numbers(evaluation):
    "What trackers get of an evaluation."
    kept = {k: v for k, v in evaluation.items() if k not in ("machine", "per_prompt")}
    flat = {f"eval/{name}": value for name, value in flat_settings(kept).items()}
    return {name: value for name, value in flat.items() if type(value) in (int, float)}


def written_records(folder):
    "The records of an offline run of wandb: in blocks of 32 kB, behind a header of 7 bytes."
    (path,) = folder.glob("*.wandb")
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 < len(data):
        left = -at % 32768
        at += left if left < 7 else 0
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def records(folder):
    "The records of an offline run once it has its end, for which `finish` does not wait."
    for _ in range(100):
        found = list(written_records(folder))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            break
        time.sleep(0.1)
    return found


def history(folder):
    "The rows of an offline run."
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items}


@pytest.fixture(scope="module")
def sessions(tracked):
    "The folders of wandb's two sessions, in their order."
    return sorted((tracked / "track/wandb").glob("offline-run-*"))


def same_run(one, other):
    "Whether the metrics, renders and weights of two runs are the same to the bit."
    names = "metrics.jsonl", "renders.jsonl", "checkpoints/000006/generator.safetensors"
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_metrics_and_weights_are_those_without_trackers(plain, tracked):
    assert same_run(tracked, plain.folder)
    assert not (plain.folder / "track").exists()


def test_tensorboard_has_every_row_once(tracked, board):
    rows = read_rows(tracked / "metrics.jsonl")
    assert len(list((tracked / "track/tensorboard").glob("events.*"))) == 2
    names = {name for name in board.Tags()["scalars"] if name.startswith("train/")}
    assert names == {f"train/{key}" for row in rows for key in row if key != "step"}
    for name in names:
        key = name.removeprefix("train/")
        wanted = [(row["step"], float(np.float32(row[key]))) for row in rows if key in row]
        assert [(event.step, event.value) for event in board.Scalars(name)] == wanted


def test_tensorboard_has_the_pictures(tracked, board, tmp_path):
    images = board.Images("validation")
    assert [image.step for image in images] == PICTURES
    for image in images:
        (tmp_path / "shown.png").write_bytes(image.encoded_image_string)
        pictures = tmp_path / "shown.png", tracked / f"validation/{image.step:06d}.png"
        shown, saved = (np.array(Image.open(path).convert("RGB")) for path in pictures)
        assert np.array_equal(shown, saved)


def test_tensorboard_has_evaluation_meshes_and_settings(tracked, board, evaluation):
    found = {name: board.Scalars(name) for name in board.Tags()["scalars"] if name[:5] == "eval/"}
    assert {
        name: [(len(STEPS), float(np.float32(value)))]
        for name, value in numbers(evaluation).items()
    } == {name: [(event.step, event.value) for event in events] for name, events in found.items()}
    meshes = sorted((tracked / "meshes").iterdir())
    assert len(meshes) == 2
    for path in meshes:
        for part, wanted in zip(("VERTEX", "COLOR", "FACE"), read_glb(path)):
            (event,) = board.Tensors(f"meshes/{path.stem}_{part}")
            proto = event.tensor_proto
            values = np.array(proto.float_val or proto.int_val or proto.uint32_val)
            if proto.tensor_content:
                values = np.frombuffer(proto.tensor_content, np.float32)
            assert event.step == len(STEPS)
            assert np.allclose(values.reshape(wanted.shape), wanted, atol=1e-6)
    assert "_hparams_/experiment" in board.summary_metadata


def test_wandb_is_one_run_that_has_every_row_once(tracked, sessions):
    state = json.loads((tracked / "track/wandb.json").read_text())
    assert [path.name.rpartition("-")[2] for path in sessions] == [state["id"]] * 2
    rows = [row for path in sessions for row in history(path)]
    metrics = read_rows(tracked / "metrics.jsonl")
    sent = [{k: v for k, v in row.items() if k[0] != "_"} for row in rows if "train/opacity" in row]
    assert sent == [
        {k if k == "step" else f"train/{k}": v for k, v in row.items()} for row in metrics
    ]
    assert [row["step"] for row in rows if "validation/path" in row] == PICTURES


def test_wandb_has_pictures_evaluation_meshes_and_settings(tracked, sessions, evaluation):
    rows = [row for path in sessions for row in history(path)]
    pictures = [row["validation/path"] for row in rows if "validation/path" in row]
    places = [path / "files" for path in sessions]
    for step, name in zip(PICTURES, pictures):
        (copy,) = (place / name for place in places if (place / name).exists())
        assert copy.read_bytes() == (tracked / f"validation/{step:06d}.png").read_bytes()
    (found,) = (
        {k: v for k, v in row.items() if k[:5] == "eval/"} for row in rows if "eval/sim" in row
    )
    assert found == numbers(evaluation)
    for path in (tracked / "meshes").iterdir():
        key = f"meshes/{path.stem}/path"
        (row,) = (row for row in rows if key in row)
        assert row["step"] == len(STEPS)
        copy = sessions[1] / "files" / row[key]
        assert copy.read_bytes() == path.read_bytes()
    config = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records(sessions[0])
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }
    assert config["generator"] == "ingp" and config["run"] == "run" and "distill.eta" in config


def test_a_run_that_goes_on_after_its_end_keeps_what_it_had(tracked, settings, tmp_path):
    folder = Path(shutil.copytree(tracked, tmp_path / "run"))
    longer = replace(settings, steps=7, save=BOTH)
    with pytest.warns(UserWarning, match="goes on with 7 steps, not 6"):
        run_training(folder, longer, resume=True, show=False)
    run_training(folder, longer, resume=True, show=False)  # which has nothing to do
    board = EventAccumulator(str(folder / "track/tensorboard"), {"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/opacity")] == [*STEPS, 6]
    assert [event.step for event in board.Scalars("eval/sim")] == [6]
    assert [image.step for image in board.Images("validation")] == PICTURES
    sessions = sorted((folder / "track/wandb").glob("offline-run-*"))
    rows = [row for path in sessions for row in history(path)]
    assert [row["step"] for row in rows if "train/opacity" in row] == [*STEPS, 6]


def test_an_evaluation_of_its_own_sends_nothing(tracked, monkeypatch):
    def kept():
        paths = (path for path in (tracked / "track").rglob("*") if path.is_file())
        return {path: path.stat().st_size for path in paths if path.suffix != ".log"}

    monkeypatch.setattr(evaluate, "scorers_for", lambda *_: [])
    monkeypatch.setattr(evaluate, "evaluate_run", evaluated)
    before = kept()
    assert run_command(["evaluate", str(tracked), "--views", "1"]) == 0
    assert kept() == before


def test_trackers_may_change_when_a_run_goes_on(plain, tracked, settings):
    "And a run that is only opened needs none."
    check_run_folder(plain.folder, replace(settings, save=BOTH), plain.prompts, True)
    check_run_folder(tracked, settings, plain.prompts, True)


def test_what_cannot_be_used_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    train = ["train", "--prior", "mixture", "--out", str(tmp_path / "run"), "--track"]

    def refusal(*names):
        assert run_command([*train, *names]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "run").exists()
        return line

    assert "no tracker 'tensorbord': give one of aim, " in refusal("wandb", "tensorbord")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    wanted = 'needs the package tensorboard, which is not installed: pip install "scaledreamer[t'
    assert wanted in refusal("tensorboard")
    (tmp_path / "mlflow").mkdir()  # a folder of this name is no package
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal("mlflow").endswith("which is not installed: pip install mlflow")
    online = SimpleNamespace(settings=SimpleNamespace(mode="online"))
    no_key = mock.Mock(side_effect=wandb.errors.UsageError("No API key configured."))
    monkeypatch.setattr(wandb, "setup", lambda: online)
    monkeypatch.setattr(wandb, "login", no_key)
    assert "wandb has no login (No API key configured.): log in, or set WANDB_M" in refusal("wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "needs the package wandb, which" in refusal("wandb")


def test_the_option(tmp_path):
    for given in ("--track tensorboard wandb", "--track=tensorboard --steps 9 --track wandb"):
        assert parse(["train", *given.split()]).settings.save == BOTH
    assert parse(["train"]).settings.save.track == ()
    write_run_settings(tmp_path, replace(parse(["train"]).settings, save=BOTH))
    defaults = ["train", "--config", str(tmp_path)]
    assert parse(defaults).settings.save == BOTH
    assert parse([*defaults, "--track", "aim"]).settings.save.track == ("aim",)
    assert parse([*defaults, "--track"]).settings.save.track == ()


class Listing(GeneralTracker):
    name, requires_logging_directory, tracker = "listing", False, None
    made = []

    def __init__(self, run_name):
        super().__init__()
        self.steps, self.pictures, self.finished = [], [], False
        self.made.append(self)

    def log(self, values, step=None):
        self.steps.append(step)

    def log_images(self, values, step=None):
        self.pictures.append(step)

    def finish(self):
        self.finished = True


@pytest.fixture
def tracker(monkeypatch):
    "Registers classes with Accelerate; gives the settings of a run that they track."

    def register(settings, *kinds):
        for kind in kinds:
            monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, kind.name, kind)
        monkeypatch.setattr(Listing, "made", [])
        return replace(settings, save=SaveSettings(track=tuple(kind.name for kind in kinds)))

    return register


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_closes_trackers(tracker, settings, tmp_path, number):
    def stop(step, metrics):
        if step == 2:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", tracker(settings, Listing), on_step=stop, show=False)
    (made,) = Listing.made
    assert made.steps == [0, 1, 2] and made.finished


class Fails(Listing):
    name = "fails"

    def log(self, values, step=None):
        super().log(values, step)
        if step == 1:
            raise OSError(28, "No space left on device")


class FailsAtStart(Listing):
    name = "fails-at-start"

    def start(self):
        raise ConnectionError("no network\nat all")


class FailsAtEnd(Listing):
    name = "fails-at-end"

    def finish(self):
        raise SystemExit(3)


class Hangs(Listing):
    name = "hangs"

    def log(self, values, step=None):
        threading.Event().wait()


def test_trackers_that_fail_cost_one_warning_each(tracker, settings, plain, tmp_path, monkeypatch):
    "And neither the training nor a tracker that works is other than without them."
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.5)
    settings = tracker(settings, Fails, FailsAtStart, Listing, FailsAtEnd, Hangs)
    check_trackers(settings.save.track)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_training(tmp_path / "run", settings, show=False)
    causes = {
        "fails": "OSError: [Errno 28] No space left on device",
        "fails-at-start": r"ConnectionError: no network\nat all",
        "fails-at-end": "SystemExit: 3",
        "hangs": "it has not finished after 0.5 seconds",
    }
    wanted = {f"tracker {k} is left out from now on ({v}); " for k, v in causes.items()}
    lines = [str(one.message) for one in caught]
    assert {line.removesuffix("the run folder has everything") for line in lines} == wanted
    assert len(lines) == len(causes)
    (works,) = (made for made in Listing.made if type(made) is Listing)
    assert (works.steps, works.pictures, works.finished) == ([*STEPS], PICTURES, True)
    assert same_run(tmp_path / "run", plain.folder)


def test_a_tracker_that_falls_behind_is_left_out(tracker, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 3)
    trackers = Trackers()
    trackers.start(tracker(settings, Hangs), tmp_path)
    with pytest.warns(UserWarning, match=r"left out from now on \(3 calls wait for it\)"):
        for step in STEPS:
            trackers.metrics({"step": step, "loss": 0.5})
    trackers.close()


def test_other_processes_have_no_trackers(tracker, settings, tmp_path):
    class Second(World):
        rank, size = 1, 2

    trackers = Trackers()
    trackers.start(tracker(settings, Listing), tmp_path / "run", world=Second())
    trackers.metrics({"step": 0, "loss": 0.5})
    trackers.close()
    assert not Listing.made and not (tmp_path / "run").exists()


def test_a_launcher_starts_no_process_group(settings, tmp_path, monkeypatch):
    "Accelerate's trackers would, of one process of torchrun."
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    trackers = Trackers()
    trackers.start(replace(settings, save=BOTH), tmp_path)
    assert len(trackers.places()) == 2
    trackers.close()
    assert not torch.distributed.is_initialized()


def test_names_are_checked_only_where_a_training_starts():
    assert SaveSettings(track=("of another version",)).track
    with pytest.raises(UsageError, match="no tracker 'of another version'"):
        check_trackers(("of another version",))
