"""The network: size, shapes, wiring, gradients, and what makes it fast; numbers: test_parity.py."""

import pytest
import torch
import torch.nn.functional as F
from helpers import SHORT, latest, random_unet, succeeded, tiny, train
from torch import nn

from config import PRESETS, Config
from ddpm import DDPM
from model import Attention, Downsample, ResBlock, UNet, attend, sinusoid


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters())


def test_number_of_parameters():
    assert parameters(Config(**PRESETS["paper"])) == 35_746_307
    assert parameters(Config()) == 56_906_115


@pytest.mark.parametrize("settings", [
    {},
    {"channels": 1},
    {"dim_mults": (1,), "attn_resolutions": (8,)},
    {"dim_mults": (2, 1, 3), "num_res_blocks": 2},
    {"dim": 10, "image_size": 12, "attn_resolutions": (6,)},
    {"attn_resolutions": ()},
    {"attn_resolutions": (8, 4)},
])
def test_output_is_like_the_input(settings):
    config = tiny(**settings)
    x = torch.randn(2, config.channels, config.image_size, config.image_size)
    assert UNet(config)(x, torch.tensor([0, 29])).shape == x.shape


# The time

def test_every_timestep_is_told_apart_in_bf16():
    model = UNet(tiny(timesteps=1000))
    with torch.autocast("cpu", torch.bfloat16):
        emb = model.time_embedding(torch.arange(1000))
    assert emb.dtype == torch.float32
    assert len(torch.unique(emb, dim=0)) == 1000


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_the_network_calculates_in_the_dtype_of_its_weights(dtype, rounding):
    config = tiny()
    model = random_unet(config)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 29])
    expected = model(x, t)
    found = model.to(dtype)(x.to(dtype), t)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=rounding)


def test_float64_is_a_default_like_any_other():
    torch.set_default_dtype(torch.float64)
    try:
        config = tiny()
        loss = DDPM(UNet(config), config).training_loss(torch.randn(2, 3, 8, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=0.3)


def test_a_run_in_float64(pictures, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        succeeded(train(tmp_path / "run", SHORT, pictures))
    finally:
        torch.set_default_dtype(torch.float32)
    assert latest(tmp_path / "run")["model"]["conv_in.weight"].dtype == torch.float64


# The start

def test_output_starts_at_zero_so_the_first_loss_is_one():
    config = tiny()
    ddpm = DDPM(UNet(config), config)
    x = torch.randn(256, 3, 8, 8)
    assert not ddpm.model(x, torch.zeros(256, dtype=torch.int64)).any()
    assert ddpm.training_loss(x.clamp(-1, 1)).item() == pytest.approx(1, abs=0.03)


def test_every_branch_starts_at_zero():
    weights = UNet(tiny(attn_resolutions=(8, 4))).state_dict()
    conv2 = [value for name, value in weights.items() if name.endswith(".conv2.weight")]
    proj = [value for name, value in weights.items() if name.endswith("attention.proj.weight")]
    assert (len(conv2), len(proj)) == (8, 7)
    assert not any(value.any() for value in conv2 + proj)


# Training

def test_the_gradient_reaches_every_parameter():
    config = tiny(attn_resolutions=(8, 4))
    model = UNet(config)
    for p in model.parameters():  # away from the zeros that hide what lies behind them at first
        nn.init.normal_(p, std=0.1)
    DDPM(model, config).training_loss(torch.randn(4, 3, 8, 8)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_dropout_acts_in_training_mode_only():
    model = random_unet(tiny(dropout=0.5))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


# What is faster calculates the same

def test_attention_is_the_same_by_hand():
    q, k, v = torch.randn(3, 2, 1, 16, 32)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), exact)
    by_hand = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert (by_hand - exact).abs().max() < 0.03


def test_sinusoid_is_sin_then_cos_from_frequency_1_to_1_over_10000():
    t = torch.tensor([0, 7, 999])
    frequencies = torch.tensor([1, 1e-2, 1e-4], dtype=torch.float64)
    angles = t[:, None] * frequencies
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    torch.testing.assert_close(sinusoid(t, 6).double(), expected, atol=1e-4, rtol=0)


def test_attention_is_softmax_of_the_scaled_products():
    attention = Attention(16, groups=4)
    for weight in attention.parameters():
        nn.init.normal_(weight, std=0.5)
    x = torch.randn(2, 16, 4, 4)
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (tokens @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=-1)
    weights = torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1)  # sqrt(16)
    expected = x + attention.proj(weights @ v).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected, atol=1e-4, rtol=1e-4)


def test_downsampling_pads_on_the_right_and_below_only():
    down = Downsample(1)
    nn.init.zeros_(down.conv.bias)
    nn.init.zeros_(down.conv.weight)
    down.conv.weight.data[0, 0, 0, 0] = 1  # the upper left corner of what the kernel sees
    x = torch.randn(1, 1, 6, 6)
    assert torch.equal(down(x, None), x[:, :, ::2, ::2])


def test_each_block_on_the_way_up_gets_the_last_skip_that_is_left():
    """Also where several are of one shape, so that another order would run."""
    model = random_unet(tiny(dim_mults=(1, 1), num_res_blocks=2))
    outputs, inputs = [], []
    for block in (model.conv_in, *model.down):
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
    for block in model.up:
        if isinstance(block, ResBlock):
            block.register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    model(torch.randn(2, 3, 8, 8), torch.tensor([3, 20]))
    assert len(inputs) == len(outputs) == 6
    for h, skip in zip(inputs, reversed(outputs), strict=True):
        assert torch.equal(h[:, -skip.shape[1]:], skip)
