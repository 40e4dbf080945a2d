"""Meshes and turntables as files that other programs read right, in bounded memory, or one sentence
that says what is wrong."""

import json
import struct
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from skimage.measure import marching_cubes

from scaledreamer.commands.cli import run_command
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.eval.truth import ToyScene, field_grid, solid_field
from scaledreamer.field.scene import FogScene, SphereScene
from scaledreamer.generator.hyper_ingp import HyperINGP
from scaledreamer.prior.base import TextEmbedding
from scaledreamer.view import mesh as mesh_module
from scaledreamer.view import turntable as turntable_module
from scaledreamer.view.marching_cubes import padded_planes, triangulate, vertex_normals
from scaledreamer.view.mesh import extract_mesh, field_planes, for_gltf, save_mesh
from scaledreamer.view.texture import textured_mesh
from scaledreamer.view.turntable import save_turntable, turntable_frames, turntable_views


@pytest.fixture(scope="module")
def chair():
    return extract_mesh(ToyScene(["a blue chair"]), resolution=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh") / "run"
    tiny = "--prior mixture --generator ingp --prompts-per-step 1 --resolution 8 --eval-views 0"
    argv = ["train", "--prompt", "a red ball", *tiny.split(), "--steps", "1", "--out", str(folder)]
    assert run_command(argv) == 0
    return folder


def export(run, to, *options):
    return run_command(["export", str(run), "--prompt", "0", "--to", str(to), *map(str, options)])


def read_glb(path):
    "The JSON of a GLB, and its arrays by name, without trimesh."
    data = path.read_bytes()
    assert data[:4] == b"glTF" and struct.unpack("<II", data[4:12]) == (2, len(data))
    length = struct.unpack("<I", data[12:16])[0]
    tree, blob = json.loads(data[20 : 20 + length]), data[28 + length :]
    size = struct.unpack("<I", data[20 + length : 24 + length])[0]
    assert length % 4 == size % 4 == 0 and size == len(blob)
    assert tree["buffers"][0]["byteLength"] <= size

    def array(k):
        accessor = tree["accessors"][k]
        view = tree["bufferViews"][accessor["bufferView"]]
        kind = {5126: "<f4", 5125: "<u4", 5123: "<u2"}[accessor["componentType"]]
        width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        assert view["byteOffset"] % 4 == 0
        count = accessor["count"] * width
        assert view["byteLength"] == count * np.dtype(kind).itemsize
        return np.frombuffer(blob, kind, count, view["byteOffset"]).reshape(-1, width)

    (primitive,) = tree["meshes"][0]["primitives"]
    arrays = {name: array(k) for name, k in primitive["attributes"].items()}
    return tree, primitive, arrays | {"indices": array(primitive["indices"])}


# GLB, OBJ and PLY


def test_a_glb_has_a_material_that_is_no_metal(chair, tmp_path):
    save_mesh(chair, tmp_path / "chair.glb")
    tree, primitive, arrays = read_glb(tmp_path / "chair.glb")
    surface = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert (surface["metallicFactor"], surface["roughnessFactor"]) == (0, 1)
    assert "alphaMode" not in tree["materials"][0]  # opaque
    position = tree["accessors"][primitive["attributes"]["POSITION"]]
    assert np.array_equal(position["min"], arrays["POSITION"].min(0))
    assert np.array_equal(position["max"], arrays["POSITION"].max(0))
    assert np.allclose(np.linalg.norm(arrays["NORMAL"], axis=1), 1, atol=1e-5)
    assert np.array_equal(arrays["indices"].reshape(-1, 3), chair.faces)
    assert {view.get("target") for view in tree["bufferViews"]} == {34962, 34963}


def test_256_greys_stay_256_in_the_file(tmp_path):
    levels = np.arange(256, dtype=np.uint8)
    colors = np.stack([levels, levels, levels, np.full(256, 255, np.uint8)], 1)
    points = np.random.default_rng(0).random((256, 3))
    faces = np.arange(255).reshape(-1, 3)
    grey = trimesh.Trimesh(points, faces, vertex_colors=colors, process=False)
    assert len(np.unique(for_gltf(grey).visual.vertex_colors[:, 0])) == 256
    save_mesh(grey, tmp_path / "grey.glb")
    _, _, arrays = read_glb(tmp_path / "grey.glb")
    linear = arrays["COLOR_0"].astype(float)
    assert len(np.unique(linear[:, 0])) == 256 and (linear[:, 3] == 1).all()
    assert linear[128, 0] == pytest.approx(0.2158605, abs=1e-6)  # IEC 61966-2-1
    screen = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.array_equal((screen[:, :3] * 255).round(), colors[:, :3])
    (back,) = trimesh.load(tmp_path / "grey.glb", process=False).geometry.values()
    assert np.array_equal(back.visual.vertex_attributes["color"], arrays["COLOR_0"])
    assert back.visual.material.metallicFactor == 0
    plain = trimesh.load(tmp_path / "grey.glb", force="mesh", process=False, skip_materials=True)
    expected = (linear * 255).round()
    assert np.array_equal(plain.visual.vertex_colors, expected)


def test_clear_colours_are_blended(tmp_path, chair):
    colors = chair.visual.vertex_colors.copy()
    colors[:, 3] = 100
    clear = trimesh.Trimesh(chair.vertices, chair.faces, vertex_colors=colors, process=False)
    save_mesh(clear, tmp_path / "clear.glb")
    tree, _, arrays = read_glb(tmp_path / "clear.glb")
    assert tree["materials"][0]["alphaMode"] == "BLEND"
    assert np.allclose(arrays["COLOR_0"][:, 3], 100 / 255)


@pytest.mark.parametrize(
    "kind, up, front", [("glb", "y", "z"), ("obj", "y", "z"), ("ply", "z", "x")]
)
def test_every_file_says_or_prescribes_what_is_up(chair, tmp_path, kind, up, front):
    path = tmp_path / f"chair.{kind}"
    save_mesh(chair, path)
    back = trimesh.load(path, force="mesh", process=False)
    assert "xyz"[back.extents.argmax()] == up
    high = back.vertices[:, "xyz".index(up)]
    assert back.vertices[high > high.max() - 0.03, "xyz".index(front)].max() < 0  # the backrest
    assert back.volume == pytest.approx(chair.volume, rel=1e-5) and back.is_watertight
    if kind != "glb":
        assert f"{up} is up, +{front} the front; colours are sRGB".encode() in path.read_bytes()
        assert np.array_equal(back.visual.vertex_colors, chair.visual.vertex_colors)


def test_meshes_of_other_programs_are_written(tmp_path):
    box = trimesh.creation.box()
    box.visual.face_colors = [10, 20, 30, 255]
    plain = trimesh.creation.icosphere(1)
    lone = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 5, 5]], [[0, 1, 2]], process=False)
    for name, mesh in (("box", box), ("plain", plain), ("lone", lone)):
        for kind in ("glb", "obj", "ply"):
            save_mesh(mesh, tmp_path / f"{name}.{kind}")
            back = trimesh.load(tmp_path / f"{name}.{kind}", force="mesh", process=False)
            assert len(back.faces) == len(mesh.faces)
        normals = read_glb(tmp_path / f"{name}.glb")[2]["NORMAL"]
        assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["X.GLB", "x.Obj", "a b.PLY", "x.GIF"])
def test_formats_in_any_case(run, tmp_path, name, capsys):
    assert export(run, tmp_path / name, "--resolution", 8) == 0, capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    start = (tmp_path / name).read_bytes()[:12]
    begins = {"GLB": b"glTF", "Obj": b"# scaledreamer", "PLY": b"ply\n", "GIF": b"GIF89a"}
    assert start.startswith(begins[name.rsplit(".")[-1]][:12])


@pytest.mark.parametrize(
    "to, options, message",
    [
        ("x.stl", [], "its name should end in one of .glb, .obj, .ply, .html, .gif, .mp4"),
        ("x", [], "its name should end in one of"),
        ("x.glb ", [], "its name should end in one of"),
        ("folder.glb", [], "it is a folder, give the name of a file in it"),
        ("note/x.glb", [], "is a file, give a path in a folder"),
        ("x.gif", ["--level", 0], "--level is for meshes, and x.gif is a turntable: leave it out"),
        ("x.mp4", ["--largest-only"], "--largest-only is for meshes"),
        ("x.HTML", ["--texture", 64], "--texture is for .glb"),
        ("x.mp4", ["--texture", 64], "--texture is for meshes"),
        ("x.obj", ["--texture", 64], "--texture is for .glb"),
        ("x.glb", ["--texture", 1], "--texture is 1: expected an integer from 16 to 8192"),
        ("x.glb", ["--level", "nan"], "--level is"),
        ("x.glb", ["--resolution", 100000], "--resolution is 100000: expected an integer from 8"),
    ],
)
def test_wrong_options_are_one_sentence_before_the_work(
    run, tmp_path, capsys, to, options, message
):
    (tmp_path / "folder.glb").mkdir()
    (tmp_path / "note").write_text("")
    assert export(run / "none", tmp_path / to, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.glb", "note"]


# fields that have no surface


class Scaled:
    "A sphere whose distance and colours are changed by functions."

    radius = 1.0

    def __init__(self, sdf=lambda d: d, color=lambda c: c):
        self.ball = SphereScene(torch.tensor([0.5]))
        self._sdf, self._color = sdf, color

    def sdf(self, points):
        return self._sdf(self.ball.sdf(points))

    def color(self, points):
        return self._color(self.ball.color(points))

    def sdf_and_color(self, points):
        return self.sdf(points), self.color(points)

    def background(self, directions):
        return self.ball.background(directions)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("half", [None, 0.7])
def test_a_field_that_is_not_finite_says_so(value, half):
    everywhere = Scaled(lambda d: d * value)
    some = Scaled(lambda d: torch.where(d < -0.3, value, d))
    for scene in (everywhere, some):
        with pytest.raises(RunError, match="field of the scene is not finite.*diverged") as caught:
            extract_mesh(scene, resolution=16, half=half)
        assert "train it longer" not in str(caught.value)


def test_colours_that_are_not_finite_say_so():
    dark = Scaled(color=lambda c: c * torch.nan)
    with pytest.raises(RunError, match="colours of the scene are not finite.*--optim.lr"):
        extract_mesh(dark, resolution=16)
    with pytest.raises(RunError, match="renders of the scene are not finite.*--optim.lr"):
        turntable_frames(dark, 2, 8)


def test_densities_that_are_not_finite_say_so():
    fog = FogScene(extinction=float("nan"))
    with pytest.raises(RunError, match="field of the scene is not finite"):
        extract_mesh(fog, resolution=16)


def test_an_empty_and_a_solid_scene(tmp_path, run, capsys):
    with pytest.raises(RunError, match="the scene is empty, train it longer"):
        extract_mesh(Scaled(lambda d: d + 9), resolution=16)
    with pytest.raises(RunError, match="the scene is solid everywhere"):
        extract_mesh(Scaled(lambda d: d - 9), resolution=16)
    assert export(run, tmp_path / "x.glb", "--resolution", 8, "--level", -3) == 1
    assert "the scene is empty" in capsys.readouterr().err and not list(tmp_path.iterdir())


# level and largest part


def two_balls(points):
    large = (points - points.new_tensor([0.25, 0.0, 0.0])).norm(dim=-1) - 0.25
    small = (points + points.new_tensor([0.35, 0.0, 0.0])).norm(dim=-1) - 0.15
    return torch.minimum(large, small)


def test_the_largest_part_and_another_level():
    class Balls(Scaled):
        def sdf(self, points):
            return two_balls(points)

    both, one = (extract_mesh(Balls(), resolution=40, largest_only=only) for only in (False, True))
    assert (both.body_count, one.body_count) == (2, 1) and one.is_watertight
    assert one.volume == pytest.approx(4 / 3 * np.pi * 0.25**3, rel=0.01)
    assert one.visual.vertex_colors.shape == (len(one.vertices), 4)
    grown = extract_mesh(Balls(), resolution=40, level=0.05, largest_only=True)
    assert grown.volume == pytest.approx(4 / 3 * np.pi * 0.3**3, rel=0.01)
    fog = FogScene(extinction=4.0, ball_radius=0.5)
    with pytest.raises(RunError, match="choose another level"):
        extract_mesh(fog, resolution=16)
    assert extract_mesh(fog, resolution=24, level=2.0).volume == pytest.approx(0.52, rel=0.15)


def test_level_and_largest_part_from_the_shell(run, tmp_path):
    for name, level in (("a.glb", 0.0), ("b.glb", 0.1)):
        options = ("--resolution", 16, "--level", level, "--largest-only")
        assert export(run, tmp_path / name, *options) == 0
    a, b = (trimesh.load(tmp_path / name, force="mesh") for name in ("a.glb", "b.glb"))
    assert b.volume > 1.3 * a.volume > 0


# bounded memory


@pytest.fixture(scope="module")
def trained():
    "The field of a network, not only of formulas."
    torch.manual_seed(0)
    generator = HyperINGP().eval()
    with torch.no_grad():
        generator.encoder.table.normal_(0, 0.3)
    text = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1))
    return generator(TextEmbedding(text, text.mean(1)))


def noise(points):
    x, y, z = (1e4 * points).unbind(-1)  # no matrix product, whose rounding depends on the batch
    return torch.sin(1.7 * x + 2.9 * y + 5.3 * z)[None]


@pytest.mark.parametrize("resolution", [8, 33])
def test_blocks_give_the_mesh_of_the_whole_grid(trained, resolution):
    fields = {
        "network": (solid_field(trained, 2), 1),
        "chair": (solid_field(ToyScene(["a blue chair"])), 0),
        "noise": (noise, 0),
    }
    for field, index in fields.values():
        grid = field_grid(field, resolution, 0.6)[index]
        vertices, faces = triangulate(grid, 0.6)
        for chunk in (resolution**2, 5 * resolution**2 + 7, 1 << 18):
            same = field_grid(field, resolution, 0.6, chunk=chunk)[index]
            assert torch.allclose(same, grid, atol=1e-6)
            if field is not fields["network"][0]:  # which may round otherwise in another batch
                assert torch.equal(same, grid)
            expected = triangulate(same, 0.6)
            blocks = triangulate(field_planes(field, index, resolution, 0.6, chunk=chunk), 0.6)
            assert np.array_equal(blocks[0], expected[0])
            assert np.array_equal(blocks[1], expected[1])
        # scikit-image on the whole grid: the same triangles; vertices to its 32 bits
        whole = marching_cubes(np.stack(list(padded_planes(grid, 0.6))), 0.0)
        assert np.array_equal(whole[1], faces)
        cells = (vertices + 0.6) / (1.2 / resolution) + 0.5
        assert np.abs(cells - whole[0]).max() < 1e-5
        normals = vertex_normals(vertices, faces)
        assert np.allclose(np.linalg.norm(normals, axis=1), 1)


def test_few_points_and_few_planes_are_in_memory():
    sizes = []

    def field(points):
        sizes.append(len(points))
        return (points.norm(dim=-1) - 0.4)[None]

    alive, most = weakref.WeakSet(), []

    def planes():
        for plane in field_planes(field, 0, 600, 0.5, chunk=1 << 16):
            plane = plane.clone()
            alive.add(plane)
            most.append(len(alive))
            yield plane

    some = planes()
    layers = padded_planes((next(some) for _ in range(6)), 0.5)
    assert sum(1 for _ in layers) == 8
    assert max(sizes) == 1 << 16 and max(most) <= 3


OUT_OF_MEMORY = (
    MemoryError("Unable to allocate 9.31 GiB for an array"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["numpy", "torch", "cuda"])
@pytest.mark.parametrize("name", ["x.glb", "x.gif", "x.mp4", "x.html"])
def test_out_of_memory_names_what_to_lower(run, tmp_path, capsys, monkeypatch, error, name):
    def fail(*args, **options):
        raise error

    def fail_later(scene, **options):
        yield torch.zeros(3, 8, 8)
        raise error

    monkeypatch.setattr(mesh_module, "field_layers", fail)
    monkeypatch.setattr(turntable_module, "turntable_views", fail_later)
    assert export(run, tmp_path / name, "--resolution", 8) == 1
    message = capsys.readouterr().err
    assert "memory" in message and "lower --resolution" in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_film_is_written_while_it_is_rendered(tmp_path):
    rendered = []

    def views():
        for view in turntable_views(SphereScene(torch.tensor([0.5])), 4, 16):
            rendered.append(weakref.ref(view))
            yield view.clone()
            del view
            assert sum(ref() is not None for ref in rendered) <= 2

    for kind in ("gif", "MP4", "Html"):
        rendered.clear()
        save_turntable(views(), tmp_path / f"x.{kind}")
        assert len(rendered) == 4
    with Image.open(tmp_path / "x.gif") as film:
        assert film.n_frames == 4
    together = turntable_frames(SphereScene(torch.tensor([0.5])), 4, 16)
    save_turntable(together, tmp_path / "y.gif")
    assert (tmp_path / "x.gif").read_bytes() == (tmp_path / "y.gif").read_bytes()


# textures


def test_without_xatlas_a_texture_is_refused_before_the_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "xatlas", None)
    assert export(run, tmp_path / "x.glb", "--texture", 64) == 2
    assert "needs the package xatlas, which is not installed: pip install xatlas" in (
        capsys.readouterr().err
    )
    with pytest.raises(UsageError, match="pip install xatlas"):
        textured_mesh(trimesh.creation.box(), SphereScene(torch.tensor([0.5])))


def test_a_texture_has_the_colours_of_the_scene(tmp_path):
    pytest.importorskip("xatlas")
    scene = ToyScene(["a blue chair"])
    mesh = extract_mesh(scene, resolution=40)
    save_mesh(textured_mesh(mesh, scene, 256), tmp_path / "chair.glb")
    tree, primitive, arrays = read_glb_with_image(tmp_path / "chair.glb")
    surface = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert (surface["metallicFactor"], surface["roughnessFactor"]) == (0, 1)
    assert "COLOR_0" not in primitive["attributes"]
    back = trimesh.load(tmp_path / "chair.glb", force="mesh", process=False)
    image = np.asarray(back.visual.material.baseColorTexture).astype(float)
    assert image.shape == (256, 256, 3) and back.volume == pytest.approx(mesh.volume, rel=1e-4)
    at = back.visual.uv[back.faces].mean(1)
    column, row = at[:, 0] * 256, (1 - at[:, 1]) * 256
    found = image[row.astype(int).clip(0, 255), column.astype(int).clip(0, 255)]
    centres = torch.tensor(back.triangles_center[:, [2, 0, 1]], dtype=torch.float32)
    expected = scene.color(centres[None])[0].numpy() * 255
    errors = np.abs(found - expected).max(1)
    assert np.median(errors) < 2 and np.quantile(errors, 0.95) < 12


def read_glb_with_image(path):
    tree, primitive, arrays = read_glb(path)
    (image,) = tree["images"]
    assert image["mimeType"] == "image/png" and len(tree["textures"]) == 1
    return tree, primitive, arrays


# imports


def test_export_refuses_arguments_without_torch():
    code = (
        "import sys; from scaledreamer.commands.cli import run_command; "
        "rc = run_command(['export', 'none', '--prompt', 'a', '--to', 'a.stl']); "
        "slow = {'torch', 'matplotlib', 'trimesh', 'diffusers'} & set(sys.modules); "
        "sys.exit(f'{rc} {slow}' if rc != 2 or slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "its name should end in one of" in done.stderr
