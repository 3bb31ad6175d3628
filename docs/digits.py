"""Are samples digits, and as varied as real ones?  A small classifier of MNIST is asked.

    python inference.py --run_dir runs/mnist --num_samples 1000 --npz outputs/digits.npz --steps 20
    python docs/digits.py outputs/digits.npz                  learns from MNIST, in ./data
    python docs/digits.py outputs/digits.npz --data FOLDER    a sub-folder per digit

For the samples, and for 1,000 real digits that it did not learn from: the share
of which it is more than 90 % sure, and the Frechet distance of its features
from those of the digits that it did learn from.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # this file is run from the project's folder

from data import to_float
from examples.guided import load

HELD_OUT, EPOCHS, BATCH_SIZE = 1000, 4, 64


class Classifier(nn.Module):
    """Digits [B, 1, 28, 28] in [-1, 1] -> their features [B, 128]; last makes scores of them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU())
        self.last = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = F.dropout(self.features(x), 0.3, self.training)
        return self.last(features)


def learn(images: Tensor, labels: Tensor) -> Classifier:
    """Train a classifier on images uint8 [N, 1, 28, 28] and their labels [N]."""
    classifier = Classifier(classes=int(labels.max()) + 1)
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = F.cross_entropy(classifier(to_float(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()


@torch.no_grad()
def features_of(classifier: Classifier, images: Tensor) -> Tensor:
    """The features [N, 128] of images uint8 [N, 1, 28, 28]."""
    parts = [classifier.features(to_float(part)) for part in images.split(500)]
    return torch.cat(parts)


@torch.no_grad()
def share_sure(classifier: Classifier, features: Tensor) -> float:
    """The share of the features [N, 128] for which one digit has more than 90 %."""
    probabilities = classifier.last(features).softmax(dim=1)
    return (probabilities.amax(dim=1) > 0.9).float().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The distance between the normal distributions that fit features a and b, [N, D] each."""
    a, b = a.double(), b.double()
    covariance_a, covariance_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of the root of their product, whose eigenvalues are not negative.
    eigenvalues = torch.linalg.eigvals(covariance_a @ covariance_b).real.clamp(min=0)
    of_means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    of_covariances = covariance_a.trace() + covariance_b.trace() - 2 * eigenvalues.sqrt().sum()
    return (of_means + of_covariances).item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, nargs="+", help="written by inference.py --npz")
    parser.add_argument("--data", type=Path, help="a folder with a sub-folder per digit")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    images, labels = load(args.data)
    held_out, learned = torch.randperm(len(images)).split([HELD_OUT, len(images) - HELD_OUT])
    classifier = learn(images[learned], labels[learned])
    reference = features_of(classifier, images[learned])

    def tell(name: str, images: Tensor) -> None:
        features = features_of(classifier, images)
        print(f"{name}: {share_sure(classifier, features):.1%} sure, distance "
              f"{frechet_distance(features, reference):.1f}")

    with torch.no_grad():
        right = classifier(to_float(images[held_out])).argmax(dim=1) == labels[held_out]
    print(f"{right.float().mean():.1%} of {HELD_OUT} real digits are recognised")
    tell("real digits", images[held_out])
    for path in args.samples:
        (pixels,) = np.load(path).values()  # [N, 28, 28, 1]
        tell(str(path), torch.from_numpy(pixels).permute(0, 3, 1, 2))


if __name__ == "__main__":
    main()
