"""How RoIAlign samples a RoI."""

from __future__ import annotations

from typing import NamedTuple


class Sampler(NamedTuple):
    """The constants that a RoIAlign kernel is compiled for, beside its shapes.

    Attributes:
        sampling_ratio: samples per bin and axis; not positive: ceil(RoI extent / bins).
        aligned: boxes are shifted by half a cell.
        bicubic: interpolates bicubically, not bilinearly.
        corner: one sample per bin, the first and last at the corners of the box.
    """

    sampling_ratio: int
    aligned: bool
    bicubic: bool = False
    corner: bool = False
