"""Benchmarks run in their quick form, refuse pairs that differ, and check their arguments."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scaledreamer.bench.batch_scaling import batch_pair
from scaledreamer.bench.field_speed import fused_pair, grid_pair
from scaledreamer.bench.paired import PairedBenchmark, agree, compare, passes, quartiles
from scaledreamer.bench.render_speed import check_quality
from scaledreamer.bench.step_speed import same_step
from scaledreamer.bench.stopwatch import Stopwatch, split
from scaledreamer.bench.time_to_quality import BARS, bar_row, seconds_until
from scaledreamer.commands.bench import BENCHES
from scaledreamer.commands.cli import run_command
from scaledreamer.core.settings import RunError
from scaledreamer.kernels.hash_grid_reference import HashGridSettings, encode_torch
from scaledreamer.training.train_settings import GENERATORS

NAMES = [
    "hashgrid",
    "render",
    "decoder",
    "step",
    "mesh",
    "prior",
    "prior-sd21",
    "prior-mvdream",
    "step-sd21",
    "batch-scaling",
    "corpus-scaling",
    "quality",
    "roofline",
]


class Clock:
    "Time that only passes where a call says so."

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def side(self, word, *units):
        turn = iter(units)

        def call():
            self.order.append(word)
            self.now += next(turn)

        return call


# arithmetic


def test_turns_medians_and_ratios():
    clock = Clock()
    pair = PairedBenchmark(
        "fake",
        clock.side("a", 9, 1, 2, 4, 5),
        clock.side("b", 9, 10, 8, 20, 5),
        check=lambda: None,
        about={"size": 3},
    )
    row = compare(pair, rounds=4, warmups=1, clock=clock)
    assert "".join(clock.order) == "ab" + "abbaabba"
    assert (
        row["ours"] == {"median": 3.0, "low": 1.75, "high": 4.25}
        and row["baseline"]["median"] == 9.0
    )
    assert (
        row["ratio"] == 3.0
        and row["ratio_each_round"] == pytest.approx(quartiles([10, 4, 5, 1]))
        and (row["rounds"], row["size"]) == (4, 3)
    )


def test_the_check_comes_first():
    clock = Clock()

    def wrong():
        raise RunError("fake: 1 apart")

    with pytest.raises(RunError, match="1 apart"):
        compare(PairedBenchmark("fake", clock.side("a"), clock.side("b"), wrong), clock=clock)
    assert clock.order == []


def test_a_drift_falls_on_both():
    "A machine that slows down evenly, over an even number of rounds."
    clock, calls = Clock(), iter(range(1, 100))

    def slower():
        clock.now += next(calls)

    row = compare(
        PairedBenchmark("fake", slower, slower, check=lambda: None),
        rounds=20,
        warmups=0,
        clock=clock,
    )
    assert row["ratio"] == pytest.approx(1, abs=0.03) and row["ratio_each_round"][
        "median"
    ] == pytest.approx(1, abs=0.03)


def test_own_time_of_parts_also_where_one_fails():
    clock = Clock()

    class Tools:
        def outer(self):
            clock.now += 1
            self.inner()

        def inner(self):
            clock.now += 4
            raise ValueError("no")

    watch, before = Stopwatch(clock=clock), Tools.__dict__["outer"]
    with (
        watch.on((Tools, "outer", "out"), (Tools, "inner", "in")),
        pytest.raises(ValueError, match="no"),
    ):
        Tools().outer()
    assert watch.parts == {"out": 1, "in": 4} and Tools.__dict__["outer"] is before
    found = split(clock.side("x", 3, 3), [(Tools, "outer", "out")], rounds=2, clock=clock)
    assert found == {"parts": {"out": 0.0, "other": 3.0, "whole": 3.0}, "other_percent": 100.0}


# checks


def test_agreement_is_relative():
    x = torch.tensor([1.0, 1000.0])
    agree("b", {"y": x + 0.009}, {"y": x})
    message = "b: y is 2e-05 of its largest number away from the baseline's, 1e-05 is allowed"
    with pytest.raises(RunError, match=message):
        agree("b", {"y": x + 0.02}, {"y": x})
    with pytest.raises(RunError, match="gradient of w"):
        agree("b", {"gradient of w": x + 0.2}, {"gradient of w": x})


def test_passes_gives_true_gradients():
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    found = passes(lambda: {"y": w.sin()}, {"w": w}, seed=3)()
    expected = torch.randn(2, 2, generator=torch.Generator().manual_seed(3)).double() * w.cos()
    torch.testing.assert_close(found["gradient of w"], expected.detach())
    assert w.grad is None


def test_a_wrong_grid_is_refused():
    pairs = [
        grid_pair(HashGridSettings(levels=2, log2_size=8), torch.rand(64, 3), True)
        for _ in range(2)
    ]
    pairs[0].verify()
    with pytest.raises(RunError, match="hashgrid, gradient by table and points: features is"):
        PairedBenchmark(pairs[0].name, pairs[0].ours, pairs[1].baseline).verify()


class PlainFused(torch.nn.Module):
    """tinycudann.NetworkWithInputEncoding in plain torch, half precision.

    Its vector of parameters is the layers, [out, in], then the table."""

    def __init__(self, dims, outputs, encoding, network):
        super().__init__()
        assert network == {
            "otype": "FullyFusedMLP",
            "activation": "ReLU",
            "output_activation": "None",
            "n_neurons": 64,
            "n_hidden_layers": 1,
        }
        names = (
            "n_levels",
            "n_features_per_level",
            "log2_hashmap_size",
            "base_resolution",
            "per_level_scale",
        )
        assert encoding["otype"] == "HashGrid" and set(encoding) == {"otype", *names}
        self.settings, self.outputs = (
            HashGridSettings(*(encoding[name] for name in names), dims),
            outputs,
        )
        self.params = torch.nn.Parameter(torch.empty(0))

    def forward(self, x):
        width, out = self.settings.levels * self.settings.features, -(-self.outputs // 16) * 16
        first, last, table = self.params.half().split(
            [64 * width, out * 64, len(self.params) - 64 * width - out * 64]
        )
        hidden = torch.relu(
            encode_torch(x, table.float(), self.settings).half() @ first.view(64, width).T
        )
        return (hidden @ last.view(out, 64).T)[:, : self.outputs]


@pytest.mark.parametrize("outputs", [16, 3])
def test_tiny_cuda_nn_against_plain_torch(outputs, monkeypatch):
    "Our table and weights mean the same as its vector; swapped coordinates are refused."
    monkeypatch.setitem(
        sys.modules, "tinycudann", SimpleNamespace(NetworkWithInputEncoding=PlainFused)
    )
    pair = fused_pair(HashGridSettings(levels=8, log2_size=8), torch.rand(256, 3), outputs=outputs)
    row = compare(pair, rounds=2, warmups=0)
    assert row["widths"] == [16, 64, outputs] and row["ratio"] > 0
    monkeypatch.setattr(
        PlainFused, "forward", lambda self, x, right=PlainFused.forward: right(self, x.flip(1))
    )
    with pytest.raises(
        RunError, match="hashgrid and decoder, half precision: half .* 0.05 is allowed"
    ):
        pair.verify()


def test_a_generator_whose_prompts_mix_is_refused():
    class Mixing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = GENERATORS["triplane"](96)

        def forward(self, text):
            return self.inner(
                type(text)(text.tokens.mean(0, keepdim=True).expand_as(text.tokens), text.pooled)
            )

    with pytest.raises(RunError, match="batch-scaling, mixing: .* nothing was timed"):
        compare(batch_pair("mixing", Mixing(), 2, 16, "cpu"))


def test_other_images_and_other_steps_are_refused():
    with pytest.raises(RunError, match="render: baseline has 12.0 dB"):
        check_quality({"psnr": {"ours": 40.0, "baseline": 12.0}})
    with pytest.raises(RunError, match="render: ours has nan dB"):
        check_quality({"psnr": {"ours": math.nan, "baseline": 40.0}})
    step = {"t": 500.0, "opacity": 0.3}
    for other in ({"t": 501.0}, {"opacity": 0.4}, {"opacity": math.nan}):
        with pytest.raises(RunError, match="these are not the same step"):
            same_step("step", lambda: step, lambda: step | other, 0.05)()


def test_a_bar_that_one_seed_misses_has_no_largest_time():
    bar = {"r_at_1": 0.99, "volume_iou": 0.75}
    points = [(1.0, 1.0, 0.74), (2.0, 0.98, 0.75), (3.0, 0.99, 0.75), (4.0, 1.0, 0.7)]
    curve = [{"seconds": s, "r_at_1": r, "volume_iou": iou} for s, r, iou in points]
    assert [seconds_until(curve[:n], bar) for n in range(5)] == [None, None, None, 3.0, 3.0]
    row = bar_row("x", bar, [curve, curve[1:], curve], [curve, curve, curve[:2]])
    assert row["ours"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert row["baseline"] == {"median": 3.0, "low": 3.0, "high": None}
    assert row["ratio"] == 1.0 and row["ratio_each_round"]["high"] is None
    missed = bar_row("x", bar, [curve[:1]] * 3, [curve] * 3)
    assert missed["ratio"] is None and missed["ours"]["median"] is None
    assert all(bar["r_at_1"] == 0.99 for bar in BARS.values())


# the command


def test_every_benchmark_is_named(capsys):
    assert set(NAMES) == set(BENCHES)
    assert run_command(["bench", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHES)


@pytest.mark.parametrize("name", NAMES)
def test_quick_form_gives_finite_ratios(name, tmp_path, capsys):
    file = tmp_path / "new" / "result.json"
    assert run_command(["bench", name, "--quick", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"bench: {file}"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["bench"], found["quick"], found["environment"]["device"]) == (name, True, "cpu")
    for row in found["rows"]:
        assert row["name"] in out and row["baseline_is"] in out and row["rounds"] >= 2
        for value in (
            row["ratio"],
            *row["ratio_each_round"].values(),
            *row["ours"].values(),
            *row["baseline"].values(),
        ):
            assert math.isfinite(value) and value > 0
        if "parts" in row:
            parts = dict(row["parts"])
            assert (
                all(part >= 0 for part in parts.values())
                and parts.pop("whole") > 0
                and 0 <= row["other_percent"] < 100
            )
    text = file.read_text(encoding="utf-8")
    assert (
        socket.gethostname() not in text
        and os.path.expanduser("~") not in text
        and str(tmp_path) not in text
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hashgird"], "no benchmark 'hashgird': give one of hashgrid, render"),
        ([], "no benchmark is named: give one of hashgrid"),
        (["hashgrid", "--json", "."], "--json is .: it is a folder"),
        (["hashgrid", "--json", "file/a.json"], "file is a file"),
        (["hashgrid", "--json"], "json"),
        (["hashgrid", "--device", "cuda:99"], "device 'cuda:99' is not on this machine"),
        (["hashgrid", "--fast"], "--fast"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setitem(BENCHES, "hashgrid", lambda *_: pytest.fail("it ran"))
    assert run_command(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(BENCHES, "hashgrid", lambda *_: pytest.fail("it ran"))
    assert run_command(["bench", "hashgrid", "--device", "cuda"]) == 2
    assert "device 'cuda' is not on this machine; there is " in capsys.readouterr().err


def test_a_failed_check_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    def fails(device, quick):
        raise RunError("decoder: values is 1 apart")

    monkeypatch.setitem(BENCHES, "decoder", fails)
    (tmp_path / "a.json").write_text("{}")
    assert run_command(["bench", "decoder", "--json", str(tmp_path / "a.json")]) == 1
    assert (
        "decoder: values is 1 apart" in capsys.readouterr().err
        and (tmp_path / "a.json").read_text() == "{}"
    )


def test_against_an_unknown_commit():
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, root / "tools/against.py", "nowhere"], capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and "no commit 'nowhere' in this repository: give a hash" in done.stderr
        and "Traceback" not in done.stderr
    )
