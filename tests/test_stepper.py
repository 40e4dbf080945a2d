"""The stepper and its page: what a learner sees, threads, refusals; and in a real JupyterLab."""

import re
import statistics
import time

import pytest
import torch
from browser import CURRENT, PLOT, change_theme, check_answers, click_rail, execute
from browser import local_page, type_into

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.toy.lockstep import Frame, Lockstep
from scaledreamer.toy.measures import mode_coverage
from scaledreamer.widgets import lockstep_frames, point_experiment, stepper

CELL = "from scaledreamer.widgets.stepper import Stepper\nstepper = Stepper()\nstepper"
LABEL = """[...document.querySelectorAll('.widget-html-content')]
  .map((one) => one.textContent).find((text) => /^step \\d/.test(text))"""
# in the kernel


class RandomParticles:
    "2,000 random particles of four methods."

    methods = dict.fromkeys(("sds", "csd", "vsd", "asd"))

    def __init__(self, refuse: int = 10**9, error: Exception | None = None):
        self.frames, self.refuse = [], refuse
        self.error = error or RunError("no further")

    def step(self):
        if len(self.frames) >= self.refuse:
            raise self.error
        points, gradients = (
            {name: torch.randn(2000, 2) for name in self.methods} for _ in range(2)
        )
        norms = {name: float(g.norm(dim=1).mean()) for name, g in gradients.items()}
        self.frames.append(
            Frame(len(self.frames), torch.full((2000,), 500), points, gradients, norms)
        )


def far(x):
    return -x.square().sum(1)


def wait_until(true, seconds: float = 60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_the_text_says_is_what_the_default_plays():
    "All four methods are on all modes in a third of the run, in two seeds of two."
    for seed in range(2):
        settings = point_experiment.point_settings(seed=seed)
        run = point_experiment.PointRecording(point_experiment.PointExperiment(settings=settings))
        run.run(100)
        for points in run.points.values():
            assert mode_coverage(points, run.target) == 1
        norms = run.frames[-1].norms
        assert 10 < norms["sds"] / norms["asd"] < 18 and 5 < norms["asd"] / norms["csd"] < 12


def test_plain_steps_leave_csd_behind_until_the_rate_makes_up_for_its_size():
    def moved(**settings):
        settings = point_experiment.point_settings(optimizer="sgd", **settings)
        experiment = point_experiment.PointExperiment(methods=("csd",), settings=settings)
        run = point_experiment.PointRecording(experiment).run(300)
        return float((run.points["csd"] - run.frames[0].points["csd"]).norm(dim=1).median())

    assert moved(lr=0.1) < 0.2 < 0.35 < moved(lr=5.0)


def test_a_recording_is_that_of_the_lockstep_with_the_same_settings():
    run = point_experiment.PointRecording(point_experiment.PointExperiment(methods=("sds", "asd")))
    start = run.points["sds"]
    methods = {name: point_experiment.POINT_METHODS[name] for name in ("sds", "asd")}
    alone = Lockstep(run.prior, methods, "ring", start, run.settings).run(20)
    run.run(20)
    for name in methods:
        assert torch.equal(alone.points[name], run.points[name])


@pytest.mark.alone
def test_a_frame_takes_the_kernel_less_than_50_ms():
    "Four methods of 2,000 particles; the median, because the machine may be busy."
    run = RandomParticles()
    view = stepper.Stepper(run, far)
    took = []
    for _ in range(20):
        run.step()
    view.scrub.max = len(run.frames) - 1
    for index in range(1, 21):
        start = time.perf_counter()
        view.scrub.value = index
        took.append(time.perf_counter() - start)
        assert view.index == index
    assert statistics.median(took) < 0.05, took


@pytest.mark.parametrize("error", [RunError("no further"), ZeroDivisionError("no further")])
def test_play_ends_where_the_run_does(error):
    view = stepper.Stepper(RandomParticles(refuse=4, error=error), far)
    view.play.value = True
    view.thread.join(30)
    assert (view.play.value, view.index) == (False, 3)
    assert "stopped: no further" in view.message.value
    view.back.click()
    assert (view.index, view.message.value) == (0, "")


def test_a_second_play_does_not_wait_for_the_first():
    view = stepper.Stepper(RandomParticles(), far, speed=2)
    for playing in (True, False, True, False):
        view.play.value = playing
    view.thread.join(30)
    before = view.index
    time.sleep(0.2)
    assert view.index == before and not view.play.value


def test_closing_ends_the_thread_and_the_other_one_plays_on():
    one, two = (stepper.Stepper(RandomParticles(), far, speed=160) for _ in range(2))
    one.play.value = two.play.value = True
    wait_until(lambda: min(one.index, two.index) > 2)
    one.close()
    one.thread.join(30)
    assert not one.thread.is_alive()
    before = two.index
    wait_until(lambda: two.index > before)
    two.close()


def test_settings_change_while_it_plays_and_frames_never_mix():
    view = stepper.Stepper(speed=160)
    view.play.value = True
    for guidance in (50.0, 20.0, 10.0):
        wait_until(lambda: view.index > 1)
        view.settings.guidance["sds"].value = guidance
        assert view.play.value
    view.play.value = False
    view.thread.join(30)
    run = view.run
    again = point_experiment.PointRecording(view.settings.current).run(run.done)
    assert run.experiment.guidance["sds"] == 10.0
    for kept, expected in zip(run.frames, again.frames, strict=True):
        assert torch.equal(kept.points["sds"], expected.points["sds"])
    view.close()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eta", 1.5, "eta is 1.5: expected a number from 0 to 1"),
        ("steps", 0, "steps is 0: expected an integer from 1 to 10^8"),
        ("seed", -1, "seed is -1: expected an integer from 0 to"),
        ("count", 10**7, "expected an integer from 2 to 5000"),
        ("lr", 0.0, "lr is 0.0: expected a number above 0 and up to 1000"),
    ],
)
def test_values_out_of_range_are_messages(name, value, message):
    view = stepper.Stepper()
    before = view.run
    view.settings.settings[name].value = value
    assert message in view.settings.message.value and view.run is before
    view.settings.last.children[-1].click()  # defaults
    assert view.settings.message.value == ""


def test_negative_guidance_is_a_message():
    view = stepper.Stepper()
    before = view.run
    view.settings.guidance["sds"].value = -5.0
    message = "guidance of sds is -5.0: expected a number from 0 to 10000"
    assert message in view.settings.message.value and view.run is before


def test_a_change_while_paused_says_that_it_starts_again():
    view = stepper.Stepper()
    view.settings.guidance["sds"].value = 50.0
    assert view.message.value == ""  # it was at step 0
    view.next.click()
    view.settings.guidance["sds"].value = 60.0
    assert (view.index, "changed: starts again at step 0" in view.message.value) == (0, True)
    view.next.click()
    assert view.message.value == ""


def test_a_method_has_one_color_and_nine_have_nine():
    def drawn(*methods):
        view = stepper.Stepper(point_experiment.PointExperiment(methods=methods))
        lines = {trace.name: trace.line.color for trace in view.figure.data if trace.name}
        dots = [trace.marker.color for trace in view.figure.data[: 2 * len(methods) : 2]]
        assert [*lines.values()] == dots
        return lines

    nine = drawn(*point_experiment.POINT_METHODS)
    assert len(set(nine.values())) == 9
    assert drawn("ism", "asd") == {name: nine[name] for name in ("ism", "asd")}


def test_a_recording_needs_its_density():
    with pytest.raises(UsageError, match="log_density is missing"):
        stepper.Stepper(RandomParticles())


# in a browser


def steps_shown(page) -> list[str]:
    "The label of each view of the stepper, up to the comma."
    found = page.locator(".widget-html-content").all_inner_texts()
    return [text.partition(",")[0] for text in found if re.match(r"step \d", text)]


def wait_for_figure(page, condition: str) -> None:
    "Until the traces d of the first figure in the page are such."
    page.wait_for_function(
        f"() => {{ const d = document.querySelector('{PLOT}')?._fullData; "
        f"return d?.length > 0 && {condition}; }}"
    )


def check_step(page) -> int:
    "The step that label and figure show, the same."
    wait = f"() => document.querySelectorAll('{PLOT}').length > 0"
    page.wait_for_function(wait)
    page.wait_for_timeout(700)  # the last frame is on its way
    step = int(steps_shown(page)[0].split()[1])
    at = f"trace.x?.length === 2 && trace.x[0] === {step} && trace.x[1] === {step}"
    wait_for_figure(page, f"d.some((trace) => {at})")
    return step


def test_the_stepper_in_a_lab(lab, browser, tmp_path):
    with lab.notebook(browser, tmp_path, [CELL]) as page:
        button = lambda name: page.locator(f"button.jupyter-button:has-text('{name}')")
        assert check_step(page) == 0
        button("step").click()
        assert check_step(page) == 2
        button("play").click()
        wait_for_figure(page, "d[8].x.length >= 12")  # norms of 12 frames
        button("pause").click()  # received while it plays
        button("play").wait_for()  # the kernel says so
        still = check_step(page)
        page.wait_for_timeout(800)
        assert check_step(page) == still, "it plays on"
        page.screenshot(path=tmp_path / "paused.png", full_page=True)

        handle = page.locator(".widget-slider .noUi-handle")
        handle.focus()
        check_answers(page, LABEL, (["ArrowLeft"] * 5 + ["ArrowRight"] * 5) * 2)
        assert check_step(page) == still

        execute(page, "docmanager:save")
        page.reload()  # the kernel lives on
        assert check_step(page) == still
        page.evaluate(f"() => {{ {CURRENT}.content.activeCellIndex = 0 }}")
        execute(page, "notebook:create-output-view")
        page.wait_for_function(f"() => document.querySelectorAll('{PLOT}').length === 2")
        assert steps_shown(page) == [f"step {still}"] * 2
        page.screenshot(path=tmp_path / "two-views.png")


def test_settings_of_the_stepper_in_a_lab(lab, browser, tmp_path):
    with lab.notebook(browser, tmp_path, [CELL]) as page:
        assert check_step(page) == 0
        page.locator("label:has-text('csd') input").first.uncheck()
        wait_for_figure(page, "d.length === 13")
        assert page.locator(".modebar").count() == 0  # it would be on the titles
        assert page.locator("[title*='a network trained on the particles']").count()
        number = page.locator(".widget-text:has-text('eta') input")
        type_into(number, "2")
        page.locator("b[role=alert]:has-text('eta is 2')").wait_for()
        page.screenshot(path=tmp_path / "refused.png")
        type_into(number, "0.3")
        page.locator("b[role=alert]").wait_for(state="detached")
        page.locator(".widget-dropdown:has-text('optimizer') select").select_option("sgd")
        page.locator("button.jupyter-button:has-text('play')").press("Space")  # by the keyboard
        wait_for_figure(page, "d[6].x.length >= 6")
        page.locator("button.jupyter-button:has-text('reset')").click()
        assert check_step(page) == 0
        change_theme(page, "JupyterLab Dark")
        page.wait_for_timeout(1500)
        page.screenshot(path=tmp_path / "dark.png")
        change_theme(page, "JupyterLab Light")


def test_the_page_of_a_recording_needs_no_kernel_and_no_network(browser, tmp_path):
    run = point_experiment.PointRecording()
    run.run(40)
    path = tmp_path / "steps.html"
    lockstep_frames.save_lockstep_page(path, run.frames, run.log_density)
    with local_page(browser, tmp_path, path) as page:
        first = "() => document.querySelector('.js-plotly-plot')._fullData[12].x[0]"
        assert page.evaluate(first) == 0
        page.screenshot(path=tmp_path / "steps.png")
        click_rail(page, 0.999)
        page.wait_for_function(f"{first} === 38")
        page.wait_for_timeout(300)
        page.screenshot(path=tmp_path / "steps-end.png")
        page.locator(".updatemenu-button:has-text('play')").click()
        page.wait_for_function(f"{first} < 38")  # again from the start
