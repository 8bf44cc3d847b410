"""Export of stored vectors to Parquet and .npy files."""

import contextlib
import os
from pathlib import Path

import numpy as np

from sklembed.encoders.database import DIGEST_SIZE


def write_parquet(path, contents):
    """Write the vectors of several models to one Parquet table.

    Parameters
    ----------
    path : Path
        The file. An existing file is overwritten.

    contents : list of tuple (Space, iterator)
        For each model, its space and an iterator over pairs (hashes, values).

    Returns
    -------
    n_rows : int
        Number of rows in the table.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow") from error
    schema = pa.schema(
        {
            "fingerprint": pa.string(),
            "digest": pa.string(),
            "vector": pa.list_(pa.float32()),
            "n_tokens": pa.int32(),
        }
    )
    n_rows = 0
    with (
        _replacing(path) as (draft,),
        pyarrow.parquet.ParquetWriter(draft, schema) as file,
    ):
        for space, chunks in contents:
            for digests, values in chunks:
                n_tokens = [None] * len(digests)
                ends = np.arange(len(digests) + 1)
                if space.ragged:
                    n_tokens = list(map(len, values))
                    ends = np.cumsum([0, *n_tokens])
                # Row i has the numbers from offset i to offset i + 1.
                offsets = (ends * space.n_features).astype(np.int32)
                numbers = np.concatenate(values, axis=None)
                columns = {
                    "fingerprint": [space.fingerprint] * len(digests),
                    "digest": [digest.hex() for digest in digests],
                    "vector": pa.ListArray.from_arrays(offsets, numbers),
                    "n_tokens": n_tokens,
                }
                file.write_table(pa.table(columns, schema=schema))
                n_rows += len(digests)
    return n_rows


def write_npy(path, contents):
    """Write the vectors of one model to an array, and their hashes to another.

    Parameters and returned value are those of `write_parquet`. The hashes are written
    to ``<stem>.digests.npy`` in the same folder.
    """
    if len(contents) != 1:
        names = {}
        for space, _ in contents:
            names[space.fingerprint] = space.names[-1]
        raise ValueError(
            f"A .npy file stores one model with its settings, but {len(contents)} match: "
            f"{names}. Pass one of these fingerprints as model=..., or export to .parquet."
        )
    ((space, chunks),) = contents
    if space.ragged:
        raise ValueError(
            "The numbers of tokens differ, which a .npy file cannot store. Export to .parquet."
        )
    n_rows = 0
    with (
        _replacing(path, path.with_suffix(".digests.npy")) as drafts,
        _growing_npy(drafts[0], np.float32, space.n_features) as vector_file,
        _growing_npy(drafts[1], np.uint8, DIGEST_SIZE) as digest_file,
    ):
        for digests, values in chunks:
            vector_file.write(values.tobytes())
            digest_file.write(b"".join(digests))
            n_rows += len(digests)
    return n_rows


@contextlib.contextmanager
def _replacing(*paths):
    """Yield the paths of drafts, which replace the files once all are complete."""
    paths = [Path(os.path.realpath(path)) for path in paths]
    drafts = [path.with_name(f".{path.name}.draft") for path in paths]
    try:
        yield drafts
        for path in paths[1:]:  # absent for a moment, rather than beside another file
            path.unlink(missing_ok=True)
        for draft, path in zip(drafts, paths, strict=True):
            os.replace(draft, path)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _growing_npy(path, dtype, width):
    """Open a .npy file to append rows; the number of rows is written at the end."""
    dtype = np.dtype(dtype).newbyteorder("<")

    def write_header(n_rows):
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": (n_rows, width)}
        )

    with open(path, "wb") as file:
        write_header(0)  # numpy pads the header, so that a larger number fits
        start = file.tell()
        yield file
        n_rows = (file.tell() - start) // (width * dtype.itemsize)
        file.seek(0)
        write_header(n_rows)


WRITERS = {".parquet": write_parquet, ".npy": write_npy}
