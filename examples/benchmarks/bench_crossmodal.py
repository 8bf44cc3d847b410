"""Evaluate shared spaces of text and image: retrieval, zero-shot, probes and ablations.

Pairs are names and images of emoji, and titles and images of clip art. MiniLM and
EfficientNet-lite0 encode them as pooled vectors, or as words and the last map in 2 x 2
patches. Folds keep a subcategory or a creator together. A space is trained without
labels. Rows with equal titles count as correct matches. The models have 128 components
and a feed-forward width of 256, so that a table takes minutes on two cores; the table
"frontier" has other sizes.

Tables: "retrieval" (all fusions, the adaptor, the released models, closed forms, and
the best model chosen within the training folds), "zero_shot", "probe" (linear probes
and an unfrozen encoder against the frozen control), "pairs" (fewer, shuffled and
incomplete pairs), "frontier" (width, depth and backbone of the adaptor; shared against
separate layers), "shared_shift" (lambda and noise in a shared space), "crossmodal_cost"
(rows per second and memory).
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from math import exp
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from bench_store import peak_mib
from comparison import difference, in_parallel, show, summarise
from sklearn.base import clone
from sklearn.dummy import DummyClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    StratifiedGroupKFold,
    StratifiedKFold,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from vectors import BLOCKS, TITLES, load, outer_folds

from sklembed import (
    CanonicalAligner,
    CrossAttentionAdaptor,
    FrozenEncoder,
    FusionClassifier,
    ModalityGapAligner,
    SharedFusionEncoder,
    ZeroShotClassifier,
)
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.encoders.packaged import efficientnet_lite
from sklembed.metrics import retrieval_recall

TASKS = {"openclipart by creator": "openclipart", "emoji by subcategory": "emoji"}
TOKENS = {"text": ["text"], "image": ["image"]}
SIZES = {"n_components": 128, "dim_feedforward": 256}
BACKBONES = ("efficientnet-lite0", "efficientnet-lite2")
KS = (1, 5, 10)
COSTS = {"parameters": 0, "fit s": 1}
LR = LogisticRegression(C=10, max_iter=2000)
PROMPTS = ["{}", "a picture of {}", "a drawing of {}", "a symbol for {}"]


# The data


def pairs(dataset, features="pooled"):
    """Return features, titles, classes, class names and groups of rows with a title."""
    X, data = load(dataset)
    titles = data.data[TITLES[dataset]]
    has_title = titles.notna().to_numpy()
    if features == "tokens":
        X = tokens(data.data, TITLES[dataset])[has_title]
    elif features != "pooled":  # images by another backbone
        size = int(features.removeprefix("efficientnet-lite"))
        backbone = FrozenEncoder(efficientnet_lite(size), normalize=True)
        images = backbone.transform(data.data[["image"]])
        X = np.hstack([X[:, BLOCKS["text"]], images])[has_title]
    else:
        X = X[has_title]
    titles = titles[has_title].str.strip().str.lower().to_numpy()
    names = [name.lower().replace("&", "and") for name in data.target_names]
    return X, titles, data.target.to_numpy()[has_title], names, data.groups[has_title]


def tokens(table, title):
    """Return words and patches of each row as two columns of tokens."""
    words = FrozenEncoder(minilm(), output="tokens").transform(table[[title]])
    patches = FrozenEncoder(efficientnet_lite0(side=2), output="tokens").transform(
        table[["image"]]
    )
    return pd.DataFrame({"text": words[:, 0], "image": patches[:, 0]})


def take(X, rows):
    """Return rows of an array or a table."""
    return X.iloc[rows] if hasattr(X, "iloc") else X[rows]


def block(X, name):
    """Return the columns of one modality."""
    return X[TOKENS[name]] if hasattr(X, "iloc") else X[:, BLOCKS[name]]


def folds_of(task, n_folds):
    """Split pairs by creator or subcategory."""
    _, _, y, _, groups = pairs(TASKS[task])
    return outer_folds(y, groups, True, n_folds)


# The arms


def linear(**options):
    """Return linear maps trained by InfoNCE: the adaptor without layers and queries."""
    return adaptor(n_layers=0, n_queries=0, **options)


def adaptor(blocks=BLOCKS, **options):
    """Return the adaptor."""
    return CrossAttentionAdaptor(blocks=blocks, random_state=0, **(SIZES | options))


def shared(fusion="add", blocks=BLOCKS, **options):
    """Return the shared encoder."""
    options = SIZES | options
    return SharedFusionEncoder(fusion=fusion, blocks=blocks, random_state=0, **options)


BASELINES = {
    "CSA": CanonicalAligner(128, blocks=BLOCKS),
    "CCA": CanonicalAligner(128, blocks=BLOCKS, weighted=False),
    "linear InfoNCE": linear(input_dropout=0.0, max_epochs=10),
    "linear InfoNCE, input dropout": linear(),
}
OURS = {
    "shared, add": shared("add"),
    "shared, multiply": shared("multiply"),
    "shared, concat": shared("concat"),
    "adaptor": adaptor(),
    "adaptor, pooled attention": adaptor(n_queries=0),
}
OF_TOKENS = {
    "linear InfoNCE, input dropout, tokens": linear(blocks=TOKENS),
    "adaptor, tokens": adaptor(TOKENS),
} | {
    f"shared, {fusion}, tokens": shared(fusion, TOKENS)
    for fusion in ("add", "multiply", "concat", "additive", "general", "scaled_dot")
}
# Sizes, losses and regularisation of the released code, on pooled vectors. Epochs, batches and
# learning rate are not those of Adaptor, which would hardly train on so few pairs.
RELEASED = {
    "LightCRL, released start at exp(0.07)": shared(
        n_components=256,
        dim_feedforward=2048,
        dropout=0.1,
        input_dropout=0.0,
        temperature=exp(-0.07),
        mask_duplicates=False,
        standardize=False,
        batch_size=64,
    ),
    "LightCRL, started at 0.07": shared(
        n_components=256,
        dim_feedforward=2048,
        dropout=0.1,
        input_dropout=0.0,
        mask_duplicates=False,
        standardize=False,
        batch_size=64,
    ),
    "Adaptor, released sizes": adaptor(
        n_components=768,
        n_queries=0,
        n_layers=2,
        n_heads=12,
        dim_feedforward=2048,
        dropout=0.1,
        input_dropout=0.0,
        direction_weight=0.75,
        mask_duplicates=False,
        max_epochs=10,
    ),
}


def recalls(encoder, X, titles):
    """Return recall@k for all k, in both directions."""
    text, image = (encoder.encode(block(X, name), name) for name in BLOCKS)
    return {
        f"{way} @{k}": retrieval_recall(a, b, k=k, labels=titles)
        for way, a, b in (
            ("text to image", text, image),
            ("image to text", image, text),
        )
        for k in KS
    }


def mean_recall(encoder, X, titles):
    """Return the mean recall over k and directions; titles replace y."""
    return float(np.mean(list(recalls(encoder, X, titles).values())))


def encoder_score(pipeline, X, titles):
    """Score a pipeline of one encoder, for a grid search."""
    return mean_recall(pipeline[-1], X, titles)


class Chosen(GridSearchCV):
    """Choose the best of several encoders by group folds of the training rows."""

    def __init__(self, candidates, groups):
        self.candidates, self.groups = candidates, groups
        pipeline = Pipeline([("encoder", candidates[0])])
        cv = list(GroupKFold(3).split(groups, groups=groups))
        super().__init__(
            pipeline, {"encoder": candidates}, scoring=encoder_score, cv=cv
        )


# Retrieval


def run_retrieval(task, arm, encoder, fold, n_folds):
    """Evaluate an arm in one outer fold."""
    features = "tokens" if arm.endswith("tokens") else "pooled"
    X, titles, _, _, groups = pairs(TASKS[task], features)
    train, test = folds_of(task, n_folds)[fold]
    result = {"task": task, "arm": arm, "fold": fold}
    tick = time.perf_counter()
    if isinstance(encoder, list):
        search = Chosen(encoder, groups[train]).fit(take(X, train), titles[train])
        encoder = search.best_estimator_[-1]
        result["chosen"] = describe(encoder)
    else:
        encoder = clone(encoder).fit(take(X, train))
    result["fit s"] = time.perf_counter() - tick
    result["parameters"] = n_parameters(encoder)
    return result | recalls(encoder, take(X, test), titles[test])


def n_parameters(encoder):
    """Return the number of trained parameters."""
    if hasattr(encoder, "n_parameters_"):
        return int(encoder.n_parameters_)
    return int(sum(values.size for values in encoder.maps_.values()))


def describe(encoder):
    """Name a candidate by its class and the parameters that differ from the defaults."""
    kind = type(encoder).__name__
    defaults = type(encoder)().get_params()
    told = {
        name: value
        for name, value in encoder.get_params().items()
        if value != defaults[name] and name not in ("blocks", "random_state")
    }
    return " ".join([kind, *(f"{name}={value}" for name, value in told.items())])


# Comparisons of an arm with others. The first compares arms that were chosen in the same way.
VERDICTS = {
    "ours, chosen within": (
        "CSA, chosen within",
        "linear InfoNCE, chosen within",
        "linear InfoNCE",
    ),
    "adaptor": (
        "linear InfoNCE",
        "linear InfoNCE, input dropout",
        "adaptor, pooled attention",
    ),
    "shared, add": ("linear InfoNCE", "linear InfoNCE, input dropout", "adaptor"),
    "LightCRL, started at 0.07": ("LightCRL, released start at exp(0.07)",),
}


def retrieval_table(options):
    """Evaluate, summarise and compare the arms."""
    chosen = {
        "ours, chosen within": [shared(), adaptor(), adaptor(n_queries=0)],
        "linear InfoNCE, chosen within": [
            linear(input_dropout=0.0, max_epochs=10),
            linear(input_dropout=0.0),
            linear(),
        ],
        "CSA, chosen within": [
            CanonicalAligner(n, blocks=BLOCKS) for n in (64, 128, 384)
        ],
    }
    large = OF_TOKENS | RELEASED | chosen
    arms = {"openclipart by creator": large | BASELINES | OURS}
    arms["emoji by subcategory"] = BASELINES | OURS
    cells = in_parallel(
        options,
        [
            (run_retrieval, task, arm, encoder, fold, options.folds)
            for task, own in arms.items()
            for arm, encoder in own.items()
            for fold in range(options.folds)
        ],
    )
    measures = [name for name in cells if "@" in name]
    cells["mean"] = cells[measures].mean(axis=1)
    return {
        "records": summarise(cells, ["task", "arm"], ["mean", *measures], COSTS),
        "verdicts": [
            {"task": task, "arm": arm, "against": other}
            | difference(rows, arm, other, "mean", options.folds)
            for task, rows in cells.groupby("task", sort=False)
            for arm, others in VERDICTS.items()
            for other in others
            if {arm, other} <= set(rows["arm"])
        ],
        "chosen": cells.dropna(subset="chosen")[["task", "fold", "chosen"]].to_dict(
            "records"
        ),
    }


# Zero-shot


def run_zero_shot(task, arm, encoder, fold, n_folds):
    """Classify the images of an outer fold by the names of the classes."""
    X, _, y, names, _ = pairs(TASKS[task])
    train, test = folds_of(task, n_folds)[fold]
    text_encoder = FrozenEncoder(minilm())
    rows = []

    def judge(setting, found, truth, kind=None):
        scores = {
            "accuracy": accuracy_score(truth, found),
            "macro-F1": f1_score(truth, found, average="macro", zero_division=0),
        }
        rows.append(
            {"task": task, "arm": kind or arm, "setting": setting, "fold": fold}
            | scores
        )

    if encoder is None:
        images = X[:, BLOCKS["image"]]
        supervised = clone(LR).fit(images[train], y[train])
        judge(
            "all classes",
            supervised.predict(images[test]),
            y[test],
            "LR with all labels",
        )
        prior = DummyClassifier().fit(images[train], y[train])
        judge("all classes", prior.predict(images[test]), y[test], "largest class")
        largest = np.array([_largest(y[train], third) for third in range(3)])[
            y[test] % 3
        ]
        judge("a third of the classes, no pair seen", largest, y[test], "largest class")
        return rows
    texts = {
        label: [p.replace("{}", name) for p in PROMPTS]
        for label, name in enumerate(names)
    }
    fitted = clone(encoder).fit(X[train])
    zero_shot = ZeroShotClassifier(
        FrozenEstimator(fitted), texts, text_encoder=text_encoder
    )
    judge("all classes", zero_shot.fit(None).predict(X[test]), y[test])
    single = clone(zero_shot).set_params(prompts={k: v[:1] for k, v in texts.items()})
    judge("all classes, the bare name", single.fit(None).predict(X[test]), y[test])
    # A third of the classes at a time, without their unlabelled pairs in training.
    found, truth = [], []
    for third in range(3):
        unseen = np.arange(len(names)) % 3 == third
        seen_rows, new_rows = train[~unseen[y[train]]], test[unseen[y[test]]]
        own = {label: texts[label] for label in np.flatnonzero(unseen)}
        fitted = clone(encoder).fit(X[seen_rows])
        zero_shot = ZeroShotClassifier(
            FrozenEstimator(fitted), own, text_encoder=text_encoder
        )
        found.append(zero_shot.fit(None).predict(X[new_rows]))
        truth.append(y[new_rows])
    judge(
        "a third of the classes, no pair seen",
        np.concatenate(found),
        np.concatenate(truth),
    )
    return rows


def _largest(y, third):
    """Return the largest class of a third of the classes."""
    counts = np.bincount(y)
    return np.where(np.arange(len(counts)) % 3 == third, counts, -1).argmax()


def zero_shot_table(options):
    """Summarise the arms."""
    arms = (
        {"chance": None}
        | BASELINES
        | {arm: OURS[arm] for arm in ("shared, add", "adaptor")}
    )
    cells = in_parallel(
        options,
        [
            (run_zero_shot, task, arm, encoder, fold, options.folds)
            for task in TASKS
            for arm, encoder in arms.items()
            for fold in range(options.folds)
        ],
    )
    return {
        "records": summarise(
            cells, ["task", "setting", "arm"], ["accuracy", "macro-F1"]
        )
    }


# Probes


def run_probe(task, seed, fold, n_folds):
    """Evaluate classifiers on frozen vectors, in the shared space, and fine-tuned."""
    X, _, y, _, groups = pairs(TASKS[task])
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    train, test = list(folds.split(X, y, groups))[fold]
    encoder = shared().set_params(random_state=seed).fit(X[train])
    spaces = {
        "image, frozen": X[:, BLOCKS["image"]],
        "image, shared": encoder.encode(X[:, BLOCKS["image"]], "image"),
        "both, frozen": X,
        "both, shared": encoder.transform(X),
    }
    spaces["image, frozen and shared"] = np.hstack(
        [spaces["image, frozen"], spaces["image, shared"]]
    )
    found = {
        f"linear, {name}": probe().fit(Z[train], y[train]).predict(Z[test])
        for name, Z in spaces.items()
    }
    for name, forget in (("pre-trained", False), ("untrained", True)):
        found[f"unfrozen, {name}"] = unfrozen(
            encoder, forget, spaces["image, frozen"], y, (train, test), seed
        )
    return [
        {
            "task": task,
            "seed": seed,
            "fold": fold,
            "arm": arm,
            "macro-F1": f1_score(y[test], labels, average="macro"),
            "accuracy": accuracy_score(y[test], labels),
        }
        for arm, labels in found.items()
    ]


def probe():
    """Return a linear classifier with a penalty tuned on the training rows."""
    return make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(0, 5, 11)))


def unfrozen(encoder, forget, images, y, split, seed, n_epochs=20):
    """Fine-tune the shared encoder with a linear layer, pre-trained or from scratch."""
    import torch

    torch.manual_seed(seed)
    train, test = split
    network = encoder._fitted_network()
    network.generator = torch.Generator().manual_seed(seed)
    for dropout in (network.dropout, network.input_dropout):
        dropout.generator = network.generator
    if forget:
        moments = [
            (network.get_buffer(f"mean_{i}"), network.get_buffer(f"scale_{i}"))
            for i in (0, 1)
        ]
        with torch.no_grad():
            network.initialize(moments)
    tokens = torch.from_numpy(images)[:, None]
    there = torch.ones(len(images), 1, dtype=torch.bool)
    labels = torch.from_numpy(y)
    head = torch.nn.Linear(encoder.n_components, int(y.max()) + 1)
    groups = [
        {"params": network.parameters(), "lr": 3e-4},
        {"params": head.parameters()},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=1e-2)

    def logits(rows):
        z = network.encode(network.standardized(tokens[rows], 1), there[rows], 1)
        return head(z)

    network.train()
    for _ in range(n_epochs):
        for rows in torch.from_numpy(train)[torch.randperm(len(train))].split(128):
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(logits(rows), labels[rows]).backward()
            optimizer.step()
    network.eval()
    with torch.inference_mode():
        return logits(torch.from_numpy(test)).argmax(dim=1).numpy()


def probe_table(options):
    """Summarise the arms and compare them with their frozen controls."""
    cells = in_parallel(
        options,
        [
            (run_probe, "openclipart by creator", seed, fold, options.folds)
            for seed in range(options.seeds)
            for fold in range(options.folds)
        ],
    )
    controls = [
        ("linear, image, shared", "linear, image, frozen"),
        ("linear, image, frozen and shared", "linear, image, frozen"),
        ("unfrozen, pre-trained", "linear, image, frozen"),
        ("unfrozen, untrained", "linear, image, frozen"),
        ("unfrozen, pre-trained", "unfrozen, untrained"),
        ("linear, both, shared", "linear, both, frozen"),
    ]
    return {
        "records": summarise(cells, ["task", "arm"], ["macro-F1", "accuracy"]),
        "verdicts": [
            {"task": task, "arm": arm, "against": other}
            | difference(rows, arm, other, "macro-F1", options.folds)
            for task, rows in cells.groupby("task", sort=False)
            for arm, other in controls
        ],
    }


# Fewer, wrong and incomplete pairs


PAIR_ARMS = {
    "CSA": BASELINES["CSA"],
    "linear InfoNCE": BASELINES["linear InfoNCE"],
    "linear InfoNCE, input dropout": linear(),
    "shared": shared(),
    "adaptor": adaptor(),
}


def run_pairs(arm, encoder, kind, share, fold, n_folds):
    """Evaluate an arm on fewer, shuffled or incomplete training pairs."""
    X, titles, _, _, _ = pairs("openclipart")
    train, test = folds_of("openclipart by creator", n_folds)[fold]
    rng = np.random.default_rng(fold)
    rows = rng.permutation(train)
    Z = X[rows]
    if kind == "pairs":
        Z = Z[: share if share else len(Z)]
    else:
        touched = np.arange(len(Z)) < share * len(Z)
        if kind == "shuffled":
            columns = BLOCKS["text"]
            Z[touched, columns] = Z[touched, columns][rng.permutation(touched.sum())]
        else:  # half of them lose the text, half the image
            first = rng.random(len(Z)) < 0.5
            Z[touched & first, BLOCKS["text"]] = np.nan
            Z[touched & ~first, BLOCKS["image"]] = np.nan
    fitted = clone(encoder).fit(Z)
    amount = (str(share) if share else "all") if kind == "pairs" else f"{share:.0%}"
    return {
        "training pairs": {"pairs": "only"}.get(kind, kind),
        "arm": arm,
        "amount": amount,
        "fold": fold,
        "recall": mean_recall(fitted, X[test], titles[test]),
    }


def pairs_table(options):
    """Summarise recall by the change of the training pairs."""
    plan = [("pairs", share) for share in (100, 300, 1000, None)]
    plan += [("shuffled", share) for share in (0.25, 0.5)]
    plan += [("incomplete", share) for share in (0.5, 0.75)]
    cells = in_parallel(
        options,
        [
            (run_pairs, arm, encoder, kind, share, fold, options.folds)
            for kind, share in plan
            for arm, encoder in PAIR_ARMS.items()
            for fold in range(options.folds)
        ],
    )
    cells["what"] = cells["training pairs"] + " " + cells["amount"]
    by = cells.groupby(["arm", "what"], sort=False)["recall"]
    text = by.mean().map("{:.3f}".format) + " ± " + by.std().map("{:.3f}".format)
    wide = text.unstack().reindex(list(PAIR_ARMS))[list(dict.fromkeys(cells["what"]))]
    return {"records": wide.reset_index().to_dict("records")}


# Width, depth and backbone


def run_frontier(backbone, arm, encoder, fold, n_folds):
    """Evaluate one size with images encoded by one backbone."""
    X, titles, _, _, _ = pairs("openclipart", backbone)
    train, test = folds_of("openclipart by creator", n_folds)[fold]
    tick = time.perf_counter()
    fitted = clone(encoder).fit(X[train])
    seconds = time.perf_counter() - tick
    return {
        "images by": backbone,
        "arm": arm,
        "fold": fold,
        "recall": mean_recall(fitted, X[test], titles[test]),
        "parameters": n_parameters(fitted),
        "fit s": seconds,
    }


def frontier_table(options):
    """Summarise recall by size and backbone."""
    sizes = {
        f"adaptor, width {width}, {depth} layers": adaptor(
            n_components=width, n_layers=depth, n_queries=2 if depth else 0
        )
        for width in (64, 128, 256)
        for depth in (0, 1, 2)
    }
    context = {
        f"shared, {name}": shared(fusion, share_layer=share)
        for fusion in ("add", "concat")
        for share, name in (
            (True, f"{fusion}, one layer with contexts"),
            (False, f"{fusion}, a layer for each modality"),
        )
    }
    plan = [(BACKBONES[0], arm, encoder) for arm, encoder in (sizes | context).items()]
    some = [arm for arm in sizes if "width 128" in arm]
    plan += [(backbone, arm, sizes[arm]) for backbone in BACKBONES[1:] for arm in some]
    cells = in_parallel(
        options,
        [
            (run_frontier, backbone, arm, encoder, fold, options.folds)
            for backbone, arm, encoder in plan
            for fold in range(options.folds)
        ],
    )
    return {"records": summarise(cells, ["images by", "arm"], ["recall"], COSTS)}


# Lambda x noise on a shared space


def run_shared_shift(task, seed, fold, n_folds):
    """Tune shift and noise after the shared encoder in nested cross-validation."""
    X, titles, y, _, _ = pairs("emoji")
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    train, test = list(folds.split(X, y))[fold]
    encoder = shared().set_params(random_state=seed).fit(X[train])
    Z = encoder.transform(X)
    width = encoder.n_components
    blocks = {"text": slice(0, width), "image": slice(width, 2 * width)}
    shifts = [-1.0, 0.0, 0.5, 1.0]
    rows = []
    for name, head in {
        "LR": LR,
        "late": FusionClassifier(
            "late", blocks=blocks, max_epochs=10, random_state=seed
        ),
    }.items():
        pipeline = Pipeline(
            [("align", ModalityGapAligner(blocks, random_state=seed)), ("head", head)]
        )
        grid = {"align__shift": shifts, "align__noise_std": [0.0, 0.126]}
        search = GridSearchCV(pipeline, grid, cv=3, scoring="f1_macro").fit(
            Z[train], y[train]
        )
        still = clone(pipeline).set_params(align__shift=0.0).fit(Z[train], y[train])
        scores = {
            "tuned": f1_score(y[test], search.predict(Z[test]), average="macro"),
            "neither": f1_score(y[test], still.predict(Z[test]), average="macro"),
        }
        rows += [
            {
                "task": task,
                "what": name,
                "seed": seed,
                "fold": fold,
                "arm": arm,
                "score": score,
            }
            | search.best_params_
            for arm, score in scores.items()
        ]
    for method, shift in [("shift", s) for s in (*shifts, 1.5)] + [("center", 1.0)]:
        aligned = ModalityGapAligner(blocks, method=method, shift=shift).fit(Z[train])
        a, b = (aligned.transform(Z[test])[:, columns] for columns in blocks.values())
        recall = np.mean(
            [
                retrieval_recall(p, q, k=k, labels=titles[test])
                for p, q in ((a, b), (b, a))
                for k in KS
            ]
        )
        arm = f"{method} {shift:g}"
        common = {
            "task": task,
            "what": "recall",
            "seed": seed,
            "fold": fold,
            "arm": arm,
        }
        rows.append(common | {"score": recall, "gap": aligned.gap_after_})
    return rows


def shared_shift_table(options):
    """Summarise, and test whether tuning gains."""
    cells = in_parallel(
        options,
        [
            (run_shared_shift, "emoji random", seed, fold, options.folds)
            for seed in range(options.seeds)
            for fold in range(options.folds)
        ],
    )
    heads = cells[cells["what"] != "recall"]
    chosen = heads[heads["arm"] == "tuned"]
    return {
        "records": summarise(cells, ["task", "what", "arm"], ["score", "gap"]),
        "verdicts": [
            {"task": task, "head": head}
            | difference(rows, "tuned", "neither", "score", options.folds)
            for (task, head), rows in heads.groupby(["task", "what"], sort=False)
        ],
        "chosen": chosen.value_counts(
            ["task", "what", "align__shift", "align__noise_std"]
        )
        .sort_index()
        .rename("times")
        .reset_index()
        .to_dict("records"),
    }


# Cost of encoding


def run_cost(arm, encoder):
    """Fit briefly, then encode many rows in a separate process."""
    features = "tokens" if arm.endswith("tokens") else "pooled"
    X, *_ = pairs("openclipart", features)
    fitted = clone(encoder)
    if hasattr(fitted, "max_epochs"):
        fitted.set_params(max_epochs=1)
    fitted.fit(take(X, slice(0, 512)))
    n_rows = 2_000 if features == "tokens" else 20_000
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        measured = pool.submit(
            time_encoding, fitted, take(X, slice(0, 500)), n_rows
        ).result()
    return {"arm": arm, "parameters": n_parameters(fitted)} | measured


def time_encoding(fitted, X, n_rows):
    """Return rows per second and the peak memory beyond the table."""
    Z = take(X, np.arange(n_rows) % len(X))
    fitted.transform(take(Z, slice(0, 100)))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
    before = peak_mib()
    seconds = []
    for _ in range(3):
        tick = time.perf_counter()
        fitted.transform(Z)
        seconds.append(time.perf_counter() - tick)
    return {
        "rows/s": n_rows / np.median(seconds),
        "MiB more at the peak": peak_mib() - before,
    }


def cost_table(options):
    """Measure the arms sequentially."""
    arms = BASELINES | OURS | OF_TOKENS | RELEASED
    return {"records": [run_cost(arm, encoder) for arm, encoder in arms.items()]}


# The command


TABLES = {
    "retrieval": retrieval_table,
    "zero_shot": zero_shot_table,
    "probe": probe_table,
    "pairs": pairs_table,
    "frontier": frontier_table,
    "shared_shift": shared_shift_table,
    "crossmodal_cost": cost_table,
}


def main():
    """Compute and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES, nargs="?", default="retrieval")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()

    # Workers then read all vectors from the store.
    more = {
        "retrieval": ["tokens"],
        "crossmodal_cost": ["tokens"],
        "frontier": BACKBONES,
    }
    for dataset in TITLES:
        pairs(dataset)
    for features in more.get(options.table, []):
        pairs("openclipart", features)
    tick = time.perf_counter()
    result = TABLES[options.table](options)
    show(result, options.json)
    print(f"{time.perf_counter() - tick:.0f} s")


if __name__ == "__main__":
    main()
