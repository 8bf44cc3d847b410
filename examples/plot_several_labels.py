"""
==================================
Predict several labels of each row
==================================

A row may have several labels at once, such as the keywords of an image. The target is
then a table of 0 and 1 with a column for each label. The classifiers of sklembed accept
it directly and return a probability for each label. This example predicts keywords of
emoji from their names and images, and reports each label on its own.

.. seealso:: :doc:`/user_guide/regression` in the user guide.
"""

# %%
# Make a target with several columns
# ----------------------------------
# The labels are keywords that occur in at least 12 of 1,000 emoji and in at least six
# subgroups, such as "hand-fingers-open". A row has any number of labels, and many rows
# have none.
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss
from sklearn.model_selection import GroupKFold, KFold, cross_val_predict
from sklearn.multioutput import MultiOutputClassifier

from sklembed import EmbeddingClassifier, multimodal_pipeline
from sklembed.datasets import load_emoji
from sklembed.encoders import efficientnet_lite0, minilm

emoji = load_emoji()
rows = np.random.default_rng(0).permutation(len(emoji.data))[:1000]
X, groups = emoji.data.iloc[rows][["name", "image"]], emoji.groups[rows]
Y = emoji.data["keywords"].iloc[rows].str.get_dummies(", ")
n_subgroups = Y.groupby(groups).max().sum()
Y = Y.loc[:, (Y.sum() >= 12) & (n_subgroups >= 6)]
Y = Y[Y.sum().sort_values(ascending=False).index]
print(Y.sum().to_frame("rows").T.to_string())
print(Y.sum(axis=1).value_counts().sort_index().rename("rows by number of labels"))

# %%
# Predict all labels by one model
# -------------------------------
# ``multimodal_pipeline("classifier")`` needs no option for several labels: the shape of
# ``Y`` decides. The first baseline needs no learning: does the name contain the
# keyword? The second is a logistic regression for each label, by scikit-learn's
# ``MultiOutputClassifier``, on the same vectors. Emoji of one subgroup are similar.
# Random folds show the scores on new emoji of known subgroups, and group folds those on
# new subgroups.
new_emoji = list(KFold(3, shuffle=True, random_state=0).split(X))
new_subgroups = list(GroupKFold(3, shuffle=True, random_state=0).split(X, Y, groups))


def predict(classifier, columns, folds):
    """Return the predictions out of fold of a pipeline that ends in the classifier."""
    model = multimodal_pipeline(
        classifier, text_encoder=minilm(), image_encoder=efficientnet_lite0()
    )
    return cross_val_predict(model, X[columns], Y, cv=folds, method="predict_proba")


def is_in_name(keyword):
    """Return 1 for each row whose name contains the keyword as a word, else 0."""
    return X["name"].str.contains(rf"\b{keyword}\b", case=False).astype(float)


both = ["name", "image"]
one_per_label = MultiOutputClassifier(LogisticRegression(C=0.01, max_iter=1000))
# scikit-learn returns a list with an array of shape (n_samples, 2) for each label.
by_label = predict(one_per_label, both, new_emoji)
classifier = EmbeddingClassifier(random_state=0)
probabilities = {
    "keyword in the name": np.column_stack([is_in_name(label) for label in Y]),
    "logistic regressions": np.column_stack([pair[:, 1] for pair in by_label]),
    "image": predict(classifier, ["image"], new_emoji),
    "name": predict(classifier, ["name"], new_emoji),
    "name and image": predict(classifier, both, new_emoji),
    "name and image, new subgroups": predict(classifier, both, new_subgroups),
}

# %%
# Score each label
# ----------------
# Average precision is high if rows with the label are ranked first. By chance it is the
# share of rows with the label. Labels are rare, so accuracy would be high for a model
# that predicts none. Look at single labels, because the mean hides those that fail.
# Some keywords are about one kind of emoji: no model can predict them if that kind is
# new.
# Compare "name" with "name and image": where they agree, you can save the images.
scores = pd.DataFrame(
    {
        name: average_precision_score(Y, p, average=None)
        for name, p in probabilities.items()
    },
    index=Y.columns,
)
scores.insert(0, "chance", Y.mean())
print(scores.rename(columns=lambda name: name.replace(" ", "\n")).round(2).to_string())
print("\nmean\n" + scores.mean().round(3).to_string())

# %%
# The log loss, the mean over labels, also measures whether the probabilities are right.
# The reference is the share of each label.
losses = {"share of the label": np.tile(Y.mean(), (len(Y), 1))} | {
    name: probabilities[name] for name in ("logistic regressions", "name and image")
}
for name, p in losses.items():
    mean = np.mean([log_loss(Y[label], p[:, i]) for i, label in enumerate(Y)])
    print(f"{name:22s} log loss {mean:.3f}")

# %%
# Choose a threshold for each label
# ---------------------------------
# ``predict`` returns the labels with a probability above 0.5. A rare label seldom
# reaches it. To trade misses for false alarms, compare the probabilities with a
# custom threshold.
p = probabilities["name and image"]
for threshold in (0.5, 0.2):
    chosen = p > threshold
    recall = (chosen & (Y == 1)).to_numpy().sum() / Y.to_numpy().sum()
    precision = (chosen & (Y == 1)).to_numpy().sum() / chosen.sum()
    print(f"threshold {threshold}: precision {precision:.2f}, recall {recall:.2f}")

# %%
# Plot the labels
# ---------------
# A line connects the baseline of a label with the model on new emoji. Keywords at the
# bottom are seldom written in the name, and need the embeddings most.
scores = scores.sort_values("keyword in the name", ascending=False)
positions = np.arange(len(scores))
figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
axes.hlines(
    positions,
    scores["keyword in the name"],
    scores["name and image"],
    color="#BBBBBB",
    lw=3,
    zorder=1,
)
styles = {
    "chance": {"marker": "|", "color": "black"},
    "keyword in the name": {"marker": "s", "color": "#E69F00"},
    "name and image, new subgroups": {
        "marker": "o",
        "facecolor": "white",
        "edgecolor": "#0072B2",
        "lw": 1.5,
    },
    "name and image": {"marker": "o", "color": "#0072B2"},
}
for name, style in styles.items():
    axes.scatter(scores[name], positions, s=70, label=name, zorder=2, **style)
axes.set_yticks(positions, scores.index, fontsize=12)
axes.invert_yaxis()
axes.set_xlabel("average precision", fontsize=12)
axes.set_title("Average precision of each label", fontsize=13)
axes.set_xlim(-0.02, 1.02)
axes.grid(axis="x", alpha=0.4)
figure.legend(loc="outside upper center", ncols=2, fontsize=11)
plt.show()
