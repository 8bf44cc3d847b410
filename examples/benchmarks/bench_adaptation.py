"""Compare seven classifiers on projected, reduced and raw vectors.

The data are MiniLM and EfficientNet-lite0 vectors of emoji and clip art. There are four
tasks, with random folds and with folds that keep a subcategory or a creator together.
Nothing is tuned on an outer fold, and the projector has its default parameters. The
result of each arm in each fold is cached, so that an interrupted run can be resumed.
Results of sklembed are computed again when its sources change.

Tables: "core" (minutes), "full" (with other methods), "sensitivity", "modalities"
(three modalities), "targets" (several labels, numbers, a tree of labels).
"""

import argparse
import hashlib
import json
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from joblib import Parallel, delayed
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import f1_score, r2_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    StratifiedGroupKFold,
    StratifiedKFold,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import (
    KNeighborsClassifier,
    KNeighborsRegressor,
    NeighborhoodComponentsAnalysis,
)
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, PowerTransformer, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from vectors import BLOCKS, LOADERS, load, outer_folds
from xgboost import XGBClassifier

import sklembed
from sklembed import ContrastiveProjector, PerModalityUnion

TASKS = {
    "emoji random": ("emoji", False),
    "emoji by subcategory": ("emoji", True),
    "openclipart by creator": ("openclipart", True),
    "openclipart random": ("openclipart", False),
}
NUMBERS = ["svg_kb", "n_path", "n_group", "n_gradient"]

# scikit-learn's classifiers with default parameters, and a small fixed XGBoost.
CLASSIFIERS = {
    "LR": LogisticRegression(max_iter=2000),
    "SVC": SVC(),
    "RF": RandomForestClassifier(random_state=0),
    "XGB": XGBClassifier(
        n_estimators=80, max_depth=4, tree_method="hist", n_jobs=1, random_state=0
    ),
    "CART": DecisionTreeClassifier(random_state=0),
    "MLP": MLPClassifier(random_state=0),
    "10-NN": KNeighborsClassifier(10),
}


# The arms


def per_modality(step):
    """Apply a copy of the step to each modality, and impute missing ones by the mean."""
    union = PerModalityUnion(
        [(name, step, columns) for name, columns in BLOCKS.items()]
    )
    return make_pipeline(union, SimpleImputer())


def of_both(step):
    """Apply one step to the concatenation of the modalities."""
    return make_pipeline(SimpleImputer(), step)


def ours(**options):
    """Return the projector with the given parameters."""
    return ContrastiveProjector(random_state=0, **options)


def by_group():
    """Return inner folds by group."""
    with sklearn.config_context(
        enable_metadata_routing=True
    ):  # requests cannot be set without it
        return StratifiedGroupKFold(5, shuffle=True, random_state=0).set_split_request(
            groups=True
        )


def scaled_pca():
    """Return PCA with rows of unit length on average, as the projector scales its input."""
    return make_pipeline(PCA(128, random_state=0), FunctionTransformer(_to_unit_norm))


def _to_unit_norm(X):
    return X / np.sqrt(np.square(X).sum(axis=1).mean())


class ContrastiveTuned(FunctionTransformer):
    """embetter's ContrastiveTuner with default parameters and a seed."""

    def fit(self, X, y):
        """Train the tuner."""
        import torch
        from embetter.finetune import ContrastiveTuner

        torch.manual_seed(0)
        self.tuner_ = ContrastiveTuner(hidden_dim=128).fit(X, y)
        return self

    def transform(self, X):
        """Project rows."""
        return np.asarray(self.tuner_.transform(X))

    def fit_transform(self, X, y):
        """Train the tuner and project its training rows."""
        return self.fit(X, y).transform(X)


CORE = {
    "PCA-128": lambda: per_modality(PCA(128, random_state=0)),
    "PCA-128, scaled": lambda: per_modality(scaled_pca()),
    "as the paper does it": lambda: per_modality(ours(cv=None, passthrough=False)),
    "gate": lambda: per_modality(ours(passthrough="auto")),
    "sklembed, defaults": lambda: per_modality(ours()),
}
OTHERS = {
    "raw": lambda: per_modality("passthrough"),
    "PCA-30": lambda: per_modality(PCA(30, random_state=0)),
    "LDA": lambda: per_modality(
        LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
    ),
    "NCA": lambda: per_modality(
        make_pipeline(
            PCA(128, random_state=0),
            NeighborhoodComponentsAnalysis(32, max_iter=10, init="pca", random_state=0),
        )
    ),
    "pytorch-metric-learning": lambda: per_modality(metric_learning()),
    "embetter": lambda: per_modality(ContrastiveTuned()),
    "released code of 2502.02048": lambda: per_modality(
        ours(
            hidden_layer_sizes=(16,),
            loss="pairwise_bce",
            similarity="dot",
            passthrough=False,
            standardize=False,
            dropout=0.0,
            weight_decay=0.0,
            max_epochs=10,
            cv=None,
        )
    ),
}
SENSITIVITY = {
    "defaults": lambda: per_modality(ours()),
    "passthrough=False": lambda: per_modality(ours(passthrough=False)),
    "n_components=32": lambda: per_modality(ours(n_components=32)),
    "n_components=64": lambda: per_modality(ours(n_components=64)),
    "n_components=256": lambda: per_modality(ours(n_components=256)),
    "temperature=0.05": lambda: per_modality(ours(temperature=0.05)),
    "temperature=0.2": lambda: per_modality(ours(temperature=0.2)),
    "hidden_layer_sizes=()": lambda: per_modality(ours(hidden_layer_sizes=())),
    "hidden_layer_sizes=(64,)": lambda: per_modality(ours(hidden_layer_sizes=(64,))),
    "hidden_layer_sizes=(256,)": lambda: per_modality(ours(hidden_layer_sizes=(256,))),
    "one projector for both": lambda: of_both(ours()),
    "cv=None": lambda: per_modality(ours(cv=None)),
    "cv=3": lambda: per_modality(ours(cv=3)),
    "cv=10": lambda: per_modality(ours(cv=10)),
    "cv by group": lambda: per_modality(ours(cv=by_group())),
}


def metric_learning():
    """Return the projector with the loss of pytorch-metric-learning."""
    from pytorch_metric_learning.losses import SupConLoss

    return ours(loss=SupConLoss(0.1), cv=None, passthrough=False)


# Features and classifiers in one fold


def judge(features, X, y, groups, train, test):
    """Fit features and each classifier on a fold; return macro-F1, seconds and gates."""
    routed = {"groups": groups[train]} if _wants_groups(features) else {}
    tick = time.perf_counter()
    with sklearn.config_context(enable_metadata_routing=bool(routed)):
        Z = features.fit_transform(X[train], y[train], **routed)
    result = {"features s": time.perf_counter() - tick}
    Z_test = features.transform(X[test])
    for name, classifier in CLASSIFIERS.items():
        predicted = classifier.fit(Z, y[train]).predict(Z_test)
        result[name] = f1_score(y[test], predicted, average="macro")
    union = features[0]
    if isinstance(union, PerModalityUnion):
        for name, projector in union.named_transformers_.items():
            if getattr(projector, "gate_scores_", None):
                result[f"gate {name}"] = projector.gate_
    return result


def _wants_groups(features):
    """Return whether an arm has inner folds by group."""
    with sklearn.config_context(enable_metadata_routing=True):
        return isinstance(features[0], PerModalityUnion) and any(
            isinstance(getattr(step, "cv", None), StratifiedGroupKFold)
            for _, step, _ in features[0].transformers
        )


def run_features(task, arm, make, fold, n_folds):
    """Evaluate all classifiers on one arm in one outer fold."""
    name, grouped = TASKS[task]
    X, data = load(name)
    y = data.target.to_numpy()
    train, test = outer_folds(y, data.groups, grouped, n_folds)[fold]
    return judge(make(), X, y, data.groups, train, test)


def run_classifier(task, arm, make, fold, n_folds):
    """Evaluate one classifier on raw vectors in one outer fold."""
    name, grouped = TASKS[task]
    X, data = load(name)
    y = data.target.to_numpy()
    train, test = outer_folds(y, data.groups, grouped, n_folds)[fold]
    tick = time.perf_counter()
    classifier = make().fit(X[train], y[train])
    seconds = time.perf_counter() - tick
    f1 = f1_score(y[test], classifier.predict(X[test]), average="macro")
    return {"features s": seconds, HEADS[arm][0]: f1}


def tuned_svc():
    """Return an SVC with C and gamma tuned on the training rows."""
    grid = {"svc__C": [1, 10, 100], "svc__gamma": ["scale", 0.5, 2]}
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    return GridSearchCV(
        make_pipeline(SimpleImputer(), SVC()), grid, cv=folds, scoring="f1_macro"
    )


def setfit_head():
    """Return SetFit's head, a linear layer trained by torch."""
    return make_pipeline(SimpleImputer(), SetFitHead())


class SetFitHead(KNeighborsClassifier):
    """SetFit's differentiable head on precomputed vectors, trained for 15 epochs."""

    def fit(self, X, y):
        """Train the head."""
        import torch
        from setfit import SetFitHead as Head
        from torch.nn.functional import cross_entropy

        torch.manual_seed(0)
        X, y = torch.from_numpy(np.float32(X)), torch.from_numpy(y)
        self.head_ = Head(
            in_features=X.shape[1], out_features=int(y.max()) + 1, device="cpu"
        )
        optimizer = torch.optim.AdamW(self.head_.parameters(), lr=1e-2)
        for _ in range(15):
            for rows in torch.randperm(len(X)).split(32):
                logits, _ = self.head_(X[rows])
                optimizer.zero_grad()
                cross_entropy(logits, y[rows]).backward()
                optimizer.step()
        return self

    def predict(self, X):
        """Return the most probable class."""
        import torch

        with torch.inference_mode():
            return self.head_(torch.from_numpy(np.float32(X)))[0].argmax(dim=1).numpy()


# Classifiers on raw vectors and their column; SetFit's head is a linear layer.
HEADS = {
    "SVC tuned on raw": ("SVC", tuned_svc),
    "SetFit's head on raw": ("LR", setfit_head),
}


# Three modalities, and other targets


def run_modalities(task, arm, make, fold, n_folds):
    """Evaluate one arm on text, image and numbers of clip art, by creator."""
    X, data = load("openclipart")
    y = data.target.to_numpy()
    numbers = PowerTransformer().fit_transform(
        data.data[NUMBERS]
    )  # monotone and unsupervised
    train, test = outer_folds(y, data.groups, True, n_folds)[fold]
    table = np.hstack([X, numbers.astype(np.float32)])
    return judge(make(), table, y, data.groups, train, test)


def three_branches(step, columns=("text", "image", "numbers")):
    """Apply ``step(name)`` to each of the named modalities."""
    blocks = BLOCKS | {"numbers": slice(1664, 1668)}
    branches = [(name, step(name), blocks[name]) for name in columns]
    return make_pipeline(PerModalityUnion(branches), SimpleImputer())


def _pca_or_scaled(name):
    return StandardScaler() if name == "numbers" else PCA(128, random_state=0)


MODALITIES = {
    "PCA-128, text and image": lambda: three_branches(
        _pca_or_scaled, ("text", "image")
    ),
    "PCA-128 and numbers": lambda: three_branches(_pca_or_scaled),
    "sklembed, text and image": lambda: three_branches(
        lambda _: ours(), ("text", "image")
    ),
    "sklembed, numbers as they are": lambda: three_branches(
        lambda name: StandardScaler() if name == "numbers" else ours()
    ),
    "sklembed, all three": lambda: three_branches(lambda _: ours()),
}


def run_labels(task, arm, make, fold, n_folds):
    """Evaluate several labels: keywords of at least 30 emoji, by micro-F1."""
    X, data = load("emoji")
    words = data.data["keywords"].fillna("").str.get_dummies(sep=", ")
    words = words.loc[:, words.sum() >= 30].drop(columns="", errors="ignore").to_numpy()
    train, test = list(KFold(n_folds, shuffle=True, random_state=0).split(X))[fold]
    classifiers = {
        "LR": OneVsRestClassifier(CLASSIFIERS["LR"]),
        "XGB": OneVsRestClassifier(CLASSIFIERS["XGB"]),
    }
    Z, Z_test = _features(make(), X, words, train, test)
    return {
        name: f1_score(
            words[test],
            classifier.fit(Z, words[train]).predict(Z_test),
            average="micro",
            zero_division=0,
        )
        for name, classifier in classifiers.items()
    }


def run_numbers(task, arm, make, fold, n_folds):
    """Evaluate numbers: the logarithm of the number of paths, by creator, by R²."""
    X, data = load("openclipart")
    y = np.log1p(data.data["n_path"].to_numpy(float)) + 0.0
    train, test = list(GroupKFold(n_folds).split(X, y, data.groups))[fold]
    Z, Z_test = _features(make(), X, y, train, test)
    regressors = {
        "ridge": RidgeCV(np.logspace(-3, 3, 7)),
        "10-NN": KNeighborsRegressor(10),
    }
    return {
        name: r2_score(y[test], regressor.fit(Z, y[train]).predict(Z_test))
        for name, regressor in regressors.items()
    }


def run_tree(task, arm, make, fold, n_folds):
    """Evaluate a tree of labels: group and subcategory of emoji, by macro-F1."""
    X, data = load("emoji")
    subcategory = np.unique(data.groups, return_inverse=True)[1]
    levels = np.stack([data.target.to_numpy(), subcategory], axis=1)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=0).split(X, subcategory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        train, test = list(folds)[fold]
    y = levels[:, 0] if arm.endswith("group alone") else levels
    Z, Z_test = _features(make(), X, y, train, test)
    return {
        f"{name}, {level}": f1_score(
            levels[test, column],
            CLASSIFIERS[name].fit(Z, levels[train, column]).predict(Z_test),
            average="macro",
        )
        for column, level in enumerate(("group", "subcategory"))
        for name in ("LR", "10-NN")
    }


def _features(features, X, y, train, test):
    return features.fit_transform(X[train], y[train]), features.transform(X[test])


TARGETS = {
    "several labels": run_labels,
    "numbers": run_numbers,
    "a tree of labels": run_tree,
}
TARGET_ARMS = {
    "PCA-128": CORE["PCA-128"],
    "PCA-128, scaled": CORE["PCA-128, scaled"],
    "sklembed, defaults": CORE["sklembed, defaults"],
}


# Cached results


def hash_sources():
    """Hash the modules that results of sklembed depend on."""
    root = Path(sklembed.__file__).parent
    patterns = ("projection/*.py", "nn/*.py", "_tra*.py", "_targets.py", "union.py")
    sources = hashlib.blake2b(digest_size=8)
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            sources.update(path.read_bytes())
    return sources.hexdigest()


def run_cell(directory, run, task, arm, make, fold, n_folds):
    """Return the cached result of an arm in a fold, or compute it."""
    peers = ("PCA", "raw", "LDA", "NCA", "embetter", "SetFit", "SVC")
    version = "" if arm.startswith(peers) else hash_sources()
    key = json.dumps([run.__name__, task, arm, fold, n_folds, version])
    path = (
        directory / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.json"
    )
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classifiers that do not converge
            result = run(task, arm, make, fold, n_folds)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(result))
        draft.rename(path)
        print(f"{task:24s} {arm:28s} fold {fold}", flush=True)
    return {"task": task, "arm": arm, "fold": fold} | json.loads(path.read_text())


def run_table(plan, n_folds, directory, n_jobs):
    """Run a plan of (run, task, arm, make) in all folds; return a row for each result."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in LOADERS:
        load(name)  # workers then read all vectors from the store
    return pd.DataFrame(
        Parallel(n_jobs=n_jobs, batch_size=1)(
            delayed(run_cell)(directory, run, task, arm, make, fold, n_folds)
            for run, task, arm, make in plan
            for fold in range(n_folds)
        )
    )


def plans():
    """Return the plan of each table."""
    core = [
        (run_features, task, arm, make) for task in TASKS for arm, make in CORE.items()
    ]
    others = [
        (run_features, task, arm, make)
        for task in TASKS
        for arm, make in OTHERS.items()
    ]
    others += [
        (run_classifier, task, arm, make)
        for task in TASKS
        for arm, (_, make) in HEADS.items()
    ]
    hard = ("emoji by subcategory", "openclipart by creator")
    tree_alone = (
        run_tree,
        "a tree of labels",
        "sklembed, group alone",
        lambda: CORE["sklembed, defaults"](),
    )
    return {
        "core": core,
        "full": core + others,
        "sensitivity": [
            (run_features, task, arm, make)
            for task in hard
            for arm, make in SENSITIVITY.items()
        ],
        "modalities": [
            (run_modalities, "openclipart by creator", arm, make)
            for arm, make in MODALITIES.items()
        ],
        "targets": [
            (run, task, arm, make)
            for task, run in TARGETS.items()
            for arm, make in TARGET_ARMS.items()
        ]
        + [tree_alone],
    }


# Tables


def summarize(cells):
    """Return mean ± standard deviation over folds of each score, by task and arm."""
    scores = [c for c in cells if c not in {"task", "arm", "fold", "features s"}]
    scores = [c for c in scores if not c.startswith("gate ")]
    known = [name for name in CLASSIFIERS if name in scores]
    if len(known) == len(CLASSIFIERS):
        cells = cells.assign(mean=cells[known].mean(axis=1))
        cells.loc[cells[known].isna().any(axis=1), "mean"] = np.nan
        scores = ["mean", *scores]
    by_arm = cells.groupby(["task", "arm"], sort=False)
    means, sds = by_arm[scores].mean(), by_arm[scores].std(ddof=0)
    table = means.map("{:.3f}".format) + " ± " + sds.map("{:.3f}".format)
    table = table.where(means.notna(), "")
    if "features s" in cells:
        table["features s"] = by_arm["features s"].median().map("{:.1f}".format)
    return table.reset_index(), means


def check_bars(means):
    """Return for each requirement whether it is met."""
    base, mine = (
        means.xs(arm, level="arm") for arm in ("PCA-128", "sklembed, defaults")
    )
    gain = mine - base
    bars = {
        "mean over classifiers on every task >= PCA-128 + .015": gain["mean"].min()
        - 0.015,
        "mean over tasks >= PCA-128 + .04": gain["mean"].mean() - 0.04,
        "emoji random >= .845": mine.loc["emoji random", "mean"] - 0.845,
        "XGB, RF and CART on emoji random >= PCA-128 + .05": gain.loc[
            "emoji random", ["XGB", "RF", "CART"]
        ].min()
        - 0.05,
        "no classifier on any task below PCA-128 - .015": gain.min().min() + 0.015,
    }
    return {
        name: f"{'met' if room >= 0 else 'NOT met'} by {room:+.4f}"
        for name, room in bars.items()
    }


def main():
    """Compute and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=plans(), nargs="?", default="core")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument(
        "--cache", type=Path, default=Path("examples/output/adaptation")
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    tick = time.perf_counter()
    cells = run_table(
        plans()[options.table], options.folds, options.cache, options.n_jobs
    )
    table, means = summarize(cells)
    print(f"\n{table.to_string(index=False)}\n")
    result = {"folds": options.folds, "records": table.to_dict("records")}
    gates = [name for name in cells if name.startswith("gate ")]
    if gates:
        chosen = cells.dropna(subset=gates)[["task", "arm", "fold", *gates]]
        print(f"Choices of the gate:\n{chosen.to_string(index=False)}\n")
        result["gates"] = chosen.to_dict("records")
    if options.table in ("core", "full"):
        result["bars"] = check_bars(means)
        print(
            *(f"{bar}: {verdict}" for bar, verdict in result["bars"].items()), sep="\n"
        )
    print(f"{time.perf_counter() - tick:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
