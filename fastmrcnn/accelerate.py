"""torchvision's detectors as they are, in memory and perhaps trained, with our flow."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torchvision.models.detection as torchvision_detection
from torch import nn
from torchvision.models.detection import roi_heads as torchvision_heads
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN as TorchvisionGeneralizedRCNN
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.boxes import box_iou
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from fastmrcnn import ops
from fastmrcnn.models.adopt import STILL_CALLED, describe, methods, require
from fastmrcnn.models.builders import adopt_detector
from fastmrcnn.models.mask_rcnn import FasterRCNN, GeneralizedRCNN, KeypointRCNN, MaskRCNN
from fastmrcnn_kernels.reference.boxes import MAX_LOG_SCALE

CONTINUED: dict[type[nn.Module], type[GeneralizedRCNN]] = {
    torchvision_detection.MaskRCNN: MaskRCNN,
    torchvision_detection.KeypointRCNN: KeypointRCNN,
    torchvision_detection.FasterRCNN: FasterRCNN,
    TorchvisionGeneralizedRCNN: GeneralizedRCNN,
}
"""Our class for each of torchvision's, the most specific first."""

FUNCTIONS = ("fastrcnn_loss", "maskrcnn_loss", "keypointrcnn_loss", "maskrcnn_inference", "keypointrcnn_inference")
"""Functions of torchvision's `roi_heads.py` that programs replace there, and that our flow does not call."""

SAMPLING = {
    "box_coder": BoxCoder,
    "proposal_matcher": Matcher,
    "fg_bg_sampler": BalancedPositiveNegativeSampler,
}

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def accelerate(model: nn.Module) -> GeneralizedRCNN:
    """torchvision's detector `model`, fine-tuned or made of parts of your own, with our flow.

    The result is a new object of our class of the same name, and shares all that learns: submodules, parameters and
    buffers.  An optimizer of `model` goes on, `state_dict` has the same keys, and what one learns the other knows.
    `model` stays as it is and can be used.  Options (`roi_heads.score_thresh` and the like), hooks of the model itself
    and the mode are taken over, and belong to each of the two from then on: call `train` or `eval` of the one that you
    use next, since submodules have one mode for both.

    Backbone, RPN head, box, mask and keypoint heads and predictors can be any modules, since they are called as
    torchvision calls them.  Where our flow takes the place of torchvision's, only torchvision's own is accepted.

    Args:
        model: a torchvision `MaskRCNN`, `FasterRCNN`, `KeypointRCNN`, or a `GeneralizedRCNN` of torchvision's RPN,
            RoI heads and transform; or a subclass of one, of which the result is an instance, too.  Training or
            evaluation mode, on any device.

    Returns:
        A `fastmrcnn.MaskRCNN`, `FasterRCNN`, `KeypointRCNN`, or `GeneralizedRCNN`; `model` itself if it is one.

    Raises:
        TypeError: `model` or one of its parts is of another kind, overrides methods that our flow replaces, or has
            hooks that it would not call.  The message names the part, what was found and what is accepted.
        ValueError: a part has an option that our flow does not know.
    """
    if isinstance(model, GeneralizedRCNN):
        return model
    _check_kind(model)
    theirs, ours = next((theirs, ours) for theirs, ours in CONTINUED.items() if isinstance(model, theirs))
    _check_torchvision(theirs)
    detector = adopt_detector(model, ours)
    _check_rpn(detector.rpn)
    _check_heads(detector.roi_heads)
    _check_hooks("model.transform", detector.transform)
    return detector


def _check_kind(model: object) -> None:
    """Raise unless `model` is a detector of two stages, by itself."""
    found, expected = f"model is {describe(model)}", "expected torchvision's MaskRCNN, FasterRCNN or KeypointRCNN"
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{found}, which is compiled: {expected}, as it was before torch.jit")
    if isinstance(model, TorchvisionGeneralizedRCNN):
        return
    for name, child in model.named_children() if isinstance(model, nn.Module) else ():
        if isinstance(child, TorchvisionGeneralizedRCNN):
            raise TypeError(f"{found} around {describe(child)}: pass model.{name}")
    raise TypeError(f"{found}: {expected}")


def _check_torchvision(theirs: type[nn.Module]) -> None:
    """Raise where the program has put something of its own into torchvision that our flow does not call."""
    held = [
        (f"{own.__name__}.{name}", inspect.getattr_static(own, name))
        for own in (theirs, RegionProposalNetwork, torchvision_heads.RoIHeads, GeneralizedRCNNTransform)
        for name in sorted(methods(own, "torchvision.") - STILL_CALLED)
    ]
    held += [(f"roi_heads.{name}", vars(torchvision_heads)[name]) for name in FUNCTIONS]
    for name, value in held:
        if not str(getattr(value, "__module__", None)).startswith("torchvision."):
            raise TypeError(
                f"{name} of torchvision.models.detection is {value!r}: expected torchvision's own, since no other is "
                "called"
            )


def _check_rpn(rpn: RegionProposalNetwork) -> None:
    generator = rpn.anchor_generator
    require(generator, AnchorGenerator, ("forward", "grid_anchors"), "model.rpn.anchor_generator")
    _check_hooks("model.rpn", rpn)
    _check_hooks("model.rpn.anchor_generator", generator)
    _check_sampling("model.rpn", rpn)
    if tuple(rpn.box_coder.weights) != (1, 1, 1, 1):
        raise ValueError(f"model.rpn.box_coder.weights are {rpn.box_coder.weights}: expected (1, 1, 1, 1)")
    if rpn.box_similarity is not box_iou:
        raise TypeError(f"model.rpn.box_similarity is {rpn.box_similarity!r}: expected torchvision.ops.box_iou")


def _check_heads(heads: torchvision_heads.RoIHeads) -> None:
    _check_hooks("model.roi_heads", heads)
    _check_sampling("model.roi_heads", heads)
    for branch, used in (("box", True), ("mask", heads.has_mask()), ("keypoint", heads.has_keypoint())):
        if used:
            _check_pooler(f"model.roi_heads.{branch}_roi_pool", getattr(heads, f"{branch}_roi_pool"))


def _check_sampling(name: str, part: RegionProposalNetwork | torchvision_heads.RoIHeads) -> None:
    """Raise unless boxes are coded, matched and sampled as torchvision does it."""
    for attribute, theirs in SAMPLING.items():
        require(getattr(part, attribute), theirs, methods(theirs, "torchvision."), f"{name}.{attribute}")
    clip = part.box_coder.bbox_xform_clip
    if clip != MAX_LOG_SCALE:
        raise ValueError(f"{name}.box_coder.bbox_xform_clip is {clip}: expected log(1000 / 16), torchvision's default")


def _check_pooler(name: str, pooler: Any) -> None:
    theirs = ops.MultiScaleRoIAlign if isinstance(pooler, ops.MultiScaleRoIAlign) else MultiScaleRoIAlign
    require(pooler, theirs, ("forward",), name)
    _check_hooks(name, pooler)
    scales, mapper = pooler.scales, pooler.map_levels
    if scales is None or mapper is None:
        return
    # torchvision keeps what its first call inferred.  We infer at every call: what is kept has to be of that kind.
    levels = [-math.log2(scale) for scale in scales]
    inferred = LevelMapper(levels[0], levels[-1], pooler.canonical_scale, pooler.canonical_level)
    own = type(mapper) is not LevelMapper or vars(mapper) != vars(inferred)
    if own or any(level != round(level) for level in levels):
        raise ValueError(
            f"{name} has scales {scales} with {describe(mapper)} as map_levels: expected none, or what torchvision "
            "infers, powers of two with a LevelMapper of the pooler's options"
        )


def _check_hooks(name: str, part: nn.Module) -> None:
    for hooks in HOOKS:
        if getattr(part, hooks):
            raise TypeError(
                f"{name} has {hooks.strip('_').replace('_', ' ')}, which would not be called: expected none (hooks of "
                "the model, the backbone, the RPN head, and the box, mask and keypoint heads and predictors are called)"
            )
