"""Estimators of several modalities: one network, kernels, or a classifier for each."""

from sklembed.fusion.decision import DecisionFusionClassifier
from sklembed.fusion.kernel import KernelFusionClassifier, KernelFusionRegressor
from sklembed.fusion.neural import FusionClassifier, FusionRegressor

__all__ = [
    "DecisionFusionClassifier",
    "FusionClassifier",
    "FusionRegressor",
    "KernelFusionClassifier",
    "KernelFusionRegressor",
]
