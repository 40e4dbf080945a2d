"""Decoders by numba equal plain products in 64 bits.

In any shape and layout, on any number of threads, again and again.
"""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledreamer.core.tensors import make_rng
from scaledreamer.field.decoders import mlp, mlp_plain
from scaledreamer.kernels import mlp_numba
from scaledreamer.kernels.mlp_numba import POINTS_PER_TASK
from fixtures import call_in_fork


def network(prompts, points, widths, seed=0):
    "Points, weights of each layer, and a gradient of the outputs."
    rng = make_rng(seed)
    x = torch.randn(prompts, points, widths[0], generator=rng)
    weights = [
        torch.randn(prompts, i, o, generator=rng) / i**0.5 for i, o in zip(widths, widths[1:])
    ]
    return x, weights, torch.randn(prompts, points, widths[-1], generator=rng)


def outputs_and_gradients(f, x, weights, upstream):
    "Outputs and all gradients."
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    y = f(leaves[0], leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def largest_error(got, want):
    "The largest error relative to the largest number; NaN if there is one."
    parts = [
        (g - w).abs().max() / w.abs().max().clamp_min(1e-30)
        for g, w in zip(got, want, strict=True)
        if w.numel()
    ]
    return float(torch.stack([part.double() for part in parts]).max()) if parts else 0.0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([0, 1, 2, 255, 256, 257, 700]),
    st.lists(st.integers(1, 70), min_size=2, max_size=4),
    st.integers(0, 2**31),
)
def test_equals_the_oracle(prompts, points, widths, seed):
    x, weights, upstream = network(prompts, points, widths, seed)
    exact = outputs_and_gradients(
        mlp_plain, x.double(), [w.double() for w in weights], upstream.double()
    )
    found, plain = (
        outputs_and_gradients(mlp, x, weights, upstream),
        outputs_and_gradients(mlp_plain, x, weights, upstream),
    )
    assert largest_error(found[:1], exact[:1]) < 1e-5
    assert largest_error(found, exact) < max(
        1e-4, 3 * largest_error(plain, exact)
    )  # a hidden number that is 0 but for rounding turns its gradient on or off, in both


def test_more_than_one_task():
    x, weights, upstream = network(2, POINTS_PER_TASK + 300, (16, 64, 3))
    assert (
        largest_error(
            outputs_and_gradients(mlp, x, weights, upstream),
            outputs_and_gradients(
                mlp_plain, x.double(), [w.double() for w in weights], upstream.double()
            ),
        )
        < 1e-4
    )


@pytest.mark.parametrize("chunk", [1, 7, 300, 511])
def test_pieces_equal_the_whole(chunk, monkeypatch):
    given = network(2, 600, (5, 12, 7, 3))
    want = outputs_and_gradients(mlp, *given)
    monkeypatch.setattr(mlp_numba, "POINTS_PER_TASK", chunk)
    assert largest_error(outputs_and_gradients(mlp, *given), want) < 1e-5


@pytest.mark.parametrize("busy", [0.0, 0.01, 0.6, 1.0])
def test_points_without_a_gradient_are_left_out(busy, monkeypatch):
    "Only the points computed change; the prompts have different numbers of points, one has none."
    x, weights, upstream = network(3, POINTS_PER_TASK + 300, (16, 64, 3))
    shares = torch.tensor([busy, busy / 2, 0.0])[:, None, None]
    upstream *= torch.rand(3, POINTS_PER_TASK + 300, 1, generator=make_rng(1)) < shares
    computed, loops = [], mlp_numba._mlp_loops()

    def backward(x, above, which, *rest):
        computed.append(len(which))
        loops.backward(x, above, which, *rest)

    counting = SimpleNamespace(forward=loops.forward, backward=backward)
    monkeypatch.setattr(mlp_numba, "_mlp_loops", lambda: counting)
    found = outputs_and_gradients(mlp, x, weights, upstream)
    assert sum(computed) == int(upstream.any(-1).sum())
    assert (
        largest_error(
            found,
            outputs_and_gradients(
                mlp_plain, x.double(), [w.double() for w in weights], upstream.double()
            ),
        )
        < 1e-4
    )
    assert not found[1][~upstream.any(-1)].any() and not any(w[2].any() for w in found[2:])


def test_layouts():
    x, weights, upstream = network(2, 300, (16, 64, 3))
    want = outputs_and_gradients(mlp, x, weights, upstream)
    turned = [w.mT.contiguous().mT for w in weights]
    for points, matrices, above in (
        (x.mT.contiguous().mT, weights, upstream),
        (x, turned, upstream),
        (x, weights, upstream.mT.contiguous().mT),
    ):
        leaves = [t.detach().requires_grad_() for t in (points, *matrices)]
        y = mlp(leaves[0], leaves[1:])
        assert all(
            torch.equal(a, b) for a, b in zip([y, *torch.autograd.grad(y, leaves, above)], want)
        )
    shared = weights[0][:1].expand(2, -1, -1), weights[1][:1].expand(2, -1, -1)
    assert torch.equal(mlp(x, shared)[1], mlp(x[1:], [w[:1] for w in weights])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    x, weights, upstream = network(2, 40, (16, 64, 3))
    assert largest_error([mlp(x.to(dtype), weights)], [mlp(x, weights)]) < (
        0.02 if dtype != torch.float64 else 1e-6
    )  # the weights' precision decides; the points lose half a unit of their last of 8 or 11 bits
    lowered = [w.to(dtype) for w in weights]
    assert (
        mlp(x, lowered).dtype == dtype
        and largest_error([mlp(x, lowered).float()], [mlp(x, weights)]) < 0.05
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x, weights).dtype == torch.bfloat16


def test_what_is_not_a_number_stays_so():
    x, weights, upstream = network(1, 300, (16, 64, 3))
    x[0, 7, 3] = torch.nan
    found = outputs_and_gradients(mlp, x, weights, upstream)
    assert (
        found[0].isnan().any(-1).nonzero().tolist() == [[0, 7]]
        and found[1][0, 8].isfinite().all()
        and not found[2].isfinite().all()
    )


def test_a_hundred_times_the_same_bits_on_any_number_of_threads(threads):
    given = network(3, POINTS_PER_TASK // 2 + 17, (16, 64, 1))
    want = outputs_and_gradients(mlp, *given)
    for i in range(100):
        threads((1, 2, 3, 8)[i % 4])
        assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(mlp, *given), want)), i


def test_two_python_threads_at_once(threads):
    threads(2)
    given = network(2, POINTS_PER_TASK + 1, (16, 64, 3))
    want, got = outputs_and_gradients(mlp, *given), {}
    workers = [
        threading.Thread(target=lambda i=i: got.update({i: outputs_and_gradients(mlp, *given)}))
        for i in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(got) == 4 and all(
        torch.equal(a, b) for run in got.values() for a, b in zip(run, want)
    )


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_its_own_threads(threads):
    threads(2)
    x, weights, _ = network(2, POINTS_PER_TASK + 1, (16, 64, 3))
    last = lambda: mlp(x, weights)[0, -1].tolist()
    want = last()
    assert call_in_fork(last) == want
