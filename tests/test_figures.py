"""Our figures in a fresh notebook kernel leave the reader's own figures as they were."""

import nbformat
from nbclient import NotebookClient

OURS = (
    "import torch\nfrom scaledreamer.core.figures import curves, show_images",
    "curves([0, 1], {'a': [1, 2]})",
    "import matplotlib.pyplot as plt\nbefore = dict(plt.rcParams)",
    "show_images(torch.rand(2, 3, 4, 4))",
    "print(before == dict(plt.rcParams), plt.get_fignums())",
)
THEIRS = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nNone"


def outputs(cells) -> list[str]:
    'Runs the cells in a kernel of their own: per cell "picture", the printed text or "".'
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    NotebookClient(notebook, kernel_name="python3").execute()
    found = []
    for cell in notebook.cells:
        pictures = ["image/png" in output.get("data", {}) for output in cell.outputs]
        printed = [o.text for o in cell.outputs if o.get("name") == "stdout"]
        found.append("picture" if any(pictures) else "".join(printed))
    return found


def test_a_readers_own_figure_shows_after_ours(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel chooses its own
    shown = ["", "picture", "", "picture", "True []\n"]
    assert outputs([*OURS, THEIRS]) == [*shown, "picture"]
    assert outputs([THEIRS, *OURS, THEIRS]) == ["picture", *shown, "picture"]
