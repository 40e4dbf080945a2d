"""Odd corpora and odd checkpoints: read as they are meant, or refused in one sentence."""

import io
import json
import os
import pickle
import random
import socket
import struct
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scaledreamer.commands.cli import run_command
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.generator.hyper_ingp import HyperINGPSettings
from scaledreamer.generator.ingp import SMALL_GRID
from scaledreamer.generator.triplane import TriplaneSettings
from scaledreamer.prior.base import TextEmbedding
from scaledreamer.release.import_weights import import_weights
from scaledreamer.release.lightning import TABLE
from scaledreamer.release.released_weights import ReleasedSettings
from scaledreamer.training.corpora import load_corpus

SAMPLE = None if os.environ.get("SCALEDREAMER_ALL_FAULTS") else 60  # of the odd files, per kind


def pairs(prompts):
    return [(prompt.text, prompt.split) for prompt in prompts]


def read(path):
    "The (text, split) pairs of a corpus, or the error; repeated texts are no error."
    with warnings.catch_warnings(action="ignore"):
        try:
            return pairs(load_corpus(str(path)))
        except (UsageError, RunError) as error:
            return error


def write(path, content):
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# corpora that are read ---------------------------------------------------------------------------

TWO = [("a red car", "train"), ("a blue ball", "train")]
VAL = [("a red car", "train"), ("a blue ball", "val")]
ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\tj  k"
RIGHT = {  # name: content, prompts
    "plain.txt": ("a red car\na blue ball\n", TWO),
    "PLAIN.TXT": ("a red car\na blue ball", TWO),
    "crlf.txt": ("a red car\r\na blue ball\r\n", TWO),
    "cr.txt": ("a red car\ra blue ball\r", TWO),
    "mark.txt": (b"\xef\xbb\xbfa red car\na blue ball\n", TWO),
    "blank.txt": ("\n\n  \n a red car \t\n\x20\na blue ball\n\n", TWO),
    "odd.txt": (f"{ODD}\na red car\n", [(ODD, "train"), ("a red car", "train")]),
    "digits.txt": ("1984\n0001\n", [("1984", "train"), ("0001", "train")]),
    "comma.txt": ("a cat, sitting\n", [("a cat, sitting", "train")]),
    "json.txt": ('{"text": "a"}\n', [('{"text": "a"}', "train")]),
    "many.txt": ("".join(f"{i}\n" for i in range(9999)), [(str(i), "train") for i in range(9999)]),
    "unicode.txt": ("車\nein Bär\n🚗\n", [("車", "train"), ("ein Bär", "train"), ("🚗", "train")]),
    "list.json": ('["a red car", "a blue ball"]', TWO),
    "LIST.JSON": ('["a red car", "a blue ball"]', TWO),
    "mark.json": (b'\xef\xbb\xbf["a red car", "a blue ball"]', TWO),
    "splits.json": ('{"train": ["a red car"], "val": ["a blue ball"], "test": []}', VAL),
    "records.json": ('[{"prompt": "a red car"}, {"text": "a blue ball", "split": "val"}]', VAL),
    "mixed.json": ('{"train": ["a red car", {"caption": "a blue ball", "id": 7}]}', TWO),
    "separator.json": ('["a red\\u2028car"]', [("a red\u2028car", "train")]),
    "pair.json": ('["\\ud83d\\ude97"]', [("🚗", "train")]),
    "newline.json": ('["a red\\ncar"]', [("a red\ncar", "train")]),
    "first.json": ('{"val": ["x", "y"], "train": ["z"]}', [("x", "val"), ("y", "val"), ("z", "train")]),
    "rows.jsonl": ('{"text": "a red car"}\n{"text": "a blue ball"}\n', TWO),
    "ROWS.JSONL": ('{"prompt": "a red car"}\r\n\r\n{"prompt": "a blue ball"}', TWO),
    "texts.jsonl": ('"a red car"\n"a blue ball"\n', TWO),
    "rows.ndjson": ('{"caption": "a red car"}\n{"caption": "a blue ball", "split": "val"}', VAL),
    "raw.jsonl": (f'{{"text": "x\u2028y\x85z"}}\n', [("x\u2028y\x85z", "train")]),
    "run.jsonl": ('{"id": "0000", "text": "a red car", "split": "train"}\n', TWO[:1]),
    "both.jsonl": ('{"caption": "no", "prompt": "a red car"}\n', TWO[:1]),
    "plain.csv": ("prompt\na red car\na blue ball\n", TWO),
    "PLAIN.CSV": ("Prompt,Split\r\na red car,train\r\na blue ball,val\r\n", VAL),
    "quoted.csv": ('id,text\n1,"a ""red"", car"\n', [('a "red", car', "train")]),
    "lines.csv": ('text\n"a red\ncar"\n', [("a red\ncar", "train")]),
    "semicolon.csv": ("text;split\na red car, new;train\n", [("a red car, new", "train")]),
    "tab.csv": ("text\tsplit\na red car\ttrain\n", TWO[:1]),
    "mark.csv": (b"\xef\xbb\xbftext\na red car\na blue ball\n", TWO),
    "odd.csv": ("caption\na\u2028b\x85c\n", [("a\u2028b\x85c", "train")]),
    "inch.tsv": ('id\tcaption\n1\ta 5" pipe\n', [('a 5" pipe', "train")]),
    "plain.tsv": ("text\na red car\na blue ball\n", TWO),
    "comma.tsv": ("text\tx\na cat, sitting\t1\n", [("a cat, sitting", "train")]),
    "list.yaml": ("- a red car\n- a blue ball\n", TWO),
    "list.yml": ("[a red car, a blue ball]", TWO),
    "splits.YAML": ("train:\n- a red car\nval:\n- a blue ball\n", VAL),
    "records.yaml": ("- prompt: a red car\n- {text: a blue ball, split: val}\n", VAL),
    "quoted.yaml": ('- "1984"\n- "yes"\n- "a: b"\n', [(t, "train") for t in ("1984", "yes", "a: b")]),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_corpus_is_read_as_it_is_written(name, tmp_path):
    content, prompts = RIGHT[name]
    assert read(write(tmp_path / name, content)) == prompts


# corpora that are refused ------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def socket_file(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


link = lambda target: lambda path: path.symlink_to(target)
WRONG = {  # name: content, words of the message
    "folder.txt": (Path.mkdir, "it is a folder"),
    "folder.json": (Path.mkdir, "it is a folder"),
    "pipe.txt": (fifo, "it is a pipe"),
    "pipe.json": (fifo, "it is a pipe"),
    "pipe.csv": (fifo, "it is a pipe"),
    "pipe": (fifo, "it is a pipe"),
    "socket.txt": (socket_file, "it is a socket"),
    "zero.txt": (link("/dev/zero"), "it is a device"),
    "zero.json": (link("/dev/zero"), "it is a device"),
    "null.yaml": (link("/dev/null"), "it is a device"),
    "dangling.txt": (link("nowhere"), "does not exist"),
    "circle.json": (link("circle.json"), "cannot be read"),
    "huge.txt": (sparse, "larger than 268 MB"),
    "huge.json": (sparse, "larger than 268 MB"),
    "huge.yaml": (sparse, "larger than 17 MB"),
    "empty.txt": ("", "no prompt to train on"),
    "empty.json": ("", "no prompt to train on"),
    "empty.jsonl": ("", "no prompt to train on"),
    "empty.csv": ("", "no prompt to train on"),
    "empty.yaml": ("", "no prompt to train on"),
    "blank.txt": ("\n \n\t\r\n\u2028\n", "no prompt to train on"),
    "blank.jsonl": ("\n\n", "no prompt to train on"),
    "blank.csv": ("\n\n", "no prompt to train on"),
    "header.csv": ("text\n", "no prompt to train on"),
    "spaces.json": ('[" ", ""]', "no prompt to train on"),
    "list.json": ("[]", "no prompt to train on"),
    "object.json": ("{}", "no prompt to train on"),
    "val.json": ('{"val": ["a"]}', "no prompt to train on"),
    "mark.txt": (b"\xef\xbb\xbf", "no prompt to train on"),
    "utf16.txt": ("a red car".encode("utf-16"), "is not UTF-8"),
    "utf16le.txt": ("a red car".encode("utf-16-le"), "null characters"),
    "utf16.json": ('["a"]'.encode("utf-16"), "is not UTF-8"),
    "utf16be.json": ('["a"]'.encode("utf-16-be"), "null characters"),
    "utf16.csv": ("text\na".encode("utf-16"), "is not UTF-8"),
    "utf16.yaml": ("- a".encode("utf-16"), "is not UTF-8"),
    "utf32.txt": ("a red car".encode("utf-32"), "is not UTF-8"),
    "latin.txt": ("ein Bär".encode("latin-1"), "is not UTF-8 (byte 5)"),
    "gzip.txt": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "is not UTF-8"),
    "image.txt": (b"\x89PNG\r\n\x1a\n\x00\x00", "is not UTF-8"),
    "null.txt": ("a\0b\n", "null characters"),
    "null.json": ('["a\\u0000b"]', "null character"),
    "null.csv": ("text\na\0b\n", "null characters"),
    "null2.yaml": ("- a\0b", "is not YAML"),
    "long.txt": ("x" * 20_000, "20,000 characters"),
    "long.json": (json.dumps(["x" * 10_001]), "10,001 characters"),
    "half.json": ('["a", "b"', "is not JSON (line 1"),
    "comma.json": ('["a",]', "is not JSON"),
    "comment.json": ('["a"] // two', "is not JSON"),
    "single.json": ("['a']", "is not JSON"),
    "lines.json": ('"a"\n"b"\n', "is not JSON (line 2"),
    "deep.json": ("[" * 100_000, "nested more than 100 deep"),
    "deep2.json": ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
    "deep3.json": ('{"train":' * 100_000 + "1" + "}" * 100_000, "nested more than 100 deep"),
    "digits.json": ("[" + "1" * 10_000 + "]", "an integer of 10000 digits"),
    "digits.jsonl": ('{"text": ' + "1" * 10_000 + "}", "an integer of 10000 digits"),
    "nan.json": ("[NaN]", "not finite"),
    "large.json": ("[1e999]", "not finite"),
    "surrogate.json": ('["\\ud800"]', "half a surrogate pair"),
    "surrogate.jsonl": ('{"text": "a \\udfff"}', "half a surrogate pair"),
    "key.json": ('{"\\ud800": ["a"]}', "half a surrogate pair"),
    "null3.json": ("null", "is None: expected a list"),
    "number.json": ("3", "is 3: expected a list"),
    "true.json": ("true", "is True: expected a list"),
    "text.json": ('"a red car"', "is 'a red car': expected a list"),
    "numbers.json": ("[1, 2]", "train[0] is 1: expected a text"),
    "nulls.json": ('["a", null]', "train[1] is None: expected a text"),
    "nested.json": ('[["a"]]', "train[0] is ['a']: expected a text"),
    "record.json": ('[{"id": 1}]', "train[0] has id: expected one of prompt, text, caption"),
    "record2.json": ('[{"text": 1}]', "train[0] is 1: expected a text"),
    "record3.json": ('[{"text": ["a"]}]', "train[0] is ['a']: expected a text"),
    "single2.json": ('{"text": "a"}', "has the entry 'text'"),
    "prompts.json": ('{"prompts": ["a"]}', "has the entry 'prompts': expected lists of the splits"),
    "valid.json": ('{"train": ["a"], "validation": ["b"]}', "has the entry 'validation'"),
    "upper.json": ('{"Train": ["a"]}', "has the entry 'Train'"),
    "many.json": (json.dumps({f"k{i}" * 99: [] for i in range(999)}), "has the entry 'k0k0"),
    "text2.json": ('{"train": "a red car"}', "train is 'a red car': expected a list"),
    "object2.json": ('{"train": {"0": "a"}}', "train is {'0': 'a'}: expected a list"),
    "null4.json": ('{"train": null}', "train is None: expected a list"),
    "split.json": ('[{"text": "a", "split": "dev"}]', "split 'dev': expected train, val, test"),
    "split2.json": ('[{"text": "a", "split": ["val"]}]', "split ['val']"),
    "half.jsonl": ('{"text": "a"}\n{"text": ', "is not JSON in line 2"),
    "array.jsonl": ('["a", "b"]\n', "line 1 is ['a', 'b']: expected a text"),
    "pretty.jsonl": ('{\n"text": "a"\n}', "is not JSON in line 1"),
    "number.jsonl": ('"a"\n\n3\n', "line 3 is 3: expected a text"),
    "column.jsonl": ('{"name": "a"}', "line 1 has name: expected one of"),
    "deep.jsonl": ("[" * 100_000, "nested more than 100 deep"),
    "text.jsonl": ("a red car\n", "is not JSON in line 1"),
    "column.csv": ("name,id\na,1\n", "has the columns name, id: expected one of"),
    "plain2.csv": ("a red car\na blue ball\n", "has the columns a red car"),
    "wide.csv": ("text\na cat, sitting\n", "has 2 columns in line 2 and 1 in its first"),
    "narrow.csv": ("id,text\n1\n", "has 1 columns in line 2 and 2 in its first"),
    "quote.csv": ('text\n"a red car\n', "is no table in line 2 (unexpected end"),
    "quote2.csv": ('text\n"a" red car\n', "is no table in line 2"),
    "field.csv": ("text\n" + "x" * 140_000, "is no table in line 2 (field larger"),
    "split.csv": ("text,split\na,dev\n", "line 2 has split 'dev'"),
    "comma.tsv": ("text,split\na,val\n", "has the columns text,split"),
    "quote.tsv": ('text\n"a red car\n', "is no table"),
    "half.yaml": ("- [a, b\n", "is not YAML (line"),
    "tab.yaml": ("train:\n\t- a\n", "is not YAML (line 2"),
    "code.yaml": ("- !!python/object/apply:os.system ['touch executed']\n", "is not YAML"),
    "alias.yaml": ("a: &a [x, x]\nb: &b [*a, *a]\n", "has the alias *a"),
    "circle.yaml": ("&a [*a]", "has the alias *a"),
    "deep.yaml": ("[" * 100_000, "is not YAML"),
    "deep2.yaml": ("- " * 100_000, "is not YAML"),
    "digits.yaml": ("- " + "1" * 10_000, "is not YAML"),
    "date.yaml": ("- 2026-13-45\n", "is not YAML"),
    "day.yaml": ("- 2026-11-28\n", "is datetime.date(2026, 11, 28): expected a text, in quotes"),
    "number.yaml": ("- 1984\n", "train[0] is 1984: expected a text, in quotes"),
    "true.yaml": ("- yes\n", "train[0] is True: expected a text, in quotes"),
    "colon.yaml": ("- a cat: sitting\n", "train[0] has a cat: expected one of prompt"),
    "two.yaml": ("- a\n---\n- b\n", "is not YAML"),
    "text.yaml": ("a red car", "is 'a red car': expected a list"),
    "split.yaml": ("dev: [a]", "has the entry 'dev'"),
    "surrogate.yaml": ('- "\\ud800"', "is not YAML"),
    "mark.md": ("a red car", "has the suffix '.md': expected one of .txt"),
    "prompts.xlsx": (b"PK\x03\x04", "has the suffix '.xlsx'"),
    "rows.jsonl.gz": (b"\x1f\x8b", "has the suffix '.gz'"),
    "rows.parquet": (b"PAR1", "has the suffix '.parquet'"),
    "prompts": ("a red car", "has no suffix"),
    ".json": ('["a"]', "has no suffix"),
    "table.toml": ("a = 1", "has the suffix '.toml'"),
    "x" * 250 + ".txt": ("", "no prompt to train on"),
    "a\nb.txt": ("", "a\\nb.txt has no prompt"),
    "\x1b[31m.txt": ("", "\\x1b[31m.txt has no prompt"),
}


def mutations(count=60, seed=15):
    "Valid corpora with bytes that are cut, repeated, changed or put in."
    rng, names = random.Random(seed), [n for n in RIGHT if not n.startswith("many")]
    for i in range(count):
        name = rng.choice(names)
        content = RIGHT[name][0]
        data = bytearray(content if isinstance(content, bytes) else content.encode())
        place = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                del data[place:]
            case 1:
                data[place] = rng.randrange(256)
            case 2:
                data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
            case 3:
                data[place:place] = rng.choice([b"\0", b'"', b"[", b"{", b"\xff", b"\r", b","]) * 9
            case 4:
                data = data[place:] + data[:place]
        yield f"{i}-{name}", bytes(data)


def check_sentence(error, path):
    text = str(error)
    assert isinstance(error, (UsageError, RunError)), f"{path}: {error!r}"
    assert "\n" not in text and text.isprintable() and len(text) < 600, f"{path}: {text!r}"


@pytest.mark.parametrize("name", WRONG)
def test_an_odd_corpus_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = WRONG[name]
    start = time.monotonic()
    error = read(write(tmp_path / name, content))
    check_sentence(error, name)
    assert words in str(error), error
    assert time.monotonic() - start < 2 and not Path("executed").exists()


def test_changed_corpora_are_read_or_one_sentence(tmp_path):
    outcomes = []
    for name, data in list(mutations(600))[: SAMPLE and 2 * SAMPLE]:
        found = read(write(tmp_path / name, data))
        outcomes.append(isinstance(found, list))
        if not isinstance(found, list):
            check_sentence(found, name)
        else:
            assert found and all(text.strip() and "\0" not in text for text, _ in found)
    assert 0 < sum(outcomes) < len(outcomes)


@pytest.mark.parametrize(
    "name", ["toybox-16", "", "a" * 5000, "a/" * 3000, "a\0b", "no\nsuch.txt", "~/none.json", "-"]
)
def test_a_name_that_is_no_corpus(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = run_command(["train", f"--corpus={name}", "--out", "run", "--steps", "1"])
    error = capsys.readouterr().err.strip()
    assert code == 2 and len(error) < 600 and "\n" not in error and "Traceback" not in error
    assert not Path("run").exists()


def test_repeated_texts_are_reported(tmp_path):
    path = write(tmp_path / "a.json", '{"train": ["x", "x", "y"], "val": ["z"], "test": ["x", "y"]}')
    with pytest.warns(UserWarning, match="1 of 6 texts are repeated and count once") as caught:
        prompts = load_corpus(str(path))
    assert pairs(prompts) == [("x", "train"), ("y", "train"), ("z", "val")]
    assert "2 texts are in several splits and count in the first" in str(caught[0].message)


def test_a_line_separator_survives_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.json", '["a red car", "a red\\u2028ball"]')
    quick = "--prior tiny-sd --generator ingp --prompts-per-step 1 --views-per-prompt 1".split()
    quick += "--resolution 8 --eval-views 0 --steps 1 --out r".split()
    assert run_command(["train", "--corpus", "c.json", *quick]) == 0
    assert run_command(["export", "r", "--prompt", "0001", "--to", "x.ply", "--resolution", "8"]) in (0, 1)
    rows = [json.loads(line) for line in Path("r/prompts.jsonl").read_text().split("\n")[:-1]]
    assert [row["text"] for row in rows] == ["a red car", "a red\u2028ball"]
