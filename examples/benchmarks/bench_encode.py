"""Compare the speed of FrozenEncoder with sentence-transformers and a loop in torch.

Texts of 8 to 256 tokens are encoded by all-MiniLM-L6-v2; the baseline is
``SentenceTransformer.encode`` with default parameters. Photographs are encoded by
EfficientNet-lite0; the baseline is a loop over batches with Pillow and torch. No store
is used. The arms alternate in one process. Ratios are medians over rounds, and above 1
if FrozenEncoder is faster. Vectors are compared row by row.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from importlib import metadata
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from sklembed import FrozenEncoder
from sklembed._torch import resolve_device, resolve_dtype
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm

MINILM = minilm()


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


def make_photographs(folder, n_images):
    """Save JPEG files of 1920 x 1080 pixels: enlarged clip art on blurred noise."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (54, 96, 3), dtype=np.uint8))
    background = noise.resize((1920, 1080), Image.Resampling.BICUBIC)
    paths = []
    for i, png in enumerate(load_openclipart().data["image"].head(n_images)):
        photograph = background.copy()
        drawing = Image.open(BytesIO(png)).convert("RGBA").resize((900, 900))
        photograph.paste(drawing, (510, 90), drawing)
        paths.append(f"{folder}/{i}.jpg")
        photograph.save(paths[-1], quality=90)
    return paths


def encode_by_a_loop(paths, prepare, encode, batch_size=32):
    """Encode images in a simple loop: open a batch, then run the model."""
    batches = []
    for start in range(0, len(paths), batch_size):
        pixels = []
        for path in paths[start : start + batch_size]:
            pixels.append(prepare(Image.open(path).convert("RGB")))
        batches.append(encode(pixels))
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


def report(task, n_cells, seconds, results, peer):
    """Return a row per arm: rate, ratio to the baseline, smallest cosine of vectors."""
    rows = []
    for name, ticks in seconds.items():
        ours, theirs = (r.astype(np.float64) for r in (results[name], results[peer]))
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        rows.append(
            {
                "task": task,
                "arm": name,
                "seconds": np.median(ticks),
                "cells/s": n_cells / np.median(ticks),
                "times faster": np.median(seconds[peer] / ticks),
                "min cosine": ((ours * theirs).sum(axis=1) / norms).min(),
            }
        )
    return rows


def bench_texts(texts, repeats, device):
    """Compare in float32, in the dtype of "auto", and both in bfloat16."""
    peer = SentenceTransformer(MINILM, device=device)
    encode = partial(peer.encode, show_progress_bar=False)
    auto = str(resolve_dtype("auto", torch.device(device))).removeprefix("torch.")
    arms = {"SentenceTransformer, float32": lambda: encode(texts)}
    for dtype in dict.fromkeys(["float32", auto]):
        encoder = FrozenEncoder(MINILM, dtype=dtype, device=device, store=None)
        arms[f"FrozenEncoder, {dtype}"] = partial(encoder.transform, texts)
    rows = report(
        "texts", len(texts), *take_turns(arms, repeats), "SentenceTransformer, float32"
    )

    thrice = np.random.default_rng(0).permutation(np.repeat(texts, 3)).tolist()
    arms = {
        "SentenceTransformer, float32": lambda: encode(thrice),
        f"FrozenEncoder, {auto}": lambda: encoder.transform(thrice),
    }
    rows += report(
        "each text thrice",
        len(thrice),
        *take_turns(arms, repeats),
        "SentenceTransformer, float32",
    )
    if auto == "bfloat16":
        half = SentenceTransformer(
            MINILM, device=device, model_kwargs={"torch_dtype": "bfloat16"}
        )
        arms = {
            "SentenceTransformer, bfloat16": lambda: (
                half.encode(texts, show_progress_bar=False, convert_to_tensor=True)
                .float()
                .cpu()
                .numpy()
            ),
            "FrozenEncoder, bfloat16": lambda: encoder.transform(texts),
        }
        rows += report(
            "texts, both bfloat16",
            len(texts),
            *take_turns(arms, repeats),
            "SentenceTransformer, bfloat16",
        )
    return rows, auto


def bench_images(n_images, repeats):
    """Compare a simple loop with threads that decode while the model runs."""
    backend = efficientnet_lite0()
    encoder = FrozenEncoder(backend, store=None)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photographs(folder, n_images)
        arms = {
            "Pillow and torch, a loop": partial(
                encode_by_a_loop, paths, *backend.load()
            ),
            "FrozenEncoder": partial(encoder.transform, paths),
        }
        return report("photographs", n_images, *take_turns(arms, repeats), [*arms][0])


def main():
    """Print the table, and write it as JSON if there is a path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-texts", type=int, default=512)
    parser.add_argument("--n-images", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    device = str(resolve_device("auto"))
    rows, auto = bench_texts(make_texts(options.n_texts), options.repeats, device)
    rows += bench_images(options.n_images, options.repeats)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    print(
        f"\ndevice: {gpu or device}, {torch.get_num_threads()} threads; dtype='auto' is {auto}\n"
    )
    table = pd.DataFrame(rows)
    digits = {"seconds": 2, "cells/s": 1, "times faster": 2, "min cosine": 6}
    formats = {name: f"{{:.{n}f}}".format for name, n in digits.items()}
    print(table.to_string(index=False, formatters=formats))
    if options.json:
        versions = {
            name: metadata.version(name) for name in ("torch", "sentence-transformers")
        }
        result = {
            "device": gpu or device,
            "auto": auto,
            "versions": versions,
            "records": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
