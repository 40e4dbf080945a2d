"""Corpora: the order in which prompts are visited, files and names, duplicates, toybox-100k."""

import csv
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scaledreamer.commands.cli import run_command
from scaledreamer.core.permutations import key64, permuted
from scaledreamer.core.settings import UsageError
from scaledreamer.toybox.captions import TOYBOX_UNSEEN, Caption, is_unseen, is_unseen_pair
from scaledreamer.toybox.captions import object_of, singles
from scaledreamer.toybox.objects import RADIUS, extent
from scaledreamer.toybox.toybox_100k import toybox_100k
from scaledreamer.training.corpora import CorpusSettings, load_corpus, number_prompts
from scaledreamer.training.corpora import read_manifest
from scaledreamer.training.corpus_files import read_texts
from scaledreamer.training.duplicates import drop_near_duplicates, find_duplicates
from scaledreamer.training.duplicates import near_duplicates, near_key
from scaledreamer.training.prompt_order import SHUFFLED_WHOLE, step_prompts
from scaledreamer.training.release_corpora import CORPORA_VARIABLE, RELEASE_FILES, at2520_texts
from scaledreamer.training.run import build
from scaledreamer.training.train_settings import TrainSettings

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


@given(count=COUNTS, seed=SEEDS, batch=st.integers(5, 64), epoch=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
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


# files -------------------------------------------------------------------------------------------

LETTERS = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"])
TEXTS = st.lists(
    st.text(LETTERS, min_size=1, max_size=30).map(str.strip).filter(bool), min_size=1, max_size=12
)


def write_table(path, column, texts, splits):
    "The texts in a file of any kind that has columns."
    rows = [{column: text, "split": split} for text, split in zip(texts, splits)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
            writer = csv.DictWriter(file, [column, "split"], dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@given(texts=TEXTS, column=st.sampled_from(["prompt", "Text", "my words"]), data=st.data())
@settings(deadline=None, max_examples=20)
def test_every_kind_of_table_gives_the_same_prompts(suffix, texts, column, data):
    splits = [data.draw(st.sampled_from(["train", "val", "test"])) for _ in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        write_table(path, column, texts, splits)
        named = column if column == "my words" else None
        assert read_texts(path, named) == list(zip(texts, splits))


def test_a_column_goes_before_the_usual_ones(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,title\na red car,short\n")
    assert read_texts(path) == [("a red car", "train")]
    assert read_texts(path, " Title ") == [("short", "train")]
    with pytest.raises(UsageError, match="prompt, title: expected the column name, or name its"):
        read_texts(path, "name")
    (tmp_path / "a.txt").write_text("a red car\n")
    with pytest.raises(UsageError, match="a.txt has no columns: leave out --column"):
        read_texts(tmp_path / "a.txt", "title")


def test_training_reads_the_column_and_drops_near_duplicates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("words,split\na red car,train\nA red car!,train\na blue ball,val\n")
    command = ["train", "--corpus", "a.csv", "--column", "words", "--drop-near-duplicates"]
    command += ["--prior", "mixture", "--generator", "ingp", "--steps", "1", "--resolution", "8"]
    assert run_command([*command, "--eval-views", "0", "--out", "run"]) == 0
    prompts = read_manifest(tmp_path / "run/prompts.jsonl")
    assert [(p.text, p.split) for p in prompts] == [("a red car", "train"), ("a blue ball", "val")]


def test_the_training_prompts_of_a_run_are_listed_once():
    prompts = number_prompts([("a red ball", "train"), ("a blue cube", "val")])
    run = build(Path("unused"), TrainSettings(prior="mixture", generator="ingp"), prompts)
    assert run.train_prompts is run.train_prompts and run.train_prompts == [prompts[0]]


# duplicates --------------------------------------------------------------------------------------


@given(TEXTS)
def test_near_duplicates_have_one_key(texts):
    for text in texts:
        for change in (str.upper, str.lower, lambda t: f" {t}. ", lambda t: t.replace(" ", "  ")):
            if near_key(text) != text.casefold() and change(text).casefold() == text.casefold():
                assert near_key(change(text)) == near_key(text)
    pairs = [(text, "train") for text in texts]
    kept = drop_near_duplicates(pairs)
    assert drop_near_duplicates(kept) == kept and kept[0] == pairs[0]
    assert not near_duplicates(text for text, _ in kept)
    assert {near_key(text) for text, _ in kept} == {near_key(text) for text in texts}


@given(st.lists(st.tuples(st.sampled_from("aAbBc"), st.sampled_from(["train", "val"]))))
def test_duplicates_are_counted(pairs):
    found = find_duplicates(pairs)
    assert found.texts - found.repeated == len(set(pairs))
    splits = [{split for text, split in pairs if text == letter} for letter in "aAbBc"]
    assert found.shared == sum(len(each) == 2 for each in splits)
    assert bool(str(found)) == bool(found.repeated or found.shared or found.near)


# the corpora of the paper ------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
FILES = Path(os.environ.get(CORPORA_VARIABLE) or ROOT.parent / "shared/corpora")
AT2520 = "ccd5751ea1aff5274df88c8edef481d3c4f0840e1507c4faf7ccaadeeb25f061"
SIZES = {  # lines of train, val and test; different texts
    "MG15": (15, 15, 15, 15),
    "DF415": (415, 16, 415, 415),
    "AT2520": (2520, 56, 2520, 2576),
    "DL17k": (17_241, 100, 100, 13_616),
}


def test_at2520_has_the_checksum_of_the_file():
    text = json.dumps(at2520_texts())
    assert hashlib.sha256(text.encode()).hexdigest() == AT2520


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.filterwarnings("ignore:.*count once|.*several splits")
def test_the_files_of_the_release(name):
    path = FILES / RELEASE_FILES[name]
    if not path.exists():
        pytest.skip(f"the prompts of the release are not here: {path}")
    *lines, different = SIZES[name]
    splits = Counter(split for _, split in read_texts(path))
    assert [splits[split] for split in ("train", "val", "test")] == lines
    assert read_texts(path) == at2520_texts() or name != "AT2520"
    prompts = load_corpus(name.lower(), CorpusSettings(corpus_folder=FILES))
    assert len(prompts) == different
    train = [prompt for prompt in prompts if prompt.split == "train"]
    assert len(train) == {"DL17k": 13_551}.get(name, lines[0])


def test_a_corpus_that_is_not_here_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(CORPORA_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    for name, file in RELEASE_FILES.items():
        if name == "AT2520":
            continue
        assert run_command(["corpus", name]) == 2
        assert re.search(rf"{file}.*--corpus-folder", capsys.readouterr().err)
        assert run_command(["train", "--corpus", name.upper(), "--corpus-folder", "."]) == 2
        error = capsys.readouterr().err
        assert f"{name} is not there: expected the file {file}" in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())
    (tmp_path / RELEASE_FILES["MG15"]).write_text('{"train": ["a"], "val": ["b"]}')
    monkeypatch.setenv(CORPORA_VARIABLE, str(tmp_path))
    assert [prompt.text for prompt in load_corpus("Mg15")] == ["a", "b"]


# toybox-100k -------------------------------------------------------------------------------------


def test_toybox_100k_is_always_the_same():
    texts = toybox_100k()
    assert len(texts) == len(set(texts)) == 100_000
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert digest == "1d02a9518fc6d114ea257937e13c35ef74428a3d38a7bee4e38d92010e53f614"
    assert {*singles()} < {*texts} and not {*texts} & {*TOYBOX_UNSEEN}


def test_every_caption_of_toybox_100k_is_read_and_none_is_an_unseen_composition():
    for text in toybox_100k():
        parsed = Caption.parse(text)
        shapes = [shape for _, shape in parsed.things]
        assert not any(is_unseen_pair(*pair) for pair in zip(shapes, shapes[1:]))
        first, *others = [f"a {color} {shape}" for color, shape in parsed.things]
        first = f"a {parsed.size} {first[2:]}" if parsed.size else first
        assert f" {parsed.relation} ".join([first, *others]) == text


def test_captions_of_toybox_100k_have_different_true_objects():
    points = torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.7
    seen = set()
    for text in toybox_100k()[:24]:
        obj = object_of(text)
        assert [shape.color for shape in obj.shapes] == [c for c, _ in Caption.parse(text).things]
        reach = extent(obj, half=0.8).norm(dim=-1).amax()
        assert abs(reach - RADIUS) < 0.03, text
        seen.add((obj.sdf(points).numpy().tobytes(), obj.color(points).numpy().tobytes()))
    assert len(seen) == 24


def test_toybox_100k_loads_fast_and_small():
    toybox_100k.cache_clear()
    start = time.process_time()
    prompts = load_corpus("toybox-100k")
    assert time.process_time() - start < 2 and len(prompts) == 100_000
    assert sum(sys.getsizeof(prompt.text) + sys.getsizeof(prompt.id) for prompt in prompts) < 20e6


@pytest.mark.parametrize("text, first, second", [
    ("a red ball left of a blue cube", 1, -1),
    ("a red ball in front of a blue cube", 0, 1),
    ("a red ball on a blue cube", 2, 1),
])  # fmt: skip
def test_relations_are_directions(text, first, second):
    ball, cube = object_of(text).shapes
    assert second * (ball.offset[first] - cube.offset[first]) > 0.3


def test_words_of_size_are_factors():
    for relation in ("on", "left of", "in front of"):
        scales = {}
        for word in ("small ", "", "large "):
            ball, cube = object_of(f"a {word}red ball {relation} a blue cube").shapes
            scales[word] = ball.scale / cube.scale
        assert scales["small "] / scales[""] == pytest.approx(0.6)
        assert scales["large "] / scales[""] == pytest.approx(1.4)


@pytest.mark.parametrize("text", [
    "a small red ball", "a red small ball on a blue cube", "a red ball on a small blue cube",
    "a red ball left of a blue cube on a red car", "a red ball under a blue cube", "a ball",
    "a small red ball on a blue cube on a red car", "a red ball on a blue cube on a red car on it",
    "A red ball", "a red ball  on a blue cube", "a red ball on a blue cube ", "",
])  # fmt: skip
def test_captions_outside_the_grammar(text):
    assert Caption.parse(text) is None and not is_unseen(text)
    with pytest.raises(ValueError, match="is not a Toybox caption"):
        object_of(text)
