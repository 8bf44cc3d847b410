"""Draw the image of the landing page and the README: rows of a table and predictions.

``python tools/draw_landing.py`` fits the model of the README and writes
``docs/_static/landing-light.png`` and ``landing-dark.png``.
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from PIL import Image
from sklearn.model_selection import train_test_split

from sklembed import multimodal_pipeline
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm

STATIC = Path(__file__).parents[1] / "docs" / "_static"
THEMES = {
    "light": {
        "ground": "#ffffff",
        "text": "#14181e",
        "muted": "#5a6270",
        "bar": "#0072b2",
    },
    "dark": {
        "ground": "#14181e",
        "text": "#ced6dd",
        "muted": "#9ca4af",
        "bar": "#56b4e9",
    },
}
ROWS = [706, 2522, 624, 2952]  # of the test rows
LEFT, TITLE, NUMBER, ARROW, BARS = 0.5, 1.05, 3.65, 4.02, 4.4  # inches from the left
LONGEST = 0.95  # inches of the bar of probability 1


def predict():
    """Return some test rows, and the probabilities of their classes."""
    clipart = load_openclipart()
    X, y = clipart.data[::2], clipart.target[::2]
    X_train, X_test, y_train, _ = train_test_split(
        X, y, test_size=0.3, stratify=y, random_state=0
    )
    model = multimodal_pipeline(
        "classifier", text_encoder=minilm(), image_encoder=efficientnet_lite0()
    )
    model.fit(X_train, y_train)
    rows = X_test.loc[ROWS]
    probabilities = pd.DataFrame(
        model.predict_proba(rows), rows.index, clipart.target_names
    )
    return rows, probabilities


def draw_row(axes, top, row, probabilities, theme):
    """Draw the cells of a row, and the two most probable classes as bars."""
    image = Image.open(io.BytesIO(row["image"])).convert("RGBA")
    paper = Image.new("RGBA", image.size, "#ffffff")
    paper.alpha_composite(image)
    width, height = (0.62 * side / max(image.size) for side in image.size)
    box = (LEFT - width / 2, LEFT + width / 2, top - height / 2, top + height / 2)
    axes.imshow(paper, extent=box, interpolation="lanczos", zorder=1)
    if pd.isna(row["title"]):
        axes.text(
            TITLE, top, "missing", color=theme["muted"], style="italic", va="center"
        )
    else:
        axes.text(TITLE, top, row["title"], color=theme["text"], va="center")
    axes.text(NUMBER, top, row["n_path"], color=theme["text"], va="center", ha="right")
    arrow = {"arrowstyle": "-|>", "color": theme["muted"], "lw": 1.5}
    axes.annotate("", (ARROW + 0.23, top), (ARROW - 0.2, top), arrowprops=arrow)
    best = probabilities.nlargest(2)
    best = best[best >= 0.005]  # others would read 0.00
    for place, (name, value) in zip((0.16, -0.16), best.items(), strict=False):
        axes.barh(top + place, LONGEST * value, 0.2, BARS, color=theme["bar"], zorder=1)
        label = f"{value:.2f}  {name.replace('_', ' ')}"
        x = BARS + LONGEST * value + 0.06
        axes.text(x, top + place, label, color=theme["text"], va="center", fontsize=11)


def draw(rows, probabilities, name):
    """Draw the table and the predictions in the colours of one theme."""
    theme = THEMES[name]
    plt.rcParams.update({"font.size": 12.5, "font.family": "DejaVu Sans"})
    figure = plt.figure(
        figsize=(7.4, 0.8 * len(rows) + 0.45), facecolor=theme["ground"]
    )
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for place, (label, row) in enumerate(rows.iterrows()):
        top = 0.8 * (len(rows) - place) - 0.4
        draw_row(axes, top, row, probabilities.loc[label], theme)
    head = 0.8 * len(rows) + 0.2
    names = {LEFT: "image", TITLE + 0.2: "title", NUMBER - 0.25: "n_path"}
    for x, text in (names | {BARS + 1.2: "calibrated prediction"}).items():
        axes.text(
            x, head, text, color=theme["muted"], ha="center", va="center", weight="bold"
        )
    axes.axhline(0.8 * len(rows), color=theme["muted"], lw=0.8)
    axes.set(xlim=(0, 7.4), ylim=(0, 0.8 * len(rows) + 0.45), aspect="equal")
    figure.savefig(
        STATIC / f"landing-{name}.png", dpi=200, pil_kwargs={"optimize": True}
    )
    plt.close(figure)


if __name__ == "__main__":
    rows, probabilities = predict()
    print(rows.drop(columns="image").assign(prediction=probabilities.idxmax(axis=1)))
    for name in THEMES:
        draw(rows, probabilities, name)
