"""Every setting: its type, default and one line of help; the presets; the command line made from both.

    Config()                     the default run: CIFAR-10 at 32 x 32
    Config(**PRESETS["paper"])   the CIFAR-10 run of the paper
    Config(**dataclasses.asdict(config))   the round trip that checkpoints make
"""

import argparse
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import numpy as np


def setting(default: Any, help: str, at_least: float = 0) -> Any:
    return field(default=default, metadata={"help": help, "at_least": at_least})


@dataclass
class Config:
    """All settings of a run.  Raises ValueError, naming field, value and remedy, where a value is impossible."""

    data: str = setting("cifar10", "cifar10, mnist, fashion_mnist, shapes, or a folder of images")
    data_dir: str = setting("./data", "where downloads and decoded caches are kept")
    image_size: int = setting(32, "images are resized and centre-cropped to this square", 1)
    channels: Literal[1, 3] = setting(3, "3: colour, 1: greyscale")
    horizontal_flip: bool = setting(True, "mirror each training image with a chance of one half (never with mnist)")

    dim: int = setting(64, "base width: level i of the U-Net is dim * dim_mults[i] wide", 4)
    dim_mults: tuple[int, ...] = setting((1, 2, 4, 8), "width factors, one a level", 1)
    num_res_blocks: int = setting(2, "residual blocks a level on the way down (up: one more)", 1)
    attn_resolutions: tuple[int, ...] = setting((16,), "self-attention at these feature-map sizes", 1)
    dropout: float = setting(0.1, "inside the residual blocks, while training")

    timesteps: int = setting(1000, "T, the length of the diffusion", 2)
    beta_schedule: Literal["linear", "cosine"] = setting("linear", "the noise schedule")
    beta_start: float = setting(0.0001, "linear schedule: first beta at T = 1000 (scaled by 1000/T)")
    beta_end: float = setting(0.02, "linear schedule: last beta at T = 1000 (scaled by 1000/T)")
    variance: Literal["fixed_large", "fixed_small"] = setting(
        "fixed_large", "sampling variance: beta_t (large) or that of the posterior (small)")

    batch_size: int = setting(32, "images per optimiser step, all GPUs together", 1)
    learning_rate: float = setting(2e-4, "of Adam")
    epochs: int = setting(100, "passes over the data", 1)
    max_steps: int = setting(0, "stop after this many steps instead (0: epochs decide)")
    warmup_steps: int = setting(5000, "linear warm-up of the learning rate")
    grad_clip: float = setting(1.0, "largest global norm of the gradient (0: no limit)")
    grad_accum: int = setting(1, "micro-batches a step: less memory; the same result if dropout is 0", 1)
    ema_decay: float = setting(0.9999, "of the averaged weights, ramped up at the start")
    seed: int = setting(0, "every random draw follows from it")

    device: Literal["auto", "cuda", "mps", "cpu"] = setting("auto", "where to run")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "auto: bf16 where it is faster")
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile the network")

    run_dir: str = setting(".", "checkpoints/, samples/ and metrics.csv are written under it")
    log_every: int = setting(100, "steps between rows of metrics.csv", 1)
    sample_every: int = setting(1000, "steps between sample grids (0: none)")
    sample_steps: int = setting(50, "network evaluations an image in those grids (T: whole chain)", 1)
    num_samples: int = setting(16, "images in a grid", 1)
    save_every: int = setting(10, "epochs between kept checkpoints (0: only the final one)")
    save_minutes: float = setting(5.0, "minutes between saves of latest.pth (0: every step)")

    def __post_init__(self) -> None:
        self.dim_mults, self.attn_resolutions = tuple(self.dim_mults), tuple(self.attn_resolutions)
        if self.data == "mnist":
            self.horizontal_flip = False  # a mirrored digit is not a digit
        hints = get_type_hints(Config)
        for f in fields(self):
            self._check_value(f.name, getattr(self, f.name), hints[f.name], f.metadata["at_least"])

        shrink = 2 ** (len(self.dim_mults) - 1)
        last_beta = self.beta_end * 1000 / self.timesteps
        linear = self.beta_schedule == "linear"
        for name, possible, remedy in (
            ("data", self.data, "name a data set or a folder, for example cifar10"),
            ("dim_mults", self.dim_mults, "give at least one factor, for example 1 2 4 8"),
            ("dim", self.dim % 2 == 0, "it must be even, for example 64"),
            ("image_size", self.image_size % shrink == 0, f"{len(self.dim_mults)} levels need a multiple of "
             f"{shrink}, for example {max(1, round(self.image_size / shrink)) * shrink}"),
            ("dropout", self.dropout < 1, "it must be below 1, for example 0.1"),
            ("beta_start", 0 < self.beta_start <= self.beta_end, "0 < beta_start <= beta_end, for example 0.0001"),
            ("beta_end", not linear or last_beta < 1, f"with timesteps={self.timesteps} it becomes {last_beta:.3g}, "
             f"not below 1: use --timesteps {int(self.beta_end * 1000) + 1} or more, or --beta_schedule cosine"),
            ("learning_rate", self.learning_rate > 0, "it must be above 0, for example 0.0002"),
            ("ema_decay", self.ema_decay < 1, "it must be below 1, for example 0.9999"),
            ("grad_accum", self.batch_size % self.grad_accum == 0, f"it must divide batch_size={self.batch_size}"),
            ("seed", self.seed < 2**32, "it must be below 2**32, for example 0"),
        ):
            if not possible:
                raise ValueError(f"{name}={getattr(self, name)!r} is impossible: {remedy}")

    @staticmethod
    def _check_value(name: str, value: Any, hint: Any, at_least: float) -> None:
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{name}={value!r} is impossible: choose from {', '.join(map(str, choices))}")
        if choices or hint in (str, bool):
            if not choices and not isinstance(value, hint):
                raise ValueError(f"{name}={value!r} is impossible: it must be a {hint.__name__}")
            return
        types = (int, float) if hint is float else (int,)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, types) or not at_least <= number < math.inf:
                kind = "number" if hint is float else "whole number"
                raise ValueError(f"{name}={value!r} is impossible: it must be a {kind} of at least {at_least}")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(dim=128, dim_mults=(1, 2, 2, 2), batch_size=128, epochs=2048, save_every=100, run_dir="runs/paper"),
    # 40 wide, not 32: with 32 groups of one channel, group norm wipes out the colour that it has to learn
    "demo": dict(
        data="shapes", image_size=16, dim=40, dim_mults=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0,
        timesteps=250, beta_schedule="cosine", learning_rate=1e-3, warmup_steps=0, max_steps=3000, ema_decay=0.999,
        sample_steps=250, save_every=0, run_dir="runs/demo"),
}


class UserError(Exception):
    """Something that the user can mend; the scripts show its one line and exit with status 1."""


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one line and exit status 2."""

    def __init__(self, description: str, usage: str) -> None:
        super().__init__(description=description, usage=usage, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")

    def add_settings(self) -> None:
        """A flag for --preset and one for every field of Config; a flag that is not given leaves no attribute."""
        self.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS,
                          help="start from these settings instead; other flags override them")
        hints = get_type_hints(Config)
        for f in fields(Config):
            hint, kwargs = hints[f.name], {"default": argparse.SUPPRESS}
            default = f.default
            if hint is bool:
                kwargs["action"] = argparse.BooleanOptionalAction
            elif get_origin(hint) is Literal:
                kwargs.update(choices=get_args(hint), type=type(f.default))
            elif get_origin(hint) is tuple:
                kwargs.update(nargs="*", type=int, metavar="N")
                default = " ".join(map(str, f.default))
            else:
                kwargs.update(type=hint, metavar={int: "N", float: "X", str: "NAME"}[hint])
            self.add_argument(f"--{f.name}", help=f"{f.metadata['help']} (default: {default})", **kwargs)

    def given_settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields of Config that the command line names, by its preset or by a flag."""
        names = {f.name for f in fields(Config)}
        flags = {name: value for name, value in vars(args).items() if name in names}
        return {**PRESETS.get(getattr(args, "preset", ""), {}), **flags}


USES = ("weights", "step", "epoch", "image", "shapes", "timesteps")


def derive_seed(use: str, *numbers: int) -> int:
    """A 64-bit seed for one use of randomness: different uses, or different numbers, are unrelated streams."""
    return int(np.random.SeedSequence((USES.index(use), len(numbers), *numbers)).generate_state(1, np.uint64)[0])
