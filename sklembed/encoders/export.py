"""Vectors written to files that other programs read: Parquet and .npy."""

import contextlib

import numpy as np

from sklembed.encoders.database import DIGEST_SIZE


def write_parquet(path, contents):
    """Write the vectors of several models into one table; return the number of rows.

    `contents` lists, for each, its Space and an iterator of digests and values.
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
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for space, chunks in contents:
            for digests, values in chunks:
                ends = np.cumsum([0, *(value.size for value in values)], dtype=np.int32)
                columns = {
                    "fingerprint": pa.array([space.fingerprint] * len(digests)),
                    "digest": [digest.hex() for digest in digests],
                    "vector": pa.ListArray.from_arrays(
                        ends, np.concatenate(values, axis=None)
                    ),
                    "n_tokens": [
                        len(value) if space.ragged else None for value in values
                    ],
                }
                file.write_table(pa.table(columns, schema=schema))
                n_rows += len(digests)
    return n_rows


def write_npy(path, contents):
    """Write the vectors of one model as an array, and their digests as another, beside it."""
    if len(contents) != 1:
        found = {space.fingerprint: space.names[-1] for space, _ in contents}
        raise ValueError(
            f"a .npy file holds one model with its settings, but {len(contents)} match: {found}. "
            "Name one by its fingerprint, as model=..., or export to .parquet."
        )
    if contents[0][0].ragged:
        raise ValueError(
            "tokens differ in number, which .npy cannot hold; export to .parquet."
        )
    ((space, chunks),) = contents
    with (
        _growing_npy(path, np.float32, space.n_features) as vectors,
        _growing_npy(path.with_suffix(".digests.npy"), np.uint8, DIGEST_SIZE) as names,
    ):
        n_rows = 0
        for digests, values in chunks:
            vectors.write(values.tobytes())
            names.write(b"".join(digests))
            n_rows += len(digests)
    return n_rows


@contextlib.contextmanager
def _growing_npy(path, dtype, width):
    """Open a .npy file to append rows to; its header is written when their number is known."""
    dtype = np.dtype(dtype).newbyteorder("<")

    def write_header(n_rows):
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": (n_rows, width)}
        )

    with open(path, "wb") as file:
        write_header(0)  # numpy pads it, so that the number may grow
        start = file.tell()
        yield file
        n_rows = (file.tell() - start) // (width * dtype.itemsize)
        file.seek(0)
        write_header(n_rows)


WRITERS = {".parquet": write_parquet, ".npy": write_npy}
