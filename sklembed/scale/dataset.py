"""encode_dataset: stream a dataset through encoders, on one or many machines."""

import contextlib
import copy
import logging
import os
import time
from dataclasses import asdict, dataclass

import joblib

from sklembed.encoders.frozen import FrozenEncoder
from sklembed.scale.shards import VECTORS, Folder, check_is_not_target, embedding_name

_READING_SHARE = 8  # one in eight CPUs, and at least one, executes a dataset of Ray


@dataclass(frozen=True)
class EncodingSummary:
    """Counts of a call of `encode_dataset`, over all columns.

    Parameters
    ----------
    rows : int
        Number of rows. A cell that occurs in several rows counts once in `distinct`
        and `encoded`, and in each row in `missing` and `failed`.

    distinct : int
        Number of distinct cells that are not missing.

    encoded : int
        Number of cells that were encoded by this call.

    from_shards : int
        Number of distinct cells whose vectors the shards had.

    missing : int
        Number of missing cells.

    failed : int
        Number of other cells that cannot be read, with ``errors="missing"``.

    seconds_to_start : float
        Seconds until the first worker had started.

    seconds : float
        Duration of the call.
    """

    rows: int
    distinct: int
    encoded: int
    from_shards: int
    missing: int
    failed: int
    seconds_to_start: float
    seconds: float


def encode_dataset(
    encoder,
    source,
    target,
    *,
    columns=None,
    vectors=None,
    n_workers=None,
    num_gpus=0,
):
    """Encode columns of a dataset with Ray, to Parquet files with their vectors.

    Each distinct cell is encoded once, even if it occurs in several blocks or calls.
    Vectors are committed to shards: Parquet files whose key is the hash of the cell's
    content, so that the dataset needs no column of ids. If a worker dies, it is started
    again and repeats its task. If the program dies, the same call resumes. It does not
    encode cells again whose vectors are in the shards.

    If Ray is not initialised, the call connects to the cluster in the variable
    ``RAY_ADDRESS``, or else starts Ray on this machine and stops it at the end. Blocks
    of the dataset are streamed. This process keeps the hash of each distinct cell in
    memory, tens of bytes. Each worker has a copy of the model.

    Parameters
    ----------
    encoder : FrozenEncoder or dict of str to FrozenEncoder
        The encoder of the columns, or an encoder for each column. It need not be
        fitted, and its store is not used: see :func:`export_vectors` and
        :func:`import_vectors`. It must have ``output="pooled"``.

    source : path or ray.data.Dataset
        Parquet files or a folder of them, a local folder of images, or any dataset of
        Ray. Folders are read with all folders in them, in the order of paths. Images
        give the column "path".

    target : str or path
        Folder of the output: a local folder, or a URI that pyarrow can write. It has
        the Parquet files ``part-00000000.parquet`` and following, with the rows in their
        order. They have all columns of the source and, for each encoded column,
        ``<column>_embedding``: a list of `n_features` float32 numbers, or null for
        missing cells. The files appear when all rows are encoded, and replace the files
        of an earlier call.

    columns : str, list of str or None, default=None
        Columns to encode. None means the only column of the source. Must be None if
        `encoder` is a dict.

    vectors : str, path or None, default=None
        Folder of the shards, which several targets can share. None means
        ``<target>/_vectors``. A call does not see vectors that another call commits
        while it runs.

    n_workers : int or None, default=None
        Number of worker processes, which share the CPUs. None means one for each CPU
        or, with `num_gpus`, as many as there are GPUs for.

    num_gpus : float, default=0
        Number of GPUs of a worker. If 0, models run on the CPU.

    Returns
    -------
    summary : EncodingSummary
        Counts of rows and cells.

    Raises
    ------
    ImportError
        If ray is not installed.

    TypeError, ValueError, OSError
        If a column is not in the source, the source has no rows, the encoder has
        ``output="tokens"``, or a cell cannot be encoded. The index in its message is
        the row in the dataset. If the target or the vectors are in the source.

    FileExistsError
        If the target is not empty, and not the target of an earlier call.

    OSError
        If another call with the same target starts before the end of this call.

    Examples
    --------
    >>> import pyarrow.parquet
    >>> from sklembed import FrozenEncoder
    >>> from sklembed.scale import encode_dataset
    >>> encoder = FrozenEncoder("sentence-transformers/all-MiniLM-L6-v2")
    >>> encode_dataset(
    ...     encoder, "reviews/", "encoded/", columns="text"
    ... )  # doctest: +SKIP
    EncodingSummary(rows=2000000, distinct=1412211, encoded=1412211, from_shards=0, ...)
    >>> pyarrow.parquet.read_table("encoded/").column_names  # doctest: +SKIP
    ['stars', 'text', 'text_embedding']
    """
    tick = time.perf_counter()
    ray = _import_ray()
    from sklembed.scale.job import Job
    from sklembed.scale.sources import open_source
    from sklembed.scale.target import Target
    from sklembed.scale.workers import Pool

    output = Folder.at(target)
    shards = output.folder(VECTORS) if vectors is None else Folder.at(vectors)
    _check_vectors(shards, output)
    source = open_source(source, {"target": output, "vectors": shards})
    target = Target(output)
    target.check()
    with _cluster(ray):
        encoders = _by_column(encoder, columns, source.names)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        n_workers, n_threads, options = _share_resources(
            nodes, n_workers, num_gpus, source.uses_cluster
        )
        is_verbose = any(encoder.verbose for encoder in encoders.values())
        with target:
            try:
                with Pool(n_workers, options, encoders, shards, n_threads) as pool:
                    seconds_to_start = time.perf_counter() - tick
                    job = Job(pool, shards, target.drafts, is_verbose)
                    job.run(source)
            except ray.exceptions.RayTaskError as error:
                raise _original(error) from error
            target.commit(job.files)
    seconds = time.perf_counter() - tick
    summary = EncodingSummary(
        **job.counts, seconds_to_start=seconds_to_start, seconds=seconds
    )
    target.complete(asdict(summary))
    job.warn_of_errors()
    return summary


def _check_vectors(vectors, output):
    """Raise an error if shards would be among the parts of a target."""
    check_is_not_target(vectors)
    if output.shows(vectors):
        raise ValueError(
            f"The folder of vectors {vectors.path} is in the target {output.path}, "
            "whose readers would read its files. Pass a folder elsewhere, or a name that "
            "begins with an underscore."
        )


def _import_ray():
    """Return the module ray, which neither reports usage nor replaces `print`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # skorch prints its table of epochs if `print` is not the built-in function.
    os.environ.setdefault("RAY_TQDM_PATCH_PRINT", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            "encode_dataset needs Ray: pip install 'sklembed[ray]'"
        ) from error
    return ray


@contextlib.contextmanager
def _cluster(ray):
    """Start Ray on this machine or connect to a cluster, unless that is done."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    options = {}
    if address == "local":
        options = {"num_cpus": joblib.cpu_count(), "include_dashboard": False}
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _by_column(encoder, columns, names):
    """Return the encoder of each column, after checking both."""
    if isinstance(encoder, dict):
        if columns is not None:
            raise ValueError("columns must be None: the keys of encoder are columns.")
        encoders = encoder
    else:
        if columns is None:
            if len(names) != 1:
                raise ValueError(
                    f"The source has the columns {names}: pass columns=..."
                )
            columns = names
        if isinstance(columns, str):
            columns = [columns]
        encoders = dict.fromkeys(columns, encoder)
    if not encoders:
        raise ValueError(f"Pass the column to encode, of the columns {names}.")
    for column, encoder in encoders.items():
        _check_column(column, encoder, names)
    return {column: _with_full_path(encoder) for column, encoder in encoders.items()}


def _with_full_path(encoder):
    """Return an encoder whose model has no path relative to the current folder.

    Workers have another current folder.
    """
    model = encoder.model
    if not isinstance(model, str | os.PathLike) or not os.path.isdir(model):
        return encoder
    return copy.copy(encoder).set_params(model=os.path.abspath(model))


def _check_column(column, encoder, names):
    """Raise an error if a column is absent, or cannot be encoded by its encoder."""
    if column not in names:
        raise ValueError(f"The source has no column {column!r}. It has {names}.")
    if embedding_name(column) in names:
        raise ValueError(
            f"The source already has a column {embedding_name(column)!r}. Rename it."
        )
    if not isinstance(encoder, FrozenEncoder):
        raise TypeError(
            f"The encoder of column {column!r} must be a FrozenEncoder; got "
            f"{type(encoder).__name__}."
        )
    encoder._validate_params()
    if encoder.output == "tokens":
        raise ValueError(
            f"The encoder of column {column!r} has output='tokens', but a cell gets one "
            "vector. Pass output='pooled'."
        )


def _share_resources(nodes, n_workers, num_gpus, uses_cluster):
    """Return the number of workers, of their threads, and their options of Ray.

    Parameters
    ----------
    nodes : list of dict
        The resources of each machine. A worker runs on one machine.
    """
    if n_workers is None and num_gpus:
        n_workers = sum(int(node.get("GPU", 0) / num_gpus) for node in nodes)
        if not n_workers:
            n_gpus = [int(node.get("GPU", 0)) for node in nodes]
            raise ValueError(
                f"num_gpus={num_gpus}, but the machines of the cluster have {n_gpus} "
                "GPUs. Pass n_workers if it adds machines on demand."
            )
    # Without such a machine, the cluster adds machines on demand.
    usable = [node for node in nodes if node.get("GPU", 0) >= num_gpus] or nodes
    cpus = [int(node.get("CPU", 0)) for node in usable]
    n_cpus = max(1, sum(cpus))
    if n_workers is None:
        n_workers = n_cpus
    n_shared = n_cpus
    if uses_cluster:  # workers with all CPUs would wait for their input for ever
        n_shared -= max(1, n_cpus // _READING_SHARE)
    share = n_shared / n_workers
    if share > 1:
        share = int(share)  # required by Ray
        while share > 1 and sum(n // share for n in cpus) < n_workers:
            share -= 1
    n_threads = max(1, min(n_cpus // n_workers, max(cpus)))
    return n_workers, n_threads, {"num_cpus": share, "num_gpus": num_gpus}


def _original(error):
    """Return the error that a worker raised."""
    while hasattr(error, "cause"):
        error = error.cause
    return error
