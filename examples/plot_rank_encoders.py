"""
===================================
Choose an encoder by score and cost
===================================

Would another encoder, layer or pooling help, and what would it cost?
:func:`~sklembed.evaluation.rank_encoders` compares frozen encoders by successive halving:
all of them encode a small subsample, and only the best encode more rows. The model on the
vectors is a ridge regression in closed form, so that encoding takes most of the time.

.. seealso:: :doc:`/user_guide/evaluate` in the user guide.
"""

# %%
# List the candidates
# -------------------
# The task is the class of emoji. The candidates read the name or the image. Layers and
# poolings of one network share its passes.
import tempfile

import matplotlib.pyplot as plt
import numpy as np

from sklembed import FrozenEncoder
from sklembed.datasets import load_emoji
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.evaluation import rank_encoders

emoji = load_emoji()
rows = np.random.default_rng(0).permutation(len(emoji.data))[:1200]
table, y = emoji.data.iloc[rows], emoji.target.to_numpy()[rows]

folder = tempfile.TemporaryDirectory()
store = f"{folder.name}/vectors.sqlite"  # empty, so that all costs are measured
encoders = {
    "name: layer 2": (FrozenEncoder(minilm(), layer=2, store=store), "name"),
    "name: layer 4": (FrozenEncoder(minilm(), layer=4, store=store), "name"),
    "name: last layer": (FrozenEncoder(minilm(), store=store), "name"),
    "name: last layer, cls": (
        FrozenEncoder(minilm(), pooling="cls", store=store),
        "name",
    ),
    "keywords: last layer": (FrozenEncoder(minilm(), store=store), "keywords"),
    "image: EfficientNet": (
        FrozenEncoder(efficientnet_lite0(), normalize=True, store=store),
        "image",
    ),
}
results, best = rank_encoders(
    encoders, table, y, scoring="f1_macro", max_resources=0.8, random_state=0
)
columns = ["rung", "encoder", "rows", "score", "sd", "s per 1000 rows", "dropped at"]
print(results[columns].round(3).to_string(index=False))
print(f"best: {best}")

# %%
# Plot the rungs
# --------------
# A line ends where its encoder was dropped: no more rows were encoded for it. The
# right panel has the score of the last rung of each encoder and its cost.
colors = dict(
    zip(
        encoders,
        ("#56B4E9", "#0072B2", "#000000", "#E69F00", "#009E73", "#D55E00"),
        strict=True,
    )
)
figure, (rungs, costs) = plt.subplots(1, 2, figsize=(8.5, 4.4), layout="constrained")
for name, color in colors.items():
    ranked = results[results["encoder"] == name].sort_values("rows")
    rungs.errorbar(
        ranked["rows"],
        ranked["score"],
        ranked["sd"],
        color=color,
        marker="o",
        capsize=3,
        label=name,
    )
    last = ranked.iloc[-1]
    costs.scatter(ranked["s per 1000 rows"].max(), last["score"], s=70, color=color)
rungs.set(
    title="score in each rung",
    xscale="log",
    xlabel="rows",
    ylabel="macro-F1 (mean and sd over folds)",
)
rungs.set_xticks(results["rows"].unique(), results["rows"].unique())
rungs.minorticks_off()
rungs.legend(fontsize="small")
costs.set(
    title="score and cost",
    xscale="log",
    xlabel="seconds to encode 1,000 rows",
    ylabel="macro-F1 in the last rung of the encoder",
)
plt.show()
folder.cleanup()
