"""Top-k whose ties go to the lower index, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of `scores` [..., M] in descending order: values and int64 indices, both [..., k].

    Among equal scores the lower index comes first (`torch.topk` leaves that open); NaN counts as -inf.  Score (as
    float32) and index are packed into one int64 whose order is the wanted one: the bits of a float, with the sign
    turned into two's complement, sort as the float does.  A float64 has no room for that and is sorted.
    """
    number = torch.where(scores.isnan(), -torch.inf, scores) + 0.0  # -0.0 + 0.0 is 0.0: one zero, one key
    if number.dtype == torch.float64:
        indices = number.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return scores.gather(-1, indices), indices
    bits = number.float().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    position = torch.arange(scores.shape[-1], device=scores.device)
    indices = ((ordered << 32) - position).topk(k, dim=-1).indices
    return scores.gather(-1, indices), indices
