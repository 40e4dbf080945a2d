"""What Triton's kernels compute in Triton's interpreter, on the CPU.

As a program it runs every case and prints what it found. TRITON_INTERPRET=1 must be set before
Triton is imported, so it is a process of its own. With the name of a CUDA device as its argument it
compiles the kernels and runs the cases on that device, and fails where one is too far off.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    import conftest  # noqa: F401  the library's annotations are checked at run time here, too

import torch
from safetensors.torch import load_file

from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.kernels import mlp_triton, hash_grid_triton
from scaledreamer.field.decoders import mlp_plain
from scaledreamer.field.hash_grid import HashGrid
from scaledreamer.kernels.hash_grid_reference import HashGridSettings, encode_torch, grid_levels
from scaledreamer.kernels.mlp_triton import decode_triton
from scaledreamer.kernels.hash_grid_triton import encode_triton

SMALL = HashGridSettings(levels=2, log2_size=6, base=3, scale=2.0)  # a dense level and a hashed one
CASES: dict[str, Callable[[], object]] = {}


def case(function: Callable[[], object]) -> Callable[[], object]:
    CASES[function.__name__] = function
    return function


def table_of(shape: HashGridSettings, kind: torch.dtype = torch.float32) -> torch.Tensor:
    last = grid_levels(shape)[-1]
    return (
        torch.randn((last.offset + last.size) * shape.features, generator=make_rng(0))
        .to(kind)
        .requires_grad_()
    )


def errors(
    x: torch.Tensor,
    shape: HashGridSettings = SMALL,
    kind: torch.dtype = torch.float32,
    loss: Callable | None = None,
) -> list[float]:
    """Largest errors of the features, of the gradient by the points and of that by the table; those
    of the gradients relative to the largest value."""
    upstream = torch.randn(len(x), shape.levels * shape.features, generator=make_rng(1))
    points, table, results = x.detach().requires_grad_(), table_of(shape, kind), []
    for encode in (
        lambda x, t, shape: encode_torch(
            x if x.dtype == torch.float64 else x.float(), t.float(), shape
        ),
        encode_triton,
    ):
        y = encode(points, table, shape)
        assert y.dtype == torch.float32
        results.append(
            [
                y.detach(),
                *torch.autograd.grad(loss(y) if loss else (y * upstream).sum(), (points, table)),
            ]
        )
    for want, got in zip(*results):
        assert (
            got.dtype == want.dtype
            and got.shape == want.shape
            and torch.equal(got.isfinite(), want.isfinite())
        )
    (y, *gradients), (y2, *gradients2) = (
        [r.double().nan_to_num(0, 0, 0) for r in side] for side in results
    )
    most = lambda r: r.abs().max().item() if r.numel() else 0.0
    return [
        most(y2 - y),
        *(most(got - want) / max(most(want), 1e-30) for want, got in zip(gradients, gradients2)),
    ]


# every shape -------------------------------------------------------------------------------------


def second_is_refused(y: torch.Tensor, leaf: torch.Tensor, words: str) -> None:
    try:
        torch.autograd.grad(y.sum(), leaf, create_graph=True)
    except UsageError as error:
        assert words in str(error)
    else:
        raise AssertionError("it was not refused")


@case
def dimensions_and_features():
    found = []
    for dims, features in ((2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 4)):
        shape = HashGridSettings(
            levels=2,
            features=features,
            log2_size=5,
            base=3 if dims == 3 else 5,
            scale=2.0,
            dims=dims,
        )
        assert [level.hashed for level in grid_levels(shape)] == [False, True]
        found.append(errors(torch.rand(60, dims, generator=make_rng(features)) * 1.5 - 0.25, shape))
    return found


@case
def many_features():
    return [
        errors(
            torch.rand(10, 2, generator=make_rng(0)),
            HashGridSettings(levels=1, features=19, log2_size=6, base=4, dims=2),
        )
    ]


@case
def the_release_s_finest_level():
    "Keys that wrap around 32 bits, and positions that eat into the fraction."
    shape = HashGridSettings(levels=2, log2_size=12, base=2048, scale=2.0)
    return [errors(torch.rand(100, 3, generator=make_rng(0)), shape)]


# every point -------------------------------------------------------------------------------------


@case
def faces_and_outside():
    values = torch.tensor(
        [0.0, 1.0, 0.5, 0.25, -0.25, 1.25, -0.75, 1e4, -1e4, 1e-30]
    )  # both round alike, so even on a face
    return [errors(torch.cartesian_prod(values, values[:5], values[:4]))]


@case
def nan_and_infinity():
    x = torch.rand(12, 3, generator=make_rng(0))
    x[:9:3, 1], x[1], x[2, 2] = (
        torch.tensor([float("nan"), float("inf"), float("-inf")]),
        float("nan"),
        float("inf"),
    )
    return [errors(x)[:1]]


@case
def counts():
    hash_grid_triton.GRID_BLOCK = 16
    found = [errors(torch.rand(count, 3, generator=make_rng(count))) for count in (0, 1, 16, 17)]
    hash_grid_triton.GRID_BLOCK = 512
    return found


@case
def layouts_and_types():
    columns = torch.rand(3, 40, generator=make_rng(0))
    found = [
        errors(x)
        for x in (columns.T, columns.T[::2], columns[:, :1].T.expand(7, 3), columns.T.double())
    ]
    halves = [errors(columns.T.to(kind)) for kind in (torch.float16, torch.bfloat16)]
    assert all(by_points_error < 1e-2 for _, by_points_error, _ in halves), (
        halves
    )  # rounded to the points' 16 bits
    return found + [[y, table] for y, _, table in halves]


@case
def tables_of_16_bits():
    found = [
        errors(torch.rand(40, 3, generator=make_rng(0)), kind=kind)
        for kind in (torch.float16, torch.bfloat16)
    ]
    assert all(table < 1e-2 for _, _, table in found), found
    return [row[:2] for row in found]


@case
def gradients_of_any_stride():
    x = torch.rand(30, 3, generator=make_rng(0))
    skewed = torch.randn(SMALL.levels * SMALL.features, 30, generator=make_rng(2))
    return [
        errors(x, loss=lambda y: y.sum()),
        errors(x, loss=lambda y: (y.T * skewed).sum()),
        errors(x, loss=lambda y: y[::2, 1].sum()),
    ]


# as an operation of torch -------------------------------------------------------------------------


@case
def only_the_gradients_that_are_needed():
    table, x = table_of(SMALL), torch.rand(20, 3, generator=make_rng(0))
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
    x = torch.rand(5, 3, generator=make_rng(0)).requires_grad_()
    second_is_refused(
        encode_triton(x, table_of(SMALL), SMALL),
        x,
        "no second derivative (create_graph=True); use backend torch",
    )
    return []


@case
def opcheck():
    "torch's own tests of an operation: schema, shapes for `torch.compile`, registered gradient."
    numbers = [float(number) for number in (2, 2, 6, 3, 2.0, 3)]
    x = torch.rand(5, 3, generator=make_rng(0))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        hash_grid_triton._grid_forward, (x, table_of(SMALL), numbers), test_utils=tests
    )
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            hash_grid_triton._grid_backward,
            (
                x,
                table_of(SMALL).detach(),
                torch.rand(5, 4, generator=make_rng(1)),
                numbers,
                *wanted,
            ),
            test_utils=tests,
        )
    return []


@case
def the_module():
    "One state whatever computes, any batch, 16-bit modules; a batch is its members."
    grid, oracle = HashGrid(SMALL, "triton"), HashGrid(SMALL, "torch")
    oracle.load_state_dict(grid.state_dict())
    assert list(grid.state_dict()) == ["table"]
    x = torch.rand(2, 3, 5, 3, generator=make_rng(0))
    assert torch.equal(grid(x)[1, 2], grid(x[1, 2])) and grid(x[:0]).shape == (0, 3, 5, 4)
    found = [
        (grid(x) - oracle(x)).abs().max().item() * 1e4,
        (grid.half()(x) - oracle.half()(x)).abs().max().item() * 1e4,
    ]  # the table is U(-1e-4, 1e-4)
    try:
        grid.double()(x)
    except UsageError as error:
        assert "backend triton needs a table of 32 bits or fewer" in str(error)
    return [found]


@case
def tiny_cuda_nn_s_numbers():
    folder = Path(__file__).parent / "parity"
    config, data = (
        json.loads((folder / "01_hashgrid_b_mixed3d.json").read_text()),
        load_file(folder / "01_hashgrid_b_mixed3d.safetensors"),
    )
    grid = config["encoding_config"]
    shape = HashGridSettings(
        grid["n_levels"],
        grid["n_features_per_level"],
        grid["log2_hashmap_size"],
        grid["base_resolution"],
        grid["per_level_scale"],
        config["n_input_dims"],
    )
    x, table = data["x"].clone().requires_grad_(), data["params"].clone().requires_grad_()
    y = encode_triton(x, table, shape)
    by_points, by_table = torch.autograd.grad(y, (x, table), data["dL_dy"])
    valid = data["grad_x_valid"].bool()  # elsewhere a point lies on a face
    by_points_error = (by_points - data["grad_x"])[valid].abs().max() / data["grad_x"].abs().max()
    return [
        [
            (y - data["y"]).abs().max().item(),
            by_points_error.item(),
            ((by_table - data["grad_params"]).abs().max() / data["grad_params"].abs().max()).item(),
        ]
    ]


# decoders ----------------------------------------------------------------------------------------


def network(prompts: int, points: int, f: int, h: int, o: int) -> list[torch.Tensor]:
    "Points, both layers, a gradient of the outputs."
    rng = make_rng(points)
    return [
        torch.randn(prompts, *shape, generator=rng)
        for shape in ((points, f), (f, h), (h, o), (points, o))
    ]


def decoded(
    x: torch.Tensor, first: torch.Tensor, last: torch.Tensor, upstream: torch.Tensor | None
) -> list[list[torch.Tensor]]:
    "Outputs and gradients, plainly in 64 bits and by Triton; `upstream` None means a plain sum."
    results = []
    for decode, kind in (
        (lambda x, *layers: mlp_plain(x, layers), torch.float64),
        (decode_triton, None),
    ):
        leaves = [
            t.detach().requires_grad_() if kind is None else t.detach().to(kind).requires_grad_()
            for t in (x, first, last)
        ]
        y = decode(*leaves)
        results.append(
            [
                y.detach(),
                *torch.autograd.grad(
                    y.sum() if upstream is None else (y * upstream.to(y)).sum(), leaves
                ),
            ]
        )
    for got, given in zip(results[1], (last, x, first, last)):
        assert got.dtype == given.dtype
    return results


def decoder_errors(
    x: torch.Tensor, first: torch.Tensor, last: torch.Tensor, upstream: torch.Tensor | None = None
) -> list[float]:
    """Errors of outputs and gradients of points and layers against plain products in 64 bits,
    relative to the largest value."""
    want, got = decoded(x, first, last, upstream)
    assert [t.shape for t in want] == [t.shape for t in got]
    return [
        ((b.double() - a).abs().max() / a.abs().max().clamp_min(1e-30)).item() if a.numel() else 0.0
        for a, b in zip(want, got)
    ]


@case
def decoder_widths():
    return [
        decoder_errors(*network(2, 40, *widths))
        for widths in (
            (32, 64, 3),
            (16, 16, 16),
            (5, 20, 1),
            (17, 100, 2),
            (1, 1, 1),
            (64, 64, 16),
            (31, 65, 15),
        )
    ]


@case
def decoder_counts():
    "No point, one, borders of blocks, more blocks than programs."
    return [
        decoder_errors(*network(prompts, points, 6, 20, 3))
        for prompts, points in (
            (2, 0),
            (0, 5),
            (1, 1),
            (2, 15),
            (2, 16),
            (2, 17),
            (1, 64),
            (3, 65),
            (7, 129),
            (1, 300),
        )
    ]


@case
def decoder_layouts():
    x, first, last, upstream = network(2, 50, 16, 32, 3)
    turn = lambda t: t.mT.contiguous().mT
    row = torch.cat([first.flatten(1), last.flatten(1)], 1)  # as a hypernetwork gives them
    first, last = row[:, : 16 * 32].unflatten(1, (16, 32)), row[:, 16 * 32 :].unflatten(1, (32, 3))
    shared = [w[:1].expand(2, -1, -1) for w in (first, last)]
    cases = (
        (turn(x), first, last, upstream),
        (x, turn(first), turn(last), upstream),
        (x, first, last, turn(upstream)),
        (x, first, last, None),
        (x[:1].expand(2, -1, -1), *shared, upstream),
        (x[:, ::3], first, last, upstream[:, 1::3]),
        (x, turn(first)[:, :, ::2], last[:, 1::2], upstream),
    )
    return [decoder_errors(*given) for given in cases]


@case
def a_batch_of_decoders_is_its_members():
    x, first, last, upstream = network(3, 150, 32, 64, 3)
    _, together = decoded(x, first, last, upstream)
    alone = [decoded(*(t[i : i + 1] for t in (x, first, last, upstream)))[1] for i in range(3)]
    whole = [torch.cat(parts) for parts in zip(*alone)]
    assert torch.equal(together[0], whole[0]) and torch.equal(
        together[1], whole[1]
    )  # to the last bit; sums over points are those of other groups
    return [[((a - b).abs().max() / b.abs().max()).item() for a, b in zip(together, whole)]]


@case
def decoder_blocks_without_a_gradient():
    x, first, last, upstream = network(2, 200, 32, 64, 3)
    upstream[0, 10:180], upstream[1] = 0, 0
    _, got = decoded(x, first, last, upstream)
    assert (
        not got[1][0, 10:180].any()
        and not any(g[1].any() for g in got[1:])
        and all(g[0].any() for g in got[1:])
    )
    return [decoder_errors(x, first, last, upstream)]


def multiply_bfloat16() -> mock._patch:
    """Triton's interpreter stores bfloat16 as 16-bit integers and multiplies those; here they are
    made floats first."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(a):
        return (
            TensorHandle((a.data.astype("uint32") << 16).view("float32"), language.float32)
            if a.dtype.scalar == language.bfloat16
            else a
        )

    plain = InterpreterBuilder.create_dot
    return mock.patch.object(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: plain(self, wide(a), wide(b), *rest),
    )


@case
def decoders_of_16_bits():
    "Weights decide; points may have more bits, and their gradient then has, too."
    for kind, least in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        x, first, last, upstream = network(2, 100, 32, 64, 3)
        x = x.to(kind)
        for points in (x, x.float()):
            with multiply_bfloat16():
                found = decoder_errors(points, first.to(kind), last.to(kind), upstream.to(kind))
            assert max(found) < least, (kind, found)
    return []


@case
def decoder_of_nan_and_infinity():
    x, first, last, upstream = network(1, 40, 16, 32, 3)
    x[0, 7, 3], x[0, 20] = torch.nan, torch.inf
    y, want = decode_triton(x, first, last), mlp_plain(x, (first, last))
    assert torch.equal(y.isfinite(), want.isfinite()) and torch.equal(y.isnan(), want.isnan())
    _, got = decoded(x, first, last, upstream)
    assert not got[2].isfinite().all() and got[1][0, 8].isfinite().all()
    alone = torch.zeros_like(upstream)
    alone[0, 5, 1] = torch.nan
    assert (
        decoded(*network(1, 40, 16, 32, 3)[:3], alone)[1][1][0, 5].isnan().all()
    )  # is not skipped
    return []


@case
def decoder_of_points_at_the_kink():
    "Features of 0 make hidden numbers of 0, which pass on no gradient, as torch's ReLU has it."
    x, first, last, upstream = network(1, 40, 16, 32, 3)
    x[0, ::2] = 0
    return [decoder_errors(x, first, last, upstream)]


@case
def decoder_only_the_gradients_that_are_needed():
    x, first, last, upstream = network(2, 40, 16, 32, 3)
    _, every = decoded(x, first, last, upstream)
    for i, want in enumerate(every[1:]):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, first, last))]
        (got,) = torch.autograd.grad(decode_triton(*leaves), leaves[i], upstream)
        assert torch.equal(got, want)
    with torch.inference_mode():
        assert torch.equal(decode_triton(x, first, last), every[0])
    second_is_refused(
        decode_triton(*leaves),
        leaves[2],
        "decoders by Triton have no second derivative (create_graph=True); use 64 bits",
    )
    return []


@case
def decoder_opcheck():
    x, first, last, upstream = network(2, 5, 4, 6, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        mlp_triton._decoder_forward,
        tuple(t.requires_grad_() for t in (x, first, last)),
        test_utils=tests,
    )
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            mlp_triton._decoder_backward,
            (x.detach(), first.detach(), last.detach(), upstream, *wanted),
            test_utils=tests,
        )
    return []


ON_THE_CPU = ("opcheck", "the_module", "decoder_opcheck")  # their tensors lie there


def on_device(kernel: Callable, device: str) -> Callable:
    "The kernel on a device, for tensors that lie on the CPU; gradients go back with them."

    def call(*given):
        return kernel(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in given)).cpu()

    return call


def far_off(found: dict[str, object]) -> list[str]:
    "Names of the cases that failed, or whose errors are larger than the interpreter's may be."
    near = lambda rows: all(row[0] <= 1e-5 and max(row[1:], default=0) <= 1e-4 for row in rows)
    return [name for name, rows in found.items() if isinstance(rows, str) or not near(rows)]


if __name__ == "__main__":
    found, device = {}, next(iter(sys.argv[1:]), None)
    if device:
        encode_triton, decode_triton = (
            on_device(f, device) for f in (encode_triton, decode_triton)
        )
        CASES = {name: function for name, function in CASES.items() if name not in ON_THE_CPU}
    hash_grid_triton.GRID_BLOCK = 512
    for name, function in CASES.items():
        try:
            found[name] = function()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))
    sys.exit(f"too far off: {', '.join(wrong)}" if device and (wrong := far_off(found)) else 0)
