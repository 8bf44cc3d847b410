"""Load-test the example of a service on the loopback interface.

A pipeline of all-MiniLM-L6-v2 and ``EmbeddingClassifier`` is fitted, saved and served by
uvicorn in a separate process. One client, and then sixteen, send new rows one at a time.
The latency is compared with a call of the encoder without a store, in this process, and
the memory of the server is read after a tenth and after all of the predictions. A fresh
process predicts rows whose vectors are stored, without torch. *ONNX alone* is a process with
``onnx_model.py``, which imports neither sklembed nor scikit-learn, and its own forward pass.
Requires fastapi and uvicorn.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from sklearn.pipeline import make_pipeline

import sklembed
from sklembed import EmbeddingClassifier, FrozenEncoder, multimodal_pipeline
from sklembed.datasets import load_emoji
from sklembed.encoders import minilm

SERVING = Path(__file__).parents[1] / "serving"
N_CLIENTS = 16
TARGETS = {
    "p50 / encoder alone": ("<=", 1.2),
    "throughput, 16 clients / 1": (">=", 3.0),
    "growth of memory, %": ("<=", 2.0),
    "memory without torch, MiB": ("<=", 250.0),
    "ONNX alone, p50 / forward pass": ("<=", 1.2),
    "ONNX alone, memory, MiB": ("<=", 250.0),
    "ONNX alone, growth of memory, %": ("<=", 2.0),
}
PREDICT_STORED = """
import sys

import pandas as pd

import sklembed

directory, *texts = sys.argv[1:]
sklembed.load(directory).predict_proba(pd.DataFrame({"name": texts}))
assert "torch" not in sys.modules
print(open("/proc/self/status").read())
"""
# The memory is read after a tenth and after all of the predictions.
PREDICT_BY_ONNX = """
import json
import sys
import time

folder, serving, n_texts = sys.argv[1:]
sys.path.insert(0, serving)
import numpy as np
from onnx_model import OnnxModel

def memory():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024

model = OnnxModel(folder + "/encoder", folder + "/head.onnx")
forward, whole, memories = [], [], []
for i in range(int(n_texts)):
    tick = time.perf_counter()
    model.encode([f"a red cat {i}"])
    forward.append(time.perf_counter() - tick)
    tick = time.perf_counter()
    model.predict_proba([f"a red cat {i}"])
    whole.append(time.perf_counter() - tick)
    memories.append(memory())
assert not {"torch", "sklearn", "pandas", "sklembed"} & sys.modules.keys()
before, after = memories[len(memories) // 10], memories[-1]
print(json.dumps({
    "ONNX alone, p50, ms": 1e3 * np.median(whole),
    "ONNX alone, p50 / forward pass": np.median(whole) / np.median(forward),
    "ONNX alone, memory, MiB": after,
    "ONNX alone, growth of memory, %": 100 * (after / before - 1),
}))
"""


def save_model(directory, runtime):
    """Fit and save a pipeline of short texts; return texts that differ from all cells."""
    data = load_emoji().data
    table, y = data[["name"]], np.arange(len(data)) % 2
    # To find the precision of "auto", torch would be imported.
    encoder = FrozenEncoder(minilm(), runtime=runtime, dtype="float32")
    head = EmbeddingClassifier(members=["linear", "kernel"], random_state=0)
    model = multimodal_pipeline(
        head, kinds={"name": "text"}, text_encoder=encoder, lexical=False
    )
    sklembed.save(model.fit(table, y), directory)
    return (f"{name} {i}" for i in itertools.count() for name in table["name"])


def encoder_seconds(runtime, texts, n_texts):
    """Return the median seconds in which an encoder without a store encodes one text."""
    encoder = FrozenEncoder(minilm(), runtime=runtime, store=None).warm_up()
    seconds = []
    for text in itertools.islice(texts, n_texts):
        tick = time.perf_counter()
        encoder.transform([text])
        seconds.append(time.perf_counter() - tick)
    return float(np.median(seconds))


@contextlib.contextmanager
def served(directory, port):
    """Run the service, and yield its process when it is healthy."""
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", str(SERVING)]
    command += ["--port", str(port), "--log-level", "warning"]
    environment = os.environ | {"SKLEMBED_MODEL": str(directory)}
    process = subprocess.Popen(command, env=environment)
    try:
        wait_until_healthy(port, process)
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_until_healthy(port, process, seconds=120):
    """Return when the service answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"The service did not answer within {seconds} s.")


def send(port, texts, n_clients, n_requests):
    """Send requests from concurrent clients; return their seconds and the throughput."""
    lock, seconds = threading.Lock(), []

    def run_client():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for _ in range(n_requests // n_clients):
            with lock:
                body = json.dumps({"rows": [{"name": next(texts)}]})
            tick = time.perf_counter()
            connection.request(
                "POST", "/predict", body, {"Content-Type": "application/json"}
            )
            reply = connection.getresponse()
            content = reply.read()
            seconds.append(time.perf_counter() - tick)
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {content[:200]!r}")

    clients = [threading.Thread(target=run_client) for _ in range(n_clients)]
    tick = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return seconds, len(seconds) / (time.perf_counter() - tick)


def memory_mib(status):
    """Return the resident memory in MiB, by the status that Linux reports."""
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def measure_onnx(folder, n_texts):
    """Return the latency and the memory of a fresh process with ONNX Runtime alone."""
    texts = load_emoji().data["name"]
    y = np.arange(len(texts)) % 2
    encoder = FrozenEncoder(minilm(), dtype="float32", store=None)
    head = EmbeddingClassifier(
        blocks={"text": slice(0, 384)}, members=["linear", "kernel"], random_state=0
    )
    encoder.export(f"{folder}/encoder")
    pipeline = make_pipeline(encoder, head).fit(texts, y)
    sklembed.to_onnx(pipeline, f"{folder}/head.onnx")
    command = [sys.executable, "-c", PREDICT_BY_ONNX, folder, SERVING, str(n_texts)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def status_of(process):
    """Return the status of a process that runs."""
    return Path(f"/proc/{process.pid}/status").read_text()


def memory_without_torch(directory, n_texts=100):
    """Return the memory of a fresh process that loads and predicts stored rows."""
    texts = load_emoji().data["name"].head(n_texts)
    command = [sys.executable, "-c", PREDICT_STORED, str(directory), *texts]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return memory_mib(result.stdout)


def measure(port, process, texts, n_requests):
    """Return the latency, the throughput and the memory of a service that runs."""
    send(port, texts, N_CLIENTS, 4 * N_CLIENTS)  # warm-up
    n_alone = n_requests // 10
    alone, rate_alone = send(port, texts, 1, n_alone)
    before = memory_mib(status_of(process))
    together, rate_together = send(port, texts, N_CLIENTS, n_requests - n_alone)
    after = memory_mib(status_of(process))
    return {
        "p50, 1 client, ms": 1e3 * float(np.median(alone)),
        "p50, 16 clients, ms": 1e3 * float(np.median(together)),
        "requests/s, 1 client": rate_alone,
        "requests/s, 16 clients": rate_together,
        "throughput, 16 clients / 1": rate_together / rate_alone,
        "memory, MiB": after,
        "growth of memory, %": 100 * (after / before - 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--runtime", default="openvino")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        texts = save_model(directory, options.runtime)
        without_torch = memory_without_torch(directory)
        seconds = encoder_seconds(options.runtime, texts, 200)
        with served(directory, options.port) as process:
            results = measure(options.port, process, texts, options.requests)
    with tempfile.TemporaryDirectory() as folder:
        results |= measure_onnx(folder, options.requests)
    results["memory without torch, MiB"] = without_torch
    results["encoder alone, ms"] = 1e3 * seconds
    ratio = results["p50, 1 client, ms"] / results["encoder alone, ms"]
    results["p50 / encoder alone"] = ratio
    for name, value in sorted(results.items()):
        sign, bar = TARGETS.get(name, ("", ""))
        print(f"{name:34} {value:10.2f}  {sign} {bar}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
