"""Reads which augmentations a run uses, checks them, and applies them in their order."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from moe.data.images import transforms
from moe.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Augment:
    """Holds the settings of the augmentation; every one is off by default.

    Attributes:
        flip: mirror left and right half of the time.
        crop: shift by up to this many pixels.
        resized_crop: (lo, hi) share of the area that a random box covers, or () for off.
        cutout: side in pixels of a square to blacken, or 0 for off.
        mixup: alpha of the Beta(alpha, alpha) law of the mixing weight, or 0 for off.
    """

    flip: bool = False
    crop: Annotated[int, "[0, 1e4]"] = 0
    resized_crop: Annotated[tuple[float, ...], "(0, 1]"] = ()
    cutout: Annotated[int, "[0, 1e4]"] = 0
    mixup: Annotated[float, "0 or [1e-3, 1e3]"] = 0.0

    def __post_init__(self):
        if isinstance(self.resized_crop, list):
            object.__setattr__(self, "resized_crop", tuple(self.resized_crop))
        _expect("flip", self.flip, isinstance(self.flip, bool), "True or False")
        for key in ("crop", "cutout"):
            value = getattr(self, key)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _expect(key, value, whole and value >= 0, "a number of pixels, 0 for off")
        area = self.resized_crop
        numbers = isinstance(area, tuple) and all(isinstance(x, int | float) for x in area)
        fits = numbers and (not area or (len(area) == 2 and 0 < area[0] <= area[1] <= 1))
        _expect("resized_crop", area, fits, "(lo, hi) with 0 < lo <= hi <= 1, or ()")
        finite = isinstance(self.mixup, int | float) and math.isfinite(self.mixup)
        _expect("mixup", self.mixup, finite and self.mixup >= 0, "alpha >= 0, 0 for off")

    @classmethod
    def from_mapping(cls, settings: "Mapping[str, Any] | Augment") -> "Augment":
        """Reads a dict or ConfigDict; absent keys are off.

        Raises:
            UsageError: an unknown key, or a value out of range.
        """
        if isinstance(settings, cls):
            return settings
        known = [field.name for field in dataclasses.fields(cls)]
        settings = dict(settings)
        if unknown := sorted(set(settings) - set(known)):
            raise UsageError(
                f"unknown augmentation {', '.join(unknown)}: expected some of {', '.join(known)}"
            )
        return cls(**settings)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
        """Brings one image [H, W, C] to [size, size, C] and augments it, all but the mixup."""
        if self.resized_crop:
            image = transforms.random_resized_crop(image, rng, size, self.resized_crop)
        else:
            image = transforms.fit(image, size)
        if self.crop:
            image = transforms.random_crop(image, rng, self.crop)
        if self.flip:
            image = transforms.random_flip(image, rng)
        if self.cutout:
            image = transforms.cutout(image, rng, self.cutout)
        return image


def _expect(key: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"augmentation {key}={value!r}: expected {expected}")
