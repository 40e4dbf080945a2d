"""Generators: prompts do not mix, scenes depend on texts, states are complete, errors are clear."""

import copy
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from test_triton_grid import needs_cuda

from scaledreamer.generator.generator_checks import check_generator
from scaledreamer.field.scene_checks import check_scene
from scaledreamer.core.settings import UsageError, from_json, to_json
from scaledreamer.field.background import SolidBackground
from scaledreamer.kernels.hash_grid_reference import HashGridSettings
from scaledreamer.field.scene import DensityScene, Scene
from scaledreamer.generator.generator_base import Generator, text_vector
from scaledreamer.field.hypernetworks import HyperNetwork, ResidualHyperNetwork
from scaledreamer.generator.hyper_ingp import HyperINGP, HyperINGPSettings, release_background
from scaledreamer.generator.ingp import INGP, INGPSettings, blob_bias
from scaledreamer.prior.base import TextEmbedding

TINY = HashGridSettings(levels=3, features=2, log2_size=5, base=3, scale=1.5)
SMALL = HyperINGPSettings(TINY, decoder_width=5, text_width=6, hidden=4)
MODELS = {
    "sdf": lambda: INGP(INGPSettings(grid=TINY, decoder_width=5)),
    "density": lambda: INGP(INGPSettings("density", TINY, decoder_width=5)),
    "wraps": lambda: INGP(INGPSettings(grid=TINY, decoder_width=5, clamp_to_cube=False)),
    "residual": lambda: HyperINGP(SMALL),
    "release": lambda: HyperINGP(
        replace(SMALL, residual=False, pooling="pooled", radius=2.0, clamp_to_cube=False)
    ),
    "spectral": lambda: HyperINGP(
        replace(SMALL, residual=False, spectral_norm=True, hidden_layers=2)
    ),
    "release with background": lambda: HyperINGP(
        replace(SMALL, residual=False), background=release_background(6)
    ),
    "residual spectral": lambda: HyperINGP(replace(SMALL, spectral_norm=True)),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def texts(b, width=6):
    return TextEmbedding(
        torch.randn(b, 4, width),
        torch.randn(b, width),
        torch.arange(4) < torch.randint(1, 5, (b, 1)),
    )


def grown(name):
    "A model whose grid has more to say than at its start."
    model = MODELS[name]().eval()
    model.encoder.table.data.normal_(0, 0.5)
    return model


def shape_of(scene, points):
    return scene.sdf(points) if hasattr(scene, "sdf") else scene.density(points)


@pytest.mark.parametrize("name", MODELS)
def test_contract(name, traceable):
    model, text = grown(name), texts(3)
    assert isinstance(model, Generator)
    scene = model(text)
    assert isinstance(scene, DensityScene if name == "density" else Scene)
    check_scene(scene, 3)
    check_generator(model, text)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name):
    model, text, points = grown(name), texts(2), torch.rand(2, 200, 3) * 2 - 1
    scene = model(text)
    answers = (
        shape_of(scene, points),
        scene.color(points),
        scene.background(torch.nn.functional.normalize(points, dim=-1)),
    )
    sum((answer**2).sum() for answer in answers).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["sdf", "density", "residual", "release"])
@pytest.mark.parametrize("n", [0, 1])
def test_few_points(name, n):
    model, text = grown(name), texts(2)
    scene, points = model(text), torch.rand(2, n, 3, requires_grad=True)
    assert shape_of(scene, points).shape == (2, n) and scene.color(points).shape == (2, n, 3)
    assert scene.background(points).shape == (2, n, 3)
    (shape_of(scene, points).sum() + scene.color(points).sum()).backward()
    assert points.grad.shape == (2, n, 3)
    if hasattr(scene, "sdf_at_shared"):
        assert scene.sdf_at_shared(points[0]).shape == (2, n)


@pytest.mark.parametrize("name", ["sdf", "residual", "release"])
def test_both_at_once_and_shared_points(name):
    scene, points = grown(name)(texts(3)), torch.rand(3, 50, 3) * 2 - 1
    sdf, color = scene.sdf_and_color(points)
    torch.testing.assert_close(sdf, scene.sdf(points))
    torch.testing.assert_close(color, scene.color(points))
    torch.testing.assert_close(
        scene.sdf_at_shared(points[0]), scene.sdf(points[:1].expand(3, -1, -1))
    )


def test_density_is_softplus_of_net_plus_blob():
    model, points = grown("density"), torch.rand(2, 50, 3) * 2 - 1
    scene = model(texts(2))
    net = model.shape_decoder(model.features(points))[..., 0]
    expected = torch.nn.functional.softplus(net + 10 * (1 - points.norm(dim=-1) / 0.5))
    torch.testing.assert_close(scene.density(points), expected)
    torch.testing.assert_close(scene.density_and_color(points)[0], expected)
    torch.testing.assert_close(scene.density_and_color(points)[1], scene.color(points))
    assert blob_bias(torch.zeros(1, 3)).item() == 10


def test_shared_points_are_encoded_once():
    model, queried = grown("residual"), []
    model.encoder.register_forward_hook(
        lambda module, inputs, output: queried.append(inputs[0].shape[:-1].numel())
    )
    scene = model(texts(4))
    assert queried == []  # making a scene queries no point
    scene.sdf_at_shared(torch.rand(50, 3))
    scene.sdf_and_color(torch.rand(4, 10, 3))
    assert queried == [50, 40]


@pytest.mark.parametrize("name", ["sdf", "residual"])
def test_outside_the_cube(name):
    "The correction is that of the nearest point of the cube; the distance goes on growing."
    scene = grown(name)(texts(2))
    inside = torch.tensor([1.0, 0.3, -0.2]).expand(2, 1, 3)
    outside = torch.tensor([7.0, 0.3, -0.2]).expand(2, 1, 3)
    growth = outside.norm(dim=-1) - inside.norm(dim=-1)
    torch.testing.assert_close(scene.sdf(outside) - scene.sdf(inside), growth)
    torch.testing.assert_close(scene.color(outside), scene.color(inside))


@pytest.mark.parametrize("name", ["sdf", "residual", "release"])
def test_gradients_in_double_precision(name):
    model = grown(name).double()
    text = TextEmbedding(*(x.double() for x in (torch.randn(2, 3, 6), torch.randn(2, 6))))
    points = ((torch.rand(2, 3, 3) * 2 - 1) * 0.9).double().requires_grad_()
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if n != "encoder.table"])

    def query(points, table, *values):
        state = dict(zip(names, values)) | {"encoder.table": table}
        scene = torch.func.functional_call(model, state, (text,))
        return scene.sdf_and_color(points)

    assert torch.autograd.gradcheck(
        query, (points, model.encoder.table, *parameters), fast_mode=True
    )


def test_dtype_and_device_follow_the_model():
    model, text = grown("residual").double(), texts(2)
    scene = model(text.to(torch.float64))
    assert scene.sdf(torch.rand(2, 3, 3).double()).dtype == torch.float64


@needs_cuda
def test_a_scene_on_cuda():
    fast, text, points = grown("residual").cuda(), texts(2), torch.rand(2, 300, 3)
    expected = copy.deepcopy(fast).cpu()(text).sdf(points)
    torch.testing.assert_close(
        fast(text.to("cuda")).sdf(points.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3
    )


def test_half_precision_text_and_autocast():
    model, text, points = grown("residual"), texts(2), torch.rand(2, 40, 3)
    expected = model(text).sdf(points)
    assert model(text.to(torch.float16)).sdf(points).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(text).sdf(points)
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)  # bfloat16 has 8 bits


@pytest.mark.parametrize("name", MODELS)
def test_state_round_trip(name):
    model, text, points = grown(name), texts(3), torch.rand(3, 20, 3)
    if hasattr(model, "standardise"):
        model.standardise(texts(9))
    other = MODELS[name]().eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        shape_of(other(text), points), shape_of(model(text), points), rtol=0, atol=0
    )
    restored = type(model)(
        from_json(type(model.settings), to_json(model.settings)), background=other.background
    ).eval()
    restored.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        restored(text).color(points), model(text).color(points), rtol=0, atol=0
    )
    with pytest.raises(FrozenInstanceError):
        model.settings.radius = 3.0


def test_own_hypernetwork_and_background(traceable):
    count = 6 * 5 + 5 * 1 + 6 * 5 + 5 * 3
    model = HyperINGP(
        SMALL, hypernetwork=torch.nn.Linear(6, count), background=SolidBackground((0.1, 0.2, 0.3))
    )
    check_generator(model, texts(2))
    model.standardise(texts(2))  # nothing to do for it
    directions = torch.nn.functional.normalize(torch.randn(2, 5, 3), dim=-1)
    torch.testing.assert_close(
        model(texts(2)).background(directions), torch.tensor([0.1, 0.2, 0.3]).expand(2, 5, 3)
    )


def test_background_that_reads_the_text():
    class Ember(torch.nn.Module):
        def for_text(self, text):
            return lambda directions: text.pooled[:, None, :3].sigmoid().expand_as(directions)

    text = texts(3)
    background = HyperINGP(SMALL, background=Ember())(text).background(torch.randn(3, 2, 3))
    torch.testing.assert_close(background[:, 0], text.pooled[:, :3].sigmoid())


def test_wrong_text_and_wrong_points():
    model = MODELS["residual"]()
    with pytest.raises(UsageError, match="text of width 6, this text has width 9"):
        model(texts(2, width=9))
    with pytest.raises(UsageError, match="width 6, this text has width 9"):
        model.standardise(texts(2, width=9))
    with pytest.raises(UsageError, match="points for 3 prompts, but the scene has 2"):
        model(texts(2)).sdf(torch.rand(3, 4, 3))


def test_prompt_specific_ignores_its_text():
    scene, other, points = (grown("sdf"), texts(2), torch.rand(2, 9, 3))
    torch.testing.assert_close(scene(other).sdf(points), scene(texts(2, width=3)).sdf(points))


def test_masked_mean():
    text = texts(5)
    expected = torch.stack([row[kept].mean(0) for row, kept in zip(text.tokens, text.mask)])
    torch.testing.assert_close(text_vector(text, "mean"), expected)
    nothing = TextEmbedding(text.tokens, text.pooled, torch.zeros(5, 4, dtype=torch.bool))
    assert (text_vector(nothing, "mean") == 0).all()


def test_standardised_texts():
    corpus = torch.randn(12, 6) * torch.tensor([100.0, 1, 1, 1, 1e-9, 0]) + 50
    network = ResidualHyperNetwork(6, [(3, 2)])
    before = network(corpus)
    network.standardise(corpus)
    assert not torch.equal(network(corpus), before)
    standard = (corpus - network.text_mean) / network.text_std
    torch.testing.assert_close(standard[:, 0].std(correction=0), torch.tensor(1.0))
    assert standard.abs().max() < 12 and network.text_std.min() >= 0.01 * network.text_std.max()
    # the length and the common part of the texts no longer matter
    shifted = ResidualHyperNetwork(6, [(3, 2)])
    shifted.load_state_dict(network.state_dict())
    shifted.standardise(3 * corpus - 7)
    torch.testing.assert_close(shifted(3 * corpus - 7), network(corpus), rtol=1e-3, atol=1e-4)
    network.standardise(corpus[:1])
    torch.testing.assert_close(network(corpus[:1]).isfinite().all(), torch.tensor(True))


def test_spectral_norm_bounds_the_matrices():
    network = HyperNetwork(6, 40, hidden=8, spectral_norm=True)
    network.layers[0].parametrizations.weight.original.data.mul_(50)
    for _ in range(30):
        network(torch.randn(2, 6))  # a power iteration a call, in training mode
    network.eval()
    assert torch.linalg.matrix_norm(network.layers[0].weight, 2) < 1.01
