"""Evaluation: an open_clip folder, shapes with metrics in closed form, the report end to end."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file

from scaledreamer.camera.poses import orbit
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.tensors import make_rng, seed_everything
from scaledreamer.eval import clip as clip_module
from scaledreamer.eval.clip import ClipScorer, cosines, recall, recall_by_object, similarity
from scaledreamer.eval.outlined_truth import OutlinedToyScene
from scaledreamer.eval.picture_level import picture_level
from scaledreamer.eval.report import TRUTH_METRICS, evaluate_scenes, summarise
from scaledreamer.eval.truth import (
    ToyScene,
    chamfer,
    field_grid,
    occupancy,
    silhouette_iou,
    solid_field,
    surface_points,
    truth_of,
    volume_iou,
    volume_iou_aligned,
)
from scaledreamer.field.scene import FogScene, SphereScene
from scaledreamer.toybox.captions import TOYBOX_15, object_of
from scaledreamer.toybox.renders import render_object
from scaledreamer.training.corpora import Prompt

CONFIG = {
    "model_cfg": {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 2, 1], "width": 24},
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 49408,
            "width": 64,
            "heads": 4,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.45, 0.4],
        "std": [0.25, 0.26, 0.27],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


@pytest.fixture
def folder(tmp_path):
    "An untrained model as open_clip writes its own."
    seed_everything(0)
    sizes = CONFIG["model_cfg"]
    model = CLIP(
        sizes["embed_dim"], CLIPVisionCfg(**sizes["vision_cfg"]), CLIPTextCfg(**sizes["text_cfg"])
    )
    place = tmp_path / "untrained"
    place.mkdir()
    save_file(model.state_dict(), place / "open_clip_model.safetensors")
    (place / "open_clip_config.json").write_text(json.dumps(CONFIG))
    return place


def ball(radius: float, center: tuple[float, float, float] = (0.0, 0.0, 0.0)):
    return lambda points: (points - torch.tensor(center)).norm(dim=-1) - radius


# CLIP


def test_features_do_not_depend_on_batch_or_chunk(folder):
    scorer = ClipScorer.load(folder)
    rgb = torch.rand(5, 3, 40, 40, generator=make_rng(0))
    texts = list(TOYBOX_15[:5])
    pictures, words = scorer.image_features(rgb), scorer.text_features(texts)
    scorer.chunk = 2
    for features, again, alone in (
        (pictures, scorer.image_features(rgb), [scorer.image_features(x[None]) for x in rgb]),
        (words, scorer.text_features(texts), [scorer.text_features([t]) for t in texts]),
    ):
        assert torch.allclose(features.norm(dim=-1), torch.ones(5), atol=1e-5)
        assert torch.allclose(again, features, atol=1e-5) and torch.allclose(
            torch.cat(alone), features, atol=1e-5
        )
        assert not features.requires_grad
    assert scorer.name == "untrained"


def test_colours_outside_the_range_are_clamped(folder):
    scorer = ClipScorer.load(str(folder))
    rgb = torch.rand(2, 3, 64, 64, generator=make_rng(1)) * 1.5 - 0.25
    assert torch.equal(scorer.image_features(rgb), scorer.image_features(rgb.clamp(0, 1)))


def test_a_text_beyond_the_window_is_cut_before_its_end_token_with_a_warning(folder):
    scorer = ClipScorer.load(folder)
    long = "a red ball" + " on a blue cube" * 20
    with pytest.warns(UserWarning, match="reads at most 24 tokens.* beginning of 1 of the texts"):
        features = scorer.text_features(["a red ball", long])
    tokens = scorer.tokenizer([long, ""])
    assert tokens[0, -1] == tokens[1, 1]  # the end-of-text token
    expected = scorer.text_features(["a red ball" + " on a blue cube" * 4 + " on a blue"])
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    start = scorer.tokenizer(["a red ball" + " on a blue cube" * 4 + " on a blue"])
    assert torch.equal(tokens[0, :22], start[0, :22])
    torch.testing.assert_close(features[1:], expected)


def refusal(name) -> str:
    with pytest.raises((RunError, UsageError)) as caught:
        ClipScorer.load(name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return f"{caught.type.__name__}: {message}"


def test_models_that_cannot_be_loaded(folder, tmp_path, monkeypatch):
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "open_clip_model.safetensors is no whole safetensors file" in refusal(folder)
    weights.write_bytes(whole)
    config.write_text(json.dumps(CONFIG | {"model_cfg": CONFIG["model_cfg"] | {"embed_dim": 32}}))
    assert "cannot be loaded" in refusal(folder)
    weights.unlink()
    assert "it has no weights" in refusal(folder)
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    assert refusal("ViT-L-14:mine").startswith(
        "UsageError: CLIP model 'ViT-L-14:mine' is not known to open_clip: its weights are openai"
    )
    monkeypatch.setattr(clip_module, "asset", lambda path: tmp_path / "assets" / path)
    assert "install the package again" in refusal(None)


def test_the_shipped_model_recognises_the_truth():
    scorer, cameras = ClipScorer.load(), orbit(4)
    rgb = torch.cat(
        [
            render_object(object_of(t), cameras, 64).over(torch.ones(3)).permute(0, 3, 1, 2)
            for t in TOYBOX_15
        ]
    )
    images, texts = (
        scorer.image_features(rgb).unflatten(0, (15, 4)),
        scorer.text_features(list(TOYBOX_15)),
    )
    assert scorer.name == "tiny-clip"
    assert (
        recall(images, texts, texts, torch.arange(15)).float().mean() > 0.95
        and recall_by_object(images, texts, texts, torch.arange(15)).all()
    )


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_the_argmax_over_the_gallery(seed):
    rng = make_rng(seed)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=rng), dim=-1)
    gallery, index = unit(30, 16), torch.randperm(30, generator=rng)[:8]
    texts = gallery[index]
    images = torch.nn.functional.normalize(
        texts[:, None] + 0.5 * torch.randn(8, 11, 16, generator=rng), dim=-1
    )
    table = images @ gallery.T
    assert torch.equal(recall(images, texts, gallery, index), table.argmax(-1) == index[:, None])
    assert torch.equal(
        recall_by_object(images, texts, gallery, index), table.mean(1).argmax(-1) == index
    )
    assert similarity(images, texts) == pytest.approx(
        float(table.gather(2, index[:, None, None].expand(-1, 11, 1)).mean()), abs=1e-6
    )
    assert cosines(images, texts).shape == (8, 11)
    order = torch.randperm(30, generator=rng)
    place = order.argsort()[index]  # the same gallery, shuffled
    assert torch.equal(
        recall(images, texts, gallery[order], place), recall(images, texts, gallery, index)
    )


# truth


def test_iou_of_spheres():
    small, large = (occupancy(ball(r), 64, 1.0) for r in (0.4, 0.6))
    assert float(volume_iou(small, large)) == pytest.approx((0.4 / 0.6) ** 3, abs=6e-3)
    assert float(volume_iou(large, large)) == 1 and float(volume_iou(large, ~large)) == 0


@pytest.mark.parametrize(("scale", "rise"), [(0.8, 0.15), (1.0, 0.0), (1.3, -0.1)])
def test_alignment_finds_scale_and_height(scale, rise):
    toy = object_of("a yellow mushroom")
    truth = field_grid(toy.sdf, 40, 1.0)
    pred = occupancy(toy.moved(scale, (0.0, 0.0, rise)).sdf, 40, 1.0)
    found = volume_iou_aligned(pred, truth, 1.0)
    assert found.iou > 0.96 and found.iou >= float(volume_iou(pred, truth < 0))
    assert found.scale == pytest.approx(scale, rel=0.03) and found.rise == pytest.approx(
        rise, abs=0.02
    )


def test_alignment_forgives_nothing_else():
    toy = object_of("a blue cube")
    truth = field_grid(toy.sdf, 40, 1.0)
    aside = occupancy(toy.moved(1.0, (0.0, 0.3, 0.0)).sdf, 40, 1.0)
    assert volume_iou_aligned(aside, truth, 1.0).iou < 0.6


def test_chamfer_of_spheres():
    surface = lambda r, z=0.0: surface_points(field_grid(ball(r, (0.0, 0.0, z)), 48, 1.0), 1.0)
    assert chamfer(surface(0.5), surface(0.5)) == 0
    assert chamfer(surface(0.3), surface(0.6)) == pytest.approx(0.3, abs=5e-3)
    assert 0 < chamfer(surface(0.5), surface(0.5, 0.1)) < 0.1
    assert math.isnan(chamfer(surface(0.5), surface(0.5)[:0]))


def test_silhouettes():
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    opacity = mask.float()
    opacity[1, 2:6, 4:6] = 0.4
    assert silhouette_iou(opacity, mask).tolist() == [1.0, 0.5]


def test_fields_of_every_kind_of_scene():
    points = torch.rand(50, 3, generator=make_rng(2)) * 2 - 1
    pair = SphereScene(torch.tensor([0.5, 0.7]))
    exact = torch.stack([ball(0.5)(points), ball(0.7)(points)])
    assert torch.allclose(solid_field(pair, 2)(points), exact, atol=1e-6)
    pair.sdf_at_shared = lambda p: exact
    assert solid_field(pair, 2)(points) is exact
    fog = solid_field(FogScene(extinction=20.0, ball_radius=0.5), 3)(points)
    assert fog.shape == (3, 50) and torch.equal(fog[0] < 0, points.norm(dim=-1) < 0.5)


def test_only_the_grammar_has_a_truth():
    assert truth_of("a red ball") is not None and truth_of("A red ball") is None
    with pytest.raises(ValueError, match="is not a Toybox caption"):
        ToyScene(["a corgi"])


# report

PROMPTS = [
    Prompt(f"p{i}", text) for i, text in enumerate(("a red ball", "a blue house", "a corgi"))
]


def scene_of(texts: list[str]) -> ToyScene:
    "A perfect generator, but it has never seen a corgi."
    return ToyScene([text.replace("a corgi", "a black head") for text in texts], radius=0.75)


def test_report_from_end_to_end(folder):
    scorer, done = ClipScorer.load(folder), []
    extra = {"toybox-800": ["a green ball", "a red ball"]}
    result = evaluate_scenes(
        scene_of,
        PROMPTS,
        scorer,
        views=3,
        size=32,
        gallery=extra,
        progress=lambda *x: done.append(x),
        at_once=2,
    )
    assert done == [(2, 3), (3, 3)]
    clip_keys = "r_at_1 r_at_1_object sim clip_model n_views gallery_size per_prompt"
    truth_keys = "volume_iou volume_iou_aligned silhouette_iou chamfer"
    assert set(f"{clip_keys} {truth_keys}".split()) | {
        "r_at_1_toybox_800",
        "gallery_size_toybox_800",
    } <= set(result)
    assert (
        result["clip_model"],
        result["n_views"],
        result["gallery_size"],
        result["gallery_size_toybox_800"],
    ) == ("untrained", 3, 3, 4)
    assert (result["volume_iou"], result["volume_iou_aligned"], result["chamfer"]) == (
        1.0,
        1.0,
        0.0,
    )
    # the soft edge of the renderer lies outside the exact silhouette
    assert 0.7 < result["silhouette_iou"] < 0.9
    rows = result["per_prompt"]
    assert [row["id"] for row in rows] == ["p0", "p1", "p2"]
    assert all(row[name] is not None for row in rows[:2] for name in TRUTH_METRICS) and all(
        rows[2][name] is None for name in TRUTH_METRICS
    )
    assert result["sim"] == pytest.approx(sum(row["sim"] for row in rows) / 3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result

    alone = evaluate_scenes(
        scene_of,
        PROMPTS[1:2],
        scorer,
        views=3,
        size=32,
        gallery={"own": [p.text for p in PROMPTS]} | extra,
        at_once=1,
    )
    for name, value in alone["per_prompt"][0].items():
        assert value == (
            rows[1][name] if isinstance(value, str) else pytest.approx(rows[1][name], abs=1e-5)
        ), name


def test_metrics_of_an_empty_scene(folder):
    empty = lambda texts: SphereScene(torch.tensor([0.01]), centers=torch.tensor([[5.0, 0.0, 0.0]]))
    result = evaluate_scenes(empty, PROMPTS[:1], ClipScorer.load(folder), views=2, size=16)
    assert (
        result["volume_iou"],
        result["volume_iou_aligned"],
        result["silhouette_iou"],
        result["chamfer"],
    ) == (0.0, 0.0, 0.0, None)


def test_means_over_a_part():
    rows = [
        {"id": "a", "text": "", "split": s, "sim": x, "chamfer": None}
        for s, x in (("train", 0.2), ("test", 0.4), ("test", 0.6))
    ]
    assert summarise(rows)["sim"] == pytest.approx(0.4) and summarise(rows)["chamfer"] is None
    assert summarise([row for row in rows if row["split"] == "test"])["sim"] == pytest.approx(0.5)


def test_images_that_are_not_finite(folder):
    broken = lambda scene, cameras, size: SimpleNamespace(
        rgb=torch.full((1, 2, 3, size, size), torch.nan), opacity=torch.zeros(1, 2, 1, size, size)
    )
    with pytest.raises(RunError, match="prompt p0 .* not finite"):
        evaluate_scenes(
            scene_of, PROMPTS[:1], ClipScorer.load(folder), views=2, size=8, renderer=broken
        )
    with pytest.raises(UsageError, match="0 prompts"):
        evaluate_scenes(scene_of, [], ClipScorer.load(folder))


# several CLIP models, and the row of the truth


def test_several_models_in_one_table(folder):
    first, second = ClipScorer.load(), ClipScorer.load(folder)
    options = {"views": 3, "size": 32, "gallery": {"toybox-800": ["a green ball"]}}
    both = evaluate_scenes(scene_of, PROMPTS[:2], [first, second], **options)
    alone = [
        evaluate_scenes(scene_of, PROMPTS[:2], scorer, **options) for scorer in (first, second)
    ]
    assert both["clip_models"] == ["tiny-clip", "untrained"] and both["clip_model"] == "tiny-clip"
    plain = lambda row: {k: v for k, v in row.items() if "(untrained)" not in k}
    for i in range(2):
        assert plain(both["per_prompt"][i]) == alone[0]["per_prompt"][i]
    for part in ("truth", "chance"):
        assert plain(both[part]) == alone[0][part]
    for key in ("sim", "r_at_1", "r_at_1_object", "r_at_1_toybox_800"):
        assert both[f"{key} (untrained)"] == alone[1][key]
        assert both["truth"][f"{key} (untrained)"] == alone[1]["truth"][key]
    assert both["intervals"]["sim (untrained)"] == alone[1]["intervals"]["sim"]
    with pytest.raises(UsageError, match="two CLIP models are named tiny-clip"):
        evaluate_scenes(scene_of, PROMPTS[:1], [first, ClipScorer.load()], views=1, size=8)


def test_the_row_of_the_truth_is_what_its_own_field_scores(folder):
    "A generator that learns the field of the truth's row gets its metrics."
    level = picture_level(ToyScene([]), 1 / 30)
    perfect = lambda texts: OutlinedToyScene(texts, level, radius=0.75)
    prompts = [Prompt("0", "a red ball"), Prompt("1", "a pink head")]
    result = evaluate_scenes(perfect, prompts, ClipScorer.load(folder), views=8, size=32)
    for key, value in result["truth"].items():
        assert result[key] == pytest.approx(value, abs=2e-3), key
    assert result["truth"]["volume_iou_picture"] == 1 and result["truth"]["fronts"] == 1
    exact = evaluate_scenes(scene_of, prompts, None, views=8, size=32)
    assert exact["truth"]["psnr"] > exact["psnr"] + 3  # distances are shown too large
    assert exact["chamfer"] == 0 < exact["chamfer_picture"]
