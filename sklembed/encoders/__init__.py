"""Frozen encoders, and the store of their vectors."""

from sklembed.encoders.backends import CallableBackend
from sklembed.encoders.frozen import FrozenEncoder
from sklembed.encoders.packaged import efficientnet_lite0, minilm
from sklembed.encoders.prefetch import prefetch
from sklembed.encoders.store import EmbeddingStore

__all__ = [
    "CallableBackend",
    "EmbeddingStore",
    "FrozenEncoder",
    "efficientnet_lite0",
    "minilm",
    "prefetch",
]
