"""Check the Shapley values of modalities, and rank encoders by successive halving.

Table "modalities": the report on emoji and clip art, with the texts in MiniLM vectors,
the images in EfficientNet-lite0 vectors, and for clip art the numbers of the file.

Table "encoders": the winner of `rank_encoders` against that of a comparison on all
rows, for six tasks and several seeds. All encoders are installed as packages: layers
and poolings of MiniLM, its table of tokens as static embeddings, the last and inner
feature maps of EfficientNet-lite0 and lite2, hashed words and characters, thumbnails
and histograms of colours. Layers of MiniLM share their passes, which count once. The
comparison encodes all cells in a new store, and its seconds of processor time give the
cost of a cell in each network. Rankings then read these vectors, and pay for the cells
that they use. Rankings of the first table with a
new store check the sum.
"""

import argparse
import json
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from comparison import show
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from vectors import LOADERS, TITLES, outer_folds

from sklembed import (
    CallableBackend,
    FrozenEncoder,
    KernelFusionClassifier,
    PerModalityUnion,
)
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.encoders.joint import fill_stores
from sklembed.encoders.packaged import efficientnet_lite
from sklembed.evaluation import modality_report, rank_encoders
from sklembed.plots import ModalityDisplay

NUMBERS = ["svg_kb", "n_path", "n_group", "n_gradient"]
DATASETS = {"emoji": "emoji", "clip art": "openclipart"}
COLUMNS = {"texts": ["text"], "images": ["image"], "both": ["text", "image"]}
# Options of the rankings that are compared.
SETTINGS = {
    "default": {},
    "up to a third of the rows": {"max_resources": 1 / 3},
    "half of the encoders, up to half of the rows": {"factor": 2, "max_resources": 0.5},
}

# The encoders


def hashed(analyzer):
    """Return counts of hashed words or characters, as a backend."""

    def load():
        vectorizer = HashingVectorizer(
            n_features=1024, analyzer=analyzer, ngram_range=(1, 3)
        )
        return lambda texts: vectorizer.transform(texts).toarray()

    return CallableBackend(
        load,
        name=f"bench_reports hashed {analyzer}",
        version="1",
        modality="text",
        n_features=1024,
    )


def thumbnail():
    """Return the pixels of an image of 8 x 8 pixels, as a backend."""

    def load():
        def encode(images):
            return [np.asarray(image.resize((8, 8))).ravel() / 255 for image in images]

        return encode

    return CallableBackend(
        load,
        name="bench_reports thumbnail",
        version="1",
        modality="image",
        n_features=192,
    )


def histogram():
    """Return the shares of 64 colours, as a backend."""

    def load():
        def encode(images):
            vectors = []
            for image in images:
                pixels = np.asarray(image).reshape(-1, 3) // 64
                colours = pixels @ [16, 4, 1]
                shares = np.bincount(colours, minlength=64) / len(colours)
                vectors.append(np.sqrt(shares))
            return vectors

        return encode

    return CallableBackend(
        load,
        name="bench_reports histogram",
        version="1",
        modality="image",
        n_features=64,
    )


def save_static(folder):
    """Save the token table of MiniLM as static token embeddings; return the path."""
    from safetensors.numpy import load_file, save_file

    folder = Path(folder) / "minilm-tokens"
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    shutil.copy(Path(minilm()) / "tokenizer.json", folder)
    tensors = load_file(Path(minilm()) / "model.safetensors")
    table = tensors["embeddings.word_embeddings.weight"]
    save_file({"embeddings": table}, folder / "model.safetensors")
    settings = {"model_type": "model2vec", "normalize": True}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def text_encoders(folder):
    """Return encoders of texts by name."""
    encoder = partial(FrozenEncoder, runtime="torch", store=folder / "store.sqlite")
    encoders = {
        "hashed words": encoder(hashed("word")),
        "hashed characters": encoder(hashed("char_wb")),
        "static tokens": encoder(save_static(folder), runtime="auto"),
    }
    for layer in (1, 2, 3, 4, 5):
        encoders[f"MiniLM layer {layer}"] = encoder(minilm(), layer=layer)
    encoders["MiniLM"] = encoder(minilm())
    encoders["MiniLM, class token"] = encoder(minilm(), pooling="cls")
    encoders["MiniLM, max"] = encoder(minilm(), pooling="max")
    encoders["MiniLM layers 4-6, mean"] = encoder(
        minilm(), layer=[4, 5, 6], layer_aggregation="mean"
    )
    return encoders


def image_encoders(folder):
    """Return encoders of images by name."""
    encoder = partial(FrozenEncoder, runtime="torch", store=folder / "store.sqlite")
    encoders = {
        "thumbnail": encoder(thumbnail()),
        "histogram": encoder(histogram()),
        "lite0": encoder(efficientnet_lite0()),
        "lite2": encoder(efficientnet_lite(2)),
    }
    for stride in (16, 8):
        for size in (0, 2):
            backend = efficientnet_lite(size, stride=stride, side=1)
            encoders[f"lite{size}, stride {stride}"] = encoder(backend, output="tokens")
    return encoders


def encoders_of(columns, dataset, folder):
    """Return encoders and their columns by name."""
    encoders = {}
    if "text" in columns:
        for name, encoder in text_encoders(folder).items():
            encoders[name] = encoder, TITLES[dataset]
    if "image" in columns:
        for name, encoder in image_encoders(folder).items():
            encoders[name] = encoder, "image"
    return encoders


def network(name):
    """Return the network of an encoder, whose passes its layers and poolings share."""
    return "MiniLM" if name.startswith("MiniLM") else name


# Encoders


def encoders_table(options):
    """Compare the winners of rankings and of comparisons on all rows."""
    scores, cells, seconds = {}, [], {}
    for kind, columns in COLUMNS.items():
        for title in options.data:
            dataset = DATASETS[title]
            X, y, _ = read(dataset, options)
            candidates = encoders_of(columns, dataset, options.folder)
            if len(columns) == 1:
                seconds[title] = seconds.get(title, {}) | encode_all(
                    f"{dataset}-{kind}", candidates, X, options
                )
            for seed in range(options.seeds):
                if len(columns) == 1:
                    full = compare(candidates, X, y, seed)
                    scores[title, kind, seed] = full.assign(data=title)
                parts = [kind]
                if len(columns) > 1:
                    parts = ["texts", "images"]
                full = pd.concat([scores[title, part, seed] for part in parts])
                for setting, rungs in SETTINGS.items():
                    result = ranking(candidates, X, y, seed, **rungs)
                    names = {"data": f"{title}, {kind}", "setting": setting}
                    cells.append(names | judge(result, full, seconds[title], len(y)))
                    print(cells[-1], flush=True)
    cells = pd.DataFrame(cells)
    networks = pd.DataFrame(seconds).rename_axis("network").reset_index()
    return {
        "winners": verdicts(cells, ["setting", "data"]),
        "winners_over_tasks": verdicts(cells, ["setting"]),
        "scores": mean_scores(pd.concat(scores.values())),
        "seconds": networks.to_dict("records"),
        "new_store": with_new_stores(options, seconds),
    }


def read(dataset, options):
    """Return the table, the classes and the groups of a data set."""
    data = LOADERS[dataset]()
    rows = slice(None, None, options.every)
    return data.data.iloc[rows], data.target.to_numpy()[rows], data.groups[rows]


def compare(encoders, X, y, seed):
    """Return the scores of all encoders on all rows."""
    return ranking(
        encoders, X, y, seed, min_resources=len(y), max_resources=len(y)
    ).results


def ranking(encoders, X, y, seed, **options):
    """Rank encoders with folds and rows by a seed."""
    return rank_encoders(
        encoders,
        X,
        y,
        cv=StratifiedKFold(5, shuffle=True, random_state=seed),
        scoring="f1_macro",
        random_state=seed,
        **options,
    )


def encode_all(name, encoders, X, options):
    """Encode all cells by each network; return its seconds, without loading.

    Seconds are processor time, since other programs affect the clock.
    """
    path = options.folder / f"seconds-{name}-{options.every}.json"
    jobs, seconds = {}, {}
    if path.exists():
        seconds = json.loads(path.read_text())
    for name, (encoder, column) in encoders.items():
        jobs.setdefault(network(name), []).append((encoder, X[[column]]))
    for name, together in jobs.items():
        if name in seconds:  # by a run that was interrupted
            continue
        together[0][0].warm_up()
        tick = time.process_time()
        reports = fill_stores(together)
        seconds[name] = time.process_time() - tick
        if min(report["encoded"] for report in reports) == 0:
            raise SystemExit(
                f"{name} is stored, and cannot be timed. Delete {path.parent}."
            )
        path.write_text(json.dumps(seconds))
    return seconds


def judge(result, full, seconds, n_rows):
    """Compare the winner with that on all rows, and the seconds of encoding."""
    scores = full.set_index("encoder")
    winner = scores["score"].idxmax()
    used, total = 0.0, 0.0
    rows = result.results.groupby("encoder")["rows"].max()
    rows_of_network = rows.groupby(network).max()
    for name, n_used in rows_of_network.items():
        used += seconds[name] * n_used / n_rows
        total += seconds[name]
    gap = scores.loc[winner, "score"] - scores.loc[result.best, "score"]
    return {
        "winner": result.best,
        "same winner": result.best == winner,
        "same network": network(result.best) == network(winner),
        "within sd of folds": gap <= scores.loc[winner, "sd"],
        "lower by": gap,
        "share of encoding time": used / total,
        "used s": used,
        "total s": total,
    }


def verdicts(cells, keys):
    """Return the share of equal winners and of the time for each task."""
    by = cells.groupby(keys, sort=False)
    names = ["same winner", "same network", "within sd of folds", "lower by"]
    table = by[[*names, "share of encoding time"]].mean()
    table["largest share of time"] = by["share of encoding time"].max()
    table["share of all seconds"] = by["used s"].sum() / by["total s"].sum()
    table["winners"] = by["winner"].agg(lambda names: ", ".join(sorted(set(names))))
    if "data" not in keys:
        table = table.drop(columns="winners")
    return table.reset_index().to_dict("records")


def mean_scores(scores):
    """Return the mean score of each encoder on all rows, over seeds."""
    by = scores.groupby(["data", "encoder"], sort=False)
    table = by[["score", "sd", "bytes per 1000 rows"]].mean().reset_index()
    table = table.sort_values(["data", "score"], ascending=[True, False])
    return table.to_dict("records")


def with_new_stores(options, seconds):
    """Rank with new stores, on the first table; compare the seconds with the estimate."""
    records = []
    for kind in ("texts", "images"):
        for title in options.data[:1]:
            dataset = DATASETS[title]
            X, y, _ = read(dataset, options)
            encoders = encoders_of(COLUMNS[kind], dataset, options.folder)
            store = options.folder / "new.sqlite"
            for encoder, _ in encoders.values():
                encoder.set_params(store=store)
            tick = time.process_time()
            result = ranking(encoders, X, y, 0, max_resources=1 / 3).results
            elapsed = time.process_time() - tick
            networks = {network(name) for name in encoders}
            total = sum(seconds[title][name] for name in networks)
            rows = result.groupby("encoder")["rows"].max().groupby(network).max()
            used = sum(seconds[title][name] * n for name, n in rows.items()) / len(y)
            records.append(
                {
                    "data": f"{title}, {kind}",
                    "all rows s": total,
                    "ranking, estimated s": used,
                    "ranking, clock s": result["encode s"].sum(),
                    "ranking with heads s": elapsed,
                }
            )
            for path in options.folder.glob("new.sqlite*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return records


# Modalities


def modalities_table(options):
    """Report on two and on three modalities."""
    subsets, values, degradation, sums = [], [], [], []
    for title in options.data:
        dataset = DATASETS[title]
        X, y, groups = read(dataset, options)
        report = modality_report(
            pipeline_of(dataset),
            X,
            y,
            cv=outer_folds(y, groups, True, options.folds),
            scoring="f1_macro",
            random_state=0,
        )
        subsets += summarise(report.subsets, title, ["modalities"], "score")
        values += summarise(report.shapley, title, ["modality"], "value")
        keys = ["kind", "modality", "level"]
        degradation += summarise(report.degradation, title, keys, "score")
        largest = report.subsets["n_modalities"].max()
        fold = report.subsets.set_index("fold")
        ends = [fold[fold["n_modalities"] == n]["score"] for n in (0, largest)]
        sums_of_fold = report.shapley.groupby("fold")["value"].sum()
        error = (sums_of_fold - (ends[1] - ends[0])).abs().max()
        sums.append({"data": title, "largest error of the sums": error})
        if options.figures:
            display = ModalityDisplay.from_report(report).plot()
            display.figure_.savefig(options.figures / f"modalities-{dataset}.png")
    return {
        "subsets": subsets,
        "shapley": values,
        "degradation": degradation,
        "sums": sums,
    }


def pipeline_of(dataset):
    """Return a pipeline of texts, images and, for clip art, numbers."""
    branches = [
        ("text", FrozenEncoder(minilm()), TITLES[dataset]),
        ("image", FrozenEncoder(efficientnet_lite0(), normalize=True), "image"),
    ]
    if dataset == "openclipart":
        numbers = make_pipeline(FunctionTransformer(np.log1p), StandardScaler())
        branches.append(("table", numbers, NUMBERS))
    head = KernelFusionClassifier(random_state=0)
    return make_pipeline(PerModalityUnion(branches), head).set_output(
        transform="pandas"
    )


def summarise(table, title, keys, measure):
    """Return records of the mean and the standard deviation over folds."""
    by = table.groupby(keys, sort=False)[measure]
    records = by.agg(["mean", partial(np.std, ddof=0)]).reset_index()
    records.columns = [*keys, measure, "sd"]
    return records.assign(data=title)[["data", *keys, measure, "sd"]].to_dict("records")


TABLES = {"modalities": modalities_table, "encoders": encoders_table}


def main():
    """Compute and print the tables, and update the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=[*TABLES, "all"], nargs="?", default="all")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", nargs="+", choices=DATASETS, default=[*DATASETS])
    parser.add_argument("--every", type=int, default=1, help="use every n-th row")
    parser.add_argument("--folder", type=Path, default=Path("examples/output/reports"))
    parser.add_argument("--figures", type=Path, help="folder of figures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    result = {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
    for name, table in TABLES.items():
        if options.table in (name, "all"):
            result |= table(options)
            result[f"settings_of_{name}"] = [
                {
                    "data": ", ".join(options.data),
                    "every n-th row": options.every,
                    "folds": options.folds if name == "modalities" else 5,
                    "seeds": 1 if name == "modalities" else options.seeds,
                }
            ]
            show(result, options.json)


if __name__ == "__main__":
    main()
