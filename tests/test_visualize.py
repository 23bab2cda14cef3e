import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastmrcnn.data import Shapes
from fastmrcnn.ops import encode_bool
from fastmrcnn.polygons import rle_to_polygons
from fastmrcnn.visualize import _palette, comparison, draw, grid, side_by_side


def square(x1, y1, x2, y2, *, size=(600, 600), score=0.9):
    """One detection that fills its box, on a gray image."""
    mask = torch.zeros(1, 1, *size)
    mask[0, 0, y1:y2, x1:x2] = 0.8
    return torch.full((3, *size), 0.5), {
        "boxes": torch.tensor([[x1, y1, x2, y2]]).float(),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([score]),
        "masks": mask,
    }


def changed(picture, gray=128):
    """Where [H, W] a picture differs from the gray image."""
    return (np.asarray(picture) != gray).any(2)


def test_fill_contour_box_and_label_lie_where_they_belong():
    image, result = square(200, 300, 400, 500)
    picture = draw(image, result, class_names=["thing"])
    assert picture.size == (600, 600)
    assert picture.mode == "RGB"
    where = changed(picture)
    colour = np.array(_palette(1)[0])
    middle = np.asarray(picture)[400, 300]
    np.testing.assert_allclose(middle, 128 * 0.58 + colour * 0.42, atol=1)
    assert np.abs(np.asarray(picture)[400, 201].astype(int) - colour).max() < 20  # the contour, almost opaque
    assert where[300:500, 200:400].all()
    assert not where[510:].any()
    assert not where[:, :195].any()
    assert where[270:299, 200:260].any()  # the label, above the box


@pytest.mark.parametrize("box", [(0, 0, 40, 40), (560, 0, 600, 30), (570, 570, 600, 600), (0, 300, 600, 600)])
def test_labels_stay_inside_the_picture(box):
    image, result = square(*box)
    del result["masks"]
    picture = draw(image, result, class_names=["a rather wide label"])
    rows, columns = np.nonzero((np.asarray(picture) == np.array(_palette(1)[0])).all(2))
    # The box lines alone are at most 40 wide or tall, but where the box is: the plate is whole only if it was moved in.
    plate = np.asarray(picture)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    text = (plate < 60).all(2) | (plate > 230).all(2)
    image, result = square(200, 300, 400, 500)
    del result["masks"]
    free = np.asarray(draw(image, result, class_names=["a rather wide label"]))
    assert text.sum() == ((free < 60).all(2) | (free > 230).all(2)).sum() > 100


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16])
def test_hard_and_half_precision_masks_are_drawn_like_soft_ones(dtype):
    image, result = square(20, 30, 60, 80, size=(96, 80))
    result["masks"] = (result["masks"] > 0).float()
    other = {**result, "masks": result["masks"][:, 0].to(dtype)}
    assert draw(image, result).tobytes() == draw(image, other).tobytes()


def test_coco_segmentations_are_drawn_like_the_masks_they_are_of():
    image, result = square(20, 30, 60, 80, size=(96, 80))
    result = {name: torch.cat([value, value]) for name, value in result.items()}
    result["masks"][0] = 0
    result["masks"] = (result["masks"] > 0).float()
    expected = draw(image, result).tobytes()
    rles = encode_bool(result["masks"][:, 0]).rles
    for segmentations in (rles, rle_to_polygons(rles)):
        assert draw(image, {**result, "masks": segmentations}).tobytes() == expected
    assert draw(image, {**result, "masks": rles[::-1]}).tobytes() != expected
    with pytest.raises(ValueError, match="masks must be 2 RLEs"):
        draw(image, {**result, "masks": rles[:1]})
    with pytest.raises(ValueError, match=r"masks\[1\] RLE size"):
        draw(image, {**result, "masks": [rles[0], {"size": [5, 5], "counts": [25]}]})


def test_a_mask_cut_by_the_border_fills_it():
    image, result = square(0, 0, 80, 96, size=(96, 80))
    assert changed(draw(image, result)).all()
    assert changed(draw(image, result, max_side=250)).all()  # not a whole factor


def test_scores_below_the_threshold_are_left_out():
    image, result = square(200, 300, 400, 500, score=0.4)
    assert not changed(draw(image, result)).any()
    assert changed(draw(image, result, score_threshold=0.4)).any()
    del result["scores"]  # a target
    assert changed(draw(image, result)).any()


def test_mask_threshold():
    image, result = square(200, 300, 400, 500)
    assert not changed(draw(image, result, mask_threshold=0.9))[350:450, 250:350].any()


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_shrunk_on_request():
    image, result = square(20, 30, 60, 80, size=(96, 80))
    assert draw(image, result).size == (480, 576)
    assert draw(image, result, upscale=1).size == (80, 96)
    assert draw(image, result, max_side=48).size == (40, 48)
    where = changed(draw(image, result, class_names=["thing"]))
    assert where[30 * 6 + 12 : 80 * 6 - 12, 20 * 6 + 12 : 60 * 6 - 12].all()
    assert not where[80 * 6 + 6 :].any()


def test_line_width_and_text_grow_with_the_picture():
    counts = []
    for factor in (1, 4):
        size = (600 * factor, 600 * factor)
        image, result = square(*(factor * v for v in (200, 300, 400, 500)), size=size)
        del result["masks"]
        counts.append(changed(draw(image, result)).mean())
    assert counts[1] == pytest.approx(counts[0], rel=0.5)


def test_small_instances_are_drawn_over_large_ones():
    image, result = square(200, 300, 400, 500)
    _, inner = square(250, 380, 290, 420)
    both = {name: torch.cat([inner[name], result[name]]) for name in result}
    flipped = {name: value.flip(0) for name, value in both.items()}
    colours = _palette(2)
    for order, index in ((both, 0), (flipped, 1)):
        pixel = np.asarray(draw(image, order))[400, 270]
        np.testing.assert_allclose(pixel, 128 * 0.58 + np.array(colours[index]) * 0.42, atol=1)


def test_keypoints_and_skeleton():
    image, result = square(200, 200, 400, 400)
    del result["masks"]
    result["keypoints"] = torch.tensor([[[250.0, 250.0, 1.0], [350.0, 350.0, 1.0], [250.0, 350.0, 0.0]]])
    dots = changed(draw(image, result))
    assert dots[250, 250]
    assert dots[350, 350]
    assert not dots[350, 250]
    assert not dots[300, 300]
    assert changed(draw(image, result, skeleton=[(0, 1), (1, 2)]))[300, 300]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_inputs_are_left_alone_and_pictures_repeat(dtype):
    image, result = square(200, 300, 400, 500)
    image = (image * 255).to(dtype) if dtype == torch.uint8 else image
    before = {name: value.clone() for name, value in result.items()}
    image_before = image.clone()
    first, second = draw(image, result), draw(image, result)
    assert first.tobytes() == second.tobytes()
    assert torch.equal(image, image_before)
    assert all(torch.equal(result[name], before[name]) for name in before)


def test_gray_images_targets_and_nothing_to_draw():
    image, target = Shapes(length=1, image_size=(64, 96), seed=0)[0]
    assert draw(image[:1], target).size == (576, 384)
    nothing = {name: value[:0] for name, value in target.items() if torch.is_tensor(value)}
    np.testing.assert_array_equal(
        np.asarray(draw(image, nothing, upscale=1)), (image * 255).round().byte().permute(1, 2, 0).numpy()
    )


def test_boxes_outside_the_image_or_inverted_do_no_harm():
    image, result = square(200, 300, 400, 500)
    del result["masks"]
    for box in ([-50, -50, -10, -10], [700, 700, 800, 800], [400, 400, 300, 300], [-1e6, -1e6, 1e6, 1e6]):
        result["boxes"] = torch.tensor([box]).float()
        assert draw(image, result).size == (600, 600)


def test_a_crowd_is_quick():
    random = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 600, (200, 2), generator=random)
    boxes = torch.cat([corners, corners + torch.randint(10, 40, (200, 2), generator=random)], 1)
    masks = torch.zeros(200, 1, 640, 640)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[0, y1:y2, x1:x2] = 1
    result = {"boxes": boxes.float(), "labels": torch.ones(200, dtype=torch.int64), "masks": masks}
    start = time.process_time()
    draw(torch.rand(3, 640, 640, generator=random), result, class_names=["thing"])
    assert time.process_time() - start < 3  # a few tenths of a second; the rest is for a busy machine


def test_wrong_shapes_are_refused():
    image, result = square(200, 300, 400, 500)
    with pytest.raises(ValueError, match=r"image must be \[3, H, W\]"):
        draw(image[None], result)
    with pytest.raises(ValueError, match=r"masks must be \[1, 1, 600, 600\]"):
        draw(image, {**result, "masks": result["masks"][..., :5]})


def test_grid_and_side_by_side():
    red, blue = Image.new("RGB", (100, 50), (255, 0, 0)), Image.new("RGB", (60, 80), (0, 0, 255))
    for sheet in (side_by_side(red, blue), grid([[red, blue]]), grid([[red], [blue]])):
        pixels = np.asarray(sheet)
        assert (pixels == (255, 0, 0)).all(2).sum() == 5000
        assert (pixels == (0, 0, 255)).all(2).sum() == 4800
    titled = side_by_side(red, blue, ("left", "right"))
    assert titled.height > side_by_side(red, blue).height
    assert (np.asarray(titled)[:15] < 100).all(2).any()
    with pytest.raises(ValueError, match="at least one picture"):
        grid([])


def test_comparison():
    dataset = Shapes(length=2, image_size=(64, 64), seed=0)
    images, targets = zip(*(dataset[i] for i in range(2)), strict=True)
    sheet = comparison(images, targets, targets, dataset.class_names)
    assert sheet.width > 2 * 512
    assert sheet.height > 2 * 512
