"""The scene viewer and the slider between two prompts: the kernel's side, and a walk in a real
JupyterLab in headless Chromium. Screenshots are in pytest's folder, whose path a failure prints."""

import io
import statistics
import time
from dataclasses import replace

import ipywidgets
import pytest
import torch
from browser import change_theme
from PIL import Image

from scaledreamer.core.settings import UsageError
from scaledreamer.field.scene import FogScene, SphereScene
from scaledreamer.rendering.render_settings import RELEASE, RenderSettings
from scaledreamer.rendering.volume import render_views
from scaledreamer.training.job import TrainingJob
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.widgets.scene_pictures import MODES, ScenePainter, SceneView, encode_png
from scaledreamer.widgets.scene_pictures import mode_image, paint
from scaledreamer.widgets.scene_source import GivenScene, RunScenes
from scaledreamer.widgets.scene_viewer import SceneViewer
from scaledreamer.widgets.text_slider import TextSlider

TINY = TrainSettings(
    prompt=("a red car", "a blue cube"), prompts_per_step=1, resolution=16, steps=4
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A hyper-ingp run of four steps."
    return TrainingJob(tmp_path_factory.mktemp("scene") / "run", TINY).wait(show=False)


@pytest.fixture
def show():
    "Makes viewers, and closes them."
    opened = []

    def make(kind, *arguments, **options):
        opened.append(kind(*arguments, **options))
        return opened[-1]

    yield make
    for viewer in opened:
        viewer.close()
        viewer.thread.join(30)


def until(true, viewer=None, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, viewer and viewer.message
        time.sleep(0.01)


def at_rest(viewer):
    "Until the picture is that of the present state, at full size."
    until(lambda: viewer.shown and viewer.shown[::2] == (viewer.view(), viewer.size), viewer)


# pictures


@pytest.mark.parametrize("text", ["a red car", "a blue cube"])
def test_pictures_are_those_of_the_renderer(run, text):
    "In any order of views, with the grid that is kept: as `render_views` without it."
    source = RunScenes(run)
    source.refresh()
    painter, settings = ScenePainter(source), run.settings.render
    for mode in MODES:
        for azimuth in (0.0, 77.0):
            view = SceneView((text,), azimuth=azimuth, mode=mode)
            ours = paint(painter, view, 96)["learnt"]
            full = replace(settings, normals="finite")
            with torch.no_grad():
                whole = render_views(run.scene([text]), view.cameras(), 96, 96, full)
            radius = settings.bounding_radius
            bounds = (view.distance - radius, view.distance + radius)
            torch.testing.assert_close(ours, mode_image(whole, mode, bounds), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_a_ball(mode):
    "Colour, normal, depth and opacity in the middle and in the corner, in closed form."
    sharp = RenderSettings(beta=0.003, samples=24, proposal_grid=64, proposal_probes=48)
    ball = SphereScene(torch.tensor([0.5]), colors=torch.tensor([[0.2, 0.4, 0.6]]))
    view = SceneView(azimuth=90.0, elevation=0.0, mode=mode, background="grey")
    picture = paint(ScenePainter(GivenScene(ball, sharp)), view, 33)["learnt"]
    nearest = 0.5 / 2  # of the depths from distance - 1 to distance + 1
    middle = {
        "color": (0.2, 0.4, 0.6),
        "normal": (0.5, 1.0, 0.5),  # toward +y
        "depth": (1 - 0.85 * nearest,) * 3,
        "opacity": (1.0,) * 3,
    }[mode]
    corner = 0.0 if mode == "opacity" else 0.5
    torch.testing.assert_close(picture[:, 16, 16], torch.tensor(middle), rtol=0, atol=0.02)
    torch.testing.assert_close(picture[:, 0, 0], torch.full((3,), corner), rtol=0, atol=0.01)


def test_densities_and_other_samplers_are_shown():
    for settings in (RenderSettings(), replace(RELEASE, samples=8, proposal_probes=8)):
        for mode in MODES:
            painter = ScenePainter(GivenScene(FogScene(), settings))
            assert paint(painter, SceneView(mode=mode), 16)["learnt"].isfinite().all()


# the kernel


def test_a_turned_camera_needs_neither_scene_nor_truth_of_before(run, show):
    viewer = show(SceneViewer, run, "a red car", size=48)
    at_rest(viewer)
    scene = viewer.painter.scene(viewer.view())
    viewer.azimuth = 120.0
    at_rest(viewer)
    assert viewer.painter.scene(viewer.view()) is scene
    picture = Image.open(io.BytesIO(viewer.frame["pictures"][0]))
    expected = paint(ScenePainter(viewer.source), viewer.view(), 48)["learnt"]
    shown = torch.tensor(bytearray(picture.tobytes())).view(48, 48, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(shown, expected, rtol=0, atol=0.5 / 255 + 1e-4)


def test_a_picture_in_motion_costs_less_than_half_of_one_at_rest(run, traceable):
    "Processor time without checks of types: 64 x 64 pixels beside 192 x 192, both with the truth."
    source = RunScenes(run)
    source.refresh()
    painter, took = ScenePainter(source), {64: [], 192: []}
    for azimuth in range(9):
        for size, times in took.items():
            start = time.process_time()
            pictures = paint(painter, SceneView(("a red car",), azimuth=float(azimuth)), size)
            assert [*map(encode_png, pictures.values())]
            times.append(time.process_time() - start)
    moving, resting = map(statistics.median, took.values())
    print(f"processor time: {moving * 1000:.0f} ms in motion, {resting * 1000:.0f} ms at rest")
    assert moving < resting / 2, took  # a ninth of the pixels, and costs that do not shrink


def test_linked_viewers_turn_together(run, show):
    one, other = (show(SceneViewer, run, text, size=32) for text in TINY.prompt)
    ipywidgets.link((one, "azimuth"), (other, "azimuth"))
    one.azimuth = -70.0
    at_rest(one), at_rest(other)
    assert other.shown[0].azimuth == -70.0
    other.azimuth = 12.0
    at_rest(one), at_rest(other)
    assert one.shown[0].azimuth == 12.0


def test_moves_are_not_queued(run, show):
    "A hundred moves in a moment: few pictures, the last one is that of the last move."
    viewer, sizes = show(SceneViewer, run, "a red car", size=48, drag_size=16), []
    at_rest(viewer)
    viewer.observe(lambda change: sizes.append(change["new"]["pixels"]), "frame")
    for azimuth in range(100):
        viewer.azimuth = float(azimuth)
    at_rest(viewer)
    assert viewer.shown[0].azimuth == 99.0 and len(sizes) < 40 and sizes[-1] == 48


def test_a_request_is_answered_even_if_nothing_changed(run, show):
    viewer = show(SceneViewer, run, "a red car", size=32)
    at_rest(viewer)
    frame = viewer.frame
    viewer.request = 5
    until(lambda: viewer.answered == 5, viewer)
    assert viewer.frame is frame


def test_an_error_is_a_sentence_and_the_viewer_stays_usable(run, show):
    viewer = show(SceneViewer, run, "a red car", size=32)
    at_rest(viewer)
    viewer.text = "a red car " * 100
    until(lambda: "tokens" in viewer.message, viewer)
    viewer.azimuth = 100.0  # the last good scene can still be turned
    at_rest(viewer)
    assert viewer.shown[0].texts == ("a red car",) and "tokens" in viewer.message
    assert viewer.frame["titles"] == ["learnt", "truth"]
    viewer.text = ""
    until(lambda: not viewer.message, viewer)
    assert viewer.text == "a red car"
    viewer.text = "a blue cube"
    at_rest(viewer)
    until(lambda: not viewer.message, viewer)
    assert viewer.shown[0].texts == ("a blue cube",)


def test_a_picture_stays_in_the_output(run, show):
    "For a page without kernel; at the first display it is there within a moment, and is small."
    for kind in (SceneViewer, TextSlider):
        viewer = show(kind, run)
        both, alone = viewer.outputs()
        assert both["image/png"] in alone["text/html"] and len(alone["text/html"]) < 100_000
        assert viewer.twin in alone["text/html"]


def test_weights_that_are_not_finite_are_said(run, show):
    broken = SphereScene(torch.tensor([0.5]), colors=torch.tensor([[float("nan")] * 3]))
    viewer = show(SceneViewer, broken, size=32)
    until(lambda: "not finite" in viewer.message, viewer)


def test_a_job_is_followed_to_its_end(tmp_path, show):
    "Pictures while it trains, of whole steps; requested by a page, and the last one is the end's."
    job = TrainingJob(tmp_path / "run", replace(TINY, steps=40))
    viewer = show(SceneViewer, job, size=32)
    viewer.source.every = 0.05
    steps = set()
    while job.status not in ("finished", "failed") or viewer.live:
        viewer.request += 1
        until(lambda: viewer.answered == viewer.request, viewer)
        steps.add(viewer.step)
    run = job.wait(show=False)
    at_rest(viewer)
    assert len(steps) > 3 and viewer.step == 40
    with torch.no_grad():
        view = viewer.view()
        ours, theirs = viewer.painter.learnt(view, 32).rgb, run.scene([viewer.text])
    whole = render_views(theirs, view.cameras(), 32, 32, run.settings.render)
    torch.testing.assert_close(ours, whole.rgb, rtol=0, atol=1e-4)


def test_a_viewer_does_not_change_the_training(tmp_path, run, show):
    "The weights after four steps are those of a run that nobody watched, bit for bit."
    job = TrainingJob(tmp_path / "run", TINY)
    viewer = show(SceneViewer, job, size=32)
    viewer.source.every = 0.0
    while job.status not in ("finished", "failed"):
        viewer.azimuth += 1.0
        viewer.request += 1
        time.sleep(0.005)
    watched = job.wait(show=False)
    for ours, theirs in zip(watched.generator.parameters(), run.generator.parameters()):
        assert torch.equal(ours, theirs)


def test_a_job_that_fails_says_so(tmp_path, show):
    def refuse(width):
        raise UsageError("no generator for this width")

    own = replace(TINY, generator="own")
    job = TrainingJob(tmp_path / "run", own, make_generator=refuse)
    viewer = show(SceneViewer, job)
    until(lambda: viewer.message == "no generator for this width", viewer)


def test_values_from_a_page_or_a_cell_that_are_out_of_range(show):
    viewer = show(SceneViewer, SphereScene(torch.tensor([0.5])), size=32)
    viewer.elevation, viewer.distance = 500.0, -3.0
    at_rest(viewer)
    assert (viewer.elevation, viewer.message) == (90.0, "")
    assert viewer.distance == pytest.approx(0.75 * viewer.home["distance"])
    with pytest.raises(Exception, match="mode"):
        viewer.mode = "colours"


def test_the_slider_has_both_prompts_at_its_ends(run, show):
    slider = show(TextSlider, run, size=32)
    for part, text in ((0.0, "a red car"), (1.0, "a blue cube")):
        slider.part = part
        at_rest(slider)
        alone = paint(ScenePainter(slider.source), SceneView((text,)), 32)["learnt"]
        ours = paint(slider.painter, slider.view(), 32)["learnt"]
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5)
    assert slider.frame["titles"] == ["truth: a red car", "learnt", "truth: a blue cube"]


def test_one_scene_for_every_text_is_no_slider(tmp_path, show):
    "A prompt-specific generator: a sentence in the slider, and no choice of prompts in the viewer."
    alone = replace(TINY, generator="ingp", prompt=("a red car",), steps=1)
    run = TrainingJob(tmp_path / "run", alone).wait(show=False)
    slider = show(TextSlider, run, "a red car", "a blue cube")
    until(lambda: "nothing between two prompts" in slider.message, slider)
    assert slider.frame == {}
    viewer = show(SceneViewer, run, size=32)
    at_rest(viewer)
    assert (viewer.prompts, viewer.text) == ([], "a red car")
    wrong = show(SceneViewer, run, "a blue cube")
    until(lambda: "whatever the text" in wrong.message, wrong)


# in a browser

VIEW = "document.querySelector('.scaledreamer-scene').view"
DRAG_START = f"""() => {{
  const view = {VIEW};
  window.pictures = [];
  view.model.on('change:frame', () => window.pictures.push(view.model.get('frame').pixels));
}}"""


def wait_for_state(page, condition: str) -> None:
    "Until the model m of the viewer is such."
    page.wait_for_function(f"() => {{ const m = {VIEW}.model; return {condition}; }}")


def wait_for_rest(page, size: int = 192) -> None:
    "Until a full picture of the present state is drawn."
    wait_for_state(
        page, f"m.get('frame').pixels === {size} && m.get('answered') === m.get('request')"
    )
    page.wait_for_function(f"(size) => {VIEW}.canvases?.[0].width === size", arg=size)


def drag(page, seconds: float, steps: int = 40) -> int:
    "Drag the picture to and fro; the number of pictures that were drawn meanwhile."
    box = page.locator(".scaledreamer-scene canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    before, start, i = page.evaluate(f"() => {VIEW}.drawn"), time.monotonic(), 0
    while time.monotonic() - start < seconds:
        i += 1
        page.mouse.move(x + 100 * abs((i / steps) % 2 - 1) - 50, y + i % 8)
        page.wait_for_timeout(10)
    drawn = page.evaluate(f"() => {VIEW}.drawn") - before
    page.mouse.up()
    return drawn


def painting(log, start: float, seconds: float) -> tuple[int, float]:
    "How many pictures the kernel painted from a time on, and in which share of the time."
    lines = [[*map(float, line.split())] for line in log.read_text().splitlines()]
    parts = [min(end, start + seconds) - max(begin, start) for begin, end in lines]
    return sum(x > 0 for x in parts), sum(max(x, 0.0) for x in parts) / seconds


def test_a_scene_is_orbited_in_a_lab(lab, browser, tmp_path, run):
    """Dragging draws what is painted, and painting takes most of the time, on any machine;
    keys, wheel, modes, prompts, a second output, a reload."""
    log = tmp_path / "painted.txt"
    cells = [
        f"""
import time
from scaledreamer.widgets.scene_viewer import SceneViewer
from scaledreamer.core.settings import UsageError
class TimedViewer(SceneViewer):
    def paint(self, view, size):
        begin = time.time()
        super().paint(view, size)
        with open({str(log)!r}, "a") as log:
            print(begin, time.time(), file=log)
viewer = TimedViewer({str(run.folder)!r})
embed = viewer.source.embed
def known(text):
    if "elephant" in text:
        raise UsageError("there is no elephant")
    return embed(text)
viewer.source.embed = known
viewer""",
        "viewer",
    ]
    with lab.notebook(browser, tmp_path, cells) as page:
        wait_for_rest(page)
        page.evaluate(DRAG_START)
        start, seconds = time.time(), 5.0
        drawn = drag(page, seconds)
        painted, share = painting(log, start, seconds)
        page.screenshot(path=tmp_path / "dragged.png")
        sizes = page.evaluate("() => window.pictures")
        print(f"in a drag: {drawn / seconds:.1f} of {painted / seconds:.1f} pictures per second")
        print(f"painting takes {share:.2f} of the time")
        # the page may join two pictures in one frame; moves and encoding take the rest of the time
        assert drawn >= 0.8 * painted and share > 0.5, (drawn, painted, share)
        wait_for_rest(page)
        assert set(sizes) <= {32, 40, 48, 56, 64, 192}

        stage = page.locator(".scaledreamer-scene .pictures").first
        stage.dblclick()  # resets, and gives the focus
        wait_for_state(page, "m.get('azimuth') === 30 && m.get('elevation') === 15")
        for key in ("ArrowRight", "ArrowUp", "+"):
            page.keyboard.press(key)
        wait_for_state(page, "m.get('azimuth') === 35 && m.get('elevation') === 20")
        page.mouse.wheel(0, -100)
        wait_for_state(page, "m.get('distance') < 1.783 * 0.9 * 0.9")
        wait_for_rest(page)

        field = page.locator(".scaledreamer-scene input.text").first
        field.fill("a blue cube")
        field.press("Enter")
        wait_for_state(page, "m.get('text') === 'a blue cube'")
        for mode in ("normal", "depth", "opacity"):
            page.locator(".scaledreamer-scene select").first.select_option(mode)
            wait_for_state(page, f"m.get('mode') === '{mode}'")
            wait_for_rest(page)
            page.screenshot(path=tmp_path / f"{mode}.png")
        page.wait_for_function(  # the second output shows the same viewer
            """() => [...document.querySelectorAll('.scaledreamer-scene')].map((root) =>
              root.querySelector('select').value).join() === 'opacity,opacity'"""
        )

        field.fill("a green elephant")
        field.press("Enter")
        wait_for_state(page, "m.get('message') === 'there is no elephant'")
        page.locator(".scaledreamer-scene .pictures").first.focus()
        page.keyboard.press("ArrowRight")
        wait_for_state(page, "m.get('azimuth') !== 35 && m.get('frame').pixels === 192")
        page.screenshot(path=tmp_path / "refused.png")
        field.fill("")
        field.press("Enter")
        wait_for_state(page, "m.get('text') === 'a blue cube' && !m.get('message')")
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_timeout(1000)
        page.reload()
        page.wait_for_selector(".scaledreamer-scene canvas")
        wait_for_rest(page)
        wait_for_state(page, "m.get('mode') === 'opacity' && m.get('text') === 'a blue cube'")
        page.wait_for_function(f"() => {VIEW}.texts[0].field.value === 'a blue cube'")
        page.screenshot(path=tmp_path / "reloaded.png")
        picture = page.locator("img[alt='last picture']").first
        assert not picture.is_visible()  # where the widget lives
        current = "window.jupyterapp.shell.currentWidget"
        page.evaluate(f"() => {current}.sessionContext.shutdown()")
        page.reload()
        picture.wait_for(state="visible")
        page.screenshot(path=tmp_path / "no_kernel.png")
        assert all("model not found" in error for error in page.errors), page.errors
        page.errors.clear()


def test_the_slider_and_a_linked_viewer_in_a_lab(lab, browser, tmp_path, run):
    "By the keyboard from one prompt to the other; a viewer that is linked to it turns as well."
    cells = [
        f"""
import ipywidgets
from scaledreamer.widgets.scene_viewer import SceneViewer
from scaledreamer.widgets.text_slider import TextSlider
slider = TextSlider({str(run.folder)!r}, distance=2.5)
viewer = SceneViewer({str(run.folder)!r}, "a blue cube", size=64)
ipywidgets.link((slider, "azimuth"), (viewer, "azimuth"))
slider""",
        "viewer",
    ]
    with lab.notebook(browser, tmp_path, cells) as page:
        wait_for_rest(page)
        page.locator(".scaledreamer-scene input[type=range]").focus()
        before = page.evaluate(f"() => {VIEW}.drawn")
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        wait_for_state(page, "Math.abs(m.get('part') - 0.6) < 1e-9")
        wait_for_rest(page)
        assert page.evaluate(f"() => {VIEW}.drawn") > before
        assert page.locator(".scaledreamer-scene output").inner_text() == "60 %"
        titles = page.locator(".scaledreamer-scene figcaption").all_inner_texts()
        assert titles[:3] == ["truth: a red car", "learnt", "truth: a blue cube"]
        wait_for_state(page, "m.get('distance') === 2.5")

        page.locator(".scaledreamer-scene .pictures").first.focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(
            """() => [...document.querySelectorAll('.scaledreamer-scene')].map((root) =>
              root.view.model.get('azimuth')).join() === '25,25'"""
        )
        change_theme(page, "JupyterLab Dark")
        wait_for_rest(page)
        page.screenshot(path=tmp_path / "dark.png")
        change_theme(page, "JupyterLab Light")
