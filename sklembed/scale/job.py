"""Job: the loop that keeps workers busy with the parts of a dataset."""

import itertools
import uuid
import warnings
from collections import deque
from typing import NamedTuple

import numpy as np
import ray
from tqdm import tqdm

from sklembed.scale.shards import Index, Shards, to_keys
from sklembed.scale.workers import Part

# Rows of an output file, and cells of a task that encodes, whose vectors are committed
# together. With fewer cells, exporting a network for a faster runtime would not pay.
_PART_ROWS = {"text": 16384, "image": 1024}
_TASK_CELLS = {"text": 2048, "image": 256}
_COUNTS = ("rows", "distinct", "encoded", "from_shards", "missing", "failed")


class _Known(NamedTuple):
    """The vectors of a space that are in the shards, or will be there."""

    files: list[str]  # names
    index: Index  # number of the file of each digest
    seen: Index  # digests in the dataset


class Job:
    """The loop that hashes, encodes and writes the parts of a dataset.

    Tasks of several parts run at the same time. A part is written after the tasks that
    encode its cells, some of which may belong to earlier parts.
    """

    def __init__(self, pool, vectors, output, is_verbose):
        self.counts = dict.fromkeys(_COUNTS, 0)
        self._first_error = None
        self._pool, self._output, self._is_verbose = pool, output, is_verbose
        self._draft_name = f"_draft-{uuid.uuid4().hex}"
        self._draft = output.folder(self._draft_name)
        self._draft.create()
        self._known = {}  # by fingerprint, since columns may share an encoder
        for _, space in pool.spaces.values():
            if space.fingerprint not in self._known:
                shards = Shards(vectors, space)
                shards.folder.create()
                self._known[space.fingerprint] = _Known(*shards.index(), Index())
        self._encoding = {}  # references of tasks by fingerprint and number of the file
        self._writing = deque()

    def run(self, source):
        """Encode a source, and write its parts to the folder of drafts."""
        hashed, encoded = deque(), deque()
        n_ahead = self._pool.n_workers
        with tqdm(
            desc="encoding",
            total=source.n_rows,
            unit=" rows",
            disable=not self._is_verbose,
        ) as self._progress:
            for block, part in self._parts(source):
                results = self._pool.submit("hash", block, part, num_returns=2)
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

    def commit(self):
        """Replace the files of an earlier call by the files of this call."""
        for name in self._output.names():
            if name.startswith("part-"):
                self._output.delete(name)
        for name in self._draft.names():
            self._draft.system.move(self._draft.file(name), self._output.file(name))
        self._output.delete_folder(self._draft_name)

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
        for name, (digests, rows, n_missing, errors) in ray.get(columns).items():
            modality, space = self._pool.spaces[name]
            files, index, seen = self._known[space.fingerprint]
            keys = to_keys(digests)
            numbers = index.find(keys)
            is_first = seen.find(keys) < 0
            seen.add(keys[is_first], np.zeros(is_first.sum()))
            new = np.flatnonzero(numbers < 0)
            for start in range(0, len(new), _TASK_CELLS[modality]):
                cells = new[start : start + _TASK_CELLS[modality]]
                numbers[cells] = len(files)
                file = f"{uuid.uuid4().hex}.parquet"
                self._encoding[space.fingerprint, len(files)] = self._pool.submit(
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
            self._count_errors(errors)
            used, numbers = np.unique(numbers, return_inverse=True)
            joins[name] = digests, [files[number] for number in used], numbers
            for number in used:
                key = space.fingerprint, number
                if key in self._encoding:
                    tasks[key] = self._encoding[key]
        return block, part, codes, joins, tasks

    def _write(self, block, part, codes, joins, tasks):
        """Start the task that writes a part, after the tasks that encode its cells."""
        written = self._pool.submit(
            "write", block, part, codes, joins, self._draft, *tasks.values()
        )
        self._writing.append((written, part, tasks))

    def _finish(self):
        """Wait for the oldest part that is being written."""
        written, part, tasks = self._writing.popleft()
        ray.get(written)
        self.counts["rows"] += part.n_rows
        for key in tasks:
            task = self._encoding.pop(key, None)
            if task is not None:
                n_encoded, errors = ray.get(task)
                self.counts["encoded"] += n_encoded
                self._count_errors(errors)
        self._progress.set_postfix(encoded=self.counts["encoded"], refresh=False)
        self._progress.update(part.n_rows)

    def _count_errors(self, errors):
        """Count the cells that cannot be read, and remember the first message."""
        self.counts["failed"] += len(errors)
        if errors and self._first_error is None:
            self._first_error = errors[0]
