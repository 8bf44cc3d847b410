"""Run a model over cells: loaded once a process, fed by threads, in batches that memory holds."""

import contextlib
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import joblib

_CELLS_A_JOB = {"text": 128, "image": 8}  # what a thread prepares at once
_IMAGES_AHEAD = 32  # that threads prepare while the model is busy, by and large
_LOADED_LIMIT = 4

# What a backend loaded, and the lock of who runs it: one for each model, since a model may call
# another, also in other threads, and wait for it.
_LOADED: OrderedDict[str, tuple[Any, threading.RLock]] = OrderedDict()
_LOADING = threading.RLock()  # guards _LOADED; loading itself is not safe in threads


def _one(prepared: Any) -> int:
    return 1


@dataclass(frozen=True)
class Encoding:
    """How a loaded model encodes cells: a step for threads beside it, and the model itself.

    A batch costs its number of cells times the cost of the costliest, and at most `budget` where
    the user names no batch size.
    """

    forward: Callable[
        [list], Any
    ]  # prepared cells -> (n, d) array, or n arrays (T_i, d)
    prepare: Callable[[list], list] = (
        list  # decoded cells -> prepared cells, one for each
    )
    cost: Callable[[Any], int] = _one  # of a prepared cell
    budget: int = 32


@dataclass
class _Cell:
    position: int
    decoded: Any = None
    prepared: Any = None
    cost: int = 0
    error: Exception | None = None


@dataclass
class _Limit:
    """What a batch may cost; lowered when memory runs out."""

    cost: int


def _encoding_of(backend) -> tuple[Encoding, threading.RLock]:
    """Load a backend's weights, unless this process has them; the last few stay loaded."""
    with _LOADING:
        key = backend.weights()
        if key not in _LOADED:
            _LOADED[key] = backend.load(), threading.RLock()
            if len(_LOADED) > _LOADED_LIMIT:
                _LOADED.popitem(last=False)
        _LOADED.move_to_end(key)
        loaded, lock = _LOADED[key]
        return backend.encoding(loaded), lock


def encode(
    backend,
    chunks: Iterable[list[int]],
    decode: Callable[[int], Any],
    *,
    batch_size: int | None,
    on_error: Callable[[Exception, int], None],
) -> Iterator[tuple[list[int], list[int], Any]]:
    """Encode the cells at given positions, in batches, preparing those to come meanwhile.

    The model is loaded when there is a first position. When memory runs out the batch is halved,
    and so are those that follow.

    Parameters
    ----------
    backend : Backend
        What offers the model.
    chunks : iterable of list of int
        The positions; pulled a little ahead of the model.
    decode : callable
        Takes a position and returns the decoded cell; runs in threads.
    batch_size : int or None
        Cells to a batch; None for as many as the encoding's budget allows.
    on_error : callable
        Takes what decoding raised and the position. If it returns, the cell is left out; if it
        raises, all cells before have been yielded.

    Yields
    ------
    batch : list of int
        Positions dealt with.
    done : list of int
        Those of them that could be encoded.
    values : ndarray of shape (n_done, d), or list of n_done ndarrays of shape (T_i, d)
        Their vectors.
    """
    chunks = iter(chunks)
    first = next(chunks, None)
    if first is None:
        return
    encoding, lock = _encoding_of(backend)
    if batch_size is not None:
        encoding = replace(encoding, cost=_one, budget=batch_size)
    limit = _Limit(encoding.budget)
    cells = _prepare_ahead(encoding, chain([first], chunks), decode, backend.modality)
    with contextlib.closing(
        cells
    ):  # else an error's frames would keep the threads alive
        for batch in _batches(cells, limit):
            if batch[0].error is not None:
                on_error(batch[0].error, batch[0].position)
                yield [batch[0].position], [], []
            else:
                yield from _forward(encoding, lock, batch, limit)


def _prepare_ahead(encoding, chunks, decode, modality) -> Iterator[_Cell]:
    """Decode and prepare in threads, a few jobs ahead of whoever consumes the cells."""

    def prepare(positions):
        if modality == "image":  # one by one, so that few wait at their full size
            groups = [prepare_group([position]) for position in positions]
        else:
            groups = [prepare_group(positions)]
        return sorted(chain.from_iterable(groups), key=lambda cell: -cell.cost)

    def prepare_group(positions):
        cells = []
        for position in positions:
            try:
                cells.append(_Cell(position, decode(position)))
            except (ValueError, OSError) as error:
                cells.append(_Cell(position, error=without_frames(error)))
        decoded = [cell for cell in cells if cell.error is None]
        try:
            prepare_all(decoded)
        except (ValueError, OSError):  # whose fault is it?
            for cell in decoded:
                try:
                    prepare_all([cell])
                except (ValueError, OSError) as error:
                    cell.decoded, cell.error = None, without_frames(error)
        return cells

    def prepare_all(cells):
        prepared = encoding.prepare([cell.decoded for cell in cells]) if cells else []
        for cell, content in zip(cells, prepared, strict=True):
            cell.decoded, cell.prepared, cell.cost = (
                None,
                content,
                encoding.cost(content),
            )

    # Fast tokenizers have threads of their own, and are not to be shared by ours.
    workers = 1 if modality == "text" else joblib.cpu_count()
    size = _CELLS_A_JOB[modality]
    if (
        modality == "image"
    ):  # a backend that prepares nothing waits with images at full size
        size = max(1, min(size, _IMAGES_AHEAD // workers))
    jobs = (chunk[i : i + size] for chunk in chunks for i in range(0, len(chunk), size))
    pool = ThreadPoolExecutor(workers)
    try:
        ahead = deque()
        for job in jobs:
            ahead.append(pool.submit(prepare, job))
            if len(ahead) > workers + 1:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def without_frames(error: BaseException) -> BaseException:
    """Cut an error off the frames it passed through, which keep a decoder's pixels alive."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
    return error


def _batches(cells: Iterable[_Cell], limit: _Limit) -> Iterator[list[_Cell]]:
    """Gather as many cells as the limit allows; what could not be decoded comes alone."""
    batch: list[_Cell] = []
    costliest = 0
    for cell in cells:
        costliest = max(costliest, cell.cost)
        if batch and (
            cell.error is not None or (len(batch) + 1) * costliest > limit.cost
        ):
            yield batch
            batch, costliest = [], cell.cost
        if cell.error is None:
            batch.append(cell)
        else:
            yield [cell]
    if batch:
        yield batch


def _forward(encoding, lock, batch, limit):
    """Run the model on a batch, or on its halves where memory does not hold the whole."""
    positions = [cell.position for cell in batch]
    try:
        with lock:
            values = encoding.forward([cell.prepared for cell in batch])
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise MemoryError(
                "the model ran out of memory on a single cell. Lower max_length, take a smaller "
                f"model or another device ({error})"
            ) from error
    else:
        yield positions, positions, values
        return
    _free_memory()  # outside of the except block, which keeps the failed batch's tensors alive
    half = len(batch) // 2
    limit.cost = half * max(cell.cost for cell in batch)
    yield from _forward(encoding, lock, batch[:half], limit)
    yield from _forward(encoding, lock, batch[half:], limit)


def _is_out_of_memory(error: Exception) -> bool:
    """Tell a lack of memory, of the host or an accelerator, from any other trouble."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError)
            and any(
                words in str(error)
                for words in ("can't allocate memory", "out of memory")
            )
        )
    )


def _free_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _start_afresh_after_fork() -> None:
    """Forget models in a forked child, whose locks may be held by a thread that is no more."""
    global _LOADING
    _LOADING = threading.RLock()
    _LOADED.clear()
    # Else the tokenizers library says at length that it does so itself.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The threads with which torch has computed are no more, and it would wait for them for ever.
    torch = sys.modules.get("torch")
    if hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_after_fork)
