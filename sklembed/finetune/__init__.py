"""Train a pretrained network for a task, from the head on its frozen vectors."""

from sklembed.finetune.estimators import FinetunedClassifier, FinetunedRegressor

__all__ = ["FinetunedClassifier", "FinetunedRegressor"]
