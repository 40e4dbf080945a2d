"""Meshes and turntables: known shapes, and files read by other programs than wrote them."""

import base64
import io
import json
import math
import re
import struct
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.eval.truth import ToyScene
from scaledreamer.field.scene import FogScene, SphereScene
from scaledreamer.rendering.volume import RenderSettings
from scaledreamer.view.mesh import extract_mesh, for_gltf, save_mesh
from scaledreamer.view.turntable import contact_sheet, save_turntable, turntable_frames

# meshes


@pytest.fixture(scope="module")
def chair():
    return extract_mesh(ToyScene(["a yellow chair"]), resolution=48)


@pytest.mark.parametrize("half", [None, 0.9])
def test_a_sphere(half):
    scene = SphereScene(
        torch.tensor([0.5]),
        centers=torch.tensor([[0.1, -0.2, 0.15]]),
        colors=torch.tensor([[1.0, 0.5, 0.0]]),
    )
    mesh = extract_mesh(scene, resolution=48, half=half)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.body_count == 1
    assert mesh.volume == pytest.approx(
        4 / 3 * math.pi * 0.5**3, rel=5e-3
    )  # above 0: the outside is out
    assert np.abs(np.linalg.norm(mesh.vertices - [0.1, -0.2, 0.15], axis=1) - 0.5).max() < 1e-3
    assert np.unique(mesh.visual.vertex_colors, axis=0).tolist() == [[255, 128, 0, 255]]


def test_one_prompt_of_several():
    radii = torch.tensor([0.3, 0.5, 0.7])
    for index, radius in enumerate(radii.tolist()):
        together = extract_mesh(SphereScene(radii), index, 24, prompts=3)
        alone = extract_mesh(SphereScene(radii[index : index + 1]), resolution=24)
        assert (
            np.allclose(together.vertices, alone.vertices)
            and (together.visual.vertex_colors == alone.visual.vertex_colors).all()
        )
        assert together.volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.03)


def test_a_density_scene_and_a_surface_cut_by_the_cube():
    assert extract_mesh(FogScene(extinction=20.0, ball_radius=0.5), resolution=32).is_watertight
    cut = extract_mesh(
        SphereScene(torch.tensor([0.4]), centers=torch.tensor([[1.0, 0.0, 0.0]])), resolution=32
    )
    assert cut.is_watertight and cut.bounds[1, 0] < 1.05  # closed where the cube ends


def test_nothing_to_mesh():
    with pytest.raises(RunError, match="no surface within 1 of the origin"):
        extract_mesh(
            SphereScene(torch.tensor([0.1]), centers=torch.tensor([[5.0, 0.0, 0.0]])), resolution=24
        )
    with pytest.raises(UsageError, match="index 1 of 1 prompts"):
        extract_mesh(SphereScene(torch.tensor([0.5])), 1)


@pytest.mark.parametrize("kind", ["glb", "obj", "ply"])
def test_files_hold_the_mesh(chair, tmp_path, kind):
    path = tmp_path / "deep" / f"chair.{kind}"
    save_mesh(chair, path)
    back = trimesh.load(path, process=False)
    if kind == "glb":  # a texture without an image, and the linear colours beside it
        (back,) = back.geometry.values()
        colors = back.visual.vertex_attributes["color"]
        assert np.array_equal(colors, for_gltf(chair).visual.vertex_colors)
    else:
        assert np.array_equal(back.visual.vertex_colors, chair.visual.vertex_colors)
    expected = chair if kind == "ply" else for_gltf(chair)  # y is up in GLB and OBJ
    assert np.allclose(back.vertices, expected.vertices, atol=1e-6)
    assert np.array_equal(back.faces, expected.faces)
    assert np.allclose(back.vertex_normals, expected.vertex_normals, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_glb_is_upright_and_faces_forward(chair, tmp_path):
    "Parsed without trimesh: y is up, z is the front; the chair's backrest is high and behind."
    save_mesh(chair, tmp_path / "chair.glb")
    data = (tmp_path / "chair.glb").read_bytes()
    assert data[:4] == b"glTF" and struct.unpack("<I", data[4:8]) == (2,)
    length = struct.unpack("<I", data[12:16])[0]
    tree, blob = json.loads(data[20 : 20 + length]), data[28 + length :]
    attributes = tree["meshes"][0]["primitives"][0]["attributes"]
    assert {"POSITION", "NORMAL", "COLOR_0"} <= set(attributes)
    accessor = tree["accessors"][attributes["POSITION"]]
    start = tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0)
    points = np.frombuffer(blob, "<f4", 3 * accessor["count"], start).reshape(-1, 3)
    assert not any(
        "matrix" in node
        for node in tree["nodes"]
        if node.get("matrix") not in (None, np.eye(4).flatten().tolist())
    )
    low, high = chair.bounds
    assert np.allclose(np.ptp(points, axis=0), (high - low)[[1, 2, 0]], atol=1e-6)
    assert points[points[:, 1] > points[:, 1].max() - 0.05, 2].max() < 0


def test_glb_colours_are_linear(chair):
    screen = chair.visual.vertex_colors[:, :3]
    linear = for_gltf(chair).visual.vertex_colors[:, :3]
    again = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.array_equal((again * 255).round(), screen) and (linear <= screen / 255 + 1e-6).all()


def test_other_formats_are_refused(chair, tmp_path):
    with pytest.raises(
        UsageError, match=r"chair.stl ends in .stl; a mesh is written as .glb, .obj or .ply"
    ):
        save_mesh(chair, tmp_path / "chair.stl")
    with pytest.raises(
        UsageError, match=r"car.webm ends in .webm; a turntable is written as .gif, .mp4 or .html"
    ):
        save_turntable(torch.rand(2, 3, 8, 8), tmp_path / "car.webm")
    assert not list(tmp_path.iterdir())


# turntables


@pytest.fixture(scope="module")
def frames():
    return turntable_frames(
        ToyScene(["a red car"]), views=6, size=48, settings=RenderSettings(beta=0.01)
    )


def test_the_camera_starts_in_front_and_turns_left():
    middle = turntable_frames(SphereScene(torch.tensor([0.5])), views=4, size=16, elevation=0.0)[
        :, :, 7:9, 7:9
    ].mean((2, 3))
    assert (
        middle.shape == (4, 3)
        and middle[0].argmax() == 0
        and middle[1].argmax() == 1
        and middle[2, 0] < 0.2
    )
    with pytest.raises(UsageError, match="expected 0 to 0"):
        turntable_frames(SphereScene(torch.tensor([0.5])), index=1)


def test_gif(frames, tmp_path):
    save_turntable(frames, tmp_path / "car.gif", fps=10)
    with Image.open(tmp_path / "car.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (
            6,
            (48, 48),
            100,
            0,
        )


@pytest.mark.parametrize("side", [48, 47])
def test_mp4(frames, tmp_path, side):
    save_turntable(frames[:, :, :side, :side], tmp_path / "car.mp4")
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "car.mp4"))
    about = next(reader)
    film = [np.frombuffer(f, np.uint8) for f in reader]
    even = side // 2 * 2
    assert about["codec"] == "h264" and about["size"] == (even, even) and len(film) == 6
    shown = torch.tensor(film[3].reshape(even, even, 3)).permute(2, 0, 1) / 255
    assert (shown - frames[3, :, :even, :even]).abs().mean() < 0.03


@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (3, 5), (1, 64), (64, 1), (7, 2)])
def test_mp4_of_odd_and_tiny_frames(tmp_path, height, width):
    "An odd side loses its last line, a single line is doubled; no frame is missing."
    shades = torch.linspace(0.2, 0.8, 5).reshape(5, 1, 1, 1).expand(5, 3, height, width)
    save_turntable(shades, tmp_path / "grey.mp4")
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "grey.mp4"))
    shown = max(width // 2 * 2, 2), max(height // 2 * 2, 2)
    assert next(reader)["size"] == shown
    film = torch.stack([torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in reader]) / 255
    assert film.shape == (5, 3 * math.prod(shown))
    assert (film.mean(1) - shades[:, 0, 0, 0]).abs().max() < 0.03


@pytest.mark.parametrize("kind", ["gif", "mp4", "html"])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_a_turntable_of_nothing_is_refused(tmp_path, kind, shape):
    with pytest.raises(UsageError, match="expected at least one frame of at least one pixel"):
        save_turntable(torch.zeros(shape), tmp_path / f"none.{kind}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gif", "mp4", "html"])
def test_a_folder_of_that_name_is_reported(frames, tmp_path, kind):
    (tmp_path / f"car.{kind}").mkdir()
    with pytest.raises(
        RunError,
        match=rf"car.{kind} cannot be written \(it is a folder\): give the name of a file$",
    ):
        save_turntable(frames, tmp_path / f"car.{kind}")
    assert [path.name for path in tmp_path.iterdir()] == [f"car.{kind}"]


def test_a_video_that_ffmpeg_left_unfinished_is_reported(frames, tmp_path, monkeypatch):
    "ffmpeg that fails while it closes raises nothing."
    count = imageio_ffmpeg.count_frames_and_secs
    monkeypatch.setattr(
        imageio_ffmpeg, "count_frames_and_secs", lambda path: (count(path)[0] - 1, 0.1)
    )
    with pytest.raises(
        RunError,
        match="^ffmpeg wrote 5 of 6 frames of .*: free some space, "
        "or write a .gif or .html instead$",
    ):
        save_turntable(frames, tmp_path / "car.mp4")
    assert not list(tmp_path.iterdir())


def test_page(frames, tmp_path):
    save_turntable(frames, tmp_path / "car.html", title="a <b> & c")
    page = (tmp_path / "car.html").read_text(encoding="utf-8")
    assert "<title>a &lt;b&gt; &amp; c</title>" in page and not re.search(
        r"https?:|src=\"(?!data)", page
    )
    encoded = re.search(r"const frames=\[(.*?)\]\.map", page)[1].replace('"', "").split(",")
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(e)))) for e in encoded]
    assert len(pictures) == 6
    assert np.abs(pictures[2] / 255 - frames[2].permute(1, 2, 0).numpy()).mean() < 0.02


def test_ffmpeg_that_fails_is_one_sentence(frames, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("No ffmpeg exe could be found.\nInstall it.")

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", missing)
    with pytest.raises(
        RunError,
        match=r"^ffmpeg cannot write .*No ffmpeg exe could be found.*\): "
        "write a .gif or .html instead$",
    ):
        save_turntable(frames, tmp_path / "car.mp4")
    assert not list(tmp_path.iterdir())


def test_without_ffmpeg_only_videos_are_refused(frames, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(RunError, match=r"imageio_ffmpeg.*: write a \.gif or"):
        save_turntable(frames, tmp_path / "car.mp4")
    save_turntable(frames, tmp_path / "car.gif")
    assert [path.name for path in tmp_path.iterdir()] == ["car.gif"]


def test_sheet(frames):
    assert contact_sheet(frames).size == (6 * 49 - 1, 48)
    assert contact_sheet(frames, 4, 2).size == (97, 97)
    assert np.array_equal(
        np.asarray(contact_sheet(frames, 2, 1))[49:], np.asarray(contact_sheet(frames[3:4]))
    )
