"""Two small multimodal data sets that install with the package, and pictures with masks."""

from ._composites import make_composites
from ._loaders import load_emoji, load_openclipart

__all__ = ["load_emoji", "load_openclipart", "make_composites"]
