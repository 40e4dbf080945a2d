"""Numbers out of range, steps that do not fit the memory, and memory that runs out."""

import contextlib
import io
import os
import random
import re
import types
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Union, get_args, get_origin, get_type_hints
from unittest import mock

import pytest
import torch

from scaledreamer.commands import cli
from scaledreamer.core.memory import free_host_memory, group_memory, memory_errors, memory_left
from scaledreamer.core.settings import Interval, RunError, UsageError
from scaledreamer.training import memory_estimate, trainer
from scaledreamer.training.corpora import number_prompts
from scaledreamer.training.presets import mg15_hyper_ingp
from scaledreamer.training.run import build
from scaledreamer.training.train_settings import TrainSettings

NEEDED = {  # arguments without which a command does nothing
    "train": ["--prior", "mixture", "--generator", "ingp"],
    "evaluate": ["none"],
    "export": ["none", "--prompt", "0000", "--to", "a.glb"],
    "curve": ["--out", "a.json"],
    "toy": ["points", "--out", "none"],
    "embed": ["toybox-15", "--out", "none"],
    "make-prior": ["--out", "none"],
    "corpus": ["toybox-15"],
    "import-weights": ["none.ckpt", "--out", "none"],
    "experiment": ["none"],
    "lab": ["--no-browser"],
}
ODD = (
    *(
        "nan",
        "inf",
        "-inf",
        "1e400",
        "-1e400",
        "1e30",
        "1e-400",
        "1e-300",
        "-0.0",
        "0",
        "-1",
        "0.5",
    ),
    *("9" * 30, "-" + "9" * 30, "7" * 5000, "100000", "1000000", "1000000000", "4097", "1_000"),
    *("", " ", "1e3", "0x10", "1,5", "½", "²", "١٢", "None", "true", "--", "+5", "1.", "NaN"),
)


def numeric_fields(cls, prefix=""):
    "Names of options, the class that holds each, and its field, of all settings below a command."
    hints = get_type_hints(cls, include_extras=True)
    for each in fields(cls):
        hint, marks = hints[each.name], ""
        if get_origin(hint) is not None and hasattr(hint, "__metadata__"):
            marks, hint = str(hint.__metadata__), hint.__origin__
        if "Suppress" in marks:
            continue
        union = get_origin(hint) in (Union, types.UnionType)
        members = [a for a in (get_args(hint) if union else (hint,)) if is_dataclass(a)]
        flat = "name=''" in marks
        for member in members:
            yield from numeric_fields(member, prefix if flat else f"{prefix}{each.name}.")
        words = str(hint)
        if not members and "Literal" not in words and re.search(r"\b(int|float)\b", words):
            yield f"{prefix}{each.name}".replace("_", "-"), cls, each, hint


OPTIONS = [
    (command, *found)
    for command in cli.COMMANDS
    for found in numeric_fields(cli.command_class(command))
]


def made(cls, name, value):
    "An object of settings with one value; what must be given is left as nothing."
    hints = get_type_hints(cls)
    given = {
        each.name: Path("a.json") if hints[each.name] is Path else "points"
        for each in fields(cls)
        if each.default is MISSING and each.default_factory is MISSING
    }
    return cls(**(given | {name: value}))


def length(hint):
    "Number of values that an option takes."
    found = re.search(r"tuple\[(.*?)\]", str(hint))
    return found[1].count(",") + 1 if found else 1


def extremes(hint):
    "Values that no setting may take."
    whole = "float" not in str(hint)
    values = [10**30, -(10**30), 10**5000] if whole else [float("nan"), float("inf"), -1e300, 1e300]
    return [(value,) * length(hint) if "tuple" in str(hint) else value for value in values]


@pytest.mark.parametrize("command, option, cls, each, hint", OPTIONS, ids=lambda x: str(x)[:40])
def test_every_number_has_a_range(command, option, cls, each, hint):
    for value in extremes(hint):
        with pytest.raises(UsageError, match=rf"^{each.name} (is|are) .*: expected") as caught:
            made(cls, each.name, value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert len(OPTIONS) > 60


@pytest.fixture(scope="module")
def helps():
    "The help of each command as one line, by command and preset."
    found = {}
    presets = [
        ("train", ["--preset", name])
        for name in ("paper/mg15-hyper-ingp", "paper/dl17k-triplane-mv")
    ]
    for command, more in [*((name, []) for name in cli.COMMANDS), *presets]:
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            with mock.patch.dict(os.environ, {"COLUMNS": "100"}):
                cli.parse([command, *more, "--help"])
        text = re.sub(r"[│╭╮╰╯─]", " ", out.getvalue())
        found[command] = found.get(command, "") + " " + " ".join(text.split())
    return found


@pytest.mark.parametrize("command, option, cls, each, hint", OPTIONS, ids=lambda x: str(x)[:40])
def test_help_states_the_range(command, option, cls, each, hint, helps):
    with pytest.raises(UsageError) as caught:
        made(cls, each.name, extremes(hint)[0])
    words = re.search(r"expected (?:an? )?(?:integers?|numbers?) (.*?)(?: \(|$)", str(caught.value))
    parts = re.split(r" --(?=[a-z.0-9-]+ (?:\{|INT|FLOAT|STR|PATH|\[))", helps[command])
    about = [part for part in parts if part.startswith(f"{option} ")]
    assert any(words[1] in part for part in about), (words[1], about)


class Reached(Exception):
    "Work would begin here."


def odd_line(rng):
    "A command line with one to three odd numbers."
    command, *_ = rng.choice(OPTIONS)
    own = [option for option in OPTIONS if option[0] == command]
    line = [command, *NEEDED[command]]
    if command == "train" and rng.random() < 0.2:
        line += ["--preset", "paper/mg15-hyper-ingp", "--distill.view-prompting", "tokens"]
    for _, option, _, each, hint in rng.sample(own, min(len(own), rng.randint(1, 3))):
        values = [rng.choice(ODD) for _ in range(length(hint))]
        if len(values) == 1 and rng.random() < 0.5:
            line.append(f"--{option}={values[0]}")
        else:
            line += [f"--{option}", *values]
    return line


def reach(line, measure=False):
    """Parse a command line and do all that comes before its work: 'work', or what it says.

    `measure`: with prior, generator and the estimate of a step's memory, which take a second."""
    stop = mock.Mock(side_effect=Reached)
    train = "training.trainer.locked_folder" if measure else "training.trainer.build"
    with contextlib.ExitStack() as stack:
        begin = ("curve_and_toy.fresh", "make_prior.make_tiny_sd", "lab.prepare")
        for place in (train, *(f"commands.{name}" for name in begin)):
            stack.enter_context(mock.patch(f"scaledreamer.{place}", stop))
        stack.enter_context(
            mock.patch("scaledreamer.training.memory_estimate.memory_left", lambda _: 8e9)
        )
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            command = cli.parse(line)
            if line[0] == "train":
                trainer.run_training(command.folder, command.settings, show=False)
            else:
                command.run()
        except Reached:
            return "work"
        except (UsageError, RunError) as error:
            sentence = str(error)
            assert sentence and "\n" not in sentence and len(sentence) < 1500, (line, sentence)
            return sentence
        except SystemExit as stopped:
            assert not stopped.code and out.getvalue(), line
            return "help"
    raise AssertionError(f"{line} did its work")


def fuzz(seed, count, folder, measure=False):
    "What odd command lines lead to, by line; nothing may be written."
    rng = random.Random(seed)
    before = os.getcwd()
    os.chdir(folder)
    try:
        found = [(line, reach(line, measure)) for line in (odd_line(rng) for _ in range(count))]
        assert not any(Path(folder).iterdir())
        return found
    finally:
        os.chdir(before)


def test_odd_numbers_give_one_sentence(tmp_path):
    found = fuzz(0, 30, tmp_path)
    assert sum(outcome != "work" for _, outcome in found) > 20


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("train --resolution 100000", "--resolution is 100000: expected an integer from 1 to 4096"),
        ("train --views 1000000", "--views-per-prompt is 1000000: expected an integer from 1 to"),
        ("train --eval-views 1000000000", "--eval-views is 1000000000: expected an integer from 0"),
        (
            "train --render.eikonal-samples -1",
            "--render.eikonal-samples is -1: expected an integer",
        ),
        ("train --render.gradients -1", "--render.eikonal-samples is -1: expected an integer"),
        ("train --optim.eps -1", "--optim.eps is -1.0: expected a number above 0"),
        ("train --optim.warmup -3", "--optim.warmup is -3: expected an integer from 0"),
        ("train --loss.opaque nan", "--loss.opaque is nan: expected a number from 0"),
        ("train --cameras.margin inf", "--cameras.margin is inf: expected a number from 1"),
        (
            "train --cameras.fovy 50 40",
            "--cameras.fovy is (50.0, 40.0): expected the first at most",
        ),
        (f"train --steps {'9' * 30}", "--steps is an integer of about 31 digits: expected"),
        (f"train --steps {'9' * 5000}", "--steps is an integer of thousands of digits"),
        ("train --steps 1e3", "--steps is '1e3': expected an integer"),
        (
            "train --preset paper/mg15-hyper-ingp --cameras.distance 0 1",
            "--cameras.distance is (0.0, 1.0): expected",
        ),
        (
            "train --preset paper/mg15-hyper-ingp --cameras.sphere-share 2",
            "--cameras.sphere-share is 2.0: expected",
        ),
        ("evaluate none --views 1000000", "--views is 1000000: expected an integer from 1 to 4096"),
        ("curve --out a.json --timesteps 1001", "--timesteps is 1001: expected an integer from 1"),
        ("curve --out a.json --guidance 1e400", "--guidance is inf: expected a number from -1000"),
        ("toy points --out none --count 1000000000", "--count is 1000000000: expected an integer"),
        ("make-prior --out none --batch 0", "--batch is 0: expected an integer from 1 to 4096"),
        ("make-prior --out none --clip-steps 0", "--clip-steps is 0: expected an integer from 1"),
    ],
)
def test_sentences_name_the_option(line, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run_command(line.split()) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_intervals_include_their_closed_ends():
    assert 1 in Interval(0, 1) and 1 not in Interval(0, 1, "high") and 0 in Interval(0, 1, "high")
    assert str(Interval(1, 10**8)) == "from 1 to 10^8" and str(Interval(0, 2, "low")).startswith(
        "above"
    )
    assert TrainSettings(resolution=4096, steps=10**8, seed=2**32 - 1).resolution == 4096


SMALL = TrainSettings(prior="mixture", generator="ingp", prompts_per_step=1, resolution=16, steps=2)
PROMPTS = number_prompts([("a red ball", "train")])


def test_a_step_that_cannot_fit_is_refused_before_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory_estimate, "memory_left", lambda device: 2 * 10**9)
    Path("car.txt").write_text("a red ball\n")
    line = "train --corpus car.txt --prior mixture --generator ingp --prompts 1 --eval-views 0"
    line += " --views 16 --resolution 1024 --out run"
    assert cli.run_command(line.split()) == 2
    error = capsys.readouterr().err
    assert "GB of memory, and 2 GB are left: give --render.train-rays-per-chunk" in error
    assert "--resolution (1024)" in error and error.count("\n") == 1
    assert not Path("run").exists()


def test_usual_runs_are_not_refused():
    for settings in (TrainSettings(), SMALL):
        memory_estimate.check_memory(build(Path("none"), settings, PROMPTS), left=6 * 10**9)
    own = replace(mg15_hyper_ingp(), prior="mixture", generator="ingp", distill=SMALL.distill)
    memory_estimate.check_memory(build(Path("none"), own, PROMPTS), left=8 * 10**9)
    assert memory_left() > 10**8


def test_memory_of_containers(tmp_path):
    files = {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5 kB\nSwapFree: 2 kB\n",
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "1000\n",
        "sys/fs/cgroup/a/memory.current": "900\n",
        "sys/fs/cgroup/a/memory.stat": "inactive_anon 7\ninactive_file 50\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "10\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_memory(tmp_path) == 7 * 1024 and group_memory(tmp_path) == 150
    (tmp_path / "proc/self/cgroup").write_bytes(b"\xff:nonsense\n::\n")
    assert group_memory(tmp_path) is None


OUT_OF_MEMORY = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
    ),
    OSError(12, "Cannot allocate memory"),
)


def test_memory_that_runs_out_in_training_is_a_sentence(tmp_path, capsys):
    line = "train --prior mixture --generator ingp --prompts 1 --resolution 8 --eval-views 0 --out"
    with mock.patch.object(trainer, "training_step", side_effect=OUT_OF_MEMORY[2]):
        assert cli.run_command([*line.split(), str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    assert "memory" in told and "--resolution (8)" in told and "Traceback" not in told


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_memory_that_runs_out_is_a_sentence(error, capsys):
    evaluate = cli.command_class("evaluate")
    with mock.patch.object(evaluate, "run", side_effect=error):
        assert cli.run_command(["evaluate", "none"]) == 1
    assert "exhausted" in (told := capsys.readouterr().err) and "lower --views" in told


def test_real_allocations_that_fail():
    for allocate in (
        lambda: torch.empty(2**45),
        lambda: bytearray(2**60),
        lambda: torch.empty(2**62),
    ):
        with pytest.raises(RunError, match="the memory is exhausted.*: lower it$"):
            with memory_errors("lower it"):
                allocate()
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("lower it"):
        raise RuntimeError("shapes differ")
