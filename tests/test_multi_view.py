"""MVDream: its files, the nine methods over groups of views, and training with rings of cameras."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from test_faults_pipelines import original_format, original_unet_name
from torch import nn

from scaledreamer.camera.poses import FramedCameras, SingleCameras, orbit
from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.tensors import make_rng, seed_everything
from scaledreamer.distill.conditioning import make_conditioning
from scaledreamer.distill.distill_settings import DistillSettings
from scaledreamer.distill.estimator import LoRAEstimator
from scaledreamer.distill.later_methods import invert, ism, sdi
from scaledreamer.distill.method_checks import check_method
from scaledreamer.distill.methods import asd, csd, sds
from scaledreamer.distill.vsd import EstimatorTrainer, vsd
from scaledreamer.prior import single_file
from scaledreamer.prior.camera_embedding import with_cameras
from scaledreamer.prior.clip_text import TextCache
from scaledreamer.prior.multi_view import MultiViewPrior, random_multi_view
from scaledreamer.prior.multi_view_unet import MultiViewUNet
from scaledreamer.prior.open_pipeline import open_pipeline
from scaledreamer.prior.pipelines import quiet, random_pipeline, random_unet
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior
from scaledreamer.training.optim_settings import OptimSettings
from scaledreamer.training.step import shared_rows
from scaledreamer.training.step_inspection import inspect_step
from scaledreamer.training.train_settings import ESTIMATOR_METHODS, METHODS, TrainSettings
from scaledreamer.training.train_settings import build_prior
from scaledreamer.training.trainer import open_run, run_training

PROMPTS = ["a red ball", "a blue cube", "a ball on a cube"]
CAMERAS = orbit(4, prompts=3, elevation=20.0).c2w().flatten(0, 1).flatten(1)  # [12, 16]


@pytest.fixture(scope="module")
def prior():
    return random_multi_view()


def write_pipeline(prior, folder):
    "The folder of a multi-view prior, as make-prior writes it."
    pipe = random_pipeline()
    parts = {"unet": prior.unet, "vae": prior.vae, "text_encoder": prior.text.encoder}
    for name, network in parts.items():
        setattr(pipe, name, network)
    with quiet():
        pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(prior, tmp_path_factory):
    return write_pipeline(prior, tmp_path_factory.mktemp("priors") / "tiny-mv")


def noise_of(prior, rows=slice(None)):
    "The noise that the prior predicts for fixed inputs of three groups."
    tokens = prior.encode_text(PROMPTS).tokens.repeat_interleave(4, 0)
    x_t = torch.randn(12, *prior.latent_shape, generator=make_rng(0))
    t = torch.tensor([900, 500, 100]).repeat_interleave(4)
    return prior.predict_noise(x_t[rows], t[rows], tokens[rows], CAMERAS[rows])


# the files ----------------------------------------------------------------------------------------


def open_clip_text(encoder):
    "The weights of a CLIPTextModel by the names of open_clip."
    state, out = encoder.state_dict(), {}
    get = lambda key: state[key if key in state else f"text_model.{key}"]  # noqa: E731
    out["token_embedding.weight"] = get("embeddings.token_embedding.weight")
    out["positional_embedding"] = get("embeddings.position_embedding.weight")
    out |= {f"ln_final.{x}": get(f"final_layer_norm.{x}") for x in ("weight", "bias")}
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    names |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    for layer in range(encoder.config.num_hidden_layers):
        theirs = f"transformer.resblocks.{layer}"
        for x in ("weight", "bias"):
            for ours, name in names.items():
                out[f"{theirs}.{name}.{x}"] = get(f"encoder.layers.{layer}.{ours}.{x}")
            parts = [get(f"encoder.layers.{layer}.self_attn.{p}_proj.{x}") for p in "qkv"]
            out[f"{theirs}.attn.in_proj_{x}"] = torch.cat(parts)
    return {f"cond_stage_model.model.{key}": value for key, value in out.items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_original_checkpoint(tmp_path, monkeypatch, wrapped):
    "Names of Stable Diffusion 2 with open_clip's text encoder, and two layers for the camera."
    seed_everything(5)
    pipe, file = random_pipeline(kl=True), tmp_path / "sd-v2.1-base-4view.pt"
    unet = with_cameras(pipe.unet)
    for weight in unet.class_embedding.parameters():
        nn.init.normal_(weight)
    state = original_format(pipe)
    state = {key: v for key, v in state.items() if not key.startswith("cond_stage_model.")}
    state |= open_clip_text(pipe.text_encoder)
    for ours, theirs in (("linear_1", "0"), ("linear_2", "2")):
        for x in ("weight", "bias"):
            value = unet.class_embedding.state_dict()[f"{ours}.{x}"]
            state[f"model.diffusion_model.camera_embed.{theirs}.{x}"] = value
    torch.save({"state_dict": state} if wrapped else state, file)
    parts = ("unet", "vae", "text_encoder")
    to_json = lambda part: part.config if hasattr(part.config, "to_json_string") else part  # noqa: E731
    configs = {part: json.loads(to_json(getattr(pipe, part)).to_json_string()) for part in parts}
    monkeypatch.setattr(single_file, "_version", lambda *args: 2)
    monkeypatch.setattr(single_file, "single_file_configs", lambda version: configs)
    monkeypatch.setattr(single_file, "clip_tokenizer", lambda pad: pipe.tokenizer)
    monkeypatch.setattr(single_file, "noise_cosine", lambda *networks: 1.0)
    prior = MultiViewPrior.from_pretrained(file)
    assert prior.unet.config.sample_size == 32 and prior.views == 4
    for key, value in unet.state_dict().items():
        assert torch.equal(prior.unet.state_dict()[key], value), key
    true = MultiViewPrior(
        unet, pipe.vae, TextCache(pipe.tokenizer, pipe.text_encoder), pipe.scheduler
    )
    torch.testing.assert_close(prior.encode_text(PROMPTS).tokens, true.encode_text(PROMPTS).tokens)
    true.latent_shape = prior.latent_shape
    torch.testing.assert_close(noise_of(prior), noise_of(true))
    with pytest.raises(UsageError, match="sees groups of 4 views: open it with MultiViewPrior"):
        StableDiffusionPrior.from_pretrained(file)
    del state["model.diffusion_model.camera_embed.2.bias"]
    torch.save(state, file)
    with pytest.raises(UsageError, match="camera embedding is of another model than MVDream"):
        MultiViewPrior.from_pretrained(file)


def port_config(unet):
    config = unet.config
    return {
        "_class_name": "MultiViewUNetModel",
        "image_size": config.sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": config.block_out_channels[0],
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [1],
        "num_head_channels": 8,
        "context_dim": config.cross_attention_dim,
        "camera_dim": 16,
        "transformer_depth": 1,
    }


def small_unet():
    "As `random_unet`, with the linear projections and groups of 32 of Stable Diffusion 2."
    config = dict(random_unet().config) | {
        "block_out_channels": (32, 64),
        "norm_num_groups": 32,
        "use_linear_projection": True,
        "attention_head_dim": (4, 8),
    }
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    return type(random_unet()).from_config(config)


@pytest.fixture
def port(folder, tmp_path):
    "A folder in the layout of the port to diffusers, and its U-Net."
    seed_everything(7)
    unet = with_cameras(small_unet())
    for weight in unet.class_embedding.parameters():
        nn.init.normal_(weight)
    place = tmp_path / "port"
    place.mkdir()
    for path in folder.iterdir():
        if path.name != "unet":
            (place / path.name).symlink_to(path)
    (place / "model_index.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "MVDreamPipeline", "unet": ["mv_unet", "MultiViewUNetModel"]}
    (place / "model_index.json").write_text(json.dumps(index))
    (place / "unet").mkdir()
    (place / "unet/config.json").write_text(json.dumps(port_config(unet)))
    camera = {
        "class_embedding.linear_1": "camera_embed.0",
        "class_embedding.linear_2": "camera_embed.2",
    }
    state = {}
    for key, value in unet.state_dict().items():
        layer, _, kind = key.rpartition(".")
        name = f"{camera[layer]}.{kind}" if layer in camera else original_unet_name(key)
        state[name] = value.clone().contiguous()
    save_file(state, place / "unet/diffusion_pytorch_model.safetensors")
    return place, unet, state


def test_the_port_to_diffusers(port, prior):
    place, unet, _ = port
    opened = MultiViewPrior.from_pretrained(place)
    for key, value in unet.state_dict().items():
        assert torch.equal(opened.unet.state_dict()[key], value), key
    scheduler = random_pipeline().scheduler
    torch.testing.assert_close(
        noise_of(opened), noise_of(MultiViewPrior(unet, prior.vae, prior.text, scheduler))
    )


def test_ports_that_do_not_fit(port):
    place, unet, state = port
    file, weights = place / "unet/config.json", place / "unet/diffusion_pytorch_model.safetensors"
    for entry, kind, said in (
        ({"ip_dim": 16}, UsageError, "unet/config.json: ip_dim is 16: expected 0, since no image"),
        ({"camera_dim": 12}, UsageError, "unet/config.json: camera_dim is 12"),
        ({"channel_mult": None}, UsageError, "channel_mult is null: expected a list of integers"),
        ({"model_channels": 64}, RunError, "weights of its config.json, such as"),
        ({"context_dim": 24}, RunError, "weights of its config.json, such as"),
    ):
        file.write_text(json.dumps(port_config(unet) | entry))
        with pytest.raises(kind, match=said):
            MultiViewPrior.from_pretrained(place)
    file.write_text(json.dumps(port_config(unet)))
    save_file({key: v for key, v in state.items() if "camera" not in key}, weights)
    with pytest.raises(UsageError, match="unet has no camera embedding: it is no MVDream"):
        MultiViewPrior.from_pretrained(place)


def test_a_folder_comes_back(folder, prior):
    opened = MultiViewPrior.from_pretrained(folder)
    torch.testing.assert_close(noise_of(opened), noise_of(prior))
    chosen = build_prior(TrainSettings(prior=str(folder)), ())
    assert type(chosen) is MultiViewPrior and chosen.views == 4
    torch.testing.assert_close(noise_of(chosen), noise_of(prior))
    assert open_pipeline(folder).unet.config.views == 4


@pytest.mark.parametrize("views", [0, 1, 65, "4", None])
def test_numbers_of_views_that_cannot_be(folder, tmp_path, views):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        if path.name != "unet":
            (copy / path.name).symlink_to(path)
    (copy / "unet").mkdir()
    config = json.loads((folder / "unet/config.json").read_text()) | {"views": views}
    (copy / "unet/config.json").write_text(json.dumps(config))
    name = "diffusion_pytorch_model.safetensors"
    (copy / "unet" / name).symlink_to(folder / "unet" / name)
    said = "class_embed_type is" if views is None else f"views is {views}, and class_embed_type"
    with pytest.raises(UsageError, match=said):
        MultiViewPrior.from_pretrained(copy)


# groups -------------------------------------------------------------------------------------------


def test_three_groups_are_three_runs_of_one(prior):
    whole = noise_of(prior)
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        torch.testing.assert_close(noise_of(prior, rows), whole[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [[2, 3, 0, 1], [3, 2, 1, 0], [1, 2, 3, 0]])
def test_views_of_a_group_may_come_in_any_order(prior, order):
    rows = torch.tensor([*range(4), *(4 + i for i in order), *range(8, 12)])
    torch.testing.assert_close(noise_of(prior, rows), noise_of(prior)[rows], rtol=1e-4, atol=1e-5)


def test_a_single_view_unet_is_the_start():
    seed_everything(0)
    unet = random_unet().eval()
    net = MultiViewUNet(with_cameras(unet))
    x_t, tokens = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16)
    t = torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        assert torch.equal(net(x_t, t, tokens, CAMERAS[:4], views=1), unet(x_t, t, tokens).sample)
        joined = net(x_t, t, tokens, CAMERAS[:4])
    assert not torch.allclose(joined, unet(x_t, t, tokens).sample, atol=1e-3)


# methods ------------------------------------------------------------------------------------------


def texts_of(prior, mode="plain"):
    "Of the three prompts, a row each."
    return make_conditioning(
        prior,
        PROMPTS,
        torch.tensor([10.0, 100.0, 170.0]),
        torch.tensor([15.0, 15.0, 15.0]),
        mode,
        plain=True,
        nfsd_negative_prompt="a cube",
        bridge_source_prompt="red",
    )


def per_view(text):
    "The same texts for the four views of each prompt."
    values = {name: getattr(text, name) for name in text.__dataclass_fields__}
    more = {n: v.repeat_interleave(4, 0) for n, v in values.items() if v is not None}
    return replace(text, **more)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_groups(prior, name):
    method = METHODS[name]
    if name in ESTIMATOR_METHODS:
        estimator = LoRAEstimator(prior)
        for weight in estimator.parameters():
            weight.data = torch.randn(weight.shape, generator=make_rng(weight.numel())) * 0.05
        method = partial(method, estimator=estimator)
    if name == "asd":
        shifted = lambda prior, latents, text, t, noise, camera: asd(  # noqa: E731
            prior, latents, text, t, noise, (t + 10).clamp(max=999), camera=camera
        )
        method = shifted
    check_method(method, prior, texts_of(prior), CAMERAS)
    if name in ("sds", "csd"):
        check_method(method, prior, texts_of(prior, "perp-neg"), CAMERAS)


def step_of(prior, seed=0, t=(900, 500, 100)):
    latents, noise = (
        torch.randn(12, *prior.latent_shape, generator=make_rng(seed + i)) for i in range(2)
    )
    return latents, per_view(texts_of(prior)), torch.tensor(t).repeat_interleave(4), noise


def test_identities_between_methods(prior):
    "ASD without shift is (s - 1) CSD; SDS is its parts; VSD of an untrained LoRA is ASD at dt = 0."
    latents, text, t, noise = step_of(prior)
    options = {"camera": CAMERAS}
    one = csd(prior, latents, text, t, noise, **options)
    two = asd(prior, latents, text, t, noise, t, guidance=7.5, **options)
    torch.testing.assert_close(two.gradient, 6.5 * one.gradient, rtol=1e-3, atol=1e-4)
    three = sds(prior, latents, text, t, noise, guidance=7.5, **options)
    torch.testing.assert_close(three.target, two.target)
    assert torch.equal(three.source, noise)
    estimator = LoRAEstimator(prior)
    four = vsd(prior, latents, text, t, noise, guidance=7.5, estimator=estimator, **options)
    torch.testing.assert_close(four.gradient, two.gradient, rtol=1e-3, atol=1e-4)


def test_the_estimator_learns_and_leaves_the_prior(prior):
    latents, text, t, noise = step_of(prior, 3)
    before, state = noise_of(prior), {k: v.clone() for k, v in prior.unet.state_dict().items()}
    estimator = LoRAEstimator(prior)
    assert any("mlp" in name for name in estimator.state_dict())
    assert not any(".prior." in name for name in estimator.state_dict())
    trainer, rng = EstimatorTrainer(estimator, lr=3e-3), make_rng(0)
    losses = [
        trainer.step(prior.schedule, latents, text.plain, CAMERAS, rng).item() for _ in range(80)
    ]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert torch.equal(noise_of(prior), before)
    assert all(torch.equal(v, state[k]) for k, v in prior.unet.state_dict().items())
    moved = vsd(prior, latents, text, t, noise, estimator=estimator, camera=CAMERAS)
    beside = prior.predict_noise(
        prior.schedule.add_noise(latents, noise, t), t, text.positive, CAMERAS
    )
    torch.testing.assert_close(moved.unguided, beside, rtol=1e-4, atol=1e-4)
    assert (moved.source - beside).abs().max() > 1e-3
    far = CAMERAS.clone().unflatten(1, (4, 4))
    far[:, :3, 3] *= 3
    again = vsd(prior, latents, text, t, noise, estimator=estimator, camera=far.flatten(1))
    torch.testing.assert_close(again.gradient, moved.gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [sdi, ism])
def test_inversion_of_views_with_timesteps_of_their_own(prior, method):
    "Views that have reached their timestep wait for the others of their group."
    latents, text, _, noise = step_of(prior)
    t = torch.tensor([900, 120, 500, 130, 260, 310, 20, 980, 400, 400, 400, 400])
    whole = method(prior, latents, text, t, noise, camera=CAMERAS).gradient
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        part = {f: getattr(text, f) for f in ("positive", "unconditional")}
        words = replace(per_view(texts_of(prior)), **part)
        words = type(text)(words.positive[rows], words.unconditional[rows])
        alone = method(prior, latents[rows], words, t[rows], noise[rows], camera=CAMERAS[rows])
        torch.testing.assert_close(alone.gradient, whole[rows], rtol=1e-3, atol=1e-3)


def test_inversion_in_groups_is_inversion_alone():
    "For a prior that sees one view, groups change nothing."
    schedule = random_multi_view().schedule
    latents, noise = (torch.randn(8, 3, generator=make_rng(i)) for i in range(2))
    until = torch.tensor([700, 90, 250, 300, 10, 999, 0, 420])
    predict = lambda x, at, rows: (x * 0.1 + noise[rows]).sin()  # noqa: E731
    alone = invert(schedule, predict, latents, until, noise, 100, 0.3)
    groups = invert(schedule, predict, latents, until, noise, 100, 0.3, views=4)
    assert groups.isfinite().all()
    whole = until.unflatten(0, (-1, 4)).amax(1).repeat_interleave(4) == until
    assert whole.sum() == 2  # the longest of each group; the others differ only by rounding
    torch.testing.assert_close(groups, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sds", "asd", "vsd", "ism"])
def test_methods_without_cameras_say_so(prior, name):
    latents, text, t, noise = step_of(prior)
    options = {"estimator": LoRAEstimator(prior)} if name == "vsd" else {}
    with pytest.raises(UsageError, match="no camera for "):
        METHODS[name](prior, latents, text, t, noise, t, **options)


# training -----------------------------------------------------------------------------------------


def small(folder, **changed):
    defaults = dict(
        prior=str(folder),
        prompt=("a red ball", "a blue cube"),
        generator="ingp" if changed.pop("single", False) else "hyper-ingp",
        steps=2,
        prompts_per_step=2,
        resolution=8,
        validate_every=10**6,
    )
    return TrainSettings(**defaults | changed)


def trained(tmp_path, settings, monkeypatch):
    "A run, and every call of the prior: rows, timesteps and cameras."
    calls, true = [], MultiViewPrior.noise_by

    def spied(self, unet, x_t, t, tokens, labels, **options):
        calls.append((len(x_t), t.clone(), labels.clone()))
        return true(self, unet, x_t, t, tokens, labels, **options)

    monkeypatch.setattr(MultiViewPrior, "noise_by", spied)
    run = run_training(tmp_path / "run", settings, show=False)
    return run, [call for call in calls if call[0] > 4 or call[1].min() < 999]


@pytest.mark.parametrize("method", METHODS)
def test_training_in_groups(folder, tmp_path, monkeypatch, method):
    run, calls = trained(tmp_path, small(folder, method=method), monkeypatch)
    assert run.step == 2 and run.settings.views_per_prompt == 4
    assert run.settings.cameras == FramedCameras(rig=True)
    assert run.settings.distill.view_prompting == "plain"
    assert shared_rows(run.settings) == (4, 1)
    for rows, t, labels in calls:
        assert rows % 4 == 0
        times = t.unflatten(0, (-1, 4))
        assert torch.equal(times.amin(1), times.amax(1))
        positions = labels.unflatten(0, (-1, 4))[:, :, [3, 7, 11]]
        if labels[:, :16].abs().sum(1).min() > 0:  # ESD drops cameras
            across = positions + positions.roll(2, 1)  # opposite views: only the height is left
            assert across[..., :2].abs().max() < 1e-4
            assert (positions.norm(dim=-1) - 1).abs().max() < 1e-4


def test_eight_views_are_two_rings(folder, tmp_path, monkeypatch):
    settings = small(folder, views_per_prompt=8, prompts_per_step=1, method="csd")
    run, calls = trained(tmp_path, settings, monkeypatch)
    assert run.settings.cameras == FramedCameras(rig=True, views_per_ring=4)
    rows, t, labels = calls[0]
    assert rows == 16 and len(t[:8].unique()) == 2
    height = labels[:8, 11].unflatten(0, (2, 4))
    assert torch.allclose(height, height[:, :1].expand(2, 4), atol=1e-5)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"views_per_prompt": 6}, "views_per_prompt is 6: expected a multiple of 4"),
        ({"cameras": SingleCameras()}, "cameras are SingleCameras, each for itself"),
        ({"cameras": FramedCameras(views_per_ring=2)}, "views_per_ring is 2: expected 4"),
    ],
)
def test_settings_that_do_not_fit(folder, tmp_path, changed, said):
    with pytest.raises(UsageError, match=said):
        run_training(tmp_path / "run", small(folder, **changed), show=False)
    assert not (tmp_path / "run").exists()


def test_shared_noise_and_timesteps(folder, tmp_path, monkeypatch):
    "Both are settings; a run resumes with what it resolved."
    own = DistillSettings(timestep_per="image", noise_per="ring")
    settings = small(folder, distill=own, method="sds")
    run, calls = trained(tmp_path, settings, monkeypatch)
    assert shared_rows(run.settings) == (1, 4)
    assert len(calls[0][1][:8].unique()) == 8
    more = run_training(tmp_path / "run", replace(settings, steps=3), resume=True, show=False)
    assert more.step == 3 and more.settings.cameras.rig
    assert shared_rows(TrainSettings(views_per_prompt=3, distill=own)) == (1, 3)


def test_parts_of_a_step_are_whole_groups(folder, tmp_path):
    "Gradients that are accumulated over prompts are those of the whole batch."
    weights = []
    for parts in (1, 2):
        optim = OptimSettings(accumulate=parts)
        settings = small(folder, method="asd", steps=1, optim=optim)
        run = run_training(tmp_path / str(parts), settings, show=False)
        weights.append(torch.cat([p.detach().flatten() for p in run.generator.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_a_trained_run_opens_and_shows_a_step(folder, tmp_path):
    run_training(tmp_path / "run", small(folder, method="asd", log_every=1), show=False)
    run = open_run(tmp_path / "run")
    assert run.settings.views_per_prompt == 4 and run.settings.distill.timestep_per == "ring"
    assert inspect_step(run, 1) is not None
