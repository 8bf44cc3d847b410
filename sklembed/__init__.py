"""Strong, cheap, trustworthy classifiers from frozen embeddings, in scikit-learn."""

import importlib

__version__ = "0.1.0"

# Public name -> the module that defines it. Loaded on first use, so that `import sklembed` costs
# milliseconds and who only unions or loads data never pays for torch.
_HOMES = {
    "CallableBackend": "sklembed.encoders",
    "CanonicalAligner": "sklembed.alignment",
    "ContrastiveProjector": "sklembed.projection",
    "CrossAttentionAdaptor": "sklembed.crossmodal",
    "DecisionFusionClassifier": "sklembed.fusion",
    "EmbeddingStore": "sklembed.encoders",
    "FrozenEncoder": "sklembed.encoders",
    "FusionClassifier": "sklembed.fusion",
    "FusionRegressor": "sklembed.fusion",
    "ModalityGapAligner": "sklembed.alignment",
    "PatchSegmenter": "sklembed.segmentation",
    "PerModalityUnion": "sklembed.union",
    "SharedFusionEncoder": "sklembed.crossmodal",
    "ZeroShotClassifier": "sklembed.zero_shot",
    "datasets": "sklembed",
    "evaluation": "sklembed",
    "metrics": "sklembed",
    "plots": "sklembed",
    "prefetch": "sklembed.encoders",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'sklembed' has no attribute {name!r}")
    if _HOMES[name] == "sklembed":  # a module, not a name in one
        return importlib.import_module(f"sklembed.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return [*globals(), *__all__]
