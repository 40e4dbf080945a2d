"""Cameras, rays and camera sampling: geometry by brute force, ranges, batches and members."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledreamer.camera.cameras import Cameras, camera_condition, look_at
from scaledreamer.camera.poses import (
    FramedCameras,
    RigCameras,
    SingleCameras,
    between_on_sphere,
    framing_distance,
    orbit,
    sample_cameras,
    wrap_degrees,
)
from scaledreamer.camera.rays import box_bounds, camera_rays, sphere_bounds
from scaledreamer.core.settings import UsageError, from_json, to_json
from scaledreamer.core.tensors import make_rng

DISTRIBUTIONS = [
    SingleCameras(),
    RigCameras(),
    RigCameras(as_released=True),
    FramedCameras(),
    FramedCameras(rig=True),
]


def some_cameras(b: int, v: int, seed: int = 0) -> Cameras:
    u = torch.rand(4, b, v, generator=make_rng(seed))
    return Cameras(u[0] * 180 - 90, u[1] * 720 - 360, u[2] * 3 + 0.5, u[3] * 80 + 10)


@settings(deadline=None, max_examples=20)
@given(st.floats(-90, 90), st.floats(-1000, 1000), st.floats(0.1, 10))
def test_a_pose_is_a_rotation_aimed_at_the_origin(elevation, azimuth, distance):
    pose = look_at(*(torch.tensor(x, dtype=torch.float64) for x in (elevation, azimuth, distance)))
    rotation, position = pose[:3, :3], pose[:3, 3]
    identity = torch.eye(3).double()
    torch.testing.assert_close(rotation.T @ rotation, identity, atol=1e-12, rtol=0)
    assert torch.linalg.det(rotation) > 0
    torch.testing.assert_close(position, distance * rotation[:, 2])
    assert rotation[2, 0] == 0 and rotation[2, 1] >= 0  # level, and not upside down
    assert math.isclose(
        position[2].item(), distance * math.sin(math.radians(elevation)), abs_tol=1e-9
    )


@given(st.floats(-1e5, 1e5, width=32))
def test_wrapped_angles(angle):
    wrapped = wrap_degrees(torch.tensor(angle))
    assert -180 <= wrapped < 180
    # float32 numbers of size 1e5 are 0.008 apart
    assert abs(math.remainder(wrapped.item() - angle, 360)) < 0.05


# with 3 prompts, a cross product without a dimension takes the wrong axis
@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_a_batch_equals_its_members(b):
    cameras = some_cameras(b, 3)
    rays = camera_rays(cameras, 4, 6)
    for i in range(b):
        one = camera_rays(cameras[[i]], 4, 6)
        torch.testing.assert_close(one.origins[0], rays.origins[i])
        torch.testing.assert_close(one.directions[0], rays.directions[i])
    torch.testing.assert_close(
        camera_condition(cameras.c2w())[-1], camera_condition(cameras.c2w()[-1])
    )


def test_points_on_rays_project_to_the_centres_of_their_pixels():
    cameras = some_cameras(2, 3)
    h, w = 5, 8
    rays = camera_rays(cameras, h, w)
    points = rays.origins + 1.7 * rays.directions
    local = torch.einsum(
        "bvij,bvhwj->bvhwi",
        torch.linalg.inv(cameras.c2w()),
        torch.cat([points, torch.ones(*points.shape[:-1], 1)], -1),
    )
    focal = (h / 2 / (cameras.fovy / 2).deg2rad().tan())[..., None, None]
    column = w / 2 - focal * local[..., 0] / local[..., 2]
    row = h / 2 + focal * local[..., 1] / local[..., 2]
    torch.testing.assert_close(column, (torch.arange(w) + 0.5).expand_as(column), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        row, (torch.arange(h) + 0.5)[:, None].expand_as(row), atol=1e-3, rtol=0
    )


def test_pixel_centres_are_the_means_of_those_at_twice_the_resolution():
    cameras = some_cameras(1, 2)
    coarse, fine = camera_rays(cameras, 4, 4), camera_rays(cameras, 8, 8)
    ahead = -cameras.c2w()[0, 0, :3, 2]

    def on_plane(rays):
        "Points of the first view's rays on the plane at distance one."
        directions = rays.directions[0, 0]
        return (directions / (directions @ ahead)[..., None]).permute(2, 0, 1)[None]

    mean = torch.nn.functional.avg_pool2d(on_plane(fine), 2)
    torch.testing.assert_close(mean, on_plane(coarse), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bounds", [sphere_bounds, box_bounds])
def test_bounds_against_brute_force(bounds):
    rng = make_rng(3)
    origins = torch.randn(500, 3, generator=rng)
    directions = torch.nn.functional.normalize(torch.randn(500, 3, generator=rng), dim=-1)
    near, far, hit = bounds(origins, directions, 0.8)
    t = torch.linspace(0, 8, 8001)[:-1] + 5e-4
    points = origins[:, None] + t[:, None] * directions[:, None]
    size = points.norm(dim=-1) if bounds is sphere_bounds else points.abs().amax(-1)
    length = (size < 0.8).float().sum(-1) * 1e-3
    assert (length - (far - near)).abs().max() < 2e-3  # each end within one step
    assert torch.equal(hit, far > near) and (near >= 0).all() and (near <= far).all()
    assert not hit[length == 0].logical_and(far[length == 0] - near[length == 0] > 2e-3).any()
    middle = origins + ((near + far) / 2)[:, None] * directions
    inside = middle.norm(dim=-1) if bounds is sphere_bounds else middle.abs().amax(-1)
    assert (inside[hit] < 0.8 + 1e-5).all()


def test_bounds_of_rays_along_the_axes():
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    for bounds in (sphere_bounds, box_bounds):
        near, far, hit = bounds(-3 * axes, axes, 1.0)
        assert (
            hit.all()
            and torch.allclose(near, torch.tensor(2.0))
            and torch.allclose(far, torch.tensor(4.0))
        )
        near, far, hit = bounds(-3 * axes + 2 * axes.roll(1, -1), axes, 1.0)
        assert not hit.any() and torch.equal(near, far)
    on_the_face = torch.tensor([[1.0, 0.0, -3.0]])  # in the plane of a face
    along_z = torch.tensor([[0.0, 0.0, 1.0]])
    assert all(x.isfinite().all() for x in box_bounds(on_the_face, along_z, 1.0)[:2])


def test_a_sphere_per_ray():
    origins = torch.tensor([[-3.0, 0, 0]]).expand(2, 3)
    directions = torch.tensor([[1.0, 0, 0]]).expand(2, 3)
    near, far, hit = sphere_bounds(origins, directions, torch.tensor([1.0, 2.0]))
    assert near.tolist() == [2, 1] and far.tolist() == [4, 5] and hit.all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4), (5, 4)])
def test_samplers(distribution, shape):
    cameras = sample_cameras(distribution, *shape, make_rng(7))
    assert cameras.shape == shape
    again = sample_cameras(distribution, *shape, make_rng(7))
    assert torch.equal(cameras.azimuth, again.azimuth) and torch.equal(
        cameras.distance, again.distance
    )
    assert not torch.equal(
        cameras.azimuth, sample_cameras(distribution, *shape, make_rng(8)).azimuth
    )
    assert cameras.c2w().isfinite().all()
    assert (cameras.azimuth >= -180).all() and (cameras.azimuth < 180 + 1e-4).all()
    for values, (low, high) in (
        (cameras.elevation, distribution.elevation),
        (cameras.fovy, distribution.fovy),
    ):
        assert (values >= low - 1e-4).all() and (values <= high + 1e-4).all()
    if isinstance(distribution, RigCameras) or getattr(distribution, "rig", False):
        assert torch.equal(cameras.elevation, cameras.elevation[:, :1].expand(shape))
        assert torch.equal(cameras.fovy, cameras.fovy[:, :1].expand(shape))
    assert from_json(type(distribution), to_json(distribution)) == distribution


def test_azimuths_cover_the_circle():
    for distribution in (SingleCameras(), FramedCameras(), FramedCameras(rig=True)):
        cameras = sample_cameras(distribution, 6, 4, make_rng(0))
        assert torch.equal(
            ((cameras.azimuth + 180) / 15).floor().flatten().sort().values, torch.arange(24.0)
        ), distribution


def test_framed_prompts_take_different_slots_each_time():
    "The azimuth of a prompt does not depend on its position in the batch."
    first = [
        sample_cameras(FramedCameras(), 8, 1, make_rng(seed)).azimuth[0, 0].item()
        for seed in range(40)
    ]
    assert min(first) < -90 and max(first) > 90


def test_elevations_on_the_sphere_have_uniform_height():
    e = between_on_sphere(torch.rand(20_000, generator=make_rng(0)), (-10.0, 45.0)).deg2rad().sin()
    low, high = (math.sin(math.radians(x)) for x in (-10, 45))
    assert abs(e.mean().item() - (low + high) / 2) < 0.01
    assert abs(e.std().item() - (high - low) / 12**0.5) < 0.01


@pytest.mark.parametrize("fovy", [20.0, 45.0, 90.0])
def test_the_framed_sphere_touches_the_frame(fovy):
    distance = framing_distance(torch.tensor(fovy), 0.5, 1.0)
    rays = camera_rays(orbit(1, fovy=fovy, distance=distance.item()), 201, 201)
    hit = rays.image(sphere_bounds(*rays.flat(), 0.5)[2][..., None].float())[0, 0, 0]
    # all but the outermost row of pixels
    assert hit[100, 100] and hit[1, 100] and hit[100, 1] and not hit[0, 0]


def test_evaluation_orbits_of_the_release():
    test, val = orbit(120, 15, 70, 1.2, endpoint=True), orbit(30, 15, 70, 1.5)
    assert test.azimuth[0, -1] == 360 and torch.allclose(
        test.c2w()[0, 0], test.c2w()[0, -1], atol=1e-5
    )
    assert val.azimuth[0, -1] == 348
    assert orbit(1, endpoint=True).azimuth.tolist() == [[0.0]]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FramedCameras(elevation=(0.0, 91.0)),
        lambda: FramedCameras(object_radius=0.0),
        lambda: SingleCameras(distance=(0.0, 1.0)),
        lambda: RigCameras(fovy=(60.0, 15.0)),
        lambda: orbit(4, elevation=100.0),
        lambda: orbit(4, fovy=0.0),
        lambda: orbit(4, distance=0.0),
        lambda: sample_cameras(FramedCameras(), 0, 1, make_rng(0)),
        lambda: camera_rays(some_cameras(1, 1), 4, 0),
    ],
)
def test_refusals(wrong):
    with pytest.raises(UsageError):
        wrong()
