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
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data import to_float, to_picture, to_square, to_uint8
from ddpm import DDPM, ETA, ORDER, SPACING, Noise, batch_of, is_algorithm_2
from utils.checkpoint import load_network, network_digest, newest_checkpoint
from utils.cli import CommandLine, UserError, progress_bar, run
from utils.device import (
    autocast,
    from_first_process,
    maybe_compile,
    memory_format,
    select_device,
    select_precision,
    start_processes,
)
from utils.files import (
    atomic_write,
    locked,
    make_writable,
    remove_left_overs,
    save_png,
    write_json,
)
from utils.randomness import ImageNoise

RECORD = "sampled_with.json"  # in the folder of --save_images
NUM_SAMPLES = {"sample": 16, "process": 4, "interpolate": 9}  # unless the command line says


class Sampler:
    """A checkpoint's diffusion, and the command line's choices of how to sample from it."""

    def __init__(self, args: argparse.Namespace) -> None:
        """From the flags of add_shared_flags.  Raises UserError where they do not fit."""
        self.device = select_device(args.device)
        self.path = args.checkpoint or newest_checkpoint(args.run_dir)
        model, config, self.training_steps = load_network(self.path, self.device)
        if args.variance:
            config = replace(config, variance=args.variance)
        self.config = config
        self.precision = select_precision(args.precision, self.device, config, training=False)
        model.to(memory_format=memory_format(self.device, self.precision))
        self.ddpm = DDPM(model, config).to(self.device)

        self.shape = (config.channels, config.image_size, config.image_size)
        self.seed = args.seed
        self.batch_size = args.batch_size
        T = config.timesteps
        self.steps = args.steps or T
        self.eta = args.eta  # None for Algorithm 2
        self.spacing = args.spacing or SPACING
        self.order = args.order or ORDER
        if self.steps > T:
            raise UserError(f"steps={self.steps} is impossible: this checkpoint's chain has 1 to "
                            f"{T}")
        if is_algorithm_2(T, args.steps, args.eta):
            where, unused = f"in Algorithm 2, all {T} steps", ("order", "spacing")
        else:
            where, unused = "in fewer steps", ("variance",)
            self.eta = ETA if args.eta is None else args.eta
        for name in unused:
            if getattr(args, name) is not None:
                raise UserError(f"--{name} has no effect {where}")

    def origin(self) -> dict[str, Any]:
        """All that decides what image i looks like, on one kind of device."""
        return {
            "network": network_digest(self.ddpm.model, self.config),
            "step": self.training_steps,
            "seed": self.seed,
            "sampler": self.describe(),
        }

    def describe(self) -> str:
        if self.eta is None:
            name = f"Algorithm 2, {self.config.variance}"
        else:
            name = f"order {self.order}, eta {self.eta:g}, {self.spacing} spacing"
        return f"{name}, {self.steps} of {self.config.timesteps} steps"

    def noise(self, seed: int, indices: Sequence[int]) -> ImageNoise:
        return ImageNoise(seed, indices, self.shape, self.device)

    def loop(
        self, x_t: Tensor, noise: Noise, t_start: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The steps of the chain from x_t at t_start (T - 1 where None): (t, x after it)."""
        steps = self.steps
        if t_start is not None:
            steps = min(steps, t_start + 1)
        return self.ddpm.sample_loop(
            x_t, steps, self.eta, self.spacing, self.order, noise, t_start)

    def batches(
        self, indices: Sequence[int], rank: int = 0
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The images of these indices, batch by batch: (indices, uint8 [B, C, H, W] on the CPU).

        Image i is drawn from (seed, i) alone.
        """
        evaluations = len(indices) * self.steps
        with progress_bar(total=evaluations, unit=" evaluations", unit_scale=True,
                          disable=rank > 0) as bar:
            for first in range(0, len(indices), self.batch_size):
                batch = indices[first:first + self.batch_size]
                noise = self.noise(self.seed, batch)
                for _, x in self.loop(noise.next(), noise):
                    bar.update(len(batch))
                done = first + len(batch)
                bar.set_postfix_str(f"{done:,}/{len(indices):,} images", refresh=False)
                yield batch, to_uint8(x).cpu()


# --mode sample

def sample(sampler: Sampler, args: argparse.Namespace) -> None:
    """A grid, or one array."""
    count = args.num_samples or NUM_SAMPLES["sample"]
    images = torch.cat([batch for _, batch in sampler.batches(range(count))])
    if args.npz:
        path = args.npz
        with atomic_write(path) as file:
            np.savez(file, images.permute(0, 2, 3, 1).numpy())
    else:
        path = args.output_dir / "samples.png"
        save_png(to_picture(to_float(images)), path)
    print(f"{count} images: {path}")


def save_images(sampler: Sampler, args: argparse.Namespace, rank: int, world_size: int) -> None:
    """--save_images: the numbered images that are not there yet, each process its share."""
    folder = args.save_images
    count = args.num_samples or NUM_SAMPLES["sample"]
    folder.mkdir(parents=True, exist_ok=True)  # on each process's machine
    from_first_process(lambda: claim_folder(sampler.origin(), folder, count))
    paths = {index: folder / f"{index:06}.png" for index in range(rank, count, world_size)}
    missing = [index for index, path in paths.items() if not is_whole(path)]
    for indices, images in sampler.batches(missing, rank):
        for index, image in zip(indices, images.permute(0, 2, 3, 1).numpy(), strict=True):
            is_grey = image.shape[-1] == 1
            pixels = image[:, :, 0] if is_grey else image
            save_png(Image.fromarray(pixels), paths[index])
    if rank == 0:
        print(f"{count} images: {folder}")


def is_whole(path: Path) -> bool:
    """Whether it is a PNG to its end: what is not is drawn again."""
    return path.is_file() and path.read_bytes().endswith(b"IEND\xaeB`\x82")


def claim_folder(origin: dict[str, Any], folder: Path, count: int) -> None:
    """Write down in the folder what makes its images, or find the same written there.

    Raises UserError where it is in use for others, before anything in it is touched.
    """
    with locked(folder):
        check_folder(origin, folder, count)


def check_folder(origin: dict[str, Any], folder: Path, count: int) -> None:
    """claim_folder, while nobody else does."""
    record = folder / RECORD
    written = read_record(folder)
    pictures = list(folder.glob("*.png"))
    if written == {} and pictures:
        raise UserError(f"{folder} holds {len(pictures)} pictures that were not sampled here, such "
                        f"as {min(pictures).name}: choose another folder")
    if written not in ({}, origin):
        raise UserError(f"{folder} holds images sampled with {json.dumps(written)}, not "
                        f"{json.dumps(origin)}: choose another folder")
    numbered = [path.name for path in pictures if re.fullmatch(r"\d{6,}\.png", path.name)]
    beyond = [name for name in numbered if int(name.removesuffix(".png")) >= count]
    if beyond:
        raise UserError(f"{folder} holds {len(beyond)} images beyond num_samples={count}, such as "
                        f"{min(beyond)}: choose another folder")
    remove_left_overs(folder, r"\d{6,}\.png|sampled_with\.json", seconds=3600)
    if written == {}:
        write_json(record, origin)


def read_record(folder: Path) -> dict[str, Any]:
    """What the images in the folder were sampled with; {} where that is not written there."""
    record = folder / RECORD
    if not record.is_file():
        return {}
    try:
        written = json.loads(record.read_text())
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested without end
        raise UserError(f"{record} is damaged: choose another folder") from error
    return written


# --mode process

def process(sampler: Sampler, args: argparse.Namespace) -> None:
    """About ten x_t on the way from noise to image, under each the x_0 predicted from it."""
    count = args.num_samples or NUM_SAMPLES["process"]
    noise = sampler.noise(sampler.seed, range(count))
    shown = {round(i * (sampler.steps - 1) / 9) for i in range(10)}
    columns, labels = [], []  # a column: [N, 2, C, H, W]
    x_t = noise.next()
    loop = progress_bar(sampler.loop(x_t, noise), "process", sampler.steps, unit="step")
    for number, (t, x) in enumerate(loop):
        if number in shown:
            pred_x_start = sampler.ddpm.predict_x_start(x_t, batch_of(t, x_t))
            columns.append(torch.stack([x_t, pred_x_start], dim=1))
            labels.append(f"t={t}")
        x_t = x
    columns.append(torch.stack([x_t, x_t], dim=1))
    labels.append("image")

    rows = torch.stack(columns, dim=2)  # [N, 2, columns, C, H, W]
    rows = rows.flatten(0, 1)  # image by image, x_t above its pred_x_start
    write_png(table(rows, labels), args.output_dir / "process.png")
    frames = []
    for column, label in zip(columns, labels, strict=True):
        frames.append(table(column.transpose(0, 1), [label]))
    write_gif(frames, args.output_dir / "process.gif", milliseconds=300)


# --mode interpolate

def interpolate(sampler: Sampler, args: argparse.Namespace) -> None:
    """A path between two samples, through noise; or between two images, by way of x_t."""
    count = args.num_samples or NUM_SAMPLES["interpolate"]
    fractions = torch.linspace(0, 1, count, device=sampler.device).view(-1, 1, 1, 1)
    labels = [f"{fraction:.2f}" for fraction in fractions.flatten()]
    if args.images:
        rows = between_images(sampler, args.images, args.t, fractions)
        labels = ["A", *labels, "B"]
    else:
        seeds = args.seeds or (sampler.seed, sampler.seed + 1)
        rows = between_seeds(sampler, seeds, fractions)
    write_png(table(rows, labels), args.output_dir / "interpolation.png")
    frames = []
    for column, label in enumerate(labels):
        frames.append(table(rows[:, column:column + 1], [label]))
    there_and_back = frames + frames[-2::-1]
    write_gif(there_and_back, args.output_dir / "interpolation.gif", milliseconds=150)


def between_seeds(sampler: Sampler, seeds: Sequence[int], fractions: Tensor) -> Tensor:
    """One row [1, F, C, H, W] from the first image of one seed to that of the other."""
    noise_a, noise_b = (sampler.noise(seed, [0]) for seed in seeds)

    def noise(t: int) -> Tensor:
        # The noise of the steps is mixed as x_T is.  So neighbours differ little in all that they
        # are made of, and the ends are what their seeds give alone.
        return slerp(noise_a.next(), noise_b.next(), fractions)

    x_T = noise(sampler.config.timesteps)
    loop = progress_bar(sampler.loop(x_T, noise), "interpolate", sampler.steps, unit="step")
    return last_image(loop)[None]


def between_images(
    sampler: Sampler, paths: Sequence[Path], timesteps: Sequence[int] | None, fractions: Tensor
) -> Tensor:
    """Rows [len(timesteps), F + 2, C, H, W], the sources at their ends (section 4.4).

    Both images are noised to t by one noise, mixed, and denoised from there.
    """
    T = sampler.config.timesteps
    timesteps = timesteps or [T // 4, T // 2, T * 3 // 4]
    if not all(0 <= t < T for t in timesteps):
        raise UserError(f"t={timesteps} is impossible: this checkpoint's timesteps are 0 to "
                        f"{T - 1}")
    image_a, image_b = (read_image(path, sampler) for path in paths)
    rows = []
    for t in timesteps:
        # One noise for all frames, in q_sample and in every step: a mix of two images with the same
        # noise is an image with that noise, and neighbours stay alike.
        noise = sampler.noise(sampler.seed, [0] * len(fractions))
        eps = noise.next()[:1]
        x_t_a = sampler.ddpm.q_sample(image_a, batch_of(t, image_a), eps)
        x_t_b = sampler.ddpm.q_sample(image_b, batch_of(t, image_b), eps)
        x_t = torch.lerp(x_t_a, x_t_b, fractions)
        loop = sampler.loop(x_t, noise, t_start=t)
        x = last_image(progress_bar(loop, f"from t={t}", unit="step"))
        rows.append(torch.cat([image_a, x, image_b]))
    return torch.stack(rows)


def last_image(loop: Iterator[tuple[int, Tensor]]) -> Tensor:
    for _, x in loop:
        pass
    return x


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


def read_image(path: Path, sampler: Sampler) -> Tensor:
    """The picture as float [1, C, H, W] of the network's size; UserError if it cannot be read."""
    size = sampler.config.image_size
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is not a file")
    try:
        with Image.open(path) as image:
            if image.size != (size, size):
                print(f"{path}: {image.width} x {image.height}, resized to {size} x {size}")
            pixels = to_square(image, size, sampler.config.channels)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    return to_float(torch.tensor(pixels, device=sampler.device))[None]


# Pictures

def table(images: Tensor, labels: Sequence[str]) -> Image.Image:
    """images [rows, columns, C, H, W] in [-1, 1], enlarged if small; labels above the columns."""
    rows, columns, _, _, width = images.shape
    cell = width + 2
    zoom = math.ceil(48 / cell)
    picture = to_picture(images.flatten(0, 1), columns)
    size = (picture.width * zoom, picture.height * zoom)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    page = Image.new("RGB", (picture.width, picture.height + 14))
    page.paste(picture, (0, 14))
    draw = ImageDraw.Draw(page)
    for column, label in enumerate(labels):
        draw.text((column * cell * zoom + 4, 1), label, "white")
    return page


def write_png(picture: Image.Image, path: Path) -> None:
    save_png(picture, path)
    print(path)


def write_gif(frames: list[Image.Image], path: Path, milliseconds: int) -> None:
    """Endless, each frame shown so long, the last one five times as long."""
    durations = [milliseconds] * len(frames)
    durations[-1] *= 5
    with atomic_write(path) as file:
        frames[0].save(
            file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(path)


# The command line

MODES = {"sample": sample, "process": process, "interpolate": interpolate}


def add_shared_flags(parser: CommandLine) -> None:
    """What every script that samples from a checkpoint takes."""
    add, add_number = parser.add_argument, parser.add_number
    add("--checkpoint", metavar="FILE", type=Path, help="default: the newest one of --run_dir")
    add("--run_dir", metavar="DIR", type=Path, default=Path("."),
        help="where checkpoints/ is (default: .)")
    add_number("--batch_size", int, "images at a time, per process (default: 64)", least=1,
               most=1e6, default=64)
    add_number("--steps", int, "network evaluations per image (default: T, the whole chain)",
               least=1)
    add_number("--eta", float, f"noise of fewer steps, from 0 to 1 (default: {ETA:g})", least=0,
               most=1)
    add("--order", type=int, choices=[1, 2],
        help=f"of fewer steps: 1 as DDIM, 2 as DPM-Solver++(2M) (default: {ORDER})")
    add("--spacing", choices=["quadratic", "uniform"],
        help=f"of fewer steps (default: {SPACING})")
    add("--variance", choices=["fixed_large", "fixed_small"],
        help="of Algorithm 2 and of bits/dim (default: as in the checkpoint)")
    add_number("--seed", int, "image i is drawn from (seed, i) (default: 0)", least=0,
               most=2**32 - 1, default=0)
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: auto")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="default: auto")
    add("--compile", choices=["auto", "on", "off"], default="auto",
        help="torch.compile the network (default: auto)")


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
    add_shared_flags(parser)
    args = parser.parse_args(argv)

    if args.mode not in ("sample", "all"):
        parser.refuse_without_effect(args, f"with --mode {args.mode}", "npz", "save_images")
    if args.mode not in ("interpolate", "all"):
        parser.refuse_without_effect(args, f"with --mode {args.mode}", "seeds", "images", "t")
    if args.save_images:
        parser.refuse_without_effect(args, "with --save_images", "npz")
    if args.images:
        parser.refuse_without_effect(args, "with --images", "seeds")
    else:
        parser.refuse_without_effect(args, "without --images", "t")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rank, world_size = start_processes()
    if world_size > 1 and (args.mode != "sample" or not args.save_images):
        raise UserError("torchrun shares the images of --mode sample --save_images DIR; everything "
                        "else runs in one process")
    sampler = Sampler(args)
    modes = list(MODES) if args.mode == "all" else [args.mode]
    for path in written_files(args, modes):
        make_writable(path)
    batches = (args.num_samples or NUM_SAMPLES["sample"]) / args.batch_size
    maybe_compile(args.compile, sampler.device, batches * sampler.steps, sampler.ddpm.model)
    if rank == 0:
        config = sampler.config
        print(f"{sampler.path}: step {sampler.training_steps:,}, {config.image_size} x "
              f"{config.image_size} x {config.channels}, T = {config.timesteps}, on {world_size} x "
              f"{sampler.device.type} in {sampler.precision}")

    with torch.no_grad(), autocast(sampler.device, sampler.precision):
        for mode in modes:
            if mode == "sample" and args.save_images:
                save_images(sampler, args, rank, world_size)
            else:
                MODES[mode](sampler, args)
    return 0


def written_files(args: argparse.Namespace, modes: Sequence[str]) -> list[Path]:
    """What these modes will write, but for the numbered images: it is tried before the work."""
    folder = args.output_dir
    paths = {
        "sample": [folder / "samples.png"],
        "process": [folder / "process.png", folder / "process.gif"],
        "interpolate": [folder / "interpolation.png", folder / "interpolation.gif"],
    }
    if args.npz:
        paths["sample"] = [args.npz]
    if args.save_images:
        paths["sample"] = []
    return [path for mode in modes for path in paths[mode]]


if __name__ == "__main__":
    run(main)
