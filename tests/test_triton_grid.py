"""Triton's kernels: hash grid and decoder against the oracle in Triton's interpreter.

The grid is also compiled for GPUs that are not present, and run on a GPU if there is one.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from triton_cases import CASES, SMALL, table_of

from scaledreamer.bench.field_speed import matches
from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.field.hash_grid import HashGrid, auto_backend, pick_backend
from scaledreamer.kernels.hash_grid_reference import HashGridSettings, encode_torch
from scaledreamer.kernels.hash_grid_triton import assemble_grid, encode_triton

needs_triton = pytest.mark.skipif(
    not find_spec("triton"), reason="triton is not installed (it is made for Linux)"
)


def needs_cuda(test):
    "A test that `pytest -m cuda` chooses, and that is skipped without a CUDA device."
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.cuda(skip(test))


# in the interpreter ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    program = Path(__file__).parent / "triton_cases.py"
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, found):
    "Features and outputs within 1e-5 of the oracle's, gradients within 1e-4 of the largest."
    assert isinstance(found[name], list), found[name]
    for features, *gradients in found[name]:
        assert features <= 1e-5 and all(gradient <= 1e-4 for gradient in gradients), found[name]


# compiled for a GPU ------------------------------------------------------------------------------


@needs_triton
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing"
)
@pytest.mark.parametrize(
    ("shape", "capability", "options"),
    [
        (HashGridSettings(), 90, {}),
        (HashGridSettings(), 90, {"to_points": False}),
        (HashGridSettings(features=3, dims=2), 80, {"table": "fp16", "points": "fp16"}),
    ],
)
def test_compiled_for_a_gpu(shape, capability, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = assemble_grid(shape, capability, **options)
    assert set(built) == {"forward", "backward"}
    for kernel in built.values():
        assert f"sm_{capability}" in kernel.asm["ptx"] and kernel.asm["cubin"][:4] == b"\x7fELF"
        assert ".local" not in kernel.asm["ptx"], "registers spill, or a tuple lies in memory"
    if not options.get("to_points", True):
        assert built["backward"].asm["ptx"].count("ld.global.v2") == 1, (
            "the table is read although the points' gradient is not needed"
        )


# which code --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "there", "taken", "why"), [
    ("cuda", ["tinycudann", "triton", "gcc", "numba"], "tinycudann", "it is installed"),
    ("cuda", ["triton", "clang"], "triton", "tinycudann is not installed: build it"),
    ("cuda", ["triton"], "torch", "many times slower: triton finds no C compiler"),
    ("cuda", ["numba"], "torch", "many times slower: triton is not installed: pip install triton"),
    ("cpu", ["numba", "triton", "tinycudann"], "numba", "compiled for all cores"),
    ("cpu", ["triton", "gcc"], "torch", "many times slower: numba is not installed: pip install"),
    ("mps", ["numba", "triton"], "torch", "no compiled hash grid knows this device"),
])  # fmt: skip
def test_what_auto_takes(device, there, taken, why, machine):
    machine(*there)
    backend, reason = auto_backend(device)
    assert backend == taken and reason.startswith(why)


def test_the_same_bits_every_time_only_from_plain_torch_on_cuda(machine):
    machine("triton", "gcc", "tinycudann", "numba")
    torch.use_deterministic_algorithms(True)
    try:
        assert [auto_backend(device)[0] for device in ("cuda", "cpu")] == ["torch", "numba"]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("backend", "there", "said"), [
    ("numba", [], "HashGrid: numba is not installed: pip install numba; or use backend auto"),
    ("triton", [], "HashGrid: triton is not installed: pip install triton"),
    ("triton", ["triton"], "triton finds no C compiler: install gcc, or name one in CC; "
     "or use backend auto"),
    ("triton", ["triton", "gcc"], "backend triton needs a table of 32 bits or fewer on CUDA, "
     "not torch.float32 on cpu; use auto or torch"),
    ("tinycudann", [], "HashGrid: tinycudann is not installed: build it by pip install git+https"),
    ("tinycudann", ["tinycudann"], "tinycudann runs on CUDA, the table lies on cpu; use auto"),
])  # fmt: skip
def test_a_backend_that_cannot_serve(backend, there, said, machine, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    machine(*there)
    with pytest.raises(UsageError) as error:
        HashGrid(SMALL, backend)(torch.zeros(1, 3))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert pick_backend("torch", torch.zeros(1)) == "torch"


ON_TORCH = ("triton", "torch")


@pytest.mark.parametrize(
    ("there", "compared"),
    [
        (["triton", "gcc"], [ON_TORCH] * 2),
        (["triton", "gcc", "tinycudann"], [ON_TORCH] * 2 + [("triton", "tinycudann")]),
        (["tinycudann"], [("auto", "torch")] * 2),
        ([], [("auto", "torch")] * 2),
    ],
)
def test_what_the_benchmark_compares(there, compared, machine):
    machine(*there)
    assert [match[1:] for match in matches("cuda:0")] == compared and [
        match[1:] for match in matches("cpu")
    ] == [("auto", "torch")] * 2


def test_points_and_table_on_two_devices():
    with pytest.raises(UsageError, match="points lie on meta, the table on cpu"):
        HashGrid(SMALL)(torch.zeros(1, 3, device="meta"))


def test_one_state_whatever_computes():
    states = [
        HashGrid(SMALL, backend).state_dict()
        for backend in ("auto", "torch", "numba", "triton", "tinycudann")
    ]
    assert all(
        list(state) == ["table"] and state["table"].shape == states[0]["table"].shape
        for state in states
    )


# on a GPU ----------------------------------------------------------------------------------------


@needs_triton
@needs_cuda
@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        HashGridSettings(log2_size=15),
        HashGridSettings(levels=6, features=3, log2_size=10, dims=2),
    ],
    ids=str,
)
def test_on_cuda(shape):
    "The oracle's numbers, a hundred times."
    x, upstream = (
        torch.rand(5000, shape.dims, generator=make_rng(0)),
        torch.randn(5000, shape.levels * shape.features, generator=make_rng(1)).cuda(),
    )
    points, table = x.cuda().requires_grad_(), table_of(shape).detach().cuda().requires_grad_()
    results = []
    for encode in (encode_torch, *[encode_triton] * 100):
        y = encode(points, table, shape)
        results.append((y.detach(), *torch.autograd.grad(y, (points, table), upstream)))
    for y, by_points, by_table in results[1:]:
        torch.testing.assert_close(y, results[0][0], atol=1e-5, rtol=0)
        for got, want in ((by_points, results[0][1]), (by_table, results[0][2])):
            torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=0)
        assert torch.equal(by_points, results[1][1])
