"""Builds the HTML site of the committed notebooks: `python tools/build_site.py` writes _docs/.

MkDocs and mkdocs-jupyter render the pages and the search index; this file is also their hook, which
adds an index of all public names, and points links to notebooks at their pages. At the end every
local link of the site is checked; a broken one is printed, and the exit code is 1.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
NBS, PAGES, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
OUTSIDE = re.compile(
    r'(href|src)="((?:\.\./)+)((?:README|CONTRIBUTING|CHANGELOG|LICENSE|tests|tools)[^"]*)"'
)


def first_line(node: ast.AST) -> str:
    "The first line of a docstring, if there is one."
    text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
    return text.splitlines()[0] if text else ""


def public_names(module: Path) -> dict[str, str]:
    "Each name in a module's `__all__`, with what its docstring says."
    body = ast.parse(module.read_text(encoding="utf-8")).body
    listed = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    said = {node.name: first_line(node) for node in body if hasattr(node, "name")}
    return {name: said.get(name, "") for name in (listed[0] if listed else [])}


def name_index() -> str:
    "A Markdown table of all public names, by alphabet."
    rows = []
    for notebook in sorted(NBS.glob("[0-9][0-9]_*/[0-9][0-9]_*.ipynb")):
        stage, room = notebook.parent.name[3:], notebook.stem[3:]
        module = ROOT / "scaledreamer" / stage / f"{room}.py"
        if module.exists():
            page = notebook.relative_to(NBS).with_suffix(".html").as_posix()
            for name, said in public_names(module).items():
                rows.append((name, f"[`{stage}.{room}`]({page})", said.replace("|", "\\|")))
    lines = [f"| `{name}` | {where} | {said} |" for name, where, said in sorted(rows, key=str)]
    return "\n".join(["# Index of names", "", "| name | module | |", "|---|---|---|", *lines, ""])


def on_files(files: Files, config) -> Files:
    "MkDocs: one page more."
    files.append(File.generated(config, "names.md", content=name_index()))
    return files


def described(html: str) -> str:
    "Pictures among outputs get the heading that they stand below as their alternative text."
    heading = ""

    def replaced(found: re.Match) -> str:
        nonlocal heading
        if found[1] is not None:
            heading = re.sub(r"<[^>]*>|¶", "", found[1]).strip().replace('"', "'")
            return found[0]
        return f'alt="Figure: {heading}"'

    pattern = r'<h[1-6][^>]*>(.*?)</h[1-6]>|alt="No description has been provided for this image"'
    return re.sub(pattern, replaced, html, flags=re.DOTALL)


def on_post_page(output: str, page, config) -> str:
    "MkDocs: links to notebooks lead to their pages, links out of nbs/ to the repository."
    output = described(output)
    output = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.ipynb(#[^"]*)?"', r'\1.html\2"', output)
    return OUTSIDE.sub(
        rf'\1="{config.repo_url or "https://github.com/scaledreamer/scaledreamer"}/blob/main/\3"',
        output,
    )


def without_directives(cell: dict) -> dict | None:
    "A cell as a reader of the site sees it; None for one that is hidden."
    lines = "".join(cell["source"]).splitlines(keepends=True)
    directives = {re.sub(r"^#\|\s*", "", line).strip() for line in lines if line.startswith("#|")}
    if cell["cell_type"] != "code" or not directives:
        return cell
    if "hide" in directives or any(line.startswith("default_exp") for line in directives):
        return None
    shown = [] if "echo: false" in directives else [ln for ln in lines if not ln.startswith("#|")]
    return cell | {"source": shown}


def write_pages() -> None:
    "A copy of nbs/ for MkDocs, without nbdev's directives."
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(NBS, PAGES, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for path in PAGES.rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = [c for cell in notebook["cells"] if (c := without_directives(cell))]
        path.write_text(json.dumps(notebook), encoding="utf-8")


class Targets(HTMLParser):
    "Where a page links to."

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found |= {value for key, value in attributes if key in ("href", "src") and value}


def broken_links(site: Path) -> list[str]:
    "Local links of a site that lead nowhere."
    broken = []
    for page in sorted(site.rglob("*.html")):
        parser = Targets()
        parser.feed(page.read_text(encoding="utf-8"))
        for target in sorted(parser.found):
            path = unquote(re.split(r"[#?]", target)[0])
            if not path or re.match(r"[a-z]+:|//|/", target):
                continue
            if not (page.parent / path).exists():
                broken.append(f"{page.relative_to(site)}: {target}")
    return broken


def main() -> int:
    write_pages()
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--clean"]
    built = subprocess.run(command, cwd=ROOT)
    if built.returncode:
        return built.returncode
    for line in (broken := broken_links(SITE)):
        print(line, file=sys.stderr)
    pages = len(json.loads((SITE / "search/search_index.json").read_text(encoding="utf-8"))["docs"])
    print(f"site: {SITE.relative_to(ROOT)}/index.html, {pages} entries to search")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
