"""
========================================================
Quickstart: from a table to a calibrated model in a line
========================================================

Classify clip art by a table of images, titles and numbers. ``multimodal_pipeline``
decides how each column is read, embeds texts and images once with pretrained models,
and averages two calibrated models. Nothing is tuned by hand. The result is compared
with baselines that are tuned by grid search. The last section writes a pipeline by hand
and tunes it.

Run it with ``make demo``. A second run reads all vectors from the store and encodes
nothing.

.. seealso:: :doc:`/user_guide/predict` in the user guide.
"""

# %%
# Load a table of images, texts and numbers
# -----------------------------------------
# Some titles are missing. Creators often drew series, which fall on both sides of a
# random split, so all scores are optimistic. The benchmarks also split by creator.
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    StratifiedShuffleSplit,
    train_test_split,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer, StandardScaler
from sklearn.svm import SVC

from sklembed import (
    ContrastiveProjector,
    FrozenEncoder,
    PerModalityUnion,
    multimodal_pipeline,
)
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm

started = time.perf_counter()
clipart = load_openclipart()
rows = np.random.default_rng(0).permutation(len(clipart.target))[:1800]
X, y = clipart.data.iloc[rows], np.array(clipart.target_names)[clipart.target[rows]]
X_train, X_test, y_train, y_test = train_test_split(
    X, y, test_size=0.3, stratify=y, random_state=0
)
print(f"{len(X_train)} training rows, {len(X_test)} test rows, {len(set(y))} classes")

# %%
# Fit a model in one line
# -----------------------
# The encoders install as packages. Without these arguments, the pipeline loads
# all-MiniLM-L6-v2 and DINOv2-small from the Hugging Face hub.
encoders = {
    "text_encoder": FrozenEncoder(minilm(), verbose=1),
    "image_encoder": FrozenEncoder(efficientnet_lite0(), normalize=True, verbose=1),
}


def rows_encoded():
    """Count the rows that both models have encoded, in all processes."""
    return sum(encoder.stats()["encoded"] for encoder in encoders.values())


encoded_before = rows_encoded()
model = multimodal_pipeline("classifier", **encoders)
model.set_params(embeddingclassifier__random_state=0)
model.fit(X_train, y_train)

# %%
# The first step tells how each column was read, and why.
print(model[0].kinds_.to_string())

# %%
# The last step reports each member: its score out of fold, the mean log-likelihood, and
# the seconds of its fit.
head = model[-1]
print(pd.DataFrame({"score": head.scores_, "seconds": head.seconds_}).round(2))

# %%
# Predictions for new rows have probabilities.
probabilities = pd.DataFrame(model.predict_proba(X_test[:5]), columns=model.classes_)
summary = X_test[:5][["title"]].assign(
    prediction=probabilities.idxmax(axis=1).to_numpy(),
    probability=probabilities.max(axis=1).round(2).to_numpy(),
    truth=y_test[:5],
)
print(summary.to_string(index=False))

# %%
# Compare with tuned baselines
# ----------------------------
# The baselines take the same vectors. Each is tuned by grid search in three folds of
# the training rows. The support vector machine is calibrated on the same folds.
folds = StratifiedKFold(3, shuffle=True, random_state=0)
vectors = make_pipeline(model[0], SimpleImputer(add_indicator=True), StandardScaler())
Z_train, Z_test = vectors.fit_transform(X_train), vectors.transform(X_test)


def tuned(classifier, grid):
    """Return the classifier with the best parameters in three folds."""
    search = GridSearchCV(classifier, grid, cv=folds, n_jobs=2, scoring="f1_macro")
    return search.fit(Z_train, y_train).best_estimator_


def scores_of(name, probabilities, classes, seconds):
    """Return a row of the table of results."""
    predicted = classes[probabilities.argmax(axis=1)]
    return {
        "model": name,
        "macro-F1": f1_score(y_test, predicted, average="macro"),
        "log loss": log_loss(y_test, probabilities, labels=classes),
        "fit s": seconds,
    }


results = [
    scores_of(
        "multimodal_pipeline",
        model.predict_proba(X_test),
        model.classes_,
        sum(head.seconds_.values()),
    )
]
tick = time.perf_counter()
linear = tuned(LogisticRegression(max_iter=1000), {"C": [0.01, 0.1, 1, 10]})
seconds = time.perf_counter() - tick
results.append(
    scores_of(
        "logistic regression", linear.predict_proba(Z_test), linear.classes_, seconds
    )
)
tick = time.perf_counter()
machine = tuned(SVC(), {"C": [10, 100], "gamma": [1e-5, 3e-5, 1e-4]})
calibrated = CalibratedClassifierCV(machine, cv=folds, ensemble=False)
calibrated.fit(Z_train, y_train)
seconds = time.perf_counter() - tick
results.append(
    scores_of(
        "support vector machine",
        calibrated.predict_proba(Z_test),
        calibrated.classes_,
        seconds,
    )
)
table = pd.DataFrame(results)
print(table.round(3).to_string(index=False))

# %%
# Write the pipeline by hand
# --------------------------
# The parts are ordinary scikit-learn estimators. This pipeline has a branch for each
# modality; a small contrastive projection adapts the embeddings of the texts and of the
# images to the classes. A grid search tunes its temperature for the images on a third of
# the training rows. Clones and worker processes share the store, so no cell is encoded
# again.
projector = ContrastiveProjector(64, random_state=0)
branches = [
    ("title", make_pipeline(encoders["text_encoder"], projector), "title"),
    ("image", make_pipeline(encoders["image_encoder"], projector), "image"),
    ("numbers", PowerTransformer(), ["svg_kb", "n_path", "n_group", "n_gradient"]),
]
by_hand = make_pipeline(
    PerModalityUnion(branches),
    SimpleImputer(add_indicator=True),
    LogisticRegression(max_iter=1000),
)
grid = {"permodalityunion__image__contrastiveprojector__temperature": [0.05, 0.1]}
split = StratifiedShuffleSplit(1, test_size=1 / 3, random_state=0)
tick = time.perf_counter()
search = GridSearchCV(by_hand, grid, cv=split, n_jobs=2, scoring="f1_macro")
search.fit(X_train, y_train)
seconds = time.perf_counter() - tick
probabilities = search.predict_proba(X_test)
results.append(scores_of("pipeline by hand", probabilities, search.classes_, seconds))
print(f"best parameters: {search.best_params_}")

# %%
# Plot the scores
# ---------------
table = pd.DataFrame(results)
print(table.round(3).to_string(index=False))
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axes, measure, title in (
    (left, "macro-F1", "macro-F1 (higher is better)"),
    (right, "log loss", "log loss (lower is better)"),
):
    axes.plot(table[measure], table["model"], "o")
    axes.set(title=title)
    axes.grid(axis="x", alpha=0.4)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.2)
    axes.locator_params(axis="x", nbins=5)
right.set_yticklabels([])
figure.savefig("quickstart.png", dpi=120)

print(
    f"\n{rows_encoded() - encoded_before} rows encoded, "
    f"{time.perf_counter() - started:.0f} s in total; figure in quickstart.png"
)
