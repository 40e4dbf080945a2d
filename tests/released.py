"""Shared by the parity tests: fixtures, full-size weights, and comparison with released renders."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scaledreamer.rendering.ray_samples import Jitter
from scaledreamer.rendering.render_settings import RELEASE
from scaledreamer.rendering.volume import render

PARITY = Path(__file__).parent / "parity"


def fixture(name):
    return json.loads((PARITY / f"{name}.json").read_text()), load_file(
        PARITY / f"{name}.safetensors"
    )


def formula(key, count, salt, offset, amplitude):
    "The weights that a full-size fixture was made with (its json says how)."
    values, seed = np.empty(count, np.float32), np.uint32((zlib.crc32(key.encode()) + salt) % 2**32)
    for start in range(0, count, 2**16):  # pieces that stay in the cache
        v = (
            np.arange(start, min(start + 2**16, count), dtype=np.uint32) * np.uint32(2654435761)
            + seed
        )
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            v ^= v >> np.uint32(shift)
            v *= np.uint32(factor)
        values[start : start + 2**16] = np.float32(offset) + np.float32(amplitude) * (
            v / 2.0**32 * 2 - 1
        ).astype(np.float32)
    return torch.from_numpy(values)


def stratified(monkeypatch, tensors):
    "The fixture's draws in place of random numbers, and as those of one render."
    draws = torch.stack([tensors["train/bias_coarse"], tensors["train/bias_fine"]])
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: draws.view(shape))
    return Jitter(draws.view(2, 1, -1), None)


def same_pictures(out, tensors, mode, image):
    "Colour, opacity and depth of a render within the fixtures' tolerances."
    for ours, theirs, atol in (
        (out.rgb, "comp_rgb", 2e-3),
        (out.opacity, "opacity", 2e-3),
        (out.depth, "depth", 5e-3),
    ):
        torch.testing.assert_close(ours, image(tensors[f"{mode}/{theirs}"]), rtol=0, atol=atol)


def check_eval(scene, rays, tensors, image):
    "What an evaluation shows, and what is behind it."
    with torch.no_grad():
        out = render(scene, rays, RELEASE)
    same_pictures(out, tensors, "eval", image)
    torch.testing.assert_close(
        out.background, image(tensors["eval/comp_rgb_bg"]), rtol=0, atol=1e-5
    )
    return out


def check_train(scene, rays, meta, tensors, image):
    "What a training step shows, after `stratified`, and its loss; leaves the gradients."
    out = render(scene, rays, RELEASE, rng=torch.Generator())
    same_pictures(out, tensors, "train", image)
    loss = (out.rgb * image(tensors["train/loss_r_rgb"])).sum() + out.opacity.sum()
    loss.backward()
    assert loss.item() == pytest.approx(meta["loss"], rel=2e-3)
