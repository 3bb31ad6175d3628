"""The U-Net eps_theta(x_t, t) of DDPM (arXiv 2006.11239, appendix B): predicts the noise in x_t.

    model = UNet(Config())
    pred_noise = model(x_t, t)      # x_t [B, C, H, W] float, t [B] int64 -> [B, C, H, W] float32

Comments on the right give shapes; feature maps [B, channels, S] are square, of size S; dim is the
base width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from utils.modes import without_autocast


class UNet(nn.Module):
    """The network of appendix B: down through levels, each half the size of the last, and up again.

    Self-attention is at the sizes of attn_resolutions, and always in the middle.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        widths = [dim * mult for mult in config.dim_mults]
        groups = config.norm_groups

        def res_block(in_width: int, out_width: int, attention: bool) -> ResBlock:
            return ResBlock(in_width, out_width, 4 * dim, groups, config.dropout, attention)

        self.time_embedding = TimeEmbedding(dim)
        self.conv_in = nn.Conv2d(config.channels, dim, 3, padding=1)

        size, width = config.image_size, dim
        skip_widths = [dim]
        self.down = nn.ModuleList()
        for level, out_width in enumerate(widths):
            attends = size in config.attn_resolutions
            for _ in range(config.num_res_blocks):
                self.down.append(res_block(width, out_width, attends))
                width = out_width
                skip_widths.append(width)
            if level < len(widths) - 1:
                self.down.append(Downsample(width))
                size //= 2
                skip_widths.append(width)

        self.middle = nn.ModuleList([  # two residual blocks, with attention after the first
            res_block(width, width, attention=True), res_block(width, width, attention=False)])

        self.up = nn.ModuleList()
        for level, out_width in reversed(list(enumerate(widths))):
            attends = size in config.attn_resolutions
            for _ in range(config.num_res_blocks + 1):
                self.up.append(res_block(width + skip_widths.pop(), out_width, attends))
                width = out_width
            if level > 0:
                self.up.append(Upsample(width))
                size *= 2

        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.channels, 3, padding=1)
        self.initialise()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        emb = self.time_embedding(t)                     # [B, 4 dim]
        x_t = x_t.to(self.conv_in.weight.dtype)
        h = self.conv_in(x_t)                            # [B, dim, S]
        skips = [h]
        for block in self.down:
            h = block(h, emb)                            # [B, width, S / 2^level]
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.up:
            if isinstance(block, ResBlock):
                h = torch.cat([h, skips.pop()], dim=1)   # [B, both widths, S / 2^level]
            h = block(h, emb)
        # Not in 16 bits: DDPM.predict_x_start multiplies an error of the output by up to 20,291.
        with without_autocast(h.device):
            h = h.to(self.conv_out.weight.dtype)
            return self.conv_out(F.silu(self.norm_out(h)))

    @torch.no_grad()
    def initialise(self) -> None:
        """Xavier-uniform weights and zero biases, but zeros where a residual branch ends.

        The last layer is zero too: the network predicts no noise at first, and the loss is 1.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                for weight in module.qkv.weight.chunk(3):  # three layers in one
                    nn.init.xavier_uniform_(weight)
                nn.init.zeros_(module.proj.weight)
        nn.init.zeros_(self.conv_out.weight)


class TimeEmbedding(nn.Module):
    """t [B] -> a vector [B, 4 dim], by way of sinusoids.

    In the weights' fp32, since bf16 cannot tell t = 997 from 998.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, t: Tensor) -> Tensor:
        with without_autocast(t.device):
            emb = sinusoid(t, self.dim).to(self.linear1.weight.dtype)
            return self.linear2(F.silu(self.linear1(emb)))


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """sin and cos of t [B] at dim / 2 frequencies falling from 1 to 1/10000 -> [B, dim] float32."""
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / (half - 1))
    angles = t.float()[:, None] * frequencies            # [B, dim / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """x [B, in_width, S, S], emb [B, emb_width] -> [B, out_width, S, S].

    It ends with self-attention if that is asked for.
    """

    def __init__(
        self, in_width: int, out_width: int, emb_width: int, groups: int, dropout: float,
        attention: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_width, eps=1e-6)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.emb_proj = nn.Linear(emb_width, out_width)
        self.norm2 = nn.GroupNorm(groups, out_width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Identity()
        if in_width != out_width:
            self.shortcut = nn.Conv2d(in_width, out_width, 1)
        self.attention = Attention(out_width, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))            # [B, out_width, S]
        h = h + self.emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Attention(nn.Module):
    """Every pixel looks at every other: one head of the full width, x [B, width, S, S]."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)                # [B, S S, width]
        q, k, v = self.qkv(tokens)[:, None].chunk(3, dim=-1)            # [B, 1, S S, width] each
        h = attend(q, k, v)[:, 0]                                       # [B, S S, width]
        return x + self.proj(h).transpose(1, 2).reshape(x.shape)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(width)) v of [B, 1, tokens, width] each."""
    if q.device.type == "cpu" and q.dtype != torch.float32:
        # On a CPU in 16 bits PyTorch's own kernel takes three times as long.
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Downsample(nn.Module):
    """[B, width, S, S] -> [B, width, S / 2, S / 2]; emb is not used.

    Padded on the right and below only, as in the paper's code.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """[B, width, S, S] -> [B, width, 2 S, 2 S]; emb is not used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
