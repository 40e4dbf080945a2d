"""Corpora: the order in which prompts are visited, files and names, duplicates, toybox-100k."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledreamer.core.permutations import key64, permuted
from scaledreamer.training.prompt_order import SHUFFLED_WHOLE, step_prompts

# the order of prompts ----------------------------------------------------------------------------

COUNTS = st.one_of(st.integers(1, 300), st.integers(SHUFFLED_WHOLE - 3, SHUFFLED_WHOLE + 500))
LARGE = st.integers(SHUFFLED_WHOLE + 1, 10**9)
SEEDS = st.integers(0, 2**32 - 1)
SAMPLING = st.sampled_from(["epochs", "independent"])


@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_a_keyed_permutation_is_one_to_one(count, key):
    assert np.array_equal(np.sort(permuted(np.arange(count), count, key)), np.arange(count))


@given(count=LARGE, seed=SEEDS, data=st.data())
@settings(deadline=None)
def test_entries_of_large_permutations_differ_and_are_inside(count, seed, data):
    places = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=50, unique=True))
    values = permuted(places, count, key64(seed))
    assert len(set(values.tolist())) == len(places) and values.max() < count


@given(count=COUNTS, seed=SEEDS, batch=st.integers(1, 64), epoch=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_an_epoch_visits_every_prompt_once(count, seed, batch, epoch):
    first, last = epoch * count, (epoch + 1) * count  # of the sequence of all visits
    steps = range(first // batch, -(-last // batch))
    visits = [i for step in steps for i in step_prompts(seed, step, batch, count)]
    begin = first - steps[0] * batch
    assert sorted(visits[begin : begin + count]) == list(range(count))


@given(count=COUNTS, seed=SEEDS, batch=st.integers(1, 64), steps=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_visits_differ_by_at_most_one(count, seed, batch, steps):
    visits = Counter(i for step in range(steps) for i in step_prompts(seed, step, batch, count))
    numbers = [visits[i] for i in range(count)]
    assert max(numbers) - min(numbers) <= 1


@given(LARGE | COUNTS, SEEDS, st.integers(0, 10**8), st.integers(1, 16), SAMPLING)
@settings(deadline=None, max_examples=60)
def test_a_step_is_the_same_whenever_it_is_computed(count, seed, step, batch, sampling):
    rows = step_prompts(seed, step, batch, count, sampling)
    assert len(rows) == batch and all(type(row) is int and 0 <= row < count for row in rows)
    step_prompts(seed + 1, step + 5, batch, count, sampling)
    assert step_prompts(seed, step, batch, count, sampling) == rows
    if batch <= count:
        shared = len(set(rows)) < batch  # only where an epoch ends within the step
        assert not shared or sampling == "epochs" and step * batch % count > count - batch


@given(LARGE | COUNTS, SEEDS, st.integers(0, 10**8), st.integers(1, 8), SAMPLING)
@settings(deadline=None, max_examples=60)
def test_any_number_of_processes_visits_the_same_prompts(count, seed, step, part, sampling):
    batch = 8 * part
    whole = step_prompts(seed, step, batch, count, sampling)
    for world in (2, 4, 8):
        each = batch // world
        parts = [
            step_prompts(seed, step, batch, count, sampling)[rank * each : (rank + 1) * each]
            for rank in range(world)
        ]
        assert sum(parts, []) == whole


@pytest.mark.parametrize("count", [1, 15, 800, SHUFFLED_WHOLE])
def test_small_corpora_keep_their_order(count):
    for seed, epoch in ((0, 0), (3, 2), (2**32 - 1, 7)):
        rng = torch.Generator().manual_seed(seed * 1_000_003 - epoch - 1)
        order = torch.randperm(count, generator=rng).tolist()
        assert step_prompts(seed, epoch, count, count) == order


def test_the_first_steps_of_the_default_run():
    steps = [step_prompts(0, step, 4, 15) for step in range(3)]
    assert steps == [[6, 13, 11, 0], [10, 5, 1, 9], [14, 3, 12, 8]]


def test_independent_draws_leave_some_prompts_out():
    count, visits = 5000, Counter()
    for step in range(2500):
        visits.update(step_prompts(1, step, 4, count, "independent"))
    never = 1 - len(visits) / count
    assert abs(never - math.exp(-2)) < 0.02


def test_two_seeds_and_two_epochs_differ():
    orders = {
        tuple(step_prompts(seed, step, 100, 5000)) for seed in range(3) for step in (0, 50, 100)
    }
    assert len(orders) == 9
