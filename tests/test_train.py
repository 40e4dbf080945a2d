"""The training loop, its run folder and the command line, on an exact mixture prior."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from scaledreamer.commands.cli import run_command
from scaledreamer.core.settings import RunError, UsageError, from_json, to_json
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.distill.estimator import LoRAEstimator
from scaledreamer.field.background import SolidBackground
from scaledreamer.field.scene import SphereScene
from scaledreamer.generator.generator_base import TextTo3D, text_vector
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior
from scaledreamer.training.checkpoints import checkpoint_steps
from scaledreamer.training.corpora import number_prompts
from scaledreamer.training.method_defaults import resolve_settings
from scaledreamer.training.presets import mg15_hyper_ingp, toybox
from scaledreamer.training.prompt_order import step_prompts
from scaledreamer.training.run import build
from scaledreamer.training.save_settings import SaveSettings
from scaledreamer.training.earlier_settings import read_settings
from scaledreamer.training.train_settings import TrainSettings, build_prior
from scaledreamer.training.trainer import open_run, run_training


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus") / "two.txt"
    corpus.write_text("a red ball\na blue cube\n", encoding="utf-8")
    return TrainSettings(
        prior="mixture",
        corpus=str(corpus),
        steps=4,
        prompts_per_step=2,
        resolution=16,
        log_every=1,
        validate_every=4,
        checkpoint_every=2,
        distill=DistillSettings(view_prompting="words"),
    )


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    return run_training(tmp_path_factory.mktemp("runs") / "whole", settings, show=False)


def test_run_folder(run, settings):
    stored = from_json(TrainSettings, (run.folder / "config.json").read_text())
    assert stored == run.settings == resolve_settings(settings, run.prior)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"gradient_norm", "error_t", "error_t_shifted", "opacity"} <= lines[0].keys()
    assert checkpoint_steps(run.folder / "checkpoints") == [2, 4]


def test_same_seed_same_run(run, settings, tmp_path):
    run_training(tmp_path / "again", settings, show=False)
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (
        run.folder / "metrics.jsonl"
    ).read_bytes()


def test_an_interrupt_saves_and_resumes_exactly(run, settings, tmp_path):
    "Ctrl-C in the middle of the third step: the step is finished, saved and counted."

    def interrupt(step, metrics):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", settings, on_step=interrupt, show=False)
    assert checkpoint_steps(tmp_path / "cut/checkpoints") == [2, 3]
    run_training(tmp_path / "cut", settings, resume=True, show=False)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (
        run.folder / "metrics.jsonl"
    ).read_bytes()
    for a, b in zip(open_run(tmp_path / "cut").generator.parameters(), run.generator.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["hyper-ingp-spectral", "conv3d-gain-1"])
def test_variants_of_generators_resume_exactly(settings, name, tmp_path):
    "Spectral normalisation has a state of its own, which every step changes."
    own = replace(settings, generator=name)
    run_training(tmp_path / "whole", own, show=False)

    def interrupt(step, metrics):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", own, on_step=interrupt, show=False)
    run_training(tmp_path / "cut", own, resume=True, show=False)
    states = [open_run(tmp_path / folder).generator.state_dict() for folder in ("whole", "cut")]
    assert any(key.endswith("_u") for key in states[0]) == ("spectral" in name)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_a_gradient_that_is_not_finite_costs_no_checkpoint(settings, tmp_path, monkeypatch):
    "A finite loss can have a gradient that is not finite: it changes no weight and no checkpoint."

    def poisoned(*args):
        run = build(*args)
        run.generator.encoder.table.register_hook(
            lambda gradient: gradient * (float("nan") if run.step == 3 else 1.0)
        )
        return run

    monkeypatch.setattr("scaledreamer.training.trainer.build", poisoned)
    with pytest.raises(
        RunError, match="step 3: the gradient is not finite, t .+; the checkpoints are intact"
    ):
        strict = replace(settings, save=SaveSettings(max_skipped_steps=0))
        run_training(tmp_path / "run", strict, show=False)
    monkeypatch.undo()
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [2]
    assert run_training(tmp_path / "run", settings, resume=True, show=False).step == 4


def test_a_step_that_is_not_finite_is_reported_late_on_a_device(settings, tmp_path, monkeypatch):
    """Without a check after each step, the next number read or checkpoint names the first bad step.

    No weight has changed since then, and nothing bad was saved."""
    from scaledreamer.core.async_metrics import FiniteMonitor

    runs = []

    def poisoned(*args):
        runs.append(build(*args))
        runs[-1].generator.encoder.table.register_hook(
            lambda gradient: gradient * (float("nan") if runs[-1].step == 1 else 1.0)
        )
        return runs[-1]

    monkeypatch.setattr("scaledreamer.training.trainer.build", poisoned)
    monkeypatch.setattr(FiniteMonitor, "check_if_cheap", lambda self: None)
    weights = []
    # the checkpoint after the fourth step reads the outcome, or the log of the fourth step
    for every, last in ((100, 3), (3, 2)):
        with pytest.raises(
            RunError, match="step 1: the gradient is not finite, t .+; the checkpoints are intact"
        ):
            run_training(
                tmp_path / str(every),
                replace(
                    settings,
                    log_every=every,
                    checkpoint_every=4,
                    save=SaveSettings(max_skipped_steps=0),
                ),
                on_step=lambda step, metrics: weights.append(
                    runs[-1].generator.encoder.table.detach().clone()
                ),
                show=False,
            )
        assert runs[-1].step == last + 1 and not checkpoint_steps(
            tmp_path / str(every) / "checkpoints"
        )
    for run in (weights[:4], weights[4:]):
        assert all(torch.equal(run[0], later) for later in run[1:]) and run[0].isfinite().all()


def test_the_estimated_memory_is_what_is_allocated(settings):
    from scaledreamer.camera.poses import sample_cameras
    from scaledreamer.core.tensors import step_rng
    from scaledreamer.rendering.render_memory import measure_render_bytes, render_bytes

    for budget in (None, 1500):
        own = replace(
            settings,
            prior="tiny-sd",
            corpus="toybox-15",
            views_per_prompt=2,
            resolution=64,
            render=replace(settings.render, train_rays_per_chunk=budget),
        )
        run = build(
            Path("nowhere"),
            own,
            number_prompts([("a red ball", "train"), ("a blue cube", "train")]),
        )
        text, weights = (
            run.prior.encode_text([prompt.text for prompt in run.prompts]),
            list(run.generator.parameters()),
        )
        arguments = (
            lambda: run.generator(text),
            weights,
            sample_cameras(own.cameras, 2, 2, step_rng(0, 0)),
            64,
            own.render,
        )
        assert 1 / 1.5 < render_bytes(*arguments) / measure_render_bytes(*arguments)[0] < 1.5


def test_a_chunk_below_one_ray_per_prompt_is_refused(settings):
    with pytest.raises(
        UsageError,
        match="train_rays_per_chunk is 3: expected at least one ray for each of the 4 prompts",
    ):
        replace(
            settings, prompts_per_step=4, render=replace(settings.render, train_rays_per_chunk=3)
        )


def test_published_results_are_those_of_the_defaults():
    published = ROOT / "nbs/99_experiments/results/main_job/config.json"
    found = read_settings(published.read_text(encoding="utf-8"))
    unused = {"nfsd_negative_prompt": None, "bridge_source_prompt": None}  # of other methods
    found = replace(found, distill=replace(found.distill, **unused))
    assert found == resolve_settings(toybox(), StableDiffusionPrior.from_pretrained())


@pytest.mark.parametrize("method", ["vsd", "esd"])
def test_an_estimator_is_trained_saved_and_resumed_exactly(settings, tmp_path, method):
    own = replace(
        settings, prior="tiny-sd", method=method, distill=DistillSettings(estimator_lr=1e-3)
    )
    whole, done = run_training(tmp_path / "whole", own, show=False), []
    run_training(
        tmp_path / "cut",
        own,
        stop=lambda: len(done) == 3,
        on_step=lambda step, metrics: done.append(step),
        show=False,
    )
    cut = run_training(tmp_path / "cut", own, resume=True, show=False)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()
    assert "loss_estimator" in (tmp_path / "whole/metrics.jsonl").read_text()
    opened, fresh = open_run(tmp_path / "whole"), LoRAEstimator(whole.prior, seed=own.seed)
    for name, weight in whole.estimator.estimator.state_dict().items():
        assert torch.equal(weight, cut.estimator.estimator.state_dict()[name]) and torch.equal(
            weight, opened.estimator.estimator.state_dict()[name]
        )
    assert any(
        not torch.equal(weight, fresh.state_dict()[name])
        for name, weight in opened.estimator.estimator.state_dict().items()
    )
    (tmp_path / "whole/checkpoints/000004/estimator.safetensors").unlink()
    with pytest.warns(UserWarning, match="estimator.safetensors cannot be read .+ step 2 is used"):
        assert open_run(tmp_path / "whole").step == 2
    with pytest.raises(RunError, match="estimator.safetensors cannot be read"):
        open_run(tmp_path / "whole", step=4)


@pytest.mark.parametrize("method", ["sds", "csd", "nfsd", "bridge", "sdi", "ism"])
def test_every_method_trains(settings, tmp_path, method):
    texts = (
        {"view_prompting": "plain", "bridge_source_prompt": "<az+0> <el+15>", "bridge_start": 0.5}
        if method == "bridge"
        else {"view_prompting": "words", "nfsd_negative_prompt": "a blue cube, side view"}
    )
    own = replace(
        settings, steps=2, checkpoint_every=2, method=method, distill=DistillSettings(**texts)
    )
    run_training(tmp_path / "run", own, show=False)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line[f"loss_{method}"] > 0 for line in lines)


def test_runs_from_before_a_setting_still_open_and_resume(settings, tmp_path):
    run = run_training(tmp_path / "run", settings, stop=lambda: True, show=False)
    config = tmp_path / "run/config.json"
    old = json.loads(config.read_text())
    later = ("estimator_lr", "nfsd_negative_prompt", "bridge_source_prompt", "bridge_start")
    for name in later:
        del old["distill"][name]
    config.write_text(json.dumps(old))
    assert open_run(tmp_path / "run").settings == run.settings
    with pytest.raises(UsageError, match="was started with seed = 0, not 1"):
        run_training(tmp_path / "run", replace(settings, seed=1), resume=True, show=False)
    assert run_training(tmp_path / "run", settings, resume=True, show=False).step == 4


class Ball(TextTo3D):
    "A generator of one's own: a ball per text, with all three things that training reads."

    lr_scale, noise, background = 0.5, 2, SolidBackground()

    def __init__(self, width: int):
        super().__init__()
        self.read, self.noises = nn.Linear(width, 4), []
        self.register_buffer("corpus", torch.zeros(()))

    def standardise(self, texts):
        self.corpus.fill_(len(texts))

    def forward(self, text, z=None):
        if self.training:
            self.noises.append(z)
        size, color = self.read(text_vector(text, "mean")).sigmoid().split((1, 3), -1)
        return SphereScene(0.3 + 0.2 * size[:, 0], colors=color)


class Reader(TextTo3D):
    "Another generator, with a weight of another shape under the same name, and no buffer."

    def __init__(self, width: int):
        super().__init__()
        self.read = nn.Linear(width, 3)


@pytest.fixture(scope="module")
def own(settings):
    return replace(settings, generator="my balls")


def test_a_generator_of_ones_own_trains_resumes_and_opens(own, tmp_path):
    whole, done = run_training(tmp_path / "whole", own, show=False, make_generator=Ball), []
    torch.rand(7)  # whatever was drawn before, it starts from the seed
    cut = run_training(
        tmp_path / "cut",
        own,
        stop=lambda: len(done) == 3,
        on_step=lambda step, metrics: done.append(step),
        show=False,
        make_generator=Ball,
    )
    assert cut.step == 3 and cut.generator.corpus == 2
    shapes = [tuple(z.shape) for z in cut.generator.noises]
    assert shapes == [(2, 2)] * (4 + 3)  # four by the estimate of memory, then one per step
    resumed = run_training(tmp_path / "cut", own, resume=True, show=False, make_generator=Ball)
    assert (
        resumed.step == 4
        and (tmp_path / "cut/metrics.jsonl").read_bytes()
        == (tmp_path / "whole/metrics.jsonl").read_bytes()
    )
    rows = [
        json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["lr"] for row in rows] == [
        own.optim.lr_at(step, own.steps) / 2 for step in range(4)
    ]
    torch.manual_seed(own.seed)
    fresh, opened = (
        Ball(whole.generator.read.in_features),
        open_run(tmp_path / "cut", make_generator=Ball),
    )
    assert isinstance(opened.generator, Ball) and opened.settings.generator == "my balls"
    for a, b, start in zip(
        whole.generator.parameters(), opened.generator.parameters(), fresh.parameters()
    ):
        assert torch.equal(a, b) and not torch.equal(a, start)
    points = torch.rand(1, 9, 3)
    assert torch.equal(
        opened.scene(["a blue cube"]).sdf(points), whole.scene(["a blue cube"]).sdf(points)
    )
    assert open_run(tmp_path / "cut", step=3, make_generator=Ball).step == 3


def test_only_who_made_it_opens_a_generator_of_ones_own(own, settings, tmp_path, capsys):
    run_training(tmp_path / "run", own, show=False, make_generator=Ball)
    sentence = (
        r"run was trained with a generator of your own, 'my balls', which no command can make again"
        r": open it in Python, with open_run\(folder, make_generator=...\)"
    )
    with pytest.raises(UsageError, match=sentence):
        open_run(tmp_path / "run")
    for argv in (
        ["evaluate", str(tmp_path / "run")],
        ["export", str(tmp_path / "run"), "--prompt", "0000", "--to", str(tmp_path / "x.glb")],
    ):
        assert run_command(argv) == 2
        assert re.fullmatch(rf"scaledreamer: \S+{sentence}\n", capsys.readouterr().err)
    with pytest.raises(RunError, match="is of another generator: corpus is"):
        open_run(tmp_path / "run", make_generator=Reader)
    with pytest.raises(
        UsageError,
        match="no generator 'my balls': give one of hyper-ingp, .+, or, for one of your own, "
        "make_generator= in Python",
    ):
        run_training(tmp_path / "run", own, resume=True, show=False)
    with pytest.raises(
        UsageError,
        match="generator is 'hyper-ingp', which make_generator= would replace: give yours a name "
        "that is none of hyper-ingp, ",
    ):
        run_training(tmp_path / "new", settings, show=False, make_generator=Ball)
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_reported_and_the_one_before_opens(settings, tmp_path):
    run_training(tmp_path / "run", settings, show=False)
    weights = tmp_path / "run/checkpoints/000004/generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.warns(UserWarning, match="generator.safetensors is damaged .+ step 2 is used"):
        assert open_run(tmp_path / "run").step == 2
    with pytest.raises(RunError, match="is damaged"):
        open_run(tmp_path / "run", step=4)


FULL = """
import resource, sys
from scaledreamer.commands.cli import parse, run_command
from scaledreamer.training.trainer import run_training
command, done = parse(sys.argv[1:]), []
count = lambda step, metrics: done.append(step)
run_training(command.out, command.settings, stop=lambda: len(done) == 2, on_step=count, show=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
sys.exit(run_command([*sys.argv[1:], "--resume"]))
"""


@pytest.mark.skipif(
    sys.platform == "win32",
    reason="Windows has no limit on the size of a file, which stands for the full disk here",
)
def test_a_disk_that_takes_no_more_costs_no_checkpoint(settings, tmp_path):
    "A limit on file sizes makes a checkpoint fail as a full disk does: while it is being written."
    argv = [
        "train",
        "--prior",
        "mixture",
        "--corpus",
        settings.corpus,
        "--steps",
        "4",
        "--prompts",
        "1",
        "--resolution",
        "16",
        "--distill.views",
        "words",
        "--checkpoint-every",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run([sys.executable, "-c", FULL, *argv], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(
        r"^scaledreamer: checkpoint \S+000004 could not be written \(.+\): free some space "
        r"and go on from the checkpoint before",
        done.stderr,
        re.M,
    ), done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [2]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["000002"]
    assert run_command([*argv, "--resume", "--eval-views", "0"]) == 0
    assert checkpoint_steps(tmp_path / "run/checkpoints") == [2, 4]


def test_a_half_written_run_is_reported_in_a_sentence(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"prior": "tin', encoding="utf-8")
    for argv in (["evaluate", str(tmp_path)], ["train", "--out", str(tmp_path), "--resume"]):
        assert run_command(argv) == 1
        assert re.fullmatch(
            r"scaledreamer: \S+config.json is not JSON.+\n", capsys.readouterr().err
        )


def test_evaluate_completes_the_run_folder(run):
    assert run_command(["evaluate", str(run.folder), "--views", "3"]) == 0
    assert {path.name for path in run.folder.iterdir()} == {
        "config.json",
        "prompts.jsonl",
        "texts.safetensors",
        "metrics.jsonl",
        "renders.jsonl",
        "sessions.jsonl",
        "checkpoints",
        "validation",
        "views",
        "meshes",
        "eval.json",
        "report.html",
    }
    metrics = json.loads((run.folder / "eval.json").read_text())
    assert {
        "r_at_1",
        "sim",
        "volume_iou",
        "volume_iou_aligned",
        "silhouette_iou",
        "chamfer",
        "clip_model",
        "n_views",
        "gallery_size",
        "per_prompt",
    } <= metrics.keys()
    assert (
        metrics["train_seconds"] > 0
        and 0.1 < metrics["peak_memory_gb"] < 8
        and metrics["machine"]["cores"] >= 1
    )
    assert len(list((run.folder / "views").glob("*/*.png"))) == 2 * 8
    assert "a blue cube" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_one_clip_serves_the_check_and_the_evaluation(settings, tmp_path, monkeypatch):
    from scaledreamer.eval.clip import ClipScorer

    loaded, load = [], ClipScorer.load
    monkeypatch.setattr(
        ClipScorer,
        "load",
        staticmethod(lambda *args, **options: loaded.append(1) or load(*args, **options)),
    )
    argv = [
        "train",
        "--prior",
        "mixture",
        "--corpus",
        settings.corpus,
        "--steps",
        "1",
        "--prompts",
        "1",
        "--resolution",
        "16",
        "--distill.views",
        "words",
    ]
    assert (
        run_command([*argv, "--eval-views", "1", "--out", str(tmp_path / "run")]) == 0
        and len(loaded) == 1
    )


def test_a_prompt_that_is_too_long_with_its_view_is_found_among_many(monkeypatch):
    """It has few letters and many tokens, and fits without its view.

    Of 200 prompts at most 64 are encoded with a view."""
    prior = build_prior(TrainSettings(), ())
    texts = [f"a red rectangle number {i}" for i in range(200)]
    long = "z" * 8  # a word that the tokenizer does not know whole
    while True:
        try:
            prior.encode_text([long := long + " z"])
        except UsageError:
            break
    long = long.removesuffix(" z")
    assert len(prior.encode_text([long])) == 1 and len(long) < 2 * len(texts[0])
    encoded, encode = [], type(prior).encode_text
    monkeypatch.setattr(
        type(prior), "encode_text", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    with pytest.raises(UsageError, match=rf"'{long[:20]}.+ tokens: shorten it"):
        build(
            Path("nowhere"),
            TrainSettings(),
            number_prompts([(text, "train") for text in [*texts, long]]),
        )
    assert sum("<az" in text for text in encoded) <= 64
    run = build(
        Path("nowhere"), TrainSettings(), number_prompts([(text, "train") for text in texts])
    )
    assert len(run.train_prompts) == 200


def test_the_norm_of_all_gradients_is_that_of_their_norms(settings):
    rng = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=rng) for shape in ((3, 4), (7,), (2, 2, 2))]
    one_by_one = torch.stack([gradient.norm() for gradient in gradients]).norm()
    torch.testing.assert_close(torch.nn.utils.get_total_norm(gradients), one_by_one)
    for bad in (float("nan"), float("inf")):
        gradients[1][3] = bad
        assert not torch.nn.utils.get_total_norm(gradients).isfinite()


def test_a_log_that_is_a_folder_is_set_aside(settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    argv = [
        "train",
        "--prior",
        "mixture",
        "--corpus",
        settings.corpus,
        "--steps",
        "2",
        "--prompts",
        "1",
        "--resolution",
        "16",
        "--distill.views",
        "words",
        "--eval-views",
        "0",
    ]
    assert run_command([*argv, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "run/sessions.jsonl").unlink()
    (tmp_path / "run/sessions.jsonl").mkdir()
    capsys.readouterr()
    assert run_command([*argv, "--steps", "1", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert re.search(
        r"^scaledreamer: \S+sessions.jsonl cannot be read \(it is a folder\); "
        r"it is now sessions.jsonl.damaged, 0 rows are kept$",
        capsys.readouterr().err,
        re.MULTILINE,
    )
    assert (tmp_path / "run/sessions.jsonl").is_file()


STOPPED = """
import signal, sys
from importlib.abc import MetaPathFinder
library = sys.argv.pop(1)
class Press(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == library:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Press())
from scaledreamer.commands.main import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "library, argv",
    [
        ("torch", ["doctor"]),
        ("scaledreamer.commands.curve_and_toy", ["curve", "--help"]),
        ("open_clip", ["evaluate", "nowhere"]),
    ],
)
def test_an_interrupt_while_libraries_load_is_one_line(library, argv):
    command = [sys.executable, "-c", STOPPED, library, *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (130, "scaledreamer: stopped", "")


def test_the_shell_calls_main():
    assert '"scaledreamer = scaledreamer.commands.main:main"' in (ROOT / "setup.py").read_text(
        encoding="utf-8"
    )


def test_every_prompt_is_visited_equally():
    taken = [i for step in range(15) for i in step_prompts(0, step, 8, 15)]
    assert [taken.count(i) for i in range(15)] == [8] * 15


def test_the_paper_preset_survives_json():
    assert from_json(TrainSettings, to_json(mg15_hyper_ingp())) == mg15_hyper_ingp()


@pytest.mark.parametrize(
    "change",
    [
        {"method": "dds"},
        {"generator": "nerf"},
        {"prior": "nerf"},
        {"corpus": "nothing"},
        {"distill": DistillSettings(negative_prompt="ugly")},
        {"method": "vsd"},
        {"method": "nfsd", "distill": DistillSettings(nfsd_negative_prompt="fog")},
        {"method": "bridge", "distill": DistillSettings(bridge_source_prompt="fog")},
        {"device": "cuda:99"},
    ],
)
def test_refusals_come_before_the_folder(settings, tmp_path, change):
    with pytest.raises(UsageError):
        run_training(tmp_path / "run", replace(settings, **change), show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv, code",
    [
        (["train", "--steps", "many"], 2),
        (["trane"], 2),
        (["train", "--corpus", "nothing"], 2),
        (["evaluate", "nowhere"], 1),
        (["export", "nowhere", "--prompt", "0", "--to", "x.stl"], 2),
        (["doctor"], 0),
    ],
)
def test_exit_codes_and_one_sentence(argv, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(argv) == code
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and bool(error) == bool(code)
    assert not list(tmp_path.iterdir())
