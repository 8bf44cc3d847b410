"""Job: the loop that keeps workers busy with the parts of a dataset."""

import itertools
import uuid
import warnings
from collections import deque
from typing import NamedTuple

import numpy as np
import ray

from sklembed._display import progress_bar
from sklembed.scale.shards import Index, Shards, to_keys
from sklembed.scale.workers import MAX_RETRIES, TASKS_PER_WORKER, Part

# Rows of an output file, and cells of a task that encodes, whose vectors are committed
# together. With fewer cells, exporting a network for a faster runtime would not pay.
_PART_ROWS = {"text": 16384, "image": 1024}
_TASK_CELLS = {"text": 2048, "image": 256}
_ERRORS_ARRIVE = 5  # seconds in which all tasks of a lost worker have their error
_COUNTS = ("rows", "distinct", "encoded", "from_shards", "missing", "failed")


class _Known(NamedTuple):
    """The vectors of a space that are in the shards, or will be there."""

    files: list[str]  # names
    index: Index  # number of the file of each digest
    seen: Index  # digests in the dataset
    failed: Index  # digests of cells that tasks could not read


class Job:
    """The loop that hashes, encodes and writes the parts of a dataset.

    Tasks of several parts run at the same time. A part is written after the tasks that
    encode its cells, some of which may belong to earlier parts.
    """

    def __init__(self, pool, vectors, drafts, is_verbose):
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.files = []  # names of the parts
        self._first_error = None
        self._pool, self._drafts, self._is_verbose = pool, drafts, is_verbose
        self._known = {}  # by fingerprint, since columns may share an encoder
        for _, space in pool.spaces.values():
            if space.fingerprint not in self._known:
                shards = Shards(vectors, space)
                shards.folder.create()
                self._known[space.fingerprint] = _Known(
                    *shards.index(), seen=Index(), failed=Index()
                )
        self._running = {}  # descriptions of tasks by reference, in order of submission
        self._n_null = 0  # cells without a vector
        self._encoding = {}  # references of tasks by fingerprint and number of the file
        self._writing = deque()

    def run(self, source):
        """Encode a source, and write its parts to the folder of drafts.

        Raises
        ------
        RuntimeError
            If the worker of a task is lost several times.
        """
        try:
            self._run(source)
        except ray.exceptions.RayError as error:
            lost = self._describe_lost_tasks()
            if not lost:
                raise
            raise RuntimeError(
                f"A worker was lost {MAX_RETRIES + 1} times while it {lost}. A cell may "
                "crash the process, or exceed its memory. Remove or shorten the cell, "
                "or pass a smaller n_workers."
            ) from error
        # Cells that count as missing are null, and so are cells that cannot be read.
        self.counts["failed"] = self._n_null - self.counts["missing"]

    def _run(self, source):
        hashed, encoded = deque(), deque()
        n_ahead = self._pool.n_workers
        with progress_bar(
            verbose=self._is_verbose,
            desc="encoding",
            total=source.n_rows,
            unit=" rows",
        ) as self._progress:
            for block, part in self._parts(source):
                results = self._submit(
                    f"hashed {part.rows}", "hash", block, part, num_returns=2
                )
                hashed.append((block, part, *results))
                if len(hashed) > n_ahead:
                    encoded.append(self._encode(*hashed.popleft()))
                if len(encoded) > n_ahead:
                    self._write(*encoded.popleft())
                if len(self._writing) > n_ahead:
                    self._finish()
            while hashed:
                encoded.append(self._encode(*hashed.popleft()))
            while encoded:
                self._write(*encoded.popleft())
            while self._writing:
                self._finish()
        if not self.counts["rows"]:
            raise ValueError("The source has no rows: there is nothing to encode.")

    def warn_of_errors(self):
        """Warn of cells that count as missing since they cannot be read."""
        if self._first_error is not None:
            warnings.warn(
                f"{self.counts['failed']} cells could not be read and count as missing, "
                f"first: {self._first_error}.",
                UserWarning,
                stacklevel=3,
            )

    def _parts(self, source):
        """Yield the references of blocks in their order, and the parts of each block."""
        numbers, first_row = itertools.count(), 0
        max_rows = min(
            _PART_ROWS[modality] for modality, _ in self._pool.spaces.values()
        )
        for block, start, stop in source.blocks(self._pool):
            for first in range(start, stop, max_rows):
                n_rows = min(max_rows, stop - first)
                file = f"part-{next(numbers):08d}.parquet"
                yield block, Part(file, first, n_rows, first_row)
                first_row += n_rows

    def _encode(self, block, part, columns, codes):
        """Start the tasks that encode the new cells of a part."""
        joins, tasks = {}, {}
        for name, (digests, rows, n_missing, errors) in self._get(columns).items():
            modality, space = self._pool.spaces[name]
            files, index, seen, failed = self._known[space.fingerprint]
            keys = to_keys(digests)
            numbers = index.find(keys)
            is_first = seen.find(keys) < 0
            seen.add(keys[is_first], np.zeros(is_first.sum()))
            new = np.flatnonzero(numbers < 0)
            for start in range(0, len(new), _TASK_CELLS[modality]):
                cells = new[start : start + _TASK_CELLS[modality]]
                numbers[cells] = len(files)
                file = f"{uuid.uuid4().hex}.parquet"
                first, last = part.first_row + rows[cells[[0, -1]]]
                self._encoding[space.fingerprint, len(files)] = self._submit(
                    f"encoded rows {first} to {last} of column {name!r}",
                    "encode",
                    block,
                    part,
                    name,
                    rows[cells],
                    keys[cells].tobytes(),
                    file,
                )
                files.append(file)
            index.add(keys[new], numbers[new])
            n_first = int(is_first.sum())
            self.counts["distinct"] += n_first
            self.counts["from_shards"] += n_first - len(new)
            self.counts["missing"] += n_missing
            self._remember(errors)
            used, numbers = np.unique(numbers, return_inverse=True)
            numbers[failed.find(keys) >= 0] = -1
            joins[name] = digests, [files[number] for number in used], numbers
            for number in used:
                key = space.fingerprint, number
                if key in self._encoding:
                    tasks[key] = self._encoding[key]
        return block, part, codes, joins, tasks

    def _write(self, block, part, codes, joins, tasks):
        """Start the task that writes a part, after the tasks that encode its cells."""
        written = self._submit(
            f"wrote {part.rows}",
            "write",
            block,
            part,
            codes,
            joins,
            self._drafts,
            *tasks.values(),
        )
        self._writing.append((written, part, tasks))

    def _finish(self):
        """Wait for the oldest part that is being written."""
        written, part, tasks = self._writing.popleft()
        self._n_null += self._get(written)
        self.files.append(part.file)
        self.counts["rows"] += part.n_rows
        for key in tasks:
            task = self._encoding.pop(key, None)
            if task is not None:
                encoded = self._get(task)
                self.counts["encoded"] += encoded.n_encoded
                failed = to_keys(encoded.failed)
                fingerprint, _ = key
                self._known[fingerprint].failed.add(failed, np.zeros(len(failed)))
                self._remember(encoded.errors)
        self._progress.set_postfix(encoded=self.counts["encoded"], refresh=False)
        self._progress.update(part.n_rows)

    def _submit(self, description, method, *arguments, num_returns=1):
        """Start a task, and keep its description."""
        results = self._pool.submit(method, *arguments, num_returns=num_returns)
        reference = results if num_returns == 1 else results[0]
        self._running[reference] = description
        return results

    def _get(self, reference):
        """Return the result of a task."""
        result = ray.get(reference)
        del self._running[reference]
        return result

    def _describe_lost_tasks(self):
        """Describe the tasks of a lost worker; empty if no worker was lost.

        A worker has a few tasks at a time. One of the first is the cause, but not always
        the very first, whose result may be lost with the worker. Errors arrive in any
        order.
        """
        if not self._find_lost_tasks():
            return ""
        references = list(self._running)
        ray.wait(references, num_returns=len(references), timeout=_ERRORS_ARRIVE)
        return " or ".join(self._find_lost_tasks()[:TASKS_PER_WORKER])

    def _find_lost_tasks(self):
        """Return the descriptions of the tasks with the error of a lost worker."""
        lost = []
        for reference, description in self._running.items():
            try:
                ray.get(reference, timeout=0)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                lost.append(description)
            except ray.exceptions.RayError:  # of the task itself, or not finished
                continue
        return lost

    def _remember(self, errors):
        """Remember the first message about cells that cannot be read."""
        if errors and self._first_error is None:
            self._first_error = errors[0]
