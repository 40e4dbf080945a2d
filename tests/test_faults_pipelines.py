"""Pipeline folders, files and hub ids as people have them: opened right, or refused in a sentence."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.tensors import seed_everything
from scaledreamer.prior.pipelines import quiet, random_pipeline
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior

CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
)
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
VALUES = (
    *(None, True, 0, -1, 1, 3, 10**6, 10**25, 0.5, -1e9, "", "x", "é" * 300, [], {}, [None], [0]),
    *([1, 2], ["a", 3], {"a": 1}, [[1]], "null", [True], [64, 64], 1e300),
)
RAW = (
    *(b"", b"[]", b"null", b"5", b'"text"', b"{", b"\xff\xfe\x00", b'{"a": NaN}', b"{}"),
    *(b"[" * 10**5, b'{"a":' * 10**5, b'{"a": ' + b"9" * 10**4 + b"}", b'{"a": "\\ud800"}'),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A random pipeline's folder."
    seed_everything(0)
    folder = tmp_path_factory.mktemp("pipelines") / "whole"
    with quiet():
        random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    "A copy of the folder whose files may be changed."
    return shutil.copytree(whole, tmp_path / "copy")


def edit(folder: Path, file: str, **values) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refusal(given, error=(UsageError, RunError), **options) -> str:
    "The one sentence of the error."
    with pytest.raises(error) as caught:
        StableDiffusionPrior.from_pretrained(given, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000, message
    return message


def mutate(folder: Path, rng: np.random.Generator) -> tuple[str, str]:
    "One random fault of one file: the file, and what was done."
    kind = rng.choice(["entry", "entry", "entry", "missing", "raw", "file", "weights"])
    if kind == "weights":
        file = str(rng.choice(WEIGHTS))
        path, size = folder / file, (folder / file).stat().st_size
        content = bytearray(path.read_bytes()[: int(rng.integers(size))])
        if rng.random() < 0.5:  # the same length, another header
            content = bytearray(path.read_bytes())
            content[int(rng.integers(200))] = int(rng.integers(256))
        path.write_bytes(content)
        return file, kind
    file = str(rng.choice(CONFIGS))
    path = folder / file
    if kind == "raw":
        path.write_bytes(RAW[rng.integers(len(RAW))])
    elif kind == "file":
        path.unlink()
        how = rng.choice(["gone", "folder", "pipe", "link"])
        make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "gone": lambda: None}
        make.get(how, lambda: path.symlink_to(folder / "nowhere"))()
        return file, f"{kind} {how}"
    else:
        config = json.loads(path.read_text())
        key = str(rng.choice(sorted(config)))
        value = VALUES[rng.integers(len(VALUES))]
        if kind == "missing":
            del config[key]
        elif isinstance(config[key], list) and config[key] and rng.random() < 0.5:
            config[key] = [value, *config[key][1:]]
        else:
            config[key] = value
        path.write_text(json.dumps(config))
        return file, f"{kind} {key} {str(value)[:40]!r}"
    return file, kind


def outcome(whole: Path, folder: Path, seed: int) -> tuple[str, str]:
    "What comes of the mutation of a seed: loaded, or the kind of error, and the message."
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    file, fault = mutate(folder, np.random.default_rng(seed))
    try:
        StableDiffusionPrior.from_pretrained(folder)
        return "loaded", f"{file} {fault}"
    except (UsageError, RunError) as error:
        message = str(error)
        part = file.split("/")[0]
        named = file in message or part in message or "model_index.json" in message
        short = "\n" not in message and len(message) < 1000
        return ("refused" if named and short else "unclear"), f"{file} {fault}: {message}"
    except Exception as error:  # what must not be
        return type(error).__name__, f"{file} {fault}: {error}"


def test_a_sample_of_damaged_folders(whole, tmp_path):
    outcomes = [outcome(whole, tmp_path / "copy", seed) for seed in range(60)]
    wrong = [o for o in outcomes if o[0] not in ("loaded", "refused")]
    assert not wrong, wrong
    assert sum(kind == "refused" for kind, _ in outcomes) >= 25


if __name__ == "__main__":  # all of them: python tests/test_faults_pipelines.py [FIRST LAST]
    import collections
    import sys
    import tempfile

    first, last = map(int, sys.argv[1:3] or (0, 600))
    with tempfile.TemporaryDirectory() as room:
        seed_everything(0)
        with quiet():
            random_pipeline().save_pretrained(Path(room, "whole"))
        found = [outcome(Path(room, "whole"), Path(room, "copy"), i) for i in range(first, last)]
    for seed, (kind, message) in enumerate(found, first):
        print(seed, kind, message)
    print(collections.Counter(kind for kind, _ in found))
