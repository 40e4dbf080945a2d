"""Before anything is imported: annotations are checked at run time, and nothing is downloaded or
sent."""

import ast
import os
import shutil
import signal
from contextlib import ExitStack, contextmanager
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a processor for each worker
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from browser import ARGUMENTS, Lab
from hypothesis import settings
from jaxtyping import _import_hook, config, install_import_hook

settings.register_profile(
    "deterministic", deadline=None, derandomize=True
)  # the same examples every time; a busy machine is no failure
settings.load_profile("deterministic")

_unchecked = _import_hook._is_no_type_check


def _is_unchecked(decorator: ast.expr) -> bool:
    "`@no_type_check`, and what numba compiles: it cannot compile a wrapper."
    compiled = {"njit", "jit", "vectorize", "guvectorize", "stencil"}
    names = {
        getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(decorator)
    }
    return _unchecked(decorator) or bool(compiled & names)


_import_hook._is_no_type_check = _is_unchecked
install_import_hook("scaledreamer", "runtime_types.check")


@contextmanager
def _locked(path: Path, alone: bool):
    import fcntl

    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # of a forked child too, which has the same file
        os.close(file)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """With several workers: a test marked `alone`, or one in a browser, waits until theirs end,
    and they wait for it."""
    with ExitStack() as held:
        if "PYTEST_XDIST_WORKER" in os.environ:
            alone = "browser" in item.fixturenames or bool(item.get_closest_marker("alone"))
            with _locked(Path(__file__).parent, True):  # in turn: none starts while one waits
                held.enter_context(_locked(Path(__file__), alone))
        return (yield)


@pytest.fixture
def traceable():
    "The annotations unchecked: torch.compile would trace every check, for minutes."
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def threads():
    "Sets how many threads torch may use, until the test ends."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def machine(monkeypatch):
    "Makes up what is installed."
    from scaledreamer.field import hash_grid

    def install(*names: str) -> None:
        monkeypatch.setattr(hash_grid, "find_spec", lambda name: name in names)
        monkeypatch.setattr(hash_grid.shutil, "which", lambda name: "cc" if name in names else None)
        hash_grid.LOOKED_UP.clear()

    monkeypatch.delenv("CC", raising=False)
    yield install
    hash_grid.LOOKED_UP.clear()


@pytest.fixture(scope="session")
def browser():
    "Chromium, without a window."
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing: pip install -e '.[dev]'"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        yield (opened := playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS)))
        opened.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):  # the browser first: no server where there is none
    "A JupyterLab with an empty folder and no settings but those of the tests."
    opened = Lab(tmp_path_factory.mktemp("lab"))
    yield opened
    opened.close()
