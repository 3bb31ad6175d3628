"""Inception's features and the Frechet distance between them, as torch-fidelity computes both."""

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError, brief


class Inception:
    """torch-fidelity's Inception."""

    def __init__(self, weights: str | None) -> None:
        """Check that all of it is there.  weights: a file; if None, torch-fidelity downloads them.

        Raises UserError if anything is missing.
        """
        try:
            import torch_fidelity
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ImportError as error:
            raise UserError("--metric fid needs torch-fidelity: pip install torch-fidelity"
                            ) from error
        self.torch_fidelity, self.weights = torch_fidelity, weights
        try:
            if weights:  # torch-fidelity itself would run code that is in the file
                torch.load(weights, map_location="cpu", weights_only=True)
            inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
        except Exception as error:  # a download or a damaged file may raise anything
            problem = "they could not be downloaded"
            if weights:
                problem = f"{weights} does not hold them"
            raise UserError(
                f"--metric fid needs the weights of Inception, and {problem} ({brief(error)}): get "
                f"{inception.URL_INCEPTION_V3} and name it with --inception_weights FILE"
                ) from error

    def distance(
        self, images: np.ndarray, reference: np.ndarray, batch_size: int, device: torch.device
    ) -> float:
        """The Frechet distance between two sets of images, uint8 [N, C, H, W] each."""
        metrics = self.torch_fidelity.calculate_metrics(
            input1=ThreeChannels(images),
            input2=ThreeChannels(reference),
            fid=True,
            cuda=device.type == "cuda",
            batch_size=batch_size,
            feature_extractor_weights_path=self.weights,
            save_cpu_ram=True,  # no worker processes: indexing an array does not need them
            verbose=False,
        )
        return metrics["frechet_inception_distance"]


class ThreeChannels(torch.utils.data.Dataset):
    """uint8 images [N, C, H, W] as torch-fidelity takes them."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(self.images[i]).expand(3, -1, -1)
