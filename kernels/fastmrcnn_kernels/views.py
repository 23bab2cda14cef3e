"""How images and masks in memory are seen by the network: resized, and through a window.

A view is a row of eight int64.  The image of `height` x `width` pixels is resized to `resized_height` x
`resized_width`; of that the network sees the window of `window_height` x `window_width` pixels whose top left corner is
at (`top`, `left`), and it lies in the top left corner of the image's canvas.  Pixel (y, x) of the window is pixel
(top + y, left + x) of the resized image, which

- for images is interpolated bilinearly, at ((top + y + 0.5) height / resized_height - 0.5) and the like, within 0 and
  the last pixel: `torch.nn.functional.interpolate`, `align_corners=False`;
- for masks is the pixel floor((top + y) height / resized_height) and the like: `mode="nearest"`.

The ratio height / resized_height is a float32, and so is what is computed from it, as PyTorch has it.
"""

from __future__ import annotations

HEIGHT, WIDTH, RESIZED_HEIGHT, RESIZED_WIDTH, TOP, LEFT, WINDOW_HEIGHT, WINDOW_WIDTH = range(8)
COLUMNS = 8


def whole(height: int, width: int, resized_height: int, resized_width: int) -> tuple[int, ...]:
    """The view of all of an image, resized."""
    return (height, width, resized_height, resized_width, 0, 0, resized_height, resized_width)
