"""Damaged files of every kind, read by commands: the right result, or a sentence.

`FUZZ=2000` damages as many files, by default 150. `FUZZ_SEED` is the seed of all, `FUZZ_KINDS` some
of the kinds, separated by commas, and `FUZZ_ONLY` the number of one file to repeat."""

import contextlib
import fnmatch
import json
import os
import random
import re
import resource
import shutil
import stat
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from command_line import Hang, call, quick_commands
from damage import Damage, damage
from peft import LoraConfig, get_peft_model_state_dict
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image
from safetensors.torch import save_file
from test_faults_corpora import hyper_state
from torch import nn

from scaledreamer.commands import cli, make_prior
from scaledreamer.core.files import read_text_file
from scaledreamer.core.settings import RunError
from scaledreamer.core.tensors import seed_everything
from scaledreamer.grids import commands as grid_commands
from scaledreamer.grids.named_grids import EXPERIMENTS
from scaledreamer.grids.grid import Grid, seed_axis
from scaledreamer.noise_error.error import ErrorCurve
from scaledreamer.prior.embedding_build import TextEncoding
from scaledreamer.prior.embedding_shards import DamagedShard
from scaledreamer.prior.embedding_store import EmbeddingStore, read_store_rows
from scaledreamer.prior.pipelines import quiet, random_pipeline, random_unet
from scaledreamer.recipes import tiny_clip, tiny_sd_recipe, tiny_sd_training
from scaledreamer.recipes.tiny_clip import make_clip, save_clip
from scaledreamer.training.run_folder import read_run_settings
from scaledreamer.training.run_logs import read_rows
from scaledreamer.training.trainer import open_run, run_training

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes, links and devices of POSIX")

TEXTS = ["a red ball", "a blue cube"]
MANY = [*TEXTS, "a red cube", "a blue ball", "a ball", "a cube"]
STEPS, STOPPED = 4, 3  # of the whole run, and of the one that is damaged
SMALL = "--generator ingp --prompts-per-step 1 --resolution 8 --log-every 1 --eval-views 0 "
SMALL += "--distill.view-prompting plain"
RUN = f"train --prior mixture {SMALL} --steps {STEPS} --validate-every 2 --checkpoint-every 2"
ONE = f"train {SMALL} --steps 1 --out new"
CURVE = "curve --out c.json --prior prior --corpus two.json --images vsd --each 1 --timesteps 3"
RECIPE = "make-prior --out made --steps 2 --batch 4 --images 12 --decoder-steps 1 --clip-steps 1"


# ---------------------------------------------------------------- what is damaged


def corpora(home: Path) -> None:
    "Corpora in all formats."
    (home / "corpora").mkdir()
    rows = [{"id": i, "text": text, "split": "train"} for i, text in enumerate(MANY)]
    rows[-1]["split"] = "val"
    lines = [json.dumps(row) + "\n" for row in rows]
    contents = {
        "prompts.txt": "\n".join(MANY) + "\n",
        "prompts.json": json.dumps({"train": MANY[:-1], "val": MANY[-1:]}),
        "rows.json": json.dumps(rows, indent=1),
        "prompts.jsonl": "".join(lines),
        "prompts.ndjson": "".join(json.dumps(text) + "\n" for text in MANY),
        "prompts.csv": "id,text,split\n"
        + "".join(f'{i},"{t}",train\n' for i, t in enumerate(MANY)),
        "prompts.tsv": "id\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(MANY)),
        "prompts.yaml": yaml.safe_dump({"train": MANY[:-1], "val": MANY[-1:]}),
        "rows.yml": yaml.safe_dump(rows),
    }
    for name, content in contents.items():
        (home / "corpora" / name).write_text(content)
    columns = {"text": MANY, "split": ["train"] * len(MANY), "id": [*range(len(MANY))]}
    pq.write_table(pa.table(columns), home / "corpora/prompts.parquet", row_group_size=2)


def two(home: Path) -> None:
    (home / "two.json").write_text(json.dumps(TEXTS))


def run(home: Path) -> None:
    "A run folder with three of its four steps, evaluated, and the lock of a process that died."
    settings, done = cli.parse(f"{RUN} --corpus two.json".split()).settings, []
    stop = lambda: len(done) == STOPPED
    on_step = lambda *step: done.append(step)
    run_training(home / "run", settings, stop=stop, on_step=on_step, show=False)
    for name in ("eval.json", "report.html", "views/0000/000.png", "meshes/0000.glb", ".lock"):
        (home / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "run" / name).write_text("{}")


def prior(home: Path) -> None:
    "A pipeline of random weights."
    seed_everything(0)
    with quiet():
        random_pipeline().save_pretrained(home / "prior")


def store(home: Path) -> None:
    "Embeddings in shards of two texts, and the lock of a process that died."
    (home / "many.json").write_text(json.dumps(MANY))
    assert call(*"embed many.json --prior prior --out store".split()).code == 0
    (found,) = (home / "store").iterdir()
    (found / ".lock").write_text("process 1 on nowhere\n")


def grid(home: Path) -> None:
    "Two trainings that have ended, and the table of both."
    assert call(*"experiment fronts --out grid".split()).code == 0


def made(home: Path) -> None:
    "The first of two steps of a recipe."
    with pytest.MonkeyPatch.context() as patch:
        step = lambda tiny, folder, show=True: (
            tiny.step() and tiny_sd_recipe.save_training(tiny, folder)
        )
        patch.setattr(tiny_sd_recipe, "train_tiny", step)
        assert call(*RECIPE.split()).code == 0
    shutil.rmtree(home / "made/tiny-sd")


def curve(home: Path) -> None:
    "What an interrupted measurement keeps: images, LoRA, one curve, and a part of another."
    save = ErrorCurve.save

    def stop(self, path):
        if path.name == "c.json":
            raise KeyboardInterrupt
        save(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ErrorCurve, "save", stop)
        assert call(*CURVE.split(), "--steps", "2").code == 130


def released(home: Path) -> None:
    "A released checkpoint as a pickle with its configuration, and as tensors alone."
    state, dims = hyper_state([8], [8], text=16)
    for name in ("ckpts", "configs"):
        (home / name).mkdir()
    torch.save({"state_dict": state, "global_step": 7}, home / "ckpts/last.ckpt")
    config = {"system": {"geometry": {"hypernet_config": {"out_dims": dims}}}}
    (home / "configs/parsed.yaml").write_text(yaml.safe_dump(config))
    save_file(state, home / "bare.safetensors")


def clip(home: Path) -> None:
    "An open_clip model of random weights."
    small = {"text_cfg": {**tiny_clip.CONFIG["text_cfg"], "width": 8, "heads": 1, "layers": 1}}
    small["vision_cfg"] = {**tiny_clip.CONFIG["vision_cfg"], "layers": [1, 1, 1, 1], "width": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_clip, "CONFIG", {"embed_dim": 16} | small)
        save_clip(make_clip(), home / "clip")


def lora(home: Path) -> None:
    "A LoRA of random weights for the attention of the pipeline's U-Net."
    unet = random_unet()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"]))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    (home / "lora").mkdir()
    StableDiffusionPipeline.save_lora_weights(home / "lora", state)


def single(home: Path) -> None:
    "Priors in one file, which hold too little."
    tensors = {f"{name}.weight": torch.ones(2, 3) for name in ("model", "first_stage_model")}
    save_file(tensors, home / "one.safetensors")
    torch.save({"state_dict": tensors}, home / "one.ckpt")


def results(home: Path) -> None:
    "Results of earlier commands."
    (home / "toy").mkdir()
    (home / "toy/toy.json").write_text('{"steps": 1}')
    (home / "mesh.ply").write_text("ply\n")
    (home / "turn.gif").write_bytes(b"GIF89a")
    (home / "old").write_text("a file")
    (home / "old.json").write_text("{}")


PARTS: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    # part: what makes it, what it is in the folder, the parts that it needs
    "corpora": (corpora, ["corpora"], []),
    "two": (two, ["two.json"], []),
    "run": (run, ["run"], ["two"]),
    "prior": (prior, ["prior"], ["two"]),
    "store": (store, ["store", "many.json"], ["prior"]),
    "grid": (grid, ["grid"], []),
    "made": (made, ["made"], []),
    "curve": (
        curve,
        ["c.partial.jsonl", "c.vsd.safetensors", "c.finetuned.json"],
        ["prior", "two"],
    ),
    "released": (released, ["ckpts", "configs", "bare.safetensors"], ["prior", "two"]),
    "clip": (clip, ["clip"], ["run", "two"]),
    "lora": (lora, ["lora"], ["prior", "two"]),
    "single": (single, ["one.safetensors", "one.ckpt"], ["two"]),
    "results": (results, ["toy", "mesh.ply", "turn.gif", "old", "old.json"], ["run", "two"]),
}


# ---------------------------------------------------------------- what reads it


@dataclass(frozen=True)
class Kind:
    "Files that are damaged, the commands that read them, and what these may write."

    part: str
    files: tuple[str, ...]  # patterns
    commands: tuple[str, ...]  # {} is the file that is damaged
    writes: tuple[str, ...] = ()  # patterns of files that are the commands' own output
    often: int = 1
    whole: bool = True  # whether the commands end with 0 where nothing is damaged


RESUME, AGAIN = f"{RUN} --corpus two.json --out run --resume", f"{ONE} --config run"
EXPORT, EVALUATE = "export run --prompt 0 --to new.ply --resolution 8", "evaluate run --views 1"
OF_RUN = (RESUME, RESUME, EXPORT, EXPORT, EVALUATE)
RUN_FILES = ("run/config.json", "run/*.jsonl", "run/validation/*", "run/checkpoints/000004/*")
RUN_FILES += ("run/texts.safetensors", "run/eval.json", "run/report.html", "run/views/*")
RUN_FILES += ("run/meshes/*", "run/.lock")
EMBED = "embed two.json --prior prior --out new"
USE_STORE = f"{ONE} --corpus many.json --prior prior --embeddings store"
GRID_FILES = ("grid/results.parquet", "grid/grid.json", "grid/*/eval.json", "grid/logs/*")
MADE = ("made/state.*", "made/samples/*", "made/tiny-sd/*", "made/clip/tiny-clip/*")
IMPORT = "--out new --prior prior --corpus two.json"
READS_PRIOR = ("corpus two.json --prior prior", EMBED, f"{ONE} --corpus two.json --prior prior")
KINDS = {
    "corpus": Kind(
        "corpora",
        ("corpora/*",),
        ("corpus {}", "corpus {}", f"{ONE} --corpus {{}} --prior mixture"),
        often=3,
        whole=False,
    ),
    "config": Kind("run", ("run/config.json",), (*OF_RUN, AGAIN, AGAIN), RUN_FILES, 2),
    "manifest": Kind("run", ("run/prompts.jsonl", "run/texts*"), OF_RUN, RUN_FILES, 2),
    "checkpoint": Kind("run", ("run/checkpoints/*",), OF_RUN, RUN_FILES, 3),
    "log": Kind("run", ("run/*s.jsonl", "run/.lock"), OF_RUN, RUN_FILES, 2),
    "run folder": Kind("run", ("run/*",), OF_RUN, RUN_FILES),
    "store": Kind(
        "store",
        ("store/*",),
        ("embed many.json --prior prior --out store", USE_STORE),
        ("store/*/index.json", "store/*/.lock"),
        3,
    ),
    "grid": Kind(
        "grid",
        ("grid/*.*", "grid/logs*", "grid/out*"),
        ("experiment fronts --out grid",),
        GRID_FILES,
        2,
    ),
    "evaluation": Kind(
        "grid", ("grid/*/eval.json",), ("experiment fronts --out grid",), GRID_FILES
    ),
    "recipe": Kind("made", ("made/*",), (RECIPE,), MADE, 2),
    "prior": Kind("prior", ("prior/*",), READS_PRIOR),
    "curve": Kind("curve", ("c.*",), (f"{CURVE} --steps 2",), ("c.partial.jsonl",)),
    "released": Kind(
        "released",
        ("ckpts/*", "configs/*", "bare*"),
        (f"import-weights ckpts/last.ckpt {IMPORT}", f"import-weights bare.safetensors {IMPORT}"),
    ),
    "clip": Kind("clip", ("clip/*",), ("evaluate run --views 1 --clip clip",), RUN_FILES),
    "lora": Kind("lora", ("lora/*", "lora"), (f"{EMBED} --prior-settings.lora lora",)),
    "single file": Kind("single", ("one.*",), ("corpus two.json --prior {}",), whole=False),
    "result": Kind(
        "results",
        ("toy", "toy/*", "*.ply", "*.gif", "old*"),
        (
            "toy points --out toy --seeds 1 --steps 1 --count 2 --methods sds",
            "export run --prompt 0 --to mesh.ply --resolution 8",
            "export run --prompt 0 --to turn.gif --resolution 8",
            f"{RUN} --corpus two.json --out old",
            "curve --out old.json --prior mixture --corpus two.json --each 1 --timesteps 2",
        ),
        ("mesh.ply", "turn.gif"),
        whole=False,
    ),
}


class Files:
    "The whole files, each part made when it is first needed, and never changed."

    def __init__(self, home: Path) -> None:
        self.home, self.names, self.sums = home, {}, {}

    def need(self, part: str) -> list[str]:
        "The entries of a part and of those that it needs, which are made."
        if part not in self.names:
            make, entries, needed = PARTS[part]
            names = [name for other in needed for name in self.need(other)]
            with contextlib.chdir(self.home):
                make(self.home)
            shutil.rmtree(self.home / "new", ignore_errors=True)
            self.names[part] = [*dict.fromkeys([*names, *entries])]
            for name in entries:
                self.sums |= sums(self.home / name)
        return self.names[part]

    def copy(self, part: str, place: Path) -> None:
        "Large files are hard links, which nothing may write to."

        def link(source: str, target: str) -> None:
            (os.link if os.path.getsize(source) > 1 << 15 else shutil.copy2)(source, target)

        names = self.need(part)
        place.mkdir(exist_ok=True)
        for name in names:
            source = self.home / name
            if source.is_dir():
                shutil.copytree(source, place / name, copy_function=link)
            else:
                link(source, place / name)


def sums(place: Path) -> dict[Path, int]:
    "CRC-32 of a file, or of all files in a folder."
    paths = place.rglob("*") if place.is_dir() else [place]
    return {path: zlib.crc32(path.read_bytes()) for path in paths if path.is_file()}


# ---------------------------------------------------------------- what must hold


@dataclass(frozen=True)
class Case:
    "One damaged file, and the command that reads it."

    number: int
    kind: str
    damage: Damage
    command: str
    place: Path  # the folder with everything

    def __str__(self) -> str:
        return f"{self.number} {self.kind}: {self.command}: {self.damage}"


def state_of(place: Path) -> dict[str, tuple[int, int, int]]:
    "What tells whether a file was written to, for each file in a folder."
    found = {}
    for path in place.rglob("*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            found[str(path.relative_to(place))] = (
                status.st_ino,
                status.st_size,
                status.st_mtime_ns,
            )
    return found


def lost_files(case: Case, before: dict[str, tuple], whole: Files) -> list[str]:
    "Files that were whole, are no output of the command, and whose content is nowhere now."
    kind, now = KINDS[case.kind], state_of(case.place)
    lost = []
    for name, status in before.items():
        own = any(fnmatch.fnmatch(name, pattern) for pattern in kind.writes)
        if now.get(name) == status or own or name == case.damage.file:
            continue
        crc, size = whole.sums.get(whole.home / name), status[1]
        alike = (case.place / other for other, (_, length, _) in now.items() if length == size)
        if crc is not None and crc not in {zlib.crc32(path.read_bytes()) for path in alike}:
            lost.append(name)
    return lost


def check_words(lines: list[str], said: list[str], code: int) -> None:
    "One sentence is the last line of what fails; no line is of Python."
    assert code in (0, 1, 2), f"exit code {code}"
    if code:
        assert said and lines[-1] == said[-1], "no sentence"
    for line in said:
        assert line.isprintable() and len(line) < 1000, "no sentence in one line"
        assert not re.search(r"Traceback|<class |object at 0x|\bErrno\b", line), "words of Python"
    assert not [line for line in lines if "Traceback" in line], "a traceback"


class Oracle:
    "What a run folder and a store give when a command says that all went well."

    def __init__(self, whole: Files, place: Path) -> None:
        whole.need("run")
        self.known = self.settings(whole.home / "run")
        self.meshes, self.stored = {}, None
        for step in (2, 3):
            whole.copy("run", home := place / f"at{step}")
            if step == 2:
                shutil.rmtree(home / "run/checkpoints/000003")
            with contextlib.chdir(home):
                assert call(*EXPORT.split()).code == 0
            self.meshes[step] = (home / "new.ply").read_bytes()
        assert self.meshes[2] != self.meshes[3]
        with contextlib.chdir(home):
            assert call(*RESUME.split()).code == 0
        self.rows = read_rows(home / "run/metrics.jsonl", "step")
        self.weights = weights(open_run(home / "run"))
        assert [row["step"] for row in self.rows] == [*range(STEPS)]

    @staticmethod
    def settings(folder: Path) -> tuple | None:
        "What decides the result of a run; None where that cannot be read."
        free = {"log_every": 1, "validate_every": 2, "checkpoint_every": 2, "steps": STEPS}
        try:
            found = replace(read_run_settings(folder), **free, device="cpu", corpus="")
            return found, read_text_file(folder / "prompts.jsonl")
        except RunError:
            return None

    def check_run(self, case: Case, same: bool, said: list[str]) -> None:
        folder = case.place / "run"
        if case.command == EXPORT and same:
            older = any("the checkpoint of step 2 is used" in line for line in said)
            older |= not (folder / "checkpoints/000003").exists()
            mesh = (case.place / "new.ply").read_bytes()
            assert mesh == self.meshes[2 if older else 3], "another mesh"
        if case.command == RESUME:
            last = open_run(folder)
            assert last.step == STEPS and torch.equal(weights(last), self.weights), "other weights"
            if not case.damage.file.startswith("run/metrics"):
                assert read_rows(folder / "metrics.jsonl", "step") == self.rows, "other metrics"
        if case.command == EVALUATE:
            assert json.loads((folder / "eval.json").read_text())["sim"] == 0.5

    def check_store(self, case: Case, whole: Files) -> None:
        "All rows are right, but those of a shard whose damage shows when it is read."
        if self.stored is None:
            whole.copy("store", home := case.place.parent / "stored")
            with contextlib.chdir(home):
                assert call(*USE_STORE.split()).code == 0
            self.stored = weights(open_run(home / "new"))
        if case.command == USE_STORE:
            assert torch.equal(weights(open_run(case.place / "new")), self.stored), "other weights"
            return
        (name,) = {path.name for path in (whole.home / "store").iterdir()}
        exact, found = (EmbeddingStore(home / "store" / name) for home in (whole.home, case.place))
        assert not found.damaged
        for text, row in zip(MANY, found.find(MANY)):
            try:
                ours, theirs = (read_store_rows(x, x.find([text])) for x in (found, exact))
                assert row >= 0 and torch.equal(ours.tokens, theirs.tokens), "other embeddings"
            except DamagedShard as error:
                assert case.damage.file.endswith(error.file)


def weights(run) -> torch.Tensor:
    return torch.cat([value.flatten() for value in run.generator.state_dict().values()])


# ---------------------------------------------------------------- all of it


class Ended:
    "In place of a training in a process of its own: it has ended, and has written its evaluation."

    def __init__(self, words: list[str], **options) -> None:
        out = Path(words[words.index("--out") + 1])
        out.mkdir(exist_ok=True)
        row = {"id": "0000", "text": TEXTS[0], "sim": 0.5, "volume_iou": 0.25}
        (out / "eval.json").write_text(json.dumps({"step": 1, "sim": 0.5, "per_prompt": [row]}))
        self.returncode = 0

    def poll(self) -> int:
        return 0


GRID = Grid(
    "Two methods.",
    {"prompt": TEXTS[:1], "steps": 1},
    {"seed": seed_axis([0]), "method": {"ASD": {"method": "asd"}, "SDS": {"method": "sds"}}},
)


@pytest.fixture(scope="module")
def quick():
    "Networks of a recipe that are small, trainings of a grid that are none, and quick commands."
    with pytest.MonkeyPatch.context() as patch:
        quick_commands(patch)
        patch.setattr(TextEncoding, "texts_per_shard", 2)
        patch.setitem(EXPERIMENTS, "fronts", lambda: GRID)
        streams = {"DEVNULL": 0, "STDOUT": 0}
        patch.setattr(grid_commands, "subprocess", SimpleNamespace(Popen=Ended, **streams))
        networks = {"text_encoder": nn.Linear(3, 2), "unet": nn.Linear(2, 3)}
        copy = lambda *_: nn.ModuleDict({k: deepcopy(v) for k, v in networks.items()})
        patch.setattr(tiny_sd_training, "make_networks", copy)
        patch.setattr(tiny_sd_training, "training_loss", lambda tiny, *_: network_sum(tiny))
        patch.setattr(tiny_sd_recipe, "sample_sheet", lambda *_: Image.new("RGB", (1, 1)))
        patch.setattr(
            tiny_sd_recipe, "save_pipeline", lambda _, folder: folder.mkdir(exist_ok=True)
        )
        patch.setattr(tiny_clip, "make_clip", lambda: None)
        patch.setattr(tiny_clip, "save_clip", lambda _, folder: folder.mkdir(exist_ok=True))
        patch.setattr(tiny_clip, "train_clip", lambda *_, **__: None)
        few = partial(tiny_clip.make_tiny_clip, images=12)
        patch.setattr(make_prior, "make_tiny_clip", few)
        yield patch


def network_sum(tiny) -> torch.Tensor:
    "A loss that has a gradient for every weight."
    return sum(value.square().sum() for value in tiny.net.parameters())


def names_of(place: Path, patterns: tuple[str, ...]) -> list[str]:
    "Files and folders that match; * matches a slash, too."
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    return [name for name in names if any(fnmatch.fnmatch(name, one) for one in patterns)]


def make_case(number: int, kind: str, place: Path, whole: Files, canary: Path) -> Case:
    "A copy of the files in `place`, one of them damaged."
    rng = random.Random(f"{os.environ.get('FUZZ_SEED', 0)}/{number}")
    whole.copy(KINDS[kind].part, place)
    found = damage(place, names_of(place, KINDS[kind].files), rng, canary)
    first, commands = found.file.split("/")[0], [c.format(found.file) for c in KINDS[kind].commands]
    own = [c for c in commands if first in {word.split("/")[0] for word in c.split()}]
    return Case(number, kind, found, rng.choice(own or commands), place)


def run_case(case: Case, whole: Files, oracle: Oracle, canary: Path) -> int:
    "The exit code of a case. Raises for what must not be."
    before, known = state_of(case.place), oracle.settings(case.place / "run")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.chdir(case.place):
        called = call(*case.command.split())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert memory < 1 << 20, f"{memory / 1e6:.1f} GB of memory"
    assert not canary.exists(), "code was run"
    check_words(called.lines, called.said, called.code)
    lost = lost_files(case, before, whole)
    assert not lost, f"lost: {lost}"
    if called.code == 0 and KINDS[case.kind].part == "run":
        oracle.check_run(case, known == oracle.known, called.said)
    if called.code == 0 and case.kind == "store":
        oracle.check_store(case, whole)
    return called.code


def failure(case: Case, error: BaseException) -> str:
    "What is wrong with a case, and where in the package."
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "/scaledreamer/" in f.filename]
    return f"{case}\n    {type(error).__name__} {str(error)[:300]} {' '.join(ours[-4:])}"


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    "The files that are copied and damaged."
    return Files(tmp_path_factory.mktemp("whole"))


def test_the_commands_read_what_is_whole(whole, tmp_path):
    "Otherwise a damaged file would prove nothing."
    kinds = [KINDS[name] for name in os.environ.get("FUZZ_KINDS", ",".join(KINDS)).split(",")]
    commands = {(kind.part, c) for kind in kinds for c in kind.commands if kind.whole}
    for i, (part, command) in enumerate(sorted(commands)):
        whole.copy(part, place := tmp_path / str(i))
        with contextlib.chdir(place):
            called = call(*command.split())
        assert called.code == 0, f"{command}: {called.lines}"


def test_damaged_files_give_the_right_result_or_one_sentence(whole, tmp_path):
    canary, oracle = tmp_path / "executed", Oracle(whole, tmp_path)
    kinds = os.environ.get("FUZZ_KINDS", ",".join(k for k in KINDS for _ in range(KINDS[k].often)))
    kinds, only = kinds.split(","), os.environ.get("FUZZ_ONLY")
    numbers = [int(only)] if only else range(int(os.environ.get("FUZZ", 150)))
    counts, damages, problems = Counter(), Counter(), []
    for number in numbers:
        case = make_case(number, kinds[number % len(kinds)], tmp_path / "case", whole, canary)
        try:
            outcome = f"exit {run_case(case, whole, oracle, canary)}"
        except KeyboardInterrupt:
            raise
        except (Exception, Hang, SystemExit) as error:
            outcome = "wrong"
            problems.append(failure(case, error))
            print(problems[-1], flush=True)
        counts[case.kind, outcome] += 1
        damages[case.damage.kind, outcome] += 1
        if not only:
            shutil.rmtree(case.place)
    print(table(counts), table(damages), sep="\n")
    broken = [str(path) for path, crc in whole.sums.items() if zlib.crc32(path.read_bytes()) != crc]
    assert not broken, f"written to: {broken}"
    assert not problems, f"{len(problems)} of {len(numbers)}\n" + "\n".join(problems)


def table(counts: Counter) -> str:
    "How often each kind ended how."
    outcomes = sorted({outcome for _, outcome in counts})
    row = lambda name, values: f"{name:<12}" + "".join(f"{value:>8}" for value in values)
    kinds = sorted({kind for kind, _ in counts})
    lines = [row(kind, (counts[kind, outcome] for outcome in outcomes)) for kind in kinds]
    total = (sum(counts[kind, outcome] for kind in kinds) for outcome in outcomes)
    return "\n".join([row("", outcomes), *lines, row("all", total)])
