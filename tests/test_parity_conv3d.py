"""3DConv-net against tensors of the released modules (tests/parity), and exact parameter counts."""

import json

import pytest
import torch

from released import PARITY, check_eval, check_train, fixture, formula, stratified

from scaledreamer.camera.rays import Rays
from scaledreamer.field.background import EnvironmentMap
from scaledreamer.generator.conv3d import Conv3D, Conv3DSettings
from scaledreamer.release.released_settings import conv3d_key
from scaledreamer.prior.base import TextEmbedding
from scaledreamer.rendering.ray_samples import place_samples
from scaledreamer.rendering.render_settings import RELEASE

NAMES = ("03_conv3d_a_res16", "03_conv3d_b_res32_nobias32")


def our_key(key):
    "Our name for a released parameter without `geometry.`; None for buffers that are not used."
    return None if key == "bbox" or key.endswith(("noise_const", "w_avg")) else conv3d_key(key)


def settings_of(meta):
    s = meta["settings"].get("geometry", meta["settings"])
    net = s["space_generator_config"]
    channels = meta["patch"]["channels_dict"].items()
    return Conv3DSettings(
        channels=tuple(c for side, c in channels if int(side) <= net["img_resolution"]),
        features=net["img_channels"],
        bias_side=net.get("bias_resolution", 64),
        noise=net["z_dim"],
        mapped=net["w_dim"],
        mapping_layers=net["num_layers"],
        decoder_width=s["mlp_network_config"]["n_neurons"],
        radius=s["radius"],
        init_sphere_radius=s["sdf_bias_params"],
        text_width=net["c_dim"],
        gain=1.0,
    )


def released(name):
    "The fixture's generator in ours, its description and its tensors."
    meta, t = fixture(name)
    model = Conv3D(settings_of(meta)).eval()
    named = {
        key.removeprefix("weights/"): value
        for key, value in t.items()
        if key.startswith("weights/")
    }
    model.load_state_dict({our_key(key): value for key, value in named.items() if our_key(key)})
    return meta, t, model, TextEmbedding(t["text"][:, None], t["text"])


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name):
    meta, t, model, text = released(name)
    z, c = t["z"].requires_grad_(), t["text"].requires_grad_()
    torch.testing.assert_close(model.mapping(z, c), t["w"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.voxels(text, z), t["voxel"], rtol=1e-4, atol=2e-4)
    scene = model(text, z)
    sdf, features = scene.sdf(t["points"]), scene.color_head(scene.features(t["points"]))
    torch.testing.assert_close(sdf, t["sdf"][..., 0], rtol=0, atol=2e-4)
    torch.testing.assert_close(features, t["features"], rtol=0, atol=2e-4)
    torch.testing.assert_close(scene.color(t["points"]), t["features"].sigmoid(), rtol=0, atol=1e-4)

    loss = (sdf * t["loss_r_sdf"][..., 0]).sum() + (features * t["loss_r_features"]).sum()
    torch.testing.assert_close(loss[None], t["loss"], rtol=1e-3, atol=1e-3)
    loss.backward()
    for ours, theirs in ((z.grad, t["grad_z"]), (c.grad, t["grad_text"])):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max())
        )  # numbers near 0 have no digits to compare
    theirs = {our_key(key): norm for key, norm in meta["grad_norm_per_parameter"].items()}
    ours = {key: p.grad for key, p in model.named_parameters()}
    assert theirs.keys() == ours.keys()
    for key, gradient in ours.items():
        if key.endswith("noise_strength"):
            assert gradient == 0  # theirs is of a noise that is not in the fixture
        else:
            assert float(gradient.norm()) == pytest.approx(theirs[key], rel=1e-3), key


@pytest.mark.parametrize("name", NAMES)
def test_forward_differences(name):
    meta, t, model, text = released(name)
    scene, points, radius = model(text, t["z"]), t["points"], meta["settings"]["radius"]
    eps = meta["settings"]["finite_difference_normal_eps"]
    with torch.no_grad():
        moved = [scene.sdf((points + eps * axis).clamp(-radius, radius)) for axis in torch.eye(3)]
        gradient = (torch.stack(moved, -1) - scene.sdf(points)[..., None]) / eps
    torch.testing.assert_close(gradient, t["sdf_grad"], rtol=0, atol=2e-2)
    clear = t["sdf_grad"].norm(dim=-1) > 0.5
    normal = torch.nn.functional.normalize(gradient, dim=-1)
    torch.testing.assert_close(normal[clear], t["normal"][clear], rtol=0, atol=4e-2)


def test_known_noise():
    "The noise is added after the doubling and before the bias."
    _, t, model, text = released("03_conv3d_a_res16")
    strengths = {
        key.split("/")[1]: value
        for key, value in t.items()
        if key.startswith("noise_strength_override/")
    }
    model.load_state_dict({our_key(key): value for key, value in strengths.items()}, strict=False)
    layers = ["first_block.conv1"] + [f"blocks.{k}.conv{i}" for k in range(2) for i in range(2)]
    noises = [
        t[f"weights/space_generator.synthesis.{layer}.noise_const"][None, None] for layer in layers
    ]
    with torch.no_grad():
        voxels = model.synthesis(t["w"][:1], noises)
    torch.testing.assert_close(voxels, t["voxel_noise_const"], rtol=1e-4, atol=2e-4)
    assert (voxels - t["voxel"][:1]).abs().max() > 0.1


def render_fixture():
    "One prompt and one view through the release's renderer; every noise strength is 0 there."
    meta, t = fixture("05b_render_conv3d")
    model, prefix = (
        Conv3D(settings_of(meta), background=EnvironmentMap()).eval(),
        "weights/background.network.",
    )
    named = {
        key.removeprefix("weights/geometry."): value
        for key, value in t.items()
        if key.startswith("weights/geometry.")
    }
    state = {our_key(key): value for key, value in named.items() if our_key(key)}
    model.load_state_dict(
        state
        | {
            f"background.{key.removeprefix(prefix)}": value
            for key, value in t.items()
            if key.startswith(prefix)
        }
    )
    assert all(value == 0 for key, value in state.items() if key.endswith("noise_strength"))
    image = lambda value: value.movedim(-1, 1)[:, None]
    return (
        meta,
        t,
        model(TextEmbedding(t["text"][:, None], t["text"]), t["z"]),
        Rays(t["rays_o"][:, None], t["rays_d"][:, None]),
        image,
        model,
    )


def test_render():
    _, t, scene, rays, image, _ = render_fixture()
    check_eval(scene, rays, t, image)


def test_render_with_gradients(monkeypatch):
    meta, t, scene, rays, image, model = render_fixture()
    jitter = stratified(monkeypatch, t)
    with torch.no_grad():
        samples = place_samples(scene, *rays.flat(), RELEASE, jitter)
    torch.testing.assert_close(samples.midpoints[0], t["train/t_points"], rtol=0, atol=2e-4)
    check_train(scene, rays, meta, t, image)
    ours, matched = dict(model.named_parameters()), set()
    for key, norm in meta["grad_norm_per_parameter"].items():
        part, _, rest = key.partition(".")
        name = (
            our_key(rest) if part == "geometry" else f"background.{rest.removeprefix('network.')}"
        )
        if norm is not None and not key.endswith(
            "noise_strength"
        ):  # an encoding without parameters; theirs is of a noise that is not in the fixture
            assert ours[name].grad.norm().item() == pytest.approx(norm, rel=2e-2), key
            matched.add(name)
    assert matched == {name for name in ours if not name.endswith("noise_strength")}


def test_full_size():
    meta, t = fixture("12_fullsize_conv3d")
    with torch.device("meta"):
        model = Conv3D(Conv3DSettings.paper())
    shapes, state = {key: value.shape for key, value in model.state_dict().items()}, {}
    for key, shift_schedule in meta["offset_amplitude"].items():
        ours = our_key(key.removeprefix("geometry."))
        values = formula(key, shapes[ours].numel(), meta["salt"], *shift_schedule)
        if key in meta["first_values_check"]:
            torch.testing.assert_close(
                values[:3], torch.tensor(meta["first_values_check"][key]), rtol=1e-6, atol=1e-8
            )
        state[ours] = values.view(shapes[ours])
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(False)
    model.fixed_z, model.background.color = t["z"], torch.ones(3)
    text = TextEmbedding(t["text"][:, None], t["text"])
    torch.testing.assert_close(model.mapping(t["z"], t["text"]), t["w"], rtol=0, atol=1e-4)
    voxels = model.voxels(text, t["z"])
    mean, std, top = t["voxel_stats"].tolist()
    torch.testing.assert_close(
        voxels[..., ::16, ::16, ::16], t["voxel_sub16"], rtol=0, atol=2e-3 * top
    )
    assert [float(voxels.mean()), float(voxels.std()), float(voxels.abs().max())] == pytest.approx(
        [mean, std, top], rel=2e-3, abs=2e-3 * std
    )
    model.voxels = lambda text, z: voxels  # once is enough
    scene = model(text, t["z"])
    sdf, features = scene.sdf(t["points"])[0], scene.color_head(scene.features(t["points"]))[0]
    for ours, theirs in ((sdf[:, None], t["sdf"]), (features, t["features"])):
        assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()


@pytest.mark.parametrize(
    "name, multiplier, count",
    [("50k", 1, 88_686_923), ("100k", 1, 88_686_923), ("300k", 2, 144_798_155)],
)
def test_parameters_to_the_unit(name, multiplier, count):
    meta = json.loads((PARITY / f"09_state_dict_asd_sd_3dconv_net_{name}.json").read_text())
    with torch.device("meta"):
        model = Conv3D(Conv3DSettings.paper(multiplier), background=EnvironmentMap())
    theirs = {
        k.removeprefix("geometry."): v
        for k, v in meta["state_dict"].items()
        if k.startswith("geometry.")
    }
    assert {k for k, v in theirs.items() if v["kind"] == "buffer"} == {
        k for k in theirs if our_key(k) is None
    }
    ours = {
        k: list(p.shape) for k, p in model.named_parameters() if not k.startswith("background.")
    }
    assert ours == {our_key(k): v["shape"] for k, v in theirs.items() if our_key(k)}
    assert (
        sum(p.numel() for k, p in model.named_parameters() if k in ours)
        == meta["n_parameters_by_prefix"]["geometry"]
        == count
    )
    assert (
        sum(p.numel() for p in model.background.parameters())
        == meta["n_parameters_by_prefix"]["background"]
        == 448
    )
