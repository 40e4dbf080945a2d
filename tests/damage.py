"""Seeded damage of files: every mutation has a kind and a description, and its seed remakes it."""

import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load, save

from scaledreamer.core.files import MAX_FILE_BYTES

DEEP = b"[" * 10**5
ODD = [None, True, -1, 0, 17, 1.5, 1e300, 10**19, 10**30, "", "x", "\ud800", [], {}, [[]], {"a": 1}]
HUGE = [2**31, 2**40, 10**12, 2**63 - 1, 10**18, -(10**18), 1e308, 10**25]
CONTENTS = [
    *(b"", b"null", b"17", b'"x"', b"[]", b"{}", b"[null]", DEEP, b"\xff\xfe\x00", b"NaN"),
    *(b'{"a":' * 10**5, b"[1e999]", b'["\\ud800"]', b"9" * 10**4, b"PK\x03\x04", b"\x93NUMPY\x01"),
    *(b"\x89PNG\r\n\x1a\n", b"PAR1PAR1", b"- " * 10**4, b"\n" * 1000, b"\x00" * 4096),
]


@dataclass(frozen=True)
class Damage:
    "What was done to a file of a folder."

    kind: str
    description: str
    file: str  # its path in the folder

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}, {self.description}"


class Code:
    "Pickled, a call that makes a folder."

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


# ---------------------------------------------------------------- bytes


def _random(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    size = rng.choice([1, 8, rng.randrange(2, 4000)])
    return rng.randbytes(size), f"{size} random bytes"


def _truncated(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    kept = max(0, len(content) - rng.choice([1, 9, rng.randrange(len(content) + 1)]))
    return content[:kept], f"{kept} of {len(content)} bytes"


def _flipped(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    "Bits of the whole file, or of its beginning, where headers are."
    changed = bytearray(content)
    most = len(content) if rng.random() < 0.5 else min(len(content), 400)
    places = [rng.randrange(most) for _ in range(rng.randrange(1, 9))] if content else []
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed), f"bits at {places}"


def _edited(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    place, lines = rng.randrange(len(content) + 1), content.split(b"\n")
    match rng.randrange(7):
        case 0:
            inserted = rng.randbytes(rng.randrange(1, 40))
            return content[:place] + inserted + content[place:], f"{inserted!r} put in at {place}"
        case 1:
            end = rng.choice([b"\n", b"x", b'{"step', b"\x00" * 20, content])
            return content + end, f"{len(end)} bytes more"
        case 2:
            rng.shuffle(lines)
            return b"\n".join(lines), "lines in another order"
        case 3:
            return content.replace(b"\n", b"\r\n"), "line ends of Windows"
        case 4:
            return b"\xef\xbb\xbf" + content, "a byte order mark"
        case 5:
            count = rng.randrange(1, 200)
            return content[:place] + content[place + count :], f"{count} bytes at {place} cut out"
    odd = rng.choice([b"\0", b'"', b"[", b"{", b"\xff", b"\r", b",", b"\t", b"\xed\xa0\x80"]) * 9
    return content[:place] + odd + content[place:], f"{odd!r} put in at {place}"


def _content(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    other = rng.choice(CONTENTS)
    return other, f"{len(other)} bytes {other[:12]!r}"


# ---------------------------------------------------------------- values


def _places(value: Any) -> list[tuple[Any, Any]]:
    "Every list or object inside a value, with each of its keys."
    found, pending = [], [value]
    while pending:
        node = pending.pop()
        if isinstance(node, (dict, list)):
            keys = [*node] if isinstance(node, dict) else [*range(len(node))]
            found += [(node, key) for key in keys]
            pending += [node[key] for key in keys]
    return found


NESTED = "<nested>"  # a text that stands for deep nesting, which `json` itself cannot write


def _change_value(content: bytes, suffix: str, kind: str, rng: random.Random) -> tuple[bytes, str]:
    "A JSON, JSON Lines or YAML file with a key removed or a value replaced."
    text, by_line = content.decode(), suffix in (".jsonl", ".ndjson")
    lines = text.split("\n")[:-1] if by_line else [text]
    i = rng.randrange(len(lines)) if lines else 0
    read = yaml.safe_load if suffix in (".yaml", ".yml") else json.loads
    value = read(lines[i]) if lines else []
    places = _places(value)
    if not places:
        return content + b"{", "a brace more"
    node, key = rng.choice(places)
    if kind == "type" and rng.random() < 0.3:
        del node[key]
        said = f"{key!r} is missing"
    else:
        node[key] = {"type": rng.choice(ODD), "deep": NESTED, "size": rng.choice(HUGE)}[kind]
        said = f"{key!r} is {str(node[key])[:20]!r}"
    depth = rng.choice([101, 10**5])
    nested = (
        "[" * depth + "]" * depth if rng.random() < 0.5 else '{"a":' * depth + "1" + "}" * depth
    )
    lines[i] = json.dumps(value).replace(json.dumps(NESTED), nested)
    changed = "\n".join(lines) + "\n" * by_line
    return changed.encode("utf-8", "surrogatepass"), f"{said} in part {i}"


# ---------------------------------------------------------------- tensors and tables


def _header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    "A safetensors file whose header declares more than there is."
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    if rng.random() < 0.3 or not names:
        length = rng.choice([size + 1, size * 2, 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + content[8:], f"a header of {length} bytes"
    entry = header[name := rng.choice(names)]
    key = rng.choice(["shape", "data_offsets", "dtype"])
    big = rng.choice([2**31, 2**40, 2**62, 10**18])
    entry[key] = {
        "shape": rng.choice([[big], [big, big], [big, 0], [1] * 70, [big, *entry["shape"]]]),
        "data_offsets": [0, big],
        "dtype": rng.choice(["F4", "F6_E2M3", "F8_E4M3", "F64", "C64", "I64", "BOOL", "X"]),
    }[key]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest, f"{key} of {name} is {str(entry[key])[:40]}"


def _retyped(value: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor | None, str]:
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    kinds += [torch.complex64, torch.float8_e4m3fn]
    match rng.randrange(7):
        case 0:
            return None, "missing"
        case 1:
            kind = rng.choice(kinds)
            return value.to(kind), str(kind)
        case 2:
            return value.flatten() if value.ndim != 1 else value[None], "of another rank"
        case 3:
            return value[:-1] if value.ndim else value[None, None], "a row less"
        case 4:
            return (
                torch.full_like(value, torch.nan) if value.is_floating_point() else -value
            ), "NaN"
        case 5:
            return torch.zeros(rng.choice([(), (0,), (1, 0, 3), (7, 7)])), "of another shape"
    return value.movedim(0, -1).contiguous() if value.ndim else value + 1, "turned"


def _other_tensors(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    "A whole safetensors file with one tensor changed, left out or added."
    size = struct.unpack("<Q", content[:8])[0]
    metadata = json.loads(content[8 : 8 + size]).get("__metadata__")
    tensors = load(content)
    if rng.random() < 0.2 or not tensors:
        name = rng.choice(["x", "a\nb", "k" * 9999, "0.step", ""])
        tensors[name], what = torch.ones(2), "added"
    elif metadata and rng.random() < 0.2:
        key = rng.choice([*metadata])
        value = rng.choice(["", "x", "[" * 10**5, "null", "{}", "9" * 30])
        metadata[key] = value
        return save(tensors, metadata), f"metadata {key} is {value[:9]!r}"
    else:
        name = rng.choice([*tensors])
        value, what = _retyped(tensors.pop(name), rng)
        if value is not None:
            tensors[name] = value
    return save(tensors, metadata), f"tensor {name[:40]!r} is {what}"


def _array(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    "A .npy file with another shape or type in its header."
    start, end = content.index(b"(") if b"(" in content else 0, content.find(b"}")
    rows = rng.choice(
        [b"(9999999999999, 64, 64, 4), }", b"(3,), }", b"(0, 64, 64, 4), }", b"(), }"]
    )
    changed = content[:start] + rows + b" " * max(0, end + 1 - start - len(rows))
    return changed + content[end + 1 :], f"shape {rows[:-3].decode()}"


def _other_table(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    "A Parquet file with another schema."
    tables = {
        "lists": {"text": [["a"], []]},
        "numbers": {"text": [1, 2]},
        "bytes": {"text": [b"a", b"\xff"]},
        "objects": {"text": [{"a": 1}]},
        "other columns": {"name": ["a"], "id": [1]},
        "no rows": {"text": pa.array([], pa.string())},
        "nulls": {"text": [None, None], "split": ["train", None]},
        "splits": {"text": ["a"], "split": [3]},
        "long texts": {"text": ["x" * 10**5]},
    }
    what, buffer = rng.choice([*tables]), io.BytesIO()
    pq.write_table(pa.table(tables[what]), buffer)
    return buffer.getvalue(), f"a table of {what}"


# ---------------------------------------------------------------- what is no regular file


def socket_file(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1 if "json" in path.suffix else 1 << 33)


PLACES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/full": lambda path: path.symlink_to("/dev/full"),
    "a socket": socket_file,
    "an empty file": Path.touch,
    "a huge sparse file": _sparse,
}


def _replaced(path: Path, rng: random.Random) -> str:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    what = rng.choice([*PLACES])
    PLACES[what](path)
    return f"{what} in its place"


OLDER = {"model": "pytorch_model", "open_clip_model": "open_clip_pytorch_model"}


def _with_code(path: Path, rng: random.Random, canary: Path) -> str:
    "Content that would make the folder `canary`, were it run."
    buffer = io.BytesIO()
    torch.save(rng.choice([Code(canary), {"state_dict": {"a": Code(canary)}}]), buffer)
    contents = [pickle.dumps(Code(canary)), buffer.getvalue()]
    call = f"!!python/object/apply:os.mkdir ['{canary}']"
    texts = [call, f"- {call}", f"a: {call}", f"__import__('os').mkdir('{canary}')"]
    text = path.suffix in (".yaml", ".yml", ".json", ".jsonl", ".txt")
    content = rng.choice(texts).encode() if text else rng.choice(contents)
    if path.suffix == ".safetensors" and rng.random() < 0.5:  # the older format beside it
        path.unlink()
        path = path.with_name(OLDER.get(path.stem, path.stem) + ".bin")
    if path.name == "model_index.json":
        index = json.loads(path.read_text())
        (path.parent / "unet/my_unet.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
        content = json.dumps(index | {"unet": ["my_unet", "MyUNet"]}).encode()
    path.unlink(missing_ok=True)  # it may be a hard link
    path.write_bytes(content)
    return f"code in {path.name}"


# ---------------------------------------------------------------- one mutation

BYTES = {
    "random": _random,
    "truncated": _truncated,
    "flipped": _flipped,
    "edited": _edited,
    "content": _content,
}
VALUES = (".json", ".jsonl", ".ndjson", ".yaml", ".yml")
OTHERS = {
    ".safetensors": {"size": _header, "shape": _other_tensors},
    ".npy": {"size": _array},
    ".parquet": {"shape": _other_table},
}


def _kinds(path: Path) -> list[str]:
    "The kinds of damage that a file can have; those of its own format are likelier."
    own = [*OTHERS.get(path.suffix, {})]
    own += ["type", "type", "deep", "size"] if path.suffix.lower() in VALUES else []
    return [*BYTES, "place", "place", "code", *own, *own]


def damage(folder: Path, names: list[str], rng: random.Random, canary: Path) -> Damage:
    "Damage one of the files or folders `names`, whose content was whole."
    path = folder / (name := rng.choice(names))
    kind = "place" if path.is_dir() else rng.choice(_kinds(path))
    if kind == "place":
        return Damage(kind, _replaced(path, rng), name)
    if kind == "code":
        return Damage(kind, _with_code(path, rng, canary), name)
    content = path.read_bytes()
    if kind in BYTES:
        changed, said = BYTES[kind](content, rng)
    elif path.suffix.lower() in VALUES:
        changed, said = _change_value(content, path.suffix.lower(), kind, rng)
    else:
        changed, said = OTHERS[path.suffix][kind](content, rng)
    path.unlink()
    path.write_bytes(changed)
    return Damage(kind, said, name)
