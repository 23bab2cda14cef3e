"""Files of matterport/Mask_RCNN: weights by Keras layer, random ones, and how Keras writes them."""

from __future__ import annotations

import math
from pathlib import Path

import h5py
import numpy as np
from checkpoints.foreign_files import BLOCKS

LayerShapes = dict[str, dict[str, tuple[int, ...]]]
Weights = dict[str, dict[str, np.ndarray]]

NORM = ("gamma", "beta", "moving_mean", "moving_variance")
RPN = ("rpn_conv_shared", "rpn_class_raw", "rpn_bbox_pred")


def matterport_shapes(depth: str = "50", classes: int = 81) -> LayerShapes:
    """Weights of each Keras layer: kernels are HWIO, (H, W, out, in) of the deconvolution, (in, out) of dense layers.

    Args:
        depth: of the ResNet.
        classes: with the background.
    """
    kernels: dict[str, tuple[int, ...]] = {"conv1": (7, 7, 3, 64)}
    norms = {"bn_conv1": 64}
    for stage, blocks in zip((2, 3, 4, 5), BLOCKS[depth], strict=True):
        inside, out = 16 * 2**stage, 64 * 2**stage
        for i in range(blocks):
            before = out if i else (64 if stage == 2 else out // 2)
            branches: dict[str, tuple[int, ...]] = {
                "2a": (1, 1, before, inside),
                "2b": (3, 3, inside, inside),
                "2c": (1, 1, inside, out),
            }
            if i == 0:
                branches["1"] = (1, 1, before, out)
            for branch, kernel in branches.items():
                name = f"{stage}{chr(ord('a') + i)}_branch{branch}"
                kernels[f"res{name}"], norms[f"bn{name}"] = kernel, kernel[-1]
    for level in (5, 4, 3, 2):
        kernels[f"fpn_c{level}p{level}"] = (1, 1, 64 * 2**level, 256)
        kernels[f"fpn_p{level}"] = (3, 3, 256, 256)
    kernels["rpn_conv_shared"] = (3, 3, 256, 512)
    kernels["rpn_class_raw"] = (1, 1, 512, 6)
    kernels["rpn_bbox_pred"] = (1, 1, 512, 12)
    kernels["mrcnn_class_conv1"] = (7, 7, 256, 1024)
    kernels["mrcnn_class_conv2"] = (1, 1, 1024, 1024)
    kernels["mrcnn_class_logits"] = (1024, classes)
    kernels["mrcnn_bbox_fc"] = (1024, 4 * classes)
    for i in (1, 2, 3, 4):
        kernels[f"mrcnn_mask_conv{i}"] = (3, 3, 256, 256)
        norms[f"mrcnn_mask_bn{i}"] = 256
    kernels["mrcnn_mask_deconv"] = (2, 2, 256, 256)
    kernels["mrcnn_mask"] = (1, 1, 256, classes)
    norms |= {"mrcnn_class_bn1": 1024, "mrcnn_class_bn2": 1024}
    shapes: LayerShapes = {}
    for name, shape in kernels.items():
        shapes[name] = {"kernel": shape, "bias": shape[2:3] if name == "mrcnn_mask_deconv" else shape[-1:]}
    for name, channels in norms.items():
        shapes[name] = dict.fromkeys(NORM, (channels,))
    return shapes


def random_weights(shapes: LayerShapes, seed: int = 0) -> Weights:
    """Values with which activations stay moderate; the first norm makes up for images in bytes, less their mean."""
    generator = np.random.default_rng(seed)
    last = {"rpn_class_raw": 0.2, "rpn_bbox_pred": 0.2, "mrcnn_class_logits": 0.25, "mrcnn_bbox_fc": 0.2}
    weights: Weights = {}
    for layer, parts in shapes.items():
        first = layer == "bn_conv1"
        weights[layer] = {}
        for part, shape in parts.items():
            values = generator.standard_normal(shape)
            if part == "kernel":
                inputs = shape[-1] if layer == "mrcnn_mask_deconv" else math.prod(shape[:-1])
                followed_by_relu = not layer.startswith("fpn_")
                values *= last.get(layer, 1.0) * math.sqrt((2 if followed_by_relu else 1) / inputs)
            elif part == "gamma":
                values = (0.01 if first else 0.3 if layer.endswith("branch2c") else 1.0) * (1 + 0.1 * values)
            elif part == "moving_variance":
                values = 0.9 + 0.2 * np.abs(values)
            elif part == "moving_mean":
                values *= 20.0 if first else 0.2
            else:
                values *= 0.1
            weights[layer][part] = values.astype(np.float32)
    return weights


def write_h5(path: str | Path, weights: Weights, *, as_model: bool = False) -> None:
    """A file as of Keras 2's `save_weights`, or of `save` with `as_model`."""
    groups: dict[str, list[str]] = {"input_image": [], "zero_padding2d_1": []}
    for layer in weights:
        if layer in RPN:
            groups.setdefault("rpn_model", []).append(layer)
        else:
            groups[layer] = [layer]
    groups |= {"activation_1": [], "fpn_p6": [], "input_anchors": [], "ROI": [], "mrcnn_detection": []}
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if as_model else file
        root.attrs["layer_names"] = np.array([name.encode() for name in groups])
        root.attrs["backend"], root.attrs["keras_version"] = b"tensorflow", b"2.1.6"
        if as_model:
            file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.1.6"
        for group, layers in groups.items():
            names = [f"{layer}/{part}:0" for layer in layers for part in weights[layer]]
            where = root.create_group(group)
            # without names the array is empty, and of float64, as Keras writes it
            where.attrs["weight_names"] = np.array([name.encode() for name in names])
            for layer in layers:
                for part, values in weights[layer].items():
                    where.create_dataset(f"{layer}/{part}:0", data=np.asarray(values, dtype=np.float32))
