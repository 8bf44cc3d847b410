"""Encode datasets on several machines; the only package that imports ray."""

from sklembed.scale.dataset import EncodingSummary, encode_dataset
from sklembed.scale.shards import export_vectors, import_vectors

__all__ = ["EncodingSummary", "encode_dataset", "export_vectors", "import_vectors"]
