"""Classifiers of several modalities: joined within one network, or by their decisions."""

from sklembed.fusion.decision import DecisionFusionClassifier
from sklembed.fusion.neural import EarlyFusionClassifier, LateFusionClassifier

__all__ = ["DecisionFusionClassifier", "EarlyFusionClassifier", "LateFusionClassifier"]
