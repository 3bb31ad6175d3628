"""Every setting of a run, with its bounds, its help and whether --resume may change it; PRESETS.

    Config()                     the default run: CIFAR-10 at 32 x 32
    Config(**PRESETS["paper"])   the CIFAR-10 run of the paper
    Config(**dataclasses.asdict(config))   what a checkpoint does
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from utils.settings import checked, fixed, require, setting


@dataclass
class Config:
    """All settings of a run.

    Raises ValueError, naming the field, its value and a value that works.
    """

    data: str = setting(
        "cifar10", "cifar10, mnist, fashion_mnist, shapes, or a folder of images", heading="data")
    data_dir: str = setting("./data", "where downloads and decoded caches are kept")
    image_size: int = fixed(32, "images are resized and centre-cropped to this square", 1, 4096)
    channels: int = fixed(3, "3: colour, 1: greyscale", choices=(1, 3))
    horizontal_flip: bool = setting(True, "mirror half of the training images (never with mnist)")

    dim: int = fixed(
        64, "base width: level i of the U-Net is dim * dim_mults[i] wide", 4, 4096,
        heading="network")
    dim_mults: tuple[int, ...] = fixed((1, 2, 4, 8), "width factors, one per level", 1, 1024)
    num_res_blocks: int = fixed(
        2, "residual blocks per level on the way down (up: one more)", 1, 1000)
    attn_resolutions: tuple[int, ...] = fixed(
        (16,), "self-attention at these feature-map sizes if a level has them, and always in the "
        "middle", 1, 4096)
    norm_groups: int = fixed(
        0, "groups of group norm (0: the most up to 32, of 2 channels or more each)", 0, 4096)
    dropout: float = setting(0.1, "inside the residual blocks, in training only")

    timesteps: int = fixed(1000, "T, the length of the diffusion", 2, 1e6, heading="diffusion")
    # A new schedule: its name here, its formula in ddpm.beta_schedule.
    beta_schedule: str = fixed("linear", "the noise schedule", choices=("linear", "cosine"))
    beta_start: float = fixed(
        0.0001, "linear: first beta at T = 1000 (scaled by 1000/T)", 1e-8, 1000)
    beta_end: float = fixed(0.02, "linear: last beta at T = 1000 (scaled by 1000/T)", 1e-8, 1000)
    variance: str = setting(
        "fixed_large", "variance of a sampling step: beta_t (large), the posterior's (small)",
        choices=("fixed_large", "fixed_small"))

    batch_size: int = setting(
        32, "images per optimiser step, all GPUs together", 1, 1e6, heading="training")
    learning_rate: float = setting(2e-4, "Adam's learning rate", most=1e300)
    epochs: int = setting(100, "passes over the data", 1)
    max_steps: int = setting(0, "stop after this many steps instead (0: epochs decide)")
    warmup_steps: int = setting(5000, "linear warm-up of the learning rate")
    grad_clip: float = setting(1.0, "largest global norm of the gradient (0: no limit)")
    grad_accum: int = setting(1, "micro-batches per step: less memory", 1)
    ema_decay: float = setting(
        0.9999, "decay of the averaged weights, reached after about 9 / (1 - ema_decay) steps")
    seed: int = setting(0, "every random draw of the run follows from it", 0, 2**32 - 1)

    device: str = setting(
        "auto", "where to run", choices=("auto", "cuda", "mps", "cpu"), heading="where it runs")
    precision: str = setting(
        "auto", "precision of the network; auto: what is fast on this hardware",
        choices=("auto", "fp32", "bf16", "fp16"))
    compile: str = setting("auto", "torch.compile the network", choices=("auto", "on", "off"))

    run_dir: str = setting(
        ".", "checkpoints/, samples/ and metrics.csv are written under it",
        heading="what it writes")
    log_every: int = setting(100, "steps between rows of metrics.csv", 1)
    sample_every: int = setting(1000, "steps between sample grids (0: none)")
    sample_steps: int = setting(50, "network evaluations per image in those grids", 1)
    num_samples: int = setting(16, "images in a grid", 1, 1e6)
    save_every: int = setting(10, "epochs between kept checkpoints (about 20 in all; 0: the last)")
    save_minutes: float = setting(5.0, "minutes between saves of latest.pth (0: every step)")

    def __post_init__(self) -> None:
        is_asked_for = self.attn_resolutions is not Config.attn_resolutions  # also if equal
        for f in fields(self):
            setattr(self, f.name, checked(f, getattr(self, f.name)))
        if self.data == "mnist":
            self.horizontal_flip = False  # a mirrored digit is not a digit

        self.require("data", self.data != "", "name a data set or a folder, for example cifar10")
        self.require("dim_mults", len(self.dim_mults) > 0, "give at least one factor: 1 2 4 8")
        self.require("dim", self.dim % 2 == 0, "it must be even, for example 64")
        if self.norm_groups == 0:
            self.norm_groups = largest_divisor(self.dim, most=min(32, self.dim // 2))
        divides = self.dim % self.norm_groups == 0
        self.require("norm_groups", divides, f"it must divide dim={self.dim}; 0 chooses for you")
        self.check_levels(is_asked_for)
        self.require("dropout", self.dropout < 1, "it must be below 1, for example 0.1")
        if self.beta_schedule == "linear":
            self.check_betas()
        self.require("learning_rate", self.learning_rate > 0, "it must be above 0: 0.0002")
        self.require("ema_decay", self.ema_decay < 1, "it must be below 1, for example 0.9999")
        divides = self.batch_size % self.grad_accum == 0
        self.require("grad_accum", divides, f"it must divide batch_size={self.batch_size}")

    def require(self, name: str, holds: bool, remedy: str) -> None:
        require(name, getattr(self, name), holds, remedy)

    def check_levels(self, attention_is_asked_for: bool) -> None:
        """Check that each level can halve the image, and that attention is at a level's size."""
        levels = len(self.dim_mults)
        multiple = 2 ** (levels - 1)
        nearest = max(1, round(self.image_size / multiple)) * multiple
        fitting = [n for n in range(1, levels + 1) if self.image_size % 2 ** (n - 1) == 0]
        fewer = " ".join(map(str, self.dim_mults[:fitting[-1]]))
        remedy = (f"{levels} levels need a multiple of {multiple}, for example {nearest}; or have "
                  f"fewer levels, for example --dim_mults {fewer}")
        self.require("image_size", self.image_size % multiple == 0, remedy)
        sizes = level_sizes(self.image_size, self.dim_mults)
        if not attention_is_asked_for:
            self.attn_resolutions = tuple(s for s in self.attn_resolutions if s in sizes)
        known = all(size in sizes for size in self.attn_resolutions)
        self.require("attn_resolutions", known, f"the levels here are of size {sizes}: "
                     "name some of these, or none (the middle of the U-Net always attends)")

    def check_betas(self) -> None:
        ordered = self.beta_start <= self.beta_end
        self.require("beta_start", ordered, "beta_start <= beta_end, for example 0.0001")
        last = self.beta_end * 1000 / self.timesteps
        enough = int(self.beta_end * 1000) + 1
        self.require("beta_end", last < 1, f"with timesteps={self.timesteps} it becomes {last:.3g},"
                     f" not below 1: use --timesteps {enough} or more, or --beta_schedule cosine")
        # sqrt(1 / alphas_cumprod) must fit into a float32; 0.02 leaves exp(-10) of the image.
        first = self.beta_start * 1000 / self.timesteps
        slope = (last - first) / (self.timesteps - 1)
        log_of_last = sum(math.log1p(-first - slope * t) for t in range(self.timesteps))
        self.require("beta_end", -60 < log_of_last < -1, "it leaves nothing of the image long "
                     "before t = T, or too much of it at T, where sampling starts: use 0.02")


FIXED = [f.name for f in fields(Config) if f.metadata["fixed"]]


def level_sizes(image_size: int, dim_mults: tuple[int, ...]) -> list[int]:
    """The sizes of the feature maps, level by level."""
    return [image_size // 2**level for level in range(len(dim_mults))]


def largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, most + 1) if number % n == 0)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "dim": 128,
        "dim_mults": (1, 2, 2, 2),  # attention is at 16 x 16, and in the middle, at 4 x 4
        "batch_size": 128,
        "epochs": 2048,
        "save_every": 100,
        "run_dir": "runs/paper",
    },
    "demo": {
        "data": "shapes",
        "image_size": 16,
        "dim": 32,
        "dim_mults": (1, 2, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (8,),
        "dropout": 0.0,
        "timesteps": 250,
        "beta_schedule": "cosine",
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "max_steps": 3000,
        "sample_every": 500,
        "sample_steps": 20,
        "save_every": 0,
        "run_dir": "runs/demo",
    },
    "mnist": {
        "data": "mnist",
        "image_size": 28,
        "channels": 1,
        "dim": 32,
        "dim_mults": (1, 2, 2),
        "num_res_blocks": 1,
        "attn_resolutions": (7,),
        "dropout": 0.0,
        "timesteps": 250,
        "learning_rate": 2e-3,
        "warmup_steps": 0,
        "max_steps": 5000,
        "sample_steps": 20,
        "save_every": 0,
        "run_dir": "runs/mnist",
    },
}
