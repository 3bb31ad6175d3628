"""Is a picture one circle, square or triangle of one colour on a flat ground?

    python inference.py --run_dir runs/demo --num_samples 256 --npz outputs/samples.npz
    python -m tools.shape_checker outputs/samples.npz       the share that passes

It knows nothing of any network.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also without -m

from utils.cli import CommandLine, UserError
from utils.process import run_script

SHAPES = ("circle", "square", "triangle")
SUBPIXELS = 8


def find_shape(image: np.ndarray) -> str | None:
    """uint8 [3, S, S] -> circle, square, triangle, or None.

    Every pixel must lie between two colours.  How much of the second it holds, its coverage, must
    be that of an ideal shape with the centre and the area found.
    """
    pixels = image.reshape(3, -1).T.astype(float)                   # [S S, 3]
    ground = np.median(pixels, axis=0)  # no shape covers half of a picture
    distance = np.linalg.norm(pixels - ground, axis=1)
    if distance.max() < 80:
        return None  # blank
    colour = np.median(pixels[distance > 0.8 * distance.max()], axis=0)
    axis = colour - ground
    coverage = (pixels - ground) @ axis / (axis @ axis)
    between = ground + coverage[:, None] * axis
    off_axis = np.linalg.norm(pixels - between, axis=1)
    if off_axis.max() > 60 or off_axis.mean() > 12:
        return None  # a third colour

    size = image.shape[-1]
    coverage = coverage.clip(0, 1).reshape(size, size)
    area = coverage.sum()
    rows, columns = np.mgrid[:size, :size] + 0.5
    centre = ((coverage * rows).sum() / area, (coverage * columns).sum() / area)
    errors = {}
    for shape in SHAPES:
        errors[shape] = np.abs(coverage - ideal_coverage(shape, size, centre, area))
    best = min(SHAPES, key=lambda shape: errors[shape].sum())
    is_close = errors[best].sum() < 0.15 * area and errors[best].max() < 0.6
    return best if is_close else None


def ideal_coverage(
    shape: str, size: int, centre: tuple[float, float], area: float
) -> np.ndarray:
    """How much of each pixel [S, S] a shape of this centre (y, x) and area covers, 0 to 1."""
    y, x = (np.mgrid[:size * SUBPIXELS, :size * SUBPIXELS] + 0.5) / SUBPIXELS
    y = y - centre[0]
    x = x - centre[1]
    if shape == "circle":
        inside = x**2 + y**2 < area / np.pi
    elif shape == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) < np.sqrt(area) / 2
    else:
        # Of the circle through the corners, one of which is on top.
        radius = np.sqrt(area * 4 / (3 * np.sqrt(3)))
        inside = (y < radius / 2) & (np.abs(x) * np.sqrt(3) < y + radius)
    return inside.reshape(size, SUBPIXELS, size, SUBPIXELS).mean(axis=(1, 3))


def share_of_shapes(images: np.ndarray) -> float:
    """The share of images uint8 [N, 3, S, S] that show a shape."""
    found = [find_shape(image) is not None for image in images]
    return sum(found) / len(found)


def main(argv: list[str] | None = None) -> int:
    parser = CommandLine(__doc__, "python -m tools.shape_checker FILE")
    parser.add_argument("file", type=Path, help="what inference.py --npz wrote")
    args = parser.parse_args(argv)
    try:
        images = np.load(args.file)["arr_0"].transpose(0, 3, 1, 2)
        share = share_of_shapes(images)
    except Exception as error:  # of what another file may raise there is no list
        raise UserError(f"{args.file} holds no colour images of --npz: {error}") from error
    print(f"{share:.1%} of {len(images)} images show a shape")
    return 0


if __name__ == "__main__":
    run_script(main)
