"""What several processes do in the tests: a launcher starts this file once in each."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from scaledreamer.core.processes import launched
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.training.optim_settings import OptimSettings
from scaledreamer.training.run_start import enter_run
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training

TEXTS = ("a red ball", "a blue cube", "a green chair", "a yellow car")
PLAIN = TrainSettings(
    prior="mixture", prompt=TEXTS, steps=3, resolution=12, views_per_prompt=2, log_every=1
)
HALVES = OptimSettings(accumulate=2)
CASES = {  # what is trained in one process and in two; after one step, gradients are alike
    "plain": PLAIN,
    "noise": replace(PLAIN, generator="conv3d", validate_every=2, checkpoint_every=2),
    "parts": replace(PLAIN, optim=HALVES, steps=1),
    "vsd": replace(PLAIN, prior="tiny-sd", method="vsd", steps=2),
    "vsd-parts": replace(PLAIN, prior="tiny-sd", method="vsd", steps=1, optim=HALVES),
}


def gradients(run):
    "The last gradient of every weight, of the generator's first."
    nets = [run.generator] + ([run.estimator.estimator] if run.estimator else [])
    return [p.grad for net in nets for p in net.parameters() if p.requires_grad]


def train(folder, case, world, **options):
    return run_training(folder / case, CASES[case], show=False, world=world, **options)


def broken(folder, world):
    "What each process says of a memory that is exhausted in the last one."

    def stop():
        with world.together():
            if not world.main:
                raise RuntimeError("out of memory. Tried to allocate 3.00 GiB")
        return False

    try:
        run_training(folder / "broken", PLAIN, show=False, stop=stop, world=world)
    except RunError as error:
        return str(error)


def refused(folder, world):
    "What each process says of three prompts for two of them."
    try:
        run_training(folder / "refused", replace(PLAIN, prompts_per_step=3), world=world)
    except UsageError as error:
        return str(error)


def spoiled(folder, world, most):
    "Steps and skipped steps of each process, where the last one's gradient is infinite after one."
    entered = {}

    def spoil():
        if not world.main:
            first = next(entered["run"].generator.parameters())
            first.register_hook(lambda gradient: gradient * float("inf"))
        return False

    def enter(run, *rest):
        entered["run"] = run
        enter_run(run, *rest)

    settings = replace(PLAIN, save=replace(PLAIN.save, max_skipped_steps=most))
    with mock.patch("scaledreamer.training.trainer.enter_run", enter):
        try:
            options = {"show": False, "stop": spoil, "world": world}
            run = run_training(folder / f"spoiled-{most}", settings, **options)
        except RunError as error:
            return str(error)
    weights = [weight.double().sum().item() for weight in run.generator.parameters()]
    return [run.step, run.monitor.skipped, weights]


def not_finite(folder, world):
    "The words of each process where no step may be skipped."
    return spoiled(folder, world, 0)


def skipped(folder, world):
    "What each process counts where two steps may be skipped."
    return spoiled(folder, world, 2)


def stopped(folder, world):
    "Steps that are done where the last process alone wants to stop after the second, and goes on."
    asked = []

    def stop():
        asked.append(1)
        return not world.main and len(asked) == 2

    tracked = replace(PLAIN, save=replace(PLAIN.save, track=("tensorboard",)))
    run = run_training(folder / "stopped", tracked, show=False, stop=stop, world=world)
    done = run.step
    again = run_training(folder / "stopped", tracked, resume=True, show=False, world=world)
    return [done, again.step]


def interrupted(folder, world):
    "Whether SIGTERM at the last process alone interrupts all, after the same step."

    def stop():
        if not world.main:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    try:
        run_training(folder / "interrupted", PLAIN, show=False, stop=stop, world=world)
    except KeyboardInterrupt:
        return [int(path.name) for path in sorted((folder / "interrupted/checkpoints").iterdir())]


def main(folder):
    world = launched()
    found = {}
    for case in CASES:
        run = train(folder, case, world)
        torch.save(gradients(run), folder / f"{case}-{world.rank}.pt")
    for part in (broken, refused, not_finite, skipped, stopped, interrupted):
        found[part.__name__] = part(folder, world)
    (folder / f"found-{world.rank}.json").write_text(json.dumps(found))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
