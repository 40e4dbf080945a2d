"""What several processes do in the tests: a launcher starts this file once in each."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from scaledreamer.core.processes import launched
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.sharded_weights import is_sharded, own_part
from scaledreamer.training.optim_settings import OptimSettings
from scaledreamer.training.run_start import enter_run
from scaledreamer.training.step_batch import render_part
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training

TEXTS = ("a red ball", "a blue cube", "a green chair", "a yellow car")
PLAIN = TrainSettings(
    prior="mixture", prompt=TEXTS, steps=3, resolution=12, views_per_prompt=2, log_every=1
)
HALVES = OptimSettings(accumulate=2)
ADAN = OptimSettings("adan", lr=1e-2, warmup=1, eps=0.1)  # rounding errors do not grow
BEST = replace(PLAIN.save, keep_best=True)
CASES = {  # what is trained in one process and in two; after one step, gradients are alike
    "plain": PLAIN,
    "noise": replace(PLAIN, generator="conv3d", validate_every=2, checkpoint_every=2),
    "triplane": replace(
        PLAIN, generator="triplane", optim=ADAN, save=BEST, validate_every=2, checkpoint_every=2
    ),
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


def train_sharded(folder, world, **changes):
    "The triplanes' case in another folder, without pictures and scores."
    few = {"save": PLAIN.save, "validate_every": 9, "checkpoint_every": 9} | changes
    options = {"show": False, "world": world, "stop": few.pop("stop", lambda: False)}
    options["resume"] = few.pop("resume", False)
    return run_training(folder, replace(CASES["triplane"], **few), **options)


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


def shares(folder, world):
    "The part of weights and averages that this process has; the run is whole at its end."
    entered, found = {}, []

    def enter(run, *rest):
        entered["run"] = run
        enter_run(run, *rest)

    def count():
        run = entered["run"]
        state = run.optimizer.state.values()
        for tensors in (run.generator.parameters(), *(each.values() for each in state)):
            kept = [x for x in tensors if torch.is_tensor(x)]
            found.append([sum(x.numel() for x in xs) for xs in (map(own_part, kept), kept)])
        return False

    with mock.patch("scaledreamer.training.trainer.enter_run", enter):
        run = train(folder, "triplane", world, stop=count)
    own, whole = (sum(column) for column in zip(*found))
    return [own / whole, any(map(is_sharded, run.generator.parameters()))]


def nothing_to_divide(folder, world):
    "What each process says of a generator without modules that are worth dividing."
    try:
        run_training(folder / "nothing", PLAIN, show=False, world=world)
    except UsageError as error:
        return str(error)


def half(folder, world):
    "Trains two of three steps, then, from a copy of what it has saved, the third."
    asked = []
    two = lambda: asked.append(1) or len(asked) == 2
    train_sharded(folder / "half", world, stop=two)
    if world.main:
        shutil.copytree(folder / "half", folder / "resumed")
    world.any(False)
    return train_sharded(folder / "resumed", world, resume=True).step


def kept_until_backward(folder, world):
    "Gathered weights are freed after the backward pass only; a picture and a checkpoint between."
    with mock.patch.object(world, "_strategy", "shard_grad_op"):
        return train_sharded(folder / "kept", world, validate_every=2, checkpoint_every=2).step


def mixed(folder, world):
    "The same in mixed precision, in two parts."
    with mock.patch.object(world, "mixed", True):
        return train_sharded(folder / "mixed", world, optim=replace(ADAN, accumulate=2)).step


def convolutions(folder, world):
    "Another generator, with Adam."
    settings = replace(CASES["noise"], validate_every=9, checkpoint_every=9)
    return run_training(folder / "noise", settings, show=False, world=world).step


def infinite_part(folder, world):
    "Steps and skipped steps where the gradient of sharded weights is infinite in the last process."
    entered = {}

    def enter(run, *rest):
        entered["run"] = run
        enter_run(run, *rest)

    def spoil():
        if not world.main:
            norm = entered["run"].generator.transformer.norm
            infinite = lambda gradient: gradient * float("inf")
            norm.register_forward_hook(lambda _, __, out: out.register_hook(infinite) and None)
        return False

    two = replace(PLAIN.save, max_skipped_steps=2)
    with mock.patch("scaledreamer.training.trainer.enter_run", enter):
        run = train_sharded(folder / "infinite", world, stop=spoil, save=two)
    return [run.step, run.monitor.skipped]


def lost(folder, world):
    "The last process fails within a step, in which the others wait for its weights."

    def fail(run, *rest):
        scenes, rendering = render_part(run, *rest)
        if not world.main and run.step == 1:  # the others wait in their backward pass
            raise RuntimeError("out of memory. Tried to allocate 3.00 GiB")
        return scenes, rendering

    with mock.patch("scaledreamer.training.step.render_part", fail):
        train_sharded(folder / "lost", world)


SHARDED = (shares, nothing_to_divide, half, kept_until_backward, mixed, convolutions, infinite_part)


def main(folder):
    world = launched()
    found = {}
    for case in CASES:
        run = train(folder, case, world)
        torch.save(gradients(run), folder / f"{case}-{world.rank}.pt")
    for part in (broken, refused, not_finite, skipped, stopped, interrupted):
        found[part.__name__] = part(folder, world)
    world.sharded, world._strategy = True, "full_shard"  # as with --use_fsdp
    for part in SHARDED:
        found[part.__name__] = part(folder / "sharded", world)
    (folder / f"found-{world.rank}.json").write_text(json.dumps(found))
    try:
        lost(folder / "sharded", world)
    finally:
        world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
