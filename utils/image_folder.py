"""A folder of numbered PNGs that is filled up: those not there yet are drawn, by any process.

    folder = ImageFolder(path, sampler.origin(), count)
    for indices, images in sampler.batches(folder.missing()):
        folder.save(indices, images)

What its images are made by stands in sampled_with.json beside them, and no others are added.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from utils.cli import UserError
from utils.files import locked, remove_left_overs, write_json
from utils.pictures import save_png
from utils.process import from_first_process, share_of_this_process

RECORD = "sampled_with.json"


class ImageFolder:
    """The PNGs 0 .. count - 1 in a folder, all made by one origin."""

    def __init__(self, folder: Path, origin: dict[str, Any], count: int) -> None:
        """Claim the folder for them.

        Raises UserError if the folder is in use for others, before anything in it is touched.
        """
        self.folder, self.count = folder, count
        folder.mkdir(parents=True, exist_ok=True)  # on each process's machine
        from_first_process(lambda: self.claim(origin))

    def claim(self, origin: dict[str, Any]) -> None:
        """Write origin down in the folder, or find the same written there."""
        with locked(self.folder):
            written = read_record(self.folder)
            pictures = list(self.folder.glob("*.png"))
            if written == {} and pictures:
                raise UserError(f"{self.folder} holds {len(pictures)} pictures that were not "
                                f"sampled here, such as {min(pictures).name}: choose another "
                                "folder")
            if written not in ({}, origin):
                raise UserError(f"{self.folder} holds images sampled with {json.dumps(written)}, "
                                f"not {json.dumps(origin)}: choose another folder")
            numbers = [int(path.stem) for path in pictures if re.fullmatch(r"\d{6,}", path.stem)]
            beyond = [number for number in numbers if number >= self.count]
            if beyond:
                raise UserError(f"{self.folder} holds {len(beyond)} images beyond num_samples="
                                f"{self.count}, such as {self.path(min(beyond)).name}: choose "
                                "another folder")
            remove_left_overs(self.folder, r"\d{6,}\.png|sampled_with\.json", seconds=3600)
            if written == {}:
                write_json(self.folder / RECORD, origin)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06}.png"

    def missing(self) -> list[int]:
        """Which images are not there yet, of this process's share."""
        share = share_of_this_process(range(self.count))
        return [index for index in share if not is_whole(self.path(index))]

    def save(self, indices: Sequence[int], images: Tensor) -> None:
        """Save the images uint8 [B, C, H, W] under their numbers."""
        for index, image in zip(indices, images.permute(0, 2, 3, 1).numpy(), strict=True):
            is_grey = image.shape[-1] == 1
            pixels = image[:, :, 0] if is_grey else image
            save_png(Image.fromarray(pixels), self.path(index))


def is_whole(path: Path) -> bool:
    """Whether it is a PNG to its end: what is not is drawn again."""
    return path.is_file() and path.read_bytes().endswith(b"IEND\xaeB`\x82")


def read_record(folder: Path) -> dict[str, Any]:
    """What the images in the folder were sampled with; {} if that is not written there."""
    record = folder / RECORD
    if not record.is_file():
        return {}
    try:
        return json.loads(record.read_text())
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested without end
        raise UserError(f"{record} is damaged: choose another folder") from error
