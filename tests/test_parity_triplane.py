"""Triplane-Transformer against tensors of the released modules (tests/parity); parameter counts."""

import json
from dataclasses import replace

import pytest
import torch

from released import PARITY, check_eval, check_train, fixture, formula, stratified

from scaledreamer.camera.rays import Rays
from scaledreamer.generator.generator_checks import check_generator
from scaledreamer.core.settings import UsageError, from_json, to_json
from scaledreamer.field.background import EnvironmentMap, wide_sigmoid
from scaledreamer.generator.generator_base import Generator
from scaledreamer.release.released_settings import triplane_key
from scaledreamer.field.planes import sample_triplane
from scaledreamer.generator.triplane import Triplane, TriplaneSettings
from scaledreamer.prior.base import TextEmbedding
from scaledreamer.training.train_settings import GENERATORS

NAMES = ("04_triplane_a_local", "04_triplane_b_global")


def settings_of(geometry):
    "Of a fixture's geometry."
    g = geometry["space_generator_config"]
    assert g["triplane_high_res"] == 2 * g["triplane_low_res"]
    return TriplaneSettings(
        side=g["triplane_low_res"],
        channels=g["triplane_dim"],
        width=g["inner_dim"],
        layers=g["num_layers"],
        heads=g["num_heads"],
        mlp_ratio=g["mlp_ratio"],
        text="tokens" if g["local_text"] else "pooled",
        text_width=g["condition_dim"],
        masked=False,
        radius=geometry["radius"],
        init_sphere_radius=geometry["sdf_bias_params"],
        wide_colors=True,
    )


def released(name, **changes):
    "The fixture's generator with its weights, every one of them, and its text."
    meta, t = fixture(name)
    model = Triplane(replace(settings_of(meta["settings"]), **changes))
    model.load_state_dict(
        {
            triplane_key(k.removeprefix("weights/")): v
            for k, v in t.items()
            if k.startswith("weights/") and "bbox" not in k
        }
    )
    text = t["text"].requires_grad_()
    return (
        meta,
        t,
        model,
        TextEmbedding(text, text.mean(1))
        if text.ndim == 3
        else TextEmbedding(text[:, None].detach(), text),
    )


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, checkpoint):
    meta, t, model, text = released(name, checkpoint=checkpoint)
    planes = model.planes(text)
    torch.testing.assert_close(planes, t["planes"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sample_triplane(t["planes"], t["points"], 2.0), t["plane_features"], rtol=0, atol=1e-6
    )  # same planes, also outside the cube
    scene = model(text)
    torch.testing.assert_close(
        scene.features(t["points"]), t["plane_features"], rtol=1e-4, atol=1e-4
    )
    sdf, color = scene.sdf_and_color(t["points"])
    features = scene.color_head(scene.features(t["points"]))
    torch.testing.assert_close(sdf, t["sdf"].view_as(sdf), rtol=0, atol=1e-4)
    torch.testing.assert_close(features, t["features"].view_as(features), rtol=0, atol=1e-4)
    torch.testing.assert_close(color, wide_sigmoid(t["features"].view_as(color)), rtol=0, atol=1e-4)

    loss = (sdf * t["loss_r_sdf"].view_as(sdf)).sum() + (
        features * t["loss_r_features"].view_as(features)
    ).sum()
    torch.testing.assert_close(loss[None], t["loss"], rtol=1e-4, atol=1e-4)
    loss.backward()
    torch.testing.assert_close(t["text"].grad, t["grad_text"], rtol=1e-3, atol=0)
    ours, norms = dict(model.named_parameters()), meta["grad_norm_per_parameter"]
    assert ours.keys() == {triplane_key(key) for key in norms}
    for key, norm in norms.items():
        assert ours[triplane_key(key)].grad.norm().item() == pytest.approx(norm, rel=1e-3), key


@pytest.mark.parametrize("name", NAMES)
def test_forward_differences(name):
    meta, t, model, text = released(name)
    scene, points, radius = model(text), t["points"], meta["settings"]["radius"]
    eps = meta["settings"]["finite_difference_normal_eps"]
    with torch.no_grad():
        moved = [scene.sdf((points + eps * axis).clamp(-radius, radius)) for axis in torch.eye(3)]
        gradient = (torch.stack(moved, -1) - scene.sdf(points)[..., None]) / eps
    torch.testing.assert_close(gradient, t["sdf_grad"].view_as(gradient), rtol=0, atol=2e-2)


def render_fixture():
    "Two prompts of two views each through the release's renderer."
    meta, t = fixture("05b_render_triplane")
    model = Triplane(
        settings_of(meta["settings"]["geometry"]), background=EnvironmentMap(squash=wide_sigmoid)
    )
    named = {
        triplane_key(key.removeprefix("weights/geometry.")): v
        for key, v in t.items()
        if key.startswith("weights/geometry.") and "bbox" not in key
    }
    prefix = "weights/background.network."
    named |= {
        f"background.{key.removeprefix(prefix)}": v
        for key, v in t.items()
        if key.startswith(prefix)
    }
    model.load_state_dict(named)
    image = lambda value: value.movedim(-1, 1).unflatten(0, (2, 2))
    rays = Rays(*(t[name].unflatten(0, (2, 2)) for name in ("rays_o", "rays_d")))
    return meta, t, model, TextEmbedding(t["text"], t["text"].mean(1)), rays, image


def test_render():
    _, t, model, text, rays, image = render_fixture()
    check_eval(model(text), rays, t, image)


def test_render_with_gradients(monkeypatch):
    meta, t, model, text, rays, image = render_fixture()
    stratified(monkeypatch, t)
    check_train(model(text), rays, meta, t, image)
    ours = dict(model.named_parameters())
    for key, norm in meta["grad_norm_per_parameter"].items():
        if norm is not None:  # the encoding of directions has no parameter
            name = triplane_key(key.removeprefix("geometry.")).replace(
                "background.network.", "background."
            )
            assert ours[name].grad.norm().item() == pytest.approx(norm, rel=2e-2), key


def test_full_size():
    "The shipped size, 120,564,480 weights from a formula: some 15 s and 1.4 GB."
    meta, t = fixture("12_fullsize_triplane")
    with torch.device("meta"):
        model = Triplane(TriplaneSettings.paper())
    values, first = {}, meta["first_values_check"]
    for key, (offset, amplitude) in meta["offset_amplitude"].items():
        name = triplane_key(key.removeprefix("geometry."))
        shape = model.get_parameter(name).shape
        values[name] = formula(key, shape.numel(), meta["salt"], offset, amplitude).view(shape)
        if key in first:
            torch.testing.assert_close(
                values[name].flatten()[:3], torch.tensor(first[key]), rtol=1e-6, atol=1e-8
            )
    model.load_state_dict(values, assign=True)
    assert sum(p.numel() for p in model.parameters()) == 120_564_480
    made = []
    model.transformer.register_forward_hook(lambda module, inputs, output: made.append(output))
    with torch.no_grad():
        scene = model(TextEmbedding(t["text"], t["text"].mean(1)))
        sdf, features = scene.sdf(t["points"])[0], scene.color_head(scene.features(t["points"]))[0]
    (planes,), (mean, std, largest) = made, t["planes_stats"].tolist()
    assert planes.mean().item() == pytest.approx(
        mean, abs=2e-3 * largest
    ) and planes.std().item() == pytest.approx(std, rel=2e-3)
    assert planes.abs().max().item() == pytest.approx(largest, rel=2e-3)
    for ours, theirs in (
        (planes[..., ::4, ::4], t["planes_sub4"]),
        (sdf[:, None], t["sdf"]),
        (features, t["features"]),
    ):
        assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()


def test_parameters_to_the_unit():
    meta = json.loads((PARITY / "09_state_dict_asd_mv_triplane_transformer_10k.json").read_text())
    with torch.device("meta"):
        model = GENERATORS["triplane-paper"](1024)
    shapes = {
        key: tuple(p.shape)
        for key, p in model.named_parameters()
        if not key.startswith("background.")
    }
    entries = {
        key.removeprefix("geometry."): entry
        for key, entry in meta["state_dict"].items()
        if key.startswith("geometry.")
    }
    assert shapes == {
        triplane_key(key): tuple(entry["shape"])
        for key, entry in entries.items()
        if entry["kind"] == "parameter"
    }
    counts = {
        key: sum(p.numel() for p in part.parameters()) for key, part in model.named_children()
    }
    assert counts == {
        "transformer": 120_543_744,
        "shape_decoder": 10_304,
        "color_decoder": 10_432,
        "background": 448,
    }
    by_prefix = meta["n_parameters_by_prefix"]
    assert (
        counts.pop("background") == by_prefix["background"]
        and sum(counts.values()) == by_prefix["geometry"] == 120_564_480
    )


# the contract


SMALL = TriplaneSettings(side=3, channels=4, width=12, heads=3, text_width=6, decoder=(5,))
KINDS = {
    "tokens": SMALL,
    "mean": replace(SMALL, text="mean"),
    "pooled": replace(SMALL, text="pooled"),
    "checkpoint": replace(SMALL, checkpoint=True),
    "release": replace(
        SMALL, masked=False, wide_colors=True, radius=2.0, init_sphere_radius=0.8, decoder=(5, 5)
    ),
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


@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind, traceable):
    "Prompts do not mix: a batch of b equals b runs of one; every parameter gets a gradient."
    model = Triplane(KINDS[kind], background=EnvironmentMap())
    assert isinstance(model, Generator)
    check_generator(model, texts(3))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_do_not_mix(kind):
    model, text, points = Triplane(KINDS[kind]), texts(4), torch.rand(4, 30, 3) * 3 - 1.5
    together, order = model(text).color(points), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        torch.cat([model(text[[i]]).color(points[[i]]) for i in range(4)]), together
    )
    torch.testing.assert_close(model(text[order]).color(points[order]), together[order])


def test_padding_is_not_looked_at():
    model, text = Triplane(SMALL), texts(3)
    other = TextEmbedding(
        torch.where(text.mask[..., None], text.tokens, 100.0), text.pooled, text.mask
    )
    torch.testing.assert_close(model.planes(other), model.planes(text))
    nothing = TextEmbedding(text.tokens, text.pooled, torch.zeros_like(text.mask))
    assert model.planes(nothing).isfinite().all()
    longer = TextEmbedding(
        torch.cat([text.tokens, text.tokens], 1),
        text.pooled,
        torch.cat([text.mask, text.mask & False], 1),
    )
    torch.testing.assert_close(model.planes(longer), model.planes(text))


@pytest.mark.parametrize("kind", ["tokens", "pooled"])
def test_checkpointing_changes_nothing(kind):
    models = [
        Triplane(replace(KINDS[kind], checkpoint=checkpoint)).train()
        for checkpoint in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    text, points = texts(2), torch.rand(2, 20, 3)
    values = [model(text).sdf(points) for model in models]
    assert torch.equal(*values)
    for value in values:
        value.square().sum().backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters()):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip(kind):
    model, text, points = Triplane(KINDS[kind]), texts(2), torch.rand(2, 20, 3)
    restored = Triplane(from_json(TriplaneSettings, to_json(model.settings)))
    restored.load_state_dict(model.state_dict())
    assert torch.equal(restored(text).color(points), model(text).color(points))


@pytest.mark.parametrize("kind", ["tokens", "mean"])
def test_gradients_in_double_precision(kind):
    model, text = Triplane(KINDS[kind]).double(), texts(2).to(torch.float64)
    points = (torch.rand(2, 3, 3) * 1.2 - 0.6).double().requires_grad_()
    names, values = zip(*model.named_parameters())

    def query(points, *values):
        return torch.func.functional_call(model, dict(zip(names, values)), (text,)).sdf_and_color(
            points
        )

    assert torch.autograd.gradcheck(query, (points, *values), fast_mode=True)


@pytest.mark.parametrize("kind", ["tokens", "pooled"])
def test_half_precision_text_and_autocast(kind):
    model, text, points = Triplane(KINDS[kind]), texts(2), torch.rand(2, 40, 3)
    expected = model(text).sdf(points)
    assert model(text.to(torch.float16)).sdf(points).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scene = model(text)
        inside = scene.sdf(points)
    for got in (inside, scene.sdf(points)):  # a scene made under autocast answers outside it
        torch.testing.assert_close(
            got.float(), expected, rtol=0.05, atol=0.05
        )  # bfloat16 has 8 bits


@pytest.mark.parametrize("n", [0, 1])
def test_few_points(n):
    scene, points = Triplane(SMALL)(texts(2)), torch.rand(2, n, 3, requires_grad=True)
    (scene.sdf(points).sum() + scene.color(points).sum()).backward()
    assert points.grad.shape == (2, n, 3) and scene.sdf_at_shared(points[0]).shape == (2, n)


def test_outside_every_plane_the_features_are_zero():
    scene = Triplane(SMALL)(texts(2))
    corner = torch.tensor([3.0, -3.0, 0.2]).expand(2, 1, 3)
    assert (scene.features(corner) == 0).all()
    torch.testing.assert_close(scene.sdf(corner), corner.norm(dim=-1) - 0.5)
    assert (
        scene.features(torch.tensor([3.0, 0.1, 0.2]).expand(2, 1, 3)) != 0
    ).any()  # plane (z, y) sees it


def test_refusals():
    for kind in ("tokens", "mean", "pooled"):
        with pytest.raises(UsageError, match="text of width 6, this text has width 9"):
            Triplane(KINDS[kind])(texts(2, width=9))
    with pytest.raises(UsageError, match="points for 3 prompts, but the scene has 2"):
        Triplane(SMALL)(texts(2)).sdf(torch.rand(3, 4, 3))
    with pytest.raises(UsageError, match="width 12 does not divide into 5 heads"):
        replace(SMALL, heads=5)
