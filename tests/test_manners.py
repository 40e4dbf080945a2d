"""What every committed notebook owes its reader: outputs of moderate size, no warnings, a text for
each picture, colours that can be told apart, legends beside the data, and a picture or a table
where a widget would be blank."""

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scaledreamer.core.figures import PALETTE

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
MEGABYTE = 1_000_000
PERCEPTUAL = {"viridis", "cividis", "magma", "inferno", "plasma", "gray", "Greys", "RdBu", "PuOr"}
# greys, in matplotlib's and plotly's words; strings of digits are matplotlib's grey levels
NEUTRAL = {"black", "white", "grey", "gray", "k", "w", "none"}
COLOR_ARGUMENTS = {"color", "colors", "facecolor", "edgecolor", "ecolor", "marker_color"}
SHOWN = {"image/png", "image/svg+xml", "text/html", "text/markdown"}
DESCRIBED = {"img": "alt", "svg": "aria-label", "canvas": "aria-label", "iframe": "title"}


def cells(path: Path, kind: str) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def is_live(cell: dict) -> bool:
    return source(cell).startswith("#| live")


def text(output: dict, kind: str) -> str:
    return "".join(output.get("data", {}).get(kind, ""))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> Path:
    return request.param


class Pictures(HTMLParser):
    "Elements of a page that are pictures and have no alternative in text."

    def __init__(self, page: str) -> None:
        super().__init__()
        self.mute: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        wanted = DESCRIBED.get(tag)
        if wanted and not given.get(wanted) and given.get("aria-hidden") != "true":
            self.mute.append(self.get_starttag_text()[:100])


def test_outputs_are_small_and_without_warnings(notebook):
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            assert len(json.dumps(output)) < MEGABYTE, cell["id"]
            assert output.get("name") != "stderr", cell["id"]
            assert output["output_type"] != "error", cell["id"]
            printed = "".join(output.get("text", ""))
            assert not re.search(r"\w+Warning: |Exception ignored in", printed), cell["id"]
    assert notebook.stat().st_size < 2 * MEGABYTE


def test_pictures_have_an_alternative_in_text(notebook):
    for cell in cells(notebook, "markdown"):
        pictures = re.findall(r"!\[([^\]]*)\]\(", source(cell))
        assert all(len(alternative) > 10 for alternative in pictures), cell["id"]
        assert not Pictures(source(cell)).mute, cell["id"]
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            assert not Pictures(text(output, "text/html")).mute, cell["id"]
            if "image/png" in output.get("data", {}):
                assert text(output, "text/plain"), cell["id"]


def test_a_notebook_with_widgets_shows_something_without_a_kernel(notebook):
    code = cells(notebook, "code")
    if any(map(is_live, code)):
        shown = {kind for cell in code for out in cell["outputs"] for kind in out.get("data", {})}
        assert shown & SHOWN
    for cell in code:
        for output in cell["outputs"]:  # a widget's state is not in the file
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def calls(notebook: Path):
    "The calls in the code cells of a notebook, each with its cell."
    for cell in cells(notebook, "code"):
        lines = [line for line in source(cell).split("\n") if not line.lstrip().startswith("%")]
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.Call):
                yield cell, node


def literals(node: ast.AST) -> list[str]:
    return [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def is_allowed(color: str) -> bool:
    "Of the palette, a grey, `C0` of the palette's cycle, or a grey level."
    digits = re.fullmatch(r"#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})", color.lower())
    grey = digits and digits[1] == digits[2] == digits[3]
    level = re.fullmatch(r"0?\.\d+|C\d", color)
    return bool(color.lower() in {*PALETTE, *NEUTRAL} or grey or level or "rgba(" in color)


def test_colors_are_those_of_the_palette_or_of_a_perceptual_map(notebook):
    for cell, call in calls(notebook):
        for argument in call.keywords:
            if not isinstance(argument.value, ast.Constant):
                continue
            if argument.arg in ("cmap", "colormap"):
                assert argument.value.value in PERCEPTUAL, cell["id"]
            if argument.arg in COLOR_ARGUMENTS and isinstance(argument.value.value, str):
                assert is_allowed(argument.value.value), (cell["id"], argument.value.value)
        assert not any(word.startswith("tab:") for word in literals(call)), cell["id"]


def test_legends_are_beside_the_data(notebook):
    "`curves` has two short entries at most inside, where matplotlib finds the space empty."
    for cell, call in calls(notebook):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "legend":
            given = {argument.arg for argument in call.keywords}
            outside = any(word.startswith("outside") for word in literals(call))
            passed_on = None in given and notebook.stem == "40_figures"
            assert "bbox_to_anchor" in given or outside or passed_on, cell["id"]
