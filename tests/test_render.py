"""The renderer on shapes with edges and colours, on hash grids, and at extreme settings."""

import math
from dataclasses import fields, replace

import pytest
import torch

from scaledreamer.camera.cameras import Cameras
from scaledreamer.camera.rays import Rays, camera_rays
from scaledreamer.core.settings import UsageError, from_json, to_json
from scaledreamer.core.tensors import make_rng
from scaledreamer.field.density import volsdf_density
from scaledreamer.field.hash_grid import HashGrid, HashGridSettings
from scaledreamer.field.scene import FogScene, SphereScene
from scaledreamer.rendering.compositing import composite, density_weights
from scaledreamer.rendering.proposal import proposal_edges
from scaledreamer.rendering.ray_samples import place_samples
from scaledreamer.rendering.sampling import importance_edges, uniform_edges
from scaledreamer.rendering.render_settings import RELEASE, RenderSettings, field_cache
from scaledreamer.rendering.volume import render, render_views
from scaledreamer.toybox.objects import single

DENSE = RenderSettings(sampler="uniform", samples=512, weight_threshold=0.0)


class Toys:
    "Toybox objects as a scene."

    radius = 1.0

    def __init__(self, *names):
        self.objects = [single(*name.split()) for name in names]

    def sdf(self, points):
        return torch.stack([o.sdf(p) for o, p in zip(self.objects, points)])

    def color(self, points):
        return torch.stack([o.color(p) for o, p in zip(self.objects, points)])

    def sdf_and_color(self, points):
        return self.sdf(points), self.color(points)

    def background(self, directions):
        return torch.ones_like(directions)


class Grids:
    "A hash grid that prompts share, and small decoders of their own, as in Hyper-iNGP."

    radius = 1.0

    def __init__(self, prompts, bumps=0.3, seed=0):
        draw = lambda *shape: torch.randn(*shape, generator=make_rng(seed))
        self.grid = HashGrid(
            HashGridSettings(levels=4, log2_size=11, base=4, scale=1.5), backend="torch"
        )
        with torch.no_grad():
            self.grid.table.copy_(bumps * draw(self.grid.table.numel()))
        self.decoders = [
            draw(prompts, i, o).div(i**0.5).requires_grad_()
            for i, o in ((8, 16), (16, 1), (8, 16), (16, 3))
        ]

    def sdf_and_color(self, points):
        x = self.grid((points + 1) / 2)
        a, b, c, d = self.decoders
        return ((x @ a).relu() @ b)[..., 0] + points.norm(dim=-1) - 0.5, (
            (x @ c).relu() @ d
        ).sigmoid()

    def sdf(self, points):
        return self.sdf_and_color(points)[0]

    def color(self, points):
        return self.sdf_and_color(points)[1]

    def background(self, directions):
        return torch.ones_like(directions)

    def leaves(self):
        return [self.grid.table, *self.decoders]


def orbit(prompts, views, size, distance=2.2, fovy=49.0):
    angle = torch.rand(2, prompts, views, generator=make_rng(7))
    full = torch.full((prompts, views), 1.0)
    return Cameras(angle[0] * 55 - 10, angle[1] * 360, full * distance, full * fovy), size


def rays_of(cameras, size):
    return camera_rays(cameras, size, size)


def psnr(image, reference):
    return -10 * (image - reference).square().mean().log10().item()


def picture(out):
    return torch.cat([out.rgb, out.opacity, out.depth, out.z_variance], 2)


@pytest.mark.parametrize("beta", [1 / 30, 0.01])
def test_defaults_reach_40_db_on_toys(beta):
    toys, rays = Toys("chair red", "car blue", "mug green"), rays_of(*orbit(3, 1, 24))
    truth = render(toys, rays, replace(DENSE, beta=beta))
    assert psnr(render(toys, rays, RenderSettings(beta=beta)).rgb, truth.rgb) > 40
    stratified = render(toys, rays, RenderSettings(beta=beta), rng=make_rng(0))
    assert psnr(stratified.rgb, truth.rgb) > 38


def test_proposal_gradients_match_dense_sampling():
    scene, rays = Grids(2), rays_of(*orbit(2, 1, 16))
    upstream = torch.randn(2, 1, 3, 16, 16, generator=make_rng(1))
    grads = {}
    for name, settings in (
        ("dense", DENSE),
        ("proposal", RenderSettings()),
        ("pruned", RenderSettings(sampler="uniform", samples=128)),
    ):
        flat = torch.autograd.grad(
            (render(scene, rays, settings).rgb * upstream).sum(), scene.leaves()
        )
        grads[name] = torch.cat([g.flatten() for g in flat])
    cosine = lambda name: torch.cosine_similarity(grads[name], grads["dense"], 0).item()
    assert cosine("pruned") > 0.995 and cosine("proposal") > 0.97
    assert abs(grads["proposal"].norm() / grads["dense"].norm() - 1) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        RenderSettings(),
        RenderSettings(sampler="uniform", samples=32),
        RenderSettings(sampler="importance", proposal_probes=24, samples=12),
    ],
    ids=lambda s: s.sampler,
)
def test_a_batch_equals_its_prompts_and_views(settings):
    cameras, size = orbit(3, 2, 10)
    rays, toys = rays_of(cameras, size), Toys("chair red", "ring blue", "ball green")
    settings = replace(settings, normals="finite", eikonal_samples=0)
    whole = render(toys, rays, settings)
    for prompt, name in enumerate(("chair red", "ring blue", "ball green")):
        for view in range(2):
            part = Rays(
                rays.origins[prompt : prompt + 1, view : view + 1],
                rays.directions[prompt : prompt + 1, view : view + 1],
            )
            alone = render(Toys(name), part, settings)
            torch.testing.assert_close(
                picture(alone)[0, 0], picture(whole)[prompt, view], rtol=0, atol=1e-5
            )
            torch.testing.assert_close(
                alone.normal[0, 0], whole.normal[prompt, view], rtol=0, atol=1e-4
            )


def test_numba_proposal_matches_torch():
    toys, rays = Toys("chair red", "car blue"), rays_of(*orbit(2, 2, 12))
    cache = field_cache(toys, 20, 2)
    settings = RenderSettings()
    for draw in (lambda: None, lambda: make_rng(3)):
        compiled = render(toys, rays, settings, rng=draw(), lookup=cache)
        by_torch = lambda points: cache(points)  # not a FieldCache: the torch path
        plain = render(toys, rays, settings, rng=draw(), lookup=by_torch)
        torch.testing.assert_close(picture(compiled), picture(plain), rtol=0, atol=2e-4)


def test_numba_proposal_does_not_depend_on_threads():
    toys, rays = Toys("chair red", "car blue"), rays_of(*orbit(2, 1, 20))
    threads, got = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            got.append(place_samples(toys, *rays.flat(), RenderSettings()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got[0].index, got[1].index) and torch.equal(got[0].edges, got[1].edges)


def test_rays_without_samples_show_exactly_the_background():
    toys, rays = Toys("ring red"), rays_of(*orbit(1, 1, 24))
    behind = torch.rand(1, 1, 3, 24, 24, generator=make_rng(2))
    out = render(toys, rays, RenderSettings(), behind)
    unseen = (out.opacity == 0).expand_as(out.rgb)
    assert 0.3 < unseen.float().mean() < 1
    assert torch.equal(out.rgb[unseen], behind[unseen])
    dense = render(toys, rays, DENSE).opacity[out.opacity == 0]
    assert dense.max() < 3 * RenderSettings().min_opacity


def test_near_and_far_follow_the_camera():
    "The release's far plane of 4 cuts off what a distant camera sees; the sphere's bounds do not."
    ball, colors = SphereScene(torch.tensor([0.5])), {}
    for distance in (2.2, 7.6):
        tangent = math.tan(math.asin(0.5 / distance))
        fovy = 2 * math.degrees(math.atan(2 * tangent))  # the ball fills half of the height
        rays = rays_of(*orbit(1, 1, 16, distance, fovy))
        colors[distance] = render(ball, rays, replace(DENSE, samples=64)).opacity.mean().item()
        if distance > 4.6:
            assert render(ball, rays, replace(DENSE, near_far=(0.1, 4.0))).opacity.max() < 1e-6
    assert abs(colors[2.2] / colors[7.6] - 1) < 0.1


def test_a_camera_inside_the_bound_sees_only_ahead():
    ball = SphereScene(torch.tensor([0.2]), torch.tensor([[0.6, 0.0, 0.0]]))
    origins = torch.zeros(1, 1, 1, 2, 3)
    directions = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]).view(1, 1, 1, 2, 3)
    opacity = render(ball, Rays(origins, directions), RenderSettings(beta=0.01)).opacity.flatten()
    assert opacity[0] > 0.99 and opacity[1] == 0


def test_quadrature_against_4096_samples():
    sdf = lambda t: torch.minimum((t - 0.7).abs() - 0.02, 1.3 - t)  # a thin sheet, then a wall
    density = lambda t: volsdf_density(sdf(t), 0.03)
    midpoints = lambda edges: (edges[..., 1:] + edges[..., :-1]) / 2
    near, far = torch.tensor([0.2]), torch.tensor([2.0])
    probes = sdf(torch.linspace(0.2, 2.0, 48))[None]
    wide = lambda d: volsdf_density(d, 0.06)
    got = {}
    for name, edges in (
        ("brute", uniform_edges(near, far, 4096)),
        ("importance", importance_edges(density, near, far, 128, 64)),
        ("proposal", proposal_edges(probes, wide, near, far, 4, 32)),
    ):
        weights, _ = density_weights(density(midpoints(edges)), edges.diff(dim=-1))
        got[name] = composite(weights, midpoints(edges), midpoints(edges)[..., None])
    for name, eps in (("importance", 1e-3), ("proposal", 5e-3)):
        for part, exact in zip(got[name], got["brute"]):
            torch.testing.assert_close(part, exact, rtol=0, atol=eps)


def test_extremes_are_finite_with_gradients():
    rays = rays_of(*orbit(1, 1, 8))
    for size, beta in ((1e-6, 1e-4), (50.0, 1e-4), (0.5, 10.0), (0.5, 1e-4)):
        radius = torch.tensor([size], requires_grad=True)
        out = render(
            SphereScene(radius, colors=torch.rand(1, 3, generator=make_rng(0))),
            rays,
            RenderSettings(beta=beta, normals="finite"),
        )
        (
            out.rgb.sum()
            + out.depth.sum()
            + out.z_variance.sum()
            + out.normal.sum()
            + out.sdf_gradient.sum()
        ).backward()
        assert (
            all(getattr(out, f.name).isfinite().all() for f in fields(out))
            and radius.grad.isfinite().all()
        )
        assert out.opacity.min() >= 0 and out.opacity.max() <= 1 + 1e-6


def test_eikonal_samples_per_prompt():
    scene, rays = Grids(2), rays_of(*orbit(2, 1, 12))
    out = render(scene, rays, RenderSettings(eikonal_samples=40), rng=make_rng(1))
    assert out.sdf_gradient.shape == (80, 3) and out.normal is None
    out.sdf_gradient.square().sum().backward()
    assert scene.grid.table.grad.abs().sum() > 0
    again = render(scene, rays, RenderSettings(eikonal_samples=40), rng=make_rng(1))
    assert torch.equal(out.sdf_gradient, again.sdf_gradient)
    wide = render(
        SphereScene(torch.tensor([0.9])),
        rays_of(*orbit(1, 1, 12)),
        RenderSettings(bounding_radius=2.0, proposal_grid=40, proposal_probes=40, normals="finite"),
    )
    # samples reach outside the cube of half side 1, but no gradient is taken there
    assert (wide.sdf_gradient.norm(dim=-1) - 1).abs().max() < 0.1


def test_density_scenes_by_every_sampler():
    rays = rays_of(*orbit(1, 1, 16))
    exact = rays.image(FogScene().opacity(*rays.flat())[..., None])
    for settings in (
        replace(DENSE, samples=128),
        RenderSettings(sampler="importance", proposal_probes=64, samples=32),
        RenderSettings(proposal_grid=40, proposal_probes=40, samples=24),
    ):
        out = render(FogScene(), rays, replace(settings, normals="finite"))
        assert psnr(out.opacity, exact) > 25 and out.normal.isfinite().all()


def test_render_views_equals_render():
    cameras, size = orbit(2, 3, 14)
    toys = Toys("house red", "table blue")
    settings = RenderSettings(normals="finite", eval_rays_per_chunk=101)
    pieces, whole = (
        render_views(toys, cameras, size, size, settings),
        render(toys, rays_of(cameras, size), settings),
    )
    torch.testing.assert_close(picture(pieces), picture(whole), rtol=0, atol=1e-5)
    torch.testing.assert_close(pieces.normal_image(), whole.normal_image(), rtol=0, atol=1e-4)
    assert pieces.sdf_gradient is None and not pieces.rgb.requires_grad


def test_bad_settings_are_refused():
    bad = (
        {"samples": 0},
        {"beta": -1.0},
        {"proposal_probes": 1},
        {"near_far": (2.0, 1.0)},
        {"proposal_grid": 1},
        {"bounding_radius": 0.0},
        {"epsilon": 0.0},
        {"weight_threshold": -0.1},
        {"eval_rays_per_chunk": 0},
        {"train_rays_per_chunk": 0},
        {"proposal_beta_scale": math.nan},
    )
    for wrong in bad:
        with pytest.raises(UsageError, match=next(iter(wrong))):
            RenderSettings(**wrong)
    for sampler in (RenderSettings(), RELEASE, DENSE):
        assert from_json(RenderSettings, to_json(sampler)) == sampler
    with pytest.raises(UsageError):
        proposal_edges(torch.zeros(3, 4), lambda x: x, torch.zeros(3), torch.ones(3), upsample=0)
