"""Files of detectron2 give what detectron2 computes: every layer, from the bytes of an image to masks."""

from __future__ import annotations

import ast
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.comparing import FEW, LONGER, SHORTER, as_input, assert_same, photo
from checkpoints.foreign_files import Kind, detectron2_shapes, random_state
from checkpoints.foreign_networks import detectron2_network
from torch import Tensor

from fastmrcnn.checkpoints import detectron2
from fastmrcnn.checkpoints.loading import model_of
from fastmrcnn.checkpoints.reading import read_weights
from fastmrcnn.models.anchors import FixedStrideAnchors
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.losses import box_losses
from fastmrcnn.ops.roi import levels_by

KINDS = {
    "mask_rcnn_R_50_FPN_3x": Kind(),
    "mask_rcnn_R_50_C4_3x": Kind("c4"),
    "mask_rcnn_R_50_DC5_3x": Kind("dc5"),
    "keypoint_rcnn_R_50_FPN_3x": Kind(mask=False, keypoints=17, classes=1),
    "mask_rcnn_X_101_32x8d_FPN_3x": Kind(depth="101", groups=32, width=8),
}


def write_pkl(path: Path, state: dict[str, Tensor], author: str | None = "Detectron2 Model Zoo") -> Path:
    content: dict[str, Any] = {"model": {name: value.numpy() for name, value in state.items()}}
    if author:
        content["__author__"] = author
    path.write_bytes(pickle.dumps(content, protocol=4))
    return path


@pytest.mark.parametrize("name", KINDS)
def test_detections(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    state = random_state(detectron2_shapes(kind), of_bytes=kind.groups == 1)
    image = photo()
    network = detectron2_network(state, kind, SHORTER, LONGER)
    seen = image[:, :, ::-1].copy()
    network.calibrate(seen)
    theirs = network(seen)
    path = write_pkl(tmp_path / "model_final.pkl", network.saved())
    weights = read_weights(path)
    back, saved = detectron2.export(weights), network.saved()
    assert back.keys() == saved.keys()
    assert all(torch.equal(back[key], saved[key]) for key in saved)
    model = model_of(weights, options=FEW).eval().double()
    with torch.inference_mode():
        assert_same(model([as_input(image)])[0], theirs)


def test_layouts_are_those_of_the_library() -> None:
    """Names and shapes read off its models, where they are at hand."""
    folder = Path(__file__).parents[3] / "shared" / "checkpoint_layouts"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    for name, kind in KINDS.items():
        if (file := folder / f"d2_{name}.txt").is_file():
            lines = [line.split(" ", 1) for line in file.read_text().splitlines() if line and line[0] != "#"]
            assert {key: ast.literal_eval(shape) for key, shape in lines} == detectron2_shapes(kind), name


LAST = {"2": 2, "3": 3, "4": 5, "5": 2}
"""The number of the last block of each stage."""

CAFFE2_NAMES: list[tuple[str, Any]] = [
    (r"^backbone\.(bottom_up\.)?|^roi_heads\.(?=res5)", ""),
    (r"^stem\.conv1\.norm\.", "res_conv1_bn."),
    (r"^stem\.", ""),
    (r"\.shortcut", ".branch1"),
    (r"^(res.*)\.conv1\b", r"\1.branch2a"),
    (r"^(res.*)\.conv2\b", r"\1.branch2b"),
    (r"^(res.*)\.conv3\b", r"\1.branch2c"),
    (r"\.norm\.", "_bn."),
    (r"^fpn_lateral5", "fpn.inner.res5.2.sum"),
    (r"^fpn_lateral(\d)", lambda found: f"fpn.inner.res{found[1]}.{LAST[found[1]]}.sum.lateral"),
    (r"^fpn_output(\d)", lambda found: f"fpn.res{found[1]}.{LAST[found[1]]}.sum"),
    (r"^proposal_generator\.rpn_head\.conv", "conv.rpn.fpn2"),
    (r"^proposal_generator\.rpn_head\.objectness_logits", "rpn.cls.logits.fpn2"),
    (r"^proposal_generator\.rpn_head\.anchor_deltas", "rpn.bbox.pred.fpn2"),
    (r"^roi_heads\.box_head\.fc1", "fc6"),
    (r"^roi_heads\.box_head\.fc2", "fc7"),
    (r"^roi_heads\.box_predictor\.", ""),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)", r"_[mask]_fcn\1"),
    (r"^roi_heads\.mask_head\.deconv", "conv5.mask"),
    (r"^roi_heads\.mask_head\.predictor", "mask.fcn.logits"),
    (r"_bn\.weight$", "_bn.s"),
    (r"_bn\.bias$", "_bn.b"),
    (r"\.weight$", ".w"),
    (r"\.bias$", ".b"),
]


def caffe2_name(name: str) -> str:
    """What Detectron called a tensor of detectron2's."""
    for pattern, replacement in CAFFE2_NAMES:
        name = re.sub(pattern, replacement, name)
    return name.replace(".", "_")


@pytest.mark.parametrize("neck", ["fpn", "c4"])
def test_caffe2(neck: str, tmp_path: Path) -> None:
    """Detectron's files: other names, the background first, norms that only scale and shift; the same network."""
    kind = Kind(neck, classes=5)
    state = random_state(detectron2_shapes(kind), of_bytes=True)
    for name in state:
        if name.endswith("running_mean"):
            state[name] = torch.zeros_like(state[name])
        elif name.endswith("running_var"):
            state[name] = torch.ones_like(state[name]) - 1e-5
    wanted = read_weights(write_pkl(tmp_path / "a.pkl", state))
    blobs: dict[str, Any] = {"conv1_w_momentum": np.zeros(3, np.float32)}
    for name, value in state.items():
        if "running" in name:
            continue
        rows = 4 if "bbox_pred" in name else 1 if "mask_head.predictor" in name else 0
        if "cls_score" in name:
            value = value.roll(1, 0)
        elif rows:
            value = torch.cat((torch.full((rows, *value.shape[1:]), 7.0), value))  # of the background: not used
        their_name = caffe2_name(name)
        blobs[their_name if neck == "fpn" else their_name.replace("_fpn2", "")] = value.numpy()
    of_neck = {
        "fpn": {"fpn_inner_res2_2_sum_lateral_w", "conv_rpn_fpn2_w", "_[mask]_fcn1_b", "fc6_w"},
        "c4": {"conv_rpn_w", "rpn_bbox_pred_b", "res5_2_branch2c_bn_b", "conv5_mask_w"},
    }
    assert {"res_conv1_bn_s", "res2_0_branch1_w", *of_neck[neck]} <= blobs.keys()
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}, protocol=2))
    found = read_weights(tmp_path / "model_final.pkl")
    assert found.info == wanted.info
    assert found.state.keys() == wanted.state.keys()
    assert all(torch.equal(found.state[name], wanted.state[name]) for name in wanted.state)


def test_buffers_of_older_versions(tmp_path: Path) -> None:
    """Means, deviations and anchors that are in a file are its network's, and named."""
    state = {name: torch.zeros(shape) for name, shape in detectron2_shapes(Kind(mask=False, classes=3)).items()}
    half = math.sqrt(0.5)
    for i, size in enumerate((16, 32, 64, 128, 256)):
        sides = torch.tensor([[size / half, size * half], [size, size], [size * half, size / half]]) / 2
        state[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = torch.cat((-sides, sides), dim=1)
    state["pixel_mean"], state["pixel_std"] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    weights = read_weights(write_pkl(tmp_path / "a.pkl", state))
    config = weights.info.config
    assert config.anchor_sizes == [16, 32, 64, 128, 256]
    assert [round(x * 255) for x in config.image_mean or []] == [3, 2, 1]
    assert [round(x * 255) for x in config.image_std or []] == [6, 5, 4]
    state["proposal_generator.anchor_generator.cell_anchors.2"][0] *= 1.1
    with pytest.raises(ValueError, match="its anchors are not of whole sizes and the ratios 1 : 2, 1 : 1 and 2 : 1"):
        read_weights(write_pkl(tmp_path / "b.pkl", state))
    assert set(weights.unused) == {name for name in state if name.startswith(("pixel", "proposal_generator.anchor"))}


def test_conventions() -> None:
    """Of a pyramid and of one map, as in detectron2's configs/Base-RCNN-{FPN,C4,DilatedC5}.yaml."""
    names: tuple[Any, ...] = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet101_c4")
    with torch.device("meta"):
        fpn, c4 = (build_model(ModelConfig(name, conventions="detectron2"), 81) for name in names)
    for model, before, after in ((fpn, (2000, 1000), (1000, 1000)), (c4, (12000, 6000), (2000, 1000))):
        rpn, heads = model.rpn, model.roi_heads
        assert (rpn._pre_nms_top_n["training"], rpn._pre_nms_top_n["testing"]) == before
        assert (rpn._post_nms_top_n["training"], rpn._post_nms_top_n["testing"]) == after
        assert (rpn.smooth_l1_beta, heads.smooth_l1_beta) == (0, 0)
        assert heads.box_coder.weights == (10, 10, 5, 5)
        assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
        assert (model.transform.min_size[-1], model.transform.max_size) == (800, 1333)
    assert (fpn.transform.size_divisible, c4.transform.size_divisible) == (32, 1)


def test_losses_of_boxes_are_l1() -> None:
    labels, present = torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    off = torch.full((1, 1, 2, 4), 0.05)
    losses = box_losses(torch.zeros(1, 1, 2), off, labels, torch.zeros(1, 1, 4), present, 0.0)
    assert torch.isclose(losses["loss_box_reg"], torch.tensor(4 * 0.05))


def test_anchors_and_levels_by_hand() -> None:
    """Unrounded, ratios within sizes, at multiples of the stride whatever the image is padded to."""
    generator = FixedStrideAnchors([(32, 64)], [(0.5, 1.0, 2.0)], [16])
    root = 32 * math.sqrt(2)
    cells = generator.cell_anchors[0]
    assert torch.allclose(cells[0], torch.tensor([-root / 2, -root / 4, root / 2, root / 4]))
    assert cells[1].tolist() == [-16, -16, 16, 16]
    assert torch.allclose(cells[2], torch.tensor([-root / 4, -root / 2, root / 4, root / 2]))
    assert cells[4].tolist() == [-32, -32, 32, 32]
    below = float(np.nextafter(np.float32(224), np.float32(0)))
    boxes = torch.tensor([[0, 0, 224, 224], [0, 0, below, below], [0, 0, 112, 112], [0, 0, 3, 3], [0, 0, 2000, 2000]])
    assert levels_by("torchvision", boxes, 4, 2, 224, 4).tolist() == [2, 2, 1, 0, 3]
    assert levels_by("mmdetection", boxes, 4, 2, 224, 4).tolist() == [2, 2, 1, 0, 3]
    # As detectron2, in float32, whose logarithm of the float below 1 is not 0.
    rule = (4 + torch.log2(boxes[:, 2] / 224 + 1e-8)).floor().clamp(2, 5) - 2
    assert levels_by("detectron2", boxes, 4, 2, 224, 4).tolist() == rule.tolist()
    with pytest.raises(ValueError, match="level_rule='fpn': expected one of torchvision, detectron2, mmd"):
        levels_by("fpn", boxes, 4, 2, 224, 4)  # type: ignore[arg-type]
