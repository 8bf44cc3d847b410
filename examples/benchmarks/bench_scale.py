"""Measure encode_dataset on local clusters of Ray.

- workers: texts are encoded by all-MiniLM-L6-v2, with one worker on one CPU and two
  workers on two, of one thread each.
- overhead: short texts are encoded by static token embeddings of random numbers; the
  baseline is ``FrozenEncoder.transform`` with a store, which keeps the vectors, too.
- duplicates: 30 % of the rows repeat a cell; the baseline has only the distinct cells.
- second_job: the same cells in another order, with the same shards.
- kills: SIGKILL for workers and drivers at random times. After each job, the rows of
  the target are compared with the source, and the times of encoding with the times of
  the commits.

Seconds are without the start of the first worker, and rates of workers without their
first task, which loads the model.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from safetensors.numpy import save_file

from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder
from sklembed.encoders import minilm
from sklembed.encoders.cells import hash_text
from sklembed.scale import encode_dataset
from sklembed.scale.shards import Folder, Shards

TARGETS = {
    "two workers / one, ratio of speed": (">=", 1.6),
    "overhead of the engine, %": ("<=", 15),
    "duplicates, seconds / distinct cells": ("<=", 1.15),
    "second job, cells encoded": ("<=", 0),
    "kills, rows lost": ("<=", 0),
    "kills, rows doubled or in another order": ("<=", 0),
    "kills, cells encoded again after their commit": ("<=", 0),
}
TASK_CELLS = 2048  # texts that a task of encode_dataset commits
WORDS = np.array(
    "red green blue small large round old new soft hard house tree".split()
)


@contextlib.contextmanager
def cluster(n_cpus):
    """Start Ray on this machine."""
    ray.init(
        "local",
        num_cpus=n_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def make_texts(n_texts, n_words, seed=0):
    """Return distinct texts."""
    words = np.random.default_rng(seed).choice(WORDS, (n_texts, n_words))
    return [f"{i} " + " ".join(row) for i, row in enumerate(words)]


def save(path, texts):
    """Write texts to a Parquet file."""
    table = pa.table({"row": np.arange(len(texts)), "text": texts})
    pq.write_table(table, path, row_group_size=1 << 16)
    return path


def save_static(folder):
    """Save static token embeddings of random numbers with the tokenizer of MiniLM."""
    folder.mkdir()
    shutil.copy(Path(minilm()) / "tokenizer.json", folder)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(30522, 256)).astype(np.float32)
    save_file({"embeddings": table}, folder / "model.safetensors")
    config = {"model_type": "model2vec", "normalize": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(encoder, source, target, **options):
    """Encode a file, and return the summary and the seconds without the start."""
    summary = encode_dataset(encoder, source, target, columns="text", **options)
    return summary, summary.seconds - summary.seconds_to_start


def measure_workers(folder, options):
    """Compare one worker on one CPU with two workers on two CPUs."""
    source = save(folder / "texts.parquet", make_texts(options.texts, 12))
    encoder = FrozenEncoder(minilm(), store=None, dtype="float32")
    rates, starts = {1: [], 2: []}, []
    for turn in range(options.repeats):
        for n_workers in (1, 2):
            target = folder / f"{n_workers}-{turn}"
            with cluster(n_workers):
                summary, _ = run(encoder, source, target, n_workers=n_workers)
            rates[n_workers].append(rate_of_commits(target, n_workers))
            starts.append(summary.seconds_to_start)
    return {
        "one worker, texts/s": np.median(rates[1]),
        "two workers, texts/s": np.median(rates[2]),
        "two workers / one, ratio of speed": np.median(rates[2]) / np.median(rates[1]),
        "start of the first worker, s": np.median(starts),
    }


def rate_of_commits(target, n_workers):
    """Return texts per second after the first task of each worker, which loads models."""
    shards = target.glob("_vectors/*/*.parquet")
    times = sorted(shard.stat().st_mtime for shard in shards)
    n_tasks = len(times) - n_workers
    return n_tasks * TASK_CELLS / (times[-1] - times[n_workers - 1])


def measure_overhead(folder, options):
    """Compare the engine with `transform` for a fast encoder."""
    texts = make_texts(options.rows, 8)
    source = save(folder / "texts.parquet", texts)
    model = save_static(folder / "static")
    seconds = {"transform": [], "engine": [], "with start": []}
    with cluster(2):
        for turn in range(options.repeats):
            store = EmbeddingStore(folder / f"{turn}.sqlite")
            tick = time.perf_counter()
            FrozenEncoder(model, store=store).transform(texts)
            seconds["transform"].append(time.perf_counter() - tick)
            encoder = FrozenEncoder(model, store=None)
            summary, duration = run(encoder, source, folder / str(turn))
            seconds["engine"].append(duration)
            seconds["with start"].append(summary.seconds)
    medians = {arm: np.median(values) for arm, values in seconds.items()}
    return {
        "transform with a store, s": medians["transform"],
        "engine, s": medians["engine"],
        "engine with the start of its workers, s": medians["with start"],
        "overhead of the engine, %": 100
        * (medians["engine"] / medians["transform"] - 1),
    }


def measure_duplicates(folder, options):
    """Compare rows of which 30 % repeat a cell with the distinct cells alone."""
    distinct = make_texts(int(0.7 * options.texts), 12)
    rng = np.random.default_rng(0)
    texts = [*distinct, *rng.choice(distinct, options.texts - len(distinct))]
    random.Random(0).shuffle(texts)
    sources = {
        "distinct": save(folder / "distinct.parquet", distinct),
        "all": save(folder / "all.parquet", texts),
    }
    encoder = FrozenEncoder(minilm(), store=None, dtype="float32")
    seconds = {"distinct": [], "all": []}
    with cluster(2):
        for turn in range(options.repeats):
            for arm, source in sources.items():
                summary, duration = run(encoder, source, folder / f"{arm}-{turn}")
                seconds[arm].append(duration)
                assert summary.encoded == len(distinct)
        ratio = np.median(seconds["all"]) / np.median(seconds["distinct"])
        vectors = folder / "all-0" / "_vectors"
        source = save(folder / "again.parquet", texts[::-1])
        summary, duration = run(encoder, source, folder / "again", vectors=vectors)
    return {
        "duplicates, seconds / distinct cells": ratio,
        "second job, cells encoded": summary.encoded,
        "second job, s": duration,
    }


LOGGED = np.dtype([("time", np.int64), ("text", np.int64)])


def slow_encoder(log):
    """Return an encoder of numbers in texts that logs when it encodes each of them."""

    def load():
        def encode(texts):
            time.sleep(0.004)
            numbers = np.array([int(text) for text in texts])
            entries = np.empty(len(numbers), LOGGED)
            entries["time"], entries["text"] = time.time_ns(), numbers
            with open(log, "ab") as file:
                file.write(entries.tobytes())
            return np.stack([numbers % 1000, numbers // 1000], axis=1)

        return encode

    backend = CallableBackend(
        load, name="numbers", version="1", modality="text", n_features=2
    )
    return FrozenEncoder(backend, store=None)


def measure_kills(folder, options):
    """Kill workers and drivers at random times, until the job has ended."""
    random.seed(0)
    counts = {
        "kills, of workers": 0,
        "kills, of drivers": 0,
        "kills, rows lost": 0,
        "kills, rows doubled or in another order": 0,
        "kills, cells encoded again after their commit": 0,
        "kills, cells encoded again before their commit, %": [],
    }
    with cluster(2) as address:
        for number in range(1000):
            n_kills = counts["kills, of workers"] + counts["kills, of drivers"]
            if n_kills >= options.kills:
                break
            job = folder / f"job-{number}"
            job.mkdir()
            kill_one_job(job, address, counts, options)
            check_job(job, counts, options)
    share = np.mean(counts.pop("kills, cells encoded again before their commit, %"))
    return counts | {"kills, cells encoded again before their commit, %": share}


def kill_one_job(job, address, counts, options):
    """Encode a file, with kills at random times."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, options.cells, int(1.4 * options.cells))
    save(job / "source.parquet", [str(number) for number in numbers])
    command = [sys.executable, __file__, "--driver", str(job)]
    environment = os.environ | {"RAY_ADDRESS": address}
    driver = subprocess.Popen(command, env=environment)
    while wait_for_progress(job / "log", driver):
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(random.uniform(0, 2))
            break
        n_kills = counts["kills, of workers"] + counts["kills, of drivers"]
        if n_kills >= options.kills:
            break
        workers = list_workers()
        if random.random() < 0.5 and workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                random.choice(workers).kill()
                counts["kills, of workers"] += 1
        else:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            counts["kills, of drivers"] += 1
            while list_workers():
                time.sleep(0.05)
            driver = subprocess.Popen(command, env=environment)
    assert driver.wait() == 0


def wait_for_progress(log, driver):
    """Wait until cells are encoded; return whether a driver is still alive."""
    size = log.stat().st_size if log.exists() else 0
    while driver.poll() is None:
        if log.exists() and log.stat().st_size > size:
            return True
        time.sleep(0.01)
    return False


def list_workers():
    """Return the processes of workers of this cluster."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("ray::Worker" in part for part in process.cmdline()):
                workers.append(process)
    return workers


def check_job(job, counts, options):
    """Compare the target with the source, and the log with the times of the commits."""
    source = pq.read_table(job / "source.parquet")
    target = pq.read_table(job / "target")
    counts["kills, rows lost"] += max(0, len(source) - len(target))
    is_equal = target.select(["row", "text"]).equals(source)
    counts["kills, rows doubled or in another order"] += int(not is_equal)
    numbers = np.array(source["text"].to_pylist(), dtype=int)
    vectors = target["text_embedding"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(vectors.reshape(-1, 2) @ [1, 1000], numbers)

    # All cells of a file have the time of its commit.
    number_of_key = {hash_text(str(i)): i for i in range(options.cells)}
    committed = np.full(options.cells, np.iinfo(np.int64).max)
    space = slow_encoder(job / "log")._backend_and_space()[1]
    shards = Shards(Folder.at(job / "target" / "_vectors"), space)
    for name in shards.names():
        cells = [number_of_key[key.tobytes()] for key in shards.read_keys(name)]
        time_of_commit = os.stat(shards.folder.file(name)).st_mtime_ns
        committed[cells] = np.minimum(committed[cells], time_of_commit)
    log = np.fromfile(job / "log", LOGGED)
    n_again = int((log["time"] > committed[log["text"]]).sum())
    counts["kills, cells encoded again after their commit"] += n_again
    share = 100 * (len(log) / len(np.unique(log["text"])) - 1)
    counts["kills, cells encoded again before their commit, %"].append(share)


STAGES = {
    "workers": measure_workers,
    "overhead": measure_overhead,
    "duplicates": measure_duplicates,
    "kills": measure_kills,
}


def main():
    """Measure, print a table, and write it as JSON if there is a path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"of {list(STAGES)}; by default all")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--texts", type=int, default=32768, help="encoded by MiniLM")
    parser.add_argument("--rows", type=int, default=100_000, help="of the overhead")
    parser.add_argument("--cells", type=int, default=60_000, help="of a job with kills")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--driver", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.driver:
        encoder = slow_encoder(str(options.driver / "log"))
        source, target = options.driver / "source.parquet", options.driver / "target"
        encode_dataset(encoder, source, target, columns="text")
        return

    figures = {}
    for stage in options.stages or STAGES:
        with tempfile.TemporaryDirectory() as name:
            figures |= STAGES[stage](Path(name), options)
    for name, figure in figures.items():
        sign, target = TARGETS.get(name, ("", ""))
        print(f"{name:52}{figure:12,.2f}  {sign} {target}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()
