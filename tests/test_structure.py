"""What no notebook can check about itself: the exported library imports and names nothing that is
missing, imports point back, and every generated file is what its source makes it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "scaledreamer"
NOTEBOOKS = sorted(
    path
    for path in NBS.rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
)
SPACE = ("camera", "field", "rendering", "generator")  # 3D stages know nothing of the 2D ones
IMAGE = ("prior", "distill", "noise_error")  # except the following module; `training` joins the two
SHARED = "scaledreamer.prior.base"  # what a text embedding is


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    found = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    }
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=os.environ | found,
        capture_output=True,
        text=True,
        check=False,
    )


def name(path: Path) -> str:
    return path.relative_to(NBS).as_posix()


@cache
def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(path: Path) -> list[str]:
    return [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]


def exported(path: Path) -> list[str]:
    return [text for text in code(path) if re.search(r"^#\|\s*export\b", text, re.MULTILINE)]


def is_evidence(text: str) -> bool:
    "Code that is neither exported nor only imports and comments."
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return not re.search(r"^#\|\s*(export|default_exp)\b", text, re.MULTILINE) and not all(
        line.startswith(("import ", "from ", "%")) for line in lines
    )


def module(path: Path) -> str | None:
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code(path)), re.MULTILINE)
    return found and f"scaledreamer.{found[1]}"


ROOMS = {module(path): path for path in NOTEBOOKS if module(path)}


STAGES = sorted(path for path in NBS.iterdir() if re.match(r"\d", path.name))


def place(path: Path) -> tuple[int, int]:
    "The (stage number, room number) of a notebook; notebooks without numbers come last."
    numbers = [re.match(r"(\d\d)_", part) for part in (path.parent.name, path.name)]
    return tuple(int(found[1]) for found in numbers) if all(numbers) else (100, 0)


def imported(text: str) -> set[str]:
    "Names of modules of ours that a piece of code imports."
    names = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "scaledreamer"
        ):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner if inner & ROOMS.keys() else {node.module}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name for alias in node.names if alias.name.split(".")[0] == "scaledreamer"
            }
    return names


# the library


def test_every_module_imports_alone():
    "In a fresh process without the checks of conftest.py, with nothing of ours imported before."
    script = """
import importlib, sys, warnings
for name in sys.argv[1:]:
    for old in [m for m in sys.modules if m.split(".")[0] == "scaledreamer"]:
        del sys.modules[old]
    importlib.import_module(name)
"""
    result = run(sys.executable, "-c", script, "scaledreamer", *sorted(ROOMS))
    assert result.returncode == 0, result.stderr
    assert not result.stdout, f"an import prints: {result.stdout}"


def test_every_name_is_there():
    rules = "F401,F811,F821,E701,E702"
    result = run(sys.executable, "-m", "ruff", "check", "--isolated", "--select", rules, LIB)
    assert result.returncode == 0, result.stdout + result.stderr


def test_notebooks_and_tests_are_formatted_and_linted():
    for command in (("format", "--check"), ("check",)):
        result = run(sys.executable, "-m", "ruff", *command, "nbs", "tests", "tools", "setup.py")
        assert result.returncode == 0, result.stdout + result.stderr


def test_exported_lines_have_at_most_100_columns():
    "All but the list `__all__`, which nbdev wraps in its own way."
    long = []
    for path in LIB.rglob("*.py"):
        text = re.sub(
            r"^__all__ = \[.*?\]", "", path.read_text(encoding="utf-8"), flags=re.M | re.S
        )
        if path.name != "_modidx.py":
            long += [f"{path}: {line}" for line in text.splitlines() if len(line) > 100]
    assert not long, "\n".join(long)


@pytest.mark.alone
def test_importing_the_package_is_fast():
    script = (
        "import time; t = time.perf_counter(); import scaledreamer; print(time.perf_counter() - t)"
    )
    assert min(float(run(sys.executable, "-c", script).stdout) for _ in range(3)) < 0.3


def test_the_names_that_matter_are_there_and_are_what_they_seem():
    script = """
import scaledreamer as sd
for name in sd.__all__:
    assert name in dir(sd) and callable(getattr(sd, name)), name
from scaledreamer.widgets.jobs import train
assert sd.train is train and 20 <= len(sd.__all__) <= 45
try: sd.nothing
except AttributeError as error: assert "no attribute 'nothing'" in str(error)
"""
    result = run(sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr


def test_no_module_without_a_notebook():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in LIB.rglob("*.py")}
    plain = ("__init__", "._modidx", "scaledreamer.__main__")  # `python -m scaledreamer`
    assert {m for m in modules if not m.endswith(plain)} == set(ROOMS)


# the notebooks


def test_every_stage_and_every_room_has_a_number_of_its_own():
    for folder in (NBS, *STAGES):
        paths = STAGES if folder == NBS else [path for path in NOTEBOOKS if path.parent == folder]
        numbers = [re.match(r"(\d\d)_\w", path.name) for path in paths]
        assert all(numbers), f"{folder.name}: every name starts with two digits and an underscore"
        assert len({found[1] for found in numbers}) == len(paths), (
            f"a number twice in {folder.name}"
        )


def test_no_two_modules_and_no_two_public_names_are_spelt_alike():
    "`from scaledreamer.X import name` means one thing, wherever X is."
    stems = Counter(path.stem for path in LIB.rglob("*.py") if path.stem != "__init__")
    assert not [stem for stem, count in stems.items() if count > 1], "modules spelt alike"
    places = defaultdict(list)
    for path in LIB.glob("*/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                for exported_name in ast.literal_eval(node.value):
                    places[exported_name].append(path.relative_to(LIB).as_posix())
    assert not {key: where for key, where in places.items() if len(where) > 1}, "names spelt alike"


@pytest.mark.parametrize("path", ROOMS.values(), ids=name)
def test_a_room_is_where_its_name_says(path):
    assert module(path) == f"scaledreamer.{path.parent.name[3:]}.{path.stem[3:]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_imports_point_back(path):
    for other in imported("\n".join(exported(path))):
        assert other in ROOMS, f"{name(path)} imports {other}, which no notebook exports"
        assert place(ROOMS[other]) < place(path), f"{name(path)} imports {other}, which comes later"
        stage, seen = path.parent.name[3:], other.split(".")[1]
        assert stage not in SPACE or seen not in IMAGE or other == SHARED, (
            f"{name(path)} imports {other} of the 2D arm"
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_sizes(path):
    assert path.stat().st_size <= 400_000
    assert sum(len(text.splitlines()) for text in code(path)) <= 400, (
        "more than 400 lines of code: split the room"
    )
    for text in exported(path):
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#|")]
        assert len(lines) <= 40, (
            f"an export cell of {len(lines)} lines (at most 40) starts with {lines[0]}"
        )
    evidence = sum(map(is_evidence, code(path)))
    assert evidence >= 0.9 * len(exported(path)), (
        f"{evidence} cells of evidence for {len(exported(path))} exported ones"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_title_and_claim(path):
    "The map, the site and the module's docstring are made of them."
    page = cells(path)[1 if path == NBS / "start.ipynb" else 0]  # it starts with a cell to run
    lines = source(page).splitlines()
    claims = [line for line in lines if line.startswith("> ")]
    assert lines[0].startswith("# ") and len(claims) == 1
    assert len(claims[0]) <= 96, "it becomes a docstring of one line"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_prose_has_at_most_100_columns(path):
    "Except tables, links, images and formulas, which cannot be broken."
    for cell in cells(path):
        if cell["cell_type"] == "markdown":
            fenced = re.sub(r"```.*?```", "", source(cell), flags=re.DOTALL)
            for line in fenced.splitlines():
                free = re.match(r"\s*(\||!\[|<|\$\$|> )|.*\]\(\S{40,}", line)
                assert len(line) <= 100 or free, line


@pytest.mark.parametrize("path", [ROOT / "README.md", *NOTEBOOKS], ids=lambda path: path.name)
def test_nothing_speaks_of_how_it_was_made(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(map(source, cells(path)))
    found = re.findall(r"\bFACTS\b|\bhouse rules?\b|\bthe bars?\b(?! chart)|\bearlier form\b", text)
    assert not found, found


def test_most_notebooks_show_a_picture_or_a_table():
    kinds = {"image/png", "text/html", "text/markdown"}
    shown = [
        path
        for path in NOTEBOOKS
        if any(
            kinds & output.get("data", {}).keys()
            for c in cells(path)
            for output in c.get("outputs", [])
        )
    ]
    assert len(shown) >= 80


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_pictures_have_at_least_100_dots_per_inch(path):
    assert not re.findall(r"dpi=\d\d\b", "\n".join(code(path)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_committed_as_it_ran(path):
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    assert outputs or not any(map(is_evidence, code(path))), "committed without any output: run it"
    for output in outputs:
        assert output["output_type"] != "error", output
        assert output.get("name") != "stderr", f"something on stderr: {output['text']}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_nothing_of_one_machine(path):
    "No absolute path, no timing, in what is written or shown; pictures are not text."
    texts = [source(cell) for cell in cells(path)]
    for output in (output for cell in cells(path) for output in cell.get("outputs", [])):
        shown = {"text/": output.get("text", "")} | output.get("data", {})
        texts += ["".join(value) for kind, value in shown.items() if kind.startswith("text/")]
    for text in texts:
        assert not re.search(r"(?<![\w./:])/(home|root|work|tmp|Users|mnt|opt|usr|var)/\w", text), (
            text
        )
        assert not re.search(r"\b(CPU times|Wall time)\b|\bit/s\b", text), text


# generated files


def tree(folder: Path, pattern: str) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob(pattern))
    }


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    "A copy of the notebooks alone, cleaned and exported."
    folder = tmp_path_factory.mktemp("fresh") / "repository"
    for path in [*NOTEBOOKS, ROOT / "settings.ini", LIB / "__init__.py", LIB / "__main__.py"]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for command in ("nbdev_clean", "nbdev_export"):
        result = run(Path(sys.executable).parent / command, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


def test_the_library_is_what_the_notebooks_export(fresh):
    assert not differing(tree(LIB, "*.py"), tree(fresh / "scaledreamer", "*.py")), (
        "run nbdev_export"
    )


def test_the_notebooks_are_clean(fresh):
    ours = {name(path): path.read_bytes() for path in NOTEBOOKS}
    assert not differing(ours, tree(fresh / "nbs", "*.ipynb")), "run nbdev_clean"


def test_the_readme_is_short_and_has_code_that_runs():
    readme, index = ROOT / "README.md", NBS / "index.ipynb"
    assert readme.stat().st_size <= 8192
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert sum(len([line for line in block.splitlines() if line.strip()]) for block in blocks) >= 12
    assert all(block.strip() in "\n\n".join(code(index)) for block in blocks)


def test_the_readme_is_what_the_index_says():
    result = run(sys.executable, ROOT / "tools/readme.py", "--check")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", [ROOT / "README.md", *NOTEBOOKS], ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")
    targets = {
        "".join(found).partition("#")[0]
        for found in re.findall(r"""\]\(([^)\s]+)\)|\b(?:src|href)="([^"]+)\"""", text)
    }
    local = {target for target in targets if target and not re.match(r"[a-z]+:", target)}
    assert not {target for target in local if not (path.parent / target).exists()}, (
        "links that lead nowhere"
    )


def test_the_site_describes_pictures_and_finds_broken_links(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import build_site

    picture = '<img alt="No description has been provided for this image">'
    page = f"<h2>Noise</h2>{picture}<h2>A &amp; <em>B</em></h2>{picture}"
    assert re.findall('alt="(.*?)"', build_site.described(page)) == [
        "Figure: Noise",
        "Figure: A &amp; B",
    ]
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x"></a><a href="c.html"></a><a href="#y"></a>'
    )
    (tmp_path / "b.html").write_text('<img src="https://example.org/x.png">')
    assert build_site.broken_links(tmp_path) == ["a.html: c.html"]
    hidden = {"cell_type": "code", "source": ["#| hide\n", "x = 1\n"]}
    shown = {"cell_type": "code", "source": ["#| export\n", "x = 1\n"]}
    assert build_site.without_directives(hidden) is None
    assert build_site.without_directives(shown)["source"] == ["x = 1\n"]
