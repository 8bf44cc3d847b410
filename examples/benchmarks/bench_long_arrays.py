"""Measure time and memory of transforming and predicting arrays on disk.

Estimators are fitted on 5,000 rows of 384 numbers, and then take arrays of up to two
million rows, in half precision and single precision. "MiB beyond the output" is the peak
of the process's own memory above its memory before the call and the output. The exponent
is the slope of log seconds over log rows. Linux only.
"""

import argparse
import contextlib
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd

from sklembed import ContrastiveProjector, FusionClassifier, ModalityGapAligner

N_FEATURES = 384
BLOCKS = {"text": slice(0, 192), "image": slice(192, 384)}
TARGETS = {"exponent": ("<=", 1.05), "MiB beyond the output": ("<=", 1024)}


def write_array(path, n_rows, dtype):
    """Write random rows to a file, and return them as an array on disk."""
    rng = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, "w+", dtype, (n_rows, N_FEATURES))
    for start in range(0, n_rows, 10_000):
        rows = array[start : start + 10_000]
        rows[:] = rng.standard_normal(rows.shape, dtype=np.float32)
    return np.load(path, mmap_mode="r")


def fit_estimators(X):
    """Return a method of each fitted estimator by its name."""
    y = np.random.default_rng(0).integers(0, 10, len(X))
    projector = ContrastiveProjector(64, max_epochs=1, cv=None, random_state=0)
    fusion = FusionClassifier(blocks=BLOCKS, max_epochs=1, random_state=0)
    return {
        "ContrastiveProjector.transform": projector.fit(X, y).transform,
        "ModalityGapAligner.transform": ModalityGapAligner(BLOCKS).fit(X).transform,
        "FusionClassifier.predict_proba": fusion.fit(X, y).predict_proba,
    }


def own_memory():
    """Return the memory of this process in MiB, without files mapped into memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def peak_memory():
    """Yield a list that has the peak above the memory before, in MiB, at the end."""
    before, peaks, is_done = own_memory(), [], threading.Event()

    def watch():
        while not is_done.wait(0.01):
            peaks.append(own_memory())

    watcher, result = threading.Thread(target=watch), []
    watcher.start()
    yield result
    is_done.set()
    watcher.join()
    result.append(max(peaks, default=before) - before)


def measure(method, X):
    """Return the seconds of a call, and its MiB beyond the output."""
    tick = time.perf_counter()
    with peak_memory() as peak:
        output = method(X)
    return time.perf_counter() - tick, peak[0] - output.nbytes / 2**20


def main():
    """Print a row for each estimator, type and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    numbers = [options.rows // 4, options.rows // 2, options.rows]
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float16", "float32"):
            array = write_array(f"{folder}/{dtype}.npy", options.rows, dtype)
            for name, method in fit_estimators(array[:5000].astype("float32")).items():
                method(array[: numbers[0]])  # reads the file into the cache
                results = [measure(method, array[:n_rows]) for n_rows in numbers]
                seconds, memory = zip(*results, strict=True)
                exponent = np.polyfit(np.log(numbers), np.log(seconds), 1)[0]
                records.append(
                    {
                        "method": name,
                        "dtype": dtype,
                        "rows": options.rows,
                        "seconds": seconds[-1],
                        "exponent": exponent,
                        "MiB beyond the output": max(memory),
                    }
                )
            Path(f"{folder}/{dtype}.npy").unlink()
    print(pd.DataFrame(records).round(2).to_string(index=False))
    for measure_name, (sign, bar) in TARGETS.items():
        print(f"target: {measure_name} {sign} {bar}")
    if options.json:
        options.json.write_text(json.dumps({"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
