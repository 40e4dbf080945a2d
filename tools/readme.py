"""Makes README.md from nbs/index.ipynb, and the map of rooms in both from the rooms themselves.

    python tools/readme.py            writes both files
    python tools/readme.py --check    changes nothing; exit code 1 where one of them is out of date

The map stands in index.ipynb between two comments, one row a notebook: its module, its title and its `>` line. README.md is
then index.ipynb as Markdown: code cells become fenced blocks followed by their text output (`#| hide` leaves a cell out,
`#| echo: false` its source), and relative links, which start at nbs/ in the notebook, start at the root.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / "nbs/index.ipynb", ROOT / "README.md"
MAP = re.compile(r"(<!-- rooms: [^>]*-->\n).*?(<!-- end of rooms -->)", re.DOTALL)
LINK = re.compile(r"""(\]\(|\b(?:src|href)=")(?![a-z]+:|#|/)([^)"\s]+)""")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def room(path: Path) -> str:
    "The row of one notebook: its module, or its folder where it exports none; its title; what it says of itself."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    exports = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, cells)), re.MULTILINE)
    place = exports[1] if exports else path.parent.name
    title, claim = (
        re.search(r"^# (.+)$", text, re.MULTILINE),
        re.search(r"^>[^\n]*(?:\n>[^\n]*)*", text, re.MULTILINE),
    )
    if not title or not claim:
        sys.exit(
            f"{path.relative_to(ROOT)}: expected a title (# ...) and a line that says what it is for (> ...)"
        )
    words = " ".join(line.lstrip("> ") for line in claim[0].splitlines()).replace("|", "\\|")
    words = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", words)  # its links start at its own folder
    return f"| `{place}` | [{title[1]}]({path.relative_to(INDEX.parent).as_posix()}) | {words} |"


def with_map(text: str) -> str:
    rows = [room(path) for path in sorted(INDEX.parent.glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb"))]
    table = "\n".join(["| module | notebook | what it is for |", "|---|---|---|", *rows])
    return MAP.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def outputs(cell: dict) -> str:
    "The text of a code cell's outputs: Markdown as it is, everything else as a block."
    parts = []
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        if "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
        elif not any(
            kind.startswith("image/") for kind in data
        ):  # pictures of the README are files
            parts.append("```text\n" + "".join(data.get("text/plain", "")).rstrip() + "\n```")
    return "\n\n".join(parts)


def markdown(cell: dict) -> str:
    if cell["cell_type"] != "code":
        return source(cell)
    lines = source(cell).splitlines()
    directives = {re.sub(r"^#\|\s*", "", line).strip() for line in lines if line.startswith("#|")}
    if "hide" in directives:
        return ""
    code = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    block = "" if "echo: false" in directives or not code else f"```python\n{code}\n```"
    return "\n\n".join(part for part in (block, outputs(cell)) if part)


def from_root(found: re.Match) -> str:
    target = found[2]
    return found[1] + (target[3:] if target.startswith("../") else "nbs/" + target)


def generate() -> dict[Path, str]:
    "Both files as they should be."
    notebook = json.loads(INDEX.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_map(source(cell)).splitlines(keepends=True)
    index = (
        json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    )  # as nbdev_clean writes it
    body = "\n\n".join(part for part in map(markdown, notebook["cells"]) if part)
    note = "<!-- made from nbs/index.ipynb by tools/readme.py: edit there -->"
    return {INDEX: index, README: f"{note}\n\n{LINK.sub(from_root, body)}\n"}


def main() -> int:
    stale = {
        path: text
        for path, text in generate().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(
                f"{path.relative_to(ROOT)} is out of date: run python tools/readme.py",
                file=sys.stderr,
            )
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
