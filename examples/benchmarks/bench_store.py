"""Measure the store: warm reads, cold encoding, size on disk, memory for a million
rows.

Warm reads use ``FrozenEncoder.transform``, which also hashes the cells, and
``EmbeddingStore.read`` alone. The baseline is ``np.load`` of the same array, without
cells. Cold encoding runs all-MiniLM-L6-v2 on short texts, alternately with and without
a store. A million rows are written and read in a separate process. Its peak memory is
compared with its memory before and with the size of the array. Figures are medians of
the repeats.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder
from sklembed.encoders import minilm
from sklembed.encoders.database import Space

N_FEATURES = 384
SPACE = Space("bench", {"name": "bench"}, N_FEATURES)
TARGETS = {
    "warm transform, rows/s": (">=", 150_000),
    "cold encode, overhead %": ("<=", 3),
    "size on disk / raw vectors": ("<=", 1.15),
    "million rows, MiB beyond the output": ("<=", 1024),
}


def load_random():
    """Return an encoder without a model, which returns noise."""
    rng = np.random.default_rng(0)
    return lambda texts: rng.normal(size=(len(texts), N_FEATURES)).astype(np.float32)


def rate(n_rows, work, repeats):
    """Return rows per second, the median over repeats."""
    seconds = []
    for _ in range(repeats):
        tick = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - tick)
    return n_rows / np.median(seconds)


def measure_reads(folder, n_rows, repeats):
    """Measure warm reads and the size of the file."""
    store = EmbeddingStore(folder / "reads.sqlite")
    backend = CallableBackend(
        load_random, name="noise", version="1", modality="text", n_features=N_FEATURES
    )
    encoder = FrozenEncoder(backend, store=store, batch_size=1024)
    texts = [f"the text of row {i}, about as long as a title" for i in range(n_rows)]
    cold = encoder.transform(texts)
    assert np.array_equal(encoder.transform(texts), cold)
    np.save(folder / "peer.npy", cold)

    digests = fill_directly(store, n_rows)
    return {
        "warm transform, rows/s": rate(
            n_rows, lambda: encoder.transform(texts), repeats
        ),
        "EmbeddingStore.read, rows/s": rate(
            n_rows, lambda: read_all(store, digests), repeats
        ),
        "np.load of the array, rows/s": rate(
            n_rows, lambda: np.load(folder / "peer.npy"), repeats
        ),
        "size on disk / raw vectors": store.path.stat().st_size / (2 * cold.nbytes),
    }


def fill_directly(store, n_rows, batch_size=4096):
    """Fill a store with noise under random hashes; return the hashes."""
    rng = np.random.default_rng(1)
    digests = [rng.bytes(16) for _ in range(n_rows)]

    def encode(claims):
        for batch in claims:
            yield (
                batch,
                batch,
                rng.normal(size=(len(batch), N_FEATURES)).astype(np.float32),
            )

    n_done = sum(
        len(positions)
        for positions, _ in store.fill(
            SPACE, digests, encode=encode, claim_size=batch_size
        )
    )
    assert n_done == n_rows
    return digests


def read_all(store, digests):
    """Read vectors into one array."""
    # The array is filled first, as in the encoder. Otherwise Linux would allocate its pages
    # between the reads of the file, which is slow and would distort the measurement.
    out = np.full((len(digests), N_FEATURES), np.nan, dtype=np.float32)
    for positions, values in store.read(SPACE, digests):
        out[positions] = values
    return out


def measure_overhead(folder, n_rows, repeats):
    """Time cold encoding by MiniLM, alternately with and without a store."""
    rng = np.random.default_rng(0)
    words = np.array(
        "red green blue small large round old new soft hard house tree".split()
    )
    texts = [f"{i} " + " ".join(rng.choice(words, 12)) for i in range(n_rows)]
    seconds = {"with": [], "without": []}
    for turn in range(repeats + 1):
        stores = {
            "without": None,
            "with": EmbeddingStore(folder / f"cold-{turn}.sqlite"),
        }
        for arm in sorted(stores, reverse=turn % 2):
            encoder = FrozenEncoder(minilm(), store=stores[arm], dtype="float32")
            tick = time.perf_counter()
            encoder.transform(texts)
            seconds[arm].append(time.perf_counter() - tick)
    # The first turn loads the model.
    ratios = [
        a / b for a, b in zip(seconds["with"][1:], seconds["without"][1:], strict=True)
    ]
    return {
        "cold encode without a store, rows/s": n_rows
        / np.median(seconds["without"][1:]),
        "cold encode, overhead %": 100 * (np.median(ratios) - 1),
        "store's share of a cold encode, %": measure_share(folder, n_rows, seconds),
    }


def measure_share(folder, n_rows, seconds):
    """Time the store alone, in percent of encoding without it."""
    tick = time.perf_counter()
    fill_directly(EmbeddingStore(folder / "alone.sqlite"), n_rows, batch_size=32)
    return 100 * (time.perf_counter() - tick) / np.median(seconds["without"][1:])


def measure_memory(folder, n_rows):
    """Write and read rows in a separate process; return its speed and peak memory."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        str(folder / "million.sqlite"),
        str(n_rows),
    ]
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    )


def work(path, n_rows):
    """Print speed and memory of writing and reading; runs in a separate process."""
    store = EmbeddingStore(path)
    baseline = peak_mib()
    tick = time.perf_counter()
    digests = fill_directly(store, n_rows)
    wrote = time.perf_counter()
    output = read_all(store, digests).nbytes / 2**20
    figures = {
        "million rows written, rows/s": n_rows / (wrote - tick),
        "million rows read, rows/s": n_rows / (time.perf_counter() - wrote),
        "million rows, MiB beyond the output": peak_mib() - baseline - output,
    }
    print(json.dumps(figures))


def peak_mib():
    """Return the peak memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # the peak of getrusage includes that of the parent process
        (line,) = (
            line for line in status.read_text().splitlines() if line.startswith("VmHWM")
        )
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    """Measure, print a table, and write it as JSON if there is a path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--rows", type=int, default=200_000, help="rows of the warm reads"
    )
    parser.add_argument(
        "--texts", type=int, default=1024, help="texts of the cold encode"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--million", type=int, default=1_000_000, help="rows of the memory measurement"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], int(options.worker[1]))
        return

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = measure_reads(folder, options.rows, options.repeats)
        figures |= measure_overhead(folder, options.texts, options.repeats)
        figures |= measure_memory(folder, options.million)
    for name, figure in figures.items():
        sign, target = TARGETS.get(name, ("", ""))
        print(f"{name:40}{figure:14,.2f}  {sign} {target}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
