"""Two small bundled multimodal data sets, and a generator of images with masks."""

from ._composites import make_composites
from ._loaders import load_emoji, load_openclipart

__all__ = ["load_emoji", "load_openclipart", "make_composites"]
