"""How good a checkpoint is: the likelihood of unseen images, or FID.

    python evaluate.py --metric bpd --checkpoint FILE
    python evaluate.py --metric bpd --num_images 500 --timesteps_per_image 50
    python evaluate.py --metric fid --run_dir runs/paper      50,000 samples
    python evaluate.py --metric fid --steps 100               ... by DDIM
    python evaluate.py --metric fid --images DIR              ... made before
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoint import load_network, newest_checkpoint
from config import CommandLine, Config, UserError, derive_seed
from data import DOWNLOADS, load_folder, load_images, progress_bar, to_float, write_json
from ddpm import DDPM, ImageNoise
from device import autocast, maybe_compile, memory_format, run, select_device, select_precision
from inference import Sampler, add_shared_flags, check_bounds

Fields = dict[str, Any]
REMARKS = {  # the paper's figures: CIFAR-10, its own network after 800,000 steps
    "total": "bits/dim, an upper bound  (paper: 3.75 on CIFAR-10's test set)",
    "standard_error": "bits/dim, of total over the images",
    "prior": "bits/dim, L_T  (paper: about 1e-5)",
    "rate": "bits/dim, L_1 .. L_{T-1}  (paper: 1.78)",
    "distortion": "bits/dim, L_0  (paper: 1.97)",
    "rmse": "of 255, of the x_0 predicted at t = 0  (paper: 0.95)",
    "fid": "(paper: 3.17 of 50,000 by Algorithm 2 against CIFAR-10's training set)",
}


# --metric bpd

def bpd(ddpm: DDPM, config: Config, args: argparse.Namespace, precision: str) -> Fields:
    """The variational bound, Eq. 5, on images that are not mirrored.  Image i draws from (seed, i) alone."""
    T, K, device = config.timesteps, args.timesteps_per_image, ddpm.betas.device
    if K is not None and K > T - 1:
        raise UserError(f"timesteps_per_image={K} is impossible: this checkpoint's rate has 1 to {T - 1}")
    images = load_images(config, "test")
    if args.num_images:  # spread evenly: the first ones of a folder may all be of one kind
        images = images[np.linspace(0, len(images) - 1, min(args.num_images, len(images))).astype(int)]
    evaluations = T if K is None else K + 1
    maybe_compile(args.compile, device, len(images) / args.batch_size * evaluations, ddpm.model)

    bits = []
    with (progress_bar(total=len(images) * evaluations, unit=" evaluations", unit_scale=True) as bar,
          autocast(device, precision)):
        for first in range(0, len(images), args.batch_size):
            x_start = to_float(torch.tensor(images[first:first + args.batch_size], device=device))
            indices = range(first, first + len(x_start))
            noise = ImageNoise(args.seed, indices, x_start.shape[1:], device)

            def draw(n: int, noise: ImageNoise = noise) -> Tensor:  # once an evaluation: the bar goes with it
                bar.update(len(noise.generators))
                return noise()

            timesteps = None if K is None else random_timesteps(args.seed, indices, K, T).to(device)
            bits.append({name: value.cpu() for name, value in ddpm.bits_per_dim(x_start, timesteps, draw).items()})

    values = {name: torch.cat([batch[name] for batch in bits]).double() for name in bits[0]}
    total = values["total"]
    return {
        "data": describe(config, "test"), "num_images": len(images), "timesteps_per_image": K or T, "seed": args.seed,
        "precision": precision, "total": total.mean().item(),
        "standard_error": total.std().item() / math.sqrt(len(total)) if len(total) > 1 else None,
        **{name: values[name].mean().item() for name in ("prior", "rate", "distortion")},
        "rmse": 127.5 * math.sqrt(values["mse"].mean())}


def random_timesteps(seed: int, indices: range, K: int, T: int) -> Tensor:
    """K different ones of 1..T-1 for each image [K, B]."""
    draws = [np.random.default_rng(derive_seed("timesteps", seed, i)).choice(T - 1, K, replace=False) for i in indices]
    return torch.from_numpy(np.stack(draws, axis=1)) + 1


# --metric fid

def fid(ddpm: DDPM, config: Config, args: argparse.Namespace, precision: str) -> Fields:
    """The Frechet distance between Inception's features of generated and of training images, by torch-fidelity."""
    torch_fidelity = load_inception(args.inception_weights)  # first: sampling takes hours
    reference, device = load_images(config, "train"), ddpm.betas.device
    if args.images:
        images = load_folder(args.images, Path(config.data_dir), config.image_size, config.channels)[:args.num_samples]
        record = args.images / "sampled_with.json"
        sampler = f"{args.images}, {record.read_text() if record.exists() else 'of unknown origin'}"
    else:
        count, steps = args.num_samples or 50_000, args.steps or config.timesteps
        if steps > config.timesteps:
            raise UserError(f"steps={steps} is impossible: this checkpoint's chain has 1 to {config.timesteps}")
        maybe_compile(args.compile, device, count / args.batch_size * steps, ddpm.model)
        with autocast(device, precision):
            batches = [batch.numpy() for _, batch in Sampler(ddpm, config, args).batches(range(count))]
        images = np.concatenate(batches)
        ancestral = steps == config.timesteps and args.eta is None
        sampler = "Algorithm 2" if ancestral else f"DDIM, eta {args.eta or 0.0:g}, {args.spacing} spacing"
        sampler += f", {steps} of {config.timesteps} steps, seed {args.seed}, {precision}"
    if min(len(images), len(reference)) < 2:
        raise UserError(f"FID needs two images or more: here are {len(images)}, and {len(reference)} to compare with")
    # save_cpu_ram: without worker processes, which indexing an array does not need
    metrics = torch_fidelity.calculate_metrics(
        input1=InceptionImages(images), input2=InceptionImages(reference), fid=True, cuda=device.type == "cuda",
        batch_size=args.batch_size, feature_extractor_weights_path=args.inception_weights, save_cpu_ram=True,
        verbose=False)
    return {"reference": describe(config, "train"), "num_reference": len(reference), "num_samples": len(images),
            "sampler": sampler, "fid": metrics["frechet_inception_distance"]}


def load_inception(weights: str | None) -> ModuleType:
    """torch_fidelity.  UserError where it, or its weights, are not there."""
    try:
        import torch_fidelity
        from torch_fidelity import feature_extractor_inceptionv3 as inception
    except ImportError as error:
        raise UserError("--metric fid needs torch-fidelity: pip install torch-fidelity") from error
    try:
        if weights:  # torch-fidelity itself would run code that is in the file
            torch.load(weights, map_location="cpu", weights_only=True)
        inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
    except Exception as error:  # of what a download or a damaged file may raise there is no list
        reason = " ".join(str(error).split())[:200]
        problem = f"{weights} does not hold them" if weights else "they could not be downloaded"
        raise UserError(f"--metric fid needs the weights of Inception, and {problem} ({reason}): get "
                        f"{inception.URL_INCEPTION_V3} and name it with --inception_weights FILE") from error
    return torch_fidelity


class InceptionImages(torch.utils.data.Dataset):
    """uint8 images [N, C, H, W] as torch-fidelity takes them: three channels each."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(self.images[i]).expand(3, -1, -1)


def describe(config: Config, split: str) -> str:
    return f"{config.data}, {f'{split} set' if config.data in (*DOWNLOADS, 'shapes') else 'the whole folder'}"


METRICS = {"bpd": bpd, "fid": fid}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__, "python evaluate.py --metric bpd|fid [--checkpoint FILE] [--FLAG X ...]")
    add = parser.add_argument
    add("--metric", choices=METRICS, required=True, help="bpd: bits per dimension, fid: Frechet distance")
    add("--data", metavar="NAME", help="a data set or a folder (default: what the checkpoint was trained on)")
    add("--data_dir", metavar="DIR", help="where downloads are kept (default: as in training)")
    add("--num_images", metavar="N", type=int, help="bpd: N images, spread evenly (default: all)")
    add("--timesteps_per_image", metavar="K", type=int, help="bpd: estimate the rate from K (default: all of them)")
    add("--num_samples", metavar="N", type=int, help="fid: images to make (default: 50000), or to take of --images")
    add("--images", metavar="DIR", type=Path, help="fid: of these images, instead of making some")
    add("--inception_weights", metavar="FILE", help="fid: default: torch-fidelity downloads them")
    add("--json", metavar="FILE", type=Path, help="write what is printed here too")
    add_shared_flags(parser)
    args = parser.parse_args(argv)
    check_bounds(parser, args, num_images=1, timesteps_per_image=1, num_samples=2)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = select_device(args.device)
    path = args.checkpoint or newest_checkpoint(args.run_dir)
    model, config, step = load_network(path, device)
    config = replace(config, data=args.data or config.data, data_dir=args.data_dir or config.data_dir)
    precision = select_precision(args.precision, device, config.dim)
    model.to(memory_format=memory_format(device, precision))
    result = METRICS[args.metric](DDPM(model, config).to(device), config, args, precision)
    fields = {"metric": args.metric, "checkpoint": str(path), "step": step, **result}
    for name, value in fields.items():
        if isinstance(value, float):
            fields[name] = value = float(f"{value:.6g}")
        print(f"{name:<20} {value!s:<12} {REMARKS.get(name, '')}".rstrip())
    if args.json:
        write_json(args.json, fields)
    return 0


if __name__ == "__main__":
    run(main)
