"""The decoder's Triton kernels: compiled for GPUs that are not present, selected, run on a GPU.

test_triton_grid.py runs their cases in Triton's interpreter.
"""

import os
import re
import subprocess

import pytest
import torch
from test_triton_grid import needs_cuda, needs_triton
from triton_cases import network

from scaledreamer.bench.field_speed import cuda_with, decoder_matches
from scaledreamer.field import decoders
from scaledreamer.field.decoders import decoder_code, mlp, mlp_plain, suits_triton
from scaledreamer.kernels.mlp_triton import assemble_decoder, decode_triton, fits, decoder_sizes

# compiled for a GPU ------------------------------------------------------------------------------


def stack(code: bytes, folder) -> list[int]:
    "Bytes of local memory of each kernel in a cubin: what found no register."
    from triton import knobs

    (folder / "kernel.cubin").write_bytes(code)
    said = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [int(size) for size in re.findall(r"STACK:(\d+)", said)]


@needs_triton
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing"
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("shape", "weights", "options"),
    [
        ((32, 64, 16), "fp16", {}),
        ((32, 64, 1), "bf16", {"x": "bf16"}),
        ((32, 64, 3), "fp16", {"grad_weights": None}),
        ((5, 128, 3), "fp16", {"grad_x": None}),
        ((64, 64, 3), "fp16", {}),
        ((32, 64, 3), "fp32", {}),
        ((16, 64, 3), "fp32", {"precision": "tf32"}),
        ((32, 64, 1), "fp32", {"grad_weights": None}),
    ],
    ids=str,
)
def test_compiled_for_a_gpu(shape, weights, options, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = assemble_decoder(shape, capability, weights, **options)
    assert set(built) == {"forward", "backward"}
    for name, kernel in built.items():
        code = kernel.asm["ptx"]
        assert f"sm_{capability}" in code and kernel.asm["cubin"][:4] == b"\x7fELF"
        assert "mma.sync" in code or "wgmma.mma" in code, "no tensor cores"
        assert ".local" not in code and stack(kernel.asm["cubin"], tmp_path) == [0], (
            f"{name}: registers spill"
        )
        assert kernel.metadata.shared <= 99 * 1024, (
            "more than a multiprocessor of any of these generations gives a program"
        )


@needs_triton
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 compiles nothing"
)
@pytest.mark.parametrize("shape", [(64, 64, 16), (32, 128, 16)], ids=str)
def test_the_largest_find_room(shape, tmp_path, monkeypatch):
    "Also in a multiprocessor of 8.6, 8.9 or 12.0, which gives a program 99 kB."
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert fits(*shape) and all(
        kernel.metadata.shared <= 99 * 1024
        for kernel in assemble_decoder(shape, 86, "fp32").values()
    )


def test_what_fits():
    assert all(
        fits(*shape) for shape in ((16, 64, 1), (32, 64, 3), (1, 1, 1), (64, 64, 16), (32, 128, 16))
    )
    assert not any(
        fits(*shape)
        for shape in ((64, 65, 1), (65, 16, 1), (32, 129, 1), (32, 64, 17), (0, 64, 1), (32, 0, 1))
    )
    for shape in ((5, 20, 1), (32, 64, 3), (17, 100, 16)):
        known = decoder_sizes(shape, True, "backward")
        assert (
            known["F"] >= shape[0]
            and known["H"] >= shape[1]
            and known["O"] == 16
            and all(known[key] & known[key] - 1 == 0 for key in "FHO")
        )


# which code --------------------------------------------------------------------------------------


NOT_THERE = "slower: triton is not installed: pip install triton"


@pytest.mark.parametrize(
    ("device", "there", "taken", "why"),
    [
        ("cuda", ["triton", "gcc"], "triton", "where it has one hidden layer"),
        ("cuda", ["triton"], "torch", "slower: triton finds no C compiler"),
        ("cuda", ["tinycudann"], "torch", NOT_THERE),
        ("mps", ["triton", "gcc"], "torch", "no compiled decoder"),
        ("cpu", ["numba", "triton"], "numba", "compiled for all cores"),
    ],
)
def test_what_computes_a_decoder(device, there, taken, why, machine):
    machine(*there)
    code, reason = decoder_code(device)
    assert code == taken and reason.startswith(why)
    torch.use_deterministic_algorithms(True)
    try:
        assert decoder_code(device)[0] == taken  # its sums are added up in one order
    finally:
        torch.use_deterministic_algorithms(False)


class Elsewhere:
    "The properties that decide whether the kernels take a tensor, on a GPU that is not present."

    def __init__(self, *shape, dtype=torch.float32):
        self.shape, self.dtype, self.is_cuda, self.device = (
            torch.Size(shape),
            dtype,
            True,
            torch.device("cuda"),
        )


TWO_LAYERS = [(32, 64), (64, 3)]


@pytest.mark.parametrize(
    ("x", "layers", "capability", "taken"),
    [
        (torch.float32, TWO_LAYERS, (9, 0), True),
        (torch.float16, TWO_LAYERS, (8, 0), True),
        (torch.float32, TWO_LAYERS, (7, 5), False),
        (torch.float64, TWO_LAYERS, (9, 0), False),
        (torch.float32, [(32, 64), (64, 64), (64, 3)], (9, 0), False),
        (torch.float32, [(32, 256), (256, 3)], (9, 0), False),
        (torch.float32, [(32, 3)], (9, 0), False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_goes_to_triton(x, layers, capability, taken, machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    suits = getattr(suits_triton, "__wrapped__", suits_triton)  # these are no tensors
    given = Elsewhere(2, 9, layers[0][0], dtype=x), [Elsewhere(2, *shape) for shape in layers]
    machine("triton", "gcc")
    assert suits(*given) == taken
    assert decoder_code("cuda")[0] == ("triton" if capability >= (8, 0) else "torch")
    machine("tinycudann")
    assert not suits(*given)


def test_what_is_handed_over(monkeypatch):
    "Weights of one precision, lowered under autocast; layers that do not fit are refused before."
    handed = []
    monkeypatch.setattr(decoders, "suits_triton", lambda x, weights: True)
    monkeypatch.setattr(
        decoders,
        "decode_triton",
        lambda *given: handed.append(given) or mlp_plain(given[0].to(given[1].dtype), given[1:]),
    )
    x, first, last, _ = network(2, 9, 6, 20, 3)
    assert torch.equal(mlp(x.double(), [first, last]), mlp_plain(x, [first, last]))
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x, [first, last]).dtype == torch.bfloat16
    assert [[t.dtype for t in given] for given in handed] == [
        [torch.float64, torch.float32, torch.float32],
        [torch.float32, torch.bfloat16, torch.bfloat16],
    ]
    for wrong in (
        (x[..., :5], [first, last]),
        (x, [first, last[:, 1:]]),
        (x, [first, last.half()]),
    ):
        with pytest.raises(decoders.UsageError, match="points and layers of a decoder are"):
            mlp(*wrong)
    assert len(handed) == 2


@pytest.mark.parametrize(
    ("device", "there", "at_once", "rival"),
    [
        ("cpu", ["triton", "gcc", "tinycudann"], 0, False),
        ("cuda:0", ["triton", "gcc"], 3, False),
        ("cuda", ["tinycudann"], 0, False),
        ("cuda", ["triton", "gcc", "tinycudann"], 3, True),
    ],
)
def test_what_the_benchmark_compares(device, there, at_once, rival, machine):
    machine(*there)
    found = decoder_matches(device, False)
    assert [prompts for prompts, _, loop in found if loop] == [1, 4, 16, 64] and sum(
        not loop for *_, loop in found
    ) == at_once
    assert cuda_with(device, "triton", "tinycudann") == rival


# on a GPU ----------------------------------------------------------------------------------------


@needs_triton
@needs_cuda
@pytest.mark.parametrize(
    "widths", [(32, 64, 1), (16, 64, 3), (5, 20, 16), (64, 64, 3), (32, 128, 3)], ids=str
)
@pytest.mark.parametrize(
    ("kind", "least"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
def test_on_cuda(widths, kind, least):
    "The oracle's numbers, the same bits a hundred times."
    x, first, last, upstream = (t.to("cuda", kind) for t in network(3, 5000, *widths))
    upstream[:, 1000:3000] = 0

    def run(decode, *given):
        leaves = [t.detach().requires_grad_() for t in given]
        y = decode(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y))]

    want, found = (
        run(lambda x, *layers: mlp_plain(x, layers), x.double(), first.double(), last.double()),
        [run(decode_triton, x, first, last) for _ in range(100)],
    )
    for got, exact in zip(found[0], want):
        assert (got.double() - exact).norm() <= (
            least if got is found[0][0] else max(10 * least, 1e-3)
        ) * exact.norm()  # a hidden number rounded across 0 turns a gradient on or off
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(again, found[0]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(lambda x, *layers: mlp(x, layers), x, first, last), found[0])
    )
