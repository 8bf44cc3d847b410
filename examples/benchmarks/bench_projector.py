"""Measure the cost of the projector against a bare torch loop, skorch, embetter and
numpy.

A fit without cross-fitting is compared with the same arithmetic in a bare loop over
batches, and in skorch with its DataLoader and with AdamW, fused and not. The
cross-fitted ``fit_transform`` is compared with that fit. The projector with default
parameters, and a plain one (``cv=None, passthrough=False``) with 20 and 10 epochs, are
compared with embetter's ``ContrastiveTuner``, which uses no GPU: seconds of
``fit_transform``, and macro-F1 of a logistic regression on held-out rows. ``transform``
is compared with the matrix products alone. The memory of a fit is measured in a
separate process, beyond its memory with the input.

The arms alternate in one process, in reversed order in every second round. Ratios are
medians over rounds. The embeddings are synthetic. Threads are as set by torch and
numpy. Run the script alone: other work on the same cores distorts even the ratios.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from bench_grid_search import cpu, installed
from bench_store import peak_mib
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from skorch import NeuralNet
from torch import nn

from sklembed import ContrastiveProjector
from sklembed._torch import resolve_device

N_FEATURES, N_HIDDEN, N_COMPONENTS = 768, 256, 128
BATCH_SIZE, N_EPOCHS = 128, 10
N_FOLDS = 5
ROWS = {"fit": 10_000, "embetter": 4_000, "transform": 50_000, "memory": 100_000}
MEGABYTE = 1e6


def make_embeddings(n_rows, n_classes=10, modes_per_class=2, n_directions=8, noise=3.0):
    """Return unit rows in a cone; each class has several modes in a few directions."""
    rng = np.random.default_rng(0)
    normal = partial(rng.standard_normal, dtype=np.float32)
    n_modes = n_classes * modes_per_class
    modes = normal((n_modes, n_directions)) @ normal((n_directions, N_FEATURES))
    modes /= np.float32(np.sqrt(n_directions))
    cone = 2 * normal(N_FEATURES)
    mode = rng.integers(n_modes, size=n_rows)
    X = modes[mode] + cone + np.float32(noise) * normal((n_rows, N_FEATURES))
    return X / np.linalg.norm(X, axis=1, keepdims=True), mode % n_classes


# Fits of the same arithmetic


def make_projector(device, **params):
    """Return the projector that is compared with bare loops."""
    return ContrastiveProjector(
        N_COMPONENTS,
        hidden_layer_sizes=(N_HIDDEN,),
        batch_size=BATCH_SIZE,
        max_epochs=N_EPOCHS,
        passthrough=False,
        device=device,
        **params,
    )


def make_network():
    """Return the network that `make_projector` trains."""
    return nn.Sequential(
        nn.Linear(N_FEATURES, N_HIDDEN),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(N_HIDDEN, N_COMPONENTS),
    )


class SupCon(nn.Module):
    """Supervised contrastive loss of cosines, for one label per row."""

    def forward(self, z, y):
        z = F.normalize(z, dim=1)
        diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
        log_p = (z @ z.T / 0.1).masked_fill(diagonal, -1e9).log_softmax(dim=1)
        positive = (y[:, None] == y).float().masked_fill(diagonal, 0)
        n_positives = positive.sum(dim=1)
        losses = -(positive * log_p).sum(dim=1) / n_positives.clamp(min=1)
        return losses.sum() / (n_positives > 0).sum().clamp(min=1)


def standardise(X):
    """Centre and scale columns."""
    return (X - X.mean(axis=0)) / X.std(axis=0)


def fit_bare_loop(X, y, device):
    """Train in a loop with torch alone."""
    X, y = torch.from_numpy(standardise(X)).to(device), torch.from_numpy(y).to(device)
    network, loss = make_network().to(device), SupCon()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-3, weight_decay=0.01, fused=True
    )
    for _ in range(N_EPOCHS):
        for batch in torch.randperm(len(X)).to(device).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss(network(X[batch]), y[batch]).backward()
            optimizer.step()
    return [parameter.detach().cpu() for parameter in network.parameters()]


def fit_skorch(X, y, device, **optimizer):
    """Train by skorch with its default iterator."""
    # Defaults are the Dataset, the DataLoader, which fetches row by row, and the callbacks of the
    # history. Unlike the defaults, rows are shuffled and there is no validation set, as in the
    # bare loop.
    net = NeuralNet(
        make_network(),
        SupCon(),
        optimizer=torch.optim.AdamW,
        optimizer__weight_decay=0.01,
        lr=1e-3,
        max_epochs=N_EPOCHS,
        batch_size=BATCH_SIZE,
        iterator_train__shuffle=True,
        train_split=None,
        verbose=0,
        device=device,
        **optimizer,
    )
    return net.fit(standardise(X), y)


def bench_fits(n_rows, repeats, device):
    """Time fits of all arms, and the cross-fitted projection."""
    X, y = make_embeddings(n_rows)
    single = make_projector(device, cv=None, random_state=0)
    crossed = make_projector(device, cv=N_FOLDS, random_state=0)
    arms = {
        "fit": lambda turn: single.fit(X, y),
        "bare": lambda turn: fit_bare_loop(X, y, device),
        "skorch": lambda turn: fit_skorch(X, y, device),
        "fused": lambda turn: fit_skorch(X, y, device, optimizer__fused=True),
        "crossed": lambda turn: crossed.fit_transform(X, y),
    }
    seconds, _ = take_turns(arms, repeats)
    most = 0.75 * (N_FOLDS + 1) if device == "cpu" else 2
    return [
        row("fit, seconds", np.median(seconds["fit"])),
        row(
            "fit / bare torch loop",
            np.median(seconds["fit"] / seconds["bare"]),
            most=1.15,
        ),
        row(
            "fit / skorch at defaults",
            np.median(seconds["fit"] / seconds["skorch"]),
            most=0.8,
        ),
        row("fit / skorch, AdamW fused", np.median(seconds["fit"] / seconds["fused"])),
        row(
            f"fit_transform in {N_FOLDS} folds / fit",
            np.median(seconds["crossed"] / seconds["fit"]),
            most=most,
        ),
    ]


# embetter


def bench_embetter(n_rows, repeats, device):
    """Compare seconds and the macro-F1 of a classifier on projected rows."""
    from embetter.finetune import ContrastiveTuner

    X, y = make_embeddings(n_rows)
    splits = [
        train_test_split(X, y, test_size=0.5, stratify=y, random_state=turn)
        for turn in range(repeats)
    ]
    plain = {"cv": None, "passthrough": False}
    arms = {
        "embetter": lambda turn: adapt(ContrastiveTuner(hidden_dim=128), splits[turn]),
        "plain projector": lambda turn: adapt(
            ContrastiveProjector(device=device, random_state=turn, **plain),
            splits[turn],
        ),
        "plain projector, half the epochs": lambda turn: adapt(
            ContrastiveProjector(
                device=device, random_state=turn, max_epochs=10, **plain
            ),
            splits[turn],
        ),
        "projector at defaults": lambda turn: adapt(
            ContrastiveProjector(device=device, random_state=turn), splits[turn]
        ),
    }
    seconds, adapted = take_turns(arms, repeats)
    scores = {
        name: np.array([score(*pair) for pair in zip(pairs, splits, strict=True)])
        for name, pairs in adapted.items()
    }
    return compare(seconds, scores)


def adapt(tuner, split):
    """Fit on the training rows and project them."""
    X_train, _, y_train, _ = split
    return tuner, tuner.fit_transform(X_train, y_train)


def score(adapted, split):
    """Return the macro-F1 of a classifier on held-out projected rows."""
    tuner, Z_train = adapted
    _, X_test, y_train, y_test = split
    classifier = LogisticRegression(max_iter=1000).fit(Z_train, y_train)
    return f1_score(
        y_test, classifier.predict(tuner.transform(X_test)), average="macro"
    )


def compare(seconds, scores):
    """Return the rows of each arm and its comparison with embetter."""
    peer, _, short, _ = seconds
    rows = []
    for name in seconds:
        rows.append(row(f"{name}, seconds", np.median(seconds[name])))
        rows.append(row(f"{name}, macro-F1", np.median(scores[name])))
        if name != peer:
            # Only the plain projector with few epochs has a target for its speed.
            least = 3 if name == short else None
            faster, better = seconds[peer] / seconds[name], scores[name] - scores[peer]
            rows.append(
                row(f"{name}, times faster than {peer}", np.median(faster), least=least)
            )
            rows.append(row(f"{name}, F1 beyond {peer}'s", np.median(better), least=0))
    return rows


# transform and memory


def bench_transform(n_rows, repeats, device):
    """Compare `transform` with its matrix products alone."""
    X, y = make_embeddings(n_rows)
    projector = make_projector(device, cv=None, random_state=0).fit(X[:1000], y[:1000])
    first, second = (
        projector.weights_[f"layers.{i}.weight"].T.copy() for i in range(2)
    )
    arms = {
        "ours": lambda turn: projector.transform(X),
        "bare": lambda turn: multiply(X, first, second),
    }
    seconds, _ = take_turns(arms, repeats)
    share = 100 * np.median(seconds["bare"] / seconds["ours"])
    return [
        row("transform, thousand rows/s", n_rows / np.median(seconds["ours"]) / 1000),
        row("transform, % of the rows/s of bare products", share, least=80),
    ]


def multiply(X, first, second):
    """Project without biases, scaling and validation."""
    H = X @ first
    np.maximum(H, 0, out=H)
    return H @ second


def bench_memory(n_rows, device):
    """Measure the peak memory of fits, each in a separate process."""
    X, y = make_embeddings(n_rows)
    size = X.nbytes / MEGABYTE
    rows = [row("memory: the input, MB", size)]
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/X.npy", X)
        np.save(f"{folder}/y.npy", y)
        for arm in ("no passthrough", "passthrough"):
            command = [
                sys.executable,
                __file__,
                "--device",
                device,
                "--worker",
                folder,
                arm,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            name = f"memory: fit, {arm}, MB beyond the input held"
            rows.append(row(name, float(done.stdout), most=size + 200))
    return rows


def print_memory(folder, arm, device):
    """Print the peak memory of a fit; runs in a separate process."""
    # The memory of a fit does not grow with its epochs.
    projector = ContrastiveProjector(
        device=device, passthrough=arm == "passthrough", max_epochs=1, random_state=0
    )
    projector.fit(*make_embeddings(1000))
    X, y = np.load(f"{folder}/X.npy"), np.load(f"{folder}/y.npy")
    held = peak_mib()
    projector.fit(X, y)
    print((peak_mib() - held) * 2**20 / MEGABYTE)


# Measurement


def take_turns(arms, repeats):
    """Run each arm once to warm up, then alternate; return seconds and results."""
    for run in arms.values():
        run(0)
    seconds, results = ({name: [] for name in arms} for _ in range(2))
    for turn in range(repeats):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            random.seed(turn)  # seeds the pairs of embetter
            torch.manual_seed(turn)
            tick = time.perf_counter()
            result = arms[name](turn)
            seconds[name].append(time.perf_counter() - tick)
            results[name].append(result)
    return {name: np.array(ticks) for name, ticks in seconds.items()}, results


def row(measure, figure, *, most=None, least=None):
    """Return a row of the table: a figure, its target and whether it is met."""
    target = met = ""
    if most is not None:
        target, met = f"<= {most:g}", "yes" if figure <= most else "no"
    if least is not None:
        target, met = f">= {least:g}", "yes" if figure >= least else "no"
    return {"measure": measure, "figure": float(figure), "target": target, "met": met}


def main():
    """Measure, print the table, and write it as JSON if there is a path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--device", default="auto", help="device for training; default auto"
    )
    parser.add_argument(
        "--fast", action="store_true", help="use a fiftieth of the rows"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # folder, arm
    options = parser.parse_args()
    device = str(resolve_device(options.device))
    if options.worker:
        print_memory(*options.worker, device)
        return

    sizes = {name: n // 50 if options.fast else n for name, n in ROWS.items()}
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": installed(["sklembed", "torch", "skorch", "numpy", "embetter"]),
        "rows": sizes,
        "repeats": options.repeats,
    }
    print("device: {device}; {threads} threads on {cpu}\n".format(**about), flush=True)
    records = [
        *bench_fits(sizes["fit"], options.repeats, device),
        *bench_embetter(sizes["embetter"], options.repeats, device),
        *bench_transform(sizes["transform"], options.repeats, device),
        *bench_memory(sizes["memory"], device),
    ]
    print(pd.DataFrame(records).to_string(index=False, float_format="{:,.2f}".format))
    if options.json:
        options.json.write_text(
            json.dumps({**about, "records": records}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
