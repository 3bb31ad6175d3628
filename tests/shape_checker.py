"""Is a picture one circle, square or triangle of one colour on a flat ground?  Knows nothing of any network.

    python inference.py --run_dir runs/demo --num_samples 256 --npz outputs/samples.npz
    python tests/shape_checker.py outputs/samples.npz      the share that passes
"""

import sys

import numpy as np

SUBPIXELS = 8


def find_shape(image: np.ndarray) -> str | None:
    """uint8 [3, S, S] -> circle, square, triangle, or None.

    Every pixel must lie between two colours; how much of the second it holds (its coverage) must be that of
    an ideal shape with the centre and the area found.
    """
    pixels = image.reshape(3, -1).T.astype(float)                                # [S S, 3]
    ground = np.median(pixels, axis=0)  # no shape covers half of a picture
    distance = np.linalg.norm(pixels - ground, axis=1)
    if distance.max() < 80:
        return None  # blank
    axis = np.median(pixels[distance > 0.8 * distance.max()], axis=0) - ground
    coverage = (pixels - ground) @ axis / (axis @ axis)
    off_axis = np.linalg.norm(pixels - ground - coverage[:, None] * axis, axis=1)
    if off_axis.max() > 60 or off_axis.mean() > 12:
        return None  # a third colour
    size = image.shape[-1]
    coverage = coverage.clip(0, 1).reshape(size, size)
    area = coverage.sum()
    rows, columns = np.mgrid[:size, :size] + 0.5
    centre = (coverage * rows).sum() / area, (coverage * columns).sum() / area
    errors = {kind: np.abs(coverage - ideal) for kind in ("circle", "square", "triangle")
              for ideal in [ideal_coverage(kind, size, centre, area)]}
    best = min(errors, key=lambda kind: errors[kind].sum())
    return best if errors[best].sum() < 0.15 * area and errors[best].max() < 0.6 else None


def ideal_coverage(kind: str, size: int, centre: tuple[float, float], area: float) -> np.ndarray:
    """How much of each pixel [S, S] a shape of this centre (y, x) and area, in pixels, covers: 0 to 1."""
    y, x = (np.mgrid[:size * SUBPIXELS, :size * SUBPIXELS] + 0.5) / SUBPIXELS
    y, x = y - centre[0], x - centre[1]
    if kind == "circle":
        inside = x**2 + y**2 < area / np.pi
    elif kind == "square":
        inside = np.maximum(np.abs(x), np.abs(y)) < np.sqrt(area) / 2
    else:
        radius = np.sqrt(area * 4 / (3 * np.sqrt(3)))  # of the circle through the corners, one of them on top
        inside = (y < radius / 2) & (np.abs(x) * np.sqrt(3) < y + radius)
    return inside.reshape(size, SUBPIXELS, size, SUBPIXELS).mean(axis=(1, 3))


def share_of_shapes(images: np.ndarray) -> float:
    """The share of images uint8 [N, 3, S, S] that show a shape."""
    return sum(find_shape(image) is not None for image in images) / len(images)


if __name__ == "__main__":
    images = np.load(sys.argv[1])["arr_0"]
    print(f"{share_of_shapes(images.transpose(0, 3, 1, 2)):.1%} of {len(images)} images show a shape")
