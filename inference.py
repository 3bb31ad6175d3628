"""Pictures from a checkpoint: Algorithm 2 of arXiv 2006.11239, or DDIM.

    python inference.py --checkpoint FILE --num_samples 16
    python inference.py --run_dir runs/demo --mode all     its newest checkpoint
    python inference.py --steps 50                         DDIM, 50 evaluations
    python inference.py --mode process                     from noise to image
    python inference.py --mode interpolate --seeds 0 1     between two samples
    python inference.py --mode interpolate --images a.png b.png --t 250
    torchrun --nproc_per_node=4 inference.py --save_images DIR --num_samples N
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid

from checkpoint import load_network, newest_checkpoint
from config import CommandLine, Config, UserError
from data import atomic_write, progress_bar, remove_left_overs, save_grid, to_float, to_square, to_uint8
from ddpm import DDPM, ImageNoise, spaced_timesteps
from device import autocast, maybe_compile, memory_format, run, select_device, select_precision, start_processes


class Sampler:
    """A checkpoint's diffusion with the command line's choices of how to sample from it."""

    def __init__(self, ddpm: DDPM, config: Config, args: argparse.Namespace) -> None:
        self.ddpm, self.config, self.args = ddpm, config, args
        self.device = ddpm.betas.device
        self.shape = (config.channels, config.image_size, config.image_size)

    def noise(self, seed: int, indices: Sequence[int]) -> ImageNoise:
        return ImageNoise(seed, indices, self.shape, self.device)

    def loop(self, x_T: Tensor, noise: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each step of the chain: (t, x after it, pred_x_start)."""
        return self.ddpm.sample_loop(x_T, self.args.steps, self.args.eta, self.args.spacing, noise)

    def batches(self, indices: Sequence[int], rank: int = 0) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The images of these indices, as uint8 [B, C, H, W] on the CPU; image i is drawn from (seed, i) alone."""
        evaluations = len(indices) * (self.args.steps or self.config.timesteps)
        with progress_bar(total=evaluations, unit=" evaluations", unit_scale=True, disable=rank > 0) as bar:
            for first in range(0, len(indices), self.args.batch_size):
                batch = indices[first:first + self.args.batch_size]
                noise = self.noise(self.args.seed, batch)
                for _, x, _ in self.loop(noise(), noise):
                    bar.update(len(batch))
                bar.set_postfix_str(f"{first + len(batch):,}/{len(indices):,} images", refresh=False)
                yield batch, to_uint8(x).cpu()


# --mode sample

def sample(sampler: Sampler, args: argparse.Namespace) -> None:
    images = torch.cat([images for _, images in sampler.batches(range(args.num_samples or 16))])
    if args.npz:
        with atomic_write(args.npz) as file:
            np.savez(file, images.permute(0, 2, 3, 1).numpy())
    path = args.npz or args.output_dir / "samples.png"
    if not args.npz:
        save_grid(to_float(images), path)
    print(f"{len(images)} images: {path}")


def save_images(sampler: Sampler, args: argparse.Namespace, origin: dict, rank: int, world_size: int) -> None:
    """--save_images: the numbered images that are not there yet, each process its share."""
    folder, count = args.save_images, args.num_samples or 16
    remove_left_overs(folder, seconds=3600)
    record = folder / "sampled_with.json"
    if record.exists() and json.loads(record.read_text()) != origin:
        raise UserError(f"{folder} holds images sampled with {record.read_text()}, not {json.dumps(origin)}: choose "
                        "another folder")
    record.write_text(json.dumps(origin))
    if too_many := [path.name for path in folder.glob("[0-9]*.png") if int(path.stem) >= count]:
        raise UserError(f"{folder} holds {len(too_many)} images beyond num_samples={count}, such as {min(too_many)}: "
                        "choose another folder")

    def path_of(index: int) -> Path:
        return folder / f"{index:06}.png"

    missing = [i for i in range(rank, count, world_size) if not path_of(i).exists()]
    for indices, images in sampler.batches(missing, rank):
        for index, image in zip(indices, images.permute(0, 2, 3, 1).numpy(), strict=True):
            with atomic_write(path_of(index)) as file:
                Image.fromarray(image.squeeze()).save(file, "PNG")
    if rank == 0:
        print(f"{count} images: {folder}")


# --mode process

def process(sampler: Sampler, args: argparse.Namespace) -> None:
    """About ten x_t on the way from noise to image, under each of them the x_0 predicted from it."""
    noise = sampler.noise(args.seed, range(args.num_samples or 4))
    steps = args.steps or sampler.config.timesteps
    shown = {round(i * (steps - 1) / 9) for i in range(10)}
    frames, labels, x_t = [], [], noise()
    for i, (t, x, pred_x_start) in enumerate(progress_bar(sampler.loop(x_t, noise), "process", steps, unit="step")):
        if i in shown:
            frames.append(torch.stack([x_t, pred_x_start]).cpu())  # [2, N, C, H, W]
            labels.append(f"t={t}")
        x_t = x
    frames.append(torch.stack([x_t, x_t]).cpu())
    labels.append("image")
    rows = torch.stack(frames, dim=2).transpose(0, 1).flatten(0, 1)  # image by image, x_t above pred_x_start
    write_picture([table(list(rows), labels)], args.output_dir / "process.png")
    write_picture([table(list(frame), [label]) for frame, label in zip(frames, labels, strict=True)],
                  args.output_dir / "process.gif")


# --mode interpolate

def interpolate(sampler: Sampler, args: argparse.Namespace) -> None:
    """A path between two samples, through noise; or between two images, by way of x_t (section 4.3)."""
    count = args.num_samples or 9
    fractions = torch.linspace(0, 1, count, device=sampler.device).view(-1, 1, 1, 1)
    labels = [f"{fraction:.2f}" for fraction in fractions.flatten()]
    if args.images:
        rows = interpolate_images(sampler, args, fractions)
        labels = ["A", *labels, "B"]
    else:
        ends = [sampler.noise(seed, [0]) for seed in args.seeds or (args.seed, args.seed + 1)]

        def noise(t: int | None = None) -> Tensor:  # of the steps too: so both ends are what their seeds give alone
            return slerp(ends[0](), ends[1](), fractions)

        for _, x, _ in progress_bar(sampler.loop(noise(), noise), "interpolate", args.steps or sampler.config.timesteps,
                            unit="step"):
            pass
        rows = [x.cpu()]
    write_picture([table(rows, labels)], args.output_dir / "interpolation.png")
    frames = list(zip(*rows, strict=True))
    write_picture([table([image[None] for image in frame], [label]) for frame, label in
                   zip(frames + frames[-2:0:-1], labels + labels[-2:0:-1], strict=True)],
                  args.output_dir / "interpolation.gif", milliseconds=150)


def interpolate_images(sampler: Sampler, args: argparse.Namespace, fractions: Tensor) -> list[Tensor]:
    """A row for each t: both images noised to t by one noise, mixed, and denoised from t; the sources at the ends."""
    config, ddpm, rows = sampler.config, sampler.ddpm, []
    sources = [read_image(path, config.image_size, config.channels) for path in args.images]
    for t in args.t or [config.timesteps * k // 4 for k in (1, 2, 3)]:
        noise = sampler.noise(args.seed, [0] * len(fractions))  # one for all frames: mixing keeps its deviation at 1
        eps = noise()[:1]
        t_batch = torch.tensor([t], device=sampler.device)
        a, b = (ddpm.q_sample(image.to(sampler.device), t_batch, eps) for image in sources)
        x_t = torch.lerp(a, b, fractions)
        timesteps = spaced_timesteps(t + 1, min(args.steps or t + 1, t + 1), args.spacing)
        if args.steps is None and args.eta is None:
            loop = ddpm.p_sample_loop(x_t, t, noise)
        else:
            loop = ddpm.ddim_sample_loop(x_t, timesteps, args.eta or 0.0, noise)
        for _, x, _ in progress_bar(loop, f"from t={t}", len(timesteps), unit="step"):
            pass
        rows.append(torch.cat([sources[0], x.cpu(), sources[1]]))
    return rows


def slerp(a: Tensor, b: Tensor, fractions: Tensor) -> Tensor:
    """From a to b [1, C, H, W] along the sphere, at fractions [N, 1, 1, 1]: noise keeps its deviation of 1."""
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    if angle < 1e-3:
        return torch.lerp(a, b, fractions)
    return (torch.sin((1 - fractions) * angle) * a + torch.sin(fractions * angle) * b) / torch.sin(angle)


def read_image(path: Path, size: int, channels: int) -> Tensor:
    """The picture as float [1, C, size, size]; UserError where it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.size != (size, size):
                print(f"{path}: {image.width} x {image.height}, brought to {size} x {size}")
            return to_float(torch.from_numpy(to_square(image, size, channels).copy())[None])
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} cannot be read as an image: {error}") from error


# Pictures

def table(rows: list[Tensor], labels: Sequence[str]) -> Image.Image:
    """Rows of images [N, C, H, W] in [-1, 1] under one another, and a label above each column."""
    cell = rows[0].shape[-1] + 2
    zoom = math.ceil(48 / cell)
    grid = make_grid(to_uint8(torch.cat(rows)), nrow=len(rows[0]), padding=2).permute(1, 2, 0).numpy()
    picture = Image.fromarray(grid).resize((grid.shape[1] * zoom, grid.shape[0] * zoom), Image.Resampling.NEAREST)
    page = Image.new("RGB", (picture.width, picture.height + 14))
    page.paste(picture, (0, 14))
    for column, label in enumerate(labels):
        ImageDraw.Draw(page).text((column * cell * zoom + 4, 1), label, "white")
    return page


def write_picture(frames: list[Image.Image], path: Path, milliseconds: int = 300) -> None:
    """A PNG of one frame, or an endless GIF that rests on its last."""
    with atomic_write(path) as file:
        if path.suffix == ".gif":
            durations = [milliseconds] * (len(frames) - 1) + [5 * milliseconds]
            frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
        else:
            frames[0].save(file, "PNG")
    print(path)


MODES = {"sample": sample, "process": process, "interpolate": interpolate}


def add_shared_flags(parser: CommandLine) -> None:
    """What every script that samples from a checkpoint takes."""
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", type=Path, help="default: the newest one of --run_dir")
    add("--run_dir", metavar="DIR", type=Path, default=Path("."), help="where checkpoints/ is (default: .)")
    add("--batch_size", metavar="N", type=int, default=64, help="images at a time (default: 64)")
    add("--steps", metavar="S", type=int, help="network evaluations an image (default: T, the whole chain)")
    add("--eta", metavar="X", type=float, help="noise of DDIM, 0 to 1 (default: 0 with fewer than T steps)")
    add("--spacing", choices=["quadratic", "uniform"], default="quadratic", help="of fewer steps (default: quadratic)")
    add("--seed", metavar="N", type=int, default=0, help="image i is drawn from (seed, i) (default: 0)")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: auto")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="default: auto")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile the network (default: auto)")


def check_bounds(parser: CommandLine, args: argparse.Namespace, **at_least: int) -> None:
    """Ends the script with status 2 where a shared flag, or one of at_least, is out of its bounds."""
    for name, least in {**at_least, "batch_size": 1, "steps": 1, "eta": 0, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"{name}={value} is impossible: it must be at least {least}")
    if args.eta is not None and args.eta > 1:
        parser.error(f"eta={args.eta} is impossible: it must be from 0 (deterministic) to 1 (as noisy as Algorithm 2)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__, "python inference.py [--checkpoint FILE] [--mode MODE] [--FLAG X ...]")
    add = parser.add_argument
    add("--output_dir", metavar="DIR", type=Path, default=Path("outputs"), help="default: ./outputs")
    add("--mode", choices=[*MODES, "all"], default="sample", help="default: sample")
    add("--num_samples", metavar="N", type=int, help="images: sample 16, process 4, interpolate 9 unless given")
    add("--save_images", metavar="DIR", type=Path, help="sample: numbered PNGs, those not there yet")
    add("--npz", metavar="FILE", type=Path, help="sample: one uint8 array [N, H, W, C] instead of a grid")
    add("--seeds", metavar=("A", "B"), type=int, nargs=2, help="interpolate: between these (default: seed, seed + 1)")
    add("--images", metavar=("A", "B"), type=Path, nargs=2, help="interpolate: between two pictures (section 4.3)")
    add("--t", metavar="N", type=int, nargs="+", help="... noised this far, one row each (default: T/4 T/2 3T/4)")
    add("--weights", choices=["ema", "raw"], default="ema", help="raw: not averaged (default: ema)")
    add_shared_flags(parser)
    args = parser.parse_args(argv)
    check_bounds(parser, args, num_samples=1)
    if args.seeds and min(args.seeds) < 0:
        parser.error(f"seeds={args.seeds} is impossible: they must be at least 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rank, world_size = start_processes()
    device = select_device(args.device)
    path = args.checkpoint or newest_checkpoint(args.run_dir)
    model, config, step = load_network(path, device, "model" if args.weights == "raw" else "ema")
    args.precision = select_precision(args.precision, device, config.dim)
    model.to(memory_format=memory_format(device, args.precision))
    if args.steps is not None and args.steps > config.timesteps:
        raise UserError(f"steps={args.steps} is impossible: this checkpoint's chain has 1 to {config.timesteps}")
    if args.t and not all(0 <= t < config.timesteps for t in args.t):
        raise UserError(f"t={args.t} is impossible: this checkpoint's timesteps are 0 to {config.timesteps - 1}")
    if world_size > 1 and not args.save_images:
        raise UserError("torchrun shares the images of --save_images DIR; everything else runs in one process")
    for folder in filter(None, (args.output_dir, args.save_images, args.npz and args.npz.parent)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable.tmp").touch()
            (folder / ".writable.tmp").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error}") from error
    evaluations = (args.num_samples or 16) / args.batch_size * (args.steps or config.timesteps)
    maybe_compile(args.compile, device, evaluations, model)
    if rank == 0:
        print(f"{path}: step {step:,}, {config.image_size} x {config.image_size} x {config.channels}, "
              f"T = {config.timesteps}, on {world_size} x {device.type} in {args.precision}")

    sampler = Sampler(DDPM(model, config).to(device), config, args)
    with autocast(device, args.precision):
        for mode in MODES if args.mode == "all" else (args.mode,):
            if mode == "sample" and args.save_images:
                origin = {"step": step, "weights": args.weights, "seed": args.seed, "steps": args.steps,
                          "eta": args.eta, "spacing": args.spacing}
                save_images(sampler, args, origin, rank, world_size)
            else:
                MODES[mode](sampler, args)
    return 0


if __name__ == "__main__":
    run(main)
