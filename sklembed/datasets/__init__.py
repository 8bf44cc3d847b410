"""Two small multimodal data sets that install with the package."""

from ._loaders import load_emoji, load_openclipart

__all__ = ["load_emoji", "load_openclipart"]
