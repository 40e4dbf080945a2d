"""The command line: a fast overview, help for every option, names of earlier versions."""

import re
import subprocess
import sys

import pytest

from scaledreamer.commands.cli import COMMANDS, command_class, overview, package_version, parse

OWN = {  # options of the commands themselves, not of settings that other modules define
    "train": ("--out", "--resume", "--preset", "--eval-views", "--eval-corpus"),
    "evaluate": ("PATH", "--views", "--corpus", "--clip"),
    "export": ("PATH", "--prompt", "--to", "--resolution"),
    "import-weights": ("PATH", "--out", "--prior", "--corpus", "--device"),
    "curve": (
        *("--out", "--prior", "--corpus", "--images", "--each"),
        *("--timesteps", "--guidance", "--steps", "--seed", "--device"),
    ),
    "toy": (
        *("{points,images}", "--out", "--methods", "--seeds", "--steps", "--count", "--guidance"),
        *("--eta", "--shift", "--prior", "--text", "--defects", "--description"),
    ),
    "experiment": ("[STR]", "--out", "--processes", "--earlier", "--quick", "--list"),
    "embed": ("STR", "--prior", "--out", "--padded", "--device"),
    "corpus": ("STR", "--column", "--corpus-folder", "--prior", "--examples"),
    "make-prior": ("--out", "--clip-steps"),
    "lab": ("--folder", "--port", "--browser"),
    "bench": ("[STR]", "--json", "--device", "--quick", "--list"),
    "doctor": (),
}


def process(*argv: str, after: str = "") -> subprocess.CompletedProcess:
    "`scaledreamer` with these arguments, in a fresh process; `after` is code that runs last."
    script = f"""
import sys
from scaledreamer.commands.main import main
sys.argv[0] = "scaledreamer"
try:
    main()
finally:
    {after or "pass"}
"""
    return subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--version"]])
def test_overview_and_version_import_no_torch(argv):
    done = process(*argv, after="print('torch' in sys.modules)")
    *printed, torch_imported = done.stdout.splitlines()
    assert (done.returncode, done.stderr, torch_imported) == (0, "", "False")
    version = [f"scaledreamer {package_version()}"]
    assert printed == (version if argv == ["--version"] else overview().splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_says_what_the_commands_say(name):
    purpose = command_class(name).__doc__
    assert COMMANDS[name][1] == purpose
    assert re.search(rf"^  {name} +{re.escape(purpose)}$", overview(), re.MULTILINE)


def test_doctor_imports_no_diffusion_and_no_clip_library():
    heavy = "('diffusers', 'transformers', 'open_clip')"
    done = process("doctor", after=f"print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.splitlines()[-1] == "[]" and "weights tiny-sd: found" in done.stdout


def help_of(name: str, capsys) -> dict[str, str]:
    "The help text of each option."
    with pytest.raises(SystemExit):
        parse([name, "--help"])
    found, option = {}, None
    for line in capsys.readouterr().out.splitlines():
        words = line.strip("│╭╰╮╯─ ").split()
        if line[:2] in ("│ ", "  ") and line[2:3].strip():  # the second column of a box or a list
            option = words.pop(0).rstrip(",")
            found[option] = ""
        if option:
            found[option] += " ".join(["", *words])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name, capsys):
    help_texts = help_of(name, capsys)
    for option in OWN[name]:
        explained = re.sub(r"\((default: .*|required)\)", "", help_texts[option])
        explained = re.sub(r"^\s*\S*[A-Z|{}]+\S*", "", explained).strip()  # its placeholder
        assert len(explained) > 15, f"{name} {option}: {explained!r}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--render.looks 20", "--render.proposal-probes 20"),
        ("--prompts=2 --views 3", "--prompts-per-step 2 --views-per-prompt 3"),
        ("--distill.views words", "--distill.view-prompting words"),
        ("--distill.second_stage 0.5", "--distill.bridge-start 0.5"),
        ("--optim.final=0.5", "--optim.final-lr-factor 0.5"),
        ("--render.sampler guided", "--render.sampler proposal"),
        ("--render.sampler=guided", "--render.sampler proposal"),
    ],
)
def test_options_of_earlier_versions_are_read(old, new):
    assert parse(["train", *old.split()]) == parse(["train", *new.split()])
