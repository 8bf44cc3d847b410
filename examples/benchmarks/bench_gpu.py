"""Measure encoding and training on a GPU, and check that they work there.

Each stage is independent. An error, or a stage that exceeds its time, is recorded with its
traceback, and the next stage follows. The JSON file is written after each stage.

- Texts are encoded by all-MiniLM-L6-v2, and images by EfficientNet-lite0 and a DINOv2-small.
  The baseline is sentence-transformers or a loop in transformers. A model whose weights are
  absent has random ones, which is as fast.
- A projector, 100 projectors at once, a fusion network, a shared space and a segmenter are
  trained on the device and on the CPU, and compared by their score on held-out rows.
- MiniLM and EfficientNet-lite0 are fine-tuned for an epoch: all weights, and adapters if peft is
  installed.
- A parallel search shares the device; a batch that is too large for the device is halved; a
  training set that is too large for it stays in the memory of the host; a process that only
  reads stored vectors uses no memory of the device.

``--device cpu --fast`` is a dry run with small sizes. `tools/gpu.sh` calls this script.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from joblib import parallel_config
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sklembed import (
    CallableBackend,
    ContrastiveProjector,
    FinetunedClassifier,
    FrozenEncoder,
    FusionClassifier,
    PatchSegmenter,
    SharedFusionEncoder,
    _training,
)
from sklembed.datasets import load_emoji, load_openclipart
from sklembed.encoders import efficientnet_lite0, inference, minilm
from sklembed.nn.layers import Applied

N_FEATURES, N_CLASSES = 384, 20
N_HELD_OUT = 2000
DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "scikit-learn",
    "skorch",
    "peft",
)
# Sizes of a full run, and of a dry run.
FULL = {
    "texts": 2048,
    "tokens": 256,  # of the longest text
    "titles": 8192,
    "texts on the CPU": 512,
    "images": 512,
    "images on the CPU": 64,
    "layers": 12,  # of DINOv2
    "rows": 10_000,
    "networks": 100,
    "epochs": 3,
    "epochs on the device alone": 10,
    "pairs": 10_000,
    "masks": 200,
    "cells of fine-tuning": 1024,
    "rows of a search": 4000,
    "texts of a batch": 4096,  # more than the memory of a device takes
    "repeats": 2,
    "seconds": 60,  # limit of a stage
}
FAST = {
    "texts": 4,
    "tokens": 32,
    "titles": 4,
    "texts on the CPU": 4,
    "images": 2,
    "images on the CPU": 2,
    "layers": 1,
    "rows": 600,
    "networks": 4,
    "epochs": 1,
    "epochs on the device alone": 2,
    "pairs": 200,
    "masks": 8,
    "cells of fine-tuning": 48,
    "rows of a search": 200,
    "texts of a batch": 4,
    "repeats": 1,
    "seconds": 60,
}


# Data


def make_texts(sizes, tokenizer):
    """Return distinct texts of at least 8 tokens, made of words of the bundled data."""
    rng = np.random.default_rng(0)
    words = " ".join(load_openclipart().data["title"].dropna()).split()
    texts = []
    for length in rng.integers(8, sizes["tokens"] + 1, sizes["texts"]):
        drawn = " ".join(rng.choice(words, length))
        ids = tokenizer(drawn, add_special_tokens=False)["input_ids"]
        texts.append(tokenizer.decode(ids[: length - 2]))
    return texts


def make_titles(n_titles):
    """Return distinct titles, of which each is a name of an emoji and a title of clip art."""
    rng = np.random.default_rng(0)
    names = load_emoji().data["name"].dropna().to_numpy()
    titles = load_openclipart().data["title"].dropna().to_numpy()
    chosen = zip(rng.choice(names, n_titles), rng.choice(titles, n_titles), strict=True)
    return [f"{name} {title} {i}" for i, (name, title) in enumerate(chosen)]


def make_images(n_images):
    """Return images of 224 x 224 pixels of noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n_images, 224, 224, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def make_rows(n_rows, n_blocks=1, seed=0):
    """Return noisy vectors in blocks, each with the class in a few directions, and classes."""
    rng, maps = np.random.default_rng(seed), np.random.default_rng(7)
    y = rng.integers(N_CLASSES, size=n_rows)
    blocks = []
    for _ in range(n_blocks):
        modes = maps.normal(size=(N_CLASSES, 16)) @ maps.normal(size=(16, N_FEATURES))
        noise = rng.normal(size=(n_rows, N_FEATURES))
        blocks.append(modes[y] / 8 + 2.5 * noise)
    return np.hstack(blocks).astype(np.float32), y


def make_scenes(n_images, n_rows=16, n_features=64):
    """Return a column of patches of noisy scenes of three classes, and their masks."""
    rng = np.random.default_rng(0)
    looks = rng.normal(size=(3, n_features))
    coarse = rng.integers(0, 3, (n_images, n_rows // 4, n_rows // 4))
    classes = coarse.repeat(4, axis=1).repeat(4, axis=2)
    X = np.empty((n_images, 1), dtype=object)
    for i, grid in enumerate(classes):
        noise = rng.normal(size=(n_rows**2, n_features))
        X[i, 0] = (looks[grid.ravel()] + noise).astype(np.float32)
    return X, classes.repeat(4, axis=1).repeat(4, axis=2)


# Models


def make_minilm(folder):
    """Return the directory of a MiniLM with the best weights at hand, and their kind."""
    carried = os.environ.get("SKLEMBED_MINILM")
    if carried:
        return carried, "trained, rounded to float16"
    try:
        return minilm(), "trained"
    except ImportError:
        pass
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    directory = f"{folder}/minilm"
    transformers.BertModel(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory, "random"


def make_tokenizer():
    """Return a tokenizer of the most frequent words and letters of the bundled data."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=30522, special_tokens=special)
    texts = load_openclipart().data["title"].dropna().tolist()
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def make_dinov2(folder, n_layers):
    """Return the directory of a DINOv2-small with random weights."""
    config = transformers.Dinov2Config(
        num_hidden_layers=n_layers,
        hidden_size=384,
        num_attention_heads=6,
        image_size=224,
        patch_size=14,
    )
    directory = f"{folder}/dinov2"
    transformers.Dinov2Model(config).save_pretrained(directory)
    size = {"height": 224, "width": 224}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(directory)
    return directory


def make_efficientnet(device):
    """Return EfficientNet-lite0 as a backend on a device, and the kind of its weights."""
    try:
        prepare, network = efficientnet_lite0().load()
        weights = "trained"
    except ImportError:
        from efficientnet_lite_pytorch import EfficientNet

        prepare, weights = pixels_of, "random"
        network = EfficientNet.from_name("efficientnet-lite0").requires_grad_(False)
        network = Applied(lambda net, x: net.extract_features(x).mean((2, 3)), network)
    backend = CallableBackend(
        partial(load_on, device, prepare, network),
        name=f"efficientnet-lite0 on {device}",
        version=weights,
        modality="image",
        n_features=1280,
    )
    return backend, weights


def load_on(device, prepare, network):
    """Return the functions of a backend; the network takes and returns one tensor."""
    return prepare, First(network).to(device)


class First(torch.nn.Module):
    """A network that returns the first of several tensors."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    def forward(self, pixels):
        return self.network(pixels)[0]


def pixels_of(image):
    """Return an image of 224 x 224 pixels as a tensor of values from -1 to 1."""
    values = np.asarray(image.resize((224, 224)), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1)


# Stages: each takes the run and yields rows of a table


class Run:
    """Device, sizes and models of a run, and its measurements."""

    def __init__(self, device, sizes, folder):
        self.device, self.sizes, self.folder = device, sizes, folder
        self.on_gpu = torch.device(device).type == "cuda"
        # In a dry run both devices are the CPU, and one of them is enough.
        self.devices = [device, "cpu"] if self.on_gpu else [device]
        self.minilm, self.weights = make_minilm(folder)

    def synchronize(self):
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def time(self, arms, repeats=None, warm_up=True):
        """Run the arms in turns; return seconds, results and peaks of memory in MiB."""
        names = list(arms)
        seconds = {name: [] for name in names}
        results, peaks = {}, {}
        repeats = repeats or self.sizes["repeats"]
        for turn in range(-warm_up, repeats):
            for name in names:
                self.synchronize()
                if self.on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                tick = time.perf_counter()
                results[name] = arms[name]()
                self.synchronize()
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - tick)
                    peaks[name] = self.peak()
        return {name: np.median(s) for name, s in seconds.items()}, results, peaks

    def peak(self):
        """Return the peak of allocated device memory since the last reset, in MiB."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else 0.0


def bench_texts(run):
    """Compare precisions and sentence-transformers, on texts and on titles."""
    from sentence_transformers import SentenceTransformer

    encode = {}
    for dtype in DTYPES:
        encoder = FrozenEncoder(
            run.minilm, device=run.device, dtype=dtype, runtime="torch", store=None
        )
        encode[f"FrozenEncoder, {dtype}"] = encoder.transform
    for dtype in DTYPES[:2]:
        peer = SentenceTransformer(
            run.minilm,
            device=run.device,
            model_kwargs={"dtype": getattr(torch, dtype)},
        )
        for batch_size in (32, 256):
            encode[f"sentence-transformers, {dtype}, batches of {batch_size}"] = (
                partial(peer.encode, batch_size=batch_size, show_progress_bar=False)
            )
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.minilm)
    texts = make_texts(run.sizes, tokenizer)
    for task, cells in (
        ("texts", texts),
        ("titles", make_titles(run.sizes["titles"])),
    ):
        arms = {name: partial(function, cells) for name, function in encode.items()}
        yield from encoding_rows(run, task, len(cells), arms)
    yield {"weights": run.weights} | batchings()
    yield from on_the_cpu(run, run.minilm, texts[: run.sizes["texts on the CPU"]])


def encoding_rows(run, task, n_cells, arms):
    """Yield a row per arm: rate, ratio to the last arm, cosine to the first arm."""
    seconds, results, peaks = run.time(arms)
    expected, peer = next(iter(results.values())), seconds[list(arms)[-1]]
    for name, vectors in results.items():
        yield {
            "task": task,
            "arm": name,
            "cells/s": n_cells / seconds[name],
            "times faster than the last arm": peer / seconds[name],
            "min cosine to the first arm": min_cosine(vectors, expected),
            "finite": bool(np.isfinite(vectors).all()),
            "peak MiB": peaks[name],
        }


def on_the_cpu(run, model, cells):
    """Yield a row that compares float32 on the device and on the CPU."""
    if not run.on_gpu:
        return
    rates, vectors = {}, {}
    for device in run.devices:
        encoder = FrozenEncoder(
            model, device=device, dtype="float32", runtime="torch", store=None
        )
        seconds, results, _ = run.time({device: partial(encoder.transform, cells)}, 1)
        rates[device] = len(cells) / seconds[device]
        vectors[device] = results[device]
    norms = np.linalg.norm(vectors["cpu"], axis=1)
    errors = np.linalg.norm(vectors[run.device] - vectors["cpu"], axis=1) / norms
    yield {
        "arm": f"FrozenEncoder, float32, {len(cells)} cells",
        "cells/s": rates[run.device],
        "cells/s on the CPU": rates["cpu"],
        "min cosine to the CPU": min_cosine(*vectors.values()),
        "largest relative error": errors.max(),
    }


def min_cosine(left, right):
    """Return the smallest cosine of two rows."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return ((left * right).sum(axis=1) / norms).min()


def batchings():
    """Return which cells share a batch, for each loaded checkpoint and precision."""
    chosen = []
    for loaded, _ in inference._LOADED.values():
        for backend, batching in getattr(loaded, "batchings", {}).items():
            name = f"{backend.modality} {backend.dtype_name} {backend.device}"
            chosen.append(f"{name}: {batching}")
    return {"cells that share a batch": "; ".join(chosen)}


def bench_images(run):
    """Compare precisions with a loop in transformers, and EfficientNet with the CPU."""
    images = make_images(run.sizes["images"])
    directory = make_dinov2(run.folder, run.sizes["layers"])
    arms = {}
    for dtype in DTYPES:
        encoder = FrozenEncoder(
            directory, device=run.device, dtype=dtype, runtime="torch", store=None
        )
        arms[f"FrozenEncoder, {dtype}"] = partial(encoder.transform, images)
    arms["a loop in transformers, bfloat16"] = image_loop(run, directory, images)
    yield from encoding_rows(run, "DINOv2-small", len(images), arms)
    yield batchings()
    few = images[: run.sizes["images on the CPU"]]
    yield from on_the_cpu(run, directory, few)
    for device in run.devices:
        backend, weights = make_efficientnet(device)
        encoder = FrozenEncoder(backend, runtime="torch", store=None)
        cells = images if device == run.device else few
        seconds, results, peaks = run.time({device: partial(encoder.transform, cells)})
        yield {
            "task": f"EfficientNet-lite0, {weights} weights",
            "arm": f"CallableBackend, float32 on {device}",
            "cells/s": len(cells) / seconds[device],
            "finite": bool(np.isfinite(results[device]).all()),
            "peak MiB": peaks[device],
        }


def image_loop(run, directory, images, batch_size=64):
    """Return a function that encodes images in a simple loop."""
    processor = transformers.ViTImageProcessorPil.from_pretrained(directory)
    model = transformers.Dinov2Model.from_pretrained(directory, dtype=torch.bfloat16)
    model = model.eval().to(run.device)

    @torch.inference_mode()
    def encode():
        batches = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            pixels = processor(images=part, return_tensors="pt")["pixel_values"]
            states = model(pixels.to(run.device, torch.bfloat16)).last_hidden_state
            batches.append(states[:, 0].float().cpu().numpy())
        return np.concatenate(batches)

    return encode


def split_rows(run, n_blocks=1):
    """Return training rows, and as many held-out rows as a score needs."""
    n_rows = run.sizes["rows"]
    n_held_out = min(N_HELD_OUT, n_rows // 3)
    X, y = make_rows(n_rows + n_held_out, n_blocks)
    return X[:n_rows], y[:n_rows], X[n_rows:], y[n_rows:]


def training_row(run, task, device, fit, score, n_networks=1):
    """Return a row: seconds of training, score, and peak of memory."""
    seconds, results, peaks = run.time({device: fit}, repeats=1, warm_up=False)
    return {
        "task": task,
        "device": device,
        "networks": n_networks,
        "seconds": seconds[device],
        "score": score(results[device]),
        "peak MiB": peaks[device],
    }


def bench_projectors(run):
    """Train a projector, and one with the five of its cross-fitting."""
    X, y, X_held_out, y_held_out = split_rows(run)
    score = partial(probe, y=y, X_held_out=X_held_out, y_held_out=y_held_out)
    fits = [(run.device, run.sizes["epochs on the device alone"])]
    fits += [(device, run.sizes["epochs"]) for device in run.devices]
    for device, max_epochs in fits:
        for cv in (None, 5):
            projector = ContrastiveProjector(
                cv=cv, device=device, max_epochs=max_epochs, random_state=0
            )
            projector.fit_transform(X[:300], y[:300])  # warms up
            fit = partial(fit_transform, projector, X, y)
            task = f"projector, {max_epochs} epochs, cv={cv}"
            yield training_row(run, task, device, fit, score, 1 + (cv or 0))


def fit_transform(projector, X, y):
    """Return the fitted projector and the projected training rows."""
    return projector, projector.fit_transform(X, y)


def probe(fitted, y, X_held_out, y_held_out):
    """Return the macro-F1 of logistic regression on held-out rows."""
    projector, Z = fitted
    classifier = LogisticRegression(max_iter=300).fit(Z[:4000], y[:4000])
    predicted = classifier.predict(projector.transform(X_held_out))
    return f1_score(y_held_out, predicted, average="macro")


def bench_networks(run):
    """Train many networks at once, as the folds of a cross-fitted projection."""
    X, y, X_held_out, y_held_out = split_rows(run)
    n_networks = run.sizes["networks"]
    fits = [(run.device, len(X))]
    fits += [(device, len(X) // 5) for device in run.devices]  # the CPU is slow
    for device, n_rows in fits:
        part, labels = X[:n_rows], y[:n_rows]
        projector = ContrastiveProjector(
            cv=n_networks, device=device, max_epochs=1, random_state=0
        )
        fit = partial(fit_transform, projector, part, labels)
        score = partial(probe, y=labels, X_held_out=X_held_out, y_held_out=y_held_out)
        task = f"networks at once, {n_rows} rows, one epoch"
        yield training_row(run, task, device, fit, score, n_networks)


def bench_fusion(run):
    """Train a fusion network on two modalities, of which one is missing in some rows."""
    X, y, X_held_out, y_held_out = split_rows(run, n_blocks=2)
    X[::10, N_FEATURES:] = np.nan

    def score(fitted):
        return f1_score(y_held_out, fitted.predict(X_held_out), average="macro")

    for device in run.devices:
        classifier = FusionClassifier(
            blocks=two_blocks(),
            device=device,
            max_epochs=run.sizes["epochs"],
            random_state=0,
        )
        classifier.fit(X[:300], y[:300])  # warms up
        fit = partial(classifier.fit, X, y)
        yield training_row(run, "fusion", device, fit, score)


def two_blocks():
    """Return the columns of two modalities."""
    return {"text": slice(0, N_FEATURES), "image": slice(N_FEATURES, 2 * N_FEATURES)}


def bench_crossmodal(run):
    """Train a shared space of two modalities."""
    n_pairs = run.sizes["pairs"]
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(n_pairs + 500, 32))
    parts = []
    for _ in range(2):
        noise = rng.normal(size=(len(shared), N_FEATURES))
        parts.append(shared @ rng.normal(size=(32, N_FEATURES)) + noise)
    X = np.hstack(parts).astype(np.float32)

    def score(fitted):
        return fitted.score(X[n_pairs:])

    for device in run.devices:
        encoder = SharedFusionEncoder(
            blocks=two_blocks(),
            device=device,
            max_epochs=run.sizes["epochs"],
            random_state=0,
        )
        encoder.fit(X[:100])  # warms up
        fit = partial(encoder.fit, X[:n_pairs])
        yield training_row(run, "shared space", device, fit, score)


def bench_segmentation(run):
    """Train a decoder of masks."""
    n_images = run.sizes["masks"]
    X, masks = make_scenes(n_images + n_images // 4)

    def score(fitted):
        return fitted.score(X[n_images:], masks[n_images:])

    for device in run.devices:
        segmenter = PatchSegmenter(
            device=device, max_epochs=run.sizes["epochs"], random_state=0
        )
        segmenter.fit(X[:8], masks[:8])  # warms up
        fit = partial(segmenter.fit, X[:n_images], masks[:n_images])
        yield training_row(run, "segmentation", device, fit, score)


def bench_finetuning(run):
    """Fine-tune encoders of emoji for an epoch: texts, and images, which are slower."""
    data, n_cells = load_emoji(), run.sizes["cells of fine-tuning"]
    rows = np.random.default_rng(0).permutation(len(data.target))
    for method, column in (("lora", "name"), ("full", "name"), ("full", "image")):
        task = f"fine-tuning of {column}, {method}"
        if method == "lora" and find_spec("peft") is None:
            yield {"task": task, "skipped": "peft is not installed"}
            continue
        for device in run.devices:
            n_rows = n_cells if device == run.device else n_cells // 8
            train, held_out = rows[:n_rows], rows[n_rows : n_rows + n_cells // 2]
            encoder = encoder_to_train(run, column, device)
            classifier = FinetunedClassifier(
                encoder, method=method, max_epochs=1, device=device, random_state=0
            )
            X, y = data.data[[column]], data.target
            row = training_row(
                run,
                f"{task}, {n_rows} rows",
                device,
                partial(classifier.fit, X.iloc[train], y[train]),
                partial(score_on, X=X.iloc[held_out], y=y[held_out]),
            )
            seconds = {f"{name} s": s for name, s in classifier.seconds_.items()}
            yield row | seconds | {"best step": classifier.best_step_}


def encoder_to_train(run, column, device):
    """Return the encoder of a column of emoji, without a store."""
    if column == "image":
        return FrozenEncoder(make_efficientnet(device)[0], runtime="torch", store=None)
    return FrozenEncoder(run.minilm, device=device, runtime="torch", store=None)


def score_on(fitted, X, y):
    """Return the macro-F1 on held-out rows."""
    return f1_score(y, fitted.predict(X), average="macro")


def bench_search(run):
    """Compare a search in two processes on one device with the search in one."""
    X, y = make_rows(run.sizes["rows of a search"])
    scores = []
    backend = "loky" if run.on_gpu else "threading"  # processes start slowly
    for n_jobs in (1, 2):
        projector = ContrastiveProjector(
            device=run.device, cv=None, max_epochs=3, random_state=0
        )
        search = GridSearchCV(
            make_pipeline(projector, LogisticRegression(max_iter=200)),
            {"contrastiveprojector__temperature": [0.05, 0.2]},
            cv=2,
            n_jobs=n_jobs,
            error_score="raise",
        )
        tick = time.perf_counter()
        with parallel_config(backend):
            search.fit(X, y)
        scores.append(search.cv_results_["mean_test_score"])
        yield {"n_jobs": n_jobs, "seconds": time.perf_counter() - tick}
    yield {"largest difference of scores": np.abs(scores[0] - scores[1]).max()}


def check_halving(run):
    """Encode a batch that exceeds the device memory; the vectors must not change."""
    encoder = FrozenEncoder(
        run.minilm, device=run.device, dtype="float32", runtime="torch", store=None
    )
    n_texts = run.sizes["texts of a batch"]
    texts = [f"{i} {'the dog sat under a tree ' * 40}" for i in range(n_texts)]
    expected = encoder.transform(texts[:256])
    n_halvings = 0
    free_memory = inference._free_memory

    def count():
        nonlocal n_halvings
        n_halvings += 1
        free_memory()

    inference._free_memory = count
    try:
        if run.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(0.02)
        vectors = encoder.set_params(batch_size=len(texts)).transform(texts)
    finally:
        inference._free_memory = free_memory
        if run.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    yield {
        "cells": len(texts),
        "halvings": n_halvings,
        "min cosine": min_cosine(vectors[:256], expected),
    }


def check_streaming(run):
    """Train on rows that stay in the memory of the host; the result must not change."""
    X, y, X_held_out, _ = split_rows(run)
    fits = _training._fits
    projected, arms = {}, {}
    for place in ("device", "host"):
        projector = ContrastiveProjector(
            cv=None, device=run.device, max_epochs=3, random_state=0
        )
        arms[place] = partial(train_from, place, projector, X, y)
    try:
        seconds, results, peaks = run.time(arms, repeats=1)
    finally:
        _training._fits = fits
    for place, projector in results.items():
        projected[place] = projector.transform(X_held_out)
    for place in arms:
        yield {
            "rows in the memory of the": place,
            "seconds": seconds[place],
            "largest difference": np.abs(projected[place] - projected["device"]).max(),
            "peak MiB": peaks[place],
        }


def train_from(place, projector, X, y):
    """Train on rows in the memory of the device or of the host."""
    _training._fits = lambda array, device: place == "device"
    return projector.fit(X, y)


READER = """
import sys
import pynvml
pynvml.nvmlInit()
card = pynvml.nvmlDeviceGetHandleByIndex(0)
used = pynvml.nvmlDeviceGetMemoryInfo(card).used
from sklembed import FrozenEncoder
model, store, text = sys.argv[1:]
FrozenEncoder(model, store=store).transform([text])
print(pynvml.nvmlDeviceGetMemoryInfo(card).used - used)
"""


def check_readers(run):
    """Measure the device memory of a process that only reads stored vectors."""
    if not run.on_gpu:
        yield {"skipped": "the device is a CPU"}
        return
    store = f"{run.folder}/read.sqlite"
    text = "a stored text"
    FrozenEncoder(run.minilm, store=store).transform([text])
    command = [sys.executable, "-c", READER, run.minilm, store, text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(done.stderr)
    yield {"device memory of a reader, MiB": int(done.stdout) / 2**20}


STAGES = {
    "texts": bench_texts,
    "images": bench_images,
    "projectors": bench_projectors,
    "networks": bench_networks,
    "fusion": bench_fusion,
    "crossmodal": bench_crossmodal,
    "segmentation": bench_segmentation,
    "finetuning": bench_finetuning,
    "search": bench_search,
    "halving": check_halving,
    "streaming": check_streaming,
    "readers": check_readers,
}


def run_stage(stage, run):
    """Return the rows of a stage, its seconds, and the traceback of an error."""

    def stop(*_):
        raise TimeoutError(f"the stage took more than {run.sizes['seconds']} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(run.sizes["seconds"])
    tick = time.perf_counter()
    result = {"rows": []}
    try:
        for row in stage(run):
            result["rows"].append(row)
    except Exception:  # of any type; the next stages follow
        result["error"] = traceback.format_exc()
    finally:
        signal.alarm(0)
    return result | {"seconds": time.perf_counter() - tick}


def about(run):
    """Return the card, the machine and the versions."""
    card = platform.processor() or platform.machine()
    if run.on_gpu:
        card = torch.cuda.get_device_name()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "card": card,
        "device": run.device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions | {"cuda": torch.version.cuda},
        "weights of MiniLM": run.weights,
        "sizes": run.sizes,
    }


def show(name, result):
    """Print the table of a stage, and its error."""
    print(f"\n{name} ({result['seconds']:.0f} s)", flush=True)
    if result["rows"]:
        table = pd.DataFrame(result["rows"])
        text = table.to_string(index=False, na_rep="", float_format="{:,.6g}".format)
        print(text, flush=True)
    if "error" in result:
        print(result["error"], flush=True)


def main():
    """Run the stages, print their tables, and write the JSON file after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--fast", action="store_true", help="a dry run of small sizes")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--json", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SKLEMBED_STORE"] = f"{folder}/embeddings.sqlite"
        run = Run(options.device, FAST if options.fast else FULL, folder)
        tables = about(run) | {"stages": {}}
        print(json.dumps(tables, indent=1))
        for name in options.stages:
            tables["stages"][name] = run_stage(STAGES[name], run)
            tables["seconds"] = time.perf_counter() - started
            show(name, tables["stages"][name])
            if options.json:
                text = json.dumps(tables, indent=1, default=float)
                options.json.write_text(text + "\n")
            if run.on_gpu:
                torch.cuda.empty_cache()
    print(f"\n{tables['seconds']:.0f} s")
    failed = [name for name, result in tables["stages"].items() if "error" in result]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
