"""Settings of a prior's networks keep its noise, latents and gradients; memory is counted."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaledreamer.commands.cli import run_command, parse
from scaledreamer.core.assets import asset
from scaledreamer.core.settings import UsageError
from scaledreamer.distill.estimator import LoRAEstimator
from scaledreamer.prior.base import unique_text_rows, predict_noise_batched
from scaledreamer.recipes.architectures import sd21_unet, sd21_vae
from scaledreamer.recipes.prior_memory import LiveBytes
from scaledreamer.prior.pipelines import random_pipeline
from scaledreamer.prior.execution import PriorSettings, apply_execution, share_text
from scaledreamer.prior import openvino_unet
from scaledreamer.prior.open_prior import open_prior
from scaledreamer.prior.stable_diffusion import StableDiffusionPrior, image_latents
from scaledreamer.recipes.step_memory import MEMORY_PRESETS
from scaledreamer.training.presets import mg15_hyper_ingp
from scaledreamer.training.earlier_settings import read_settings
from scaledreamer.training.train_settings import TrainSettings
from scaledreamer.training.trainer import open_run

ROUNDING, HALF = (
    1e-5,
    0.05,
)  # of the norm: sums in another order; bfloat16's 8 bits through some thirty layers and back


@pytest.fixture(scope="module")
def plain():
    return StableDiffusionPrior.from_pretrained()


def apart(one, other):
    return float((one - other).norm() / other.norm())


def queries(prior, items=2):
    "The evaluations of a step of ASD."
    g = torch.Generator().manual_seed(0)
    x, t = (
        torch.randn(items, *prior.latent_shape, generator=g),
        torch.randint(20, 900, (items,), generator=g),
    )
    tokens, blank = (
        prior.encode_text(["a red ball", "a blue cube on a green ball"][:items]).tokens,
        prior.encode_text([""]).tokens.expand(items, -1, -1),
    )
    return [(x, t, tokens), (x, t, blank), (x, t + 80, tokens)]


@torch.no_grad()
def noise(prior):
    return torch.cat(predict_noise_batched(prior, queries(prior)))


def encoded(prior):
    "Latents of two renders, and the gradient of the pixels."
    rgb = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    latents = prior.encode_image(rgb)
    return latents.detach(), torch.autograd.grad(latents.square().sum(), rgb)[0]


# the settings -------------------------------------------------------------------------------------


def test_defaults_on_a_cpu_are_the_plain_networks_bit_for_bit(plain):
    x, t, tokens = (torch.cat(parts) for parts in zip(*queries(plain)))
    with torch.no_grad():
        v = plain.unet(x, t, encoder_hidden_states=tokens).sample
        assert torch.equal(plain.schedule.eps_from_v(x, v, t), noise(plain))
    assert torch.equal(plain.encode_text(["a red ball"]).tokens, plain.text(["a red ball"]).tokens)


@pytest.mark.parametrize(("settings", "bound"), [
    (PriorSettings("bfloat16"), HALF), (PriorSettings("bfloat16", channels_last=True), HALF),
    (PriorSettings(channels_last=True), ROUNDING),
    (PriorSettings(shared_text=True), ROUNDING), (PriorSettings(vae_checkpoint=True), ROUNDING),
    (PriorSettings(backend="openvino"), ROUNDING),
    (PriorSettings(backend="openvino", channels_last=True), ROUNDING),
    (PriorSettings("bfloat16", backend="openvino"), HALF),
])  # fmt: skip
def test_every_setting_gives_the_same_noise_and_gradients(plain, settings, bound):
    prior = StableDiffusionPrior.from_pretrained(settings=settings)
    found, expected = (noise(prior), *encoded(prior)), (noise(plain), *encoded(plain))
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32 and apart(one, other) < bound
    assert prior.encode_text(["a red ball"]).tokens.dtype == torch.float32


def test_compiled_networks_give_the_same(plain, traceable):
    torch._dynamo.reset()
    prior = StableDiffusionPrior.from_pretrained()
    apply_execution(prior.unet, prior.vae, PriorSettings(compile=True), "aot_eager")
    for one, other in zip((noise(prior), *encoded(prior)), (noise(plain), *encoded(plain))):
        assert apart(one, other) < ROUNDING


@pytest.mark.parametrize(("settings", "device", "said"), [
    (PriorSettings("float16"), "cpu",
     "float16 on a CPU, which is slower there than float32: give bfloat16, or auto"),
    (PriorSettings(backend="openvino"), "cuda:0",
     "openvino, and the device is cuda:0, and OpenVINO computes on a CPU: give backend torch"),
    (PriorSettings(backend="openvino", shared_text=True), "cpu",
     "openvino, and shared_text is true: give backend torch, or auto"),
    (PriorSettings(graphs=True), "cpu", "only CUDA has them: give compile instead"),
])  # fmt: skip
def test_what_a_device_does_not_do(settings, device, said):
    with pytest.raises(UsageError, match=said):
        settings.dtype_on(device)


def test_a_graphs_buffer_is_not_handed_out():
    "A replay writes into the buffer of the last; what was answered before stays."
    pipe = random_pipeline()
    prior = StableDiffusionPrior(
        pipe.unet,
        pipe.vae,
        StableDiffusionPrior.from_pretrained().text,
        pipe.scheduler,
        PriorSettings(graphs=True),
    )
    buffer, inner = torch.empty(1, 4, 8, 8), prior.unet.forward

    def replay(*args, **options):
        out = inner(*args, **options)
        out.sample = buffer.copy_(out.sample)
        return out

    prior.unet.forward = replay
    with torch.no_grad():
        first, second = (
            prior.predict_noise(
                torch.full((1, 4, 8, 8), value), torch.tensor([100]), torch.zeros(1, 12, 16)
            )
            for value in (0.1, 2.0)
        )
    assert not torch.equal(first, second) and torch.equal(second, buffer)


def test_a_copy_for_an_estimator_is_a_plain_one(plain):
    "LoRA scales every row on its own, so that no two rows share keys."
    prior = StableDiffusionPrior.from_pretrained(settings=PriorSettings(shared_text=True))
    prior.unet.compile(backend="aot_eager")
    (x, t, tokens), *_ = queries(prior)
    own, theirs = LoRAEstimator(prior, seed=1), LoRAEstimator(plain, seed=1)
    assert own.network._compiled_call_impl is None
    for network in (own, theirs):
        for name, weight in network.state_dict().items():
            if "lora_B" in name:
                torch.nn.init.normal_(
                    weight, std=0.1, generator=torch.Generator().manual_seed(len(name))
                )
    with torch.no_grad():
        torch.testing.assert_close(
            own.predict_noise(x, t, tokens), theirs.predict_noise(x, t, tokens)
        )
        assert apart(own.predict_noise(x, t, tokens), plain.predict_noise(x, t, tokens)) > 1e-3
    own.predict_noise(x, t, tokens).square().mean().backward()
    assert all(weight.grad is not None for weight in own.parameters())


@pytest.fixture(scope="module")
def by_openvino():
    prior = StableDiffusionPrior.from_pretrained(settings=PriorSettings(backend="openvino"))
    assert prior.openvino is not None
    return prior


def test_openvino_has_every_batch_size_and_the_same_bits_again(plain, by_openvino):
    x, t, tokens = (torch.cat(parts) for parts in zip(*queries(plain)))
    with torch.no_grad():
        expected = plain.predict_noise(x, t, tokens)
        for rows in (slice(0, 1), slice(0, 6), slice(2, 5)):
            given = x[rows], t[rows], tokens[rows]
            assert apart(by_openvino.predict_noise(*given), expected[rows]) < ROUNDING
        again = (by_openvino.predict_noise(x, t, tokens) for _ in range(2))
        assert torch.equal(*again)
        one = by_openvino.predict_noise(x[:1].expand(6, -1, -1, -1), t[:1].expand(6), tokens)
        assert apart(one[:1], expected[:1]) < ROUNDING  # views without memory of their own


def test_openvino_leaves_gradients_and_other_networks_to_torch(plain, by_openvino):
    (x, t, tokens), *_ = queries(plain)
    gradients = []
    for prior in (plain, by_openvino):
        x_t = x.clone().requires_grad_()
        prior.predict_noise(x_t, t, tokens).square().sum().backward()
        gradients.append(x_t.grad)
    assert torch.equal(*gradients)
    own, theirs = LoRAEstimator(by_openvino, seed=1), LoRAEstimator(plain, seed=1)
    with torch.no_grad():
        for estimator in (own, theirs):
            for name, weight in estimator.network.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.01)
        moved = theirs.predict_noise(x, t, tokens)
        assert torch.equal(own.predict_noise(x, t, tokens), moved)
        assert apart(moved, plain.predict_noise(x, t, tokens)) > 1e-3
        wide = torch.cat([x, x], -1)  # another size than was compiled
        assert torch.equal(
            by_openvino.predict_noise(wide, t, tokens), plain.predict_noise(wide, t, tokens)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_openvino_tells_timesteps_apart_as_torch_does(plain, dtype):
    "ASD's source is a difference of two timesteps, which 8 bits would make one."
    rows = [301, 302, 515, 600, 601, 777, 999]
    t, same = torch.tensor(rows), torch.zeros(len(rows), dtype=torch.long)
    tokens = plain.encode_text(["a red ball"]).tokens[same]
    x = torch.randn(1, *plain.latent_shape, generator=torch.Generator().manual_seed(0))[same]
    settings = [PriorSettings(dtype, backend=backend) for backend in ("openvino", "torch")]
    ours, theirs = (StableDiffusionPrior.from_pretrained(settings=each) for each in settings)
    with torch.no_grad():
        exact, by_torch, found = (p.predict_noise(x, t, tokens) for p in (plain, theirs, ours))
    for i in range(len(rows)):
        # both round to 8 bits, in other places
        assert apart(found[i], exact[i]) < max(1.3 * apart(by_torch[i], exact[i]), ROUNDING)
    assert not torch.equal(found[3], found[4])


def test_a_unet_that_openvino_cannot_run(monkeypatch):
    def fails(*_):
        raise RuntimeError("no rule for this layer.\nA traceback")

    monkeypatch.setattr(openvino_unet, "OpenVINOUNet", fails)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    said = "OpenVINO cannot run this U-Net (no rule for this layer"
    with pytest.raises(UsageError, match=re.escape(said)):
        StableDiffusionPrior.from_pretrained(settings=PriorSettings(backend="openvino"))
    with pytest.warns(UserWarning, match=re.escape(said)):
        prior = StableDiffusionPrior.from_pretrained(settings=PriorSettings(backend="auto"))
    assert prior.openvino is None


def test_openvino_in_several_threads(by_openvino):
    given = queries(by_openvino)
    call = torch.no_grad()(lambda part: by_openvino.predict_noise(*part))
    expected = [call(part) for part in given]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(call, given), expected))


def test_openvino_is_for_one_view():
    with pytest.raises(UsageError, match="U-Nets of Stable Diffusion 1 and 2: leave backend out"):
        open_prior(asset("tiny-mv"), PriorSettings(backend="openvino"))
    assert open_prior(asset("tiny-mv"), PriorSettings(backend="auto")).settings.backend == "auto"


def test_openvino_trains(tmp_path):
    small = "train --prompt ball --steps 2 --resolution 16 --prior-settings.dtype float32".split()
    runs = []
    for name, backend in (("a", "openvino"), ("b", "openvino"), ("c", "torch")):
        out = [
            *small,
            "--eval-views",
            "0",
            "--prior-settings.backend",
            backend,
            "--out",
            str(tmp_path / name),
        ]
        assert run_command(out) == 0
        runs.append(
            torch.cat(
                [w.detach().flatten() for w in open_run(tmp_path / name).generator.parameters()]
            )
        )
    assert torch.equal(runs[0], runs[1])
    assert 0 < apart(runs[0], runs[2]) < 1e-3
    more = [*small, "--prior-settings.backend", "torch", "--steps", "3", "--eval-views", "0"]
    assert run_command([*more, "--resume", "--out", str(tmp_path / "b")]) == 0


def test_half_precision_trains_and_float16_on_a_cpu_is_refused_before_the_folder(tmp_path, capsys):
    small = [
        "train",
        "--steps",
        "2",
        "--prompts",
        "1",
        "--resolution",
        "16",
        "--eval-views",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    assert run_command([*small, "--prior-settings.dtype", "float16"]) == 2
    error = capsys.readouterr().err
    assert (
        "give bfloat16, or auto" in error
        and error.count("\n") == 1
        and not (tmp_path / "run").exists()
    )
    assert (
        run_command(
            [*small, "--prior-settings.dtype", "bfloat16", "--prior-settings.vae-checkpoint"]
        )
        == 0
    )
    settings = read_settings((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert settings.prior_settings == PriorSettings("bfloat16", vae_checkpoint=True)


# shared text --------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["whole", "one row", "turned"])),
        min_size=1,
        max_size=5,
    )
)
def test_the_same_place_is_the_same_row(choices):
    tables = torch.arange(3 * 2 * 6.0).view(3, 2, 2, 3)
    views = {
        "whole": lambda x: x,
        "one row": lambda x: x[:1].expand(2, -1, -1),
        "turned": lambda x: x.flip(0),
    }
    parts = [views[how](tables[i]) for i, how in choices]
    first, index = unique_text_rows(parts)
    everyone = torch.cat(parts)
    assert torch.equal(everyone[first][index], everyone)
    assert first.tolist() == sorted(set(first.tolist())) and set(index.tolist()) == set(
        range(len(first))
    )
    if all(how != "turned" for _, how in choices):  # a turned copy is a new place
        assert len(first) == len(everyone.unique(dim=0))


def test_rows_of_other_strides_are_other_rows():
    x = torch.rand(2, 3, 3)
    assert len(unique_text_rows([x, x.transpose(1, 2)])[0]) == 4


def test_a_unet_of_another_kind_is_refused():
    unet = random_pipeline().unet
    unet.set_attn_processor(
        type("Other", (), {"__call__": lambda self, attn, hidden_states, **rest: hidden_states})()
    )
    with pytest.raises(UsageError, match="shared_text is true for a U-Net with Other"):
        share_text(unet)


# the encoder --------------------------------------------------------------------------------------


def test_frozen_weights_keep_and_get_nothing():
    "With trainable weights, each strided convolution also stores its padded input."
    vae = random_pipeline(kl=True).vae

    def spent(vae):
        rgb = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with LiveBytes() as live:
            latents = image_latents(vae, rgb, 16)
            kept = live.now
            latents.sum().backward()
        return kept, live.now

    frozen, learning = spent(vae), spent(copy.deepcopy(vae).requires_grad_(True))
    assert frozen[0] < learning[0] and all(weight.grad is None for weight in vae.parameters())
    assert learning[1] - frozen[1] >= sum(
        weight.nbytes for weight in vae.encoder.parameters()
    )  # the gradients that we do without


def test_checkpoints_keep_less_and_give_the_same_gradient():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = sd21_vae(4)
    saving = copy.deepcopy(vae)
    apply_execution(sd21_unet(5, 8), saving, PriorSettings(vae_checkpoint=True))
    found = []
    for each in (vae, saving):
        rgb = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with LiveBytes() as live:
            latents = image_latents(each, rgb, 128)
            kept = live.now
        found.append((kept, torch.autograd.grad(latents.sum(), rgb)[0]))
    assert found[1][0] < 0.2 * found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1])


# what fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gigabytes", MEMORY_PRESETS)
def test_flags_of_a_preset_are_the_preset(gigabytes):
    preset = MEMORY_PRESETS[gigabytes]
    assert parse(
        ["train", "--preset", "paper/mg15-hyper-ingp", *preset.flags.split()]
    ).settings == preset.applied(mg15_hyper_ingp())
    assert (
        replace(preset.applied(TrainSettings()), prompts_per_step=4, prior_settings=PriorSettings())
        == TrainSettings()
    )


def test_live_bytes_of_a_view_of_what_was_there():
    x = torch.rand(4, 4)
    with LiveBytes() as live:
        view = x.T[1:]
        double = view * 2
    assert (live.now, live.peak) == (3 * 4 * 4, 3 * 4 * 4)
    del double
    assert live.now == 0
