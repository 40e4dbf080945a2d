"""Training, evaluation and export on a CUDA device, without one: `fake_cuda`.

Each operation is checked by torch's fake tensors for tensors of other devices and types, and the
numbers are those of a CPU. Hash grids and decoders run as plain torch: Triton's kernels are
compiled and compared elsewhere (test_triton_grid, test_triton_decoder)."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, FakeTensor, fake_cuda, numbers
from test_multi_view import write_pipeline
from test_triton_grid import needs_cuda

from scaledreamer.commands.evaluate import named_scorers
from scaledreamer.core.processes import World
from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import best_device, make_rng, seed_everything, step_rng
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.eval.captures import VolumeRenderer, capture_group
from scaledreamer.eval.report import evaluate_scenes
from scaledreamer.eval.truth import field_grid, solid_field, truth_of
from scaledreamer.field import hash_grid
from scaledreamer.generator.conv3d import Conv3D, Conv3DSettings
from scaledreamer.generator.hyper_ingp import HyperINGP, HyperINGPSettings
from scaledreamer.generator.ingp import INGP, INGPSettings
from scaledreamer.generator.triplane import Triplane, TriplaneSettings
from scaledreamer.kernels.hash_grid_reference import HashGridSettings
from scaledreamer.prior.embedding_build import StoredTexts
from scaledreamer.prior.multi_view import random_multi_view
from scaledreamer.prior.pipelines import quiet
from scaledreamer.prior.prior_settings import PriorSettings
from scaledreamer.prior.sd3_text import random_sd3_pipeline
from scaledreamer.prior.stable_diffusion_xl import random_sdxl_pipeline
from scaledreamer.prior.text_encoding import text_encoding
from scaledreamer.training import run as training_run
from scaledreamer.training.run import Run, build
from scaledreamer.training.run_prompts import training_prompts
from scaledreamer.training.step import fit_estimator, query_prior, training_step
from scaledreamer.training.step_batch import sample_batch
from scaledreamer.training.step_update import generator_optimizer
from scaledreamer.training.train_settings import ESTIMATOR_METHODS, METHODS, TrainSettings
from scaledreamer.training.train_settings import build_prior
from scaledreamer.training.trainer import open_run, run_training
from scaledreamer.view.mesh import extract_mesh

SETTINGS = TrainSettings(
    prompt=("a red car", "a blue house"),
    steps=2,
    resolution=8,
    prompts_per_step=1,
    prior_settings=PriorSettings("float32"),
)
GRID = HashGridSettings(levels=2, log2_size=10, base=4, scale=2.0)
SMALL = {  # of each kind, with less to compute
    "small hyper-ingp": lambda width: HyperINGP(HyperINGPSettings(grid=GRID, text_width=width)),
    "small ingp": lambda width: INGP(INGPSettings(grid=GRID)),
    "small conv3d": lambda width: Conv3D(Conv3DSettings((16, 8), text_width=width)),
    "small triplane": lambda width: Triplane(TriplaneSettings(4, layers=1, text_width=width)),
}


class Mixed(World):
    mixed = True


@cache
def prior_on(device: str, name: str, dtype: str):
    execution = PriorSettings(dtype)
    settings = replace(SETTINGS, device=device, prior=name, prior_settings=execution)
    return build_prior(settings, training_prompts(SETTINGS))


def run_on(
    device: str,
    generator: str,
    method: str = "asd",
    prior: str = "tiny-sd",
    dtype: str = "float32",
    **more,
) -> Run:
    settings = replace(SETTINGS, device=device, generator=generator, method=method, prior=prior)
    settings = replace(settings, **more)
    parts = training_prompts(settings), SMALL[generator]
    run = build(Path("unused"), settings, *parts, prior=prior_on(device, prior, dtype))
    run.optimizer = generator_optimizer(run.settings, run.generator)
    return run


# on a GPU, before the simulation begins -----------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("generator", SMALL)
def test_a_step_on_a_gpu(generator):
    "With the code that a GPU has, against the CPU."
    prior_on.cache_clear()
    runs = [run_on(device, generator) for device in ("cuda", "cpu")]
    metrics, want = (dict(training_step(run, run.texts)) for run in runs)
    prior_on.cache_clear()
    assert metrics == pytest.approx(want, rel=5e-2, abs=1e-3)  # TF32


@pytest.fixture(scope="module")
def plain():
    "No compiled code: what runs is torch's."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_grid, "find_spec", lambda name: None)
        hash_grid.LOOKED_UP.clear()
        yield
    hash_grid.LOOKED_UP.clear()
    prior_on.cache_clear()


@pytest.fixture(scope="module")
def machine_with_cuda(plain):
    with fake_cuda() as mode:
        yield mode


@pytest.fixture
def device(machine_with_cuda):
    "Counts operations and waits of one test."
    machine_with_cuda.operations = machine_with_cuda.waits = 0
    return machine_with_cuda


def there(*tensors) -> bool:
    "Whether all tensors lie on the device."
    return all(isinstance(x, FakeTensor) and x.device == CUDA for x in tensors)


# the device itself -------------------------------------------------------------------------------


def test_tensors_of_another_device_or_type_are_refused(device):
    x = torch.ones(2, 3, device="cuda")
    for wrong in (torch.ones(2, 3), torch.ones(3)):
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            x * wrong
    with pytest.raises(RuntimeError, match="same dtype"):
        x @ torch.ones(3, 2, device="cuda", dtype=torch.float16)
    with pytest.raises(RuntimeError, match="numpy.* is not supported"):
        x.numpy()
    assert (x * torch.tensor(2.0)).sum().item() == 12  # a number may lie on the CPU
    assert best_device("auto") == CUDA and x.is_cuda


def test_numbers_and_gradients_are_those_of_the_cpu(device):
    x = torch.randn(4, 5, generator=make_rng(0)).to("cuda").requires_grad_()
    y = torch.linspace(-1, 1, 20, device="cuda").view(4, 5)
    y[1].mul_(3)  # a view, in place
    (x * y)[x > 0].square().sum().backward()
    on_cpu = numbers(x).detach().requires_grad_()
    (on_cpu * numbers(y))[on_cpu > 0].square().sum().backward()
    assert there(x.grad, y) and torch.equal(x.grad.cpu(), on_cpu.grad)


def test_reads_are_counted(device):
    x = torch.ones(3, device="cuda")
    x.to("cpu", non_blocking=True)
    assert device.waits == 0
    assert x.sum().item() == 3 and x.cpu().tolist() == [1.0] * 3
    assert device.waits == 2


# a step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", SMALL)
def test_a_step_is_that_of_the_cpu(generator, device):
    "Metrics and weights; the step waits for the device once, for the number of samples it keeps."
    run, expected = run_on("cuda", generator), run_on("cpu", generator)
    texts = run.texts
    assert there(texts.tokens, texts.pooled, *run.generator.state_dict().values())
    device.waits = 0
    metrics, want = training_step(run, texts), training_step(expected, expected.texts)
    assert device.waits == 1
    assert dict(metrics) == pytest.approx(dict(want), rel=1e-3, abs=1e-5)
    state = [x for one in run.optimizer.state.values() for x in one.values()]
    assert there(*run.generator.parameters(), *state) and state
    pairs = zip(run.generator.named_parameters(), expected.generator.parameters(), strict=True)
    for (name, got), right in pairs:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.detach().cpu(), right.detach(), atol=1e-4, rtol=0, msg=name)


def test_a_step_in_16_bits(device):
    "The prior in float16, as by default on CUDA, and the generator's networks in bfloat16."
    generator = "small hyper-ingp"
    run, expected = run_on("cuda", generator, dtype="auto"), run_on("cpu", generator)
    run.world = Mixed()
    assert run.prior.unet.dtype == torch.float16 and there(*run.prior.unet.parameters())
    metrics, want = training_step(run, run.texts), training_step(expected, expected.texts)
    assert metrics["t"] == want["t"]
    for name in ("opacity", "gradient_norm", "loss_sparsity"):
        assert metrics[name] == pytest.approx(want[name], rel=0.1), name
    assert {x.dtype for x in run.generator.parameters()} == {torch.float32}


# methods -----------------------------------------------------------------------------------------


def gradients(where: str, method: str, prior: str, **more) -> str | list[torch.Tensor]:
    "The gradient at the latents, and the loss of an estimator; or why the method is refused."
    try:
        run = run_on(where, "small ingp", method, prior, **more)
        views = getattr(run.prior, "views", 1)
        shape = views, *run.prior.latent_shape
        latents, rng = torch.randn(shape, generator=make_rng(0)).to(where), step_rng(0, 1)
        batch = sample_batch(run.settings, run.train_prompts, 0, rng)
        query = query_prior(run, batch, latents, 0, rng)
    except UsageError as error:  # of a method for another kind of prior
        return str(error)
    found = [query.score.gradient]
    if method in ESTIMATOR_METHODS:
        finite = torch.ones((), dtype=torch.bool, device=where)
        fitted = fit_estimator(run, [latents], [query], rng, finite)["loss_estimator"]
        found.append(fitted.detach())
        assert where == "cpu" or there(*run.estimator.estimator.parameters())
    assert where == "cpu" or there(query.score.t, query.sample.noise, *found)
    return [value.cpu() for value in found]


def check_same(got: str | list[torch.Tensor], want: str | list[torch.Tensor]) -> None:
    "Gradients and losses to a thousandth: sums of float32 in another order; refusals word by word."
    if isinstance(want, str):
        assert got == want
        return
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * other.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_that_of_the_cpu(method, device):
    prior = "tiny-sd" if method in ESTIMATOR_METHODS else "mixture"
    got, want = gradients("cuda", method, prior), gradients("cpu", method, prior)
    check_same(got, want)


@pytest.fixture(scope="module")
def pipelines(plain, tmp_path_factory):
    "Folders of small pipelines of the other kinds, with random weights."
    folder = tmp_path_factory.mktemp("pipelines")
    seed_everything(0)
    with quiet():
        random_sdxl_pipeline().save_pretrained(folder / "xl")
        random_sd3_pipeline().save_pretrained(folder / "sd3")
    write_pipeline(random_multi_view(), folder / "views")
    return folder


@pytest.mark.parametrize("kind", ["xl", "sd3", "views"])
@pytest.mark.parametrize("method", ["asd", "rfds", "vsd", "esd"])
def test_each_kind_of_prior_is_that_of_the_cpu(method, kind, pipelines, device):
    folder, plain = str(pipelines / kind), DistillSettings(view_prompting="plain")
    known = {"prompt": ("a red ball",), "distill": plain}  # what their tokenizers read
    got, want = (gradients(where, method, folder, **known) for where in ("cuda", "cpu"))
    assert not isinstance(want, str), want
    check_same(got, want)


# a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(machine_with_cuda, tmp_path_factory):
    "A run of one step on CUDA, with its checkpoint."
    settings = replace(SETTINGS, device="cuda", generator="small", steps=1)
    folder, make = tmp_path_factory.mktemp("cuda") / "run", SMALL["small hyper-ingp"]
    with pytest.MonkeyPatch.context() as patch:
        prior = prior_on("cuda", "tiny-sd", "float32")
        patch.setattr(training_run, "build_prior", lambda *given, **options: prior)
        return run_training(folder, settings, make_generator=make, show=False)


def test_a_run_is_saved_and_opened_again(trained, device):
    run = open_run(trained.folder, make_generator=SMALL["small hyper-ingp"])
    assert torch.device(run.settings.device) == CUDA and run.step == 1
    assert there(*run.generator.state_dict().values())
    for name, value in trained.generator.state_dict().items():
        assert torch.equal(run.generator.state_dict()[name].cpu(), value.cpu()), name


def test_evaluation(trained, device):
    "Pictures, CLIP, the captures and the grid of distances; truths are computed on the CPU."
    few = replace(trained.settings.render, sampler="uniform", samples=4)
    found = []
    for where, run in (("cuda", trained), ("cpu", on_the_cpu(trained))):
        scorers, renderer = named_scorers(["tiny-clip"], where), VolumeRenderer(few)
        unknown = [replace(run.train_prompts[0], text="a green dragon")]
        options = {"views": 1, "size": 8, "renderer": renderer, "device": where}
        result = evaluate_scenes(run.scene, unknown, scorers, **options)
        with torch.no_grad():
            scene = run.scene(["a red car"])
            grid = field_grid(solid_field(scene, 1), 6, 0.5, where)
            (seen,) = capture_group(scene, [truth_of("a red car")], grid, 8, renderer, device=where)
        assert not any(isinstance(x, FakeTensor) for x in vars(seen).values())
        found.append([torch.tensor(result["sim"]), grid, seen.rgb, seen.opacity])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_a_mesh(trained, device):
    """All of it, since its number of triangles is known here; its surface is extracted on the CPU,
    layer by layer."""
    meshes = [
        extract_mesh(scene.scene(["a red car"]), resolution=12, device=where)
        for where, scene in (("cuda", trained), ("cpu", on_the_cpu(trained)))
    ]
    got, want = ([m.vertices, m.faces, m.visual.vertex_colors] for m in meshes)
    assert len(want[1]) > 100
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 if a.dtype.kind == "f" else 1)


def on_the_cpu(run: Run) -> Run:
    "The run with its weights on the CPU."
    other = run_on("cpu", "small hyper-ingp")
    other.generator.load_state_dict({k: v.cpu() for k, v in run.generator.state_dict().items()})
    return other


def test_stored_embeddings_come_to_the_device(tmp_path, device):
    prior, texts = (
        prior_on("cuda", "tiny-sd", "float32"),
        ["a red car", "a blue house", "a green tree"],
    )
    stored = StoredTexts(tmp_path, text_encoding(prior, "tiny-sd"), texts, "cuda")
    found, want = stored[[2, 0]], prior.encode_text([texts[2], texts[0]])
    assert there(*(x for x in vars(found).values() if x is not None))
    assert found.tokens.dtype == torch.float32
    torch.testing.assert_close(found.pooled.cpu(), want.pooled.float().cpu(), atol=2e-3, rtol=2e-3)
