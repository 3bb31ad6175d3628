"""Digits by request: labels and classifier-free guidance (arXiv 2207.12598) around the same DDPM.

    python examples/guided.py                   MNIST, downloaded into ./data; writes guided.png
    python examples/guided.py --data FOLDER     a folder of pictures in a sub-folder per class

model.py, ddpm.py and ddim.py are unchanged: a label's embedding is added to that of t.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ddim
from config import Config
from data import to_float, to_uint8
from ddpm import DDPM
from model import UNet
from utils.device import autocast, select_device, select_precision
from utils.image_cache import to_square
from utils.pictures import save_png, table

CONFIG = Config(image_size=28, channels=1, dim=48, dim_mults=(1, 2, 2), num_res_blocks=1,
                attn_resolutions=(7,), dropout=0.1, batch_size=32, learning_rate=1e-3)
LEFT_OUT = 0.1  # how often training leaves a label out
GUIDANCE = [0, 1, 3]  # in the picture
COLUMNS = 5  # pictures of a digit at each guidance


class EmbeddingOfBoth(nn.Module):
    """It takes the place of a UNet's time embedding, and adds that of the labels it was given."""

    def __init__(self, time_embedding: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.time_embedding = time_embedding
        # One more class: no label.  PyTorch's normal numbers to start with tell the classes apart;
        # from zeros next to nothing is learned in as many steps.
        self.label_embedding = nn.Embedding(classes + 1, width)
        self.labels = torch.empty(0)  # [B], of the images at hand

    def forward(self, t: Tensor) -> Tensor:
        return self.time_embedding(t) + self.label_embedding(self.labels)


class Guided(nn.Module):
    """eps_theta(x_t, t) for labels, with guidance: what a DDPM takes for its network.

    It is a module, so that a chain switches the dropout of the network off.
    """

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        self.unet = UNet(config)
        self.embedding = EmbeddingOfBoth(self.unet.time_embedding, 4 * config.dim, classes)
        self.unet.time_embedding = self.embedding
        self.no_label = classes
        self.labels = torch.empty(0)
        self.guidance = 1.0

    def predict(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.embedding.labels = labels
        return self.unet(x_t, t)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        with_label = self.predict(x_t, t, self.labels)
        if self.guidance == 1:
            return with_label
        without = self.predict(x_t, t, torch.full_like(self.labels, self.no_label))
        return without + self.guidance * (with_label - without)


def load(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 28, 28] and their labels int64 [N]."""
    from torchvision import datasets

    dataset = datasets.ImageFolder(folder) if folder else datasets.MNIST("data", download=True)
    pairs = [(to_square(image, CONFIG.image_size, CONFIG.channels), label)
             for image, label in dataset]
    images, labels = zip(*pairs, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def train(
    config: Config, images: Tensor, labels: Tensor, steps: int, device: torch.device, precision: str
) -> Guided:
    """Algorithm 1 with labels, one in ten of them left out, and a rate that falls to 0."""
    model = Guided(config, classes=int(labels.max()) + 1).to(device)
    ddpm = DDPM(model, config).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    for step in trange(steps, desc="training", unit="step"):
        batch = torch.randint(len(images), (config.batch_size,))
        is_left_out = torch.rand(config.batch_size) < LEFT_OUT
        model.labels = labels[batch].masked_fill(is_left_out, model.no_label).to(device)
        x_start = to_float(images[batch].to(device))
        with autocast(device, precision):
            loss = ddpm.training_loss(x_start)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / steps)
        optimizer.step()
    return model


def sample(
    model: Guided, config: Config, labels: Tensor, guidance: float, precision: str, steps: int = 20
) -> Tensor:
    """An image for each label [B], uint8 [B, C, H, W]; guidance 0 disregards the labels."""
    device = model.embedding.label_embedding.weight.device
    model.labels, model.guidance = labels.to(device), guidance
    x_T = torch.randn(len(labels), config.channels, config.image_size, config.image_size)
    with torch.no_grad(), autocast(device, precision):
        return to_uint8(ddim.sample(DDPM(model, config).to(device), x_T.to(device), steps))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with a sub-folder per class")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--output", type=Path, default=Path("guided.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = select_device("auto")
    precision = select_precision("auto", device)
    images, labels = load(args.data)
    model = train(CONFIG, images, labels, args.steps, device, precision)
    digits = torch.arange(model.no_label).repeat_interleave(COLUMNS)
    rows = []
    for guidance in GUIDANCE:
        pictures = sample(model, CONFIG, digits, guidance, precision)
        rows.append(pictures.unflatten(0, (-1, COLUMNS)))  # a row per digit
    titles = [f"guidance {guidance}" if i == 0 else "" for guidance in GUIDANCE
              for i in range(COLUMNS)]
    save_png(table(torch.cat(rows, dim=1), titles), args.output)
    print(args.output)


if __name__ == "__main__":
    main()
