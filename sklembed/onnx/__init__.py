"""Fitted models as ONNX files, which need neither scikit-learn nor torch."""

from sklembed.onnx.export import to_onnx

__all__ = ["to_onnx"]
