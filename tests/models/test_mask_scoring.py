"""Mask Scoring R-CNN: what masks are told to be worth, and what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import config, losses, shapes
from torch import Tensor
from torch.nn import functional

import fastmrcnn
from fastmrcnn import ops
from fastmrcnn.batches import PackedMasks, TargetBatch
from fastmrcnn.checkpoints import load_model
from fastmrcnn.cli import build_parser, spelled_out
from fastmrcnn.coco_evaluator import CocoEvaluator
from fastmrcnn.coco_records import detections_to_coco
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.mask_scoring import MaskIoUHead, iou_targets, mask_iou_loss
from fastmrcnn.predictor import Predictor
from fastmrcnn.train import train
from fastmrcnn_kernels.views import whole

SIDE = 64


def targets_of(*masks: Tensor) -> TargetBatch:
    """One image with objects of these masks [64, 64]."""
    stack = torch.stack(masks)
    words, offsets = ops.pack_masks([stack.to(torch.uint8)])
    boxes = []
    for mask in masks:
        y, x = mask.nonzero().unbind(1)
        boxes.append([int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1])
    views = torch.tensor([whole(SIDE, SIDE, SIDE, SIDE)])
    return TargetBatch(
        torch.tensor([boxes]).float(),
        torch.ones(1, len(masks), dtype=torch.int64),
        torch.tensor([len(masks)]),
        PackedMasks(words, offsets, views),
    )


def rectangle(x1: int, y1: int, x2: int, y2: int) -> Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_targets_by_hand() -> None:
    """A box of 28 x 28 pixels has a cell per pixel: intersections and unions can be counted."""
    left, both = rectangle(10, 10, 24, 38), rectangle(10, 10, 38, 38)
    ring = both.clone()
    ring[15:33, 15:33] = False
    targets = targets_of(both, left, ring)
    cases = [
        # box, object, predicted mask in the image, IoU
        ((10, 10, 38, 38), 0, both, 1.0),
        ((10, 10, 38, 38), 0, left, 0.5),
        ((10, 10, 38, 38), 1, both, 0.5),
        ((10, 10, 38, 38), 2, both, (28 * 28 - 18 * 18) / 28**2),
        ((10, 10, 38, 38), 1, rectangle(24, 10, 38, 38), 0.0),
        ((24, 10, 52, 38), 0, rectangle(24, 10, 38, 38), 0.5),  # half of the object lies outside of the box
        ((24, 24, 52, 52), 0, rectangle(24, 24, 38, 38), 0.25),
    ]
    boxes = torch.tensor([[case[0] for case in cases]]).float()
    logits = torch.stack([case[2][case[0][1] : case[0][3], case[0][0] : case[0][2]] for case in cases])[None]
    matched = torch.tensor([[case[1] for case in cases]])
    valid = torch.ones(1, len(cases), dtype=torch.bool)
    found = iou_targets(logits.float() - 0.5, boxes, matched, valid, targets)
    wanted = torch.tensor([[case[3] for case in cases]])
    assert torch.allclose(found, wanted, atol=0.02), found
    valid[0, ::2] = False
    boxes[0, ::2] = torch.nan
    found = iou_targets(logits.float() - 0.5, boxes, matched, valid, targets)
    assert torch.equal(found[0, ::2], torch.zeros(4))
    assert torch.allclose(found[0, 1::2], wanted[0, 1::2], atol=0.02)


def test_targets_of_round_objects() -> None:
    """Against masks as large as the image."""
    y, x = torch.arange(SIDE)[:, None] + 0.5, torch.arange(SIDE) + 0.5
    generator = torch.Generator().manual_seed(0)
    disks = []
    for _ in range(4):
        (a, b), radius = 20 + 24 * torch.rand(2, generator=generator), 8 + 8 * torch.rand(1, generator=generator)
        disks.append((x - a) ** 2 + (y - b) ** 2 < radius**2)
    targets = targets_of(*disks)
    for i, disk in enumerate(disks):
        for shift in (0, 3, -5):
            box = targets.boxes[0, i] + shift
            cells = 28
            at = (torch.arange(cells) + 0.5) / cells
            columns, rows = (box[0] + at * (box[2] - box[0])).long(), (box[1] + at * (box[3] - box[1])).long()
            predicted = torch.roll(disk, (shift, shift), (0, 1))[rows.clamp(0, 63)][:, columns.clamp(0, 63)]
            logits = torch.where(predicted, 2.0, -2.0)[None, None]
            index = torch.full((1, 1), i)
            found = iou_targets(logits, box[None, None], index, torch.ones(1, 1, dtype=torch.bool), targets)
            moved = torch.roll(disk, (shift, shift), (0, 1))
            wanted = (moved & disk).sum() / (moved | disk).sum()
            assert abs(found.item() - wanted.item()) < 0.05, (i, shift, found, wanted)


def test_loss() -> None:
    iou, wanted = torch.tensor([[0.5, 0.9, 0.3]], requires_grad=True), torch.tensor([[0.7, 0.0, 0.4]])
    loss = mask_iou_loss(iou, wanted)
    assert torch.isclose(loss, torch.tensor((0.5 * 0.2**2 + 0.5 * 0.1**2) / 2))
    loss.backward()
    assert iou.grad is not None
    assert iou.grad[0, 1] == 0
    assert mask_iou_loss(iou, torch.zeros(1, 3)) == 0


def test_head() -> None:
    torch.manual_seed(0)
    head = MaskIoUHead(4, 6, 3, channels=8, hidden=16).double()
    features, logits = torch.rand(5, 4, 6, 6).double(), torch.randn(5, 12, 12).double()
    state = head.state_dict()
    x = torch.cat((features, functional.max_pool2d(logits.sigmoid()[:, None], 2, 2)), dim=1)
    for i, stride in enumerate((1, 1, 1, 2)):
        x = functional.conv2d(x, state[f"convs.{i}.weight"], state[f"convs.{i}.bias"], stride, 1).relu()
    x = x.flatten(1)
    for i in range(2):
        x = functional.linear(x, state[f"fcs.{i}.weight"], state[f"fcs.{i}.bias"]).relu()
    wanted = functional.linear(x, state["fc_mask_iou.weight"], state["fc_mask_iou.bias"])
    torch.testing.assert_close(head(features, logits), wanted)
    assert wanted.shape == (5, 3)


def model(**changes: Any) -> fastmrcnn.MaskRCNN:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "min_size": 64,
        "max_size": 64,
        "proposals": 30,
        "detections_per_image": 8,
        "mask_iou": True,
    }
    built = build_model(ModelConfig("maskrcnn_resnet18_fpn", **(options | changes)), 4)
    assert isinstance(built, fastmrcnn.MaskRCNN)
    built.roi_heads.score_thresh = 0.0
    head = built.roi_heads.mask_iou_head
    assert isinstance(head, MaskIoUHead)
    torch.nn.init.normal_(head.fc_mask_iou.weight, std=0.3)
    return built.eval()


def test_scores_are_of_the_class() -> None:
    """Score of a class times the IoU that the head tells for it, in results, predictions, engines and records."""
    network = model()
    image = shapes(1)[0][0]
    seen = []
    head = network.roi_heads.mask_iou_head
    assert isinstance(head, MaskIoUHead)
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        result = network([image])[0]
    handle.remove()
    iou = seen[0][torch.arange(len(result["labels"])), result["labels"]]
    assert len(iou) == 8
    torch.testing.assert_close(result["mask_scores"], result["scores"] * iou)
    predicted = Predictor(network, masks="rle")(image)
    torch.testing.assert_close(predicted["mask_scores"], result["mask_scores"])
    assert "mask_scores" not in Predictor(network, masks=None)(image)
    engine = fastmrcnn.compile(network, image_sizes=(64, 64), masks="rle")
    compiled = engine([(image * 255).round().to(torch.uint8)])[0]
    torch.testing.assert_close(compiled["mask_scores"], result["mask_scores"], rtol=1e-3, atol=1e-4)
    records = detections_to_coco(predicted, 1, [1, 2, 3])
    assert [record["mask_score"] for record in records] == predicted["mask_scores"].tolist()
    assert [record["score"] for record in records] == predicted["scores"].tolist()


def test_masks_are_ranked_by_their_scores() -> None:
    """Evaluation of boxes uses scores, of masks those of masks."""
    truth = json.loads(json.dumps(shapes(1).coco))
    good = truth["annotations"][0]
    bad = dict(good, bbox=[0, 0, 3, 3], segmentation=[[0, 0, 3, 0, 3, 3, 0, 3]])
    records = [
        {"image_id": good["image_id"], "category_id": good["category_id"], "score": score, "mask_score": mask_score}
        | {"bbox": of["bbox"], "segmentation": of["segmentation"]}
        for of, score, mask_score in ((bad, 0.9, 0.1), (good, 0.8, 0.7))
    ]
    evaluator = CocoEvaluator(truth, ["bbox", "segm"])
    evaluator.add(good["image_id"], records)
    metrics = evaluator.metrics()
    assert metrics["segm"].ap > 1.5 * metrics["bbox"].ap > 0
    with pytest.raises(ValueError, match=r"\[0\]: mask_score must be a finite number, got nan"):
        CocoEvaluator(truth, ["segm"]).add(good["image_id"], [dict(records[0], mask_score=float("nan"))])


def test_trains(tmp_path: Path) -> None:
    """In a run, whose checkpoint has the head."""
    options = config(tmp_path, epochs=2)
    options.model.mask_iou = True
    best = train(options, shapes(4), shapes(2))
    readings = losses(tmp_path)
    assert all(reading["loss_mask_iou"] > 0 for _, reading in readings)
    trained, info = load_model(best)
    assert info.config.mask_iou
    assert "mask_scores" in Predictor(trained)(shapes(1)[0][0])


def test_learns_how_good_masks_are() -> None:
    """With the rest kept as it is, the head's IoU comes to be that of the masks."""
    torch.manual_seed(0)
    network = model().train()
    network.requires_grad_(False)
    head = network.roi_heads.mask_iou_head
    assert isinstance(head, MaskIoUHead)
    head.requires_grad_(True)
    data = shapes(2)
    images, targets = zip(*(data[i] for i in range(2)), strict=True)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    values = []
    for _ in range(20):
        torch.manual_seed(1)  # the same samples
        loss = network(list(images), [dict(target) for target in targets])["loss_mask_iou"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.2 * values[0]


def test_option_of_the_command_line() -> None:
    arguments = ["train", "--data.train_images", "a", "--data.train_annotations", "b", "--mask-iou"]
    chosen = build_parser().parse_args(spelled_out(arguments))
    assert chosen.train.model.mask_iou


def test_what_has_no_such_head() -> None:
    with pytest.raises(ValueError, match="mask_iou: only a model with masks"):
        build_model(ModelConfig("fasterrcnn_resnet50_fpn", mask_iou=True), 3)
    with pytest.raises(ValueError, match="mask_iou: only a model with masks"), torch.device("meta"):
        build_model(ModelConfig("maskrcnn_resnet50_c4", conventions="detectron2", mask_iou=True), 3)
