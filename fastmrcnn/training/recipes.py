"""Published ways to train, and one for small data: what a recipe says, as the options of a run.

Each is a starting point: options given beside it override its values.  Learning rates are for `lr_batch` images per
step and are scaled to those of the run; runs given in steps are stretched likewise (see `optim.py`).  In all of them
norms and biases do not decay, and batches are of images of similar aspect ratio where the recipe asks for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastmrcnn.models.config import ModelConfig
from fastmrcnn.training.config import AugmentConfig, DataConfig, OptimConfig, TrainConfig


def torchvision_1x(data: DataConfig) -> TrainConfig:
    """torchvision's references for Mask R-CNN: 26 epochs on 8 GPUs of 2 images, the shorter side 800 pixels.

    Source: references/detection of torchvision, `train.py --model maskrcnn_resnet50_fpn --epochs 26 --lr-steps 16 22
    --aspect-ratio-group-factor 3` and its defaults, which gave the weights COCO_V1 (box AP 37.9, mask AP 34.6).  There
    norms and biases decay, too.
    """
    return TrainConfig(
        data=replace(data, aspect_groups=3),
        model=ModelConfig("maskrcnn_resnet50_fpn", weights_backbone="IMAGENET1K_V1", trainable_backbone_layers=3),
        augment=AugmentConfig(flip=0.5),
        optim=OptimConfig(
            lr=0.02, lr_batch=16, momentum=0.9, weight_decay=1e-4, warmup_steps=1000, milestones=[16, 22], gamma=0.1
        ),
        epochs=26,
        batch_size=2,
    )


def detectron2_1x(data: DataConfig) -> TrainConfig:
    """detectron2's baseline Mask R-CNN R50-FPN: 90,000 steps of 16 images, of shorter sides 640 to 800 pixels.

    Source: detectron2's configs/Base-RCNN-FPN.yaml, mask_rcnn_R_50_FPN_1x.yaml and config/defaults.py.  The schedule is
    its own, the network torchvision's: RoIAlign is not aligned by half a pixel and takes 2 x 2 samples per bin, box
    losses are smooth L1, 2,000 proposals per image are trained on instead of 1,000, and the backbone's weights are
    torchvision's, of which the stem and the first stage do not learn.  There biases decay, too.
    """
    return _detectron2(data, 90_000, [60_000, 80_000])


def detectron2_3x(data: DataConfig) -> TrainConfig:
    """detectron2's longer baseline: 270,000 steps of 16 images, otherwise as detectron2_1x.

    Source: mask_rcnn_R_50_FPN_3x.yaml.  What differs is as for `detectron2_1x`.
    """
    return _detectron2(data, 270_000, [210_000, 250_000])


def _detectron2(data: DataConfig, steps: int, milestones: list[int]) -> TrainConfig:
    return TrainConfig(
        data=replace(data, aspect_groups=1),  # wide ones and high ones
        model=ModelConfig(
            "maskrcnn_resnet50_fpn",
            weights_backbone="IMAGENET1K_V1",
            trainable_backbone_layers=3,
            min_size=800,
            max_size=1333,
        ),
        augment=AugmentConfig(flip=0.5, min_sizes=[640, 672, 704, 736, 768, 800]),
        optim=OptimConfig(
            lr=0.02, lr_batch=16, momentum=0.9, weight_decay=1e-4, warmup_steps=1000, milestones=milestones, gamma=0.1
        ),
        steps=steps,
        batch_size=2,
    )


def lsj(data: DataConfig) -> TrainConfig:
    """torchvision's improved Mask R-CNN: from scratch, 400 epochs of large-scale jitter on 32 GPUs of 2 images.

    Source: pytorch/vision pull request 5773, which trained maskrcnn_resnet50_fpn_v2 (box AP 47.4, mask AP 41.8), after
    Ghiasi et al., 2021.  There the batch norms of the heads are synchronised, too; here they leave out unused samples,
    and take their statistics per process.  Norms and biases decay there.
    """
    return TrainConfig(
        data=replace(data, aspect_groups=0),  # crops are square
        model=ModelConfig("maskrcnn_resnet50_fpn_v2", norm="sync"),
        augment=AugmentConfig(flip=0.5, jitter=1024, jitter_range=(0.1, 2.0)),
        optim=OptimConfig(
            lr=0.1, lr_batch=64, momentum=0.9, weight_decay=4e-5, warmup_steps=1000, milestones=[352, 384], gamma=0.1
        ),
        epochs=400,
        batch_size=2,
    )


def paper(data: DataConfig) -> TrainConfig:
    """He et al., 2017: 160,000 steps of 16 images, the shorter side 800 pixels.

    Source: Mask R-CNN, section 3.1.  It says nothing of a warm-up, of flips, of a bound of the longer side and of which
    layers learn; here these are as in its successors.  The network is torchvision's ResNet-50 and FPN.
    """
    return TrainConfig(
        data=replace(data, aspect_groups=1),
        model=ModelConfig(
            "maskrcnn_resnet50_fpn",
            weights_backbone="IMAGENET1K_V1",
            trainable_backbone_layers=3,
            min_size=800,
            max_size=1333,
        ),
        augment=AugmentConfig(flip=0.5),
        optim=OptimConfig(
            lr=0.02, lr_batch=16, momentum=0.9, weight_decay=1e-4, warmup_steps=500, milestones=[120_000], gamma=0.1
        ),
        steps=160_000,
        batch_size=2,
    )


def small(data: DataConfig) -> TrainConfig:
    """Fine-tuning of COCO's weights on few images with one GPU: 3,000 steps of 4 images.

    Of nobody's publication: the learning rate is that of the other recipes for 4 images, it falls as a cosine, colours
    and sizes vary, since there are few images, and what is evaluated and kept is an average of the weights.
    """
    return TrainConfig(
        data=replace(data, aspect_groups=1),
        model=ModelConfig("maskrcnn_resnet50_fpn", weights="DEFAULT", trainable_backbone_layers=3),
        augment=AugmentConfig(flip=0.5, min_sizes=[640, 672, 704, 736, 768, 800], colour=0.5),
        optim=OptimConfig(
            lr=0.005, lr_batch=4, weight_decay=1e-4, warmup_steps=200, schedule="cosine", milestones=[], ema=0.999
        ),
        steps=3000,
        batch_size=4,
        evaluate_every=5,
    )


RECIPES: dict[str, Callable[[DataConfig], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (torchvision_1x, detectron2_1x, detectron2_3x, lsj, paper, small)
}
