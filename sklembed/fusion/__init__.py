"""Estimators of several modalities: one network on all, or one classifier for each."""

from sklembed.fusion.decision import DecisionFusionClassifier
from sklembed.fusion.neural import FusionClassifier, FusionRegressor

__all__ = ["DecisionFusionClassifier", "FusionClassifier", "FusionRegressor"]
