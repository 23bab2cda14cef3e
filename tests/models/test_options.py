"""Options of a model: norms, what learns, deltas and masks that classes share, channels; and checkpoints of such."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from detectors import targets_for
from strategies import DEVICE
from tolerances import assert_exact_arithmetic
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import WeightsEnum, mobilenet_v3_large, resnet18
from torchvision.models import detection as torchvision_detection
from torchvision.ops import FrozenBatchNorm2d

from fastmrcnn import ImageBatch, MaskRCNN, Predictor, ops
from fastmrcnn.checkpoints import ModelInfo, load_checkpoint, load_model, save_checkpoint
from fastmrcnn.models.config import ModelConfig, ModelName, build_model
from fastmrcnn.models.norms import converted, is_batch_norm
from fastmrcnn.models.roi_heads import of_label
from fastmrcnn.models.surgery import first_convolution, freeze, spread

ALL: dict[str, Any] = {"norm": "group", "class_agnostic": True, "channels": 4, "freeze": ["backbone.fpn"]}
KINDS = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm, "group": nn.GroupNorm}


def small(**options: Any) -> ModelConfig:
    arguments: dict[str, Any] = {"min_size": 64, "max_size": 64, "proposals": 50, "box_samples": 16}
    return ModelConfig("maskrcnn_resnet18_fpn", **arguments, anchor_sizes=[8, 16, 32, 64, 128], **options)


def built(num_classes: int = 3, **options: Any) -> MaskRCNN:
    torch.manual_seed(0)
    model = build_model(small(**options), num_classes)
    assert isinstance(model, MaskRCNN)
    return model


def train_a_step(model: nn.Module, channels: int = 3) -> dict[str, Tensor]:
    images = [torch.rand(channels, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    torch.manual_seed(1)
    losses = model.train()(images, targets_for(images, [3, 1]))
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    return losses


def published(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> None:
    """Let `state` be what torchvision's weights hold, so that nothing is downloaded."""
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: dict(state))


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_architecture_has_every_option(name: ModelName) -> None:
    """Counted on shapes alone, as far as detections."""
    pyramid = "_fpn" in name
    options = ALL if pyramid else ALL | {"freeze": ["rpn.head"]}
    with torch.device("meta"):
        model = build_model(ModelConfig(name, proposals=10, **options), 3).eval()
        images = ImageBatch(torch.empty(1, 4, 64, 64), torch.full((1, 2), 64))
        with torch.no_grad():
            found = model.detect(images)
    assert found.boxes.shape[2] == 4
    assert found.masks is None or found.masks.shape[2:] == ((14, 14) if name.endswith("_c4") else (28, 28))
    assert not any(is_batch_norm(module) for module in model.backbone.modules())
    still = model.backbone.fpn if pyramid else model.rpn.head
    assert not any(p.requires_grad for p in still.parameters())
    assert all(p.requires_grad for p in model.backbone.body.parameters())
    assert model.roi_heads.box_predictor.bbox_pred.out_features == 4
    assert model.transform.image_mean == [0.5] * 4
    assert model.transform.image_std == [0.25] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_the_backbone_are_replaced(kind: Any) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig("maskrcnn_resnet50_fpn_v2", norm=kind), 3)
    counts = {part: [type(m) for m in model.get_submodule(part).modules()] for part in ("backbone", "roi_heads")}
    assert counts["backbone"].count(KINDS[kind]) == 53 + 8  # of ResNet-50 and of the pyramid
    assert counts["roi_heads"].count(nn.BatchNorm2d) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_norm_keeps_its_weights(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    old = nn.BatchNorm2d(24, eps=1e-3, momentum=0.3).double().eval()
    for tensor in (old.weight, old.bias, old.running_mean, old.running_var):
        assert tensor is not None
        tensor.data.uniform_(0.5, 2, generator=generator)
    new = converted(old, kind)
    assert type(new) is KINDS[kind]
    assert (new.eps, new.training, new.weight.dtype) == (1e-3, False, torch.float64)  # type: ignore[union-attr]
    x = torch.rand(2, 24, 4, 5, dtype=torch.float64, generator=generator)
    if isinstance(new, nn.GroupNorm):
        torch.testing.assert_close(new.weight, old.weight, rtol=0, atol=0)
        torch.testing.assert_close(new.bias, old.bias, rtol=0, atol=0)
        return
    assert_exact_arithmetic(new(x), old(x))
    if isinstance(new, nn.modules.batchnorm._BatchNorm):
        assert new.momentum == 0.3
    back = converted(new, "batch")  # type: ignore[arg-type]
    assert_exact_arithmetic(back(x), old(x))


def test_norms_that_learn_have_an_eps() -> None:
    """torchvision's oldest weights have 0: a constant channel would divide by it."""
    oldest = FrozenBatchNorm2d(32, eps=0.0)
    assert converted(oldest, "frozen").eps == 0.0
    for kind in ("batch", "sync", "group"):
        assert converted(oldest, kind).eps == 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (32, 32), (24, 24), (40, 20), (112, 28), (37, 1)])
def test_groups_of_a_norm(channels: int, groups: int) -> None:
    norm = converted(nn.BatchNorm2d(channels), "group")
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_each_norm(kind: Any) -> None:
    model = built(norm=kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train_a_step(model)
    assert all(torch.isfinite(loss) for loss in losses.values())
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert ("backbone.body.bn1.running_mean" in moved) == (kind in ("batch", "sync"))
    assert ("backbone.body.bn1.weight" in moved) == (kind != "frozen")


def test_stages_that_do_not_learn_keep_frozen_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch, mobilenet_v3_large().state_dict())
    config = ModelConfig("fasterrcnn_mobilenet_v3_large_fpn", weights_backbone="DEFAULT", norm="batch")
    body = build_model(config, 3).backbone.body
    learns = [
        block[0].weight.requires_grad for block in body.modules() if type(block).__name__ == "Conv2dNormActivation"
    ]
    norms = [isinstance(norm, nn.BatchNorm2d) for norm in body.modules() if is_batch_norm(norm)]
    assert norms == learns
    assert 0 < sum(norms) < len(norms)


def test_what_is_frozen_stays() -> None:
    names = ["backbone.body.layer1", "backbone.body.bn1", "roi_heads.box_head.fc6.weight"]
    model = built(freeze=names)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_a_step(model)
    for name, value in model.state_dict().items():
        if name.startswith(("backbone.body.layer1.", "backbone.body.bn1.", "roi_heads.box_head.fc6.weight")):
            assert torch.equal(value, before[name]), name
        elif "fc6.bias" in name or "layer2.0.bn1" in name or name == "backbone.body.conv1.weight":
            assert not torch.equal(value, before[name]), name


def test_norms_of_frozen_heads_stay() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig("maskrcnn_resnet50_fpn_v2", freeze=["roi_heads.box_head"]), 3)
    kinds = {part: [type(m) for m in model.get_submodule(part).modules()] for part in ("roi_heads", "backbone.body")}
    assert kinds["roi_heads"].count(FrozenBatchNorm2d) == kinds["roi_heads"].count(nn.BatchNorm2d) == 4
    assert FrozenBatchNorm2d not in kinds["backbone.body"]


def test_names_that_are_frozen_are_whole() -> None:
    network = nn.ModuleDict({"layer1": nn.Linear(1, 1), "layer10": nn.Linear(1, 1)})
    freeze(network, ["layer1"])
    assert [p.requires_grad for p in network.parameters()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("name", "named"), [("backbone.layer1", "backbone.body.layer1"), ("mask_head", "mask_head"), ("", "backbone")]
)
def test_names_that_there_are_not(name: str, named: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=rf"freeze: .*no module or parameter '{name}'.*{named}"):
        build_model(small(freeze=[name]), 2)


def tied(model: MaskRCNN, num_classes: int) -> MaskRCNN:
    """A network whose classes have their own deltas and masks, which are the same as the shared ones of `model`."""
    own = built(num_classes)
    state = model.state_dict()
    for name in ("box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits"):
        for part in ("weight", "bias"):
            key = f"roi_heads.{name}.{part}"
            state[key] = torch.cat([state[key]] * num_classes)
    own.load_state_dict(state)
    return own


def test_shared_deltas_and_masks_equal_those_of_tied_classes() -> None:
    shared = built(4, class_agnostic=True)
    assert shared.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 1
    with torch.no_grad():
        shared.roi_heads.box_predictor.cls_score.weight.normal_(std=0.5)  # sure of its classes
    own = tied(shared, 4).double()
    shared = shared.double()
    images = [torch.rand(3, 64, 64, dtype=torch.float64), torch.rand(3, 48, 64, dtype=torch.float64)]
    with torch.no_grad():
        for expected, found in zip(own.eval()(images), shared.eval()(images), strict=True):
            assert len(found["boxes"]) > 0
            for key in expected:
                assert_exact_arithmetic(found[key].double(), expected[key].double(), scale=64)

    targets = targets_for(images, [3, 2])
    losses = []
    for model in (own, shared):
        torch.manual_seed(2)
        losses.append(model.train()(images, targets))
        torch.stack(list(losses[-1].values())).sum().backward()
    for name, expected in losses[0].items():
        assert_exact_arithmetic(losses[1][name], expected)
    for name in ("box_predictor.bbox_pred.weight", "mask_predictor.mask_fcn_logits.weight"):
        apart, together = (model.get_parameter(f"roi_heads.{name}").grad for model in (own, shared))
        assert apart is not None
        assert together is not None
        summed = apart.unflatten(0, (4, -1)).sum(dim=0)
        assert summed.abs().max() > 0
        assert_exact_arithmetic(together, summed, scale=summed.abs().max().item())


def test_shared_deltas_do_not_synchronise() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        model = built(class_agnostic=True).eval()
        found = model.detect(ImageBatch(torch.rand(2, 3, 64, 64), torch.full((2, 2), 64)))
    assert found.masks is not None
    assert found.masks.shape[-2:] == (28, 28)


def test_kernel_takes_shared_deltas() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(1, 6, 2, generator=generator) * 40
    proposals = torch.cat((start, start + 20), dim=2)
    logits = torch.randn(1, 6, 3, generator=generator) * 2
    deltas = torch.randn(1, 6, 1, 4, generator=generator).expand(-1, -1, 3, -1)
    rest = (proposals, torch.tensor([6]), torch.tensor([[64, 64]]))
    arguments = [x.to(DEVICE) for x in (logits, deltas, *rest)]
    found = ops.select_detections(*arguments, impl="triton")
    expected = ops.select_detections(logits, deltas.contiguous(), *rest, impl="reference")
    assert int(expected[3]) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def test_the_mask_of_all_classes_is_each_ones() -> None:
    masks = torch.rand(2, 3, 1, 4, 4)
    assert torch.equal(of_label(masks, torch.tensor([[1, 5, -1], [2, 0, 3]])), masks[:, :, 0])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_a_grey_image_looks_the_same_in_any_number_of_channels(channels: int) -> None:
    weight = torch.rand(8, 3, 5, 5, dtype=torch.float64)
    grey = torch.rand(2, 1, 9, 9, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    found = torch.nn.functional.conv2d(grey.expand(-1, channels, -1, -1), spread(weight, channels))
    assert_exact_arithmetic(found, expected, scale=expected.abs().max().item())


def test_pretrained_first_layer_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resnet18()
    published(monkeypatch, source.state_dict())
    with pytest.warns(UserWarning, match=r"backbone\.body\.conv1: the pretrained weight for 3 channels .* over 5"):
        model = built(channels=5, weights_backbone="DEFAULT")
    name, layer = first_convolution(model)
    assert name == "backbone.body.conv1"
    assert (layer.stride, layer.padding, layer.weight.requires_grad) == ((2, 2), (3, 3), True)
    torch.testing.assert_close(layer.weight.sum(dim=1), source.conv1.weight.sum(dim=1))
    assert torch.equal(layer.weight[:, 0], layer.weight[:, 4])


def test_new_first_layer_tells_channels_apart() -> None:
    layer = first_convolution(built(channels=4))[1]
    assert not torch.equal(layer.weight[:, 0], layer.weight[:, 3])
    expected = (2 / (64 * 49)) ** 0.5  # as torchvision's ResNet: of the fan out, for ReLU
    assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_images_with_other_channels() -> None:
    options: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7, 0.8]}
    model = built(channels=4, **options)
    assert (model.transform.image_mean, model.transform.image_std) == tuple(options.values())
    assert all(torch.isfinite(loss) for loss in train_a_step(model, channels=4).values())
    model.eval()
    image = torch.rand(4, 64, 64)
    result = Predictor(model)(image)
    assert torch.equal(result["boxes"], model([image])[0]["boxes"])
    with pytest.raises(ValueError, match=r"images\[1\]: expected 4 channels, as the model has it, got \[3, 64, 64\]"):
        model([image, torch.rand(3, 64, 64)])


def test_one_channel_stands_for_all() -> None:
    model = built().eval()
    grey = torch.rand(1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model([grey])[0]["scores"], model([grey.expand(3, -1, -1)])[0]["scores"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels: expected 1 or more, got 0"),
        ({"channels": 2, "image_mean": [0.5]}, "image_mean: expected a number for each of 2 channels"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std: expected positive numbers"),
    ],
)
def test_impossible_channels(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(small(**options), 2)


@pytest.mark.parametrize("norm", [None, "batch", "group"])
def test_checkpoint_of_a_model_with_options(norm: Any, tmp_path: Path) -> None:
    config = small(**(ALL | {"norm": norm}))
    torch.manual_seed(0)
    model = build_model(config, 3)
    train_a_step(model, channels=4)
    path = save_checkpoint(tmp_path / "model.pt", model, ModelInfo(config, ["a", "b"], [1, 2]))
    loaded, info = load_model(path)
    assert info.config == config
    image = torch.rand(4, 64, 64)
    with torch.no_grad():
        expected, found = model.eval()([image])[0], loaded([image])[0]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert Predictor(path)(image)["masks"].shape[1:] == (1, 64, 64)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_checkpoint_of_a_pretrained_model_computes_the_same(
    norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision's oldest weights come with frozen norms and an eps of 0, of which a `state_dict` does not tell."""
    torch.manual_seed(0)
    state = torchvision_detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.fill_(0.01 if "bn3" in name else 0.5)  # so that an eps shows
    published(monkeypatch, state)
    config = ModelConfig("fasterrcnn_resnet50_fpn", weights="DEFAULT", trainable_backbone_layers=2, norm=norm)
    model = build_model(config, 3).eval()
    monkeypatch.undo()
    loaded, _ = load_model(save_checkpoint(tmp_path / "model.pt", model, ModelInfo(config, ["a", "b"], [1, 2])))
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected, found = (network.backbone.body(x) for network in (model, loaded))
    assert isinstance(model.backbone.body.bn1, FrozenBatchNorm2d)
    assert model.backbone.body.bn1.eps == 0
    assert isinstance(model.backbone.body.layer4[0].bn1, FrozenBatchNorm2d if norm is None else nn.BatchNorm2d)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("fasterrcnn_resnet50_fpn", None),
        ("fasterrcnn_resnet50_fpn", 0),
        ("fasterrcnn_resnet50_fpn", 4),
        ("fasterrcnn_resnet50_fpn", 5),
        ("fasterrcnn_resnet50_fpn_v2", 2),
        ("fasterrcnn_mobilenet_v3_large_fpn", None),
        ("fasterrcnn_mobilenet_v3_large_fpn", 1),
        ("fasterrcnn_mobilenet_v3_large_fpn", 6),
    ],
)
def test_the_same_layers_learn_without_pretrained_weights(
    name: ModelName, layers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
    published(monkeypatch, {})
    config = ModelConfig(name, weights_backbone="DEFAULT", trainable_backbone_layers=layers, norm="batch")
    with torch.device("meta"):
        expected, found = build_model(config, 3), build_model(config, 3, pretrained=False)
    assert [(n, p.requires_grad) for n, p in found.named_parameters()] == [
        (n, p.requires_grad) for n, p in expected.named_parameters()
    ]
    assert [type(m) for m in found.modules()] == [type(m) for m in expected.modules()]


def test_checkpoints_from_before_the_options(tmp_path: Path) -> None:
    model = built()
    path = save_checkpoint(tmp_path / "model.pt", model, ModelInfo(small(), ["a", "b"], [1, 2]))
    content = load_checkpoint(path)
    for name in ("norm", "freeze", "class_agnostic", "channels", "image_mean", "image_std"):
        del content["info"]["config"][name]
    content["info"]["config"]["dropped_since"] = 3
    torch.save(content, path)
    loaded, info = load_model(path)
    assert info.config == small()
    assert loaded.state_dict().keys() == model.state_dict().keys()
