"""Files of matterport's Mask R-CNN give what it computes, from the bytes of an image to masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from checkpoints.comparing import as_input, photo
from checkpoints.matterport_files import matterport_shapes, random_weights, write_h5
from checkpoints.matterport_network import MatterportNetwork

import fastmrcnn
from fastmrcnn import matterport
from fastmrcnn.checkpoints import ModelInfo, load_weights
from fastmrcnn.checkpoints.reading import read_weights
from fastmrcnn.models.config import ModelConfig, build_model
from fastmrcnn.models.matterport import anchors

LEAST, MOST = 128, 192
SIZE = (90, 130)


@pytest.fixture(scope="module")
def network() -> MatterportNetwork:
    sizes = {"image_min_dim": LEAST, "image_max_dim": MOST, "post_nms": 200}
    network = MatterportNetwork(random_weights(matterport_shapes()), **sizes)
    with torch.inference_mode():
        network.calibrate(photo(*SIZE))
    return network


@pytest.fixture(scope="module")
def path(network: MatterportNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matterport") / "mask_rcnn_coco.h5"
    write_h5(path, network.saved())
    return path


def load(path: Path) -> Any:
    model = fastmrcnn.load(path, min_size=LEAST, max_size=MOST).double()
    model.rpn._post_nms_top_n["testing"] = 200
    return model


def test_detections(network: MatterportNetwork, path: Path) -> None:
    image = photo(*SIZE)
    with torch.inference_mode():
        theirs = network(image)
        ours = load(path)([as_input(image)])[0]
    assert len(theirs.rois) > 15
    assert ours["labels"].tolist() == theirs.class_ids.tolist()
    np.testing.assert_allclose(ours["scores"], theirs.scores, rtol=1e-4)
    assert ours["boxes"][:, [1, 0, 3, 2]].tolist() == theirs.rois.tolist()
    masks = (ours["masks"][:, 0] >= 0.5).numpy().transpose(1, 2, 0)
    assert 0.05 < masks.mean() < 0.95
    assert (masks != theirs.masks).sum() <= 2


class Small(matterport.Config):
    NAME, NUM_CLASSES, BACKBONE = "test", 81, "resnet50"
    IMAGE_MIN_DIM, IMAGE_MAX_DIM, POST_NMS_ROIS_INFERENCE = LEAST, MOST, 200
    LEARNING_RATE = 0.1  # of training: not looked at


def test_familiar_surface(network: MatterportNetwork, path: Path, tmp_path: Path) -> None:
    image = photo(*SIZE)
    with torch.inference_mode():
        theirs = network(image)
    model = matterport.MaskRCNN("inference", Small(), tmp_path, device="cpu")
    model.load_weights(path, by_name=True)
    image.flags.writeable = False  # as arrays of Pillow are
    found = model.detect([image, image[:, ::-1]])
    assert len(found) == 2
    result = found[0]
    assert {name: (value.dtype, value.ndim) for name, value in result.items()} == {
        "rois": (np.int32, 2),
        "class_ids": (np.int32, 1),
        "scores": (np.float32, 1),
        "masks": (np.bool_, 3),
    }
    assert result["masks"].shape == (*SIZE, len(result["rois"]))
    assert result["class_ids"].tolist() == theirs.class_ids.tolist()
    assert result["rois"].tolist() == theirs.rois.tolist()
    assert (result["masks"] != theirs.masks).sum() <= 2
    names = ["BG", *(f"class {i}" for i in range(1, 81))]
    picture = matterport.display_instances(
        image, result["rois"], result["masks"], result["class_ids"], names, result["scores"], ax=Axes()
    )
    assert picture.size[0] >= SIZE[1]
    assert model.detect([]) == []
    with pytest.raises(TypeError, match=r"images\[0\]: expected a uint8 array \[H, W, 3\], got an array of float64"):
        model.detect([image / 255])
    with pytest.raises(ValueError, match=r"images\[1\]: expected \[H, W, 3\], got \[90, 130\]"):
        model.detect([image, image[..., 0]])
    with pytest.raises(ValueError, match="expected as many of each"):
        matterport.display_instances(image, result["rois"], result["masks"], result["class_ids"][:2], names)


class Axes:
    """What pictures are shown in."""

    def axis(self, state: str) -> None:
        assert state == "off"

    def set_title(self, title: str) -> None: ...

    def imshow(self, picture: Any) -> None: ...


def test_masks_that_are_inside_everywhere_fill_their_box() -> None:
    """skimage clips to the least value of what it resizes."""
    boxes = torch.tensor([[2.0, 3.0, 62.0, 43.0], [2.0, 3.0, 62.0, 43.0]])
    masks = torch.full((2, 28, 28), 0.6)
    masks[1, 14, 14] = 0.4
    filled = matterport._full_masks(masks, boxes, (50, 70))
    assert filled[0].sum() == 60 * 40
    assert filled[0, 3:43, 2:62].all()
    assert 0 < filled[1].sum() < 60 * 40


def test_other_classes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Two(Small):
        NUM_CLASSES = 2

    model = matterport.MaskRCNN("inference", Two(), device="cpu")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"another network than NUM_CLASSES=2 .*exclude=\['mrcnn_class_logits'"):
        model.load_weights(path, by_name=True)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    model.load_weights(path, by_name=True, exclude=["mrcnn_class_logits", "mrcnn_bbox_fc", "mrcnn_bbox", "mrcnn_mask"])
    assert "new, not in" in capsys.readouterr().out
    after = model.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "backbone.body.conv1.weight" in changed
    assert {name for name in after if name not in changed} >= {
        f"roi_heads.{layer}.{part}"
        for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NUM_CLASSES": 1}, "config.NUM_CLASSES is 1: expected the background"),
        ({"BACKBONE": "mobilenet"}, "config.BACKBONE is 'mobilenet': expected 'resnet50'"),
        ({"IMAGE_RESIZE_MODE": "crop"}, "config.IMAGE_RESIZE_MODE is crop: expected square"),
        ({"RPN_ANCHOR_RATIOS": [1]}, r"config.RPN_ANCHOR_RATIOS is \[1\]: expected \[0.5, 1"),
        ({"IMAGE_MAX_DIM": 1000}, "config.IMAGE_MAX_DIM is 1000: expected a multiple of 64"),
    ],
)
def test_settings_that_there_are_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matterport.MaskRCNN("inference", type("Own", (Small,), changes)())


def test_weights_to_start_from(network: MatterportNetwork, path: Path) -> None:
    """Of other conventions, which is said; all but the head of its RPN fit."""
    config = ModelConfig("maskrcnn_resnet50_fpn", norm="frozen")
    model = build_model(config, 81)
    model.info = ModelInfo(config)
    with pytest.warns(UserWarning, match="conventions of matterport; this one has those of torchvision"):
        report = load_weights(model, path)
    assert set(report.anew) == {f"rpn.head.{layer}" for layer in ("conv.0.0", "cls_logits", "bbox_pred")}
    kernel = torch.from_numpy(network.saved()["conv1"]["kernel"]).permute(3, 2, 0, 1)
    assert torch.equal(model.state_dict()["backbone.body.conv1.weight"], kernel)


def test_training_is_elsewhere() -> None:
    with pytest.raises(ValueError, match="mode='training': expected \"inference\"; `fastmrcnn train` trains"):
        matterport.MaskRCNN("training", Small())


def test_anchors_of_the_published_size() -> None:
    """261,888 of 1024 x 1024, in fractions of the image from -0.35390 to 1.29134."""
    generator = anchors([(size,) for size in (32, 64, 128, 256, 512)], (4, 8, 16, 32, 64))
    grids = generator.grid_anchors([[1024 // s] * 2 for s in generator.strides], [[s, s] for s in generator.strides])
    boxes = torch.cat(grids) / 1023
    assert boxes.shape == (261888, 4)
    assert abs(boxes.min().item() + 0.35390) < 1e-5
    assert abs(boxes.max().item() - 1.29134) < 1e-5


def test_whole_model_of_keras(network: MatterportNetwork, path: Path, tmp_path: Path) -> None:
    write_h5(tmp_path / "model.h5", network.saved(), as_model=True)
    a, b = read_weights(tmp_path / "model.h5"), read_weights(path)
    assert a.info == b.info
    assert all(torch.equal(a.state[name], b.state[name]) for name in b.state)
    assert (b.info.class_names[0], b.info.category_ids[-1]) == ("person", 90)


def test_what_does_not_fit(network: MatterportNetwork, tmp_path: Path) -> None:
    weights = network.saved()
    for name, change, message in (
        ("a", lambda w: w.pop("fpn_c3p3"), "it lacks fpn_c3p3"),
        ("b", lambda w: w.update(mrcnn_extra=w["conv1"]), "it also has mrcnn_extra"),
        ("c", lambda w: w.update(fpn_p2=w["conv1"]), r"backbone.fpn.layer_blocks.0.0.weight as \[64, 3, 7, 7\]"),
    ):
        changed = dict(weights)
        change(changed)
        write_h5(tmp_path / f"{name}.h5", changed)
        with pytest.raises(ValueError, match=f"{name}.h5: .*{message}"):
            read_weights(tmp_path / f"{name}.h5")


def test_hostile_files(tmp_path: Path) -> None:
    """Links, numbers in other files, and more of them than there are bytes."""
    (tmp_path / "secret").write_bytes(bytes(4096))
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file["numbers"] = np.zeros(8)

    def write(name: str, make: Any) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            make(file.create_group("conv1"))
        return tmp_path / name

    layout = h5py.VirtualLayout(shape=(8,), dtype="f8")
    layout[:] = h5py.VirtualSource(tmp_path / "source.h5", "numbers", shape=(8,))
    secret = str(tmp_path / "secret")
    cases = [
        (
            lambda group: group.__setitem__("kernel:0", h5py.ExternalLink(str(tmp_path / "source.h5"), "numbers")),
            "link",
        ),
        (lambda group: group.__setitem__("kernel:0", h5py.SoftLink("/conv1")), "link"),
        (
            lambda group: group.create_dataset("kernel:0", (8,), "f8", external=[(secret, 0, 64)]),
            "numbers in another file",
        ),
        (lambda group: group.create_virtual_dataset("kernel:0", layout), "numbers in another file"),
        (lambda group: group.create_dataset("kernel:0", (1 << 20, 1 << 10), "f4"), "claims 4294967296 bytes"),
        (lambda group: group.create_dataset("kernel:0", data=np.array([b"text"])), "expected numbers"),
        (lambda group: group.create_group("a").__setitem__("b", group), "there under another name, too"),
    ]
    for i, (make, message) in enumerate(cases):
        with pytest.raises(ValueError, match=rf"^checkpoint: .*{i}\.h5: .*{message}"):
            read_weights(write(f"{i}.h5", make))
    whole = (tmp_path / "source.h5").read_bytes()
    for length in (10, 600, len(whole) - 8):
        (tmp_path / "cut.h5").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^checkpoint: .*cut\.h5( is damaged|: it has)"):
            read_weights(tmp_path / "cut.h5")
