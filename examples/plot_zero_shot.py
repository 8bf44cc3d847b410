"""
=======================
Classify without labels
=======================

A zero-shot classifier needs no labels. It learns a shared space from names and images
of emoji. Each class is described by texts, and an image is assigned to the class with
the most similar text.

.. seealso:: :doc:`/user_guide/crossmodal` in the user guide.
"""

# %%
# Learn a shared space from pairs
# -------------------------------
# Emoji of one subcategory have similar images and names, so each subcategory is in a
# single fold.
import matplotlib.pyplot as plt
import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score
from sklearn.model_selection import StratifiedGroupKFold

from sklembed import (
    CrossAttentionAdaptor,
    FrozenEncoder,
    PerModalityUnion,
    ZeroShotClassifier,
)
from sklembed.datasets import load_emoji
from sklembed.encoders import efficientnet_lite0, minilm

text_encoder = FrozenEncoder(minilm())
union = PerModalityUnion(
    [
        ("text", text_encoder, "name"),
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
    ]
).set_output(transform="pandas")
emoji = load_emoji()
X, y = union.fit_transform(emoji.data), emoji.target.to_numpy()
folds = StratifiedGroupKFold(3, shuffle=True, random_state=0)
train, test = next(folds.split(X, y, emoji.groups))

adaptor = CrossAttentionAdaptor(random_state=0).fit(X.iloc[train])

# %%
# Describe the classes
# --------------------
# The adaptor is fitted already, so ``fit`` encodes only the prompts and needs no rows.
# In a template, ``{}`` is replaced by the name of the class, and several templates are
# averaged. A dict has texts for each class.
classes = np.array([name.lower().replace("&", "and") for name in emoji.target_names])
class_texts = {
    "activities": ["sport", "a game", "a ball", "a party", "a medal"],
    "animals and nature": ["an animal", "a bird", "a plant", "a flower"],
    "flags": ["flag of a country", "flag: Kenya", "flag: Peru"],
    "food and drink": ["food", "a fruit", "a meal", "a drink"],
    "objects": ["a tool", "clothes", "a book", "a phone", "a musical instrument"],
    "people and body": ["a person", "a woman working", "a hand", "a family"],
    "smileys and emotion": ["a smiling face", "a sad face", "a heart"],
    "symbols": ["a sign", "an arrow", "a clock face", "zodiac", "a button"],
    "travel and places": ["a vehicle", "a building", "the weather", "a map"],
}
prompts = {
    "one template": "{}",
    "four templates": ["{}", "a picture of {}", "a drawing of {}", "a symbol for {}"],
    "texts per class": class_texts,
}
images_only = X.iloc[test].copy()
images_only[X.filter(like="text__").columns] = np.nan
predicted = {}
for name, texts in prompts.items():
    classifier = ZeroShotClassifier(
        FrozenEstimator(adaptor), texts, classes=classes, text_encoder=text_encoder
    )
    predicted[name] = classifier.fit(None).predict(images_only)

# %%
# Compare with a supervised classifier
# ------------------------------------
# The reference is a logistic regression on the image embeddings, fitted with the labels
# of all training rows.
images = X.filter(like="image__")
labelled = LogisticRegression(C=10, max_iter=2000).fit(
    images.iloc[train], classes[y[train]]
)
predicted["logistic regression, all labels"] = labelled.predict(images.iloc[test])
largest = classes[np.bincount(y[train]).argmax()]
predicted["largest class"] = np.full(len(test), largest)
for name, labels in predicted.items():
    accuracy = accuracy_score(classes[y[test]], labels)
    f1 = f1_score(classes[y[test]], labels, average="macro", zero_division=0)
    print(f"{name:32s} accuracy {accuracy:.3f}   macro-F1 {f1:.3f}")

# %%
# The confusion matrix of the prompts with texts per class:
figure, axis = plt.subplots(figsize=(7, 6))
ConfusionMatrixDisplay.from_predictions(
    classes[y[test]],
    predicted["texts per class"],
    normalize="true",
    values_format=".1f",
    xticks_rotation=40,
    colorbar=False,
    ax=axis,
)
axis.set_title("Zero-shot classes, as shares of each true class")
plt.setp(axis.get_xticklabels(), ha="right")
figure.tight_layout()
plt.show()
