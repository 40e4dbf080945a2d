"""Commands in this process: what they print and how they end, with a limit on what they may use."""

import contextlib
import faulthandler
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from scaledreamer.commands import cli, curve_and_toy, evaluate
from scaledreamer.core.settings import RunError
from scaledreamer.training import memory_estimate, train_settings, trainer
from scaledreamer.training import run as run_module
from scaledreamer.view import run_report

LIMIT = 60  # seconds that a command may be blocked, or half of which it may compute


class Hang(BaseException):
    "A command that does not end."


def _watch(done: threading.Event, main: int) -> None:
    """Interrupts the main thread when it hangs: it computes for half of `LIMIT`, or for `LIMIT` it
    computes next to nothing. A process that waits for a busy machine does compute, if slowly."""
    used = lambda: time.process_time() - time.thread_time()  # without this thread
    begun, last, moved = used(), time.monotonic(), used()
    for _ in iter(lambda: done.wait(1.0), True):
        now, spent = time.monotonic(), used()
        if spent - moved > 0.3:
            last, moved = now, spent
        if spent - begun > LIMIT / 2 or now - last > LIMIT:
            faulthandler.dump_traceback(sys.__stderr__)
            signal.pthread_kill(main, signal.SIGALRM)
            if not done.wait(30):  # in code that no signal interrupts
                print("a command hangs in compiled code", file=sys.__stderr__, flush=True)
                os._exit(70)
            return


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    "Raises `Hang` inside for what does not end; the stacks of all threads are on stderr."

    def late(*_):
        raise Hang

    done, before = threading.Event(), signal.signal(signal.SIGALRM, late)
    watcher = threading.Thread(target=_watch, args=(done, threading.get_ident()), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Called:
    "How a command ended."

    code: int
    out: str
    lines: list[str]  # of stderr

    @property
    def said(self) -> list[str]:
        "What the command itself says on stderr, not its progress."
        return [line for line in self.lines if line.startswith("scaledreamer: ")]


def call(*argv: str) -> Called:
    "Run a command. What it raises is raised, and `Hang` where it does not end."
    out, err = io.StringIO(), io.StringIO()
    with time_limit(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run_command([*argv])
    return Called(code, out.getvalue(), [line for line in err.getvalue().split("\n") if line])


def _once(function: Callable, key: Callable) -> Callable:
    "The function, called once for each key; every time where the key is None."
    made = {}

    def get(*arguments, **options):
        place = key(*arguments, **options)
        if place is None:
            return function(*arguments, **options)
        if place not in made:
            made[place] = function(*arguments, **options)
        return made[place]

    return get


def no_surface(*_, **__) -> None:
    raise RunError("no surface")


def quick_commands(monkeypatch: pytest.MonkeyPatch, priors: Collection[str] = ("mixture",)) -> None:
    """Without what damaged files do not reach: waiting for the disk, estimates of memory, pictures
    and metrics of an evaluation. The named priors, and the included CLIP model, open once."""
    dot = Image.new("RGB", (1, 1))
    figure = SimpleNamespace(savefig=lambda buffer, **_: dot.save(buffer, "png"))

    def prior_key(settings, prompts, **options):
        texts = tuple(prompts) if settings.prior == "mixture" else ()
        about = settings.prior_settings, settings.seed, settings.distill.view_prompting
        known = settings.prior in priors
        return (settings.prior, texts, about, *options.items()) if known else None

    scorers_key = lambda names, device: "tiny-clip" if [*names] == ["tiny-clip"] else None
    build_prior = _once(train_settings.build_prior, prior_key)
    for module in (run_module, train_settings, curve_and_toy):
        monkeypatch.setattr(module, "build_prior", build_prior)
    scorers = _once(evaluate.named_scorers, scorers_key)
    monkeypatch.setattr(evaluate, "named_scorers", scorers)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(trainer, "check_memory", lambda *_: None)
    monkeypatch.setattr(memory_estimate, "memory_line", lambda *_: "")
    monkeypatch.setattr(trainer, "image_grid", lambda *_, **__: dot)
    monkeypatch.setattr(trainer, "render_views", lambda *_: SimpleNamespace(rgb=torch.zeros(1, 1)))
    monkeypatch.setattr(run_report, "curves", lambda *_, **__: figure)
    monkeypatch.setattr(run_report, "turntable_frames", lambda *_, **__: torch.zeros(8, 3, 1, 1))
    monkeypatch.setattr(run_report, "true_views", lambda _: None)
    monkeypatch.setattr(run_report, "picture_level", lambda *_: 0.0)
    for name in ("extract_mesh", "scene_meshes"):
        monkeypatch.setattr(run_report, name, no_surface)
    found = {"sim": 0.5, "per_prompt": [{"id": "0000", "text": "a red ball", "sim": 0.5}]}
    monkeypatch.setattr(evaluate, "evaluate_scenes", lambda *_, **__: deepcopy(found))
