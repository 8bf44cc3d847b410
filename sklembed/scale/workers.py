"""Workers: processes with an encoder, and the pool that keeps them busy."""

import copy
import functools
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
from ray.data.block import BlockAccessor
from threadpoolctl import threadpool_limits

from sklembed.encoders.column import Column
from sklembed.scale.shards import Shards, embedding_name, to_keys

# A worker starts with the next task while the driver learns of the end of the last.
_TASKS_PER_WORKER = 2
# Losses of a worker that a task survives; a cell that crashes a worker would do so always.
_MAX_RETRIES = 20


class Worker:
    """A process that hashes, encodes and writes; Ray makes it an actor.

    Parameters
    ----------
    encoders : dict of str to FrozenEncoder
        The encoder of each column.

    vectors : Folder
        The folder of the shards.

    n_threads : int
        Number of threads of the models.
    """

    def __init__(self, encoders, vectors, n_threads):
        # Read by torch, the tokenizers and joblib when they start.
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "LOKY_MAX_CPU_COUNT"):
            os.environ[name] = str(n_threads)
        threadpool_limits(n_threads)
        self._encoders, self._vectors = encoders, vectors

    @functools.cached_property
    def _columns(self):
        """The encoder, the backend and the shards of each column."""
        columns = {}
        for name, encoder in self._encoders.items():
            encoder = copy.copy(encoder).set_params(verbose=0)
            backend, space = encoder._backend_and_space()
            columns[name] = encoder, backend, Shards(self._vectors, space)
        return columns

    def spaces(self):
        """Return the modality and the space of each column."""
        spaces = {}
        for name, (_, backend, shards) in self._columns.items():
            spaces[name] = backend.modality, shards.space
        return spaces

    def read(self, fragment, schema):
        """Return a row group of a Parquet file as a table."""
        return fragment.to_table(schema=schema, use_threads=False)

    def hash(self, block, part):
        """Hash the cells of a part.

        Returns
        -------
        columns : dict of str to (digests, rows, n_missing, errors)
            For each column the joined digests of its distinct cells, the first row of
            each in the part, and the number and errors of missing cells.

        codes : dict of str to ndarray of shape (n_rows,)
            Number of the distinct cell in each row; -1 for missing cells.
        """
        columns, codes = {}, {}
        table = part.table(block)
        for name, (encoder, backend, _) in self._columns.items():
            column = _read_column(table, name, part.first_row + np.arange(len(table)))
            column.set_keys(list(encoder._hash_cells(column, backend.modality)))
            codes[name] = np.searchsorted(column.rows, column.first_rows)
            codes[name][column.missing] = -1
            digests = b"".join(column.distinct_keys())
            n_missing = int(column.missing.sum()) - len(column.errors)
            columns[name] = digests, column.rows, n_missing, _messages(column)
        return columns, codes

    def encode(self, block, part, name, rows, digests, file):
        """Encode the cells in some rows of a part, and write their vectors to a file.

        Returns
        -------
        n_encoded : int
            Number of cells with a vector.

        errors : list of str
            Messages about the other cells.
        """
        encoder, backend, shards = self._columns[name]
        if shards.folder.exists(file):  # written by a worker that died afterwards
            return len(shards.read_keys(file)), []
        table = part.table(block).take(rows)
        column = _read_column(table, name, part.first_row + rows)
        column.set_keys([key.tobytes() for key in to_keys(digests)])
        vectors = np.empty((len(rows), shards.space.n_features), dtype=np.float32)
        is_encoded = np.zeros(len(rows), dtype=bool)
        for positions, values in encoder._encode(
            column, backend, shards.space, np.arange(len(rows)), None
        ):
            vectors[positions] = values
            is_encoded[positions] = True
        if encoder.fingerprint() != shards.space.fingerprint:
            raise RuntimeError(
                f"The model of column {name!r} cannot be run as its vectors are "
                "described. Pass runtime='torch' to the encoder."
            )
        keys = column.distinct_keys(is_encoded)
        shards.write(file, keys, vectors[is_encoded])
        return len(keys), _messages(column)

    def write(self, block, part, codes, joins, folder, *encoded):
        """Write a part with its vectors to a file, after the tasks that encode them.

        Parameters
        ----------
        joins : dict of str to (digests, files, numbers)
            For each column the joined digests of its distinct cells, the files of
            vectors, and the number of the file of each cell.
        """
        table = part.table(block)
        for name, (digests, files, numbers) in joins.items():
            _, _, shards = self._columns[name]
            keys = to_keys(digests)
            # The last row is the vector of missing cells.
            vectors = np.zeros((len(keys) + 1, shards.space.n_features), np.float32)
            is_missing = np.ones(len(keys) + 1, dtype=bool)
            for number, shard in enumerate(files):
                positions = np.flatnonzero(numbers == number)
                is_found, values = shards.find(shard, keys[positions])
                vectors[positions[is_found]] = values
                is_missing[positions[is_found]] = False
            cells = codes[name]
            embedding = pa.FixedSizeListArray.from_arrays(
                pa.array(vectors[cells].ravel()),
                type=pa.list_(pa.float32(), shards.space.n_features),
                mask=pa.array(is_missing[cells]),
            )
            table = table.append_column(embedding_name(name), embedding)
        folder.write_table(part.file, table)


@dataclass(frozen=True)
class Part:
    """Rows of a block that become one file."""

    file: str
    start: int
    n_rows: int
    first_row: int  # number of the first row in the dataset

    def table(self, block):
        """Return the rows as a pyarrow table, without copying them."""
        table = BlockAccessor.for_block(block).to_arrow()
        return table.slice(self.start, self.n_rows)


def _read_column(table, name, labels):
    """Return the cells of a column, labelled by their rows in the dataset."""
    array = table[name]
    if isinstance(array.type, pa.BaseExtensionType):  # tensors and objects of Ray
        cells = list(BlockAccessor.for_block(table.select([name])).to_numpy(name))
    else:
        cells = array.to_pylist()
    return Column(pd.Series(cells, index=labels, name=name, dtype=object))


def _messages(column):
    """Return messages about the cells of a column that cannot be read."""
    messages = []
    for row, error in column.errors.items():
        messages.append(f"{column.place(row)}: {error}")
    return messages


class Pool:
    """Workers that take tasks as soon as they have started.

    Parameters
    ----------
    n_workers : int
        Number of workers.

    options : dict
        Options of Ray for the workers.

    *arguments : object
        Arguments of `Worker`.
    """

    def __init__(self, n_workers, options, *arguments):
        actor = ray.remote(Worker).options(
            max_restarts=-1,
            max_task_retries=_MAX_RETRIES,
            scheduling_strategy="SPREAD",
            **options,
        )
        self._actors = [actor.remote(*arguments) for _ in range(n_workers)]
        self._n_tasks = {}  # by the number of the actor, if it has started
        self._running = {}  # number of the actor by the reference of a result
        for i, worker in enumerate(self._actors):
            self._running[worker.spaces.remote()] = i
        self.n_workers = n_workers
        self.spaces = None
        while self.spaces is None:
            self._wait()

    def submit(self, method, *arguments, num_returns=1):
        """Start a task, as soon as a worker is free, and return its references."""
        while not self._n_tasks or min(self._n_tasks.values()) >= _TASKS_PER_WORKER:
            self._wait()
        i = min(self._n_tasks, key=self._n_tasks.get)
        method = getattr(self._actors[i], method).options(num_returns=num_returns)
        references = method.remote(*arguments)
        self._running[references if num_returns == 1 else references[0]] = i
        self._n_tasks[i] += 1
        return references

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for actor in self._actors:
            ray.kill(actor)

    def _wait(self):
        """Wait for the end of a task, or the start of a worker."""
        (reference,), _ = ray.wait(list(self._running), fetch_local=False)
        i = self._running.pop(reference)
        if i in self._n_tasks:
            self._n_tasks[i] -= 1
            return
        self._n_tasks[i] = 0
        spaces = ray.get(reference)
        if self.spaces not in (None, spaces):
            raise RuntimeError(
                "The workers would encode in different precisions, since their machines "
                "differ. Pass dtype='float32' to the encoder."
            )
        self.spaces = spaces
