"""Pictures from a checkpoint: Algorithm 2 of arXiv 2006.11239, or fewer steps.

    python inference.py --checkpoint FILE --num_samples 16
    python inference.py --run_dir runs/demo --mode all     its newest checkpoint
    python inference.py --steps 50                         instead of all T
    python inference.py --mode process                     from noise to image
    python inference.py --mode interpolate --seeds 0 1     between two samples
    python inference.py --mode interpolate --images a.png b.png --t 250
    torchrun --nproc_per_node=4 inference.py --save_images DIR --num_samples N
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import to_float, to_uint8
from ddpm import batch_of, last_image
from utils.cli import CommandLine, UserError, progress_bar, say
from utils.files import atomic_write, make_writable
from utils.image_cache import read_picture
from utils.image_folder import ImageFolder
from utils.pictures import grid, save_png, save_table_and_film
from utils.process import run_script, script, start_processes
from utils.sampler import Sampler, add_sampler_flags

NUM_SAMPLES = {"sample": 16, "process": 4, "interpolate": 9}  # unless the command line says


# --mode sample

def sample(sampler: Sampler, args: argparse.Namespace) -> None:
    """Numbered images that are not there yet, one array, or a grid."""
    count = args.num_samples or NUM_SAMPLES["sample"]
    if args.save_images:
        path = args.save_images
        folder = ImageFolder(path, sampler.origin(), count)
        for indices, images in sampler.batches(folder.missing()):
            folder.save(indices, images)
    elif args.npz:
        path = args.npz
        images = sampler.images(count)
        with atomic_write(path) as file:
            np.savez(file, images.permute(0, 2, 3, 1).numpy())
    else:
        path = args.output_dir / "samples.png"
        save_png(grid(sampler.images(count)), path)
    say(f"{count} images: {path}")


# --mode process

def process(sampler: Sampler, args: argparse.Namespace) -> None:
    """About ten x_t on the way from noise to image, under each the x_0 predicted from it."""
    count = args.num_samples or NUM_SAMPLES["process"]
    parts = []
    for indices in torch.arange(count).split(sampler.batch_size):
        labels, part = way_of(sampler, indices.tolist())
        parts.append(part)
    columns = torch.cat(parts, dim=2)                       # [columns, 2, N, C, H, W]
    rows = columns.permute(2, 1, 0, 3, 4, 5).flatten(0, 1)  # x_t above its pred_x_start
    save_table_and_film(rows, columns, labels, args.output_dir / "process", milliseconds=300)


def way_of(sampler: Sampler, indices: Sequence[int]) -> tuple[list[str], Tensor]:
    """Each t shown, and the images of these indices there, [columns, 2, B, C, H, W] uint8."""
    randn_like = sampler.noise(sampler.seed, indices)
    shown = {round(i * (sampler.steps - 1) / 9) for i in range(10)}
    labels, columns = [], []
    x_t = randn_like()
    chain = progress_bar(sampler.chain(x_t, randn_like), "process", sampler.steps, unit="step")
    for number, (t, x) in enumerate(chain):
        if number in shown:  # once more, since the chain does not tell its predictions
            pred_x_start = sampler.ddpm.predict_x_start(x_t, batch_of(t, x_t))
            columns.append(to_uint8(torch.stack([x_t, pred_x_start])))
            labels.append(f"t={t}")
        x_t = x
    columns.append(to_uint8(torch.stack([x_t, x_t])))
    return [*labels, "image"], torch.stack(columns)


# --mode interpolate

def interpolate(sampler: Sampler, args: argparse.Namespace) -> None:
    """A path between two samples, through noise; or between two images, by way of x_t."""
    count = args.num_samples or NUM_SAMPLES["interpolate"]
    fractions = torch.linspace(0, 1, count, device=sampler.device).view(-1, 1, 1, 1)
    labels = [f"{fraction:.2f}" for fraction in fractions.flatten()]
    parts = fractions.split(sampler.batch_size)
    if args.images:
        ends = read_images(sampler, args.images)
        rows = torch.cat([between_images(sampler, ends, args.t, part) for part in parts], dim=1)
        a, b = (end.expand(len(rows), 1, -1, -1, -1) for end in ends)
        rows = torch.cat([a, rows, b], dim=1)
        labels = ["A", *labels, "B"]
    else:
        seeds = args.seeds or (sampler.seed, sampler.seed + 1)
        rows = torch.cat([between_seeds(sampler, seeds, part) for part in parts], dim=1)
    rows = to_uint8(rows)
    path = args.output_dir / "interpolation"
    save_table_and_film(rows, rows.split(1, dim=1), labels, path, milliseconds=150, back=True)


def between_seeds(sampler: Sampler, seeds: Sequence[int], fractions: Tensor) -> Tensor:
    """One row [1, F, C, H, W] from the first image of one seed to that of the other."""
    noise_a, noise_b = (sampler.noise(seed, [0]) for seed in seeds)

    def randn_like(x_t: Tensor | None = None) -> Tensor:
        # The noise of the steps is mixed as x_T is.  So neighbours differ little in all that they
        # are made of, and the ends are what their seeds give alone.
        return slerp(noise_a(), noise_b(), fractions)

    chain = sampler.chain(randn_like(), randn_like)
    return last_image(progress_bar(chain, "interpolate", sampler.steps, unit="step"))[None]


def read_images(sampler: Sampler, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Two pictures, each float [1, C, H, W]."""
    channels, size, _ = sampler.shape
    pixels = np.stack([read_picture(path, size, channels) for path in paths])
    return to_float(torch.tensor(pixels, device=sampler.device)).split(1)


def between_images(
    sampler: Sampler, images: tuple[Tensor, Tensor], timesteps: Sequence[int] | None,
    fractions: Tensor,
) -> Tensor:
    """A row for each t from one image to the other, [len(timesteps), F, C, H, W] (section 4.4).

    Both images are noised to t by one noise, mixed, and denoised from there.
    """
    T = sampler.config.timesteps
    timesteps = timesteps or [T // 4, T // 2, T * 3 // 4]
    if not all(0 <= t < T for t in timesteps):
        raise UserError(f"t={timesteps} is impossible: this checkpoint's timesteps are 0 to "
                        f"{T - 1}")
    image_a, image_b = images
    rows = []
    for t in timesteps:
        # One noise for all frames, in q_sample and in every step: a mix of two images with the same
        # noise is an image with that noise, and neighbours stay alike.
        randn_like = sampler.noise(sampler.seed, [0] * len(fractions))
        noise = randn_like()[:1]
        x_t_a = sampler.ddpm.q_sample(image_a, batch_of(t, image_a), noise)
        x_t_b = sampler.ddpm.q_sample(image_b, batch_of(t, image_b), noise)
        x_t = torch.lerp(x_t_a, x_t_b, fractions)
        chain = sampler.chain(x_t, randn_like, t_start=t)
        steps = min(sampler.steps, t + 1)
        rows.append(last_image(progress_bar(chain, f"from t={t}", steps, unit="step")))
    return torch.stack(rows)


def slerp(a: Tensor, b: Tensor, fractions: Tensor) -> Tensor:
    """From a to b [1, C, H, W] along the sphere, at fractions [F, 1, 1, 1].

    So noise keeps its deviation of 1; mixed linearly, it would shrink to 0.707 in the middle.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))  # rounding takes it beyond 1
    share_a = torch.sin((1 - fractions) * angle) / torch.sin(angle)
    share_b = torch.sin(fractions * angle) / torch.sin(angle)
    curved = share_a * a + share_b * b
    # Not an if: it would wait for a GPU, in every step.
    return torch.where(angle < 1e-3, torch.lerp(a, b, fractions), curved)


# The command line

MODES = {"sample": sample, "process": process, "interpolate": interpolate}
ONLY = {  # flags of one mode
    "npz": "sample",
    "save_images": "sample",
    "seeds": "interpolate",
    "images": "interpolate",
    "t": "interpolate",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    usage = "python inference.py [--checkpoint FILE] [--mode MODE] [--FLAG X ...]"
    parser = CommandLine(__doc__, usage)
    add, add_number = parser.add_argument, parser.add_number
    add("--output_dir", metavar="DIR", type=Path, default=Path("outputs"),
        help="default: ./outputs")
    add("--mode", choices=[*MODES, "all"], default="sample", help="default: sample")
    counts = ", ".join(f"{mode} {count}" for mode, count in NUM_SAMPLES.items())
    add_number("--num_samples", int, f"images: {counts} unless given", least=1, most=1e7)
    add("--save_images", metavar="DIR", type=Path,
        help="sample: numbered PNGs, those not there yet")
    add("--npz", metavar="FILE", type=Path,
        help="sample: one uint8 array [N, H, W, C] instead of a grid")
    add_number("--seeds", int, "interpolate: between these (default: seed, seed + 1)", least=0,
               most=2**32 - 1, metavar=("A", "B"), nargs=2)
    add("--images", metavar=("A", "B"), type=Path, nargs=2,
        help="interpolate: between two pictures (section 4.4)")
    add_number("--t", int, "... noised this far, one row each (default: T/4 T/2 3T/4)", least=0,
               nargs="+")
    add_sampler_flags(parser)
    args = parser.parse_args(argv)

    for name, mode in ONLY.items():
        if args.mode not in (mode, "all"):
            parser.refuse_without_effect(args, f"with --mode {args.mode}", name)
    if args.save_images:
        parser.refuse_without_effect(args, "with --save_images", "npz")
    if args.images:
        parser.refuse_without_effect(args, "with --images", "seeds")
    else:
        parser.refuse_without_effect(args, "without --images", "t")
    return args


@script
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    _, world_size = start_processes()
    if world_size > 1 and (args.mode != "sample" or not args.save_images):
        raise UserError("torchrun shares the images of --mode sample --save_images DIR; everything "
                        "else runs in one process")
    sampler = Sampler(args)
    modes = list(MODES) if args.mode == "all" else [args.mode]
    if args.npz:
        make_writable(args.npz)
    if args.mode != "sample" or not (args.npz or args.save_images):
        make_writable(args.output_dir / "samples.png")
    config = sampler.config
    say(f"{sampler.path}: step {sampler.training_steps:,}, {config.image_size} x "
        f"{config.image_size} x {config.channels}, T = {config.timesteps}, on {world_size} x "
        f"{sampler.device.type} in {sampler.precision}")
    count = args.num_samples or NUM_SAMPLES["sample"]
    with sampler.running(math.ceil(count / world_size), sampler.steps):
        for mode in modes:
            MODES[mode](sampler, args)
    return 0


if __name__ == "__main__":
    run_script(main)
