"""Find planted near duplicates, and score clip art and emoji without leaked rows.

"planted": rows of a table are split into folds by group, so that related rows of the
data set are in one fold. Copies of 5 % of the rows are put into other folds than their
originals. The image of a copy is re-encoded as JPEG, cropped by 2 to 10 % on each side
or resized to 50 to 90 %. Its text is re-cased or paraphrased: words are replaced by
synonyms or reordered, and function words are added. The table gives the recall of
copies by change, and false alarms: the share of other rows that count as leaked although
no cell equals one of another fold. This is an upper bound, since groups have near
duplicates of each other, such as faces with different mouths. "of another class" are the
false alarms whose nearest row has another class, so that it is no copy. "row" counts a
copy as found if its image, its text or both together are. Half of the groups, "tuning",
served to choose the constants of the threshold and of the thumbnails; the figures of the
other half, "test", are reported.

"scores": all rows, in random folds and in folds by group, with the default threshold.
The classifier is a logistic regression on MiniLM and EfficientNet-lite0 vectors.
"""

import argparse
import io
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from comparison import show, summarise
from PIL import Image
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from vectors import LOADERS, TITLES

from sklembed import FrozenEncoder, PerModalityUnion
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.evaluation import leak_report

SHARE = 0.05  # of rows that are copied
N_FOLDS = 5
SCORES = {"accuracy": "accuracy", "f1_macro": "macro-F1"}
SYNONYMS = {
    "and": "&",
    "auto": "car",
    "baby": "infant",
    "ball": "sphere",
    "bike": "bicycle",
    "big": "large",
    "boat": "ship",
    "book": "volume",
    "box": "carton",
    "boy": "young man",
    "car": "automobile",
    "cat": "feline",
    "child": "kid",
    "circle": "ring",
    "dog": "hound",
    "face": "visage",
    "flower": "blossom",
    "girl": "young woman",
    "glasses": "spectacles",
    "hat": "cap",
    "house": "home",
    "icon": "pictogram",
    "illustration": "drawing",
    "letter": "mail",
    "man": "male",
    "money": "cash",
    "mountain": "peak",
    "person": "human",
    "phone": "telephone",
    "picture": "image",
    "plane": "airplane",
    "red": "crimson",
    "road": "street",
    "sign": "symbol",
    "simple": "plain",
    "small": "little",
    "smiling": "grinning",
    "stone": "rock",
    "symbol": "sign",
    "tv": "television",
    "woman": "female",
}
TEMPLATES = ("a {}", "the {}", "{}, clip art", "picture of a {}", "this is a {}")


def decode(content):
    """Return an image on a white background."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    background.alpha_composite(image)
    return background.convert("RGB")


def encode(image, image_format="PNG", **options):
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def reencode(content, rng):
    """Encode an image as JPEG of random quality."""
    return encode(decode(content), "JPEG", quality=int(rng.integers(40, 91)))


def crop(content, rng):
    """Cut 2 to 10 % from each side of an image."""
    image = decode(content)
    left, top, right, bottom = rng.uniform(0.02, 0.1, size=4)
    box = np.multiply((left, top, 1 - right, 1 - bottom), 2 * image.size)
    return encode(image.crop(tuple(box.round().tolist())))


def resize(content, rng):
    """Resize an image to 50 to 90 %."""
    image = decode(content)
    size = np.multiply(image.size, rng.uniform(0.5, 0.9)).round().astype(int)
    size = tuple(np.maximum(size, 1).tolist())
    return encode(image.resize(size, Image.Resampling.BILINEAR))


def recase(text, rng):
    """Change the case of a text."""
    return rng.choice([text.upper(), text.title(), text.lower(), text.swapcase()])


def paraphrase(text, rng):
    """Replace words by synonyms; without any, reorder the words or add some."""
    words = text.split()
    replaced = [SYNONYMS.get(word.lower(), word) for word in words]
    if replaced != words:
        return " ".join(replaced)
    if len(words) > 2 and rng.random() < 0.5:
        return f"{' '.join(words[1:])}, {words[0]}"
    return rng.choice(TEMPLATES).format(text)


CHANGES = {
    "image": {"re-encoded": reencode, "cropped": crop, "resized": resize},
    "text": {"re-cased": recase, "paraphrased": paraphrase},
}


def pipeline(title):
    """Return the estimator: both encoders, and a logistic regression."""
    union = PerModalityUnion(
        [
            ("text", FrozenEncoder(minilm()), [title]),
            ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), ["image"]),
        ]
    )
    imputer = SimpleImputer(strategy="constant", fill_value=0.0)
    return make_pipeline(union, imputer, LogisticRegression(C=10, max_iter=2000))


def half_of_groups(groups, part):
    """Return the rows of a random half of the groups: "tuning" or "test"."""
    names = np.unique(groups)
    is_tuning = np.zeros(len(names), dtype=bool)
    order = np.random.default_rng(0).permutation(len(names))
    is_tuning[order[::2]] = True
    return np.flatnonzero(
        is_tuning[np.searchsorted(names, groups)] == (part == "tuning")
    )


def plant(name, part, seed):
    """Return a table with copies, its target, folds, and a table about the copies."""
    data = LOADERS[name]()
    rows, rng = half_of_groups(data.groups, part), np.random.default_rng(seed)
    table = data.data[["image", TITLES[name]]].iloc[rows].reset_index(drop=True)
    y, groups = data.target.to_numpy()[rows], data.groups[rows]
    fold_of = np.empty(len(rows), dtype=int)
    splitter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    for number, (_, test) in enumerate(splitter.split(table, y, groups)):
        fold_of[test] = number
    originals = rng.permutation(len(rows))[: round(SHARE * len(rows))]
    copies = table.iloc[originals].copy()
    about = pd.DataFrame({"original": originals})
    for column, kind in (("image", "image"), (TITLES[name], "text")):
        changes = CHANGES[kind]
        about[kind] = rng.choice(list(changes), size=len(originals))
        cells = []
        for cell, change in zip(copies[column], about[kind], strict=True):
            cells.append(cell if cell is None else changes[change](cell, rng))
        copies[column] = cells
        about.loc[pd.isna(copies[column]).to_numpy(), kind] = None
    shift = rng.integers(1, N_FOLDS, size=len(originals))
    fold_of = np.r_[fold_of, (fold_of[originals] + shift) % N_FOLDS]
    folds = []
    for number in range(N_FOLDS):
        folds.append(
            (np.flatnonzero(fold_of != number), np.flatnonzero(fold_of == number))
        )
    table = pd.concat([table, copies], ignore_index=True)
    return table, np.r_[y, y[originals]], folds, about


def false_alarms(leaked, other_class, counted):
    """Return the shares of the counted rows that are leaked, and near another class."""
    rates = {}
    for name, rows in (("false alarms", leaked), ("of another class", other_class)):
        mask = np.zeros(len(counted), dtype=bool)
        mask[rows] = True
        rates[name] = mask[counted].mean()
    return rates


def detection(name, part, seed):
    """Return the recall of planted copies by change, and the rate of false alarms."""
    table, y, folds, about = plant(name, part, seed)
    report = leak_report(pipeline(TITLES[name]), table, y, folds, random_state=seed)
    n_rows = len(table) - len(about)
    nearest = report.nearest_
    involved = np.zeros(len(table), dtype=bool)
    involved[n_rows:] = True
    involved[about["original"]] = True
    # Equal cells of other groups are duplicates of the data set, not false alarms.
    involved[nearest.loc[nearest["equal"], "row"]] = True
    records = []
    for kind, column in (("image", "image"), ("text", TITLES[name])):
        mask = np.zeros(len(table), dtype=bool)
        of_column = nearest[(nearest["column"] == column) & nearest["leaked"]]
        mask[of_column["row"]] = True
        for change, copies in about.groupby(kind):
            rows = n_rows + copies.index.to_numpy()
            record = {"change": f"{kind} {change}", "copies": len(rows)}
            records.append(record | {"recall": mask[rows].mean()})
        other_class = of_column.loc[~of_column["same target"], "row"]
        rates = false_alarms(of_column["row"], other_class, ~involved)
        records.append(
            {"change": f"{kind}, any", "copies": about[kind].count()} | rates
        )
        records[-1]["recall"] = mask[n_rows:][about[kind].notna()].mean()
    found = report.leaked_rows_[n_rows:]
    for (image, text), copies in about.groupby(["image", "text"]):
        record = {"change": f"row, {image} and {text}", "copies": len(copies)}
        records.append(record | {"recall": found[copies.index].mean()})
    leaked = report.pairs_
    record = {"change": "row, any", "copies": len(about)}
    record["recall"] = found.mean()
    other_class = leaked.loc[~leaked["same target"], "row"]
    records.append(record | false_alarms(leaked["row"], other_class, ~involved))
    settings = {"task": f"{name}, {part}", "seed": seed}
    return [settings | record for record in records]


def scores(name, by_group, options):
    """Return the scores of a report on all rows, by arm and fold, and its counts."""
    data = LOADERS[name]()
    table = data.data[["image", TITLES[name]]]
    groups, cv = None, StratifiedKFold(N_FOLDS, shuffle=True, random_state=0)
    if by_group:
        groups = data.groups
        cv = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=0)
    start = time.process_time()
    report = leak_report(
        pipeline(TITLES[name]),
        table,
        data.target.to_numpy(),
        cv,
        groups,
        scoring=list(SCORES),
        n_jobs=options.n_jobs,
        random_state=0,
    )
    cells = report.scores_.rename(columns=SCORES)
    cells["task"] = f"{name} {'by group' if by_group else 'random'}"
    total = cells[cells["arm"] == "all rows"]["n_test"].sum()
    share = cells.groupby("arm")["n_test"].transform("sum") / total
    cells["test rows"] = share.map("{:.1%}".format)
    counts = {"table": name, "folds": "by group" if by_group else "random"}
    counts["leaked rows"] = f"{report.leaked_rows_.mean():.1%}"
    for column, row in report.thresholds_.iterrows():
        kind = {"image": "image", "(all)": "joint"}.get(column, "text")
        counts[f"{kind} threshold"] = row["threshold"]
        counts[f"{kind} dimension"] = row["dimension"]
    sizes = np.bincount(report.groups_)
    counts |= {"suggested groups": len(sizes), "largest group": int(sizes.max())}
    counts["processor s"] = time.process_time() - start
    return cells, counts


def main():
    """Compute and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-jobs", type=int, default=1)
    parser.add_argument("--tuning", action="store_true", help="the half for tuning")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    part = "tuning" if options.tuning else "test"
    planted = []
    for name in LOADERS:
        for seed in range(options.seeds):
            planted += detection(name, part, seed)
    planted = pd.DataFrame(planted)
    keys = ["task", "change"]
    result = {
        "planted": summarise(
            planted, keys, ["recall", "false alarms", "of another class"]
        )
    }
    n_copies = planted.groupby(keys, sort=False)["copies"].sum()
    for record, n in zip(result["planted"], n_copies, strict=True):
        record["copies"] = int(n)
    if not options.tuning:
        show(result, options.json)  # the rest takes longer
        cells, counts = [], []
        for name in ("openclipart", "emoji"):
            for by_group in (False, True):
                of_task = scores(name, by_group, options)
                cells.append(of_task[0])
                counts.append(of_task[1])
        keys = ["task", "arm", "test rows"]
        result["scores"] = summarise(pd.concat(cells), keys, list(SCORES.values()))
        result["counts"] = counts
    show(result, options.json)


if __name__ == "__main__":
    main()
