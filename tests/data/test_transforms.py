"""Augmentation of images as bytes and as floats, one after the other."""

import pytest
import torch
from torchvision.transforms import v2

from fastmrcnn.data import HorizontalFlip, PhotometricDistort, left_right_pairs

IMAGE = torch.randint(256, (3, 20, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
TARGET = {"boxes": torch.tensor([[1.0, 2, 11, 12]]), "masks": torch.ones(1, 20, 30, dtype=torch.uint8)}


@pytest.mark.parametrize("interleaved", [False, True])
def test_flip_of_bytes(interleaved):
    image = IMAGE.permute(1, 2, 0).contiguous().permute(2, 0, 1) if interleaved else IMAGE
    flipped, target = HorizontalFlip(1.0)(image, TARGET)
    assert flipped.dtype == torch.uint8
    assert torch.equal(flipped, IMAGE.flip(-1))
    assert target["boxes"].tolist() == [[19, 2, 29, 12]]


def test_flip_follows_torchs_seed():
    flip, image = HorizontalFlip(0.5), torch.arange(2.0).expand(3, 1, 2)

    def draws():
        torch.manual_seed(3)
        return [flip(image, {"boxes": torch.zeros(0, 4)})[0][0, 0, 0].item() for _ in range(40)]

    assert draws() == draws()
    assert 5 < sum(draws()) < 35


def test_left_right_pairs():
    assert left_right_pairs(["nose", "right_eye", "left_eye", "left_ear", "tail"]) == [(2, 1)]


@pytest.mark.parametrize("image", [IMAGE, IMAGE / 255])
def test_distortion_is_torchvisions_of_the_image_alone(image):
    before = image.clone()
    torch.manual_seed(5)
    distorted, target = PhotometricDistort(1.0)(image, TARGET)
    torch.manual_seed(5)
    assert torch.equal(distorted, v2.RandomPhotometricDistort(p=1.0)(image))
    assert (distorted.dtype, distorted.shape) == (image.dtype, image.shape)
    assert not torch.equal(distorted, image)
    assert torch.equal(image, before)
    assert target is TARGET
    assert torch.equal(PhotometricDistort(0.0)(image, TARGET)[0], image)


def test_distortion_leaves_other_than_three_channels():
    for channels in (1, 4, 7):
        image = torch.ones(channels, 4, 5)
        assert PhotometricDistort(1.0)(image, TARGET)[0] is image
    with pytest.raises(ValueError, match="p must be"):
        PhotometricDistort(-0.1)


def test_one_after_the_other():
    image, target = v2.Compose([HorizontalFlip(1.0), PhotometricDistort(0.0), HorizontalFlip(1.0)])(IMAGE, TARGET)
    assert torch.equal(image, IMAGE)
    assert torch.equal(target["boxes"], TARGET["boxes"])
