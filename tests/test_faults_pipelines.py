"""Pipeline folders, files and hub ids as people have them: opened right, or one sentence."""

import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from damage import damage
from safetensors.torch import load_file, save_file

from scaledreamer.core.settings import RunError, UsageError
from scaledreamer.core.tensors import seed_everything
from scaledreamer.distill.estimator import LoRAEstimator
from scaledreamer.prior import single_file
from scaledreamer.prior.execution import PriorSettings
from scaledreamer.prior.pipelines import quiet, random_pipeline, random_unet
from scaledreamer.prior.schedule import scaled_linear
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior

CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
)
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A random pipeline's folder."
    seed_everything(0)
    folder = tmp_path_factory.mktemp("pipelines") / "whole"
    with quiet():
        random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    "A copy of the folder whose files may be changed."
    return shutil.copytree(whole, tmp_path / "copy")


def edit(folder: Path, file: str, **values) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refusal(given, error=(UsageError, RunError), **options) -> str:
    "The one sentence of the error."
    with pytest.raises(error) as caught:
        StableDiffusionPrior.from_pretrained(given, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000, message
    return message


def outcome(whole: Path, folder: Path, seed: int) -> tuple[str, str]:
    "What comes of the damage of a seed: loaded, or the kind of error, and the message."
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    found = damage(folder, [*CONFIGS, *WEIGHTS], random.Random(seed), folder / "executed")
    try:
        StableDiffusionPrior.from_pretrained(folder)
        kind, message = "loaded", ""
    except (UsageError, RunError) as error:
        message = str(error)
        names = found.file, found.file.split("/")[0], "model_index.json"
        short = "\n" not in message and len(message) < 1000
        kind = "refused" if any(x in message for x in names) and short else "unclear"
    except Exception as error:  # what must not be
        kind, message = type(error).__name__, str(error)
    return "executed" if (folder / "executed").exists() else kind, f"{found}: {message}"


def test_a_sample_of_damaged_folders(whole, tmp_path):
    outcomes = [outcome(whole, tmp_path / "copy", seed) for seed in range(60)]
    wrong = [o for o in outcomes if o[0] not in ("loaded", "refused")]
    assert not wrong, wrong
    assert sum(kind == "refused" for kind, _ in outcomes) >= 25


# single faults ------------------------------------------------------------------------------------

ENTRIES = [
    ("model_index.json", {"scheduler": ["my_pipe", "MyScheduler"]}, "code that comes with a model"),
    ("model_index.json", {"scheduler": ["diffusers", "NoScheduler"]}, "scheduler is 'NoScheduler'"),
    ("model_index.json", {"scheduler": ["diffusers", "AutoencoderKL"]}, "scheduler is 'Autoencod"),
    ("model_index.json", {"scheduler": [None, None]}, r"scheduler is \[null, null\]"),
    ("unet/config.json", {"sample_size": [8, 16]}, r"sample_size is \[8, 16\]"),
    ("unet/config.json", {"sample_size": None}, "sample_size is null"),
    ("unet/config.json", {"sample_size": 0}, "sample_size is 0"),
    ("unet/config.json", {"attention_head_dim": 0}, "attention_head_dim is 0"),
    ("unet/config.json", {"norm_num_groups": 0}, "norm_num_groups is 0"),
    ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
    ("unet/config.json", {"num_class_embeds": 7}, "num_class_embeds|class_embedding"),
    ("text_encoder/config.json", {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0"),
    ("tokenizer/tokenizer_config.json", {"pad_token": None}, "pad_token is null"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 0}, "model_max_length is 0"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "exponential"}, "beta_schedule is "),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0, 0]}, "alphas_cumprod is 1"),
]


@pytest.mark.parametrize("file, values, said", ENTRIES, ids=lambda x: str(x)[:40])
def test_the_file_and_the_entry_are_named(copy, file, values, said):
    message = refusal(edit(copy, file, **values))
    assert file in message or file.split("/")[0] in message
    assert re.search(said, message), message


def test_a_square_pair_is_a_size(copy):
    prior = StableDiffusionPrior.from_pretrained(edit(copy, "unet/config.json", sample_size=[8, 8]))
    assert prior.latent_shape == (4, 8, 8) and prior.image_size == 16


def test_text_of_another_width(copy, tmp_path):
    "Both networks are whole, and do not belong together."
    with quiet():
        random_unet(24).save_pretrained(copy / "unet")
    message = refusal(copy, UsageError)
    assert "texts of width 24 (cross_attention_dim of unet/config.json)" in message
    assert "gives 16 (hidden_size of text_encoder/config.json)" in message


# schedules ----------------------------------------------------------------------------------------

PROCESSES = [
    {"num_train_timesteps": 500},
    {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"trained_betas": np.linspace(0.001, 0.3, 40).tolist()},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
]


@pytest.mark.parametrize("values", PROCESSES, ids=lambda values: str(values)[:40])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepSch*"])
def test_schedules_are_those_of_diffusers(copy, name, values):
    name = name.replace("Sch*", "Scheduler")
    file = "scheduler/scheduler_config.json"
    edit(copy, file, _class_name=name, **values)
    edit(copy, "model_index.json", scheduler=["diffusers", name])
    config = json.loads((copy / file).read_text())
    theirs = getattr(diffusers, name).from_config(config)
    prior = StableDiffusionPrior.from_pretrained(copy)
    expected = theirs.alphas_cumprod.double()
    assert torch.equal(prior.schedule.alphas_cumprod, expected)
    assert prior.prediction_type == values.get("prediction_type", "epsilon")
    assert prior.schedule.steps == len(values.get("trained_betas", ())) or prior.schedule.steps == (
        values.get("num_train_timesteps", 1000)
    )


def test_the_schedule_is_float32_on_mps(monkeypatch):
    "MPS has no float64; the device is made up: what goes there stays, and may not be float64."
    move = torch.Tensor.to

    def to(self, *args, **options):
        if "mps" in map(str, args):
            assert self.dtype != torch.float64, "MPS has no float64"
            args = tuple("cpu" if str(x) == "mps" else x for x in args)
        return move(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    schedule = scaled_linear().to(torch.device("mps"))
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert torch.equal(schedule.alphas_cumprod, scaled_linear().alphas_cumprod.float())
    assert scaled_linear().to("cpu").alphas_cumprod.dtype == torch.float64


# models that mislead ------------------------------------------------------------------------------


def test_students_of_few_steps_are_reported(copy):
    def reported(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            StableDiffusionPrior.from_pretrained(copy, **options)
        return [str(w.message) for w in caught if "student of few steps" in str(w.message)]

    assert not reported()
    edit(copy, "model_index.json", _name_or_path="stabilityai/sd-turbo")
    assert len(reported()) == 1
    edit(copy, "model_index.json", _name_or_path="", scheduler=["diffusers", "LCMScheduler"])
    assert "LCMScheduler" in reported()[0]
    edit(copy, "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert not reported()
    edit(copy, "scheduler/scheduler_config.json", timestep_spacing="trailing")
    assert "trailing" in reported()[0]


def test_flows_are_refused(whole, copy, tmp_path):
    insta = shutil.copytree(whole, tmp_path / "instaflow_0_9B_from_sd_1_5")
    assert "rectified flow" in refusal(insta, UsageError)
    edit(copy, "model_index.json", _class_name="RectifiedFlowPipeline")
    assert "RectifiedFlowPipeline is a model of rectified flow" in refusal(copy, UsageError)
    edit(copy, "model_index.json", _class_name="StableDiffusionPipeline")
    edit(copy, "model_index.json", scheduler=["diffusers", "FlowMatchLCMScheduler"])
    assert "whose process is another flow" in refusal(copy, UsageError)
    edit(copy, "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    said = refusal(copy, UsageError)
    assert '_class_name is "DDIMScheduler": expected FlowMatchEulerDiscreteScheduler' in said
    edit(copy, "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    assert StableDiffusionPrior.from_pretrained(copy).prediction_type == "v_prediction"


@torch.no_grad()
def test_a_velocity_said_to_be_noise_is_refused(copy):
    "Under any name: a U-Net whose output is about minus its input, as from noise to data."
    unet = random_unet()
    for parameter in unet.parameters():
        torch.nn.init.zeros_(parameter)
    unet.conv_in.weight[:4, :, 1, 1] = torch.eye(4)
    last = unet.up_blocks[-1].resnets[-1].conv_shortcut  # of the layers above, and of conv_in
    last.weight[:4, 16:20, 0, 0] = torch.eye(4)
    unet.conv_norm_out.weight.fill_(1)
    for sign in (1, -1):
        unet.conv_out.weight[:, :4, 1, 1] = sign * torch.eye(4)
        with quiet():
            unet.save_pretrained(copy / "unet")
        if sign == 1:
            StableDiffusionPrior.from_pretrained(copy)
    assert "it seems to predict the velocity of a flow" in refusal(copy, UsageError)
    flow = "FlowMatchEulerDiscreteScheduler"  # whose velocity is noise minus image
    edit(copy, "model_index.json", scheduler=["diffusers", flow])
    edit(copy, "scheduler/scheduler_config.json", _class_name=flow)
    assert "from noise to image" in refusal(copy, UsageError)


def test_values_that_are_not_finite_are_refused(copy):
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, file)
    assert "unet: its output is not finite" in refusal(copy, RunError)


# priors as people have them -----------------------------------------------------------------------


def test_other_models_are_named(copy):
    two = ["transformers", "T5EncoderModel"]
    for values in (
        {"_class_name": "KolorsPipeline", "text_encoder_2": two},
        {"_class_name": "FluxPipeline", "unet": None, "transformer": ["diffusers", "Flux"]},
        {"_class_name": "PixArtAlphaPipeline", "unet": None, "transformer": ["diffusers", "Pix"]},
    ):
        index = json.loads((copy / "model_index.json").read_text())
        message = refusal(edit(copy, "model_index.json", **values), UsageError)
        assert f"a {values['_class_name']} has " in message and "Stable Diffusion 1 or 2" in message
        (copy / "model_index.json").write_text(json.dumps(index))
    for kind in ("StableDiffusion3Pipeline", "StableDiffusionXLPipeline"):
        other = {"_class_name": kind, "text_encoder_2": two}
        assert "open it with open_prior" in refusal(edit(copy, "model_index.json", **other))


def test_variants(whole, copy):
    pipe = random_pipeline()
    weights = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    with quiet():
        for part, network in weights.items():
            network.half().save_pretrained(copy / part, variant="fp16")
    full = load_file(whole / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    plain = StableDiffusionPrior.from_pretrained(copy)
    assert torch.equal(plain.unet.conv_in.weight, full)  # both are there
    chosen = StableDiffusionPrior.from_pretrained(copy, PriorSettings(variant="fp16"))
    assert torch.equal(chosen.unet.conv_in.weight, pipe.unet.conv_in.weight.float())
    for file in WEIGHTS:
        (copy / file).unlink()
    alone = StableDiffusionPrior.from_pretrained(copy)
    assert torch.equal(alone.unet.conv_in.weight, chosen.unet.conv_in.weight)
    message = refusal(copy, UsageError, settings=PriorSettings(variant="ema"))
    assert "no weights of variant 'ema' (variants there: fp16)" in message


def test_hub_ids_revisions_and_addresses(whole, tmp_path, monkeypatch):
    "A cache of the hub, made by hand, without a connection."
    commit, cache = "0123456789" * 4, tmp_path / "hub"
    folder = cache / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "refs/v2").write_text(commit)
    shutil.copytree(whole, folder / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    for given in (
        "owner/name",
        "owner/name@v2",
        f"owner/name@{commit}",
        "https://huggingface.co/owner/name",
        "https://huggingface.co/owner/name/tree/v2",
        "huggingface.co/owner/name/",
    ):
        assert StableDiffusionPrior.from_pretrained(given).image_size == 16
    assert "could not be read" in refusal("owner/name@v3", RunError)
    assert "is no address of a model on huggingface.co" in refusal("https://example.com/a/b")
    shutil.copytree(whole, tmp_path / "owner/name2")
    assert StableDiffusionPrior.from_pretrained("owner/name2").image_size == 16  # a folder


def test_what_is_downloaded(whole, monkeypatch):
    "Of a repository with everything in it, one kind of weights and nothing else."
    names = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
    more = ["v1-5.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/flax_model.msgpack"]
    found = {}

    def snapshot_download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        found.update(id=repo_id, revision=revision, files=allow_patterns)
        return str(whole)

    siblings = [SimpleNamespace(rfilename=name) for name in names + more]
    info = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    StableDiffusionPrior.from_pretrained("owner/name@v2")
    assert (found["id"], found["revision"]) == ("owner/name", "v2")
    assert sorted(found["files"]) == sorted(names)


# a LoRA -------------------------------------------------------------------------------------------


def lora(layer: str, inner: str, rank: int = 2, alpha: float = 1.0) -> dict:
    "One layer in kohya's format."
    make = {"lora_down.weight": (rank, 16), "lora_up.weight": (16, rank)}
    state = {f"{inner}_{layer}.{key}": torch.randn(shape) for key, shape in make.items()}
    return state | {f"{inner}_{layer}.alpha": torch.tensor(alpha)}


def test_a_lora_is_added_to_the_weights(whole, tmp_path):
    torch.manual_seed(1)
    block, te = (
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1",
        "encoder_layers_0_self_attn",
    )
    state = lora(f"{block}_to_q", "lora_unet") | lora(f"{block}_to_out_0", "lora_unet")
    state |= lora(f"{te}_q_proj", "lora_te_text_model") | lora(
        f"{te}_out_proj", "lora_te_text_model"
    )
    block_name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    file = tmp_path / "style.safetensors"
    save_file(state, file)
    plain = StableDiffusionPrior.from_pretrained(whole)
    settings = PriorSettings(lora=str(file), lora_scale=0.5)
    prior = StableDiffusionPrior.from_pretrained(whole, settings)
    changes = {
        f"lora_unet_{block}_to_q": f"{block_name}.to_q.weight",
        f"lora_te_text_model_{te}_q_proj": "encoder.layers.0.self_attn.q_proj.weight",
    }
    for key, name in changes.items():
        networks = [p.unet if "unet" in key else p.text.encoder for p in (prior, plain)]
        ours, theirs = (network.state_dict()[name] for network in networks)
        change = 0.5 * 0.5 * state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"]
        torch.testing.assert_close(ours - theirs, change, atol=1e-5, rtol=1e-5)
    assert prior.unet.state_dict().keys() == plain.unet.state_dict().keys()
    LoRAEstimator(prior, seed=0)  # a second LoRA, that of VSD, goes on top


def test_a_lora_that_does_not_fit(whole, tmp_path):
    file = tmp_path / "wide.safetensors"
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    wide = {"lora_down.weight": (2, 320), "lora_up.weight": (320, 2)}
    save_file({f"{block}.{key}": torch.ones(shape) for key, shape in wide.items()}, file)
    said = refusal(whole, UsageError, settings=PriorSettings(lora=str(file)))
    assert "wide.safetensors does not fit this model (" in said
    said = refusal(whole, UsageError, settings=PriorSettings(lora=str(tmp_path / "absent")))
    assert "no LoRA " in said
    with pytest.raises(UsageError, match="lora_scale is 99"):
        PriorSettings(lora_scale=99.0)


# one file -----------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet_name(name: str, layers: int = 1) -> str:
    "The name of a weight of a diffusers U-Net in the original format."
    for ours, theirs in RESNET.items():
        name = re.sub(rf"(resnets\.\d+)\.{ours}\.", rf"\1.{theirs}.", name)
    top = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    top |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    top |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    top |= {"mid_block.resnets.1": "middle_block.2"}
    for ours, theirs in top.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    way, block, kind, layer, rest = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    block, layer = int(block), int(layer)
    if way == "down":
        place = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
        inner = {"resnets": f"0.{rest}", "attentions": f"1.{rest}", "downsamplers": "0.op."}[kind]
        return f"input_blocks.{place}.{inner}" + (rest[5:] if kind == "downsamplers" else "")
    place = block * (layers + 1) + (layers if kind == "upsamplers" else layer)
    attended = block == 1  # of random_unet
    inner = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attended else 1}[kind]
    return f"output_blocks.{place}.{inner}.{rest}"


def original_vae_name(name: str, blocks: int = 2) -> str:
    "The name of a weight of a diffusers AutoencoderKL in the original format."
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"mid_block.attentions.0.{ours}", f"mid.attn_1.{theirs}")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    turned = lambda m: f"up.{blocks - 1 - int(m[1])}."  # noqa: E731
    name = re.sub(r"up_blocks\.(\d)\.", turned, name)
    name = re.sub(r"(up\.\d)\.resnets", r"\1.block", name)
    return re.sub(r"(up\.\d)\.upsamplers\.0", r"\1.upsample", name)


def original_format(pipe) -> dict:
    "The weights of a random pipeline (with AutoencoderKL) as one file of Stable Diffusion 1."
    state = {}
    for key, value in pipe.unet.state_dict().items():
        state[f"model.diffusion_model.{original_unet_name(key)}"] = value
    for key, value in pipe.vae.state_dict().items():
        name = original_vae_name(key)
        state[f"first_stage_model.{name}"] = (
            value[..., None, None] if "mid.attn_1" in name and value.ndim == 2 else value
        )
    for key, value in pipe.text_encoder.state_dict().items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        state[f"cond_stage_model.transformer.{key}"] = value
    return {key: value.clone().contiguous() for key, value in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_checkpoint_in_one_file(tmp_path, monkeypatch, suffix):
    "Written by hand in the original format, it loads as the pipeline that it was."
    seed_everything(3)
    pipe, file = random_pipeline(kl=True), tmp_path / f"model{suffix}"
    state = original_format(pipe)
    (torch.save if suffix == ".ckpt" else save_file)(state, file)
    parts = ("unet", "vae", "text_encoder")
    configs = {
        part: json.loads(getattr(pipe, part).config.to_json_string())
        if part == "text_encoder"
        else json.loads(getattr(pipe, part).to_json_string())
        for part in parts
    }
    monkeypatch.setattr(single_file, "_version", lambda *args: 1)
    monkeypatch.setattr(single_file, "single_file_configs", lambda version: configs)
    monkeypatch.setattr(single_file, "clip_tokenizer", lambda pad: pipe.tokenizer)
    prior = StableDiffusionPrior.from_pretrained(file)
    for ours, theirs in ((prior.unet, pipe.unet), (prior.vae, pipe.vae)):
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key
    texts = ["a red ball", ""]
    theirs, _ = pipe.encode_prompt(texts, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(prior.encode_text(texts).tokens, theirs.detach())
    assert torch.equal(
        prior.schedule.alphas_cumprod[-1:].float(), pipe.scheduler.alphas_cumprod[-1:]
    )
    del state["model.diffusion_model.out.2.weight"]
    (torch.save if suffix == ".ckpt" else save_file)(state, file)
    assert f"model{suffix}" in refusal(file, (RunError, UsageError))


def test_files_that_are_no_stable_diffusion(tmp_path):
    file = tmp_path / "other.safetensors"
    for key, name in {
        "conditioner.embedders.0.a": "Stable Diffusion XL",
        "double_blocks.0.a": "Flux",
        "joint_blocks.0.a": "Stable Diffusion 3",
        "lora_unet_a": "a LoRA",
        "a": "no Stable Diffusion",
    }.items():
        save_file({key: torch.ones(2)}, file)
        assert f"other.safetensors holds {name}" in refusal(file, UsageError)
    assert "no file " in refusal(str(tmp_path / "absent.ckpt"), UsageError)
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert "it is a pipe" in refusal(tmp_path / "pipe.ckpt", UsageError)


if __name__ == "__main__":  # all of them: python tests/test_faults_pipelines.py [FIRST LAST]
    import collections
    import sys
    import tempfile

    first, last = map(int, sys.argv[1:3] or (0, 600))
    with tempfile.TemporaryDirectory() as room:
        seed_everything(0)
        with quiet():
            random_pipeline().save_pretrained(Path(room, "whole"))
        found = [outcome(Path(room, "whole"), Path(room, "copy"), i) for i in range(first, last)]
    for seed, (kind, message) in enumerate(found, first):
        print(seed, kind, message)
    print(collections.Counter(kind for kind, _ in found))
