"""Nothing that is imported or called changes the state that a process shares."""

import os
import subprocess
import sys

from scaledreamer.core.settings import to_json
from scaledreamer.training.train_settings import TrainSettings

SNAPSHOT = """
import os, random, signal, sys, threading, warnings
import diffusers, matplotlib, numpy, torch, transformers

def snapshot():
    rc = {k: v for k, v in dict.items(matplotlib.rcParams) if k != "backend"}
    return {
        "matplotlib": {name: str(value) for name, value in rc.items()},
        "backend": str(dict.__getitem__(matplotlib.rcParams, "backend")),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch rng": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy rng": hash(str(numpy.random.get_state())),
        "numpy errors": numpy.geterr(),
        "random": hash(random.getstate()),
        "warnings": [str(entry) for entry in warnings.filters],
        "environment": dict(os.environ),
        "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
        "verbosity": [
            (logs.get_verbosity(), logs.is_progress_bar_enabled())
            for logs in (diffusers.utils.logging, transformers.utils.logging)
        ],
        "folder": os.getcwd(),
        "switch": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook, sys.exit),
        "streams": (sys.stdout, sys.stderr),
    }

def differences(before):
    after = snapshot()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    if "warnings" in changed:
        old, new = changed["warnings"]
        changed["warnings"] = {entry for entry in new if entry not in old} or "order or number"
    return changed
"""

LIBRARIES = """
# what these libraries change when they are imported is theirs
import diffusers, transformers, peft, open_clip, skimage.measure, scipy.stats, trimesh, numba, PIL
import imageio, tyro, ipywidgets, anywidget, matplotlib.pyplot, scipy.special, scipy.spatial
import plotly.graph_objects, plotly.subplots, plotly.tools
import tensorboard, wandb, torch.utils.tensorboard, accelerate.tracking
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from torch.utils.flop_counter import FlopCounterMode
"""

IMPORTS = """
import importlib, pkgutil, scaledreamer
torch.manual_seed(5)
before = snapshot()
for module in pkgutil.walk_packages(scaledreamer.__path__, "scaledreamer."):
    if not module.name.endswith(("__main__", "_triton")):
        importlib.import_module(module.name)
changed = differences(before)
assert not changed, ("by an import", changed)
"""

CALLS = """
import tempfile
from dataclasses import replace
from pathlib import Path
import scaledreamer as sd
from scaledreamer.commands.evaluate import evaluate_run
from scaledreamer.core.figures import curves, show_images
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.eval.clip import ClipScorer
from scaledreamer.toy.amortised import PointMaker
from scaledreamer.toy.lockstep_strips import norm_curves
from scaledreamer.toy.point_estimator import PointEstimator
from scaledreamer.toy.points import ring
from scaledreamer.toy.toy_settings import ToySettings
from scaledreamer.training.train_settings import GENERATORS, build_generator

home = Path(tempfile.mkdtemp())
settings = sd.TrainSettings(prior="mixture", prompt=("a red car",), prompts_per_step=1,
    resolution=16, steps=2, log_every=1, distill=DistillSettings(view_prompting="words"))
random.seed(1); numpy.random.seed(2); torch.manual_seed(3)
before = snapshot()

def check(what):
    changed = differences(before)
    assert not changed, (what, changed)

curves([0, 1], {"a": [1, 2]}); show_images(torch.rand(1, 3, 4, 4, generator=sd.make_rng(0)))
check("a figure")
for name in ("hyper-ingp", "ingp", "conv3d", "triplane"):
    build_generator(replace(settings, generator=name), 96)
check("a generator")
run = sd.train(home / "job", settings).wait(show=False)
check("a job")
from scaledreamer.training.trainer import run_training
own = {"method": "vsd", "prior": "tiny-sd", "generator": "ingp"}
run_training(home / "vsd", replace(settings, **own), show=False)
check("vsd")
from scaledreamer.training.save_settings import SaveSettings
tracked = replace(settings, save=SaveSettings(track=("tensorboard", "wandb")))
assert (run_training(home / "tracked", tracked, show=False).folder / "track/wandb").is_dir()
check("trackers")
evaluate_run(run, ClipScorer.load(), views=2)
check("an evaluation")
PointMaker(torch.zeros(2, 3))
PointEstimator(sd.toybox_mixture(["a red car"]).schedule, 1)
world, start = ring(), torch.randn(8, 2, generator=sd.make_rng(0))
toy = ToySettings(steps=4, stride=1)
lockstep = sd.Lockstep(world, {"asd": sd.asd, "sds": sd.sds}, "ring", start, toy).run(2)
norm_curves(lockstep)
check("a toy")
sd.save_mesh(sd.extract_mesh(run.scene(["a red car"]), resolution=16), home / "car.glb")
sd.turntable_frames(run.scene(["a red car"]), views=2, size=16)
check("a mesh and a turntable")
"""

THREE_THREADS = """
import sys, tempfile, threading, torch
import scaledreamer as sd
from pathlib import Path
from scaledreamer.core.settings import from_json
torch.set_num_threads(2)
settings = from_json(sd.TrainSettings, sys.argv[1])
home = Path(tempfile.mkdtemp())
jobs = [sd.train(home / str(i), settings) for i in range(2)]  # compile and train at once
own = sd.HyperINGP()
from scaledreamer.prior.base import TextEmbedding
rng = sd.make_rng(0)
text = TextEmbedding(torch.randn(1, 4, 96, generator=rng), torch.randn(1, 96, generator=rng))
own.standardise(text)
cameras = sd.orbit(2, prompts=1)
pictures = []
while any(job.status not in ("finished", "failed") for job in jobs):
    with torch.no_grad():
        pictures.append(sd.render_views(own(text), cameras, 24, 24, settings.render).rgb)
for job in jobs:
    job.wait(show=False)
assert len(pictures) > 1 and all(torch.equal(pictures[0], picture) for picture in pictures)
print(*(job.step for job in jobs))
"""


def python(text: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_neither_imports_nor_calls_change_global_state():
    done = python(SNAPSHOT + LIBRARIES + IMPORTS + CALLS)
    assert done.returncode == 0, done.stderr


def test_kernels_in_three_threads_at_once():
    small = {"prompt": ("a red car",), "prompts_per_step": 1, "resolution": 16, "steps": 6}
    settings = TrainSettings(prior="mixture", **small)
    done = python(THREE_THREADS, to_json(settings))
    assert done.stdout == "6 6\n", done.stderr
