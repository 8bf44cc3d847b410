"""
==========================================
Use the encoders in skrub and scikit-learn
==========================================

You have a pipeline with skrub or a ``ColumnTransformer`` already. A
:class:`~sklembed.FrozenEncoder` is a transformer of one column, so it fits into either,
and into the DataOps of skrub. This example builds the same model in several ways,
and compares scores and effort.

.. seealso:: :doc:`/user_guide/interoperate` in the user guide.
"""

# %%
# Load a table
# ------------
# Clip art has a title, an image and four numbers. Titles have capital letters, and some
# are missing. Creators drew series, so all drawings of a creator are in the same fold.
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import skrub
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer, StandardScaler

from sklembed import EmbeddingClassifier, FrozenEncoder, multimodal_pipeline
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm

clipart = load_openclipart()
rows = np.random.default_rng(0).permutation(len(clipart.data))[:700]
X, groups = clipart.data.iloc[rows], clipart.groups[rows]
y = np.array(clipart.target_names)[clipart.target.iloc[rows]]
folds = list(GroupKFold(3, shuffle=True, random_state=0).split(X, y, groups))
text = FrozenEncoder(minilm())
image = FrozenEncoder(efficientnet_lite0(), normalize=True)
numbers = ["svg_kb", "n_path", "n_group", "n_gradient"]
classifier = LogisticRegression(max_iter=1000)

# %%
# Start from skrub alone
# ----------------------
# ``tabular_pipeline`` chooses the preprocessing for the classifier, here with its
# ``StringEncoder``, which counts parts of words. It has no encoder of images, so the
# column is dropped.
models = {
    "skrub alone": make_pipeline(
        skrub.DropCols("image"), skrub.tabular_pipeline(classifier)
    )
}

# %%
# Add a frozen encoder to skrub
# -----------------------------
# ``high_cardinality`` is the transformer of texts in ``TableVectorizer``. The other
# steps of the pipeline stay. ``tabular_pipeline`` returns a pipeline, whose parameters
# are set as usual.
with_text = skrub.tabular_pipeline(classifier)
with_text.set_params(tablevectorizer__high_cardinality=text)
models["skrub, text"] = make_pipeline(skrub.DropCols("image"), with_text)

# %%
# For images, name the column in ``specific_transformers``. The scaler of skrub squashes
# the outliers of numbers, and embeddings are usually standardised instead. The scaler
# is a step like any other, so compare both.
with_image = skrub.tabular_pipeline(classifier)
with_image.set_params(
    tablevectorizer__high_cardinality=text,
    tablevectorizer__specific_transformers=[(image, ["image"])],
)
models["skrub, text and image"] = with_image
rescaled = clone(with_image).set_params(squashingscaler=StandardScaler())
models["skrub, StandardScaler"] = rescaled

# %%
# Write a ColumnTransformer
# -------------------------
# Each column has its transformer. A missing title is a row of NaN, so an imputer
# follows.
columns = make_column_transformer(
    (text, ["title"]), (image, ["image"]), (PowerTransformer(), numbers)
)
models["ColumnTransformer"] = make_pipeline(
    columns, SimpleImputer(add_indicator=True), StandardScaler(), classifier
)

# %%
# Let sklembed read the table
# ---------------------------
# This pipeline decides by itself how columns are read, and ends in the classifier of
# sklembed, which averages two models. It is the shortest, and its last step can be any
# classifier.
models["multimodal_pipeline"] = multimodal_pipeline(
    EmbeddingClassifier(random_state=0), text_encoder=text, image_encoder=image
)

# %%
# Use the DataOps of skrub
# ------------------------
# A plan of DataOps starts from variables instead of a pipeline. The encoders apply to
# columns of its tables, and the plan is cross-validated as a whole.
table, labels = skrub.X(X), skrub.y(y)
plan = (
    table.skb.apply(text, cols="title")
    .skb.apply(image, cols="image")
    .skb.apply(SimpleImputer(add_indicator=True))
    .skb.apply(StandardScaler())
    .skb.apply(classifier, y=labels)
)

# %%
# Compare
# -------
# All models use the same folds. Vectors are stored by the first model that needs them,
# and later models only read them. ``multimodal_pipeline`` chooses its settings on the
# training rows, so its fit takes longer than that of a logistic regression.
settings = {"cv": folds, "scoring": "f1_macro"}
results = {
    name: cross_validate(model, X, y, **settings) for name, model in models.items()
}
results["skrub DataOps"] = plan.skb.cross_validate(**settings)
scores = pd.DataFrame({name: result["test_score"] for name, result in results.items()})
summary = pd.DataFrame(
    {
        "macro-F1": scores.mean(),
        "spread": scores.std(),
        "fit s": {name: result["fit_time"].mean() for name, result in results.items()},
        "score s": {
            name: result["score_time"].mean() for name, result in results.items()
        },
    }
)
print(summary.round(3).to_string())

# %%
# Plot the scores
# ---------------
# Small points are folds, which contain different creators. The models with text and
# image have the same vectors. They differ in the scaler and the classifier.
order = summary["macro-F1"].sort_values().index
figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
axes.barh(order, summary["macro-F1"][order], color="#56B4E9")
for name in order:
    axes.plot(scores[name], [name] * len(scores), "o", color="black", ms=5, alpha=0.6)
axes.set_xlabel("macro-F1 on new creators (bar: mean, points: folds)", fontsize=12)
axes.set_title("The same table in skrub and scikit-learn", fontsize=13)
axes.tick_params(axis="y", labelsize=12)
axes.grid(axis="x", alpha=0.4)
axes.set_axisbelow(True)
plt.show()
