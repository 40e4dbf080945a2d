"""Hyper-iNGP against tensors of the released modules (tests/parity), and exact parameter counts."""

import json

import pytest
import torch

from released import PARITY, fixture, formula

from scaledreamer.field.background import SolidBackground
from scaledreamer.field.decoders import layer_shapes, mlp, split_weights
from scaledreamer.field.hash_grid import HashGrid
from scaledreamer.kernels.hash_grid_reference import HashGridSettings
from scaledreamer.generator.generator_base import (
    FieldScene,
    PromptedBackground,
    background_of,
    to_unit,
)
from scaledreamer.field.hypernetworks import HyperNetwork
from scaledreamer.generator.hyper_ingp import HyperINGP, HyperINGPSettings, release_background
from scaledreamer.generator.ingp import INGP, INGPSettings
from scaledreamer.release.lightning import hyper_key
from scaledreamer.prior.base import TextEmbedding

BACKENDS = ("torch", "numba")


def grid_of(settings):
    grid = settings["pos_encoding_config"]
    return HashGridSettings(
        grid["n_levels"],
        grid["n_features_per_level"],
        grid["log2_hashmap_size"],
        grid["base_resolution"],
        grid["per_level_scale"],
    )


class Release:
    "The fixture's generator built from our parts; its decoders may have different hidden widths."

    def __init__(self, settings, tensors, backend):
        hyper = settings["hypernet_config"]
        self.settings, grid = settings, grid_of(settings)
        width = grid.levels * grid.features
        self.sdf, self.color = (
            layer_shapes((width, *hyper["out_dims"][name]))
            for name in ("sdf_weights", "feature_weights")
        )
        self.encoder = HashGrid(grid, backend)
        outputs = sum(i * o for i, o in self.sdf + self.color)
        self.hypernetwork = HyperNetwork(
            hyper["c_dim"],
            outputs,
            hyper["n_neurons"],
            hyper["n_hidden_layers"],
            hyper["spectral_norm"],
        ).eval()
        weights = {
            key.removeprefix("weights/"): value
            for key, value in tensors.items()
            if key.startswith("weights/")
        }
        self.encoder.load_state_dict({"table": weights["encoding.encoding.encoding.params"]})
        prefix = "hypernet."
        self.hypernetwork.load_state_dict(
            {
                hyper_key(k.removeprefix(prefix)): v
                for k, v in weights.items()
                if k.startswith(prefix)
            }
        )

    def weights(self, text):
        return split_weights(self.hypernetwork(text), self.sdf + self.color)

    def scene(self, text):
        weights, radius = self.weights(text), self.settings["radius"]
        return FieldScene(
            lambda p: self.encoder(to_unit(p, radius, clamp=False)),
            lambda x: mlp(x, weights[:2]),
            lambda x: mlp(x, weights[2:]),
            SolidBackground(), len(text), radius, self.settings["sdf_bias_params"], shared=True,
        )  # fmt: skip


NAMES = ("02_hyper_ingp_a_plain", "02_hyper_ingp_b_two_hidden", "02_hyper_ingp_c_spectral")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, backend):
    meta, t = fixture(name)
    release, text = Release(meta["settings"], t, backend), t["text"].requires_grad_()
    cache = release.weights(text)
    for ours, key in zip(
        cache, ("sdf_weights/0", "sdf_weights/1", "feature_weights/0", "feature_weights/1")
    ):
        torch.testing.assert_close(ours, t[f"cache/{key}"], rtol=0, atol=1e-5)

    scene = release.scene(text)
    sdf, color = scene.sdf_and_color(t["points"])
    torch.testing.assert_close(sdf, t["sdf"].view_as(sdf), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        scene.sdf(t["points"]), t["sdf_forward_sdf"][..., 0], rtol=0, atol=1e-5
    )
    features = scene.color_head(scene.features(t["points"]))
    torch.testing.assert_close(features, t["features"].view_as(features), rtol=0, atol=1e-5)
    torch.testing.assert_close(color, t["features"].view_as(color).sigmoid(), rtol=0, atol=1e-5)

    loss = (sdf * t["loss_r_sdf"].view_as(sdf)).sum() + (
        features * t["loss_r_features"].view_as(features)
    ).sum()
    torch.testing.assert_close(loss[None], t["loss"], rtol=1e-4, atol=1e-4)
    loss.backward()
    theirs = {
        key.removeprefix("grad/"): value for key, value in t.items() if key.startswith("grad/")
    }
    ours = {f"hypernet.{key}": p.grad for key, p in release.hypernetwork.named_parameters()}
    ours["encoding.encoding.encoding.params"] = release.encoder.table.grad
    translated = {
        key.replace("weight_orig", "parametrizations.weight.original"): value
        for key, value in theirs.items()
    }
    assert translated.keys() == ours.keys()
    for key, value in translated.items():
        torch.testing.assert_close(
            ours[key], value, rtol=1e-4, atol=1e-4, msg=lambda m: f"{key}: {m}"
        )
    torch.testing.assert_close(text.grad, t["grad_text"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_forward_differences(name):
    meta, t = fixture(name)
    scene, points, radius = (
        Release(meta["settings"], t, "torch").scene(t["text"]),
        t["points"],
        meta["settings"]["radius"],
    )
    eps = meta["settings"]["finite_difference_normal_eps"]
    with torch.no_grad():
        moved = [scene.sdf((points + eps * axis).clamp(-radius, radius)) for axis in torch.eye(3)]
        gradient = (torch.stack(moved, -1) - scene.sdf(points)[..., None]) / eps
    theirs = t["sdf_grad"].view_as(gradient)
    torch.testing.assert_close(
        gradient, theirs, rtol=0, atol=5e-3
    )  # fp32 values one hundredth apart
    clear = theirs.norm(dim=-1) > 0.1
    normal = torch.nn.functional.normalize(gradient, dim=-1)
    torch.testing.assert_close(normal[clear], t["normal"].view_as(normal)[clear], rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", ["02_hyper_ingp_a_plain", "02_hyper_ingp_c_spectral"])
def test_generator_is_these_parts(name):
    "HyperINGP, loaded with the release's tensors, is the same scene from text on."
    meta, t = fixture(name)
    settings = meta["settings"]
    hyper = settings["hypernet_config"]
    model = HyperINGP(
        HyperINGPSettings(
            grid_of(settings),
            decoder_width=hyper["out_dims"]["sdf_weights"][0],
            radius=settings["radius"],
            init_sphere_radius=settings["sdf_bias_params"],
            clamp_to_cube=False,
            text_width=hyper["c_dim"],
            pooling="pooled",
            residual=False,
            hidden=hyper["n_neurons"],
            hidden_layers=hyper["n_hidden_layers"],
            spectral_norm=hyper["spectral_norm"],
        )
    ).eval()  # fmt: skip
    named = {
        key.removeprefix("weights/"): value
        for key, value in t.items()
        if key.startswith("weights/") and "bbox" not in key
    }
    state = {
        hyper_key(key.replace("hypernet.", "hypernetwork.")): value
        for key, value in named.items()
        if "hypernet" in key
    }
    state["encoder.table"] = named["encoding.encoding.encoding.params"]
    model.load_state_dict(state)
    scene = model(TextEmbedding(t["text"][:, None], t["text"]))
    with torch.no_grad():
        torch.testing.assert_close(
            scene.sdf(t["points"]), t["sdf"].view(t["points"].shape[:2]), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            scene.color(t["points"]),
            t["features"].view_as(t["points"]).sigmoid(),
            rtol=0,
            atol=1e-5,
        )


def test_background():
    meta, t = fixture("10_background_hyper_hashgrid")
    hyper, text = meta["settings"]["hypernet_config"], t["text"]
    background = PromptedBackground(
        HyperNetwork(24, 132, hyper["n_neurons"]), grid=grid_of(meta["settings"]), width=12
    )
    background.encoder.load_state_dict({"table": t["weights/encoding.encoding.encoding.params"]})
    prefix = "weights/hypernet."
    background.hypernetwork.load_state_dict(
        {key.removeprefix(prefix): value for key, value in t.items() if key.startswith(prefix)}
    )
    with torch.no_grad():
        color = background_of(background, TextEmbedding(text[:, None], text))(
            t["dirs"].flatten(1, 2)
        )
    torch.testing.assert_close(color.view_as(t["color"]), t["color"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_size(backend):
    meta, t = fixture("12_fullsize_hyper")
    model = HyperINGP(HyperINGPSettings.paper(), backend=backend)
    names = {"geometry.encoding.encoding.encoding.params": model.encoder.table}
    names |= {f"geometry.hypernet.{key}": p for key, p in model.hypernetwork.named_parameters()}
    assert names.keys() == meta["offset_amplitude"].keys()
    for key, parameter in names.items():
        values = formula(key, parameter.numel(), meta["salt"], *meta["offset_amplitude"][key])
        torch.testing.assert_close(
            values[:3], torch.tensor(meta["first_values_check"][key]), rtol=1e-6, atol=1e-8
        )
        parameter.data.copy_(values.view_as(parameter))
    text = TextEmbedding(t["text"][:, None], t["text"])
    with torch.no_grad():
        weights = split_weights(
            model.hypernetwork(t["text"]), [(32, 64), (64, 1), (32, 64), (64, 3)]
        )
        for ours, key in (
            (weights[0], "sdf_weights/0"),
            (weights[1], "sdf_weights/1"),
            (weights[3], "feature_weights/1"),
        ):
            torch.testing.assert_close(ours, t[f"cache/{key}"], rtol=0, atol=1e-4)
        scene = model(text)
        sdf, features = scene.sdf(t["points"])[0], scene.color_head(scene.features(t["points"]))[0]
    for ours, theirs in ((sdf[:, None], t["sdf"]), (features, t["features"])):
        assert (
            (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        )  # the grid's scales are those of the fixture, in fp32


@pytest.mark.parametrize(
    "name, model, ours",
    [
        (
            "09_state_dict_asd_sd_hyper_iNGP_50k",
            HyperINGP(HyperINGPSettings.paper(), backend="torch"),
            12_948_464,
        ),
        ("09_state_dict_asd_sd_nerf", INGP(INGPSettings.paper(), backend="torch"), 12_604_272),
    ],
)
def test_parameters_to_the_unit(name, model, ours):
    meta = json.loads((PARITY / f"{name}.json").read_text())
    theirs = [
        tuple(v["shape"])
        for k, v in meta["state_dict"].items()
        if k.startswith("geometry.") and v["kind"] == "parameter"
    ]
    assert (
        sum(p.numel() for p in model.parameters())
        == meta["n_parameters_by_prefix"]["geometry"]
        == ours
    )
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(theirs)


def test_the_whole_release_to_the_unit():
    meta = json.loads((PARITY / "09_state_dict_asd_sd_hyper_iNGP_50k.json").read_text())
    model = HyperINGP(HyperINGPSettings.paper(), background=release_background())
    trained = {
        key: sum(p.numel() for p in part.parameters()) for key, part in model.named_children()
    }
    assert trained["background"] == meta["n_parameters_by_prefix"]["background"] == 342_336
    assert sum(trained.values()) == meta["n_parameters"] - 1  # less the renderer's frozen inv_std
