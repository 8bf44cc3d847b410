"""
===============================
Find out which modality matters
===============================

Two questions have different answers. What would be lost without a modality, if the model
were fitted again? And what happens to the fitted model if the modality is noisy or
missing later? :func:`~sklembed.evaluation.modality_report` answers both.

.. seealso:: :doc:`/user_guide/evaluate` in the user guide.
"""

# %%
# Report on a pipeline
# --------------------
# Clip art in 14 classes, with an image, a title and four numbers of the drawing. The
# estimator is fitted on each subset of the modalities, in each of three folds.
import matplotlib.pyplot as plt
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer

from sklembed import FrozenEncoder, PerModalityUnion
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.evaluation import modality_report
from sklembed.plots import ModalityDisplay

clip_art = load_openclipart()
table, y = clip_art.data.iloc[:1500], clip_art.target.iloc[:1500]
creators = clip_art.groups[:1500]
numbers = ["svg_kb", "n_path", "n_group", "n_gradient"]
union = PerModalityUnion(
    [
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
        ("title", FrozenEncoder(minilm()), "title"),
        ("numbers", QuantileTransformer(n_quantiles=100), numbers),
    ]
)
model = make_pipeline(union, SimpleImputer(), LogisticRegression(C=10, max_iter=1000))
report = modality_report(
    model,
    table,
    y,
    cv=StratifiedGroupKFold(3, shuffle=True, random_state=0),
    groups=creators,
    scoring="f1_macro",
    random_state=0,
)

# %%
# What would be lost
# ------------------
# The score of each subset, and the Shapley values, which divide the gain over a constant
# prediction among the modalities. In each fold they sum to the score of all modalities
# less that of none.
subsets = report.subsets.groupby("modalities", sort=False)["score"]
print(subsets.agg(["mean", "std"]).round(3).to_string())
values = report.shapley.groupby("modality", sort=False)["value"]
print(values.agg(["mean", "std"]).round(3).to_string())

# %%
# What happens later
# ------------------
# In the third panel, the model that was fitted on all modalities predicts for rows in
# which one modality is degraded. It may lose more than a model without this modality.
ModalityDisplay.from_report(report).plot()
plt.show()
