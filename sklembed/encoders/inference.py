"""Run a model over cells, in batches that fit the memory and that threads prepare."""

import contextlib
import os
import re
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import joblib

_JOB_SIZES = {"text": 128, "image": 1}  # cells that a thread prepares at once
_IMAGES_AHEAD = 32  # images prepared while the model is busy, or one for each thread
# Pixels of decoded images that wait to be prepared; also of a batch without `prepare`.
_MAX_PIXELS = 64_000_000
_LOADED_LIMIT = 4

# Loaded models by key, with a lock for running them. Each model has its own lock, since
# a model may call another one, also in other threads, and wait for it.
_LOADED: OrderedDict[str, tuple[Any, threading.RLock]] = OrderedDict()
_LOADING = threading.RLock()  # guards _LOADED and loading, which is not thread-safe


def _unit_cost(prepared: Any) -> int:
    return 1


def _no_pixels(position: int) -> int:
    return 0


@dataclass(frozen=True)
class Network:
    """The torch module within the steps of a model, which a runtime may run instead."""

    label: str  # name of the model, for people
    key: str  # of the weights and of the outputs
    use: str  # how the outputs become vectors, and other settings that a check depends on
    # Loads the module, which maps tensors to a tuple of tensors.
    module: Callable[[], Any]
    # Prepared cells -> the tensors that the module takes, by name and in its order.
    inputs: Callable[[list], dict[str, Any]]
    # Function from these to a list of outputs -> `Encoding.forward`.
    forward: Callable[[Callable], Callable[[list], Any]]
    # Returns prepared cells of different lengths, one of them longer than most texts; or
    # an empty list.
    trial: Callable[[], list]
    dynamic_axes: tuple[int, ...]  # of the inputs, whose sizes differ between batches
    # Widths of the vectors that stand side by side; a check compares each of them.
    widths: tuple[int, ...] = ()
    # Largest cost of a batch in a runtime, if it differs from that in torch.
    runtime_budget: int | None = None


@dataclass(frozen=True)
class Encoding:
    """Steps of a loaded model: `prepare` runs in threads, `forward` is the model.

    The cost of a batch is its number of cells times the maximum cost of a cell. Without
    a batch size of the user it is at most `budget`. If there is a `network`, it
    replaces `forward`.
    """

    # Prepared cells -> array (n, d), or n arrays (T_i, d).
    forward: Callable[[list], Any] | None
    # Decoded cells -> as many prepared cells.
    prepare: Callable[[list], list] = list
    # Prepared cell -> cost.
    cost: Callable[[Any], int] = _unit_cost
    budget: int = 32
    network: Network | None = None


@dataclass(frozen=True)
class Trainable:
    """A separate copy of a network, and steps through which gradients flow."""

    network: Any  # torch.nn.Module in evaluation mode, in float32
    # Network and prepared cells -> tensor (n_cells, n_features) on the device.
    vectors: Callable[[Any, list], Any]
    # Decoded cells -> as many prepared cells.
    prepare: Callable[[list], list]
    # Prepared cell -> cost, and the largest cost of a batch, as in `Encoding`.
    cost: Callable[[Any], int] = _unit_cost
    budget: int = 32


def in_torch(encoding: Encoding) -> Encoding:
    """Return the encoding with a `forward` that runs its network by torch."""
    network = encoding.network
    if network is None:
        return encoding
    module = network.module()
    forward = network.forward(lambda inputs: list(module(*inputs.values())))
    return replace(encoding, forward=forward)


@dataclass
class _Cell:
    position: int
    decoded: Any = None
    prepared: Any = None
    cost: float = 0
    error: Exception | None = None


@dataclass
class _Limit:
    """Maximum cost of a batch, lowered when memory runs out."""

    cost: float


class _PixelBudget:
    """Number of pixels that the threads of one call may have in memory.

    Jobs are admitted in their order, so that the pixels of later cells never keep the
    next cell of the model waiting. A job above the limit is admitted on its own.
    """

    def __init__(self, limit):
        self._limit = limit
        self._n_pixels = 0
        self._turn = 0  # number of admitted jobs
        self._is_closed = False
        self._changed = threading.Condition()

    def acquire(self, turn, n_pixels) -> bool:
        """Wait until a job is admitted; return False if the budget was closed."""

        def is_admitted():
            fits = self._n_pixels + n_pixels <= self._limit or self._n_pixels == 0
            return self._is_closed or (turn == self._turn and fits)

        with self._changed:
            self._changed.wait_for(is_admitted)
            self._turn += 1
            self._n_pixels += n_pixels
            self._changed.notify_all()
            return not self._is_closed

    def release(self, n_pixels):
        """Return the pixels of a job."""
        with self._changed:
            self._n_pixels -= n_pixels
            self._changed.notify_all()

    def close(self):
        """Admit no further job, and wake up the threads that wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def loading() -> threading.RLock:
    """Return the lock under which a model is loaded."""
    return _LOADING


def load_encoding(backend, choose_runtime) -> tuple[Encoding, threading.RLock]:
    """Load a backend's weights if this process has not; keep the last few models."""
    with _LOADING:
        key = backend.weights()
        if key not in _LOADED:
            _LOADED[key] = backend.load(), threading.RLock()
            if len(_LOADED) > _LOADED_LIMIT:
                _LOADED.popitem(last=False)
        _LOADED.move_to_end(key)
        loaded, lock = _LOADED[key]
        encoding = backend.encoding(loaded)
    # Exporting and checking a network runs it, and takes long.
    with lock:
        return choose_runtime(encoding), lock


def encode(
    backend,
    chunks: Iterable[list[int]],
    decode: Callable[[int], Any],
    *,
    choose_runtime: Callable[[Encoding], Encoding] = in_torch,
    batch_size: int | None,
    on_error: Callable[[Exception, int], None],
    n_pixels: Callable[[int], int] = _no_pixels,
) -> Iterator[tuple[list[int], list[int], Any]]:
    """Encode cells in batches, while threads prepare the following ones.

    The model is loaded at the first position. If memory runs out, this batch and all
    following ones are halved.

    Parameters
    ----------
    backend : Backend
        Backend of the model.
    chunks : iterable of list of int
        Positions of the cells; advanced slightly ahead of the model.
    decode : callable
        Takes a position and returns the decoded cell; runs in threads.
    choose_runtime : callable
        Takes an encoding, and returns it with a `forward` that runs its network.
    batch_size : int or None
        Number of cells in a batch. If None, limited by the budget of the encoding.
        Batches of large images are smaller if the encoding does not prepare them.
    on_error : callable
        Takes an error of decoding and the position. If it returns, the cell is skipped;
        if it raises, all cells before it have been yielded.
    n_pixels : callable
        Takes a position and returns the number of pixels of the decoded cell, before it
        is decoded; runs in threads. Limits the images that are in memory at full size.

    Yields
    ------
    batch : list of int
        Positions of the batch.
    done : list of int
        Positions of the encoded cells; empty for a cell with an error.
    values : ndarray of shape (n_done, d), or list of n_done ndarrays of shape (T_i, d)
        Vectors of the encoded cells.
    """
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        return
    encoding, lock = load_encoding(backend, choose_runtime)
    if batch_size is not None:
        encoding = replace(encoding, cost=_unit_cost, budget=batch_size)
    limit = _Limit(encoding.budget)
    chunks = chain([first], chunks)
    cells = _prepare_ahead(encoding, chunks, decode, n_pixels, backend.modality)
    # Closed explicitly: the frames of an error would keep the threads alive.
    with contextlib.closing(cells):
        for batch in _batches(cells, limit):
            if batch[0].error is not None:
                on_error(batch[0].error, batch[0].position)
                yield [batch[0].position], [], []
            else:
                yield from _forward(encoding, lock, batch, limit)


def _prepare_ahead(encoding, chunks, decode, n_pixels, modality) -> Iterator[_Cell]:
    """Decode and prepare cells in threads, a few jobs ahead of the consumer."""
    n_threads, n_ahead = 1, 2  # fast tokenizers have their own threads
    if modality == "image":
        n_threads = joblib.cpu_count()
        n_ahead = max(_IMAGES_AHEAD, n_threads + 1)
    budget = _PixelBudget(_MAX_PIXELS)
    # Without `prepare`, images keep their size until the model has run.
    keeps_pixels = encoding.prepare is list

    def prepare(turn, positions):
        n_held = sum(map(n_pixels, positions))
        if not budget.acquire(turn, n_held):
            return [], 0
        cells = _prepare_group(encoding, positions, decode)
        if keeps_pixels:
            for cell in cells:
                pixel_cost = encoding.budget * n_held / _MAX_PIXELS
                cell.cost = max(cell.cost, pixel_cost)
        else:
            budget.release(n_held)
            n_held = 0
        return sorted(cells, key=lambda cell: -cell.cost), n_held

    def take(future):
        cells, n_held = future.result()
        yield from cells
        budget.release(n_held)

    jobs = chain.from_iterable(_slices(chunk, _JOB_SIZES[modality]) for chunk in chunks)
    first_jobs = list(islice(jobs, 2))
    if len(first_jobs) == 1:  # starting a thread would take longer
        yield from prepare(0, first_jobs[0])[0]
        return
    pool = ThreadPoolExecutor(n_threads)
    try:
        futures = deque()
        for turn, job in enumerate(chain(first_jobs, jobs)):
            futures.append(pool.submit(prepare, turn, job))
            if len(futures) > n_ahead:
                yield from take(futures.popleft())
        while futures:
            yield from take(futures.popleft())
    finally:
        budget.close()
        pool.shutdown(cancel_futures=True)


def _slices(positions, size):
    """Yield slices of at most `size` positions."""
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def _prepare_group(encoding, positions, decode) -> list[_Cell]:
    """Decode and prepare cells together, or one by one if one of them fails."""
    cells, decoded = [], []
    for position in positions:
        cell = _Cell(position)
        cells.append(cell)
        try:
            cell.decoded = decode(position)
            decoded.append(cell)
        except (ValueError, OSError) as error:
            cell.error = without_frames(error)
    try:
        _prepare_cells(encoding, decoded)
    except (ValueError, OSError):
        for cell in decoded:
            try:
                _prepare_cells(encoding, [cell])
            except (ValueError, OSError) as error:
                cell.decoded, cell.error = None, without_frames(error)
    return cells


def _prepare_cells(encoding, cells):
    """Set the prepared contents and costs of decoded cells."""
    if not cells:
        return
    prepared = encoding.prepare([cell.decoded for cell in cells])
    for cell, content in zip(cells, prepared, strict=True):
        cell.decoded, cell.prepared = None, content
        cell.cost = encoding.cost(content)


def without_frames(error: BaseException) -> BaseException:
    """Remove an error's tracebacks, whose frames keep decoded pixels alive."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error


def _batches(cells: Iterable[_Cell], limit: _Limit) -> Iterator[list[_Cell]]:
    """Yield batches within the cost limit; a cell with an error has its own batch."""
    batch: list[_Cell] = []
    max_cost = 0
    for cell in cells:
        max_cost = max(max_cost, cell.cost)
        is_full = (len(batch) + 1) * max_cost > limit.cost
        if batch and (is_full or cell.error is not None):
            yield batch
            batch, max_cost = [], cell.cost
        if cell.error is None:
            batch.append(cell)
        else:
            yield [cell]
    if batch:
        yield batch


def _forward(encoding, lock, batch, limit):
    """Run the model on a batch, or on its halves if memory runs out."""
    positions = [cell.position for cell in batch]
    try:
        with lock:
            values = encoding.forward([cell.prepared for cell in batch])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise MemoryError(
                "the model ran out of memory on a single cell. Lower max_length, or use "
                f"a smaller model or another device ({error})"
            ) from error
    else:
        yield positions, positions, values
        return
    # After the except block, which keeps the tensors of the failed batch alive.
    _free_memory()
    half = len(batch) // 2
    limit.cost = half * max(batch, key=lambda cell: cell.cost).cost
    yield from _forward(encoding, lock, batch[:half], limit)
    yield from _forward(encoding, lock, batch[half:], limit)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the host or an accelerator has run out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch raises a RuntimeError on the CPU, and on some accelerators.
    message = "can't allocate memory|out of memory|bad.?alloc|failed to allocate"
    is_lack = re.search(message, str(error), re.IGNORECASE) is not None
    return isinstance(error, RuntimeError) and is_lack


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_after_fork() -> None:
    """Forget the models in a forked child: their locks may be held for ever."""
    global _LOADING
    _LOADING = threading.RLock()
    _LOADED.clear()
    # Prevents a long warning of the tokenizers library, which turns it off itself.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch would wait for ever for its threads, which the child does not have.
    torch = sys.modules.get("torch")
    if hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
