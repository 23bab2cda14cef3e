import json

import numpy as np
import pytest
import torch
from pycocotools import mask as rle_codec

from fastmrcnn.coco_records import detections_to_coco


def output_of(count, height=9, width=13, seed=0):
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=random) * torch.tensor([width, height])
    return {
        "boxes": torch.cat([corners.amin(1), corners.amax(1)], 1),
        "labels": torch.arange(count) % 2 + 1,
        "scores": torch.rand(count, generator=random),
        "masks": torch.rand(count, 1, height, width, generator=random),
    }


def test_detections_to_coco():
    output = output_of(5)
    records = detections_to_coco(output, 42, [3, 9])
    assert [r["category_id"] for r in records] == [3, 9, 3, 9, 3]
    assert {r["image_id"] for r in records} == {42}
    for i, record in enumerate(json.loads(json.dumps(records))):
        x, y, w, h = record["bbox"]
        assert torch.allclose(torch.tensor([x, y, x + w, y + h]), output["boxes"][i])
        assert record["score"] == pytest.approx(output["scores"][i].item())
        assert record["segmentation"]["size"] == [9, 13]
        np.testing.assert_array_equal(rle_codec.decode(record["segmentation"]), output["masks"][i, 0].numpy() > 0.5)


def test_detections_to_coco_threshold_half_precision_and_bool():
    output = output_of(3)
    (record, *_) = detections_to_coco(output, 1, [1, 2], mask_threshold=0.8)
    np.testing.assert_array_equal(rle_codec.decode(record["segmentation"]), output["masks"][0, 0].numpy() > 0.8)
    hard = {**output, "masks": output["masks"] > 0.5}
    assert detections_to_coco(hard, 1, [1, 2]) == detections_to_coco(output, 1, [1, 2])


def test_detections_to_coco_without_masks_with_keypoints_and_empty():
    output = output_of(2)
    del output["masks"]
    output["keypoints"] = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    records = detections_to_coco(output, 1, [1, 2])
    assert records[1]["keypoints"] == [float(v) for v in range(12, 24)]
    assert "segmentation" not in records[0]
    assert detections_to_coco(output_of(0), 1, [1]) == []


def test_detections_to_coco_leaves_out_unwanted_and_refuses_unknown_labels():
    assert [r["category_id"] for r in detections_to_coco(output_of(4), 1, [None, 5])] == [5, 5]
    with pytest.raises(ValueError, match=r"image 6.*labels 1 to 2.*1 classes"):
        detections_to_coco(output_of(4), 6, [1])


def test_detections_to_coco_takes_masks_that_are_encoded_already():
    output = output_of(3)
    records = detections_to_coco(output, 1, [1, 2])
    encoded = {**output, "masks": [record["segmentation"] for record in records]}
    assert detections_to_coco(encoded, 1, [1, 2]) == records
    assert [r["segmentation"] for r in detections_to_coco(encoded, 1, [None, 2])] == [records[1]["segmentation"]]
