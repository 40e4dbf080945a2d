"""Environment maps against the release's background modules (fixtures 10_*)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scaledreamer.field.background import EnvironmentMap, prompted_environment, wide_sigmoid
from scaledreamer.field.hash_grid import HashGrid, HashGridSettings

PARITY = Path(__file__).parent / "parity"


@pytest.mark.parametrize(
    ("name", "squash"), [("sh_sigmoid", torch.sigmoid), ("sh_sigmoid_mipnerf", wide_sigmoid)]
)
def test_smooth_map(name, squash):
    data = load_file(PARITY / f"10_background_{name}.safetensors")
    background = EnvironmentMap(squash=squash)
    background.load_state_dict(
        {
            key.removeprefix("weights/network."): value
            for key, value in data.items()
            if key.startswith("weights/network.")
        }
    )
    assert (background(data["dirs"]) - data["color"]).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_prompted_map(backend):
    settings = json.loads((PARITY / "10_background_hyper_hashgrid.json").read_text())["settings"]
    data = load_file(PARITY / "10_background_hyper_hashgrid.safetensors")
    config, hyper = settings["pos_encoding_config"], settings["hypernet_config"]
    grid = HashGrid(
        HashGridSettings(
            config["n_levels"],
            config["n_features_per_level"],
            config["log2_hashmap_size"],
            config["base_resolution"],
            config["per_level_scale"],
        ),
        backend,
    )
    grid.load_state_dict({"table": data["weights/encoding.encoding.encoding.params"]})

    # the release's hypernetwork in five lines; the library's own is a generator's room
    w = {
        key.removeprefix("weights/hypernet.layers."): value
        for key, value in data.items()
        if "hypernet" in key
    }
    hidden = torch.nn.functional.layer_norm(
        data["text"] @ w["0.weight"].T, (hyper["n_neurons"],), w["1.weight"], w["1.bias"]
    )
    flat = torch.nn.functional.silu(hidden) @ w["3.weight"].T + w["3.bias"]
    widths = [grid.width, *hyper["out_dims"]["bg_weights"]]
    sizes = [i * o for i, o in zip(widths, widths[1:])]
    weights = [part.view(-1, i, o) for part, i, o in zip(flat.split(sizes, -1), widths, widths[1:])]

    directions = data["dirs"].flatten(1, 2)
    color = prompted_environment(directions, grid, weights).view_as(data["color"])
    assert (color - data["color"]).abs().max() <= 1e-5
