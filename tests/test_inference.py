"""Running a model: threads ahead of it, batches by cost, memory that runs out, a few loaded."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import joblib
import numpy as np
import pytest

from sklembed import CallableBackend, FrozenEncoder
from sklembed.encoders import inference
from sklembed.encoders.inference import Encoding, encode


class Backend:
    """A backend whose encoding is given; it counts what it is asked."""

    modality = "text"

    def __init__(self, encoding, key="test"):
        self._encoding, self._key = encoding, key

    def weights(self):
        return f"{self._key} {id(self)}"

    def load(self):
        return None

    def encoding(self, loaded):
        return self._encoding


def run(encoding, cells, *, batch_size=None, chunks=None, on_error=None):
    """Encode a list of cells; return the batches and the values."""
    chunks = [range(len(cells))] if chunks is None else chunks
    results = encode(
        Backend(encoding),
        chunks,
        cells.__getitem__,
        batch_size=batch_size,
        on_error=on_error,
    )
    return list(results)


def lengths(texts):
    return np.array([[len(text)] for text in texts])


def test_batches_are_filled_up_to_the_budget_and_no_further():
    encoding = Encoding(lengths, cost=len, budget=12)
    batches = [
        batch
        for batch, _, _ in run(encoding, ["aaaaa", "bbbb", "cccc", "dd", "e" * 40])
    ]
    # The costliest first. They cost 40; twice 5; twice 4.
    assert batches == [[4], [0, 1], [2, 3]]


def test_a_batch_size_of_the_user_s_counts_cells():
    encoding = Encoding(lengths, cost=len, budget=1)
    batches = [batch for batch, _, _ in run(encoding, ["aaa", "bb", "c"], batch_size=2)]
    assert batches == [[0, 1], [2]]


def test_batches_reach_over_chunks():
    chunks = [[0, 1], [2], [3, 4]]
    batches = [
        batch for batch, _, _ in run(Encoding(lengths), list("abcde"), chunks=chunks)
    ]
    assert batches == [[0, 1, 2, 3, 4]]


def test_nothing_is_loaded_for_no_cells():
    class Unloadable(Backend):
        def load(self):
            raise AssertionError("loaded")

    results = encode(Unloadable(None), iter([]), None, batch_size=None, on_error=None)
    assert list(results) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_memory_does_not_hold_is_halved_and_so_are_those_that_follow(
    error,
):
    sizes = []

    def forward(texts):
        sizes.append(len(texts))
        if len(texts) > 3:
            raise error
        return lengths(texts)

    cells = ["a" * i for i in range(20)]
    results = run(Encoding(forward, budget=8), cells)
    values = {
        i: v for _, done, vs in results for i, v in zip(done, vs[:, 0], strict=True)
    }
    assert values == {i: i for i in range(20)}
    assert sizes == [8, 4, 2, 2, 4, 2, 2, *[2] * 6]


def test_a_single_cell_that_memory_does_not_hold_is_a_clear_error():
    def forward(texts):
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="out of memory on a single cell.*no more"):
        run(Encoding(forward), ["a", "b"])


def test_other_errors_of_a_model_are_passed_on():
    def forward(texts):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        run(Encoding(forward), ["a", "b"])


def test_cells_are_prepared_while_the_model_is_busy():
    """The model waits in its first batch until a thread has prepared cells of a later one."""
    later = threading.Event()

    def prepare(cells):
        if "late" in cells:
            later.set()
        return cells

    def forward(cells):
        assert later.wait(timeout=30)
        return lengths(cells)

    cells = ["early"] * inference._JOB_SIZES["text"] + ["late"]
    results = run(Encoding(forward, prepare, budget=8), cells)
    assert sum(len(batch) for batch, _, _ in results) == len(cells)


def test_what_comes_before_a_cell_that_cannot_be_decoded_is_yielded_first():
    def decode(i):
        if i == 2:
            raise ValueError("broken")
        return "a"

    def refuse(error, position):
        raise ValueError(f"{position}: {error}")

    results = encode(
        Backend(Encoding(lengths)),
        [[0, 1, 2]],
        decode,
        batch_size=None,
        on_error=refuse,
    )
    assert next(results)[0] == [0, 1]
    with pytest.raises(ValueError, match="2: broken"):
        next(results)


def test_a_consumer_that_stops_leaves_no_thread_behind():
    before = threading.active_count()
    results = encode(
        Backend(Encoding(lengths)),
        ([i] for i in range(1000)),
        str,
        batch_size=1,
        on_error=None,
    )
    next(results)
    results.close()
    assert threading.active_count() == before


def test_an_error_of_the_model_leaves_no_thread_behind():
    def fail(cells):
        raise KeyboardInterrupt

    before = threading.active_count()
    chunks = ([i] for i in range(1000))
    with pytest.raises(KeyboardInterrupt) as caught:
        list(encode(Backend(Encoding(fail)), chunks, str, batch_size=1, on_error=None))
    assert threading.active_count() == before
    assert caught.tb is not None  # whose frames keep what they refer to alive


def test_a_single_job_starts_no_thread(monkeypatch):
    monkeypatch.delattr(inference, "ThreadPoolExecutor")
    ((batch, done, values),) = run(Encoding(lengths), ["a", "bb"])
    assert batch == done == [0, 1]
    np.testing.assert_array_equal(values, [[1], [2]])


def letters(load, name, **options):
    backend = CallableBackend(
        load, name=name, version="1", modality="text", n_features=1
    )
    return FrozenEncoder(backend, **options)


@pytest.mark.parametrize("where", ["encode", "prepare", "threads of encode"])
def test_encoders_within_encoders_do_not_wait_for_each_other(store, where):
    """Two threads: one encodes by the inner model, the other by the outer, which asks the inner."""

    def load_inner():
        return lambda text: time.sleep(0.002) or text, lengths

    inner = letters(load_inner, f"inner of {where}", store=store, batch_size=4)

    def load_outer():
        if where == "prepare":
            return lambda text: inner.transform([text])[0], np.array
        if where == "encode":
            return inner.transform
        work = joblib.delayed(inner.transform)
        return lambda texts: np.concatenate(
            joblib.Parallel(2, backend="threading")(work([text]) for text in texts)
        )

    outer = letters(load_outer, f"outer of {where}", store=store, batch_size=4)
    texts = ["a" * i for i in range(1, 60)]
    results = {}
    threads = [
        threading.Thread(
            target=lambda e=e: results.update({e: e.transform(texts)}), daemon=True
        )
        for e in (inner, outer)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results.keys() == {inner, outer}
    for vectors in results.values():
        assert vectors[:, 0].tolist() == list(range(1, 60))


def test_only_the_last_few_models_stay_loaded():
    for i in range(2 * inference._LOADED_LIMIT):
        backend = CallableBackend(
            lambda: lambda texts: np.ones((len(texts), 1)),
            name=f"model {i}",
            version="1",
            modality="text",
            n_features=1,
        )
        FrozenEncoder(backend, store=None).transform(["a"])
    assert len(inference._LOADED) == inference._LOADED_LIMIT


def test_errors_of_unreadable_cells_keep_nothing_alive():
    """What decoding has built up is freed without waiting for the cycle collector."""
    alive = []

    class Pixels:
        pass

    def decode(i):
        pixels = Pixels()
        alive.append(weakref.ref(pixels))
        try:
            raise OSError("cut short")
        except OSError as error:
            raise ValueError("cannot decode") from error

    errors = []
    backend = Backend(Encoding(lengths))
    backend.modality = "image"
    gc.disable()
    try:
        results = encode(
            backend,
            [list(range(20))],
            decode,
            batch_size=None,
            on_error=lambda error, i: errors.append(error),
        )
        assert sum(len(batch) for batch, _, _ in results) == 20
        assert sum(ref() is not None for ref in alive) == 0
    finally:
        gc.enable()
    assert all(str(error.__cause__) == "cut short" for error in errors)


def test_images_are_prepared_one_by_one():
    """At most one decoded image a thread waits for its preparation."""
    waiting, most = [], []

    def decode(i):
        waiting.append(i)
        most.append(len(waiting))
        return i

    def prepare(images):
        for image in images:
            waiting.remove(image)
        return images

    backend = Backend(Encoding(lambda images: np.zeros((len(images), 1)), prepare))
    backend.modality = "image"
    list(encode(backend, [list(range(50))], decode, batch_size=8, on_error=None))
    assert max(most) <= joblib.cpu_count()


class Decoded:
    """Counts the decoded pixels that are in memory, in millions."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.n_pixels = self.maximum = 0
        self._lock = threading.Lock()

    def decode(self, position):
        with self._lock:
            self.n_pixels += self.sizes[position]
            self.maximum = max(self.maximum, self.n_pixels)
        time.sleep(0.001)  # lets other threads start
        return position

    def free(self, positions):
        with self._lock:
            self.n_pixels -= sum(self.sizes[position] for position in positions)
        return positions

    def encode(self, encoding, on_error=None, decode=None):
        backend = Backend(encoding)
        backend.modality = "image"
        return encode(
            backend,
            [range(len(self.sizes))],
            decode or self.decode,
            batch_size=None,
            on_error=on_error,
            n_pixels=lambda position: self.sizes[position] * 1_000_000,
        )


@pytest.fixture
def eight_threads(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)


# In millions of pixels; the budget is 64.
LARGE = [12, 30, 1, 0, 50, 14, 64, 100, 3, 3, 70, 12, 12, 12, 12, 12, 12, 90] * 3


def test_threads_decode_few_pixels_at_once(eight_threads):
    decoded = Decoded([12] * 60)
    encoding = Encoding(lambda cells: np.array(cells)[:, None], decoded.free)
    values = np.concatenate([values for _, _, values in decoded.encode(encoding)])
    assert values[:, 0].tolist() == list(range(60))
    assert 24 <= decoded.maximum <= 64
    assert decoded.n_pixels == 0


def test_an_image_above_the_budget_is_decoded_on_its_own(eight_threads):
    decoded = Decoded(LARGE)
    encoding = Encoding(lambda cells: np.array(cells)[:, None], decoded.free)
    values = np.concatenate([values for _, _, values in decoded.encode(encoding)])
    assert values[:, 0].tolist() == list(range(len(LARGE)))
    assert decoded.maximum == 100


def test_images_of_a_model_without_prepare_are_few_in_a_batch_and_ahead_of_it(
    eight_threads,
):
    decoded = Decoded([12] * 60)

    def forward(cells):
        time.sleep(0.005)
        return np.array(decoded.free(cells))[:, None]

    batches = [batch for batch, _, _ in decoded.encode(Encoding(forward))]
    assert batches == [list(range(i, i + 5)) for i in range(0, 60, 5)]
    # The batch, the budget of the threads, and the first cell of the next batch.
    assert decoded.maximum <= 64 + 64 + 12


def test_images_above_the_budget_without_prepare(eight_threads):
    decoded = Decoded(LARGE)
    forward = Encoding(lambda cells: np.array(decoded.free(cells))[:, None])
    results = list(decoded.encode(forward))
    positions = [position for _, done, _ in results for position in done]
    assert positions == list(range(len(LARGE)))
    for batch, _, _ in results:
        assert len(batch) == 1 or sum(LARGE[position] for position in batch) <= 64
    assert decoded.n_pixels == 0


@pytest.mark.parametrize("has_prepare", [False, True])
def test_cells_that_cannot_be_decoded_free_their_share(eight_threads, has_prepare):
    decoded = Decoded([40] * 40)

    def decode(position):
        if position % 2:
            raise ValueError("broken")
        return position

    errors = []
    options = {"prepare": lambda cells: cells} if has_prepare else {}
    results = decoded.encode(
        Encoding(lambda cells: np.array(cells)[:, None], **options),
        on_error=lambda error, position: errors.append(position),
        decode=decode,
    )
    done = [position for _, done, _ in results for position in done]
    assert done == list(range(0, 40, 2))
    assert errors == list(range(1, 40, 2))


def test_threads_that_wait_for_the_budget_end_with_the_consumer(eight_threads):
    before = threading.active_count()
    decoded = Decoded([40] * 40)
    results = decoded.encode(Encoding(lambda cells: np.array(cells)[:, None]))
    assert next(results)[0] == [0]
    results.close()
    assert threading.active_count() == before


def test_an_unexpected_error_of_a_thread_is_raised_and_ends_the_others(eight_threads):
    def fail(position):
        raise RuntimeError("a bug")

    before = threading.active_count()
    decoded = Decoded([40] * 40)
    forward = Encoding(lambda cells: np.array(cells)[:, None])
    with pytest.raises(RuntimeError, match="a bug"):
        list(decoded.encode(forward, decode=fail))
    assert threading.active_count() == before


def test_a_forked_child_computes_with_torch():
    """Threads that the parent's torch has computed with are no more in the child."""
    code = """
import os, signal, torch
import sklembed.encoders.inference
torch.set_num_threads(2)
torch.randn(400, 400) @ torch.randn(400, 400)
child = os.fork()
if child == 0:
    signal.alarm(20)
    torch.randn(400, 400) @ torch.randn(400, 400)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert torch.get_num_threads() == 2
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
