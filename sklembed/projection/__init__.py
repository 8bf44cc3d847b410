"""ContrastiveProjector, and the parts it is made of."""

from sklembed.projection.projector import ContrastiveProjector

__all__ = ["ContrastiveProjector"]
