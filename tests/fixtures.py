"Shared by the tests: seeded numbers, a mixture prior, its texts, a short training, a forked call."

import multiprocessing
from dataclasses import fields

import torch

from scaledreamer.core.tensors import make_rng
from scaledreamer.prior.base import Conditioning
from scaledreamer.prior.mixture import MixturePrior
from scaledreamer.training.train_settings import TrainSettings

DOUBLE = torch.float64
SHAPE = (3, 4, 4)


def draw(*shape, seed=0, dtype=DOUBLE):
    "Standard normal numbers."
    return torch.randn(*shape, generator=make_rng(seed), dtype=dtype)


def make(schedule=None, std=0.4, **sizes):
    "A mixture prior with the given number of images for each caption."
    sizes = sizes or {"a": 4, "b": 3, "c": 2}
    images = {c: draw(k, *SHAPE, seed=i) for i, (c, k) in enumerate(sizes.items())}
    return MixturePrior(images, std, schedule=schedule)


def say(prior, *texts):
    "Tokens of the texts."
    return prior.encode_text(list(texts)).tokens


X, NOISE, T = draw(3, *SHAPE, seed=10), draw(3, *SHAPE, seed=11), torch.tensor([60, 470, 930])


def texts_of(prior, **texts):
    "The conditioning of the three images `X`."
    return Conditioning(say(prior, "a", "b", "a"), say(prior, "", "", ""), **texts)


def texts_with_negatives(prior, **texts):
    "The same with two negative texts for each image."
    negatives = torch.stack([say(prior, "b", "c", "c"), say(prior, "c", "a", "b")], 1)
    weights = -draw(3, 2, seed=12).abs()
    return texts_of(prior, negatives=negatives, negative_weights=weights, **texts)


def plane():
    "A mixture of points in the plane."
    return MixturePrior({"a": draw(5, 2), "b": draw(3, 2, seed=1)}, 0.3)


def rows(text, index):
    "The conditioning of the images `index`, in that order."
    parts = (getattr(text, field.name) for field in fields(text))
    return Conditioning(*(None if part is None else part[index] for part in parts))


def two_prompts(folder, **options):
    "Settings of a training of a few small steps on two prompts, whose file is made in `folder`."
    corpus = folder / "two.json"
    corpus.write_text('["a red ball", "a blue cube"]', encoding="utf-8")
    small = dict(prior="mixture", generator="ingp", prompts_per_step=1, resolution=8, log_every=1)
    return TrainSettings(corpus=str(corpus), **small | options)


def _send_result(function, arguments, connection):
    connection.send(function(*arguments))


def call_in_fork(function, *arguments):
    """The result of a call in a forked process, within a minute.

    Large torch operations may hang there, so the call should be small.
    """
    parent, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_send_result, args=(function, arguments, child), daemon=True
    )
    process.start()
    try:
        assert parent.poll(60), "the forked process hangs"
        return parent.recv()
    finally:
        process.kill()
        process.join()
