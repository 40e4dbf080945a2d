"""The renderer against tensors of the paper's release.

Fixtures 05a, 05b, 05c and 08; tests/parity/*.json describe how each was made."""

import pytest
import torch
from torch.nn import functional as F

from released import check_eval, check_train, fixture, stratified

from scaledreamer.camera.rays import Rays
from scaledreamer.field.density import volsdf_density
from scaledreamer.field.hash_grid import HashGrid, HashGridSettings
from scaledreamer.rendering.compositing import composite, density_weights, first_order_weights
from scaledreamer.rendering.query import query_scene, sample_weights
from scaledreamer.rendering.ray_samples import place_samples
from scaledreamer.rendering.regularisers import depth_variance, eikonal, opaque, orient, sparsity
from scaledreamer.rendering.render_settings import RELEASE, field_gradient
from scaledreamer.rendering.sampling import importance_edges


# 05a: density, weights and their sums


@pytest.mark.parametrize("p", ["p0", "p1", "p2"])
def test_volsdf_weights_and_sums(p):
    _, data = fixture("05a_volsdf")
    edges, sharpness = data["t_edges"], min(data[f"{p}/inv_std"].item(), 80.0)
    density = volsdf_density(data["sdf"], 1 / sharpness)
    # far out, s (1/2 + expm1 / 2) is rounding of s = 80
    torch.testing.assert_close(density, data[f"{p}/density"], rtol=1e-5, atol=1e-5)
    midpoints = (edges[:, 1:] + edges[:, :-1]) / 2
    for kind, to_weights in (("upstream", first_order_weights), ("exact", density_weights)):
        weights, _ = to_weights(density, edges.diff(dim=-1))
        torch.testing.assert_close(weights, data[f"{p}/weights_{kind}"], rtol=1e-4, atol=1e-5)
        pixels = composite(weights, midpoints, midpoints[..., None])
        for name, value in (
            ("opacity", pixels.opacity),
            ("depth", pixels.depth),
            ("z_variance", pixels.z_variance),
        ):
            torch.testing.assert_close(
                value[:, None], data[f"{p}/{name}_{kind}"], rtol=1e-4, atol=1e-4
            )


# 05c: the importance sampler


@pytest.mark.parametrize("kind", ["det", "strat"])
def test_importance_sampler(kind):
    info, data = fixture("05c_importance_sampler")
    near, far = (torch.full((7,), info[name]) for name in ("near", "far"))
    bump = lambda t: (
        data["sigma_amp"] * torch.exp(-0.5 * ((t - data["sigma_mu"]) / data["sigma_std"]) ** 2)
    )
    biases = (
        [data[f"strat/bias_{which}"] for which in ("coarse", "fine")]
        if kind == "strat"
        else [None, None]
    )
    edges = importance_edges(bump, near, far, info["n_coarse"], info["n_fine"], *biases)
    torch.testing.assert_close(edges[:, :-1], data[f"{kind}/t_starts"], rtol=0, atol=1e-4)
    torch.testing.assert_close(edges[:, 1:], data[f"{kind}/t_ends"], rtol=0, atol=1e-4)


# 08: regularisers


def test_losses_and_their_gradients():
    info, data = fixture("08_losses")
    leaf = {
        name: data[name].clone().requires_grad_()
        for name in ("opacity", "normal", "z_variance", "sdf_grad", "weights")
    }
    losses = {
        "sparsity": sparsity(leaf["opacity"]),
        "opaque": opaque(leaf["opacity"]),
        "orient": orient(leaf["weights"][:, 0], leaf["normal"], data["t_dirs"], leaf["opacity"]),
        "z_variance": depth_variance(leaf["z_variance"], leaf["opacity"]),
        "eikonal": eikonal(leaf["sdf_grad"]),
    }
    total = sum(info["lambdas"][name] * loss for name, loss in losses.items())
    torch.testing.assert_close(total[None], data["total_weighted"], rtol=1e-5, atol=1e-6)
    for key in data:
        if key.startswith("grad_"):
            name, by = key[5:].split("/")
            got = torch.autograd.grad(losses[name], leaf[by], retain_graph=True)[0]
            torch.testing.assert_close(got, data[key], rtol=1e-5, atol=1e-7)
    for name, loss in losses.items():
        torch.testing.assert_close(loss[None], data[f"loss_{name}"], rtol=1e-5, atol=1e-7)
    assert torch.autograd.grad(losses["orient"], leaf["weights"], allow_unused=True) == (None,)


# 05b: the whole renderer, with the fixture's Hyper-iNGP written out


class ReleasedHyper:
    "Hyper-iNGP and background from the fixture: shared grids, bias-free decoders from text."

    def __init__(self, data, settings):
        self.weights = {
            k: v.clone().requires_grad_(v.is_floating_point())
            for k, v in data.items()
            if k.startswith("weights/")
        }
        self.text, self.radius, self.bias = (
            data["text"],
            settings["geometry"]["radius"],
            settings["geometry"]["sdf_bias_params"],
        )
        self.grids = {
            "geometry": self.grid(settings["geometry"]),
            "background": self.grid(settings["background"]),
        }
        hidden = {"geometry": (8, 12), "background": (4, 8)}
        self.decoders = {}
        for part, outs in (("geometry", (1, 3)), ("background", (3,))):
            flat, (wide, inner) = self.hyper(part), hidden[part]
            shapes = [shape for out in outs for shape in ((wide, inner), (inner, out))]
            pieces = flat.split([a * b for a, b in shapes], dim=1)
            self.decoders[part] = [piece.view(-1, *shape) for piece, shape in zip(pieces, shapes)]

    def grid(self, settings):
        c = settings["pos_encoding_config"]
        shape = HashGridSettings(
            c["n_levels"],
            c["n_features_per_level"],
            c["log2_hashmap_size"],
            c["base_resolution"],
            c["per_level_scale"],
        )
        return HashGrid(shape, backend="torch")

    def hyper(self, part):
        w = lambda name: self.weights[f"weights/{part}.hypernet.layers.{name}"]
        x = F.silu(
            F.layer_norm(
                self.text @ w("0.weight").T, w("1.weight").shape, w("1.weight"), w("1.bias")
            )
        )
        return x @ w("3.weight").T + w("3.bias")

    def encode(self, part, unit):
        table = self.weights[f"weights/{part}.encoding.encoding.encoding.params"]
        return torch.func.functional_call(self.grids[part], {"table": table}, (unit,))

    def heads(self, points, which):
        x = self.encode("geometry", (points + self.radius) / (2 * self.radius))
        first, last = self.decoders["geometry"][2 * which : 2 * which + 2]
        return (x @ first).relu() @ last

    def sdf(self, points):
        return self.heads(points, 0)[..., 0] + points.norm(dim=-1) - self.bias

    def color(self, points):
        return self.heads(points, 1).sigmoid()

    def sdf_and_color(self, points):
        return self.sdf(points), self.color(points)

    def background(self, directions):
        first, last = self.decoders["background"]
        return ((self.encode("background", (directions + 1) / 2) @ first).relu() @ last).sigmoid()


def hyper_fixture():
    info, data = fixture("05b_render_hyper")
    image = lambda value: value.movedim(-1, 1)[:, None]
    return (
        data,
        ReleasedHyper(data, info["settings"]),
        Rays(data["rays_o"][:, None], data["rays_d"][:, None]),
        RELEASE,
        image,
    )


def test_released_render_deterministic():
    data, scene, rays, settings, image = hyper_fixture()
    out = check_eval(scene, rays, data, image)
    torch.testing.assert_close(
        out.rgb - (1 - out.opacity) * out.background,
        image(data["eval/comp_rgb_fg"]),
        rtol=0,
        atol=2e-3,
    )
    torch.testing.assert_close(out.z_variance, image(data["eval/z_variance"]), rtol=0, atol=5e-3)
    torch.testing.assert_close(
        out.normal_image(), image(data["eval/comp_normal"]), rtol=0, atol=5e-3
    )


def test_released_render_stratified_with_gradients(monkeypatch):
    data, scene, rays, settings, image = hyper_fixture()
    stratified(monkeypatch, data)
    info, _ = fixture("05b_render_hyper")
    check_train(scene, rays, info, data, image)
    for name, norm in info["grad_norm_per_parameter"].items():
        torch.testing.assert_close(
            scene.weights[f"weights/{name}"].grad.norm().item(), norm, rtol=2e-2, atol=0
        )


def test_released_samples_and_their_gradients(monkeypatch):
    data, scene, rays, settings, _ = hyper_fixture()
    info, _ = fixture("05b_render_hyper")
    jitter = stratified(monkeypatch, data)
    with torch.no_grad():
        samples = place_samples(scene, *rays.flat(), settings, jitter)
        torch.testing.assert_close(samples.midpoints[0], data["train/t_points"], rtol=0, atol=2e-4)
        torch.testing.assert_close(
            samples.edges[0].diff(dim=-1), data["train/t_intervals"], rtol=0, atol=4e-4
        )
        points = samples.points()
        values, colors = query_scene(scene, samples, points, settings)
        every = info["sizes"]["ray_step"]
        rows = lambda x: x[0].unflatten(0, (30, 193))[::every]
        torch.testing.assert_close(rows(values)[..., None], data["train/sdf"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            rows(colors), data["train/features"].sigmoid(), rtol=0, atol=5e-3
        )
        torch.testing.assert_close(
            sample_weights(scene, samples, values, settings)[0, ::every, :, None],
            data["train/weights"],
            rtol=0,
            atol=2e-3,
        )
        gradient = field_gradient(scene.sdf, points, epsilon=settings.epsilon, values=values)
        # beyond this the release clamps its steps
        inside = rows(points).abs().amax(-1) < scene.radius - settings.epsilon
        # 2e-4 in t moves the base point: compare where both differences stay within one cell
        # of the grid's levels, i.e. nearly everywhere
        close = ((rows(gradient) - data["train/sdf_grad"])[inside].abs() < 2e-2).float().mean()
        assert close > 0.98, close
