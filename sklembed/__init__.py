"""Strong, cheap, trustworthy models from frozen embeddings, in scikit-learn."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sklembed import datasets, evaluation, metrics, plots, scale
    from sklembed._persistence import load, save
    from sklembed.alignment import CanonicalAligner, ModalityGapAligner
    from sklembed.crossmodal import CrossAttentionAdaptor, SharedFusionEncoder
    from sklembed.encoders import (
        CallableBackend,
        EmbeddingStore,
        FrozenEncoder,
        prefetch,
    )
    from sklembed.ensemble import EmbeddingClassifier, EmbeddingRegressor
    from sklembed.finetune import FinetunedClassifier, FinetunedRegressor
    from sklembed.fusion import (
        DecisionFusionClassifier,
        FusionClassifier,
        FusionRegressor,
        KernelFusionClassifier,
        KernelFusionRegressor,
    )
    from sklembed.onnx import to_onnx
    from sklembed.pipeline import multimodal_pipeline
    from sklembed.projection import ContrastiveProjector
    from sklembed.segmentation import PatchSegmenter
    from sklembed.union import PerModalityUnion
    from sklembed.vectorizer import MultimodalVectorizer
    from sklembed.zero_shot import ZeroShotClassifier

__version__ = "0.1.0"
__all__ = [
    "CallableBackend",
    "CanonicalAligner",
    "ContrastiveProjector",
    "CrossAttentionAdaptor",
    "DecisionFusionClassifier",
    "EmbeddingClassifier",
    "EmbeddingRegressor",
    "EmbeddingStore",
    "FinetunedClassifier",
    "FinetunedRegressor",
    "FrozenEncoder",
    "FusionClassifier",
    "FusionRegressor",
    "KernelFusionClassifier",
    "KernelFusionRegressor",
    "ModalityGapAligner",
    "MultimodalVectorizer",
    "PatchSegmenter",
    "PerModalityUnion",
    "SharedFusionEncoder",
    "ZeroShotClassifier",
    "datasets",
    "evaluation",
    "load",
    "metrics",
    "multimodal_pipeline",
    "plots",
    "prefetch",
    "save",
    "scale",
    "to_onnx",
]

# The module of each public name. Names are imported on first use, so that `import sklembed` takes
# milliseconds and code that only unions or loads data does not import torch.
_MODULES = {
    "CallableBackend": "encoders",
    "CanonicalAligner": "alignment",
    "ContrastiveProjector": "projection",
    "CrossAttentionAdaptor": "crossmodal",
    "DecisionFusionClassifier": "fusion",
    "EmbeddingClassifier": "ensemble",
    "EmbeddingRegressor": "ensemble",
    "EmbeddingStore": "encoders",
    "FinetunedClassifier": "finetune",
    "FinetunedRegressor": "finetune",
    "FrozenEncoder": "encoders",
    "FusionClassifier": "fusion",
    "FusionRegressor": "fusion",
    "KernelFusionClassifier": "fusion",
    "KernelFusionRegressor": "fusion",
    "ModalityGapAligner": "alignment",
    "MultimodalVectorizer": "vectorizer",
    "PatchSegmenter": "segmentation",
    "PerModalityUnion": "union",
    "SharedFusionEncoder": "crossmodal",
    "ZeroShotClassifier": "zero_shot",
    "load": "_persistence",
    "multimodal_pipeline": "pipeline",
    "prefetch": "encoders",
    "save": "_persistence",
    "to_onnx": "onnx",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sklembed' has no attribute {name!r}")
    if name not in _MODULES:  # a public module
        return importlib.import_module(f"sklembed.{name}")
    return getattr(importlib.import_module(f"sklembed.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
