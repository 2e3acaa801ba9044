"""Each transform against a direct computation, and its chances against their law."""

import numpy as np
import pytest

from moe.data.images import transforms


def _rng(seed=0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _image(height=6, width=5, channels=3, dtype=np.uint8) -> np.ndarray:
    return _rng(height * width).integers(1, 256, (height, width, channels)).astype(dtype)


RANDOM = {
    "flip": transforms.random_flip,
    "crop": lambda image, rng: transforms.random_crop(image, rng, 2),
    "resized_crop": lambda image, rng: transforms.random_resized_crop(image, rng, 6, (0.2, 1.0)),
    "cutout": lambda image, rng: transforms.cutout(image, rng, 3),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pure_and_seeded(name, dtype, channels):
    image = _image(6, 6, channels, dtype)
    before = image.copy()
    image.flags.writeable = False
    first, again = RANDOM[name](image, _rng(1)), RANDOM[name](image, _rng(1))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)
    assert (first.shape, first.dtype) == (image.shape, image.dtype)
    others = [RANDOM[name](image, _rng(seed)) for seed in range(2, 12)]
    assert any((other != first).any() for other in others)


def test_flip_half_of_the_time():
    image = _image()
    rng = _rng()
    flips = [(transforms.random_flip(image, rng) != image).any() for _ in range(400)]
    assert 160 < sum(flips) < 240  # four standard deviations
    assert any((transforms.random_flip(image, rng) == image[:, ::-1]).all() for _ in range(20))


def test_crop_takes_every_shift_of_the_padded_image():
    image = _image(3, 3, 1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {padded[y : y + 3, x : x + 3].tobytes() for y in range(3) for x in range(3)}
    rng = _rng()
    assert {transforms.random_crop(image, rng, 1).tobytes() for _ in range(200)} == windows


def test_cutout_blackens_a_square():
    image = _image(9, 9, 1)
    rng = _rng()
    lost = [int((transforms.cutout(image, rng, 3) == 0).sum()) for _ in range(300)]
    assert max(lost) == 9  # a whole square
    assert min(lost) == 4  # in a corner
    black = transforms.cutout(image, _rng(), 100)
    assert not black.any()


def test_resized_crop_of_a_flat_image_is_flat():
    flat = np.full((7, 11, 3), 93, np.uint8)
    for seed in range(30):
        out = transforms.random_resized_crop(flat, _rng(seed), 4, (0.1, 1.0))
        np.testing.assert_array_equal(out, np.full((4, 4, 3), 93, np.uint8))


def test_resized_crop_area_is_in_its_range():
    # On a ramp from 0 to 200 the range of values tells the width of the box.
    ramp = np.tile(np.arange(201, dtype=np.float32)[None, :, None], (201, 1, 1))
    for seed in range(50):
        out = transforms.random_resized_crop(ramp, _rng(seed), 201, (0.25, 0.25))
        width = out.max() - out.min()
        assert 100 * np.sqrt(3 / 4) - 3 < width < 100 * np.sqrt(4 / 3) + 3


def test_resized_crop_falls_back_on_the_whole_image():
    thin = _image(100, 2, 1)
    out = transforms.random_resized_crop(thin, _rng(), 4, (1.0, 1.0))
    np.testing.assert_array_equal(out, transforms.fit(thin, 4))


def test_resize_averages_when_it_shrinks():
    image = _image(4, 4, 1, np.float32)
    assert transforms.resize(image, 1, 1).shape == (1, 1, 1)
    checkers = np.tile(np.array([[0, 200], [200, 0]], np.uint8), (8, 8))[..., None]
    np.testing.assert_allclose(transforms.resize(checkers, 4, 4)[1:3, 1:3], 100, atol=1)


def test_fit():
    image = _image(8, 8)
    assert transforms.fit(image, 8) is image
    wide = np.zeros((4, 12, 1), np.uint8)
    wide[:, 4:8] = 255
    np.testing.assert_array_equal(transforms.fit(wide, 4), np.full((4, 4, 1), 255))
    for height, width in [(5, 9), (9, 5), (3, 2), (100, 33)]:
        assert transforms.fit(_image(height, width), 7).shape == (7, 7, 3)


def test_fit_does_not_grow_a_thin_image_first():
    """Scaled before it is cut, one of 1 x 2000 would become 224 x 448,000."""
    thin = np.arange(2000).astype(np.uint8)[None, :, None].repeat(3, -1)
    middle = thin[0, 999]
    np.testing.assert_array_equal(transforms.fit(thin, 224), np.full((224, 224, 3), middle))
    tall = thin.swapaxes(0, 1)
    np.testing.assert_array_equal(transforms.fit(tall, 224), np.full((224, 224, 3), middle))


def test_to_float():
    out = transforms.to_float(np.array([0, 255], np.uint8))
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, [-1, 1])


def test_mixup():
    image, partner = np.ones((2, 2, 1), np.float32), np.zeros((2, 2, 1), np.float32)
    out = transforms.mixup(image, partner, 0.25)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, np.full((2, 2, 1), 0.25))
    np.testing.assert_array_equal(transforms.mixup(image, partner, 1.0), image)
