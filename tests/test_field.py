"""Scenes, the compiled hash grid against its definition, density and backgrounds."""

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledreamer.field.scene_checks import check_scene
from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.kernels import hash_grid_numba
from scaledreamer.field.background import (
    BackgroundAugmentation,
    EnvironmentMap,
    SolidBackground,
    prompted_colors,
    sample_backgrounds,
)
from scaledreamer.field.density import released_beta, volsdf_density
from scaledreamer.field.hash_grid import HashGrid, HashGridSettings, spherical_harmonics
from scaledreamer.kernels.hash_grid_reference import encode_torch, grid_levels, vertex_index
from scaledreamer.field.scene import FogScene, SphereScene
from scaledreamer.kernels.hash_grid_numba import encode_numba
from fixtures import call_in_fork
from test_triton_grid import needs_cuda

SMALL = HashGridSettings(levels=5, log2_size=7, base=3, scale=1.7)


def table_of(shape: HashGridSettings, seed: int = 0) -> torch.Tensor:
    last = grid_levels(shape)[-1]
    return torch.randn((last.offset + last.size) * shape.features, generator=make_rng(seed))


def both(
    x: torch.Tensor, shape: HashGridSettings, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    "Features and gradients by points and table, of the definition and of the compiled loops."
    upstream = torch.randn(len(x), shape.levels * shape.features, generator=make_rng(seed + 1))
    results = []
    for encode in (encode_torch, encode_numba):
        points, table = x.clone().requires_grad_(), table_of(shape, seed).requires_grad_()
        y = encode(points, table, shape)
        results.append((y.detach(), *torch.autograd.grad(y, (points, table), upstream)))
    return results


# scenes -------------------------------------------------------------------------------------------


def test_scenes_keep_the_contract():
    check_scene(
        SphereScene(torch.tensor([0.5, 0.7, 0.2]), colors=torch.rand(3, 3, generator=make_rng(0))),
        3,
    )
    check_scene(SphereScene(torch.tensor([0.5]), centers=torch.tensor([[0.1, 0.2, 0.3]])), 1)
    check_scene(FogScene(), 2)


def test_spheres_from_inside_and_behind():
    scene = SphereScene(torch.tensor([0.5]))
    origins = torch.tensor([[[0.0, 0.0, 0.1], [2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]])
    directions = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]])
    depth, met = scene.hit(origins, directions)
    assert met.tolist() == [[False, False, True]] and depth.tolist() == [[0.0, 0.0, 1.5]]


# the hash grid ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(
    st.builds(
        HashGridSettings,
        levels=st.integers(1, 4),
        features=st.sampled_from([1, 2]),
        log2_size=st.integers(3, 10),
        base=st.integers(1, 9),
        scale=st.floats(1, 3),
        dims=st.sampled_from([2, 3]),
    ),
    st.integers(0, 1000),
)
def test_the_walk_is_the_oracle(shape, seed):
    x = torch.rand(60, shape.dims, generator=make_rng(seed)) * 1.5 - 0.25
    (y, dx, dt), (y2, dx2, dt2) = both(x, shape, seed)
    torch.testing.assert_close(y2, y, atol=5e-6, rtol=0)
    torch.testing.assert_close(dt2, dt, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        dx2, dx, atol=1e-5 * max(1, dx.abs().max().item()), rtol=0
    )  # both round alike, so even at faces


@pytest.mark.parametrize(
    "value", [0.0, 1.0, -0.25, 1.25, 0.5, -1e4, 1e4, float("inf"), float("-inf"), float("nan")]
)
def test_awkward_coordinates(value):
    x = torch.rand(40, 3, generator=make_rng(0))
    x[:, 1] = value
    (y, _, dt), (y2, _, dt2) = both(x, SMALL)
    torch.testing.assert_close(y2, y, atol=5e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(dt2, dt, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 4097])
def test_any_number_of_points(count):
    x = torch.rand(count, 3, generator=make_rng(count))
    for got, want in zip(*both(x, SMALL)):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_layouts_and_types():
    fast, oracle = HashGrid(SMALL), HashGrid(SMALL, "torch")
    oracle.load_state_dict(fast.state_dict())
    columns = torch.rand(3, 60, generator=make_rng(0))
    for x in (
        columns.T,
        columns.T[::2],
        columns.T.half(),
        columns.T.bfloat16(),
        columns.T.double(),
        columns.T.reshape(4, 5, 3, 3),
        columns[:, 0],
    ):
        assert torch.equal(x, x.clone())
        y = fast(x)
        assert y.shape == (*x.shape[:-1], 10) and y.dtype == torch.float32
        torch.testing.assert_close(y, oracle(x), atol=1e-9, rtol=1e-5)
    half = columns.T.half().requires_grad_()
    fast(half).sum().backward()
    assert half.grad.dtype == torch.float16 and fast.table.grad.dtype == torch.float32


def test_nothing_is_copied_and_nothing_is_written():
    grid, x = HashGrid(SMALL), torch.rand(500, 3, generator=make_rng(0))
    before = x.clone(), grid.table.detach().clone()
    grid(x).sum().backward()
    assert torch.equal(x, before[0]) and torch.equal(grid.table, before[1])


def test_only_what_is_asked_for():
    table, x = table_of(SMALL), torch.rand(50, 3, generator=make_rng(0))
    y = encode_numba(x, table.clone().requires_grad_(), SMALL)
    assert y.requires_grad
    points = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(encode_numba(points, table, SMALL).sum(), points)
    assert gradient.shape == x.shape and gradient.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(encode_numba(x, table, SMALL), y)
    with torch.inference_mode():
        assert torch.equal(encode_numba(x, table, SMALL), y.detach())


def test_a_second_derivative_is_refused_not_wrong():
    x = torch.rand(5, 3, generator=make_rng(0)).requires_grad_()
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad(encode_numba(x, table_of(SMALL), SMALL).sum(), x, create_graph=True)


def test_an_expanded_gradient():
    "`sum` sends back a gradient without strides."
    table = table_of(SMALL).requires_grad_()
    x = torch.rand(300, 3, generator=make_rng(0))
    got, want = (
        torch.autograd.grad(encode(x, table, SMALL).sum(), table)[0]
        for encode in (encode_numba, encode_torch)
    )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    "Of the compiled loops, by points and table; enough points for several threads."
    points, table = x.clone().requires_grad_(), table_of(SMALL).requires_grad_()
    return torch.autograd.grad(encode_numba(points, table, SMALL).square().sum(), (points, table))


def test_the_same_bits_on_any_number_of_threads(threads):
    x, runs = torch.rand(9000, 3, generator=make_rng(0)), []
    for count in (1, 2, 3, 8, 8):
        threads(count)
        runs.append(gradients(x))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


def test_two_python_threads_at_once(threads):
    threads(2)
    x = torch.rand(9000, 3, generator=make_rng(0))
    want, got = gradients(x), {}
    workers = [threading.Thread(target=lambda i=i: got.update({i: gradients(x)})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(got) == 4 and all(
        torch.equal(a, b) for run in got.values() for a, b in zip(run, want)
    )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_its_own_threads(threads):
    "Threads do not survive a fork: with the parent's pool the child would wait for ever."
    threads(2)
    x, table = torch.rand(9000, 3, generator=make_rng(0)), table_of(SMALL)
    last = lambda: encode_numba(x, table, SMALL)[-1].tolist()
    want = last()
    assert call_in_fork(last) == want


def test_without_a_place_for_machine_code(monkeypatch):
    import numba

    njit = numba.njit

    def homeless(*args, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(numba, "njit", homeless)
    built = hash_grid_numba.compiled.__wrapped__()
    assert isinstance(built, SimpleNamespace) and set(vars(built)) == {"read", "add", "gradient"}


def test_copies_and_state():
    grid, x = HashGrid(SMALL), torch.rand(20, 3, generator=make_rng(0))
    for other in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        assert torch.equal(other(x), grid(x)) and list(other.state_dict()) == ["table"]
    assert torch.equal(
        HashGrid(SMALL, "torch").double().to(torch.float32)(x).isfinite().all(), torch.tensor(True)
    )


def test_training_moves_only_what_was_read():
    grid = HashGrid(SMALL)
    x = torch.rand(4, 3, generator=make_rng(0))
    grid(x).sum().backward()
    level = grid_levels(SMALL)[-1]
    cell = (x.double() * level.scale + 0.5).floor().long()
    read = {
        int(i)
        for c in torch.cartesian_prod(*[torch.arange(2)] * 3)
        for i in vertex_index(cell + c, level)
    }
    moved = (
        grid.table.grad.view(-1, 2)[level.offset : level.offset + level.size]
        .abs()
        .sum(-1)
        .nonzero()
        .flatten()
        .tolist()
    )
    assert set(moved) <= read and len(moved) > 8


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: HashGrid(SMALL, backend="numba").double()(torch.zeros(1, 3)),
        lambda: HashGrid(SMALL, backend="tinycudann")(torch.zeros(1, 3)),
        lambda: HashGridSettings(levels=0),
        lambda: HashGridSettings(features=0),
        lambda: HashGridSettings(log2_size=2),
        lambda: HashGridSettings(base=0),
        lambda: volsdf_density(torch.zeros(1), -1.0),
        lambda: volsdf_density(torch.zeros(1), float("nan")),
        lambda: SolidBackground((0.0, 0.0, -0.1)),
        lambda: BackgroundAugmentation(-0.1),
        lambda: SphereScene(torch.tensor([-1.0])),
    ],
)
def test_refusals(wrong):
    with pytest.raises(UsageError):
        wrong()


@needs_cuda
def test_the_oracle_on_cuda():
    grid, x = HashGrid(SMALL, "torch"), torch.rand(1000, 3, generator=make_rng(0))
    want = grid(x)
    torch.testing.assert_close(grid.cuda()(x.cuda()).cpu(), want, atol=1e-8, rtol=1e-4)


# spherical harmonics ------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_degrees_do_not_mix_under_rotation(seed):
    "Rotations map the space of each degree onto itself: the sum of its squares is constant."
    rng = make_rng(seed)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))[0]
    d = torch.nn.functional.normalize(
        torch.randn(20, 3, generator=rng, dtype=torch.float64), dim=-1
    )
    for part in (slice(0, 1), slice(1, 4), slice(4, 9)):
        before, after = (spherical_harmonics(x)[:, part].square().sum(-1) for x in (d, d @ turn))
        torch.testing.assert_close(before, after)


# density ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(1e-4, 10), st.floats(-20, 20))
def test_density_is_laplace_s_distribution(beta, d):
    sdf = torch.tensor([d, -d], dtype=torch.float64)
    density = volsdf_density(sdf, beta)
    assert (density >= 0).all() and (density <= 1 / beta).all()
    assert density.sum().item() == pytest.approx(1 / beta)
    shift_schedule = torch.distributions.Laplace(torch.zeros(2).double(), beta)
    torch.testing.assert_close(density, shift_schedule.cdf(-sdf) / beta, atol=1e-9, rtol=1e-9)


def test_density_of_nothing_and_of_extremes():
    assert volsdf_density(torch.zeros(0), 0.1).shape == (0,)
    sdf = torch.tensor([-1e30, -1.0, 0.0, 1.0, 1e30], requires_grad=True)
    beta = torch.tensor(1e-3, requires_grad=True)
    density = volsdf_density(sdf, beta)
    assert all(
        g.isfinite().all() for g in (density, *torch.autograd.grad(density.sum(), (sdf, beta)))
    )
    assert released_beta().item() == pytest.approx(1 / 29.9998, rel=1e-5)


# backgrounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("colors", ["mixed", "uniform"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_backgrounds_are_replaced_in_groups(each, share, colors):
    settings = BackgroundAugmentation(0.7, colors, each, share)
    (color, replaced), (same, again) = (
        sample_backgrounds(settings, 40, 3, make_rng(3)) for _ in range(2)
    )
    assert torch.equal(color, same) and torch.equal(replaced, again)
    assert color.shape == (40, 3, 3, 1, 1) and replaced.shape == (40, 3, 1, 1, 1)
    assert (0 <= color).all() and (color <= 1).all()
    assert torch.equal(color, color[:, :1].expand_as(color)) == share
    groups = replaced.flatten(1).sum(1).unique().tolist()
    assert set(groups) <= ({0, 3} if share or not each else {0, 1, 2, 3})
    assert (len(groups) > 1) == each and (not share or not each or groups == [0, 3])


def test_a_default_background_draws_what_it_always_drew():
    rng, kinds = make_rng(5), make_rng(5)
    color, replaced = sample_backgrounds(BackgroundAugmentation(), 2, 3, rng)
    kind = torch.randint(0, 3, (6, 1), generator=kinds)
    rgb, grey = torch.rand(6, 3, generator=kinds), torch.rand(6, 1, generator=kinds)
    want = torch.where(kind == 0, 1.0, torch.where(kind == 1, grey, rgb))
    assert torch.equal(color, want.view(2, 3, 3, 1, 1)) and replaced.all()
    assert torch.equal(rng.get_state(), kinds.get_state())


def test_prompts_of_a_prompted_map_do_not_mix():
    rng = make_rng(0)
    features, weights = (
        torch.randn(1, 50, 8, generator=rng),
        [torch.randn(3, 8, 4, generator=rng), torch.randn(3, 4, 3, generator=rng)],
    )
    color = prompted_colors(features, weights)
    for i in range(3):
        torch.testing.assert_close(
            prompted_colors(features, [w[i : i + 1] for w in weights])[0], color[i]
        )


def test_environment_maps_differ_by_backend_only_in_speed():
    shape = HashGridSettings(levels=2, log2_size=8, base=4, scale=2.0)
    fast, oracle = EnvironmentMap(shape), EnvironmentMap(shape, backend="torch")
    oracle.load_state_dict(fast.state_dict())
    d = torch.nn.functional.normalize(torch.randn(2, 30, 3, generator=make_rng(0)), dim=-1)
    torch.testing.assert_close(fast(d), oracle(d))
