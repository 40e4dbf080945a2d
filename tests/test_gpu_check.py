"""`tools/gpu_check`: limits, parts that fail or hang, what is carried, and its results as JSON."""

import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import time
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools/gpu_check"


@pytest.fixture(scope="module")
def tool():
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


@pytest.fixture
def run(tool, tmp_path, monkeypatch, capsys):
    "Runs these programs as parts; returns the exit code, the report, the log and what is printed."

    def start(programs: dict[str, str], limit: float = 5.0, figures=None, seconds: float = 60.0):
        made = [
            tool.Part(name, [sys.executable, "-c", program], limit, figures or (lambda output: {}))
            for name, program in programs.items()
        ]
        monkeypatch.setattr(tool, "all_parts", lambda *given: made)
        out = tmp_path / "out"
        code = tool.main(["run", str(out), "--device", "cpu", "--seconds", str(seconds)])
        report = json.loads((out / "gpu_check.json").read_text())
        assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "gpu_check.log"]
        return code, report, (out / "gpu_check.log").read_text(), capsys.readouterr().out

    return start


def by_name(report: dict, key: str) -> dict:
    return {part["name"]: part[key] for part in report["parts"]}


# processes that leave a child, which ignores SIGTERM too, and write its id
HANGS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    print("child", child, flush=True)
time.sleep(60)
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tool, run, monkeypatch):
    plain = tool.stop
    monkeypatch.setattr(tool, "stop", lambda process: plain(process, 0.3))
    programs = {"fails": "print('why'); raise SystemExit(3)", "hangs": HANGS, "ends": "print(7)"}
    code, report, log, said = run(programs, limit=1.5)
    assert by_name(report, "status") == {"fails": "failed", "hangs": "timed out", "ends": "passed"}
    assert by_name(report, "returncode") == {"fails": 3, "hangs": -9, "ends": 0}
    assert code == 1 and "why" in log and by_name(report, "tail")["ends"] == "7\n"
    assert 1.5 <= by_name(report, "seconds")["hangs"] < 4 and "timed out" in said
    assert not alive(int(re.search(r"^child (\d+)$", log, re.M)[1]))


def test_all_that_pass_is_exit_code_0(run):
    code, report, _, said = run({"one": "pass", "two": "print(1)"})
    assert code == 0 and set(by_name(report, "status").values()) == {"passed"}
    assert report["device"] == "cpu" and report["parts"][0]["limit"] == 5.0
    assert {"commit", "python", "packages", "lacking", "unpacked", "seconds"} < report.keys()
    assert "torch" in report["packages"] and said.splitlines()[0].startswith("passed")


def test_the_limit_of_the_whole_is_kept(run):
    started = time.monotonic()
    sleeps = {"a": "pass", "b": "import time; time.sleep(60)", "c": "pass"}
    code, report, *_ = run(sleeps, limit=30.0, seconds=2.5)
    assert time.monotonic() - started < 2.5 + 0.5 and code == 1
    assert list(by_name(report, "status").values()) == ["passed", "timed out", "not run"]
    assert by_name(report, "tail")["c"] == "no time was left" and report["seconds"] <= 2.5


def test_results_are_written_after_each_part(run, tmp_path):
    file = str(tmp_path / "out/gpu_check.json")
    look = f"import json; print(len(json.load(open({file!r}))['parts']))"
    _, report, *_ = run({"first": "pass", "second": look})
    assert by_name(report, "tail")["second"] == "1\n"


def test_figures_that_cannot_be_read_are_a_failure(run):
    code, report, *_ = run({"one": "print('{')"}, figures=json.loads)
    assert code == 1 and by_name(report, "status") == {"one": "failed"}
    assert "JSONDecodeError" in report["parts"][0]["figures"]["unreadable"]
    _, report, *_ = run({"one": "print('{\"a\": 1}')"}, figures=json.loads)
    assert report["parts"][0]["figures"] == {"a": 1}


def test_counts_of_tests(tool):
    line = "..s\n3 passed, 1 skipped, 12 deselected in 2.10s\n"
    assert tool.test_counts(line) == {"passed": 3, "skipped": 1}
    with pytest.raises(ValueError, match="no test passed"):
        tool.ran_tests("s\n1 skipped in 0.10s\n")


def test_the_parts_are_those_that_are_wanted(tool, tmp_path):
    cuda, cpu = (tool.all_parts(d, tmp_path, tmp_path, None) for d in ("cuda", "cpu"))
    names = [part.name for part in cuda]
    assert names == [part.name for part in cpu]
    wanted = ("hashgrid", "decoder", "mesh", "step-sd21", "prior-sd21")
    assert {"doctor", "tests", "triton", "train", "export"} < set(names)
    assert {f"bench {name}" for name in wanted} < set(names)
    tests = next(part.command for part in cuda if part.name == "tests")
    files = {Path(word).name for word in tests if word.endswith(".py")}
    assert {"test_triton_grid.py", "test_triton_decoder.py", "test_cuda_devices.py"} <= files
    assert all("--quick" in part.command for part in cpu if part.name.startswith("bench"))
    assert not any("--quick" in part.command for part in cuda)
    built = tool.all_parts("cuda", tmp_path, tmp_path, tmp_path / "torch")
    assert [part.name for part in built[len(cuda) :]] == [
        "tinycudann",
        "with tinycudann: bench hashgrid",
        "with tinycudann: bench decoder",
    ]


def wheel(folder: Path, name: str, content: str) -> None:
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", content)
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


def test_packages_that_are_missing_are_carried(tool, tmp_path, monkeypatch, capsys):
    def download(names, folder, python):
        for name in names:
            wheel(folder, name, f"name = {name!r}")

    monkeypatch.setattr(tool, "download", download)
    folder, site = tmp_path / "carried", tmp_path / "work/site"
    archive = tool.prepare(folder, "3.12", ["not_there_a", "torch", "not_there_b"])
    assert archive == folder / "packages.tar.xz" and "not_there_a-1.0" in capsys.readouterr().out
    assert tool.unpack(folder, site) == ["not_there_a-1.0", "not_there_b-1.0"]  # torch is there
    assert sorted(path.name for path in site.iterdir())[::2] == ["not_there_a", "not_there_b"]
    assert tool.unpack(None, tmp_path / "other") == [] and not list((tmp_path / "other").iterdir())
    found = tool.environment_of(tmp_path / "work", site)["PYTHONPATH"].split(os.pathsep)
    assert found[:2] == [str(site), str(TOOL.parent.parent)]
    monkeypatch.setattr(tool, "LARGEST", 10)
    with pytest.raises(SystemExit, match="carry less"):
        tool.prepare(folder, "3.12", ["not_there_a"])


def test_what_is_carried_is_what_the_package_needs(tool):
    "Requirements are there, or carried, or wanted by notebooks and videos alone."
    from configparser import ConfigParser

    settings = ConfigParser(delimiters=["="])
    settings.read(TOOL.parent.parent / "settings.ini", encoding="utf-8")
    plain = lambda name: name.partition(">")[0].replace("-", "_")
    wanted = {plain(name) for name in settings["DEFAULT"]["requirements"].split()}
    covered = {plain(name) for name in (*tool.PRESENT, *tool.CARRIED)}
    assert wanted - covered == {"imageio", "imageio_ffmpeg"}
