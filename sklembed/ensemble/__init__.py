"""Estimators that average models of different kinds on blocks of embeddings."""

from sklembed.ensemble.estimators import EmbeddingClassifier, EmbeddingRegressor

__all__ = ["EmbeddingClassifier", "EmbeddingRegressor"]
