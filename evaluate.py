"""How good a checkpoint is: the likelihood (Eq. 5, 8, 13), or FID.

    python evaluate.py --metric bpd --checkpoint FILE
    python evaluate.py --metric bpd --num_images 500 --timesteps_per_image 50
    python evaluate.py --metric fid --run_dir runs/paper      50,000 samples
    python evaluate.py --metric fid --steps 100               ... in fewer steps
    python evaluate.py --metric fid --images DIR              ... made before
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config
from data import DOWNLOADS, load_images, to_float
from ddpm import DDPM, RandnLike, at, batch_of, mean_of_each
from utils.cli import CommandLine, UserError, progress_bar, under_torchrun
from utils.files import make_writable, write_json
from utils.image_cache import load_folder, refuse_other_sizes
from utils.image_folder import read_record
from utils.inception import Inception
from utils.modes import evaluating
from utils.process import run_script, script
from utils.randomness import ImageNoise, derive_seed
from utils.sampler import Sampler, add_sampler_flags

Fields = dict[str, Any]
REMARKS = {  # the paper's figures: CIFAR-10, its own network after 800,000 steps
    "total": "bits/dim, an upper bound  (paper: 3.75 on CIFAR-10's test set)",
    "standard_error": "bits/dim, of total over the images",
    "prior": "bits/dim, L_T  (paper: about 1e-5)",
    "rate": "bits/dim, L_1 .. L_{T-1}  (paper, with L_T: 1.78)",
    "distortion": "bits/dim, L_0  (paper: 1.97)",
    "rmse": "of 255, of the x_0 predicted at t = 0  (paper: 0.95)",
    "fid": "(paper: 3.17 of 50,000 by Algorithm 2 against CIFAR-10's training set)",
}


# The likelihood

@torch.no_grad()
def bits_per_dim(
    ddpm: DDPM, x_start: Tensor, timesteps: Tensor | None = None,
    randn_like: RandnLike = torch.randn_like,
) -> dict[str, Tensor]:
    """The variational bound of Eq. 5 on 8-bit images, for each image [B] in bits per dimension.

    total = prior (L_T) + rate (L_1..L_{T-1}) + distortion (L_0, Eq. 13); mse: of the x_0 predicted
    at t = 0.  timesteps [K, B], each uniform in 1..T-1, make rate an unbiased estimate from K of
    its T - 1 terms.  The network is evaluated 1 + K times, or T times without timesteps, from
    t = 0 up, and before each randn_like is called once.
    """
    def predict(t: Tensor) -> Tensor:
        x_t = ddpm.q_sample(x_start, t, randn_like(x_start))
        return ddpm.predict_x_start(x_t, t)

    T = ddpm.timesteps
    if timesteps is None:
        every_t = torch.arange(1, T, device=x_start.device)
        timesteps = every_t[:, None].expand(-1, len(x_start))

    # L_T: q(x_T | x_0) against a standard normal
    abar_T = ddpm.alphas_cumprod_float64[-1]
    prior = bits((abar_T * x_start.square() - abar_T - math.log1p(-abar_T)) / 2)

    with evaluating(ddpm):
        # L_0: at t = 0 the mean is pred_x_start.
        pred_x_start = predict(batch_of(0, x_start))
        std = ddpm.decoder_variance.sqrt()
        distortion = bits(-discretized_log_likelihood(x_start, pred_x_start, std))
        mse = mean_of_each((x_start - pred_x_start).square())

        # L_1 .. L_{T-1}
        rate = torch.zeros_like(prior)
        for t in timesteps:
            rate = rate + bits(posterior_kl(ddpm, x_start, predict(t), t))
        rate = rate * ((T - 1) / len(timesteps))

    total = prior + rate + distortion
    return {"total": total, "prior": prior, "rate": rate, "distortion": distortion, "mse": mse}


def bits(nats: Tensor) -> Tensor:
    """nats of each pixel [B, C, H, W] -> bits per dimension of each image [B]."""
    return mean_of_each(nats) / math.log(2)


def posterior_kl(ddpm: DDPM, x_start: Tensor, pred_x_start: Tensor, t: Tensor) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each pixel [B, C, H, W], for t > 0: Eq. 8.

    In nats.  Without the clip of x_0, the part that depends on the network is Eq. 12: the weighted
    error of the noise.
    """
    variance = at(ddpm.model_variance, t, x_start)
    # The two means differ by x_0 alone.
    difference = at(ddpm.posterior_mean_coef1, t, x_start) * (x_start - pred_x_start)
    # (r - 1 - ln r + difference^2 / variance) / 2, where r is the ratio of the two variances:
    # from r - 1, since it keeps its digits where they are nearly equal.
    r_minus_1 = (at(ddpm.posterior_variance, t, x_start) - variance) / variance
    return (r_minus_1 - torch.log1p(r_minus_1) + difference.square() / variance) / 2


def discretized_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The log-probability, in nats, of x's bin under a normal distribution, Eq. 13.

    x: 8-bit values in [-1, 1]; a bin is 2/255 wide, the first and last one reach to infinity.
    """
    lower = torch.where(x < -0.999, -math.inf, (x - 1 / 255 - mean) / std)
    upper = torch.where(x > 0.999, math.inf, (x + 1 / 255 - mean) / std)
    # Mirrored to the left of the mean: only there the logarithm keeps its digits, however far away.
    is_right = x > mean
    lower, upper = torch.where(is_right, -upper, lower), torch.where(is_right, -lower, upper)
    log_upper = log_normal_cdf(upper)
    return log_upper + torch.log(-torch.expm1(log_normal_cdf(lower) - log_upper))


def log_normal_cdf(x: Tensor) -> Tensor:
    """ln Phi(x), exact in both tails; torch.special.log_ndtr is not there on an Apple GPU."""
    x = x / math.sqrt(2)
    left = torch.log(torch.special.erfcx(-x) / 2) - x**2
    right = torch.log1p(-torch.erfc(x) / 2)
    return torch.where(x < 0, left, right)


# --metric bpd

def bpd(sampler: Sampler, data: Config, args: argparse.Namespace) -> Fields:
    """The bound on images that are not mirrored.  Image i draws from (seed, i) alone."""
    T, K = sampler.config.timesteps, args.timesteps_per_image
    if K is not None and K > T - 1:
        raise UserError(f"timesteps_per_image={K} is impossible: this checkpoint's rate has 1 to "
                        f"{T - 1}")
    images = load_images(data, "test")
    if args.num_images and args.num_images < len(images):
        # Spread evenly: the first ones of a folder may all be of one kind.
        chosen = np.linspace(0, len(images) - 1, args.num_images).astype(int)
        images = images[chosen]
    evaluations = T if K is None else K + 1
    batches = []
    total = len(images) * evaluations
    bar = progress_bar(total=total, unit=" evaluations", unit_scale=True)
    with bar, sampler.running(len(images), evaluations):
        for batch in torch.arange(len(images)).split(sampler.batch_size):
            indices, count = sampler.filled_up(batch.tolist()), len(batch)
            x_start = to_float(torch.tensor(images[indices], device=sampler.device))
            timesteps = None
            if K is not None:
                timesteps = random_timesteps(sampler.seed, indices, K, T).to(sampler.device)
            noise = sampler.noise(sampler.seed, indices)

            def randn_like(x: Tensor, noise: ImageNoise = noise, count: int = count) -> Tensor:
                bar.update(count)  # here, since it is called once per evaluation
                return noise(x)

            terms = bits_per_dim(sampler.ddpm, x_start, timesteps, randn_like)
            batches.append({name: value[:count].cpu().double() for name, value in terms.items()})

    terms = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    standard_error = None
    if len(images) > 1:
        standard_error = terms["total"].std().item() / math.sqrt(len(images))
    return {
        "data": describe(data, "test"),
        "num_images": len(images),
        "timesteps_per_image": T - 1 if K is None else K,
        "seed": sampler.seed,
        "precision": sampler.precision,
        "total": terms["total"].mean().item(),
        "standard_error": standard_error,
        "prior": terms["prior"].mean().item(),
        "rate": terms["rate"].mean().item(),
        "distortion": terms["distortion"].mean().item(),
        "rmse": 127.5 * math.sqrt(terms["mse"].mean()),
    }


def random_timesteps(seed: int, indices: Sequence[int], K: int, T: int) -> Tensor:
    """K different ones of 1..T-1 for each image [K, B]."""
    columns = []
    for index in indices:
        generator = np.random.default_rng(derive_seed("timesteps", seed, index))
        columns.append(generator.choice(T - 1, K, replace=False) + 1)
    return torch.from_numpy(np.stack(columns, axis=1))


# --metric fid

def fid(sampler: Sampler, data: Config, args: argparse.Namespace) -> Fields:
    """The Frechet distance between Inception's features of generated and of training images."""
    inception = Inception(args.inception_weights)  # first: sampling takes hours
    reference = load_images(data, "train")
    if args.images:
        # A figure of resized images would be one of something else.
        refuse_other_sizes(args.images, data.image_size)
        images = load_folder(
            args.images, Path(data.data_dir), data.image_size, data.channels)[:args.num_samples]
        written = read_record(args.images)
        made_by = json.dumps(written) if written else "of unknown origin"
        origin = f"{args.images}, {made_by}"
    else:
        count = args.num_samples or 50_000
        with sampler.running(count, sampler.steps):  # not around Inception, which is fp32
            images = sampler.images(count).numpy()
        origin = f"{sampler.describe()}, seed {sampler.seed}, {sampler.precision}"
    if min(len(images), len(reference)) < 2:
        raise UserError(f"FID needs two images or more: here are {len(images)}, and "
                        f"{len(reference)} to compare with")
    return {
        "reference": describe(data, "train"),
        "num_reference": len(reference),
        "num_samples": len(images),
        "sampler": origin,
        "fid": inception.distance(images, reference, sampler.batch_size, sampler.device),
    }


def describe(data: Config, split: str) -> str:
    has_splits = data.data in (*DOWNLOADS, "shapes")
    return f"{data.data}, {split} set" if has_splits else f"{data.data}, the whole folder"


# The command line

METRICS = {"bpd": bpd, "fid": fid}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    usage = "python evaluate.py --metric bpd|fid [--checkpoint FILE] [--FLAG X ...]"
    parser = CommandLine(__doc__, usage)
    add, add_number = parser.add_argument, parser.add_number
    add("--metric", choices=METRICS, required=True,
        help="bpd: bits per dimension, fid: Frechet distance")
    add("--data", metavar="NAME",
        help="a data set or a folder (default: what the checkpoint was trained on)")
    add("--data_dir", metavar="DIR", help="where downloads are kept (default: as in training)")
    add_number("--num_images", int, "bpd: N images, spread evenly (default: all)", least=1)
    add_number("--timesteps_per_image", int,
               "bpd: estimate the rate from K (default: all of them)", least=1, metavar="K")
    add_number("--num_samples", int,
               "fid: images to make (default: 50000), or to take of --images", least=2)
    add("--images", metavar="DIR", type=Path, help="fid: of these images, instead of making some")
    add("--inception_weights", metavar="FILE",
        help="fid: default: torch-fidelity downloads them")
    add("--json", metavar="FILE", type=Path, help="write what is printed here too")
    add_sampler_flags(parser)
    args = parser.parse_args(argv)

    if args.metric == "bpd":
        parser.refuse_without_effect(args, "with --metric bpd", "num_samples", "images",
                                     "inception_weights", "steps", "eta", "order", "spacing")
    else:
        parser.refuse_without_effect(args, "with --metric fid", "num_images", "timesteps_per_image")
    if args.images:
        parser.refuse_without_effect(args, "with --images", "steps", "eta", "order", "spacing",
                                     "variance")
    return args


@script
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if under_torchrun():
        raise UserError("evaluate.py runs in one process: without torchrun, RANK and WORLD_SIZE")
    if args.json:
        make_writable(args.json)
    sampler = Sampler(args)
    given = {"data": args.data, "data_dir": args.data_dir}
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        data = replace(sampler.config, **changes)
    except ValueError as error:
        raise UserError(str(error)) from error
    result = METRICS[args.metric](sampler, data, args)
    fields = {"metric": args.metric}
    if not args.images:  # which say themselves what they were sampled by
        fields.update(checkpoint=str(sampler.path), step=sampler.training_steps)
    for name, value in result.items():
        fields[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    for name, value in fields.items():
        print(f"{name:<20} {value!s:<12} {REMARKS.get(name, '')}".rstrip())
    if args.json:
        write_json(args.json, fields)
    return 0


if __name__ == "__main__":
    run_script(main)
