"""The hash grid against tensors made with tiny-cuda-nn's semantics (fixtures 01_*), in torch and
numba, and spherical harmonics (10_*)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scaledreamer.field.hash_grid import HashGrid, HashGridSettings, spherical_harmonics
from scaledreamer.kernels.hash_grid_reference import encode_torch, grid_levels
from scaledreamer.kernels.hash_grid_numba import encode_numba

PARITY = Path(__file__).parent / "parity"
NAMES = sorted(path.stem for path in PARITY.glob("01_hashgrid_*.json"))
TRAINED = [
    name
    for name in NAMES
    if "grad_params" in json.loads((PARITY / f"{name}.json").read_text())["tensors"]
]
ENCODERS = {"torch": encode_torch, "numba": encode_numba}


def fixture(name: str) -> tuple[HashGridSettings, dict, dict[str, torch.Tensor]]:
    info = json.loads((PARITY / f"{name}.json").read_text())
    config = info["encoding_config"]
    settings = HashGridSettings(
        levels=config["n_levels"],
        features=config["n_features_per_level"],
        log2_size=config["log2_hashmap_size"],
        base=config["base_resolution"],
        scale=config["per_level_scale"],
        dims=info["n_input_dims"],
    )
    return settings, info, load_file(PARITY / f"{name}.safetensors")


def formula_table(count: int, seed: int) -> torch.Tensor:
    "The parameters of the fixtures of shipped size: an integer hash of the index."
    v = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed)) & np.uint64(
        0xFFFFFFFF
    )
    v ^= v >> np.uint64(15)
    v = v * np.uint64(2246822519) & np.uint64(0xFFFFFFFF)
    v ^= v >> np.uint64(13)
    return torch.from_numpy((v / 2.0**32 * 2 - 1).astype(np.float32))


def test_the_fixtures_are_there():
    assert len(NAMES) == 10 and len(TRAINED) == 7


@pytest.mark.parametrize("name", NAMES)
def test_layout(name):
    settings, info, _ = fixture(name)
    assert [level._asdict() for level in grid_levels(settings)] == [
        {key: level[key] for key in ("scale", "resolution", "offset", "size", "hashed")}
        for level in info["levels"]
    ]


@pytest.mark.parametrize("backend", ENCODERS)
@pytest.mark.parametrize("name", TRAINED)
def test_features_and_gradients(name, backend):
    settings, _, data = fixture(name)
    x, table = data["x"].clone().requires_grad_(), data["params"].clone().requires_grad_()
    y = ENCODERS[backend](x, table, settings)
    assert (y - data["y"]).abs().max() <= 1e-5
    grad_x, grad_table = torch.autograd.grad(y, (x, table), data["dL_dy"])
    assert (grad_table - data["grad_params"]).abs().max() <= 1e-4
    valid = data[
        "grad_x_valid"
    ].bool()  # elsewhere a point lies on a face, where the gradient jumps
    assert valid.any()
    assert (grad_x - data["grad_x"])[valid].abs().max() <= 1e-4 * data["grad_x"].abs().max()


@pytest.mark.parametrize("backend", ENCODERS)
@pytest.mark.parametrize("name", sorted(set(NAMES) - set(TRAINED)))
def test_shipped_size(name, backend):
    settings, info, data = fixture(name)
    last = grid_levels(settings)[-1]
    table = formula_table(
        (last.offset + last.size) * settings.features, info["params_formula"]["seed"]
    )
    assert torch.equal(table[:16], data["params_head"])
    assert (ENCODERS[backend](data["x"], table, settings) - data["y"]).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", ENCODERS)
def test_module(backend):
    "A table goes in as it is."
    settings, _, data = fixture("01_hashgrid_b_mixed3d")
    grid = HashGrid(settings, backend)
    grid.load_state_dict({"table": data["params"]})
    assert (grid(data["x"]) - data["y"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["10_background_sh_sigmoid", "10_background_sh_sigmoid_mipnerf"])
def test_spherical_harmonics(name):
    data = load_file(PARITY / f"{name}.safetensors")
    assert (
        spherical_harmonics(data["dirs"].reshape(-1, 3)) - data["sh_encoding"]
    ).abs().max() <= 1e-5
