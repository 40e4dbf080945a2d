"""Stores of text embeddings: kills at any instant, two writers, damage, foreign files, training."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from damage import PLACES

from scaledreamer.core.folder_lock import locked_folder
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.prior import embedding_store
from scaledreamer.prior.base import TextEmbedding
from scaledreamer.prior.embedding_build import StoredTexts, TextEncoding, complete_store
from scaledreamer.prior.embedding_store import EmbeddingStore, read_store_rows

WINDOW, WIDTH, EACH = 8, 16, 64


def encode(texts: list[str]) -> TextEmbedding:
    "States that are random but for their text, and as wide as the longest text needs."
    sizes = [2 + crc32(text.encode()) % (WINDOW - 1) for text in texts]
    rows = torch.zeros(len(texts), max(sizes), WIDTH)
    for row, size, text in zip(rows, sizes, texts):
        rng = torch.Generator().manual_seed(crc32(text.encode()))
        row[:size] = torch.randn(size, WIDTH, generator=rng)
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return TextEmbedding(rows, rows[:, 0], mask)


ENCODING = TextEncoding("ab" * 32, "random", WINDOW, WIDTH, True, encode)
TEXTS = [f"a {color} thing number {i}" for i in range(320) for color in ("red", "blue")]
FOLDER = ENCODING.folder("").name


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    "Ten shards for `TEXTS`."
    monkeypatch.setattr(TextEncoding, "texts_per_shard", EACH)


def content(root: Path) -> dict[str, bytes]:
    "The files of a store, its lock apart."
    files = (path for path in (root / FOLDER).iterdir() if path.name != ".lock")
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    "A store that was made without interruption."
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoding, "texts_per_shard", EACH)
        complete_store(root, ENCODING, TEXTS)
    return root


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    "A copy of it, to be damaged."
    folder = tmp_path / FOLDER
    folder.mkdir()
    for name, value in content(whole).items():
        (folder / name).write_bytes(value)
    return tmp_path


def check_rows(store: EmbeddingStore, texts: list[str]) -> None:
    rows = store.find(texts)
    assert (rows >= 0).all()
    found, exact = read_store_rows(store, rows), encode(texts)
    n = exact.tokens.shape[1]
    assert torch.equal(found.mask[:, :n], exact.mask) and not found.mask[:, n:].any()
    assert torch.equal(found.tokens[:, :n], exact.tokens.half().float())
    assert torch.equal(found.pooled, exact.pooled.half().float())


def test_rows_are_those_of_the_encoder_in_half_precision(whole):
    store = EmbeddingStore(whole / FOLDER)
    assert len(store) == len(TEXTS) and len(store.entries) == 10
    check_rows(store, TEXTS)
    check_rows(store, random.Random(0).sample(TEXTS, 64))
    assert store.find(["another text"]).tolist() == [-1]


def kill_while_building(root: Path, seconds: float) -> bool:
    "Build in a child process that is killed after some time; whether it was killed."
    child = os.fork()
    if child == 0:
        try:
            complete_store(root, ENCODING, TEXTS, wait=True)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def in_a_new_process(function, *folders: Path) -> None:
    "Call a function of this file in a process without threads, so that it may fork."
    code = (
        "import sys, pathlib, threading, tqdm, test_embedding_store as tests; "
        "tqdm.tqdm.monitor_interval = 0; "
        "tqdm.tqdm.set_lock(threading.RLock()); "  # that of processes dies with a killed one
        "tests.TextEncoding.texts_per_shard = tests.EACH; "
        f"tests.{function.__name__}(*map(pathlib.Path, sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folders],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def fifty_kills(whole: Path, folder: Path) -> None:
    "Builds that are killed again and again; afterwards every store is the `whole` one."
    rng, killed, expected, n = random.Random(0), 0, content(whole), 0
    started = time.monotonic()
    complete_store(folder / "timed", ENCODING, TEXTS)
    usual = time.monotonic() - started
    while killed < 50:
        root = folder / str(n := n + 1)
        for _ in range(20):  # kills of one store until it is whole
            dead = kill_while_building(root, rng.uniform(0, 0.4 * usual))
            killed += dead
            if (root / FOLDER / "index.json").exists():
                named = json.loads((root / FOLDER / "index.json").read_text())["shards"]
                assert all((root / FOLDER / entry["file"]).exists() for entry in named)
                if len(store := EmbeddingStore(root / FOLDER)):
                    check_rows(store, TEXTS[: len(store)])
            if not dead or killed >= 50:
                break
        complete_store(root, ENCODING, TEXTS)
        assert content(root) == expected


def test_fifty_kills_at_random_instants_leave_the_same_store(whole, tmp_path):
    in_a_new_process(fifty_kills, whole, tmp_path)


def interrupted_at(k: int):
    "`os.replace` that fails at its k-th call, as at a full disk."
    calls = []

    def rename(self, target):
        calls.append(target)
        if len(calls) == k:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.replace(self, target)

    return rename


@pytest.mark.parametrize("k", (1, 2, 5, 8))
def test_a_full_disk_is_one_sentence_and_loses_nothing_that_was_done(
    k, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted_at(k))
        with pytest.raises(RunError, match="cannot be written .the disk is full"):
            complete_store(tmp_path, ENCODING, TEXTS)
    assert not [p for p in (tmp_path / FOLDER).glob(".*") if p.name != ".lock"]
    complete_store(tmp_path, ENCODING, TEXTS)
    assert content(tmp_path) == content(whole)


def test_two_writers_do_not_write_at_once(whole, tmp_path):
    with locked_folder(tmp_path / FOLDER):
        with pytest.raises(UsageError, match="is in use by another run"):
            complete_store(tmp_path, ENCODING, TEXTS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def three_writers(whole: Path, folder: Path) -> None:
    "Three processes that build one store at once."
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                warnings.simplefilter("ignore")
                check_rows(complete_store(folder, ENCODING, TEXTS, wait=True), TEXTS)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert content(folder) == content(whole)


def test_three_processes_that_want_the_same_texts_make_one_store(whole, tmp_path):
    in_a_new_process(three_writers, whole, tmp_path)


def test_a_reader_goes_on_while_a_writer_adds(copy):
    store = EmbeddingStore(copy / FOLDER)
    complete_store(copy, ENCODING, [*TEXTS, "one more"])
    check_rows(store, TEXTS)
    assert store.find(["one more"]).tolist() == [-1]
    check_rows(EmbeddingStore(copy / FOLDER), ["one more"])


def test_a_store_that_has_all_is_only_read(copy):
    before = {p: p.stat().st_mtime_ns for p in (copy / FOLDER).iterdir()}
    with locked_folder(copy / FOLDER):  # another writer does not matter
        check_rows(complete_store(copy, ENCODING, TEXTS), TEXTS)
    assert {p: p.stat().st_mtime_ns for p in (copy / FOLDER).iterdir()} == before


def damage(path: Path, how: str) -> None:
    value = path.read_bytes()
    if how in PLACES:
        path.unlink()
        return PLACES[how](path)
    rng = random.Random(how)
    changed = bytearray(value)
    if how == "bit":
        changed[len(value) - 20 * EACH] ^= 4
    elif how == "short":
        del changed[rng.randrange(len(value)) :]
    elif how == "empty":
        changed.clear()
    elif how == "random":
        changed = rng.randbytes(len(value))
    elif how == "longer":
        changed += b"x"
    path.write_bytes(bytes(changed))


NO_FILE = ("a pipe", "a folder", "a link to nowhere", "nothing")
WAYS = ("bit", "short", "empty", "random", "longer", *NO_FILE)


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_shard_is_encoded_anew_and_no_other(how, whole, copy):
    damage(copy / FOLDER / "000003.safetensors", how)
    seen = []
    counted = replace(ENCODING, encode=lambda texts: seen.extend(texts) or encode(texts))
    with pytest.warns(UserWarning, match="is damaged|cannot be read"):
        texts = StoredTexts(copy, counted, TEXTS)
        found = texts[torch.tensor([3 * EACH + 1, 0])]
    exact = encode(TEXTS)
    n = exact.tokens.shape[1]
    assert torch.equal(found.tokens[:, :n], exact.tokens[[3 * EACH + 1, 0]].half().float())
    assert sorted(seen) == sorted(TEXTS[3 * EACH : 4 * EACH])
    kept = {name for name in os.listdir(copy / FOLDER) if ".damaged" in name}
    assert len(kept) == (how != "nothing")
    files = {p.name: p.read_bytes() for p in (copy / FOLDER).iterdir() if p.name not in kept}
    assert files == content(whole)


def test_a_shard_of_another_store_in_its_place_is_found(copy):
    path = copy / FOLDER
    (path / "000003.safetensors").write_bytes((path / "000004.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="another shard|bytes"):
        check_rows(StoredTexts(copy, ENCODING, TEXTS).store, TEXTS)


@pytest.mark.parametrize("how", ("empty", "random", "short", *NO_FILE))
def test_a_damaged_index_is_made_again_from_the_shards(how, whole, copy):
    damage(copy / FOLDER / "index.json", how)
    never = replace(ENCODING, encode=lambda texts: pytest.fail("nothing is to be encoded"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_rows(complete_store(copy, never, TEXTS), TEXTS)
    assert bool(caught) == (how != "nothing")
    assert content(copy).keys() - {"index.json.damaged"} == content(whole).keys()
    assert (copy / FOLDER / "index.json").read_bytes() == content(whole)["index.json"]


WRONG = {
    "a list": [],
    "another format": {"format": 2},
    "a window of 0": {"window": 0},
    "a path out of the folder": {"shards": [{"file": "../x", "rows": 1, "bytes": 1, "crc32": ""}]},
    "a text as window": {"window": "8"},
    "rows below 1": {
        "shards": [{"file": "000000.safetensors", "rows": -1, "bytes": 1, "crc32": ""}]
    },
    "an unknown key": {"run": "code"},
}


@pytest.mark.parametrize("what", WRONG)
def test_an_index_with_wrong_content_is_one_sentence(what, copy):
    path = copy / FOLDER / "index.json"
    given = WRONG[what]
    path.write_text(
        json.dumps(given if isinstance(given, list) else json.loads(path.read_text()) | given)
    )
    with pytest.raises(RunError, match="index.json .*make the store again") as error:
        EmbeddingStore(copy / FOLDER)
    assert "\n" not in str(error.value)


def test_a_store_of_another_encoder_is_refused(copy):
    path = copy / FOLDER / "index.json"
    path.write_text(path.read_text().replace("ab" * 32, "cd" * 32))
    with pytest.raises(RunError, match="another text encoder"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        complete_store(copy, ENCODING, TEXTS)


def test_fuzzed_stores_never_raise_more_than_a_sentence(whole, tmp_path):
    "Random bytes at random places of index and shards; what is read is right."
    rng, good = random.Random(1), content(whole)
    folder = tmp_path / FOLDER
    folder.mkdir()
    warnings.simplefilter("ignore")
    for trial in range(60):
        for path in folder.iterdir():
            path.unlink()
        for name, value in good.items():
            (folder / name).write_bytes(value)
        name = rng.choice(sorted(good))
        value = bytearray(good[name])
        for _ in range(rng.choice((1, 3, 30))):
            value[rng.randrange(len(value))] = rng.randrange(256)
        (folder / name).write_bytes(value[: rng.choice((len(value), rng.randrange(len(value))))])
        try:
            texts = StoredTexts(tmp_path, ENCODING, TEXTS)
            found = texts[:]
        except RunError as error:  # an index that names another encoder
            assert "\n" not in str(error)
            continue
        exact = encode(TEXTS)
        assert torch.equal(found.tokens[:, : exact.tokens.shape[1]], exact.tokens.half().float())


def test_memory_stays_bounded_while_all_is_read(whole, monkeypatch):
    monkeypatch.setattr(embedding_store, "MAPPED_BYTES", 1 << 20)
    store = EmbeddingStore(whole / FOLDER)
    store._small, most = False, 0
    for i in range(100):
        rows = np.random.default_rng(i).integers(len(store), size=4)
        read_store_rows(store, rows)
        most = max(most, len(store._open))
    assert most < 10  # files are unmapped now and then
    check_rows(store, TEXTS)


def test_texts_that_are_read_as_one_are_found_without_their_states(tmp_path):
    same = replace(ENCODING, encode=lambda texts: encode([text.lower() for text in texts]))
    stored = StoredTexts(tmp_path, same, ["a Ball", "a cube", "a ball"])
    assert stored.same[0] == stored.same[2] != stored.same[1]


def test_values_beyond_half_precision_are_refused(tmp_path):
    large = replace(
        ENCODING,
        encode=lambda texts: (
            encode(texts).to(torch.float64)._each(lambda x: x * 1e6 if x.is_floating_point() else x)
        ),
    )
    with pytest.raises(UsageError, match="above 65504"):
        complete_store(tmp_path, large, ["a ball"])
    assert not list((tmp_path / FOLDER).glob("0*"))


@pytest.fixture(scope="module")
def prior():
    from scaledreamer.prior.stable_diffusion import StableDiffusionPrior

    return StableDiffusionPrior.from_pretrained()


def test_training_from_a_store_is_training_from_rounded_texts(prior, tmp_path):
    from scaledreamer.core.tensors import step_rng
    from scaledreamer.training.run import build
    from scaledreamer.training.step_batch import render_batch
    from scaledreamer.training.corpora import number_prompts
    from scaledreamer.training.train_settings import TrainSettings

    prompts = number_prompts((text, "train") for text in ("a red ball", "a blue cube", "a cone"))
    settings = TrainSettings(generator="triplane", resolution=8, prompts_per_step=2)
    renders = {}
    for where in (None, str(tmp_path)):
        run = build(tmp_path / "run", replace(settings, embeddings=where), prompts, prior=prior)
        assert isinstance(run.texts, TextEmbedding if where is None else StoredTexts)
        _, _, rendering = render_batch(run, run.texts, 0, step_rng(0, 0))
        renders[where] = rendering.rgb.detach()
    difference = (renders[None] - renders[str(tmp_path)]).abs().max()
    assert 0 < difference < 5e-3


def test_generators_that_read_padding_get_it(prior, tmp_path):
    from scaledreamer.generator.triplane import Triplane, TriplaneSettings
    from scaledreamer.training.run_texts import stored_texts
    from scaledreamer.training.train_settings import TrainSettings

    settings = TrainSettings(embeddings=str(tmp_path))
    texts = ["a red ball", "a blue cube on a red ball"]
    exact = prior.encode_text(texts)
    for masked in (True, False):
        generator = Triplane(TriplaneSettings(masked=masked))
        assert generator.reads_padding is not masked
        found = stored_texts(settings, prior, texts, generator)[:]
        behind = found.tokens[~exact.mask]
        assert torch.equal(found.mask, exact.mask)
        assert behind.any() is not masked or behind.any().item() is not masked
        near = torch.allclose(found.tokens, exact.tokens, atol=3e-3)
        assert near is not masked
        with torch.no_grad():
            one, other = (generator.eval().planes(x) for x in (exact, found))
        assert torch.allclose(one, other, atol=2e-2)
    assert len(list(tmp_path.iterdir())) == 2


def command(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-m", "scaledreamer", *argv]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_command_makes_a_store_that_training_uses(tmp_path):
    done = command("embed", "toybox-15", "--out", "emb", "-q", cwd=tmp_path)
    assert done.returncode == 0 and "(15 texts, " in done.stdout, done.stderr
    small = ("--steps", "2", "--resolution", "8", "--eval-views", "0", "--out", "run")
    done = command("train", "--embeddings", "emb", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["embeddings"] == "emb"
    os.mkfifo(tmp_path / "pipe")
    done = command("embed", "toybox-15", "--out", "pipe", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    done = command("embed", "toybox-15", "--prior", "mixture", cwd=tmp_path)
    assert done.returncode == 2 and "no text encoder" in done.stderr
