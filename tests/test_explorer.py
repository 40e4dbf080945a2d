"""The curve explorer and live figures: values, threads and files, and in a real JupyterLab.

Screenshots are in pytest's folder, whose path a failure prints."""

import json
import statistics
import time
from pathlib import Path

import nbformat
import pytest
import torch
from browser import change_theme, check_answers, click_rail, execute, local_page, type_into
from nbclient import NotebookClient

from scaledreamer.core.settings import UsageError
from scaledreamer.distill.shift import deterministic_shift, random_shift
from scaledreamer.noise_error.error import ErrorCurve
from scaledreamer.widgets import curve_exploration, curve_explorer, curve_figure, live_figure
from scaledreamer.widgets import shipped_curves

T = torch.arange(20, 1000, 10)
TEXTS = ("a", "a", "b")


def falling(scale: float) -> ErrorCurve:
    "Errors that halve every 100 timesteps; those of b are three times those of a."
    return ErrorCurve(T, scale * torch.tensor([[1.0], [1.2], [3.3]]) * 2 ** (-T / 100), "x", TEXTS)


@pytest.fixture
def pair():
    return curve_exploration.CurvePair(
        falling(1.0), falling(0.5), lambda text, t: torch.full((3, 8, 8), t / 1000)
    )


def test_a_curve_that_halves_is_matched_a_hundred_later(pair):
    "e_FT is half of e_PT, so the match is at dt = 100 inside the curves, whichever the images."
    for texts in ((), ("a",), ("b",), ("b", "a")):
        curves = curve_exploration.lines(pair, texts)
        for t0 in (20, 333, 870):
            match = curve_exploration.explore(curves, t0, 0.1).match
            assert match == pytest.approx(t0 + 100, abs=0.2)
        assert curve_exploration.explore(curves, 950, 0.1).match is None


def test_one_image_has_no_band(pair):
    mean, low, high = curve_exploration.lines(pair, ["b"]).pretrained
    assert (mean == low).all() and (mean == high).all()


@pytest.mark.parametrize("shift_schedule", curve_exploration.SHIFT_SCHEDULES.values())
def test_draws_stay_in_the_schedule(pair, shift_schedule):
    curves = curve_exploration.lines(pair)
    for t0 in (20, 500, 990):
        for eta in (0.0, 0.1, 1.0):
            shown = curve_exploration.explore(curves, t0, eta, shift_schedule)
            assert t0 <= shown.draws.min() and shown.draws.max() <= 999
            assert shown.bars[1] @ shown.bars[2] == pytest.approx(len(shown.draws))
            assert eta or (shown.draws == t0).all()
            length = shift_schedule(eta).length(torch.tensor([t0]), 20, 999)
            assert bool(shown.cut) == (int(length) > 999 - t0)
    with pytest.raises(UsageError, match=r"eta is -0.1"):
        curve_exploration.explore(curves, 500, -0.1, shift_schedule)


def test_what_is_drawn_is_what_training_draws(pair):
    curves = curve_exploration.lines(pair)
    rng = torch.Generator().manual_seed(5)
    expected = random_shift(0.3)(torch.full((2000,), 620), 120, 999, rng).sort().values
    shown = curve_exploration.explore(curves, 620, 0.3, t_min=120, seed=5)
    assert torch.equal(torch.as_tensor(shown.draws), expected)
    fixed = curve_exploration.explore(curves, 620, 0.3, deterministic_shift, t_min=120)
    assert set(fixed.draws) == {620 + 150}


@pytest.mark.alone
def test_a_slider_move_takes_the_kernel_less_than_100_ms(pair):
    "Curves of 240 images at 100 timesteps; the median, because the machine may be busy."
    many = ErrorCurve(torch.arange(0, 1000, 10), torch.rand(240, 100), "x", ("a",) * 240)
    explorer = curve_explorer.CurveExplorer({"p": curve_exploration.CurvePair(many, many, pair.x0)})
    took = []
    for t0 in range(300, 320):
        start = time.perf_counter()
        explorer.t0.value = t0
        took.append(time.perf_counter() - start)
        assert f"t₀ = {t0}:" in explorer.label.value
    assert statistics.median(took) < 0.1, took


def test_another_prior_with_other_texts_and_times(pair):
    late = ErrorCurve(torch.arange(400, 800, 50), torch.rand(2, 8), "late", ("c", "d"))
    other = curve_exploration.CurvePair(late, late, pair.x0)
    explorer = curve_explorer.CurveExplorer({"one": pair, "two": other})
    explorer.prompts.value, explorer.t0.value = ("b",), 30
    explorer.prior.value = "two"
    prompts, t0 = explorer.prompts, explorer.t0
    assert (prompts.options, prompts.value) == (("c", "d"), ())
    assert (t0.min, t0.value, t0.max) == (400, 400, 750)
    assert list(explorer.figure.data[1].x) == late.timesteps.tolist()
    assert explorer.figure.data[1].name == "late"
    explorer.prior.value = "one"
    assert (explorer.t0.min, explorer.t0.max, explorer.shown.t0) == (20, 990, 400)


def test_pictures_come_later_and_a_prior_that_fails_leaves_the_curves(pair):
    def fail():
        raise OSError("the disk is gone")

    late = shipped_curves.LazyX0(fail, T)
    lazy = curve_exploration.CurvePair(pair.pretrained, pair.finetuned, late)
    explorer = curve_explorer.CurveExplorer({"lazy": lazy})
    title = explorer.figure.layout.annotations[0]
    for _ in range(100):
        if "no picture" in title.text:
            break
        time.sleep(0.05)
    assert title.text == "a<br>no picture: the disk is gone"
    explorer.t0.value = 300
    assert list(explorer.figure.data[4].x)[0] == 300


def test_the_state_of_a_figure_is_its_present_figure():
    figure = live_figure.LiveFigure([{"y": [1, 2]}])
    for value in ([3, 4], [5, 6]):
        figure.data[0].y = value
        assert list(figure.get_state()["_widget_data"][0]["y"]) == value


def test_an_executed_notebook_is_small_and_has_a_picture(tmp_path):
    "With the state of its widgets, which nbclient stores; plotly itself is 5 MB."
    code = "from scaledreamer.widgets.curve_explorer import CurveExplorer\nCurveExplorer()"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    [output] = notebook.cells[0].outputs
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(output.data)
    assert "widgets" in notebook.metadata
    assert len(json.dumps(output)) < 300_000 and len(nbformat.writes(notebook)) < 700_000


# in a browser

EXPLORER = """
from scaledreamer.widgets.curve_explorer import CurveExplorer
explorer = CurveExplorer(own_shift=lambda t, t_min, last: t.nothing)
explorer.shift_schedule.index = 0
explorer.t0.value = 440
explorer
"""
LABEL = "document.querySelector('.jp-OutputArea-output [role=status]').textContent"


def wait_for_figures(page, condition: str, number: int = 1) -> None:
    "Until so many figures are in the page, and traces d and layout l of all of them are such."
    page.wait_for_function(
        f"""() => {{
          const found = [...document.querySelectorAll('.js-plotly-plot')];
          const fits = ({{ _fullData: d, layout: l }}) => {condition};
          return found.length === {number} && found.every(fits);
        }}"""
    )


def choose(page, which: int, option: str) -> None:
    page.locator(".widget-dropdown select").nth(which).select_option(option)


def test_the_explorer_in_a_lab(lab, browser, tmp_path):
    with lab.notebook(browser, tmp_path, [EXPLORER]) as page:
        label = page.locator(".jp-OutputArea-output [role=status]").first
        wait_for_figures(page, "d[4].x[0] === 440 && l.annotations[0].text.includes('at t₀')")
        page.locator(".widget-slider .noUi-handle").first.focus()
        check_answers(page, LABEL, ["ArrowRight"] * 25 + ["ArrowLeft"] * 25)
        assert label.inner_text().startswith("t₀ = 440:")
        typed = page.locator(".widget-text input").first
        type_into(typed, "5000")
        page.locator("[role=status]:has-text('t₀ is 5000: from 20 to 9')").wait_for()
        page.screenshot(path=tmp_path / "typed.png")
        assert int(typed.input_value()) < 1000
        type_into(typed, "440")
        page.locator("[role=status]:has-text('t₀ is 5000')").wait_for(state="detached")
        choose(page, 0, "exact mixture, renders")
        wait_for_figures(page, "d[1].name === 'e_PT, exact mixture' && l.shapes[0].y1 === 1")
        choose(page, 1, "own function")
        page.wait_for_function("() => document.body.innerText.includes('shift function fails')")
        choose(page, 1, "constant: η(last - t_min)")
        wait_for_figures(page, "l.shapes[0].x0 === 537 && l.annotations[0].text.includes('at t₀')")
        page.locator(".jupyter-widget-Collapse-header").last.click()
        page.locator("button:has-text('data (CSV)')").click()
        page.wait_for_function("() => document.body.innerText.includes('curves-t440.csv')")
        assert (lab.home / "curves-t440.csv").read_text().startswith("t,pt_mean,pt_low,pt_high,ft")
        execute(page, "notebook:create-output-view")
        wait_for_figures(page, "d[4].x[0] === 440 && d[3].name === 'e_FT, exact mixture'", 2)
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / "views.png")
        change_theme(page, "JupyterLab Dark")
        page.wait_for_function(
            "() => document.querySelector('.js-plotly-plot')._fullLayout.font.color.includes('255')"
        )
        page.screenshot(path=tmp_path / "dark.png")
        change_theme(page, "JupyterLab Light")
        execute(page, "application:close")  # the second view
        execute(page, "docmanager:save")
        page.wait_for_timeout(1000)
        assert 20_000 < (lab.home / f"{tmp_path.name}.ipynb").stat().st_size < 1_000_000
        page.goto(f"{lab.address}/lab/tree/{tmp_path.name}.ipynb?reset")
        wait_for_figures(page, "d[4].x[0] === 440 && l.shapes[0].x0 === 537")
        assert label.inner_text().startswith("t₀ = 440: the schedule draws Δt = 97;")
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / "reloaded.png")


def test_a_page_of_curves_needs_no_kernel_and_no_network(browser, tmp_path, pair):
    curve_figure.save_curve_page(tmp_path / "curve.html", pair, every=10)
    with local_page(browser, tmp_path, tmp_path / "curve.html") as page:
        wait_for_figures(page, "d[4].x[0] === 20 && l.shapes[0].x0 === 20")
        page.screenshot(path=tmp_path / "curve.png")
        click_rail(page, 0.7)
        wait_for_figures(page, "d[4].x[0] > 20 && l.shapes[0].x0 === d[4].x[0]")
        page.wait_for_timeout(300)
        page.screenshot(path=tmp_path / "curve-later.png")


@pytest.mark.parametrize(
    "path",
    [*Path(__file__).resolve().parent.parent.glob("nbs/81_widgets/*.ipynb")],
    ids=lambda path: path.stem,
)
def test_no_widget_is_committed(path):
    "Without its kernel a widget is shown as an error."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds
