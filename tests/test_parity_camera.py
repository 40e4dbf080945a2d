"""Cameras of the paper's release (fixture 07): poses, rays, training samplers, orbits."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scaledreamer.camera.cameras import Cameras, camera_condition
from scaledreamer.camera.poses import (
    RigCameras,
    SingleCameras,
    orbit,
    rig_cameras,
    single_cameras,
    wrap_degrees,
)
from scaledreamer.camera.rays import camera_rays

DATA = load_file(Path(__file__).parent / "parity" / "07_cameras.safetensors")


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance


def check_poses(cameras: Cameras, group: str) -> None:
    "Compare c2w, origins and directions with a group, prompts and views along one axis."
    rays = camera_rays(cameras, 5, 7)
    near(cameras.c2w().flatten(0, 1), DATA[f"{group}/c2w"], 1e-5)
    near(rays.origins.flatten(0, 1), DATA[f"{group}/rays_o"], 1e-5)
    near(rays.directions.flatten(0, 1), DATA[f"{group}/rays_d"], 1e-5)
    near(cameras.c2w()[..., :3, 3].flatten(0, 1), DATA[f"{group}/camera_positions"], 1e-5)


def test_given_angles():
    given = [
        DATA[f"in/{name}"][:, None]
        for name in ("elevation_deg", "azimuth_deg", "distance", "fovy_deg")
    ]
    cameras = Cameras(*given)
    check_poses(cameras, "single")
    near(camera_condition(cameras.c2w()).flatten(0, 1), DATA["single/mvdream_camera16"], 1e-5)


def test_a_batch_of_three_cameras():
    "With exactly three cameras, the release's cross product takes the batch axis; ours does not."
    given = [
        DATA[f"in/{name}"][:3, None]
        for name in ("elevation_deg", "azimuth_deg", "distance", "fovy_deg")
    ]
    near(Cameras(*given).c2w().flatten(0, 1), DATA["single/c2w"][:3], 1e-5)


@pytest.mark.parametrize("distribution", ["deg", "sphere"])
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (2, 2)])
def test_sampler_of_single_views(distribution, shape):
    group = f"train_sd_uniform_{distribution}"
    u = torch.stack(
        [
            DATA[f"{group}/u_{name}"].view(shape)
            for name in ("elevation", "azimuth", "distance", "fovy")
        ]
    )
    cameras = single_cameras(SingleCameras(), u, on_sphere=distribution == "sphere")
    near(cameras.elevation.flatten(), DATA[f"{group}/elevation"], 1e-4)
    near(cameras.azimuth.flatten(), DATA[f"{group}/azimuth"], 1e-4)
    near(cameras.distance.flatten(), DATA[f"{group}/camera_distances"], 1e-5)
    near(cameras.fovy.flatten(), DATA[f"{group}/fovy"].rad2deg(), 1e-4)
    check_poses(cameras, group)


@pytest.mark.parametrize("distribution", ["deg", "sphere"])
def test_sampler_of_rigs(distribution):
    group = f"train_mv_uniform_{distribution}"
    u = torch.stack(
        [DATA[f"{group}/u_{name}"] for name in ("elevation", "azimuth", "distance", "fovy")]
    )
    cameras = rig_cameras(RigCameras(as_released=True), u, 4, on_sphere=distribution == "sphere")
    near(cameras.elevation.flatten(), DATA[f"{group}/elevation"], 1e-4)
    near(wrap_degrees(cameras.azimuth.flatten() - DATA[f"{group}/azimuth"]), torch.zeros(4), 1e-4)
    near(cameras.distance.flatten(), DATA[f"{group}/camera_distances"], 1e-4)
    near(cameras.fovy.flatten(), DATA[f"{group}/fovy"], 1e-4)
    check_poses(cameras, group)


@pytest.mark.parametrize(
    ("group", "views", "endpoint"), [("eval_val", 6, False), ("eval_test", 8, True)]
)
def test_orbits(group, views, endpoint):
    "Evaluation of the 100k-step setup; the test orbit repeats the first view as the last."
    cameras = orbit(views, elevation=15, fovy=70, distance=1.2, endpoint=endpoint)
    near(cameras.azimuth[0], DATA[f"{group}/azimuth"], 1e-4)
    assert math.isclose(DATA[f"{group}/fovy"][0].item(), math.radians(70), rel_tol=1e-6)
    check_poses(cameras, group)
