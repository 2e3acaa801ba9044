"""Changes one image, in numpy: each augmentation is a small pure function.

An image is [H, W, C], uint8 in 0..255 or float32; results keep the dtype unless said otherwise.
`rng` is the only source of chance, so equal generators give equal images.
"""

import math

import numpy as np
from PIL import Image

Rng = np.random.Generator
_ASPECT_RATIOS = (3 / 4, 4 / 3)


def random_flip(image: np.ndarray, rng: Rng) -> np.ndarray:
    """Mirrors left and right with probability one half."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def random_crop(image: np.ndarray, rng: Rng, padding: int) -> np.ndarray:
    """Shifts by up to `padding` pixels each way, with zeros moving in; same shape [H, W, C]."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    top, left = _below(rng, 2 * padding + 1), _below(rng, 2 * padding + 1)
    return padded[top : top + height, left : left + width]


def random_resized_crop(
    image: np.ndarray, rng: Rng, size: int, area: tuple[float, float]
) -> np.ndarray:
    """Cuts out a random box and scales it to [size, size, C] (Szegedy et al., 2015).

    The box covers a share of the image uniform in `area` (0 < lo <= hi <= 1), with an aspect
    ratio log-uniform in 3/4..4/3. Where ten draws do not fit, the whole image is fitted instead.
    """
    height, width, _ = image.shape
    log_lo, log_hi = math.log(_ASPECT_RATIOS[0]), math.log(_ASPECT_RATIOS[1])
    for _ in range(10):
        pixels = (area[0] + (area[1] - area[0]) * rng.random()) * height * width
        ratio = math.exp(log_lo + (log_hi - log_lo) * rng.random())
        box_h, box_w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < box_h <= height and 0 < box_w <= width:
            top, left = _below(rng, height - box_h + 1), _below(rng, width - box_w + 1)
            return resize(image[top : top + box_h, left : left + box_w], size, size)
    return fit(image, size)


def cutout(image: np.ndarray, rng: Rng, side: int) -> np.ndarray:
    """Blackens a square of `side` pixels around a random pixel (DeVries and Taylor, 2017).

    The square may reach over the border, so less than side^2 pixels may be lost.
    """
    height, width, _ = image.shape
    top, left = _below(rng, height) - side // 2, _below(rng, width) - side // 2
    image = image.copy()
    image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    return image


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales to [height, width, C], bilinear and antialiased."""
    if image.shape[:2] == (height, width):
        return image
    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return _pil_resize(image, height, width)
    # Channel by channel: PIL would weigh the colours of four channels by the last one.
    planes = [_pil_resize(image[..., c], height, width) for c in range(image.shape[-1])]
    return np.stack(planes, axis=-1)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the largest square out of the middle and scales it to [size, size, C], without chance.

    In this order: scaled first, an image of 1 x 2000 would grow to `size` times 2000 `size` pixels.
    """
    height, width, _ = image.shape
    if height == width == size:
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top : top + side, left : left + side], size, size)


def to_float(image: np.ndarray) -> np.ndarray:
    """Maps uint8 in 0..255, of any shape, to float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def mixup(image: np.ndarray, partner: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    """Returns weight * image + (1 - weight) * partner (Zhang et al., 2018), as float32.

    Args:
        image, partner: float32, of one shape.
        weight: in [0, 1], broadcast against them.
    """
    weight = np.asarray(weight, np.float32)
    return weight * image + (np.float32(1) - weight) * partner


def _below(rng: Rng, stop: int) -> int:
    """Returns an integer uniform in 0..stop-1."""
    # Four times faster than rng.integers; the bias, stop / 2^53, is nothing for a pixel count.
    return int(rng.random() * stop)


def _pil_resize(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales [H, W] (uint8 or float32) or [H, W, 3] (uint8) by PIL."""
    scaled = Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(scaled, plane.dtype)
