"""Real runs compared: right differences, damage, other corpora, unfinished runs, small output."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.training.run_folder import read_run_settings
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import run_training
from scaledreamer.view import run_comparison
from scaledreamer.view.run_comparison import compare_runs

TEXTS = ("a red ball", "a blue cube")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A finished training of a tiny run, without an evaluation and without pictures."
    folder = tmp_path_factory.mktemp("compare") / "tiny"
    settings = TrainSettings(
        prior="mixture", prompt=TEXTS, generator="hyper-ingp", prompts_per_step=1,
        resolution=16, steps=6, log_every=1,
    )  # fmt: skip
    run_training(folder, settings)
    return folder


@pytest.fixture
def pair(trained, tmp_path):
    "Two copies with results: the other is 0.1 and 0.3 better."
    folders = [tmp_path / "first", tmp_path / "other"]
    for folder, gains in zip(folders, ((0, 0), (0.1, 0.3))):
        shutil.copytree(trained, folder)
        rows = [
            {"id": f"{i:04d}", "text": text, "volume_iou": 0.5 + gain, "sim": 0.8}
            for i, (text, gain) in enumerate(zip(TEXTS, gains))
        ]
        mean = float(np.mean([row["volume_iou"] for row in rows]))
        result = {"volume_iou": mean, "sim": 0.8, "train_seconds": 2.0, "per_prompt": rows}
        (folder / "eval.json").write_text(json.dumps(result))
    return folders


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_only_the_settings_that_differ_are_shown(pair):
    assert run_comparison.setting_differences(compare_runs(*pair).records) == {}
    edit(pair[1], seed=3)
    assert read_run_settings(pair[1]).seed == 3
    assert run_comparison.setting_differences(compare_runs(*pair).records) == {"seed": ["0", "3"]}


def test_differences_are_paired_over_prompts_and_called_an_anecdote(pair):
    found = compare_runs(*pair)
    rows = run_comparison.metric_differences(found.records)
    assert rows["volume IoU"] == ["0.500", "0.700", "+0.200 [+0.100, +0.300]"]
    assert rows["CLIP similarity"][2] == "+0.000 [+0.000, +0.000]"
    assert rows["training, seconds"] == ["2.000", "2.000", ""]
    assert list(found.prompts) == ["a blue cube", "a red ball"]  # the largest difference first
    assert found.notes[-1].startswith("One seed each: an anecdote.")
    assert "a blue cube</th><td>0.500</td><td>0.800</td><td>+0.300" in found.table


def test_curves_are_those_of_the_logs_with_their_bands(pair):
    log = pair[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        norm = row["gradient_norm"]
        row |= {"gradient_norm_low": norm / 2, "gradient_norm_high": norm * 2}
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = compare_runs(*pair).figure().axes[0]
    assert list(first.lines[1].get_ydata()) == [row["gradient_norm"] for row in rows]
    assert first.collections
    legend = compare_runs(*pair).figure().legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["first", "other"]


def test_pictures_come_from_the_folder_or_are_rendered(pair):
    views = pair[0] / "views/0000"
    views.mkdir(parents=True)
    for azimuth in run_comparison.SIDES:
        Image.new("RGB", (96, 96), (200, 0, 0)).save(views / f"{azimuth:03d}.png")
    records = compare_runs(*pair).records
    written, rendered = (run_comparison.run_views(record, TEXTS[0]) for record in records)
    assert torch.equal(written[2, :, 5, 5], torch.tensor([200 / 255, 0, 0]))
    assert rendered.shape == (4, 3, 96, 96) and rendered.std() > 0
    picture, notes = run_comparison.prompt_picture(records, TEXTS[0])
    assert picture.height == 3 * 97 - 1 and not notes  # the truth is the third row


def test_unfinished_runs_and_other_corpora_are_compared_as_far_as_they_go(pair):
    (pair[1] / "eval.json").unlink()
    manifest = pair[1] / "prompts.jsonl"
    manifest.write_text(manifest.read_text().splitlines()[0] + "\n")
    edit(pair[1], steps=100)
    found = compare_runs(*pair)
    text = " ".join(found.notes)
    how = f"not evaluated: run `scaledreamer evaluate {pair[1]}` for metrics"
    assert f"other: 6 of 100 steps, {how}." in text
    assert "2 (first) and 1 (other) prompts" in text and "6 and 100 steps" in text
    assert run_comparison.metric_differences(found.records)["volume IoU"] == ["0.500", "", ""]
    assert found.prompts == {} and "<h4>a red ball</h4>" in found.pictures()


def test_what_is_not_known_takes_no_place(pair):
    "A finished run of which few steps are logged has all steps; tables without rows are left out."
    for folder in pair:
        (folder / "eval.json").unlink()
        log = folder / "metrics.jsonl"
        log.write_text(log.read_text().splitlines()[0] + "\n")
    found = compare_runs(*pair)
    steps = [note.split(",")[0] for note in found.notes]
    assert steps == ["first: all 6 steps", "other: all 6 steps"]
    assert found.table.count("<h4>") == found.table.count("<table>") == 1
    assert len(repr(found)) < 200


def test_damaged_files_are_sentences(pair):
    (pair[0] / "eval.json").write_text('{"per_prompt": 3, "sim": "high"}')
    (pair[1] / "eval.json").write_text("[1, 2")
    with (pair[1] / "metrics.jsonl").open("a") as log:
        log.write("not json\n")
    (pair[1] / "prompts.jsonl").write_text("?\n")
    found = compare_runs(*pair)
    text = " ".join(found.notes)
    for part in ("eval.json is not JSON", "metrics.jsonl is damaged", "prompts.jsonl is damaged"):
        assert part in text
    assert found._repr_html_()
    (pair[0] / "config.json").unlink()
    with pytest.raises(RunError, match="is no run folder"):
        compare_runs(*pair)
    with pytest.raises(UsageError, match="give at least two"):
        compare_runs(pair[1])


def test_a_cell_stays_below_a_megabyte_and_a_page_needs_nothing_else(pair, tmp_path):
    found = compare_runs(*pair, pair[0])
    assert found.names == ["first (1)", "other (2)", "first (3)"]
    html = found._repr_html_()
    assert len(html) < 1e6
    assert max(len(part) for part in html.split("data:image/png;base64,")[1:]) < 137_000
    found.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and 'src="http' not in page and page.count("<h1>") == 1
