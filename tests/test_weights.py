"""Import of released checkpoints: key listings, tensors of released modules, refusals."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scaledreamer.camera.rays import Rays
from scaledreamer.commands.cli import run_command
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.field.background import HYPER_GRID, SHARP_GRID
from scaledreamer.generator.conv3d import Conv3DSettings
from scaledreamer.generator.hyper_ingp import HyperINGPSettings
from scaledreamer.generator.ingp import SMALL_GRID, INGPSettings
from scaledreamer.release.lightning import (
    TABLE,
    HyperShape,
    PromptedMapSettings,
    SharedMapSettings,
    read_release,
)
from scaledreamer.generator.triplane import TriplaneSettings
from scaledreamer.release.import_weights import import_weights
from scaledreamer.release.released_weights import RELEASES, ReleasedSettings
from scaledreamer.prior.base import TextEmbedding
from scaledreamer.rendering.volume import render
from scaledreamer.core.tensor_files import read_tensors
from scaledreamer.training.corpora import CorpusSettings
from scaledreamer.training.import_run import import_settings
from scaledreamer.training.trainer import open_run, run_training

PARITY = Path(__file__).parent / "parity"
HYPER, NERF, MV_NERF = (
    f"09_state_dict_{name}" for name in ("asd_sd_hyper_iNGP_50k", "asd_sd_nerf", "asd_mv_nerf")
)
CONV3D, WIDE_CONV3D, TRIPLANE = (
    f"09_state_dict_{name}"
    for name in (
        "asd_sd_3dconv_net_50k",
        "asd_sd_3dconv_net_300k",
        "asd_mv_triplane_transformer_10k",
    )
)


def listed(name):
    "A state_dict with the shapes of a listing, random weights, and buffers as listed."
    meta, rng = json.loads((PARITY / f"{name}.json").read_text()), torch.Generator().manual_seed(0)
    state = {}
    for key, entry in meta["state_dict"].items():
        constant, dtype = meta["constant_values"].get(key), getattr(torch, entry["dtype"])
        if constant is not None:
            state[key] = torch.tensor(constant, dtype=dtype)
        else:
            state[key] = (0.1 * torch.randn(entry["shape"], generator=rng)).to(dtype)
    return meta, state


HEADS = {TRIPLANE: 16}  # what no checkpoint stores


def saved(path, state, **rest):
    "As Lightning writes it."
    content = {
        "epoch": 0,
        "global_step": 50_000,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": state,
        "loops": {"fit": {"done": 1}},
        "callbacks": {"ModelCheckpoint": {"best_model_path": ""}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
    }
    torch.save(content | rest, path)
    return path


# the listings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [HYPER, NERF, MV_NERF, CONV3D, WIDE_CONV3D, TRIPLANE])
def test_every_key_is_mapped_or_reported(name, tmp_path):
    meta, state = listed(name)
    found = import_weights(saved(tmp_path / "last.ckpt", state), HEADS.get(name))
    assert (
        found.mapped.keys() | found.left.keys() == state.keys()
        and not found.mapped.keys() & found.left.keys()
    )
    trained = {
        k
        for k, v in meta["state_dict"].items()
        if v["kind"] == "parameter" and k not in meta["not_trainable"] and 0 not in v["shape"]
    }  # an encoding without parameters lists an empty tensor
    assert found.mapped.keys() == trained
    ours = found.generator.state_dict()
    assert (
        len(set(found.mapped.values())) == len(found.mapped)
        and set(found.mapped.values()) == ours.keys()
    )
    for key, own in found.mapped.items():
        assert torch.equal(ours[own], state[key]), key
    by_part = meta["n_parameters_by_prefix"]
    assert (
        sum(p.numel() for p in found.generator.parameters())
        == by_part["geometry"] + by_part["background"]
    )
    assert not found.generator.training and found.step == 50_000


def test_settings_are_those_of_the_shipped_configs(tmp_path):
    found = import_weights(saved(tmp_path / "hyper.ckpt", listed(HYPER)[1]))
    assert found.settings == ReleasedSettings(
        HyperINGPSettings.paper(),
        PromptedMapSettings(HYPER_GRID, 64, HyperShape(1024, 2240, 64, 1, False)),
    )
    assert found.beta == pytest.approx(1 / 30, rel=1e-4)
    assert set(found.left) == {"geometry.bbox", "renderer.bbox", "renderer.variance._inv_std"}
    found = import_weights(saved(tmp_path / "nerf.ckpt", listed(NERF)[1]))
    assert found.settings == ReleasedSettings(
        INGPSettings.paper(), SharedMapSettings(SHARP_GRID, (16, 16))
    )
    assert found.beta is None and "renderer.estimator.occs" in found.left
    for name, settings in (
        (CONV3D, Conv3DSettings.paper()),
        (WIDE_CONV3D, Conv3DSettings.paper(2)),
        (TRIPLANE, TriplaneSettings.paper()),
    ):
        assert (
            import_weights(
                saved(tmp_path / "last.ckpt", listed(name)[1]), HEADS.get(name)
            ).settings.generator
            == settings
        )


@pytest.mark.parametrize("name", [HYPER, NERF])
def test_each_lost_weight_is_missed_by_name(name, tmp_path):
    _, state = listed(name)
    small = {k: v for k, v in state.items() if v.numel() <= 10**6} | {
        k: torch.zeros(1).expand(v.shape) for k, v in state.items() if v.numel() > 10**6
    }
    for key in (
        k
        for k in state
        if k.startswith(("geometry.hyper", "geometry.density", "geometry.feature", "geometry.enc"))
    ):
        with pytest.raises((RunError, UsageError)):
            import_weights(
                saved(tmp_path / "less.ckpt", {k: v for k, v in small.items() if k != key})
            )


def test_no_two_releases_share_a_mark():
    for name in (HYPER, NERF, MV_NERF):
        keys = json.loads((PARITY / f"{name}.json").read_text())["state_dict"]
        assert sum(any(key.startswith(release.mark) for key in keys) for release in RELEASES) == 1


# the release's own tensors ------------------------------------------------------------------------


def configured(tmp_path, **system):
    "The parsed.yaml that the release writes for these settings."
    path = tmp_path / "parsed-of-run.yaml"
    path.write_text(yaml.safe_dump({"system": system}))
    return path


@pytest.mark.parametrize("name", ["02_hyper_ingp_a_plain", "02_hyper_ingp_c_spectral"])
def test_values_of_the_releases_modules(name, tmp_path):
    meta, t = (
        json.loads((PARITY / f"{name}.json").read_text()),
        load_file(PARITY / f"{name}.safetensors"),
    )
    settings = meta["settings"]
    state = {
        "geometry." + k.removeprefix("weights/"): v
        for k, v in t.items()
        if k.startswith("weights/")
    }
    config = configured(tmp_path, geometry=settings)
    found = import_weights(saved(tmp_path / "theirs.ckpt", state), config=config)
    model, text = found.generator, t["text"]
    assert found.settings.generator.spectral_norm == settings["hypernet_config"]["spectral_norm"]
    assert (
        found.settings.generator.decoder_width
        == settings["hypernet_config"]["out_dims"]["sdf_weights"][0]
    )
    assert model.settings.init_sphere_radius == settings["sdf_bias_params"]  # no tensor holds it
    with torch.no_grad():
        scene = model(TextEmbedding(text[:, None], text))
        torch.testing.assert_close(
            scene.sdf(t["points"]), t["sdf_forward_sdf"][..., 0], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            scene.color(t["points"]),
            t["features"].view(*t["points"].shape).sigmoid(),
            rtol=0,
            atol=1e-5,
        )


def test_from_the_releases_file_to_its_pixels(tmp_path):
    "With its background, in the settings that the run folder would have."
    meta, t = (
        json.loads((PARITY / "05b_render_hyper.json").read_text()),
        load_file(PARITY / "05b_render_hyper.safetensors"),
    )
    state = {k.removeprefix("weights/"): v for k, v in t.items() if k.startswith("weights/")}
    parts = {part: meta["settings"][part] for part in ("geometry", "background")}
    config = configured(tmp_path, **parts)
    found = import_weights(saved(tmp_path / "theirs.ckpt", state), config=config)
    assert found.mapped.keys() | found.left.keys() == state.keys()
    settings, image = (
        import_settings(found, "tiny-sd", "toybox-15").render,
        lambda value: value.movedim(-1, 1)[:, None],
    )
    with torch.no_grad():
        out = render(
            found.generator(TextEmbedding(t["text"][:, None], t["text"])),
            Rays(t["rays_o"][:, None], t["rays_d"][:, None]),
            settings,
        )
    torch.testing.assert_close(out.rgb, image(t["eval/comp_rgb"]), rtol=0, atol=2e-3)
    torch.testing.assert_close(out.background, image(t["eval/comp_rgb_bg"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.opacity, image(t["eval/opacity"]), rtol=0, atol=2e-3)
    torch.testing.assert_close(out.depth, image(t["eval/depth"]), rtol=0, atol=5e-3)


def test_decoders_of_two_widths_are_refused(tmp_path):
    t = load_file(PARITY / "02_hyper_ingp_b_two_hidden.safetensors")
    state = {
        "geometry." + k.removeprefix("weights/"): v
        for k, v in t.items()
        if k.startswith("weights/")
    }
    with pytest.raises(UsageError, match="has 4,016 numbers, expected"):
        import_weights(saved(tmp_path / "theirs.ckpt", state))
    with pytest.raises(RunError, match="218 weights, which are not decoders of one hidden width"):
        settings = json.loads((PARITY / "02_hyper_ingp_b_two_hidden.json").read_text())["settings"]
        config = configured(tmp_path, geometry=settings)
        import_weights(saved(tmp_path / "theirs.ckpt", state), config=config)


# files that are something else --------------------------------------------------------------------


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["callback", "weight", "bare", "old"])
def test_nothing_is_executed(where, tmp_path):
    code, path = Code(tmp_path / "executed"), tmp_path / "bad.ckpt"
    match where:
        case "callback":
            saved(
                path, {"geometry.hypernet.layers.0.weight": torch.ones(2, 2)}, hyper_parameters=code
            )
        case "weight":
            saved(path, {"geometry.hypernet.layers.0.weight": code})
        case "bare":
            path.write_bytes(pickle.dumps(code))
        case "old":
            torch.save({"state_dict": {}, "x": code}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(RunError) as error:
        import_weights(path)
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()
    if where in ("callback", "weight"):
        assert "carries code" in str(error.value) and "mkdir" in str(error.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_every_cut_of_a_file_is_one_sentence(suffix, tmp_path):
    whole = tmp_path / f"whole{suffix}"
    state = {"geometry.hypernet.layers.0.weight": torch.ones(40, 40)}
    save_file(state, whole) if suffix == ".safetensors" else torch.save(
        {"state_dict": state}, whole
    )
    data, cut = whole.read_bytes(), tmp_path / f"cut{suffix}"
    for end in [*range(0, 64), *range(64, len(data), 97), len(data) - 1]:
        cut.write_bytes(data[:end])
        with pytest.raises(RunError, match="is no whole") as error:
            read_release(cut)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "a text",
        [1, 2],
        {},
        {"state_dict": {"a": 1}},
        {"state_dict": [torch.ones(1)]},
        torch.ones(3),
    ],
)
def test_a_file_of_something_else(content, tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    with pytest.raises(RunError) as error:
        import_weights(path)
    assert "\n" not in str(error.value)


def test_other_generators(tmp_path):
    _, state = listed(HYPER)
    for other in (
        "geometry.space_generator.unknown.weight",
        "encoder.table",
        "model.diffusion_model.out.0.weight",
    ):
        with pytest.raises(
            RunError,
            match=f"no generator that can be imported: expected Hyper-iNGP .*found {other}",
        ):
            import_weights(saved(tmp_path / "other.ckpt", {other: torch.ones(2)}))
    with pytest.raises(RunError, match="has no place in our Hyper-iNGP"):
        import_weights(
            saved(
                tmp_path / "other.ckpt",
                state | {"geometry.sdf_network.layers.0.weight": torch.ones(64, 32)},
            )
        )
    with pytest.raises(UsageError, match="there is no such file"):
        import_weights(tmp_path / "none.ckpt")


# the command --------------------------------------------------------------------------------------


def small(tmp_path, width=96):
    "Our small generator, well moved, and its file under the release's names."
    torch.manual_seed(0)
    settings = ReleasedSettings(
        replace(
            HyperINGPSettings.paper(),
            grid=SMALL_GRID,
            text_width=width,
            hidden_layers=2,
            spectral_norm=True,
        ),
        PromptedMapSettings(HYPER_GRID, 64, HyperShape(width, 2240, 64, 1, False)),
    )
    model = settings.make().eval()
    with torch.no_grad():
        model.encoder.table.mul_(300)
        model.background.encoder.table.mul_(3000)
    state = {
        "geometry.bbox": torch.tensor([[-2.0] * 3, [2.0] * 3]),
        "renderer.variance._inv_std": torch.tensor(0.35),
    }
    for key, value in model.state_dict().items():
        key = key.replace("parametrizations.weight.original", "weight_orig").replace(
            "parametrizations.weight.0._", "weight_"
        )
        key = key.replace("hypernetwork.", "hypernet.").replace("encoder.table", TABLE)
        state[key if key.startswith("background.") else f"geometry.{key}"] = value
    return model, saved(tmp_path / "last.ckpt", state)


def test_from_a_file_to_an_evaluation_and_a_mesh(tmp_path, capsys):
    model, path = small(tmp_path)
    (tmp_path / "one.csv").write_text("scene,split\na red cube,train\nA red cube.,train\n")
    folder = tmp_path / "run"
    assert (
        run_command(
            [
                "import-weights",
                str(path),
                "--out",
                str(folder),
                "--prior",
                "tiny-sd",
                "--corpus",
                str(tmp_path / "one.csv"),
                "--column",
                "scene",
                "--drop-near-duplicates",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "Hyper-iNGP after 50000 steps" in said
        and "2 left over" in said
        and said.endswith(f"run: {folder}\n")
    )
    assert {p.name for p in (folder / "checkpoints/050000").iterdir()} == {
        "generator.safetensors",
        "state.json",
    }
    report = json.loads((folder / "import.json").read_text())
    assert (
        set(report["left"]) == {"geometry.bbox", "renderer.variance._inv_std"}
        and set(report["mapped"].values())
        == read_tensors(folder / "checkpoints/050000/generator.safetensors").keys()
    )

    run, texts = open_run(folder), ["a red cube", "a blue ball"]
    assert [prompt.text for prompt in run.prompts] == texts[:1]
    assert run.settings.corpus_settings == CorpusSettings("scene", drop_near_duplicates=True)
    points = torch.rand(2, 300, 3, generator=torch.Generator().manual_seed(1)) * 5 - 2.5
    with torch.no_grad():
        for _ in range(2):  # spectral norm does not move on when one looks
            ours, theirs = run.scene(texts), model(run.prior.encode_text(texts))
            for ask in ("sdf", "color", "background"):
                assert torch.equal(getattr(ours, ask)(points), getattr(theirs, ask)(points)), ask

    assert (
        run_command(
            [
                "export",
                str(folder),
                "--prompt",
                "a blue ball",
                "--to",
                str(tmp_path / "ball.glb"),
                "--resolution",
                "32",
            ]
        )
        == 0
    )
    assert (tmp_path / "ball.glb").read_bytes()[:4] == b"glTF"
    assert run_command(["evaluate", str(folder), "--views", "1"]) == 0
    assert json.loads((folder / "eval.json").read_text())["step"] == 50_000
    with pytest.raises(UsageError, match="has imported weights without a state of Adam"):
        run_training(folder, replace(run.settings, steps=60_000), resume=True, show=False)


@pytest.mark.parametrize("what, code, words", [
    ("another width", 2, "reads text of width 64, prior tiny-sd gives 96"),
    ("half", 1, "is no whole checkpoint"),
    ("code", 1, "carries code"),
    ("missing file", 2, "there is no such file"),
    ("no corpus", 2, "no corpus 'nothing'"),
    ("no prior", 2, "no prior 'nerf'"),
])  # fmt: skip
def test_refusals_are_one_sentence_and_make_no_folder(what, code, words, tmp_path, capsys):
    _, path = small(tmp_path, width=64 if what == "another width" else 96)
    options = {"--prior": "tiny-sd", "--corpus": "toybox-15"}
    match what:
        case "half":
            path.write_bytes(path.read_bytes()[:-5000])
        case "code":
            saved(path, {}, callbacks=Code(tmp_path / "executed"))
        case "missing file":
            path = tmp_path / "none.ckpt"
        case "no corpus":
            options["--corpus"] = "nothing"
        case "no prior":
            options["--prior"] = "nerf"
    assert (
        run_command(
            [
                "import-weights",
                str(path),
                "--out",
                str(tmp_path / "run"),
                *(x for pair in options.items() for x in pair),
            ]
        )
        == code
    )
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "executed").exists()
