"""Odd corpora and odd checkpoints: read as they are meant, or refused in one sentence."""

import io
import json
import os
import pickle
import random
import struct
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from damage import socket_file
from safetensors.torch import save_file

from released import fixture

from scaledreamer.commands.cli import run_command
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.generator.hyper_ingp import HyperINGPSettings
from scaledreamer.generator.ingp import SMALL_GRID
from scaledreamer.prior.base import TextEmbedding
from scaledreamer.release.import_weights import import_weights
from scaledreamer.release.lightning import TABLE
from scaledreamer.release.released_weights import ReleasedSettings
from scaledreamer.training.corpora import load_corpus, read_manifest, write_manifest

SAMPLE = 60  # of the seeded changes, per kind; None: all 1,000


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


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


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
    "first.json": ('{"val": ["x"], "train": ["z"]}', [("x", "val"), ("z", "train")]),
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
    "quoted.yaml": ('- "1984"\n- "a: b"\n', [("1984", "train"), ("a: b", "train")]),
    "plain.parquet": (parquet(text=["a red car", None, "", " a blue ball\n"]), TWO),
    "PLAIN.PARQUET": (parquet(Caption=["a red car", "a blue ball"], split=["train", "val"]), VAL),
    "odd.parquet": (parquet(prompt=[ODD], text=["no"], more=[[1, 2]]), [(ODD, "train")]),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_corpus_is_read_as_it_is_written(name, tmp_path):
    content, prompts = RIGHT[name]
    assert read(write(tmp_path / name, content)) == prompts


# corpora that are refused ------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


link = lambda target: lambda path: path.symlink_to(target)
WRONG = {  # name: content, words of the message
    "folder.txt": (Path.mkdir, "it is a folder"),
    "folder.json": (Path.mkdir, "it is a folder"),
    "twice.json": ('{"train": ["a"], "train": ["b"]}', "the key 'train' twice"),
    "twice.jsonl": ('{"text": "a", "text": "b"}', "the key 'text' twice"),
    "twice.yaml": ("train: [a]\ntrain: [b]", "the key 'train' twice"),
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
    "huge.txt": (sparse, "larger than 67 MB"),
    "huge.json": (sparse, "larger than 67 MB"),
    "huge.yaml": (sparse, "larger than 17 MB"),
    "lines.txt": (b"\n" * 5_000_000, "more than 4,000,000 line ends"),
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
    "rows.parquet": (b"PAR1", "is no Parquet file"),
    "text.parquet": ("a red car", "is no Parquet file"),
    "empty.parquet": ("", "is no Parquet file"),
    "none.parquet": (parquet(text=pa.array([], pa.string())), "no prompt to train on"),
    "pipe.parquet": (fifo, "it is a pipe"),
    "zero.parquet": (link("/dev/zero"), "it is a device"),
    "folder.parquet": (Path.mkdir, "it is a folder"),
    "huge.parquet": (sparse, "larger than 67 MB"),
    "number.parquet": (parquet(text=[1984]), "row 1 is 1984: expected a text"),
    "bytes.parquet": (parquet(text=[b"a"]), "row 1 is b'a': expected a text"),
    "list.parquet": (
        parquet(text=[["a"]]),
        "has the columns text of lists: expected one of prompt",
    ),
    "column.parquet": (
        parquet(name=["a"], id=[1]),
        "has the columns name, id: expected one of prompt",
    ),
    "split.parquet": (parquet(text=["a"], split=["dev"]), "row 1 has split 'dev'"),
    "null.parquet": (parquet(text=["a\0b"]), "null character"),
    "long.parquet": (parquet(text=["x" * 10_001]), "10,001 characters"),
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
    start = time.process_time()
    error = read(write(tmp_path / name, content))
    check_sentence(error, name)
    assert words in str(error), error
    assert time.process_time() - start < 2 and not Path("executed").exists()


def test_changed_corpora_are_read_or_one_sentence(tmp_path):
    outcomes = []
    for name, data in mutations(SAMPLE or 600):
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
    path = write(
        tmp_path / "a.json", '{"train": ["x", "x", "y"], "val": ["z"], "test": ["x", "y"]}'
    )
    with pytest.warns(UserWarning, match="1 of 6 texts are repeated and count once") as caught:
        prompts = load_corpus(str(path))
    assert pairs(prompts) == [("x", "train"), ("y", "train"), ("z", "val")]
    assert "2 texts are in several splits and count in the first" in str(caught[0].message)


def test_odd_prompts_come_back_from_a_run_folder(tmp_path):
    for name in ("odd.txt", "separator.json", "pair.json", "lines.csv", "digits.txt"):
        prompts = load_corpus(str(write(tmp_path / name, RIGHT[name][0])))
        write_manifest(tmp_path / "prompts.jsonl", prompts)
        assert read_manifest(tmp_path / "prompts.jsonl") == prompts


# what a checkpoint does not store ----------------------------------------------------------------


def triplane_state():
    "A released Triplane-Transformer of 4 heads and width 32, its settings, and what it computes."
    meta, t = fixture("04_triplane_a_local")
    state = {
        "geometry." + key.removeprefix("weights/"): value
        for key, value in t.items()
        if key.startswith("weights/")
    }
    return state, meta["settings"], t


def sdf(found, t):
    with torch.no_grad():
        return found.generator(TextEmbedding(t["text"], t["text"][:, 0])).sdf(t["points"])


def run_folder(tmp_path, state, **system):
    "The two folders that the release writes."
    (tmp_path / "ckpts").mkdir(exist_ok=True)
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "ckpts/last.ckpt")
    if system:
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs/parsed.yaml").write_text(yaml.safe_dump({"system": system}))
    return tmp_path / "ckpts/last.ckpt"


def test_heads_are_given_or_configured_and_never_guessed(tmp_path):
    state, geometry, t = triplane_state()
    path = run_folder(tmp_path, state)
    with pytest.raises(UsageError, match="give --heads .the released one has 16."):
        import_weights(path)
    found = import_weights(path, heads=4)
    torch.testing.assert_close(sdf(found, t), t["sdf"].view(2, -1), rtol=0, atol=1e-4)
    assert "geometry.sdf_bias_params" in found.assumed
    for heads in (1, 2, 8, 16):  # same shapes, another scene
        assert (sdf(import_weights(path, heads=heads), t) - sdf(found, t)).abs().max() > 1e-3
    for heads, words in ((6, "6 attention heads do not divide the width 32"), (0, "--heads is 0")):
        with pytest.raises(UsageError, match=words):
            import_weights(path, heads=heads)
    run_folder(tmp_path, state, geometry_type="Triplane-transformer-sdf", geometry=geometry)
    configured = import_weights(path)
    assert torch.equal(sdf(configured, t), sdf(found, t))
    assert configured.config.path == tmp_path / "configs/parsed.yaml"
    assert "geometry.sdf_bias_params" not in configured.assumed
    with pytest.raises(UsageError, match="has 4 in .*num_heads, 16 is given"):
        import_weights(path, heads=16)


@pytest.mark.parametrize("key, value, words", [
    ("geometry_type", "3DConv-net", "has '3DConv-net' in system.geometry_type"),
    ("sdf_bias", "ellipsoid", "has 'ellipsoid' in system.geometry.sdf_bias"),
    ("sdf_bias_params", [1, 1, 1], "sdf_bias_params is .1, 1, 1.: expected a number"),
    ("sdf_bias_params", -1.0, "sdf_bias_params is -1.0: expected a number above 0"),
    ("radius", 3.0, "has 3.0 in system.geometry.radius"),
    ("num_heads", "${heads}", "num_heads is '..heads.': expected an integer"),
    ("num_heads", 1e9, "num_heads is 1000000000.0: expected an integer"),
    ("num_heads", None, "give --heads"),
    ("num_layers", 6, "has 6 in system.geometry.space_generator_config.num_layers"),
    ("local_text", False, "has False in system.geometry.space_generator_config.local_text"),
    ("mlp_network_config", {"activation": "Sine"}, "has 'Sine' in system"),
])  # fmt: skip
def test_a_configuration_that_does_not_fit(key, value, words, tmp_path):
    state, geometry, _ = triplane_state()
    system = {"geometry_type": "Triplane-transformer-sdf", "geometry": geometry}
    inner = geometry["space_generator_config"]
    part = inner if key in inner else system if key == "geometry_type" else geometry
    part[key] = value
    with pytest.raises(UsageError, match=words):
        import_weights(run_folder(tmp_path, state, **system))


@pytest.mark.parametrize("content", [
    "", "[1, 2]", "system: 3", "system: {geometry: 3}", "system: {geometry", "\0", "[" * 100_000,
    "a: &a [x]\nb: *a", "system: {geometry: {space_generator_config: 7}}", b"\xff\xfe",
    "system: !!python/object/apply:os.mkdir [executed]",
    "- " + "1" * 10_000, Path.mkdir, fifo, link("/dev/zero"), link("nowhere"), sparse,
])  # fmt: skip
def test_a_configuration_that_is_none(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run_folder(tmp_path, triplane_state()[0])
    config = write(tmp_path / "given.yaml", content)
    with pytest.raises(UsageError) as error:
        import_weights(path, config=config)
    check_sentence(error.value, content)
    assert not Path("executed").exists()


def hyper_state(widths, color_widths, features=16, text=8, hidden=4):
    "A released Hyper-iNGP whose decoders have these hidden layers."
    outputs = 0
    for layers, out in ((widths, 1), (color_widths, 3)):
        sizes = [features, *layers, out]
        outputs += sum(a * b for a, b in zip(sizes, sizes[1:]))
    settings = replace(HyperINGPSettings.paper(), grid=SMALL_GRID, text_width=text, hidden=hidden)
    model = ReleasedSettings(settings, None).make()
    state = {
        "geometry." + key.replace("hypernetwork.", "hypernet.").replace("encoder.table", TABLE): v
        for key, v in model.state_dict().items()
    }
    state["geometry.hypernet.layers.3.weight"] = torch.ones(outputs, hidden)
    state["geometry.hypernet.layers.3.bias"] = torch.ones(outputs)
    return state, {"sdf_weights": [*widths, 1], "feature_weights": [*color_widths, 3]}


@pytest.mark.parametrize("widths, color_widths", [
    ([6, 6], [6, 6]),  # 288 outputs, as one hidden layer of width 8
    ([83], [47]),  # 2304 outputs, as one hidden layer of width 64
    ([64], [32]),
    ([64, 64], [64]),
    ([12], [10]),
])  # fmt: skip
def test_decoders_of_another_form_are_never_read_as_the_released_one(
    widths, color_widths, tmp_path
):
    state, dims = hyper_state(widths, color_widths)
    path = run_folder(tmp_path, state)
    if sum(widths) == 83:  # no shape can tell
        assumed = import_weights(path).assumed
        assert assumed["geometry.hypernet_config.out_dims.sdf_weights"] == [64, 1]
    else:
        with pytest.raises((UsageError, RunError), match="weights"):
            import_weights(path)
    run_folder(tmp_path, state, geometry={"hypernet_config": {"out_dims": dims}})
    with pytest.raises((UsageError, RunError), match="out_dims|not decoders of one hidden width"):
        import_weights(path)


@pytest.mark.parametrize("width", [64, 8, 34])
def test_decoders_of_one_width(width, tmp_path):
    state, dims = hyper_state([width], [width])
    path = run_folder(tmp_path, state, geometry={"hypernet_config": {"out_dims": dims}})
    assert import_weights(path).settings.generator.decoder_width == width


def test_triplane_decoders_are_read_from_their_shapes(tmp_path):
    state = triplane_state()[0]
    names = [f"geometry.{part}_network.layers" for part in ("sdf", "feature")]
    short = {k: v for k, v in state.items() if not k.endswith("network.layers.2.weight")}
    short |= {f"{name}.2.weight": short.pop(f"{name}.4.weight") for name in names}
    found = import_weights(run_folder(tmp_path, short), heads=4)
    assert found.settings.generator.decoder == (64,)
    other = state | {
        "geometry.feature_network.layers.0.weight": torch.ones(32, 18),
        "geometry.feature_network.layers.2.weight": torch.ones(64, 32),
    }
    with pytest.raises(RunError, match=r"widths \[64, 64\] in geometry.sdf_network and \[32, 64\]"):
        import_weights(run_folder(tmp_path, other), heads=4)


# damaged checkpoints -----------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def zipped(path, entries, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def scripted(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


STATE = triplane_state()[0]
KEY = "geometry.space_generator.pos_embed"
saving = lambda content: lambda path: torch.save(content, path)
with_state = lambda **changes: saving(
    {"state_dict": STATE | {key.replace("__", "."): value for key, value in changes.items()}}
)
one = lambda value: saving({"state_dict": STATE | {KEY: value}})
FILES = {
    "folder.ckpt": Path.mkdir,
    "pipe.ckpt": fifo,
    "pipe.safetensors": fifo,
    "socket.ckpt": socket_file,
    "zero.ckpt": link("/dev/zero"),
    "zero.safetensors": link("/dev/zero"),
    "dangling.ckpt": link("nowhere"),
    "circle.ckpt": link("circle.ckpt"),
    "empty.ckpt": "",
    "empty.safetensors": "",
    "text.ckpt": "a red car",
    "text.safetensors": "a red car",
    "json.ckpt": "{}",
    "html.ckpt": "<!DOCTYPE html><html>Sign in</html>",
    "pointer.ckpt": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "image.ckpt": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "zeros.ckpt": bytes(4096),
    "array.ckpt": lambda path: np.save(open(path, "wb"), np.ones(3)),
    "arrays.ckpt": lambda path: np.savez(open(path, "wb"), a=np.ones(3)),
    "zip.ckpt": lambda path: zipped(path, {"a.txt": "a"}),
    "zip2.ckpt": lambda path: zipped(path, {"archive/data.pkl": pickle.dumps({})}),
    "bomb.ckpt": lambda path: zipped(path, {"a/data.pkl": bytes(1 << 24)}, zipfile.ZIP_DEFLATED),
    "script.ckpt": scripted,
    "pickle.ckpt": pickle.dumps({"state_dict": {}}),
    "pickle2.ckpt": pickle.dumps({KEY: np.ones(3)}),
    "code.ckpt": saving({"state_dict": STATE, "callbacks": Code()}),
    "code2.ckpt": saving(Code()),
    "code3.ckpt": pickle.dumps(Code()),
    "module.ckpt": saving(torch.nn.Linear(2, 2)),
    "module2.ckpt": saving({"state_dict": {"a": torch.nn.Linear(2, 2)}}),
    "list.ckpt": saving([1, 2]),
    "none.ckpt": saving(None),
    "number.ckpt": saving(3),
    "tensor.ckpt": saving(torch.ones(3)),
    "dict.ckpt": saving({}),
    "state.ckpt": saving({"state_dict": {}}),
    "state2.ckpt": saving({"state_dict": None}),
    "state3.ckpt": saving({"state_dict": [torch.ones(2)]}),
    "state4.ckpt": saving({"state_dict": {1: torch.ones(2)}}),
    "state5.ckpt": saving({"state_dict": {"a": "b"}}),
    "nested.ckpt": saving({"state_dict": {"state_dict": STATE}}),
    "other.safetensors": lambda path: save_file({"unet.conv.weight": torch.ones(2)}, path),
    "other.ckpt": saving({"state_dict": {"model.out.0.weight": torch.ones(2)}}),
    "long.ckpt": saving({"state_dict": {"k" * 9999: torch.ones(2)}}),
    "line.ckpt": saving({"state_dict": {"a\nb": torch.ones(2)}}),
    "header.safetensors": struct.pack("<Q", 1 << 60) + b"{}",
    "header2.safetensors": struct.pack("<Q", 2) + b"{}",
    "header3.safetensors": struct.pack("<Q", 7) + b"[1,2,3]",
    "offsets.safetensors": struct.pack("<Q", 62)
    + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999999999]}}',
    "pickle.safetensors": saving({"state_dict": STATE}),
    "tensors.ckpt": lambda path: save_file(STATE, path),
    "step.ckpt": saving({"state_dict": STATE, "global_step": 10**30}),
    "many.ckpt": one(torch.zeros(1).expand(2**40)),
    "wide.ckpt": one(torch.zeros(1).expand(1, 3 * 2**12, 2**14)),
    "nan.ckpt": one(STATE[KEY] / 0),
    "int.ckpt": one(STATE[KEY].int()),
    "complex.ckpt": one(STATE[KEY].to(torch.complex64)),
    "bool.ckpt": one(STATE[KEY] > 0),
    "float8.ckpt": one(STATE[KEY].to(torch.float8_e4m3fn)),
    "sparse.ckpt": one(STATE[KEY].to_sparse()),
    "meta.ckpt": one(STATE[KEY].to("meta")),
    "scalar.ckpt": one(torch.tensor(1.0)),
    "none2.ckpt": one(torch.zeros(0)),
    "vector.ckpt": one(torch.ones(9)),
    "dims.ckpt": one(torch.ones(1, 1, 48, 32)),
    "turned.ckpt": one(torch.ones(1, 32, 48)),
    "tokens.ckpt": one(torch.ones(1, 50, 32)),
    "none3.ckpt": one(torch.ones(1, 0, 32)),
    "width.ckpt": one(torch.ones(1, 48, 0)),
    "bbox.ckpt": with_state(geometry__bbox=torch.tensor(2.0)),
    "bbox2.ckpt": with_state(geometry__bbox=torch.full((2, 3), torch.nan)),
    "bbox3.ckpt": with_state(geometry__bbox=torch.ones(3, 2)),
    "bbox4.ckpt": with_state(geometry__bbox=torch.ones(2, 3)),
    "std.ckpt": with_state(renderer__variance___inv_std=torch.ones(3)),
    "std2.ckpt": with_state(renderer__variance___inv_std=torch.tensor(torch.nan)),
    "std4.ckpt": with_state(renderer__variance___inv_std=torch.zeros(0)),
    "more.ckpt": with_state(geometry__unknown=torch.ones(2)),
    "more2.ckpt": with_state(geometry__space_generator__layers__7__x=torch.ones(2)),
    "layers.ckpt": with_state(**{"geometry__sdf_network__layers__" + "9" * 5000: torch.ones(2)}),
    "background.ckpt": with_state(background__network__layers__0__weight=torch.ones(2)),
    "background2.ckpt": with_state(background__hypernet__layers__1__weight=torch.ones(2)),
    "background3.ckpt": with_state(
        **{f"background__network__layers__{'9' * 5000}__weight": torch.ones(2, 2)}
    ),
    "x" * 250 + ".ckpt": "",
    "a\nb.ckpt": "",
}


@pytest.mark.parametrize("name", FILES)
def test_an_odd_checkpoint_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        write(tmp_path / name, FILES[name])
    with pytest.raises((UsageError, RunError)) as error:
        import_weights(tmp_path / name, heads=4)
    check_sentence(error.value, name)
    assert not Path("executed").exists()


def changed_checkpoints(count, seed=16):
    "A whole checkpoint with one tensor or some bytes changed."
    rng, keys = random.Random(seed), sorted(STATE)
    buffer = io.BytesIO()
    torch.save({"state_dict": STATE}, buffer)
    for i in range(count):
        key = rng.choice(keys)
        value, kind = STATE[key], rng.randrange(8)
        if kind < 6:
            changed = [
                value * torch.nan, value.flatten(), value[None], value[:1] * 0 + 1,
                value.to(torch.int16), None,
            ][kind]  # fmt: skip
            state = {k: v for k, v in STATE.items() if k != key}
            yield i, {"state_dict": state if changed is None else state | {key: changed}}
        else:
            data = bytearray(buffer.getvalue())
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield i, bytes(data) if kind == 6 else bytes(data[: rng.randrange(len(data))])


def test_changed_checkpoints_are_read_or_one_sentence(tmp_path):
    path = tmp_path / "changed.ckpt"
    for i, content in changed_checkpoints(SAMPLE or 400):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        try:
            found = import_weights(path, heads=4)
        except (UsageError, RunError) as error:
            check_sentence(error, i)
        else:
            assert all(p.isfinite().all() for p in found.generator.parameters())


def test_the_command_takes_heads_and_config(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, geometry, _ = triplane_state()
    path = run_folder(tmp_path, state)
    command = ["import-weights", str(path), "--prior", "tiny-sd", "--out", "run"]
    assert run_command(command) == 2
    assert "give --heads" in capsys.readouterr().err
    assert run_command([*command, "--heads", "5"]) == 2
    assert "do not divide" in capsys.readouterr().err
    assert run_command([*command, "--config", "none.yaml"]) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err
    assert not Path("run").exists()
