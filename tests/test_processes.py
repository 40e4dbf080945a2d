"""Two processes train as one does: same rows, gradients, metrics, files, ends."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import processes
from scaledreamer.camera.poses import RigCameras, orbit
from scaledreamer.camera.rays import Rays, camera_rays
from scaledreamer.commands.cli import parse
from scaledreamer.core.processes import ALONE, World
from scaledreamer.core.settings import RunError
from scaledreamer.generator.triplane import Triplane
from scaledreamer.prior.base import TextEmbedding
from scaledreamer.rendering.volume import render
from scaledreamer.training.corpora import number_prompts
from scaledreamer.training.run import build
from scaledreamer.training.run_folder import write_run_settings
from scaledreamer.training.run_logs import read_rows
from scaledreamer.training.step import training_step
from scaledreamer.training.step_update import generator_optimizer

CASES = list(processes.CASES)
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "The folder in which two processes did everything; at the end one of them failed in a step."
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, *LAUNCH, processes.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert (folder / "found-0.json").exists(), done.stderr[-3000:]
    assert done.returncode == 1 and done.stdout == ""
    (folder / "said.txt").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The folder in which one process trains, and its runs."
    folder = tmp_path_factory.mktemp("one")
    return folder, {case: processes.train(folder, case, ALONE) for case in CASES}


@pytest.fixture
def found(two):
    "What each process found."
    return [json.loads((two / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(one, two, case):
    run = one[1][case]
    rows = [read_rows(folder / case / "metrics.jsonl") for folder in (one[0], two)]
    assert [row["step"] for row in rows[1]] == [*range(run.settings.steps)]
    for one, other in zip(*rows):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)
    for name, value in rows[0][0].items():  # before rounding errors grow
        assert rows[1][0][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    ranks = [torch.load(two / f"{case}-{rank}.pt", weights_only=True) for rank in range(2)]
    wanted = processes.gradients(run)
    assert [g is None for g in wanted] == [g is None for g in ranks[0]]
    first = run.settings.steps == 1
    zero = 1e-7 * max(want.abs().max().item() for want in wanted if want is not None)
    for want, a, b in zip(wanted, *ranks):
        if want is not None:
            assert torch.equal(a, b)  # the processes agree to the last bit
            atol = (2e-5 if first else 1e-2) * want.abs().max().item() + zero
            torch.testing.assert_close(a, want, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_only_the_main_process_writes(one, two, case):
    files = [
        sorted(str(path.relative_to(folder / case)) for path in (folder / case).rglob("*"))
        for folder in (one[0], two)
    ]
    assert files[0] == files[1]
    assert len(read_rows(two / case / "sessions.jsonl")) == 1
    renders = [read_rows(folder / case / "renders.jsonl") for folder in (one[0], two)]
    assert len(renders[0][0]["png"]) == pytest.approx(len(renders[1][0]["png"]), rel=0.1)


def test_an_error_of_one_process_ends_all_with_its_words(found):
    for rank in range(2):
        assert (
            "the memory is exhausted (3.00 GiB more were needed at once)" in found[rank]["broken"]
        )


def test_prompts_that_cannot_be_shared_out_are_refused(found):
    wanted = "prompts_per_step is 3: expected a multiple of 2, which is 2 processes times"
    assert all(each["refused"].startswith(wanted) for each in found)


def test_a_gradient_that_is_infinite_in_one_process_ends_all(found):
    assert all("the gradient is not finite" in each["not_finite"] for each in found)


def test_all_skip_a_step_that_is_infinite_in_one(found):
    assert found[0]["skipped"] == found[1]["skipped"]
    assert found[0]["skipped"][:2] == [3, 2]


def test_all_stop_after_the_same_step_and_go_on(found, two):
    assert found[0]["stopped"] == found[1]["stopped"] == [2, 3]
    assert len(list((two / "stopped/track/tensorboard").iterdir())) == 2  # one of each session


def test_a_signal_at_one_process_interrupts_all_after_a_checkpoint(found):
    assert found[0]["interrupted"] == found[1]["interrupted"] == [1]


def steps_of(folder, steps):
    "Rows of metrics, and the tensors of the checkpoint after so many steps, by file and name."
    checkpoint = folder / "checkpoints" / f"{steps:06d}"
    files = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    assert files
    return read_rows(folder / "metrics.jsonl")[:steps], {
        f"{file}: {name}": value
        for file, tensors in files.items()
        for name, value in tensors.items()
    }


def assert_same_training(one, other, rtol, weights, steps=3):
    "`weights`: greatest difference of a weight or an average, over the greatest of its tensor."
    (rows, tensors), (other_rows, others) = steps_of(one, steps), steps_of(other, steps)
    assert len(rows) == len(other_rows) and tensors.keys() == others.keys()
    for row, another in zip(rows, other_rows):
        assert another == pytest.approx(row, rel=rtol, abs=1e-6)
    for name, value in tensors.items():
        atol = weights * value.abs().max().item() + 1e-9
        torch.testing.assert_close(others[name], value, rtol=0, atol=atol, msg=lambda m: name + m)


def test_sharded_weights_train_as_whole_ones(one, two):
    assert_same_training(two / "triplane", two / "sharded/triplane", rtol=1e-5, weights=1e-5)
    assert_same_training(one[0] / "triplane", two / "sharded/half", 1e-4, weights=1e-4, steps=2)
    # as far as one process and two agree without shards: rounding may move a sample past an edge
    assert_same_training(one[0] / "triplane", two / "sharded/triplane", rtol=1e-4, weights=1e-2)
    test_only_the_main_process_writes((two / "sharded", None), two, "triplane")


def test_sharded_weights_of_another_generator(one, two):
    rows = [read_rows(folder / "noise/metrics.jsonl") for folder in (two, two / "sharded")]
    for row, another in zip(*rows):
        assert another == pytest.approx(row, rel=1e-4, abs=1e-6)


def test_each_process_has_half_of_the_weights_and_averages(found):
    for share, still_sharded in (each["shares"] for each in found):
        assert share < 0.53  # decoders and what is odd stay whole
        assert not still_sharded  # at the end each has all weights


def test_sharded_runs_go_on_with_any_number_of_processes(two, tmp_path):
    assert_same_training(two / "sharded/triplane", two / "sharded/resumed", 1e-6, 1e-6)
    shutil.copytree(two / "sharded/half", tmp_path / "half")
    run = processes.train_sharded(tmp_path / "half", ALONE, resume=True)
    assert run.step == 3
    assert_same_training(two / "sharded/triplane", tmp_path / "half", rtol=1e-4, weights=1e-4)


def test_weights_that_are_kept_until_the_backward_pass(two):
    assert_same_training(two / "sharded/triplane", two / "sharded/kept", 1e-6, 1e-6)
    assert (two / "sharded/kept/validation/000002.png").exists()


def test_sharded_weights_in_mixed_precision_and_parts(two):
    rows = [
        read_rows(two / "sharded" / case / "metrics.jsonl")[0] for case in ("triplane", "mixed")
    ]
    assert rows[1] == pytest.approx(rows[0], rel=0.05, abs=1e-3)
    assert rows[1] != rows[0]


def test_all_skip_a_step_in_which_sharded_gradients_are_infinite_in_one(found):
    assert [each["infinite_part"] for each in found] == [[3, 2]] * 2


def test_a_generator_without_modules_to_divide_is_refused(found):
    for each in found:
        assert each["nothing_to_divide"].startswith("HyperINGP has no weights to divide")


def test_a_process_that_fails_while_others_wait_for_its_weights_ends_all(two):
    said = (two / "said.txt").read_text()
    assert "scaledreamer: process 1 of 2: out of memory" in said
    assert "RunError: another process of this training has ended (Connection" in said


def test_a_render_that_hits_nothing_has_a_gradient():
    "With sharded weights, a process without one would let the others wait for it."
    words = torch.randn(1, 3, 96)
    generator = Triplane()
    rays = camera_rays(orbit(2), 8, 8)
    away = Rays(rays.origins, -rays.directions)
    out = render(generator(TextEmbedding(words, words[:, 0])), away, processes.PLAIN.render)
    (out.rgb.sum() + out.sdf_gradient.sum()).backward()
    assert out.opacity.abs().max() == 0
    assert all(weight.grad is not None for weight in generator.parameters())


def test_accelerate_launches_the_command(tmp_path):
    accelerate = Path(sys.executable).with_name("accelerate")
    if not accelerate.exists():
        accelerate = shutil.which("accelerate")
    command = [str(accelerate), "launch", "--use_fsdp", "--fsdp_version", "2"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "-m", "scaledreamer", "train", "--prior", "mixture"]
    command += ["--generator", "triplane", "--prompt", *processes.TEXTS, "--steps", "2"]
    command += ["--resolution", "12", "--eval-views", "1", "--out", "run"]
    options = {"capture_output": True, "text": True, "env": ENVIRONMENT, "cwd": tmp_path}
    done = subprocess.run(command, **options, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run: run\n") == done.stdout.count("Sim ") == 1
    assert done.stderr.count("sds: 2 of 2") == 1


def test_train_takes_the_settings_of_a_run(tmp_path):
    rig = replace(processes.PLAIN, cameras=RigCameras(), optim=processes.HALVES)
    write_run_settings(tmp_path, rig)
    command = parse(["train", "--config", str(tmp_path), "--steps", "9"])
    assert command.settings == replace(rig, steps=9)
    prompts = parse(["train", "--config", str(tmp_path), "--prompt", "a red mug"]).settings.prompt
    assert prompts == ("a red mug",)
    with pytest.raises(RunError, match="is no run folder"):
        parse(["train", "--config", str(tmp_path / "none")])


@pytest.mark.parametrize("generator", ["conv3d", "triplane", "hyper-ingp"])
def test_mixed_precision_is_of_the_networks_alone(generator):
    settings = replace(processes.PLAIN, generator=generator)
    prompts = number_prompts([(text, "train") for text in processes.TEXTS])
    found = []
    for mixed in (False, True):
        run = build(Path("unused"), settings, prompts)
        run.optimizer = generator_optimizer(settings, run.generator)
        run.world = World()
        run.world.mixed = mixed
        metrics = training_step(run, run.prior.encode_text(list(processes.TEXTS)))
        found.append((dict(metrics), [g for g in processes.gradients(run) if g is not None]))
    (full, exact), (half, mixed) = found
    assert half == pytest.approx(full, rel=0.05, abs=1e-3)
    assert {g.dtype for g in mixed} == {torch.float32}
    norms = [torch.cat([g.flatten() for g in gs]).norm().item() for gs in (exact, mixed)]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert (full == half) == (generator == "hyper-ingp")  # which reads the text in small layers
