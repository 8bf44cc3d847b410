"""Encoders, stores and pipelines for bench_faults.py, and the outcomes of faults."""

import contextlib
import multiprocessing
import os
import sqlite3
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

import sklembed
from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder
from sklembed.encoders import minilm

# Errors that the documentation of `transform`, `load` and the store names.
DOCUMENTED = (OSError, TypeError, ValueError)


HANG_SECONDS = 120


FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def without_warnings():
    """Ignore warnings: counts replace them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def vectors_of(numbers, width):
    """Return the vectors of numbers, of shape (n_numbers, width)."""
    return np.sin(np.outer(numbers, np.arange(width))).astype(np.float32)


def number_encoder(store, *, width=64, seconds=0.0, log=None):
    """Return an encoder of texts that are numbers.

    Each batch takes `seconds`, and is appended to the file `log`.
    """

    def load():
        def encode(texts):
            numbers = np.array(list(map(int, texts)))
            time.sleep(seconds)
            if log is not None:
                append(log, numbers)
            return vectors_of(numbers, width)

        return encode

    backend = CallableBackend(
        load,
        name=f"numbers {width}",
        version="1",
        modality="text",
        n_features=width,
    )
    return FrozenEncoder(backend, store=store, batch_size=8)


def append(log, numbers):
    """Append numbers to a file in one step."""
    with open(log, "ab", buffering=0) as file:
        file.write(np.asarray(numbers, dtype=np.int64).tobytes())


def logged(log):
    """Return the numbers in a file, without a last number that is incomplete."""
    content = Path(log).read_bytes() if Path(log).exists() else b""
    return np.frombuffer(content[: len(content) // 8 * 8], dtype=np.int64)


def stored_numbers(path, n_numbers, width, counts):
    """Return the numbers whose vectors are in a store; count wrong vectors."""
    encoder = number_encoder(path, width=width)
    texts = list(map(str, range(n_numbers)))
    digests = [bytes.fromhex(digest) for digest in encoder.digests(texts)]
    store, space = EmbeddingStore(path), encoder._backend_and_space()[1]
    stored = []
    for positions, vectors in store.read(space, digests):
        is_right = (vectors == vectors_of(positions, width)).all(axis=1)
        counts["wrong vectors"] += int((~is_right).sum())
        stored += positions.tolist()
    with contextlib.closing(sqlite3.connect(path)) as db:
        state = db.execute("PRAGMA integrity_check").fetchall()
        counts["damaged stores"] += int(state != [("ok",)])
    return set(stored)


@contextlib.contextmanager
def forked(work, *args):
    """Run a function in a forked process, and kill the process at the end."""
    process = FORK.Process(target=work, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def kill_at(process, seconds):
    """Kill a process after some seconds; return whether it was still running."""
    process.join(seconds)
    is_running = process.exitcode is None
    process.kill()
    process.join()
    return is_running


def finishes(work, *args):
    """Return whether a function ends without an error in a process, in time."""
    with forked(work, *args) as process:
        process.join(HANG_SECONDS)
        return process.exitcode == 0


def module_encoder(store, runtime):
    """Return an encoder whose network can be exported."""

    def load():
        import torch

        torch.manual_seed(0)
        layers = [torch.nn.Linear(8, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 16)]

        def prepare(text):
            return torch.tensor(vectors_of([int(text)], 8)[0])

        return prepare, torch.nn.Sequential(*layers).eval()

    backend = CallableBackend(
        load, name="module", version="1", modality="text", n_features=16
    )
    return FrozenEncoder(backend, store=store, runtime=runtime)


def minilm_encoder(store, runtime):
    """Return MiniLM by one runtime."""
    return FrozenEncoder(minilm(), store=store, runtime=runtime, dtype="float32")


def small_pipelines():
    """Return two fitted pipelines, and rows that they classify differently."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 64))
    pipelines = []
    for y in (X[:, 0] > 0, X[:, 1] > 0):
        model = make_pipeline(
            FunctionTransformer(np.sinh), StandardScaler(), LogisticRegression()
        )
        pipelines.append(model.fit(X, y))
    return pipelines, X


def outcome_of(check, place):
    """Run a check, and return the name of its outcome."""
    try:
        check()
    except AssertionError as error:
        print(f"{place}: wrong result {error}", file=sys.stderr)
        return "wrong results"
    except DOCUMENTED:
        return "refused with an error"
    except Exception as error:
        print(f"{place}: {error!r}", file=sys.stderr)
        return "errors of another kind"
    return "right"


def make_store(folder):
    number_encoder(folder / "store.sqlite").transform(list(map(str, range(400))))


def make_shards(folder):
    from sklembed.scale import export_vectors

    with tempfile.TemporaryDirectory() as name:
        store = EmbeddingStore(Path(name) / "store.sqlite")
        number_encoder(store).transform(list(map(str, range(300))))
        export_vectors(store, folder / "shards")
        number_encoder(store).transform(list(map(str, range(500))))
        export_vectors(store, folder / "shards")


def make_pipeline_files(folder):
    sklembed.save(small_pipelines()[0][0], folder / "model")


def make_network(folder):
    module_encoder(folder / "store.sqlite", "openvino").transform(["1"] * 64)
    assert len(EmbeddingStore(folder / "store.sqlite").networks()) == 1
    (folder / "store.sqlite").unlink()
    for lock in folder.rglob("*.lock"):
        lock.unlink()


class Attack:
    """An object whose pickle creates a file."""

    def __init__(self, canary):
        self._canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch '{self._canary}'",)
