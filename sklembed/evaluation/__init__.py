"""Reports on the cost and the benefit of features made of frozen embeddings."""

from sklembed.evaluation.efficiency import efficiency_report
from sklembed.evaluation.few_labels import few_label_curve

__all__ = ["efficiency_report", "few_label_curve"]
