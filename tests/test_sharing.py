"""A generator goes to a Hub and comes back; the Hub here is a small server in this process."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from scaledreamer.core.settings import UsageError
from scaledreamer.core.tensors import make_rng
from scaledreamer.sharing.hub import SharedGenerator
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import open_run, run_training

SHORT = TrainSettings(prompt=("a red ball", "a blue cup"), resolution=16, steps=2, generator="ingp")
COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    "The parts of the Hub's interface that one upload and one download use."

    files: dict[str, bytes] = {}

    def log_message(self, *args):
        pass

    def answer(self, content: bytes, **headers):
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value):
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.json({"files": [{"path": name} | modes for name in names]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    value = row["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/user/name/commit/{COMMIT}"
            self.json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        elif self.path.endswith("validate-yaml"):
            self.json({"errors": [], "warnings": []})
        else:
            self.json({"url": f"http://{self.headers['Host']}/user/name", "name": "user/name"})

    def do_GET(self):
        if "/resolve/" in self.path:
            content = self.files[self.path.partition("/resolve/")[2].partition("/")[2]]
            tag = hashlib.sha1(content).hexdigest()
            self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        elif "/tree/" in self.path:
            about = {"type": "file", "oid": COMMIT}
            self.json([{"path": n, "size": len(c)} | about for n, c in self.files.items()])
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.json({"id": "user/name", "sha": COMMIT, "siblings": siblings})

    do_HEAD = do_GET


@pytest.fixture
def hub():
    "The address of an empty Hub."
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "run"
    run_training(folder, SHORT, show=False)
    return folder


PUSH = """
import sys
from scaledreamer.sharing.hub import SharedGenerator
SharedGenerator.from_run(sys.argv[1]).push_to_hub("user/name", token="hf_none")
again = SharedGenerator.from_pretrained("user/name", cache_dir=sys.argv[2], token="hf_none")
import torch
print(again.scene(["a red ball"]).sdf(torch.full((1, 1, 3), 0.25)).item())
"""


def test_a_generator_is_pushed_and_pulled(trained, hub, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PUSH, trained, tmp_path],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    point = torch.full((1, 1, 3), 0.25)
    assert float(done.stdout) == open_run(trained).scene(["a red ball"]).sdf(point).item()
    assert "optimizer" not in " ".join(Hub.files)
    card = Hub.files["README.md"].decode()
    assert "pipeline_tag: text-to-3d" in card and "a red ball; a blue cup" in card
    assert str(trained.parent) not in " ".join(
        content.decode() for name, content in Hub.files.items() if name.endswith((".json", ".md"))
    )


def test_what_is_saved_is_a_run_folder(trained, tmp_path):
    SharedGenerator.from_run(trained).save_pretrained(tmp_path / "saved")
    one, other = open_run(trained), open_run(tmp_path / "saved")
    points = torch.rand(1, 64, 3, generator=make_rng(0)) - 0.5
    for text in ("a red ball", "a blue cup", "a green ring"):
        assert torch.equal(one.scene([text]).sdf(points), other.scene([text]).sdf(points))
    assert other.step == 2


def test_a_generator_of_the_user_is_not_shared(trained, tmp_path):
    run = open_run(trained)
    run.settings = replace(run.settings, generator="mine")
    with pytest.raises(UsageError, match="nobody else could open"):
        SharedGenerator(run).save_pretrained(tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="is no run folder"):
        SharedGenerator.from_pretrained(tmp_path)
    assert not list(Path(tmp_path).iterdir())
