"""The network: size, shapes, gradients, and that it can learn."""

import pytest
import torch
from conftest import tiny

from config import PRESETS, Config
from ddpm import DDPM
from model import UNet, sinusoid


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters())


def test_number_of_parameters():
    assert parameters(Config(**PRESETS["paper"])) == 35_746_307
    assert parameters(Config()) == 56_906_115


@pytest.mark.parametrize("settings", [
    dict(), dict(channels=1), dict(dim_mults=(1,)), dict(dim_mults=(2, 1, 3), num_res_blocks=2),
    dict(dim=10, image_size=12), dict(attn_resolutions=()), dict(attn_resolutions=(8, 4))])
def test_output_is_like_the_input(settings):
    config = tiny(**settings)
    x = torch.randn(2, config.channels, config.image_size, config.image_size)
    assert UNet(config)(x, torch.tensor([0, 29])).shape == x.shape


def test_sinusoid_is_sin_then_cos_from_frequency_1_to_1_over_10000():
    got = sinusoid(torch.tensor([0, 7, 999]), 6).double()
    frequencies = torch.tensor([1, 1e-2, 1e-4], dtype=torch.float64)
    angles = torch.tensor([0, 7, 999])[:, None] * frequencies
    torch.testing.assert_close(got, torch.cat([angles.sin(), angles.cos()], 1), atol=1e-4, rtol=0)
    assert got.shape == (3, 6)


def test_every_timestep_is_told_apart_in_bf16():
    config = tiny(timesteps=1000)
    model = UNet(config)
    with torch.autocast("cpu", torch.bfloat16):
        emb = model.time_embedding(torch.arange(1000))
    assert emb.dtype == torch.float32 and len(torch.unique(emb, dim=0)) == 1000


def test_output_starts_at_zero_so_the_first_loss_is_one():
    config = tiny()
    ddpm = DDPM(UNet(config), config)
    x = torch.randn(256, 3, 8, 8)
    assert not ddpm.model(x, torch.zeros(256, dtype=torch.int64)).any()
    assert ddpm.training_loss(x.clamp(-1, 1)).item() == pytest.approx(1, abs=0.03)


def test_every_branch_starts_at_zero():
    model = UNet(tiny(attn_resolutions=(8, 4)))
    ends = [value for name, value in model.state_dict().items() if name.endswith(("conv2.weight", "proj.weight"))
            and "emb_proj" not in name]
    assert len(ends) == 15 and not any(value.any() for value in ends)


def test_the_gradient_reaches_every_parameter():
    config = tiny(attn_resolutions=(8, 4))
    model = UNet(config)
    for p in model.parameters():  # away from the zeros that hide what lies behind them at first
        torch.nn.init.normal_(p, std=0.1)
    DDPM(model, config).training_loss(torch.randn(4, 3, 8, 8)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_it_overfits_one_batch():
    config = tiny(dim=16)
    ddpm = DDPM(UNet(config), config)
    optimizer = torch.optim.Adam(ddpm.parameters(), lr=3e-3)
    x, t, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.tensor([2, 9, 17, 25]), torch.randn(4, 3, 8, 8)
    for _ in range(150):
        loss = ddpm.training_loss(x, t, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_dropout_acts_in_training_mode_only():
    model = UNet(tiny(dropout=0.5))
    torch.nn.init.normal_(model.conv_out.weight)
    for block in model.middle:
        torch.nn.init.normal_(block.conv2.weight)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))
