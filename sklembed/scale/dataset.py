"""encode_dataset: stream a dataset through encoders, on one or many machines."""

import contextlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass

import joblib

from sklembed.encoders.frozen import FrozenEncoder
from sklembed.scale.shards import Folder, embedding_name

_MANIFEST = "_sklembed.json"  # marks a target, and says whether it is complete
_VECTORS = "_vectors"  # folder of the shards in a target
_READING_SHARE = 8  # one in eight CPUs, and at least one, executes a dataset of Ray


@dataclass(frozen=True)
class EncodingSummary:
    """Counts of a call of `encode_dataset`, over all columns.

    Parameters
    ----------
    rows : int
        Number of rows.

    distinct : int
        Number of distinct cells that are not missing.

    encoded : int
        Number of cells that were encoded by this call.

    from_shards : int
        Number of distinct cells whose vectors the shards had.

    missing : int
        Number of missing cells.

    failed : int
        Number of cells that cannot be read, with ``errors="missing"``.

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
        the row in the dataset.

    FileExistsError
        If the target is not empty, and not the target of an earlier call.

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
    from sklembed.scale.workers import Pool

    output = Folder.at(target)
    _check_target(output, source)
    with _cluster(ray):
        source = open_source(source)
        encoders = _by_column(encoder, columns, source.names)
        shards = output.folder(_VECTORS) if vectors is None else Folder.at(vectors)
        _prepare_target(output)
        n_workers, n_threads, options = _share_resources(
            ray.cluster_resources(), n_workers, num_gpus, source.uses_cluster
        )
        try:
            with Pool(n_workers, options, encoders, shards, n_threads) as pool:
                seconds_to_start = time.perf_counter() - tick
                is_verbose = any(encoder.verbose for encoder in encoders.values())
                job = Job(pool, shards, output, is_verbose)
                job.run(source)
        except ray.exceptions.RayTaskError as error:
            raise _original(error) from error
    _write_manifest(output, None)
    job.commit()
    seconds = time.perf_counter() - tick
    summary = EncodingSummary(
        **job.counts, seconds_to_start=seconds_to_start, seconds=seconds
    )
    _write_manifest(output, asdict(summary))
    job.warn_of_errors()
    return summary


def _check_target(output, source):
    """Raise an error if a target is not empty and not of an earlier call."""
    is_path = isinstance(source, str | os.PathLike)
    if is_path and Folder.at(source).path == output.path:
        raise ValueError(
            f"The target {output.path} is the source; pass another folder."
        )
    names = [name for name in output.names() if name != _VECTORS]
    if names and _MANIFEST not in names:
        raise FileExistsError(
            f"The target {output.path} is not empty, and not of an earlier call: it has "
            f"{names[0]!r}. Pass another folder."
        )


def _prepare_target(output):
    """Create a target, mark it as ours, and delete the drafts of dead calls."""
    output.create()
    if not output.exists(_MANIFEST):
        _write_manifest(output, None)
    for name in output.names():
        if name.startswith("_draft-"):
            output.delete_folder(name)


def _write_manifest(output, summary):
    """Mark a target as complete, with its summary, or as incomplete."""
    text = json.dumps({"complete": summary is not None, "summary": summary})
    output.write(_MANIFEST, text.encode())


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
    for column, encoder in encoders.items():
        _check_column(column, encoder, names)
    return encoders


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


def _share_resources(resources, n_workers, num_gpus, uses_cluster):
    """Return the number of workers, of their threads, and their options of Ray."""
    n_cpus = max(1, int(resources.get("CPU", 1)))
    if n_workers is None:
        n_workers = n_cpus
        if num_gpus:
            n_gpus = resources.get("GPU", 0)
            n_workers = int(n_gpus / num_gpus)
            if not n_workers:
                raise ValueError(
                    f"num_gpus={num_gpus}, but the cluster has {n_gpus:.0f} GPUs. Pass "
                    "n_workers if it adds machines on demand."
                )
    n_reserved = n_cpus
    if uses_cluster:  # workers with all CPUs would wait for their input for ever
        n_reserved -= max(1, n_cpus // _READING_SHARE)
    share = n_reserved / n_workers
    if share > 1:
        share = int(share)  # required by Ray
    n_threads = max(1, n_cpus // n_workers)
    return n_workers, n_threads, {"num_cpus": share, "num_gpus": num_gpus}


def _original(error):
    """Return the error that a worker raised."""
    while hasattr(error, "cause"):
        error = error.cause
    return error
