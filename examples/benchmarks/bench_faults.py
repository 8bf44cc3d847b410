"""Count the effects of faults and hostile files on encoders, stores and pipelines.

- kills: SIGKILL at random times, for processes that encode, write vectors, export a
  store, export a network for OpenVINO, save pipelines, or search a grid with two
  workers.
- full_disk: a file system of 24 MB with different amounts of free space. Needs Linux
  and the right to mount one, as by ``unshare``.
- damage: files of a store, of shards, of saved pipelines and of exported networks, with
  changed bits and bytes, zeros, cuts, and files of other content.
- versions: two versions of sklembed use a store and saved pipelines. The other version
  is a copy with another number of the schema, of the format or of the decoding.
- cells: mutated image files, objects and texts by hypothesis, and decompression bombs,
  in separate processes.
- attacks: checkpoints, saved pipelines, stores and shards that try to execute code. The
  code would create a file.
- soak: predictions for single rows.
- threads: sixteen threads predict with one fitted pipeline.
- audit: known vulnerabilities of the installed dependencies, without extras, by
  ``pip-audit``, which asks PyPI. It is skipped if pip-audit is not installed.

A count is a fault if it has a target. Stages that are not run keep their figures in the
JSON file.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from attacks import measure_attacks
from hostile_cells import measure_cells
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from victims import (
    DOCUMENTED,
    FORK,
    HANG_SECONDS,
    append,
    finishes,
    forked,
    kill_at,
    logged,
    make_network,
    make_pipeline_files,
    make_shards,
    make_store,
    minilm_encoder,
    module_encoder,
    number_encoder,
    outcome_of,
    small_pipelines,
    stored_numbers,
    vectors_of,
    without_warnings,
)

import sklembed
from sklembed import EmbeddingStore, FrozenEncoder
from sklembed.datasets import load_emoji
from sklembed.encoders import efficientnet_lite0, minilm

# Targets of the faults, by the last part of their names.
TARGETS = dict.fromkeys(
    [
        "vectors lost after their commit",
        "stored cells encoded again",
        "wrong vectors",
        "damaged stores",
        "files that are not whole",
        "later calls that fail or hang",
        "pipelines lost or mixed",
        "temporary files after the next save",
        "searches that hang",
        "wrong scores",
        "wrong results",
        "vectors or pipelines lost",
        "damaged exports",
        "errors of another kind",
        "crashes",
        "hangs",
        "crashes or hangs",
        "not refused",
        "vectors that are not finite",
        "bombs that were decoded",
        "code executed",
        "growth of open files",
        "growth of threads",
        "rows whose second prediction differs",
        "errors",
        "differing predictions",
        "cells encoded twice or never",
        "vulnerable packages",
    ],
    "0",
) | {"growth of memory after a tenth of them, %": "<= 2"}


def measure_kills(folder, options):
    """Kill processes at random times."""
    figures = {}
    for name, (trial, share) in KILLED.items():
        (folder / name).mkdir()
        counts = Counter()
        rng = random.Random(0)
        for number in range(max(2, int(share * options.kills))):
            trial(folder / name, number, rng, counts)
        figures |= {f"{name}: {key}": count for key, count in counts.items()}
    return figures


def encode_numbers(path, log, n_numbers, width, seconds):
    """Encode numbers in calls of 64, and log the numbers that a call has returned."""
    encoder = number_encoder(path, width=width, seconds=seconds, log=f"{log}.encoded")
    for start in range(0, n_numbers, 64):
        numbers = np.arange(start, min(start + 64, n_numbers))
        vectors = encoder.transform(list(map(str, numbers)))
        assert np.array_equal(vectors, vectors_of(numbers, width))
        append(log, numbers)


def kill_encoding(folder, number, rng, counts, *, width=64, seconds=0.004):
    """Kill a process that encodes; the next one resumes with the same store."""
    n_numbers = 20_000
    path, log = folder / "store.sqlite", folder / f"log-{number}"
    before = set()
    if path.exists():
        before = stored_numbers(path, n_numbers, width, Counter())
    with forked(encode_numbers, path, log, n_numbers, width, seconds) as process:
        counts["kills"] += kill_at(process, rng.uniform(0.05, 1.0))
    encoded = logged(f"{log}.encoded")
    after = set()
    if path.exists():
        after = stored_numbers(path, n_numbers, width, counts)
    counts["vectors lost after their commit"] += len(
        (before | set(logged(log).tolist())) - after
    )
    counts["stored cells encoded again"] += len(before & set(encoded.tolist()))
    counts["wrong vectors"] += 0
    counts["damaged stores"] += 0
    if len(after) == n_numbers:
        path.unlink()


def kill_writing(folder, number, rng, counts):
    """Kill a process that spends its time in transactions: long vectors, no model."""
    kill_encoding(folder, number, rng, counts, width=8192, seconds=0)


def export_numbers(path, target):
    """Export a store again and again."""
    while True:
        EmbeddingStore(path).export(target)


def kill_store_export(folder, number, rng, counts):
    """Kill a process that exports a store over an earlier export."""
    path = folder / "store.sqlite"
    n_numbers, width = 4096, 256
    target = folder / ("vectors.npy" if number % 2 else "vectors.parquet")
    if not path.exists():
        texts = list(map(str, range(n_numbers)))
        number_encoder(path, width=width).transform(texts)
    with forked(export_numbers, path, target) as process:
        while not target.exists():
            time.sleep(0.001)
        counts["kills"] += kill_at(process, rng.uniform(0, 0.2))
    counts["files that are not whole"] += not is_whole_export(target, n_numbers)


def is_whole_export(target, n_numbers):
    """Return whether a file has all vectors, and the hashes of a .npy file match."""
    try:
        if target.suffix == ".parquet":
            return len(pd.read_parquet(target)) == n_numbers
        digests = target.with_suffix(".digests.npy")
        # The hashes are absent while they are replaced, and never of another export.
        is_matching = not digests.exists() or len(np.load(digests)) == n_numbers
        return is_matching and len(np.load(target)) == n_numbers
    except (OSError, ValueError):
        return False


def transform_by(encoder, target):
    """Save the vectors of 64 numbers."""
    np.save(target, encoder.transform(list(map(str, range(64)))))


def kill_network_export(folder, number, rng, counts):
    """Kill a process that exports a network, once or twice; the next one encodes."""
    import openvino  # noqa: F401  imported before the fork, to save time
    import torch  # noqa: F401

    make = module_encoder
    if number % 5 == 4:
        make = minilm_encoder
    expected = folder / f"{make.__name__}.npy"
    if not expected.exists():
        assert finishes(transform_by, make(None, "torch"), expected)
        tick = time.perf_counter()
        encoder = make(folder / f"{make.__name__}.sqlite", "openvino")
        assert finishes(transform_by, encoder, folder / "first.npy")
        EXPORT_SECONDS[make] = time.perf_counter() - tick
    encoder = make(folder / f"{number}.sqlite", "openvino")
    for _ in range(rng.choice([1, 1, 2])):
        with forked(transform_by, encoder, folder / "killed.npy") as process:
            counts["kills"] += kill_at(process, rng.uniform(0, EXPORT_SECONDS[make]))
    actual = folder / f"{number}.npy"
    counts["later calls that fail or hang"] += not finishes(
        transform_by, encoder, actual
    )
    if actual.exists():
        error = np.abs(np.load(actual) - np.load(expected)).max(axis=1)
        norm = np.linalg.norm(np.load(expected), axis=1)
        counts["wrong vectors"] += int((error > 1e-4 * norm).sum())


EXPORT_SECONDS = {}


def save_in_turn(directory, pipelines):
    """Save two pipelines to one directory again and again."""
    while True:
        for pipeline in pipelines:
            sklembed.save(pipeline, directory)


def kill_saving(folder, number, rng, counts):
    """Kill a process that replaces a saved pipeline by another."""
    pipelines, X = small_pipelines()
    directory = folder / "model"
    if number == 0:
        sklembed.save(pipelines[0], directory)
    with forked(save_in_turn, directory, pipelines) as process:
        counts["kills"] += kill_at(process, rng.uniform(0, 0.3))
    expected = [pipeline.decision_function(X) for pipeline in pipelines]
    try:
        scores = sklembed.load(directory).decision_function(X)
        is_lost = not any(np.array_equal(scores, other) for other in expected)
    except DOCUMENTED:
        is_lost = True
    counts["pipelines lost or mixed"] += is_lost
    sklembed.save(pipelines[0], directory)
    n_files = len(list(directory.glob("[!.]*")))
    counts["temporary files after the next save"] = n_files - 2


def search(folder, log=None):
    """Search a grid with two workers and a shared store; write the scores."""
    texts = np.array(list(map(str, range(400))), dtype=object)
    y = np.arange(400) % 3 == 0
    encoder = number_encoder(folder / "store.sqlite", seconds=0.004, log=log)
    pipeline = make_pipeline(encoder, LogisticRegression())
    grid = {"logisticregression__C": [0.1, 1.0, 10.0]}
    grid_search = GridSearchCV(pipeline, grid, cv=4, n_jobs=2, pre_dispatch=2)
    grid_search.fit(texts, y)
    scores = grid_search.cv_results_["mean_test_score"].tolist()
    (folder / "scores.json").write_text(json.dumps(scores))


def kill_search(folder, number, rng, counts):
    """Kill workers and parents of searches, until one has ended."""
    expected = folder / "expected"
    if not expected.exists():
        expected.mkdir()
        run_search(expected, lambda children: None)
    trial = folder / str(number)
    trial.mkdir()
    (trial / "log").touch()
    for _ in range(20):
        before = stored_numbers_if_any(trial / "store.sqlite")
        n_logged = len(logged(trial / "log"))
        is_done = run_search(trial, lambda process: kill_part(process, rng, counts))
        encoded = logged(trial / "log")[n_logged:]
        counts["stored cells encoded again"] += len(before & set(encoded.tolist()))
        after = stored_numbers_if_any(trial / "store.sqlite", counts)
        counts["vectors lost after their commit"] += len(before - after)
        if is_done:
            break
    counts["searches that hang"] += not is_done
    scores = (trial / "scores.json").read_text() if is_done else ""
    counts["wrong scores"] += scores != (expected / "scores.json").read_text()


def stored_numbers_if_any(path, counts=None):
    """Return the stored numbers of a search; none if there is no store."""
    if not path.exists():
        return set()
    return stored_numbers(path, 400, 64, Counter() if counts is None else counts)


def run_search(folder, kill):
    """Run a search in a fresh process; return whether it has ended without an error."""
    command = [sys.executable, __file__, "--search", str(folder)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        kill(process)
        return process.wait(HANG_SECONDS) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):  # workers of a dead parent, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_part(process, rng, counts):
    """Kill a worker or the parent, once cells are encoded, or let them end."""
    if rng.random() < 0.3:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.5 + rng.uniform(0, 2))
        return
    workers = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("loky" in part for part in child.cmdline()):
                workers.append(child)
    if workers and rng.random() < 0.7:
        rng.choice(workers).kill()
        counts["kills"] += 1
    else:
        process.kill()
        counts["kills"] += 1


# Kills of each kind, and their share of all.
KILLED = {
    "encoding": (kill_encoding, 1),
    "writing": (kill_writing, 1),
    "export of a store": (kill_store_export, 1),
    "export of a network": (kill_network_export, 0.3),
    "saving a pipeline": (kill_saving, 1),
    "search by two workers": (kill_search, 0.2),
}


DISK_MB = 24


def measure_full_disk(folder, options):
    """Run operations on a file system with little free space, in a process."""
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={DISK_MB}m tmpfs '{folder}'"
    script = f"{mount} && exec '{sys.executable}' '{__file__}' --full-disk '{folder}'"
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    process = subprocess.run(
        [*command, script], env=environment, stdout=subprocess.PIPE
    )
    if not process.stdout:
        return {"skipped: no file system can be mounted": 1}
    return json.loads(process.stdout)


def fill_disk(folder):
    """Print the counts of operations with different amounts of free space."""
    counts = dict.fromkeys(["operations", "refused with an error", *DISK_FAULTS], 0)
    pipelines, X = small_pipelines()
    texts = list(map(str, range(600)))
    expected = vectors_of(np.arange(600), 2048)
    (folder / "work").mkdir()
    for free_kib in [0, 4, 64, 256, 1024, 1500, 2200, 3000, 4000, 6000, 9000]:
        for operation in DISK_OPERATIONS:
            work = folder / "work"
            shutil.rmtree(work)
            work.mkdir()
            encoder = number_encoder(work / "store.sqlite", width=2048)
            encoder.transform(texts[:100])
            sklembed.save(pipelines[0], work / "model")
            EmbeddingStore(work / "store.sqlite").export(work / "export.npy")
            with full_disk(folder, free_kib):
                counts["operations"] += 1
                try:
                    DISK_OPERATIONS[operation](work, encoder, texts, pipelines[1])
                except AssertionError:
                    counts["wrong results"] += 1
                except DOCUMENTED:
                    counts["refused with an error"] += 1
                except Exception as error:
                    print(f"{operation}: {error!r}", file=sys.stderr)
                    counts["errors of another kind"] += 1
            scores = sklembed.load(work / "model").decision_function(X)
            is_intact = any(
                np.array_equal(scores, pipeline.decision_function(X))
                for pipeline in pipelines
            )
            stored = stored_numbers(work / "store.sqlite", 600, 2048, Counter())
            counts["vectors or pipelines lost"] += len(set(range(100)) - stored)
            counts["vectors or pipelines lost"] += not is_intact
            counts["damaged exports"] += len(np.load(work / "export.npy")) not in (
                100,
                len(stored),
            )
            counts["wrong results"] += not np.array_equal(
                encoder.transform(texts), expected
            )
    print(json.dumps(counts))


DISK_FAULTS = (
    "wrong results",
    "vectors or pipelines lost",
    "damaged exports",
    "errors of another kind",
)


@contextlib.contextmanager
def full_disk(folder, free_kib):
    """Fill the disk of a folder, except for some KiB."""
    free = shutil.disk_usage(folder).free
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        file.write(bytes(max(0, free - 1024 * free_kib)))
    try:
        yield
    finally:
        ballast.unlink()


def transform_on(work, encoder, texts, pipeline):
    expected = vectors_of(np.arange(len(texts)), 2048)
    assert np.array_equal(encoder.transform(texts), expected)


def save_on(work, encoder, texts, pipeline):
    sklembed.save(pipeline, work / "model")


def export_on(work, encoder, texts, pipeline):
    EmbeddingStore(work / "store.sqlite").export(work / "export.npy")


def export_shards_on(work, encoder, texts, pipeline):
    from sklembed.scale import export_vectors

    export_vectors(EmbeddingStore(work / "store.sqlite"), work / "shards")


def export_network_on(work, encoder, texts, pipeline):
    module = module_encoder(work / "store.sqlite", "openvino")
    torch_module = module_encoder(None, "torch")
    expected = torch_module.transform(texts[:64])
    assert np.allclose(module.transform(texts[:64]), expected, atol=1e-3)


def prune_on(work, encoder, texts, pipeline):
    EmbeddingStore(work / "store.sqlite").prune(10**9)


DISK_OPERATIONS = {
    "transform": transform_on,
    "save": save_on,
    "export": export_on,
    "export of shards": export_shards_on,
    "export of a network": export_network_on,
    "prune": prune_on,
}


def damaged(content, rng):
    """Return the content of a file after one kind of damage."""
    content = bytearray(content)
    size = len(content)
    # Structures are a small part of a file, often at its ends.
    place = (
        rng.choice(
            [
                rng.randrange(size),
                rng.randrange(min(size, 200)),
                -1 - rng.randrange(min(size, 600)),
            ]
        )
        % size
    )
    kind = rng.randrange(7)
    if kind <= 1:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for _ in range(20):
            content[rng.randrange(size)] = rng.randrange(256)
    elif kind == 3:
        del content[place:]
    elif kind == 4:
        content[place : place + 4096] = rng.randbytes(
            len(content[place : place + 4096])
        )
    elif kind == 5:
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    else:
        del content[place : place + rng.randrange(1, 64)]
    return bytes(content)


def measure_damage(folder, options):
    """Damage one file, and use it."""
    figures = {}
    for name, (make, use, share) in DAMAGED.items():
        original = folder / name
        original.mkdir()
        assert finishes(make, original)
        n_damages = int(share * options.damages)
        counts = {"files damaged": 0, "refused with an error": 0}
        counts |= dict.fromkeys(["wrong results", "errors of another kind"], 0)
        counts["crashes"] = 0
        for start in range(0, n_damages, 50):
            numbers = range(start, min(start + 50, n_damages))
            args = original, folder / f"{name} copy", use, numbers
            try:
                with ProcessPoolExecutor(1, mp_context=FORK) as pool:
                    for key, count in pool.submit(damage_all, *args).result().items():
                        counts[key] += count
            except BrokenProcessPool:
                counts["crashes"] += 1
        figures |= {f"{name}: {key}": count for key, count in counts.items()}
    return figures


def damage_all(original, copy, use, numbers):
    """Damage copies of a folder of files, use them, and count the outcomes."""
    counts = Counter()
    for number in numbers:
        rng = random.Random(number)
        shutil.rmtree(copy, ignore_errors=True)
        copy = copy.with_suffix(f".{number}")  # another path, which no cache knows
        shutil.copytree(original, copy)
        files = [file for file in copy.rglob("*") if file.is_file()]
        file = rng.choice(sorted(file for file in files if file.stat().st_size))
        if file.suffix == ".parquet" and number % 20 == 0:
            replace_shard(copy)
        else:
            file.write_bytes(damaged(file.read_bytes(), rng))
        counts["files damaged"] += 1
        with without_warnings():
            for result in use(copy):
                outcome = outcome_of(result, f"damage {number} of {file.name}")
                counts[outcome] += 1
    del counts["right"]
    return counts


def use_store(folder):
    path = folder / "store.sqlite"
    store, texts = EmbeddingStore(path), list(map(str, range(500)))
    target = folder / "export.npy"

    def transform():
        vectors = number_encoder(path).transform(texts)
        assert np.array_equal(vectors, vectors_of(np.arange(500), 64))

    def export():
        store.export(target)
        exported = np.load(target)
        right = {vector.tobytes() for vector in vectors_of(np.arange(500), 64)}
        assert all(vector.tobytes() in right for vector in exported)

    yield store.stats
    yield export
    yield transform
    yield store.stats
    yield lambda: store.prune(1000)
    yield store.clear


def use_shards(folder):
    from sklembed.scale import import_vectors
    from sklembed.scale.shards import Folder, Shards

    encoder, path = number_encoder(None), folder / "imported.sqlite"
    digests = encoder.digests(list(map(str, range(500))))
    number_of = {digest: number for number, digest in enumerate(digests)}

    def read():
        space = encoder._backend_and_space()[1]
        shards = Shards(Folder.at(folder / "shards"), space)
        for name in shards.names():
            keys, vectors = shards.read(name)
            numbers = [number_of[key.tobytes().hex()] for key in keys]
            assert np.array_equal(vectors, vectors_of(numbers, 64))

    def transform():
        import_vectors(EmbeddingStore(path), folder / "shards")
        counts = Counter()
        stored_numbers(path, 500, 64, counts)
        assert not counts["wrong vectors"]

    yield read
    yield transform


def replace_shard(folder):
    """Replace a shard by one of another model with vectors of equal width."""
    from sklembed.encoders.database import Space
    from sklembed.scale.shards import Folder, Shards

    encoder = number_encoder(None)
    texts = list(map(str, range(500)))
    digests = [bytes.fromhex(digest) for digest in encoder.digests(texts)]
    other = Shards(Folder.at(folder), Space("another", {"name": "other"}, 64))
    other.folder.create()
    other.write("0.parquet", digests, np.ones((500, 64)))
    (_, shard) = sorted((folder / "shards" / encoder.fingerprint()).iterdir())
    shutil.move(folder / "another" / "0.parquet", shard)
    shutil.rmtree(folder / "another")


def use_pipeline_files(folder):
    (pipeline, _), X = small_pipelines()

    def predict():
        scores = sklembed.load(folder / "model").decision_function(X)
        assert np.array_equal(scores, pipeline.decision_function(X))

    yield predict


def use_network(folder):
    texts = list(map(str, range(64)))
    expected = module_encoder(None, "torch").transform(texts)

    def transform():
        vectors = module_encoder(folder / "store.sqlite", "openvino").transform(texts)
        assert np.allclose(vectors, expected, atol=1e-3)

    yield EmbeddingStore(folder / "store.sqlite").networks
    yield transform


# How to make files, checks that use them, and their share of the damages.
DAMAGED = {
    "store": (make_store, use_store, 1),
    "shards": (make_shards, use_shards, 1),
    "saved pipeline": (make_pipeline_files, use_pipeline_files, 1),
    "exported network": (make_network, use_network, 0.2),
}


OTHER_VERSIONS = {
    "another schema": ("encoders/database.py", r"_SCHEMA_VERSION = \d+"),
    "another format of saved pipelines": ("_persistence.py", r"_FORMAT = \d+"),
    "another decoding": ("encoders/cells.py", r"DECODING_VERSION = \d+"),
}


def measure_versions(folder, options):
    """Let another version of the package write, and this one read, and vice versa."""
    counts = Counter({"combinations of versions": 0, "wrong vectors": 0})
    counts |= {"damaged stores": 0, "not refused": 0, "errors of another kind": 0}
    for number, (name, (file, pattern)) in enumerate(OTHER_VERSIONS.items()):
        package = folder / str(number) / "sklembed"
        shutil.copytree(Path(sklembed.__file__).parent, package)
        source = (package / file).read_text()
        changed, n_changes = re.subn(pattern, lambda m: m[0] + "9", source)
        assert n_changes == 1
        (package / file).write_text(changed)
        this = Path(sklembed.__file__).parents[1]
        for writer, reader in ((this, package.parent), (package.parent, this)):
            work = folder / f"{number}-{writer == this}"
            work.mkdir()
            processes = [use_version(writer, work), use_version(reader, work)]
            results = [json.loads(process.stdout) for process in processes]
            counts["combinations of versions"] += 1
            expects_refusal = name != "another decoding"
            counts["not refused"] += results[1]["refused"] != expects_refusal
            for result in results:
                counts["errors of another kind"] += result["errors"]
            counts["wrong vectors"] += sum(result["wrong"] for result in results)
            with contextlib.closing(sqlite3.connect(work / "store.sqlite")) as db:
                state = db.execute("PRAGMA integrity_check").fetchall()
            counts["damaged stores"] += state != [("ok",)]
    return dict(counts)


def use_version(root, work):
    """Encode and save with the package in a folder."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--version-of", str(root), str(work)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)


def run_version(root, work):
    """Use the store and the pipeline in a folder; print the outcome."""
    assert Path(sklembed.__file__).is_relative_to(root)
    pipelines, X = small_pipelines()
    directory = work / "model"
    expected = pipelines[0].decision_function(X)

    def transform():
        vectors = number_encoder(work / "store.sqlite").transform(["1", "2", "3"])
        assert np.array_equal(vectors, vectors_of([1, 2, 3], 64))

    def predict():
        if not directory.exists():
            sklembed.save(pipelines[0], directory)
        scores = sklembed.load(directory).decision_function(X)
        assert np.array_equal(scores, expected)

    outcomes = [outcome_of(transform, "store"), outcome_of(predict, "pipeline")]
    result = {
        "refused": "refused with an error" in outcomes,
        "wrong": outcomes.count("wrong results"),
        "errors": outcomes.count("errors of another kind"),
    }
    print(json.dumps(result))


def fit_pipeline(folder):
    """Fit a pipeline of texts and images, by the packaged encoders; return its table."""
    data = load_emoji().data
    table = data[["name", "image"]].iloc[:600].reset_index(drop=True)
    y = np.arange(len(table)) % 3
    store = EmbeddingStore(folder / "store.sqlite")
    images = FrozenEncoder(efficientnet_lite0(), store=store, errors="missing")
    model = sklembed.multimodal_pipeline(
        sklembed.EmbeddingClassifier(members=["linear"], random_state=0),
        kinds={"name": "text", "image": "image"},
        text_encoder=FrozenEncoder(minilm(), store=store, dtype="float32"),
        image_encoder=images,
        lexical=False,
    )
    return model.fit(table, y), table, store


def new_rows(table, n_rows):
    """Return rows with new texts, and with images of which a tenth are broken."""
    rng = np.random.default_rng(0)
    rows = table.iloc[rng.integers(0, len(table), n_rows)].reset_index(drop=True)
    rows["name"] += [f" {number}" for number in range(n_rows)]
    for row in range(0, n_rows, 10):
        image = bytearray(rows.at[row, "image"])
        image[len(image) // 2 :] = f"row {row}".encode()
        rows.at[row, "image"] = bytes(image)
    return rows


def measure_soak(folder, options):
    """Predict single rows, half of them new, and watch the process."""
    model, table, _ = fit_pipeline(folder)
    rows = new_rows(table, options.predictions // 2)
    process = psutil.Process()
    watched, differing, first = [], 0, {}
    with without_warnings():
        for number in range(options.predictions):
            # Each row is predicted twice, the second time from the store.
            row = number // 2
            probabilities = model.predict_proba(rows.iloc[[row]])
            if number % 2 == 0:
                first = probabilities
            else:
                differing += not np.array_equal(probabilities, first)
            if number in (options.predictions // 10, options.predictions - 1):
                watched.append(
                    (
                        process.memory_info().rss,
                        process.num_fds(),
                        process.num_threads(),
                    )
                )
    (early, early_files, early_threads), (late, files, n_threads) = watched
    return {
        "predictions": options.predictions,
        "of rows with a broken image": options.predictions // 10,
        "growth of memory after a tenth of them, %": 100 * (late / early - 1),
        "growth of open files": files - early_files,
        "growth of threads": n_threads - early_threads,
        "rows whose second prediction differs": differing,
    }


N_THREADS = 16


def measure_threads(folder, options):
    """Predict with one pipeline in many threads, each of which has all rows."""
    model, table, store = fit_pipeline(folder)
    rows = new_rows(table, options.rows)
    n_before = store.stats()["encoded"].sum()
    results, errors = {}, []
    barrier = threading.Barrier(N_THREADS)

    def predict(number):
        order = np.random.default_rng(number).permutation(len(rows))
        barrier.wait()
        try:
            results[number] = np.empty((len(rows), 3))
            for part in np.array_split(order, 8):
                results[number][part] = model.predict_proba(rows.iloc[part])
        except Exception as error:
            print(repr(error), file=sys.stderr)
            errors.append(error)

    threads = [
        threading.Thread(target=predict, args=[number]) for number in range(N_THREADS)
    ]
    with without_warnings():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alone = model.predict_proba(rows)
    stored, new = set(table["image"]), rows["image"].iloc[~broken(rows)]
    n_new_images = len(set(new) - stored)
    n_encoded = int(store.stats()["encoded"].sum() - n_before)
    differing = sum(
        (~np.isclose(alone, result, atol=1e-6, rtol=0)).any(axis=1).sum()
        for result in results.values()
    )
    return {
        "threads": N_THREADS,
        "predictions": N_THREADS * len(rows),
        "errors": len(errors),
        "differing predictions": int(differing),
        "cells encoded twice or never": abs(n_encoded - len(rows) - n_new_images),
    }


def broken(rows):
    """Return the mask of the rows whose image `new_rows` has broken."""
    return np.arange(len(rows)) % 10 == 0


def measure_audit(folder, options):
    """Ask for the known vulnerabilities of the dependencies of sklembed."""
    if importlib.util.find_spec("pip_audit") is None:
        return {"skipped: pip-audit is not installed": 1}
    requirements = []
    for requirement in importlib.metadata.requires("sklembed"):
        if "extra ==" in requirement:
            continue
        name = re.match(r"[\w-]+", requirement)[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name).partition("+")[0]
            requirements.append(f"{name}=={version}")
    path = folder / "requirements.txt"
    path.write_text("\n".join(sorted(set(requirements) - {"sklembed"})))
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip"]
    process = subprocess.run(
        [*command, "-r", str(path), "-f", "json"], stdout=subprocess.PIPE
    )
    if not process.stdout:
        return {"skipped: the service cannot be reached": 1}
    packages = json.loads(process.stdout)["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    figures = {"packages": len(packages), "packages audited": len(audited)}
    if audited:  # else the advisories cannot be reached, and nothing is known
        vulnerable = [package for package in audited if package["vulns"]]
        print(f"vulnerable: {vulnerable}", file=sys.stderr)
        figures["vulnerable packages"] = len(vulnerable)
    return figures


STAGES = {
    "kills": measure_kills,
    "full_disk": measure_full_disk,
    "damage": measure_damage,
    "versions": measure_versions,
    "cells": measure_cells,
    "attacks": measure_attacks,
    "soak": measure_soak,
    "threads": measure_threads,
    "audit": measure_audit,
}


def as_records(figures):
    """Return rows of a table, with the target of each fault."""
    records = []
    for name, figure in figures.items():
        target = TARGETS.get(name.rpartition(": ")[2], "")
        records.append({"": name, "figure": figure, "target": target})
    return records


def main():
    """Measure, print tables, and write them as JSON if there is a path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"of {list(STAGES)}; by default all")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--fast", action="store_true", help="a tenth of the amounts")
    parser.add_argument("--kills", type=int, default=50, help="of most kinds")
    parser.add_argument("--damages", type=int, default=1000, help="of each kind")
    parser.add_argument("--cells", type=int, default=60_000)
    parser.add_argument("--predictions", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=400, help="that threads predict")
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--full-disk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--version-of", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        return search(options.search, options.search / "log")
    if options.full_disk:
        return fill_disk(options.full_disk)
    if options.version_of:
        return run_version(*options.version_of)
    if options.fast:
        for name in ("kills", "damages", "cells", "predictions", "rows"):
            setattr(options, name, getattr(options, name) // 10)

    results = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    for stage in options.stages or STAGES:
        # A stage starts without threads, which would not survive its forks.
        with tempfile.TemporaryDirectory() as name:
            with ProcessPoolExecutor(1, mp_context=FORK) as pool:
                figures = pool.submit(STAGES[stage], Path(name), options).result()
        results[stage] = as_records(figures)
        print(f"\n{stage}")
        for record in results[stage]:
            print(f"{record['']:60}{record['figure']:12,.6g}  {record['target']}")
        if options.json:
            ordered = {stage: results[stage] for stage in STAGES if stage in results}
            options.json.write_text(json.dumps(ordered, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()
