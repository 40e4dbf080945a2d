"""The command line in all places where people type: encodings, pipes, terminals, prompts, paths."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from scaledreamer.commands import cli
from scaledreamer.commands.arguments import path_options
from scaledreamer.commands.cli import overview, parse, run_command
from scaledreamer.commands.shared import check_place
from scaledreamer.core.settings import UsageError
from scaledreamer.generator.ingp import INGP, INGPSettings
from scaledreamer.prior.prior_settings import PriorSettings
from scaledreamer.training.checkpoints import checkpoint_steps
from scaledreamer.training.corpora import number_prompts
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import open_run, run_training

QUICK = (
    "--prior mixture --generator ingp --prompts-per-step 1 --resolution 8 --eval-views 0 "
    "--render.eikonal-samples 16"
).split()
ROOT = Path(__file__).resolve().parent.parent


def shell(command: str, folder: Path, **environ: str) -> subprocess.CompletedProcess:
    "A bash command in which $S is scaledreamer; bytes are captured."
    variables = {"S": f"{sys.executable} -m scaledreamer", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | variables | environ,
        capture_output=True,
    )


def refused(*argv: str, capsys) -> str:
    "The sentence of a command that is refused for its arguments."
    assert run_command(list(argv)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("scaledreamer: ") and "\n" not in error
    return error


# output


SAID = "a red 車 in Zürich"
SAYS = f"""
import sys
from scaledreamer.commands.streams import open_streams
open_streams()
print({SAID!r}, flush=True)
print({SAID!r}, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", SAID.encode()),
        ("cp1252", rb"a red \u8eca in Z" + b"\xfcrich"),
        ("cp932", "a red 車 in Z".encode("cp932") + rb"\xfcrich"),
        ("ascii", rb"a red \u8eca in Z\xfcrich"),
        ("ascii:replace", b"a red ? in Z?rich"),
    ],
)
def test_output_that_is_not_utf8(encoding, expected):
    environ = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", SAYS], env=environ, capture_output=True)
    assert (done.returncode, done.stdout) == (0, expected + b"\n")
    assert done.stderr.isascii() == ("ascii" in encoding) and b"red" in done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_help_and_errors_in_any_encoding(encoding, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit, match="0"):
        run_command(["train", "--help"])
    assert run_command(["train", "--steps", "many"]) == 2
    printed = [
        stream.buffer.getvalue().decode(encoding) for stream in streams if not stream.flush()
    ]
    assert "--prompts-per-step" in printed[0] and printed[1].count("\n") == 1


def test_a_closed_pipe_is_quiet_and_training_goes_on(tmp_path):
    (tmp_path / "車.txt").write_text("a red car\n", encoding="utf-8")
    train_argv = " ".join(["$S train --corpus 車.txt --steps 2 --out run", *QUICK])
    done = shell(
        f"{train_argv} 2>&1 | true; echo ${{PIPESTATUS[0]}}", tmp_path, PYTHONUNBUFFERED="1"
    )
    assert (done.stdout, done.stderr) == (b"0\n", b"")
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]


def test_pipes_and_full_disks(tmp_path):
    done = shell(
        "$S --help | head -1; $S --version >&-; echo $?; $S doctor > /dev/full; echo $?",
        tmp_path,
        PYTHONUNBUFFERED="1",
    )
    assert done.stdout.splitlines() == [overview().splitlines()[0].encode(), b"0", b"1"]
    assert done.stderr == b"scaledreamer: stdout cannot be written (No space left on device)\n"


# progress


def logged(tmp_path, *argv: str) -> str:
    "What three steps of training write to stderr."
    (tmp_path / "car.txt").write_text("a red car\n", encoding="utf-8")
    command = ["train", "--corpus", str(tmp_path / "car.txt"), "--steps", "3", *QUICK, *argv]
    assert run_command([*command, "--out", str(tmp_path / f"run{len(argv)}")]) == 0


def test_progress_without_a_terminal_is_whole_lines(tmp_path, capsys, monkeypatch):
    logged(tmp_path)
    printed = capsys.readouterr()
    assert "\r" not in printed.err and "\r" not in printed.out
    lines = [line for line in printed.err.splitlines() if line.startswith("sds")]
    assert lines[0] == "sds: 0 of 3" and re.match(r"sds: 3 of 3, 0:\d\d, norm \d", lines[-1])
    assert printed.out.splitlines()[-1] == f"run: {tmp_path / 'run0'}"


def test_no_progress_if_tqdm_is_disabled(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    logged(tmp_path)
    assert capsys.readouterr().err == ""


def test_quiet_leaves_the_last_line(tmp_path, capsys):
    logged(tmp_path, "--quiet")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (f"run: {tmp_path / 'run1'}\n", "")
    assert "TQDM_DISABLE" not in os.environ
    for argv in (["--quiet", "doctor"], ["doctor", "-q"]):
        assert run_command(argv) == 0
        assert capsys.readouterr().out.startswith("doctor: everything")
    assert "--quiet" in overview()


BAR = """
from scaledreamer.core.progress import progress_bar
for _ in progress_bar(range(3), desc="asd"):
    pass
"""


def test_a_terminal_has_the_bar():
    parent, child = pty.openpty()
    done = subprocess.run([sys.executable, "-c", BAR], stdout=child, stderr=child)
    os.close(child)
    shown = b""
    while select.select([parent], [], [], 1)[0]:
        try:
            shown += os.read(parent, 10_000)
        except OSError:  # its end, on Linux
            break
    os.close(parent)
    assert done.returncode == 0 and b"\r" in shown and b"asd: 100%" in shown, shown


# arguments


@dataclass
class Options:
    json: Path | None = None
    prior: str = "tiny-sd"
    text: str = ""


def test_a_home_folder_in_every_path(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = "--out=~/x --corpus ~/c.txt --prior=~/sd --steps 3".split()
    options = parse(["train", *argv])
    assert options.out == tmp_path / "x"
    assert options.settings.corpus == f"{tmp_path}/c.txt"
    assert options.settings.prior == f"{tmp_path}/sd"
    export = parse(["export", "~/run", "--prompt", "~ tilde", "--to", "~/m.glb"])
    assert (export.folder, export.to) == (tmp_path / "run", tmp_path / "m.glb")
    assert export.prompt == "~ tilde"
    assert parse(["evaluate", "~/run", "--clip=~/clip"]).clip == (f"{tmp_path}/clip",)
    weights = parse(["import-weights", "~/a.ckpt", "--out", "~/b"])
    assert (weights.file, weights.out) == (tmp_path / "a.ckpt", tmp_path / "b")
    assert path_options(Options) == {"json", "prior"}  # by type, or by the name of a text
    assert "no home of 'no-such-user'" in refused("evaluate", "~no-such-user/run", capsys=capsys)
    for option in ("--out", "--prior", "--corpus", "--clip"):
        assert f"{option} is empty" in refused("train", option, "", capsys=capsys)


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        (["--prompt", "a red car"], ["a red car"]),
        (["--prompt", "a red car", "a blue house"], ["a red car", "a blue house"]),
        (["--prompt", "a red car", "--prompt=a blue house"], ["a red car", "a blue house"]),
    ],
)
def test_prompts_are_trained_resumed_and_opened(typed, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", *typed, "--steps", "1", *QUICK]
    folder = parse(command).folder
    name = "_".join(text.replace(" ", "-") for text in texts)
    assert folder == Path(f"runs/{name}-ingp-sds-0")
    if len(texts) == 1 or "--prompt=a blue house" in typed:
        assert run_command(command) == 0
        assert [prompt.text for prompt in open_run(folder).prompts] == texts
        assert run_command([*command, "--resume"]) == 0
        assert json.loads((folder / "config.json").read_text())["prompt"] == texts


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "a", "--corpus", "toybox-15"], "--prompt and --corpus are both given"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "caf\udce9"], "is not UTF-8"),
    ],
)
def test_prompts_that_are_refused(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused("train", *argv, *QUICK, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_prompt_ids_as_plain_numbers_and_texts_of_digits():
    from scaledreamer.commands.export import prompt_text

    prompts = number_prompts((text, "train") for text in ("42", "1", "a red car"))
    for given, text in (("0000", "42"), ("0", "42"), ("42", "42"), ("2", "a red car")):
        assert prompt_text(given, prompts) == text
    assert prompt_text("1", prompts) == "1"  # a text of the run comes before a number
    assert prompt_text("a green cone", prompts) == "a green cone"
    many = number_prompts((f"car {i}", "train") for i in range(20))
    assert prompt_text("12", many) == prompt_text("0012", many) == "car 12"
    with pytest.raises(UsageError, match="'20': expected an id from 0000 to 0019, or a text"):
        prompt_text("20", many)
    with pytest.raises(UsageError, match="'9': expected the id 0000, or a text"):
        prompt_text("9", many[:1])
    with pytest.raises(UsageError, match="expected the id 0000"):
        prompt_text("9" * 5000, many[:1])


# what is checked before the work


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that nobody may write")
def test_a_place_that_cannot_be_written_is_told_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("scaledreamer.training.trainer.build", lambda *a: pytest.fail("worked"))
    sentence = refused("train", "--out", "/sys/x/run", *QUICK, capsys=capsys)
    assert "--out is /sys/x/run: nothing can be written to /sys" in sentence
    assert "--out" in refused("toy", "points", "--out", "/sys/x", capsys=capsys)
    assert "--out" in refused("curve", "--out", "/sys/x.json", capsys=capsys)
    to = ("--prompt", "0", "--to", "/sys/x.glb")
    assert "--to is /sys/x.glb: nothing can" in refused("export", "run", *to, capsys=capsys)
    assert "name is too long" in refused("train", "--out", "x" * 300, *QUICK, capsys=capsys)
    check_place(tmp_path / "a" / "b", "--out")
    assert not list(tmp_path.iterdir())


def test_compilation_without_a_compiler_is_refused_before_the_folder(tmp_path, monkeypatch, capsys):
    def compile(function):
        raise RuntimeError("No working C++ compiler found\nhints for developers")

    monkeypatch.setattr(torch, "compile", compile)
    out = tmp_path / "run"
    argv = ["train", "--prompt", "a red car", "--prior-settings.compile", "--eval-views", "0"]
    sentence = refused(*argv, "--out", str(out), capsys=capsys)
    assert "(No working C++ compiler found): install a C++ compiler" in sentence
    assert not out.exists()
    assert PriorSettings().dtype_on("cpu") == torch.float32  # nothing is compiled


class Tied(INGP):
    "A generator in which a module has two names."

    def __init__(self, width: int) -> None:
        super().__init__(INGPSettings())
        self.again = self.encoder
        self.both = nn.ModuleList([self.encoder, self.encoder])


def test_weights_under_two_names_are_saved_once_and_resumed(tmp_path):
    settings = dict(prior="mixture", prompt=("a red car",), generator="mine", prompts_per_step=1)
    settings |= dict(resolution=8, checkpoint_every=1)
    whole = TrainSettings(steps=3, **settings)
    run = run_training(tmp_path / "whole", whole, make_generator=Tied, show=False)
    stop = iter([False, True])
    options = {"make_generator": Tied, "show": False}
    run_training(tmp_path / "cut", whole, stop=lambda: next(stop), **options)
    resumed = run_training(tmp_path / "cut", whole, resume=True, **options)
    opened = open_run(tmp_path / "cut", make_generator=Tied).generator
    assert resumed.step == run.step == 3
    assert opened.again is opened.encoder
    for ours, other, theirs in zip(
        run.generator.parameters(), opened.parameters(), resumed.generator.parameters()
    ):
        assert torch.equal(ours, theirs) and torch.equal(ours, other)


# the entry point


def test_module_and_version(tmp_path):
    done = shell("$S --version", tmp_path)
    assert done.stdout.decode().strip() == f"scaledreamer {cli.package_version()}"
    assert (ROOT / "scaledreamer/__main__.py").exists()


KILLED = """
import os, signal, sys, time
from scaledreamer.commands import cli, main
def parse(argv):
    class Waits:
        def run(self):
            os.kill(os.getpid(), int(sys.argv[1]))
            time.sleep(10)
    return Waits()
cli.parse = parse
sys.exit(main.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_requests_to_end_are_like_an_interrupt(number):
    "The exit code says which it was, as shells and batch systems expect."
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(int(number))], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (128 + number, "scaledreamer: stopped")


HEAVY = ("diffusers", "transformers", "peft", "open_clip", "scipy", "torchvision")


def test_describing_a_command_imports_no_heavy_library():
    script = f"""
import sys
from scaledreamer.commands.cli import command_class
for name in ("doctor", "train", "curve", "toy", "export", "evaluate"):
    command_class(name)
    print(name, *[library for library in {HEAVY!r} if library in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    described = done.stdout.split("\n")[:-1]
    assert described[:4] == ["doctor", "train", "curve", "toy"], done.stderr
    assert not {"diffusers", "transformers", "open_clip"} & set(" ".join(described).split())
