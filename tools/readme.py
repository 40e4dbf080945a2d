"""Writes README.md from nbs/index.ipynb, the table in nbs/map.ipynb, and requirements-server.txt.

    python tools/readme.py            writes the three files
    python tools/readme.py --check    changes nothing; exit code 1 where one of them is out of date

The map has one row per notebook: its module, its title and its `>` line. README.md is index.ipynb
as Markdown: code cells become fenced blocks followed by their text output (`#| hide` leaves a cell
out, `#| echo: false` its source); relative links start at nbs/ there, and at the root in README.md.
"""

import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
INDEX, MAP, README = NBS / "index.ipynb", NBS / "map.ipynb", ROOT / "README.md"
SETTINGS, SERVER = ROOT / "settings.ini", ROOT / "requirements-server.txt"
FRONTS = ("start.ipynb", "tour.ipynb", "gallery.ipynb", "findings.ipynb", "numbers.ipynb")
ROOMS = re.compile(r"(<!-- rooms: [^>]*-->\n).*?(<!-- end of rooms -->)", re.DOTALL)
LINK = re.compile(r"""(\]\(|\b(?:src|href)=")(?![a-z]+:|#|/)([^)"\s]+)""")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def row(path: Path) -> str:
    "One notebook: its module, or its folder where it exports none; its title; what it does."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    exports = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, cells)), re.MULTILINE)
    place = exports[1] if exports else path.parent.name
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    claim = re.search(r"^> (.+)$", text, re.MULTILINE)
    if not title or not claim:
        sys.exit(
            f"{path.relative_to(ROOT)}: expected a title (# ...) and one line that says "
            "what it is for (> ...)"
        )
    words = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", claim[1].replace("|", "\\|"))
    return f"| `{place}` | [{title[1]}]({path.relative_to(NBS).as_posix()}) | {words} |"


def table() -> str:
    guides = sorted(NBS.glob("guides/*.ipynb"))
    numbered = sorted(NBS.glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb"))
    fronts = [NBS / name for name in FRONTS]
    rows = [row(path) for path in (*fronts, *guides, *numbered)]
    return "\n".join(["| module | notebook | what it does |", "|---|---|---|", *rows])


def with_table(text: str) -> str:
    return ROOMS.sub(lambda found: f"{found[1]}\n{table()}\n\n{found[2]}", text)


def outputs(cell: dict) -> str:
    "The text of a code cell's outputs: Markdown as it is, everything else as a block."
    parts = []
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        if "text/markdown" in data:
            parts.append("".join(data["text/markdown"]))
        elif not any(kind.startswith("image/") for kind in data):  # README's pictures are files
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


def server_requirements() -> str:
    "What `pip install -r` needs on a machine without JupyterLab."
    settings = ConfigParser(delimiters=["="])
    settings.read(SETTINGS, encoding="utf-8")
    note = "# training and evaluation without JupyterLab; made from settings.ini by tools/readme.py"
    return "\n".join([note, *settings["DEFAULT"]["requirements"].split()]) + "\n"


def generate() -> dict[Path, str]:
    "All files as they should be."
    everything = json.loads(MAP.read_text(encoding="utf-8"))
    for cell in everything["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_table(source(cell)).splitlines(keepends=True)
    written = json.dumps(everything, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    cells = json.loads(INDEX.read_text(encoding="utf-8"))["cells"]
    body = "\n\n".join(part for part in map(markdown, cells) if part)
    note = "<!-- made from nbs/index.ipynb by tools/readme.py: edit there -->"
    readme = f"{note}\n\n{LINK.sub(from_root, body)}\n"
    return {MAP: written, README: readme, SERVER: server_requirements()}


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
