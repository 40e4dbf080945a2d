"What several test files draw and ask of: seeded numbers, a mixture whose noise is known, its texts, three items of it; and an answer from a forked process."

import multiprocessing
from dataclasses import fields

import torch

from scaledreamer.core.tensors import make_rng
from scaledreamer.prior.base import Conditioning
from scaledreamer.prior.mixture import MixturePrior

DOUBLE = torch.float64
SHAPE = (3, 4, 4)


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=make_rng(seed), dtype=dtype)


def make(schedule=None, std=0.4, **sizes):
    "A mixture of so many images for each caption."
    sizes = sizes or {"a": 4, "b": 3, "c": 2}
    return MixturePrior(
        {c: draw(k, *SHAPE, seed=i) for i, (c, k) in enumerate(sizes.items())},
        std,
        schedule=schedule,
    )


def say(prior, *texts):
    return prior.encode_text(list(texts)).tokens


X, NOISE, T = draw(3, *SHAPE, seed=10), draw(3, *SHAPE, seed=11), torch.tensor([60, 470, 930])


def texts_of(prior, **texts):
    "The texts of the three items."
    return Conditioning(say(prior, "a", "b", "a"), say(prior, "", "", ""), **texts)


def pushed_texts_of(prior, **texts):
    "The same, and two texts to keep away from."
    negatives = torch.stack([say(prior, "b", "c", "c"), say(prior, "c", "a", "b")], 1)
    return texts_of(
        prior, negatives=negatives, negative_weights=-draw(3, 2, seed=12).abs(), **texts
    )


def plane():
    "A mixture in the plane."
    return MixturePrior({"a": draw(5, 2), "b": draw(3, 2, seed=1)}, 0.3)


def rows(text, index):
    "The texts of some items, in any order."
    parts = (getattr(text, field.name) for field in fields(text))
    return Conditioning(*(None if part is None else part[index] for part in parts))


def _answer(question, given, connection):
    connection.send(question(*given))


def asked_in_a_fork(question, *given):
    "What a forked process answers, which may not take longer than a minute. Large torch calls may hang there, so the question should be small."
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        target=_answer, args=(question, given, there), daemon=True
    )
    child.start()
    try:
        assert here.poll(60), "the child hangs"
        return here.recv()
    finally:
        child.kill()
        child.join()
