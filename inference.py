"""Sample from a checkpoint: Algorithm 2 of arXiv 2006.11239, or DDIM in fewer steps.

    python inference.py --checkpoint checkpoints/final_model.pth --num_samples 16
    python inference.py --run_dir runs/demo    the newest checkpoint of a run
    python inference.py --steps 50             DDIM: 50 network evaluations an image
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_network, newest_checkpoint
from config import CommandLine, Config, UserError
from data import save_grid
from ddpm import DDPM, ImageNoise
from device import autocast, run, select_device, select_precision, wants_compile


def sample_images(ddpm: DDPM, config: Config, args: argparse.Namespace, indices: Sequence[int]) -> Iterator[Tensor]:
    """The images of these indices, batch by batch, as float [B, C, H, W] in [-1, 1] on the CPU."""
    shape = (config.channels, config.image_size, config.image_size)
    device = ddpm.betas.device
    steps = args.steps or config.timesteps
    with tqdm(total=len(indices) * steps, unit=" evaluations", unit_scale=True) as bar:
        for first in range(0, len(indices), args.batch_size):
            batch = indices[first:first + args.batch_size]
            noise = ImageNoise(args.seed, batch, shape, device)
            with autocast(device, args.precision):
                for _, x, _ in ddpm.sample_loop(noise(), args.steps, args.eta, args.spacing, noise):
                    bar.update(len(batch))
            bar.set_postfix_str(f"{first + len(batch)}/{len(indices)} images", refresh=False)
            yield x.cpu()


def sample(ddpm: DDPM, config: Config, args: argparse.Namespace) -> None:
    """--mode sample: one grid of num_samples images."""
    images = torch.cat(list(sample_images(ddpm, config, args, range(args.num_samples))))
    path = Path(args.output_dir) / "samples.png"
    save_grid(images, path)
    print(f"{args.num_samples} images: {path}")


MODES = {"sample": sample}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__, "python inference.py [--checkpoint FILE] [--mode MODE] [--FLAG X ...]")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", type=Path, help="default: the newest one of --run_dir")
    add("--run_dir", metavar="DIR", type=Path, default=Path("."), help="where checkpoints/ is (default: .)")
    add("--output_dir", metavar="DIR", type=Path, default=Path("outputs"), help="default: ./outputs")
    add("--mode", choices=[*MODES, "all"], default="sample", help="default: sample")
    add("--num_samples", metavar="N", type=int, default=16, help="images (default: 16)")
    add("--batch_size", metavar="N", type=int, default=64, help="images at a time (default: 64)")
    add("--steps", metavar="S", type=int, help="network evaluations an image (default: T, the whole chain)")
    add("--eta", metavar="X", type=float, help="noise of DDIM, 0 to 1 (default: 0 with fewer than T steps)")
    add("--spacing", choices=["quadratic", "uniform"], default="quadratic", help="of fewer steps (default: quadratic)")
    add("--seed", metavar="N", type=int, default=0, help="image i is drawn from (seed, i) (default: 0)")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: auto")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="default: auto")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile the network (default: auto)")
    args = parser.parse_args(argv)
    for name, least in (("num_samples", 1), ("batch_size", 1), ("steps", 1), ("eta", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"{name}={value} is impossible: it must be at least {least}")
    if args.eta is not None and args.eta > 1:
        parser.error(f"eta={args.eta} is impossible: it must be from 0 (deterministic) to 1 (as noisy as Algorithm 2)")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = select_device(args.device)
    path = args.checkpoint or newest_checkpoint(args.run_dir)
    model, config, step = load_network(path, device)
    args.precision = select_precision(args.precision, device, config.dim)
    if args.steps is not None and args.steps > config.timesteps:
        raise UserError(f"steps={args.steps} is impossible: this checkpoint's chain has 1 to {config.timesteps}")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={str(args.output_dir)!r} cannot be written: {error}") from error
    if wants_compile(args.compile, device, args.num_samples * (args.steps or config.timesteps) // args.batch_size):
        model.compile()
    print(f"{path}: step {step:,}, {config.image_size} x {config.image_size} x {config.channels}, "
          f"T = {config.timesteps}, on {device} in {args.precision}")
    MODES[args.mode](DDPM(model, config).to(device), config, args)
    return 0


if __name__ == "__main__":
    run(main)
