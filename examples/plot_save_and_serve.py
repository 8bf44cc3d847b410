"""
=========================
Save a model and serve it
=========================

A fitted pipeline is written to a directory without code, loaded in a process without
torch and without the checkpoint, and exported to ONNX. The last sections measure how
long one row takes in each way.

.. seealso:: :doc:`/user_guide/serve` in the user guide.
"""

# %%
# Fit a pipeline
# --------------
# The encoders are frozen, so a file of the model has none of their weights. The
# checkpoint of the text encoder is copied here, to delete it later.
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import pandas as pd
import skops.io
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer, StandardScaler

import sklembed
from sklembed import (
    EmbeddingClassifier,
    FrozenEncoder,
    PerModalityUnion,
    multimodal_pipeline,
)
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm

clipart = load_openclipart()
rows = np.random.default_rng(0).permutation(len(clipart.data))
train, new = rows[:800], rows[800:860]
directory = Path(tempfile.mkdtemp())
checkpoint = str(shutil.copytree(minilm(), directory / "checkpoint"))
X, y = clipart.data, np.array(clipart.target_names)[clipart.target]
model = multimodal_pipeline(
    EmbeddingClassifier(random_state=0),
    text_encoder=FrozenEncoder(checkpoint),
    image_encoder=FrozenEncoder(efficientnet_lite0(), normalize=True),
)
model.fit(X.iloc[train], y[train])
print(f"accuracy on new rows: {model.score(X.iloc[new], y[new]):.2f}")

# %%
# Save without code
# -----------------
# A pickle runs the code that it contains. :func:`sklembed.save` writes arrays and JSON,
# and :func:`sklembed.load` builds classes of a fixed list of packages only. skops also
# refuses unknown classes, and you pass those that you trust.
expected = model.predict_proba(X.iloc[new])


def kilobytes(path):
    """Return the size of a file, or of the files in a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1000


def load_skops(path):
    """Load a file of skops that has classes of trusted packages only."""
    unknown = skops.io.get_untrusted_types(file=path)
    trusted = [name for name in unknown if name.startswith(("sklembed.", "skrub."))]
    return skops.io.load(path, trusted=trusted)


formats = {
    "sklembed": (sklembed.save, sklembed.load, directory / "model"),
    "skops": (skops.io.dump, load_skops, directory / "model.skops"),
    "pickle": (joblib.dump, joblib.load, directory / "model.joblib"),
}
records = []
for name, (save, load, path) in formats.items():
    tick = time.perf_counter()
    save(model, path)
    saved = time.perf_counter()
    loaded = load(path)
    seconds = saved - tick, time.perf_counter() - saved
    difference = np.abs(loaded.predict_proba(X.iloc[new]) - expected).max()
    records.append((name, kilobytes(path), *seconds, difference))
columns = ["format", "kB", "save s", "load s", "largest difference"]
print(pd.DataFrame(records, columns=columns).round(2).to_string(index=False))

# %%
# Predict known rows without the checkpoint
# -----------------------------------------
# The model has predicted these rows before, so the vectors of their cells are in the
# store. A new process then needs neither the checkpoint nor torch. A new text would
# raise an error that names the absent directory.
shutil.rmtree(checkpoint)
program = f"""
import sys
import sklembed
from sklembed.datasets import load_openclipart

model = sklembed.load({str(directory / "model")!r})
row = load_openclipart().data.iloc[[{new[0]}]]
print(row["title"].iloc[0], "->", model.predict(row)[0])
print("torch imported:", "torch" in sys.modules)
"""
process = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
)
print(process.stdout, process.stderr)

# %%
# Export to ONNX
# --------------
# :func:`~sklembed.to_onnx` writes everything after the encoders, here both members of
# the classifier and their calibration. The graph is compared with the model before the
# file is written. Its input is the output of the first step.
sklembed.to_onnx(model, directory / "model.onnx")
session = onnxruntime.InferenceSession(directory / "model.onnx")
vectors = model[0].transform(X.iloc[new]).to_numpy(np.float32)
label, probabilities = session.run(["label", "probabilities"], {"X": vectors})
print(f"{kilobytes(directory / 'model.onnx'):.0f} kB, input {vectors.shape}")
print(
    f"largest difference of probabilities: {np.abs(probabilities - expected).max():.1e}"
)

# %%
# Write a faster pipeline by hand
# -------------------------------
# A table of one row costs as much to check and to read as a small table. This pipeline
# names its columns and has a linear classifier, which leaves less to do for each row.
# Compare its accuracy, too.
texts, images = model[0].text_encoder, model[0].image_encoder
texts.set_params(model=minilm())  # the same checkpoint in another directory
numbers = ["svg_kb", "n_path", "n_group", "n_gradient"]
by_hand = make_pipeline(
    PerModalityUnion(
        [
            ("title", texts, "title"),
            ("image", images, "image"),
            ("numbers", PowerTransformer(), numbers),
        ]
    ),
    SimpleImputer(add_indicator=True),
    StandardScaler(),
    LogisticRegression(C=0.01, max_iter=1000),
)
by_hand.fit(X.iloc[train], y[train])
print(f"accuracy on new rows: {by_hand.score(X.iloc[new], y[new]):.2f}")

# %%
# Measure the latency of one row
# ------------------------------
# A service predicts one row at a time. A new row waits for the networks, which
# ``store=None`` enforces here. A known row waits for the store. The calls of the
# classifier receive the vectors.
fresh = sklembed.load(directory / "model")
fresh.set_params(
    multimodalvectorizer__text_encoder__model=minilm(),
    multimodalvectorizer__text_encoder__store=None,
    multimodalvectorizer__image_encoder__store=None,
)
named_vectors = model[0].transform(X.iloc[new])
calls = {
    "new row": lambda i: fresh.predict_proba(X.iloc[[new[i]]]),
    "known row": lambda i: model.predict_proba(X.iloc[[new[i]]]),
    "known row,\nby hand": lambda i: by_hand.predict_proba(X.iloc[[new[i]]]),
    "classifier": lambda i: model[-1].predict_proba(named_vectors.iloc[[i]]),
    "classifier,\nONNX": lambda i: session.run(["probabilities"], {"X": vectors[[i]]}),
}
milliseconds = {}
for name, call in calls.items():
    call(0)  # loads the networks
    milliseconds[name] = []
    for i in range(len(new)):
        tick = time.perf_counter()
        call(i)
        milliseconds[name].append(1000 * (time.perf_counter() - tick))
latency = pd.DataFrame(milliseconds)
summary = latency.quantile([0.5, 0.95]).T.set_axis(["median ms", "95 % ms"], axis=1)
summary.index = summary.index.str.replace("\n", " ")
print(summary.round(1).to_string())

# %%
# Plot the distribution
# ---------------------
# The axis is logarithmic. Bars are medians. Choose by your rows: networks dominate new
# rows, so a faster classifier hardly helps there. ONNX pays where another process
# computes the vectors, or where the service has no Python packages.
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
colors = ["#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#009E73"]
generator = np.random.default_rng(0)
for position, (name, color) in enumerate(zip(latency, colors, strict=True)):
    height = position + generator.uniform(-0.22, 0.22, len(latency))
    axes.plot(latency[name], height, "o", color=color, ms=5, alpha=0.5)
    median = latency[name].median()
    axes.plot([median, median], [position - 0.3, position + 0.3], color="black", lw=2)
    axes.annotate(
        f"{median:.3g} ms", (median, position - 0.32), ha="center", fontsize=12
    )
axes.set_yticks(range(len(calls)), calls, fontsize=13)
axes.set_xscale("log")
ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500]
axes.set_xticks(ticks, ticks, fontsize=12)
axes.set_xticks([], minor=True)
axes.set_xlim(0.7 * latency.min().min(), 1.4 * latency.max().max())
axes.set_ylim(len(calls) - 0.5, -0.7)
axes.set_xlabel("latency of one row (ms)", fontsize=13)
axes.set_title("Latency of a prediction, and its median", fontsize=13)
axes.grid(axis="x", alpha=0.3)
plt.show()
