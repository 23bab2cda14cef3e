"""Operations again and again: is every result the same, bit by bit, whatever else the device is busy with?

    python -m benchmarks.repeats                    # 1,000 times on a GPU, 20 times on a CPU
    python -m benchmarks.repeats --times 50 --json result.json

On a GPU products of matrices of many sizes run beside them on another stream, so that programs do not start in the same
order each time.  The run fails if a result differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import bench_detections, bench_masks
from benchmarks.inputs import PHOTO, SCALES, Pooling, head_outputs, pyramid, random_rois, scored_boxes
from benchmarks.inputs import SMALL as SMALL_PHOTO
from benchmarks.measure import conditions, device_name
from benchmarks.report import markdown
from fastmrcnn import ops
from fastmrcnn.files import write_json

Call = Callable[[], Sequence[Tensor]]


def operations() -> dict[str, Call]:
    """What is repeated, at the sizes of the benchmarks: gradients, suppression, and what else many programs share."""
    on_gpu = device_name() == "cuda"
    size, rois = (PHOTO, 512) if on_gpu else (SMALL_PHOTO, 50)
    found: dict[str, Call] = {}
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
        for bins in (7, 14):
            case = Pooling(2, rois, bins, size)
            label = f"roi_align backward, {case}, {str(dtype).removeprefix('torch.')}"
            found[label] = gradients(ops.multilevel_roi_align, pyramid(case, dtype), random_rois(case), bins, SCALES)
    case = Pooling(2, rois, 7, size)
    found[f"roi_pool backward, {case}"] = gradients(
        ops.roi_pool, pyramid(case, torch.float32)[2], random_rois(case), 7, SCALES[2]
    )
    for clustered in (False, True):
        count, scores = 10_000 if on_gpu else 1_000, "clustered" if clustered else "sparse"
        boxes, values = scored_boxes(count, clustered=clustered)
        groups = torch.arange(count, device=boxes.device) % 20
        found[f"nms, {count:,} boxes, {scores}"] = as_list(ops.nms, boxes, values, 0.5)
        found[f"batched_nms, {count:,} boxes, {scores}"] = as_list(ops.batched_nms, boxes, values, groups, 0.5)
    logits, _ = head_outputs(2, size, torch.float32, clustered=True)
    found[f"topk_anchors, {size[0]}x{size[1]}"] = as_list(ops.topk_anchors, logits, 1000)
    chosen = bench_detections.Case(2, 91, True, 1000 if on_gpu else 200)
    proposals = bench_detections.inputs(chosen, torch.float32)
    counts = torch.full((2,), chosen.proposals, device=device_name())
    sizes = torch.tensor([PHOTO] * 2, device=device_name())
    found[f"detections, {chosen}"] = as_list(ops.select_detections, *proposals, counts, sizes)
    pasted = bench_masks.Case(100 if on_gpu else 5, size)
    found[f"paste, {pasted}"] = as_list(ops.paste_masks, *bench_masks.inputs(pasted), size)
    return found


def as_list(call: Callable[..., Tensor | Sequence[Tensor]], *arguments: object) -> Call:
    """`call` with `arguments`, its result as a list."""

    def run() -> Sequence[Tensor]:
        result = call(*arguments)
        return [result] if isinstance(result, Tensor) else list(result)

    return run


def gradients(pool: Callable[..., Tensor], maps: Tensor | list[Tensor], *arguments: object) -> Call:
    """The gradient of what `pool` makes of `maps`."""
    leaves = [x.requires_grad_() for x in ([maps] if isinstance(maps, Tensor) else maps)]
    pooled = pool(maps, *arguments)
    generator = torch.Generator(pooled.device).manual_seed(1)
    weight = torch.randn(pooled.shape, generator=generator, device=pooled.device).to(pooled.dtype)
    return lambda: torch.autograd.grad(pooled, leaves, weight, retain_graph=True)


class Disturbance:
    """Work on another stream of the GPU, of another length each time; nothing on a CPU."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if device_name() == "cuda" else None
        if self.stream is not None:
            self.matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def __call__(self, number: int) -> None:
        """Begin some of it."""
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                side = 256 * (1 + number * 7 % 16)
                self.matrix[:side] @ self.matrix


def differing(call: Call, times: int, disturb: Callable[[int], None]) -> int:
    """How many of `times` results are not the first one; what is read of the device is one number at the end."""
    expected = [x.clone() for x in call()]
    differs = torch.zeros((), dtype=torch.long, device=expected[0].device)
    for i in range(times):
        disturb(i)
        found = call()
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
        same = [(bits(a) == bits(b)).all() for a, b in zip(found, expected, strict=True)]
        differs += ~torch.stack(same).all()
    return int(differs.item())


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, since NaN is not equal to itself, and -0 is to 0."""
    return x.contiguous().view(-1).view(torch.uint8)


def main() -> None:
    """Repeat, and say what differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1000 if device_name() == "cuda" else 20)
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    disturb = Disturbance()
    found = {
        name: differing(call, options.times, disturb)
        for name, call in tqdm(operations().items(), "operations", disable=None)
    }
    print(markdown(["operation", f"differing of {options.times:,}"], [[name, str(n)] for name, n in found.items()]))
    if options.json:
        write_json(options.json, {"times": options.times, "differing": found, "conditions": conditions()})
    if any(found.values()):
        raise SystemExit("results differ from run to run")


if __name__ == "__main__":
    main()
