"""Compare the speed of FrozenEncoder with sentence-transformers and a loop in torch.

- Texts of 8 to 256 tokens and short titles are encoded by all-MiniLM-L6-v2; the
  baseline is ``SentenceTransformer.encode`` with default parameters.
- Photographs of 12 megapixels are encoded by EfficientNet-lite0; the baseline is a loop
  over batches with Pillow and torch.
- Prepared images are encoded by EfficientNet-lite0, and by a ViT and a ConvNeXt of
  random weights; the baseline is the network in torch, in float32 and batches of 32.
- Nine settings of MiniLM (three poolings of three layers) are encoded by ``prefetch``
  together, and one after the other; the baseline is a single setting.
- Logistic regression on the vectors of each precision: macro-F1 in cross-validation.
- Seconds to export the network of MiniLM, and to load it in a later process.
- One short text per call, new or stored, by MiniLM in torch and one thread; the baseline
  is the tokenizer and the network in torch.

Vectors are stored for the nine settings and for single texts only. The arms alternate in
one process. Ratios are medians over rounds. "times faster" is above 1 if FrozenEncoder
is faster. Vectors are compared row by row.
"""

import argparse
import json
import os
import tempfile
import time
from functools import partial
from importlib import metadata
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

from sklembed import CallableBackend, FrozenEncoder, PerModalityUnion, prefetch
from sklembed.datasets import load_emoji, load_openclipart
from sklembed.encoders import efficientnet_lite0, inference, minilm, runtimes
from sklembed.encoders.cpu import cpu_flags

MINILM = minilm()
# Features of a processor that decide which precision is fast.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16")
# Runtime and precision of the arms on a CPU.
ARMS = [
    ("torch", "float32"),
    ("onnx", "float32"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("onnx", "int8"),
]
N_ROWS = 32  # images in a batch


def make_texts(n_texts):
    """Return distinct texts of 8 to 256 tokens, made of words from titles of clip art."""
    rng = np.random.default_rng(0)
    words = " ".join(load_openclipart().data["title"].dropna()).split()
    tokenizer = SentenceTransformer(MINILM, device="cpu").tokenizer
    texts = []
    for length in rng.integers(8, 257, n_texts):
        ids = tokenizer(" ".join(rng.choice(words, length)), add_special_tokens=False)[
            "input_ids"
        ]
        texts.append(tokenizer.decode(ids[: length - 2]))
    return texts


def make_titles(n_titles):
    """Return distinct titles of clip art."""
    titles = load_openclipart().data["title"].dropna().unique()
    return titles[:n_titles].tolist()


def make_photographs(folder, n_images):
    """Save JPEG files of 4000 x 3000 pixels: enlarged clip art on blurred noise."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
    background = noise.resize((4000, 3000), Image.Resampling.BICUBIC)
    paths = []
    for i, png in enumerate(load_openclipart().data["image"].head(n_images)):
        photograph = background.copy()
        drawing = Image.open(BytesIO(png)).convert("RGBA").resize((2400, 2400))
        photograph.paste(drawing, (800, 300), drawing)
        paths.append(f"{folder}/{i}.jpg")
        photograph.save(paths[-1], quality=90)
    return paths


@torch.inference_mode()
def encode_by_a_loop(paths, prepare, network, batch_size=N_ROWS):
    """Encode images in a simple loop: open a batch, then run the network."""
    batches = []
    for start in range(0, len(paths), batch_size):
        pixels = []
        for path in paths[start : start + batch_size]:
            pixels.append(prepare(Image.open(path).convert("RGB")))
        batches.append(network(torch.stack(pixels))[0].numpy())
    return np.concatenate(batches)


def take_turns(arms, repeats):
    """Run each arm once to warm up, then alternate; return seconds and results."""
    results = {name: run() for name, run in arms.items()}
    seconds = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            tick = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - tick)
    return {name: np.asarray(ticks) for name, ticks in seconds.items()}, results


def report(task, n_cells, seconds, results):
    """Return a row per arm: rate, ratio to the first, smallest cosine with its vectors."""
    peer = next(iter(results))
    rows = []
    for name, ticks in seconds.items():
        ours, theirs = (r.astype(np.float64) for r in (results[name], results[peer]))
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        rows.append(
            {
                "task": task,
                "threads": torch.get_num_threads(),
                "arm": name,
                "cells/s": n_cells / np.median(ticks),
                "times faster": np.median(seconds[peer] / ticks),
                "min cosine": ((ours * theirs).sum(axis=1) / norms).min(),
            }
        )
    return rows


def encoders_of(model):
    """Return an encoder without a store for each runtime and precision of this machine."""
    encoders = {}
    for runtime, dtype in ARMS:
        encoder = FrozenEncoder(model, runtime=runtime, store=None)
        if isinstance(model, str):
            encoder.set_params(dtype=dtype)
        elif dtype != "float32":
            continue
        try:
            encoder.fingerprint()
        except (ValueError, ImportError):  # such as bfloat16 on a CPU without it
            continue
        encoders[f"FrozenEncoder, {runtime} {dtype}"] = encoder
    return encoders


def bench_texts(task, texts, repeats):
    """Compare each runtime and precision with sentence-transformers at its defaults."""
    peer = SentenceTransformer(MINILM, device="cpu")
    arms = {"SentenceTransformer": partial(peer.encode, texts, show_progress_bar=False)}
    for name, encoder in encoders_of(MINILM).items():
        arms[name] = partial(encoder.transform, texts)
    return report(task, len(texts), *take_turns(arms, repeats))


def bench_photographs(n_images, repeats):
    """Compare a simple loop with threads that decode while the network runs."""
    backend = efficientnet_lite0()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photographs(folder, n_images)
        arms = {
            "Pillow and torch, a loop": partial(
                encode_by_a_loop, paths, *backend.load()
            )
        }
        for name, encoder in encoders_of(backend).items():
            arms[name] = partial(encoder.transform, paths)
        return report("photographs", n_images, *take_turns(arms, repeats))


def make_networks():
    """Return networks of images: EfficientNet-lite0, and two of random weights."""
    torch.manual_seed(0)  # the weights of exported networks
    _, efficientnet = efficientnet_lite0().load()
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=384, num_attention_heads=6, intermediate_size=1536
        ),
        add_pooling_layer=False,
    )
    convnext = transformers.ConvNextModel(transformers.ConvNextConfig())
    return {
        "EfficientNet-lite0": (efficientnet, 1280),
        "ViT-S/16": (_First(vit), 384),
        "ConvNeXt-T": (_First(convnext), 768),
    }


class _First(torch.nn.Module):
    """The first vector of each image, or the mean of its map."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, pixels):
        states = self.network(pixel_values=pixels).last_hidden_state
        return states[:, 0] if states.ndim == 3 else states.mean((2, 3))


def bench_networks(n_images, repeats):
    """Compare a network in torch with the runtimes, on images in memory."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n_images, 224, 224, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]

    def prepare(image):
        values = np.asarray(image, dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(values).permute(2, 0, 1)

    rows = []
    for name, (network, n_features) in make_networks().items():
        backend = CallableBackend(
            partial(_pair, prepare, network),
            name=name,
            version="1",
            modality="image",
            n_features=n_features,
        )
        arms = {}
        for arm, encoder in encoders_of(backend).items():
            arms[arm] = partial(encoder.transform, images)
        rows += report(name, n_images, *take_turns(arms, repeats))
    return rows


def _pair(prepare, network):
    return prepare, network


def bench_exports(texts):
    """Time a first call, which exports and checks, and a warm-up after it is forgotten.

    The warm-up loads tokenizer and network and encodes a word, as a new process does
    after its imports.
    """
    rows = []
    for runtime in ("openvino", "onnx"):
        encoder = FrozenEncoder(MINILM, runtime=runtime, dtype="float32", store=None)
        seconds = []
        for run in (partial(encoder.transform, texts), encoder.warm_up):
            inference._LOADED.clear()
            runtimes._LOADED.clear()
            tick = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - tick)
        export, load = seconds
        rows.append({"runtime": runtime, "export (s)": export, "load (s)": load})
    return rows


def bench_settings(texts, repeats):
    """Compare nine settings of a model in shared passes with a single setting."""
    settings = list(product(("mean", "cls", "max"), (-1, -2, -3)))
    X = pd.DataFrame({"text": texts})

    def fill_a_new_store(settings, *, jointly=True):
        with tempfile.TemporaryDirectory() as folder:
            branches = []
            for pooling, layer in settings:
                encoder = FrozenEncoder(
                    MINILM,
                    pooling=pooling,
                    layer=layer,
                    runtime="torch",
                    store=f"{folder}/embeddings.sqlite",
                )
                branches.append((f"{pooling} {layer}", encoder, "text"))
            tables = [branches] if jointly else [[branch] for branch in branches]
            for branches in tables:
                prefetch(PerModalityUnion(branches), X)

    arms = {
        "one setting": partial(fill_a_new_store, settings[:1]),
        "nine settings, together": partial(fill_a_new_store, settings),
        "nine settings, one after the other": partial(
            fill_a_new_store, settings, jointly=False
        ),
    }
    seconds, _ = take_turns(arms, repeats)
    rows = []
    for name, ticks in seconds.items():
        times = np.median(ticks / seconds["one setting"])
        rows.append({"arm": name, "seconds": np.median(ticks), "times as long": times})
    return rows


def bench_single_texts(n_calls):
    """Compare calls with one text, new or stored, with the bare network."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    network = transformers.AutoModel.from_pretrained(MINILM).eval()
    settings = {"runtime": "torch", "dtype": "float32"}
    encoder = FrozenEncoder(MINILM, **settings).fit(["a"])
    without_store = FrozenEncoder(MINILM, store=None, **settings).fit(["a"])

    @torch.inference_mode()
    def encode_by_network(cells):
        states = network(**tokenizer(cells, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(states.mean(dim=1)).numpy()

    arms = {
        "tokenizer and network": encode_by_network,
        "new text, store=None": without_store.transform,
        "new text": encoder.transform,
        "stored text": encoder.transform,
    }
    seconds = {name: [] for name in arms}
    for i in range(n_calls + 1):
        cells = [f"{i} small green houses with a red door"]
        vectors = []
        for name, run in arms.items():
            tick = time.perf_counter()
            vectors.append(run(cells))
            seconds[name].append(time.perf_counter() - tick)
        np.testing.assert_allclose(vectors, [vectors[0]] * len(arms), atol=1e-5)
    rows = []
    for name, ticks in seconds.items():
        ratios = np.divide(ticks, seconds["tokenizer and network"])
        rows.append(
            {
                "arm": name,
                "ms": 1000 * np.median(ticks[1:]),  # the first call loads the model
                "times as long": np.median(ratios[1:]),
            }
        )
    return rows


def bench_quality(n_images=400):
    """Return the macro-F1 of logistic regression for each precision of the vectors."""
    emoji, clip_art = load_emoji(), load_openclipart()
    efficientnet = efficientnet_lite0()
    tasks = [
        ("emoji names", MINILM, emoji, "name", None),
        ("clip art titles", MINILM, clip_art, "title", None),
        ("emoji images", efficientnet, emoji, "image", n_images),
        ("clip art images", efficientnet, clip_art, "image", n_images),
    ]
    rows = []
    for task, model, dataset, column, n_rows in tasks:
        is_present = dataset.data[column].notna().to_numpy()
        chosen = np.random.default_rng(0).permutation(np.flatnonzero(is_present))
        chosen = chosen[:n_rows]
        cells = dataset.data[column].iloc[chosen]
        y = np.asarray(dataset.target)[chosen]
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        for name, encoder in encoders_of(model).items():
            vectors = encoder.transform(cells)
            scores = cross_val_score(
                LogisticRegression(C=10, max_iter=1000),
                vectors,
                y,
                cv=folds,
                scoring="f1_macro",
            )
            rows.append(
                {
                    "task": task,
                    "arm": name,
                    "macro-F1": scores.mean(),
                    "spread": scores.std(),
                }
            )
    return rows


def bench_cells(options, texts):
    """Compare all kinds of cells by one thread, and by two."""
    rows = []
    for n_threads in options.threads:
        torch.set_num_threads(n_threads)
        titles = make_titles(4 * options.n_texts)
        rows += bench_texts("texts", texts, options.repeats)
        rows += bench_texts("titles", titles, options.repeats)
        rows += bench_photographs(options.n_images, options.repeats)
        rows += bench_networks(options.n_images, options.repeats)
    torch.set_num_threads(1)
    return rows


def main():
    """Print the tables, and write them as JSON if there is a path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-texts", type=int, default=128)
    parser.add_argument("--n-images", type=int, default=32)
    parser.add_argument("--n-calls", type=int, default=100, help="of a single text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    parser.add_argument("--tables", nargs="+", help="names; default: all tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = make_texts(options.n_texts)
    stages = {
        "exports": partial(bench_exports, texts[:48]),
        "settings": partial(bench_settings, texts[:32], options.repeats),
        "quality": bench_quality,
        "single_texts": partial(bench_single_texts, options.n_calls),
        "records": partial(bench_cells, options, texts),
    }
    digits = {"cells/s": 1, "times faster": 2, "min cosine": 6}
    digits |= {"export (s)": 1, "load (s)": 2, "macro-F1": 3, "spread": 3}
    digits |= {"seconds": 1, "ms": 2, "times as long": 2}
    formats = {name: f"{{:.{n}f}}".format for name, n in digits.items()}
    packages = ("torch", "sentence-transformers", "openvino", "onnxruntime")
    result = {
        "flags": [name for name in FLAGS if name in cpu_flags()],
        "versions": {package: metadata.version(package) for package in packages},
    }
    print(f"flags of the processor: {', '.join(result['flags'])}")
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text()) | result
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SKLEMBED_STORE"] = f"{folder}/embeddings.sqlite"
        for name in options.tables or stages:
            result[name] = stages[name]()
            table = pd.DataFrame(result[name])
            print(f"\n{name}\n{table.to_string(index=False, formatters=formats)}")
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
