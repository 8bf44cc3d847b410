"""Workers: processes with an encoder, and the pool that keeps them busy."""

import copy
import functools
import os
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
from ray import cloudpickle
from ray.data.block import BlockAccessor
from threadpoolctl import threadpool_limits

from sklembed.encoders.column import Column
from sklembed.scale.shards import Shards, embedding_name, find, to_keys

# A worker starts with the next task while the driver learns of the end of the last.
TASKS_PER_WORKER = 2
# Losses of a worker that a task survives; a cell that crashes a worker does so always.
MAX_RETRIES = 5
# Seconds until a warning says that no worker has the resources to start.
_PATIENCE = 20


class Encoded(NamedTuple):
    """The result of a task that encodes."""

    file: str  # with the vectors
    n_encoded: int  # number of cells with a vector
    failed: bytes  # joined digests of the other cells
    errors: list[str]  # messages about them


class Worker:
    """A process that hashes, encodes and writes; Ray makes it an actor.

    Parameters
    ----------
    load : callable
        Returns a dict with the encoder of each column. The first task calls it, since
        Ray restarts a worker for ever whose constructor crashes.

    vectors : Folder
        The folder of the shards.

    n_threads : int
        Number of threads of the models.
    """

    def __init__(self, load, vectors, n_threads):
        # Read by torch, the tokenizers and joblib when they start.
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "LOKY_MAX_CPU_COUNT"):
            os.environ[name] = str(n_threads)
        threadpool_limits(n_threads)
        self._load, self._vectors = load, vectors

    @functools.cached_property
    def _columns(self):
        """The encoder, the backend and the shards of each column."""
        columns = {}
        for name, encoder in self._load().items():
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
        try:
            return fragment.to_table(schema=schema, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            number = fragment.row_groups[0].id
            raise OSError(
                f"Row group {number} of {fragment.path} cannot be read: {error}. Mend or "
                "delete the file."
            ) from error

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
        encoded : Encoded
            The cells with a vector, and those without.
        """
        encoder, backend, shards = self._columns[name]
        column = _read_column(part.table(block), name, part.first_row + rows, rows)
        keys = to_keys(digests)
        if shards.folder.exists(file):  # written by a worker that died afterwards
            is_encoded, _ = shards.find(file, keys)
            positions = np.flatnonzero(~is_encoded)
            errors = [f"{column.place(i)} cannot be read" for i in positions]
            return _encoded(file, keys, is_encoded, errors)
        column.set_keys([key.tobytes() for key in keys])
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
        shards.write(file, column.distinct_keys(is_encoded), vectors[is_encoded])
        return _encoded(file, keys, is_encoded, _messages(column))

    def write(self, block, part, codes, joins, folder, *encoded):
        """Write a part with its vectors to a file, after the tasks that encode them.

        Parameters
        ----------
        joins : dict of str to (digests, files, numbers)
            For each column the joined digests of its distinct cells, the files of
            vectors, and the number of the file of each cell; -1 for cells that an
            earlier task could not read.

        *encoded : Encoded
            Results of the tasks.

        Returns
        -------
        n_null : int
            Number of cells without a vector, over all columns.
        """
        table, n_null = part.table(block), 0
        failed = {result.file: to_keys(result.failed) for result in encoded}
        for name, (digests, files, numbers) in joins.items():
            _, _, shards = self._columns[name]
            keys = to_keys(digests)
            # The last row is the vector of missing cells.
            vectors = np.zeros((len(keys) + 1, shards.space.n_features), np.float32)
            is_missing = np.ones(len(keys) + 1, dtype=bool)
            for number, shard in enumerate(files):
                positions = np.flatnonzero(numbers == number)
                if shard in failed:
                    is_failed = find(failed[shard], keys[positions]) >= 0
                    positions = positions[~is_failed]
                if len(positions):
                    vectors[positions] = shards.look_up(shard, keys[positions])
                    is_missing[positions] = False
            cells = codes[name]
            n_null += int(is_missing[cells].sum())
            embedding = pa.FixedSizeListArray.from_arrays(
                pa.array(vectors[cells].ravel()),
                type=pa.list_(pa.float32(), shards.space.n_features),
                mask=pa.array(is_missing[cells]),
            )
            table = table.append_column(embedding_name(name), embedding)
        folder.write_table(part.file, table)
        return n_null


@dataclass(frozen=True)
class Part:
    """Rows of a block that become one file."""

    file: str
    start: int
    n_rows: int
    first_row: int  # number of the first row in the dataset

    @property
    def rows(self):
        """The rows in the dataset, for messages."""
        return f"rows {self.first_row} to {self.first_row + self.n_rows - 1}"

    def table(self, block):
        """Return the rows as a pyarrow table, without copying them."""
        table = BlockAccessor.for_block(block).to_arrow()
        return table.slice(self.start, self.n_rows)


# Types whose cells cannot be taken if they exceed 2 GiB.
_LARGE_TYPES = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}


def _read_column(table, name, labels, rows=None):
    """Return the cells of a column, or of some rows, labelled by rows of the dataset."""
    array = table[name]
    array = array.cast(_LARGE_TYPES.get(array.type, array.type))
    if rows is not None:
        array = array.take(rows)
    if isinstance(array.type, pa.BaseExtensionType):  # tensors and objects of Ray
        block = BlockAccessor.for_block(pa.table({name: array}))
        cells = list(block.to_numpy(name))
    else:
        cells = array.to_pylist()
    return Column(pd.Series(cells, index=labels, name=name, dtype=object))


def _encoded(file, keys, is_encoded, errors):
    """Return the result of a task that encodes cells with some digests."""
    failed = keys[~is_encoded].tobytes()
    return Encoded(file, int(is_encoded.sum()), failed, errors)


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

    encoders : dict of str to FrozenEncoder
        The encoder of each column.

    *arguments : object
        Further arguments of `Worker`.

    Raises
    ------
    RuntimeError
        If a worker is lost several times while it loads the models.
    """

    def __init__(self, n_workers, options, encoders, *arguments):
        load = functools.partial(cloudpickle.loads, cloudpickle.dumps(encoders))
        actor = ray.remote(Worker).options(
            max_restarts=-1,
            max_task_retries=MAX_RETRIES,
            scheduling_strategy="SPREAD",
            **options,
        )
        self._actors = [actor.remote(load, *arguments) for _ in range(n_workers)]
        self._n_tasks = {}  # by the number of the actor, if it has started
        self._running = {}  # number of the actor by the reference of a result
        for i, worker in enumerate(self._actors):
            self._running[worker.spaces.remote()] = i
        self.n_workers = n_workers
        self.spaces = None
        self._warn_of_resources(options)
        while self.spaces is None:
            self._wait()

    def submit(self, method, *arguments, num_returns=1):
        """Start a task, as soon as a worker is free, and return its references."""
        while not self._n_tasks or min(self._n_tasks.values()) >= TASKS_PER_WORKER:
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

    def _warn_of_resources(self, options):
        """Warn if no worker starts, as when other programs use all CPUs."""
        starts = [actor.__ray_ready__.remote() for actor in self._actors]
        started, _ = ray.wait(starts, timeout=_PATIENCE, fetch_local=False)
        if not started:
            available = ray.available_resources()
            warnings.warn(
                f"No worker has started for {_PATIENCE} s. Each needs "
                f"{options['num_cpus']} CPUs and {options['num_gpus']} GPUs; "
                f"{available.get('CPU', 0):g} CPUs and {available.get('GPU', 0):g} GPUs "
                "are available. The call waits until other programs release them. A "
                "larger n_workers reduces the CPUs of a worker.",
                UserWarning,
                stacklevel=4,
            )

    def _wait(self):
        """Wait for the end of a task, or the start of a worker."""
        (reference,), _ = ray.wait(list(self._running), fetch_local=False)
        i = self._running.pop(reference)
        if i in self._n_tasks:
            self._n_tasks[i] -= 1
            return
        self._n_tasks[i] = 0
        try:
            spaces = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(
                f"A worker was lost {MAX_RETRIES + 1} times while it loaded the models. "
                "They may crash the process, or exceed its memory: pass a smaller "
                "n_workers, or try FrozenEncoder(...).transform on the machines."
            ) from error
        if self.spaces not in (None, spaces):
            raise RuntimeError(
                "The workers would encode in different precisions, since their machines "
                "differ. Pass dtype='float32' to the encoder."
            )
        self.spaces = spaces
