"""Reports on the cost and the benefit of features made of frozen embeddings."""

from sklembed.evaluation.adaptations import (
    AdaptationComparison,
    compare_adaptations,
)
from sklembed.evaluation.cards import model_card
from sklembed.evaluation.efficiency import efficiency_report
from sklembed.evaluation.encoder_ranking import EncoderRanking, rank_encoders
from sklembed.evaluation.few_labels import few_label_curve
from sklembed.evaluation.leaks import LeakReport, leak_report
from sklembed.evaluation.modalities import ModalityReport, modality_report

__all__ = [
    "AdaptationComparison",
    "EncoderRanking",
    "LeakReport",
    "ModalityReport",
    "compare_adaptations",
    "efficiency_report",
    "few_label_curve",
    "leak_report",
    "model_card",
    "modality_report",
    "rank_encoders",
]
