"""What Triton's kernels do in Triton's interpreter, on the CPU. As a program it runs every case and prints what it found; TRITON_INTERPRET=1
must be set before Triton is imported, so it is a process of its own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    import conftest  # noqa: F401  the library's annotations are checked at run time here, too

import torch
from safetensors.torch import load_file

from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import generator
from scaledreamer.field import triton_grid
from scaledreamer.field.encodings import HashGrid
from scaledreamer.field.levels import HashGridSettings, encode_torch, grid_levels
from scaledreamer.field.triton_grid import encode_triton

SMALL = HashGridSettings(levels=2, log2_size=6, base=3, scale=2.0)  # a dense level and a hashed one
CASES: dict[str, Callable[[], object]] = {}


def case(function: Callable[[], object]) -> Callable[[], object]:
    CASES[function.__name__] = function
    return function


def table_of(shape: HashGridSettings, kind: torch.dtype = torch.float32) -> torch.Tensor:
    last = grid_levels(shape)[-1]
    return torch.randn((last.offset + last.size) * shape.features, generator=generator(0)).to(kind).requires_grad_()


def apart(x: torch.Tensor, shape: HashGridSettings = SMALL, kind: torch.dtype = torch.float32, loss: Callable | None = None) -> list[float]:
    "How far features, gradient by the points and gradient by the table are from the oracle's; the gradients of the largest."
    upstream = torch.randn(len(x), shape.levels * shape.features, generator=generator(1))
    points, table, results = x.detach().requires_grad_(), table_of(shape, kind), []
    for encode in (lambda x, t, shape: encode_torch(x if x.dtype == torch.float64 else x.float(), t.float(), shape), encode_triton):
        y = encode(points, table, shape)
        assert y.dtype == torch.float32
        results.append([y.detach(), *torch.autograd.grad(loss(y) if loss else (y * upstream).sum(), (points, table))])
    for want, got in zip(*results):
        assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(got.isfinite(), want.isfinite())
    (y, *gradients), (y2, *gradients2) = ([r.double().nan_to_num(0, 0, 0) for r in side] for side in results)
    most = lambda r: r.abs().max().item() if r.numel() else 0.0
    return [most(y2 - y), *(most(got - want) / max(most(want), 1e-30) for want, got in zip(gradients, gradients2))]


# every shape -----------------------------------------------------------------------------------------------------------------


@case
def dimensions_and_features():
    found = []
    for dims, features in ((2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 4)):
        shape = HashGridSettings(levels=2, features=features, log2_size=5, base=3 if dims == 3 else 5, scale=2.0, dims=dims)
        assert [level.hashed for level in grid_levels(shape)] == [False, True]
        found.append(apart(torch.rand(60, dims, generator=generator(features)) * 1.5 - 0.25, shape))
    return found


@case
def many_features():
    return [apart(torch.rand(10, 2, generator=generator(0)), HashGridSettings(levels=1, features=19, log2_size=6, base=4, dims=2))]


@case
def the_release_s_finest_level():
    "Keys that wrap around 32 bits, and positions that eat into the fraction."
    shape = HashGridSettings(levels=2, log2_size=12, base=2048, scale=2.0)
    return [apart(torch.rand(100, 3, generator=generator(0)), shape)]


# every point -----------------------------------------------------------------------------------------------------------------


@case
def faces_and_outside():
    values = torch.tensor([0.0, 1.0, 0.5, 0.25, -0.25, 1.25, -0.75, 1e4, -1e4, 1e-30])  # both round alike, so even on a face
    return [apart(torch.cartesian_prod(values, values[:5], values[:4]))]


@case
def not_numbers():
    x = torch.rand(12, 3, generator=generator(0))
    x[:9:3, 1], x[1], x[2, 2] = torch.tensor([float("nan"), float("inf"), float("-inf")]), float("nan"), float("inf")
    return [apart(x)[:1]]


@case
def counts():
    triton_grid.BLOCK = 16
    found = [apart(torch.rand(count, 3, generator=generator(count))) for count in (0, 1, 16, 17)]
    triton_grid.BLOCK = 512
    return found


@case
def layouts_and_types():
    columns = torch.rand(3, 40, generator=generator(0))
    found = [apart(x) for x in (columns.T, columns.T[::2], columns[:, :1].T.expand(7, 3), columns.T.double())]
    halves = [apart(columns.T.to(kind)) for kind in (torch.float16, torch.bfloat16)]
    assert all(slope < 1e-2 for _, slope, _ in halves), halves  # rounded to the points' 16 bits
    return found + [[y, table] for y, _, table in halves]


@case
def tables_of_16_bits():
    found = [apart(torch.rand(40, 3, generator=generator(0)), kind=kind) for kind in (torch.float16, torch.bfloat16)]
    assert all(table < 1e-2 for _, _, table in found), found
    return [row[:2] for row in found]


@case
def gradients_of_any_stride():
    x = torch.rand(30, 3, generator=generator(0))
    skewed = torch.randn(SMALL.levels * SMALL.features, 30, generator=generator(2))
    return [apart(x, loss=lambda y: y.sum()), apart(x, loss=lambda y: (y.T * skewed).sum()), apart(x, loss=lambda y: y[::2, 1].sum())]


# as a citizen of torch -------------------------------------------------------------------------------------------------------


@case
def only_what_is_asked_for():
    table, x = table_of(SMALL), torch.rand(20, 3, generator=generator(0))
    before = x.clone(), table.detach().clone()
    y = encode_triton(x, table, SMALL)
    (by_table,) = torch.autograd.grad(y.sum(), table)
    points = x.clone().requires_grad_()
    (by_points,) = torch.autograd.grad(encode_triton(points, table.detach(), SMALL).sum(), points)
    assert by_table.abs().sum() > 0 and by_points.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(encode_triton(x, table, SMALL), y.detach())
    assert torch.equal(x, before[0]) and torch.equal(table, before[1])
    return []


@case
def a_second_derivative_is_refused():
    x = torch.rand(5, 3, generator=generator(0)).requires_grad_()
    try:
        torch.autograd.grad(encode_triton(x, table_of(SMALL), SMALL).sum(), x, create_graph=True)
    except UsageError as error:
        assert "no second derivative (create_graph=True); use backend torch" in str(error)
        return []
    raise AssertionError("it was not refused")


@case
def opcheck():
    "torch's own tests of an operation: schema, shapes for `torch.compile`, registration of the derivative."
    numbers = [float(number) for number in (2, 2, 6, 3, 2.0, 3)]
    x = torch.rand(5, 3, generator=generator(0))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(triton_grid._read, (x, table_of(SMALL), numbers), test_utils=tests)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(triton_grid._pull, (x, table_of(SMALL).detach(), torch.rand(5, 4, generator=generator(1)), numbers, *wanted), test_utils=tests)
    return []


@case
def the_module():
    "One state whatever computes, any batch, 16-bit modules; a batch is its members."
    grid, oracle = HashGrid(SMALL, "triton"), HashGrid(SMALL, "torch")
    oracle.load_state_dict(grid.state_dict())
    assert list(grid.state_dict()) == ["table"]
    x = torch.rand(2, 3, 5, 3, generator=generator(0))
    assert torch.equal(grid(x)[1, 2], grid(x[1, 2])) and grid(x[:0]).shape == (0, 3, 5, 4)
    found = [(grid(x) - oracle(x)).abs().max().item() * 1e4, (grid.half()(x) - oracle.half()(x)).abs().max().item() * 1e4]  # the table is U(-1e-4, 1e-4)
    try:
        grid.double()(x)
    except UsageError as error:
        assert "backend triton wants a table of 32 bits or fewer" in str(error)
    return [found]


@case
def tiny_cuda_nn_s_numbers():
    folder = Path(__file__).parent / "parity"
    config, data = json.loads((folder / "01_hashgrid_b_mixed3d.json").read_text()), load_file(folder / "01_hashgrid_b_mixed3d.safetensors")
    grid = config["encoding_config"]
    shape = HashGridSettings(grid["n_levels"], grid["n_features_per_level"], grid["log2_hashmap_size"], grid["base_resolution"], grid["per_level_scale"], config["n_input_dims"])
    x, table = data["x"].clone().requires_grad_(), data["params"].clone().requires_grad_()
    y = encode_triton(x, table, shape)
    by_points, by_table = torch.autograd.grad(y, (x, table), data["dL_dy"])
    valid = data["grad_x_valid"].bool()  # elsewhere a point lies on a face
    slope = (by_points - data["grad_x"])[valid].abs().max() / data["grad_x"].abs().max()
    return [[(y - data["y"]).abs().max().item(), slope.item(), ((by_table - data["grad_params"]).abs().max() / data["grad_params"].abs().max()).item()]]


if __name__ == "__main__":
    triton_grid.BLOCK, found = 512, {}
    for name, function in CASES.items():
        try:
            found[name] = function()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    json.dump(found, sys.stdout)
