"""
===========================
Decide whether to fine-tune
===========================

A classifier on frozen vectors, a projection, an ensemble, or training the network itself:
the best choice depends on the task, and costs differ by orders of magnitude.
:func:`~sklembed.evaluation.compare_adaptations` fits each of them in the same folds, tests the
differences, and measures seconds and memory.

.. seealso:: :doc:`/user_guide/finetune` in the user guide.
"""

# %%
# Name the candidates
# -------------------
# Classify the names of 600 emoji by their group. "lora" trains low-rank adapters in all layers of
# the text encoder. Its head starts at the logistic regression of "head". One epoch keeps this
# example short.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from sklembed import FinetunedClassifier, FrozenEncoder
from sklembed.datasets import load_emoji
from sklembed.encoders import minilm
from sklembed.evaluation import compare_adaptations
from sklembed.plots import AdaptationDisplay

emoji = load_emoji()
chosen = np.random.default_rng(0).permutation(len(emoji.data))[:600]
table = emoji.data[["name"]].iloc[chosen]
y = emoji.target.to_numpy()[chosen]
encoder = FrozenEncoder(minilm())
lora = FinetunedClassifier(encoder, method="lora", max_epochs=1, random_state=0)

# %%
# Compare them
# ------------
# The first adaptation is the reference of the paired differences. With ``path``, the
# results are written to a file, and an interrupted comparison is resumed.
comparison = compare_adaptations(
    table,
    y,
    features=encoder,
    adaptations={
        "none": "none",
        "PCA": "pca",
        "projection": "one projection",
        "ensemble": "ensemble",
        "head": "head",
        "LoRA": lora,
    },
    estimators={
        "logistic regression": LogisticRegression(C=10, max_iter=1000),
        "nearest neighbours": KNeighborsClassifier(10),
    },
    cv=StratifiedKFold(3, shuffle=True, random_state=0),
    scoring="f1_macro",
    random_state=0,
)
columns = ["adaptation", "estimator", "score", "sd", "gain", "p", "fit s", "predict s"]
print(comparison.summary[columns].round(3).to_string(index=False))

# %%
# Plot scores and costs
# ---------------------
# Adaptations that predict themselves have no downstream estimator. If no step of the training is
# significantly better on a validation set, the fine-tuned model is the head: the scores are
# equal, and the time is lost.
AdaptationDisplay.from_comparison(comparison).plot()
plt.show()
