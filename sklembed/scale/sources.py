"""Sources: the names of the columns of a dataset, and its blocks in their order."""

import contextlib
import functools
import logging
import os

import pyarrow as pa
import pyarrow.dataset
import ray
import ray.data
from pyarrow import fs

from sklembed.scale.shards import Folder, is_visible, relative_path

_IMAGE_SUFFIXES = set(".avif .bmp .gif .jpeg .jpg .png .tif .tiff .webp".split())

# Types that Ray cannot send to another process.
_READ_AS = {
    pa.string_view(): pa.large_string(),
    pa.binary_view(): pa.large_binary(),
}


class ParquetFiles:
    """Parquet files, of which the workers read one row group after the other.

    Ray's own reader would start more processes, and split and order blocks in another
    way on each machine.
    """

    uses_cluster = False

    def __init__(self, folder, files):
        dataset = pa.dataset.dataset(
            files,
            format="parquet",
            filesystem=folder.system,
            partitioning="hive",
            partition_base_dir=folder.path,
        )
        self._fragments = list(dataset.get_fragments())
        schemas = [fragment.physical_schema for fragment in self._fragments]
        self._schema = pa.unify_schemas(
            [*schemas, dataset.schema], promote_options="permissive"
        )
        for i, field in enumerate(self._schema):
            field = field.with_type(_READ_AS.get(field.type, field.type))
            self._schema = self._schema.set(i, field)
        self.names = self._schema.names
        self.n_rows = sum(fragment.metadata.num_rows for fragment in self._fragments)

    def blocks(self, pool):
        """Yield the reference, the first row and the end of each block."""
        for fragment in self._fragments:
            for group in fragment.split_by_row_group():
                block = pool.submit("read", group, self._schema)
                yield block, 0, group.row_groups[0].num_rows


class Table:
    """A table in memory, such as the paths of images."""

    uses_cluster = False

    def __init__(self, table):
        self._table = table
        self.names, self.n_rows = table.column_names, len(table)

    def blocks(self, pool):
        """Yield the reference, the first row and the end of the only block."""
        yield ray.put(self._table), 0, self.n_rows


class RayDataset:
    """A dataset of Ray, which Ray streams."""

    uses_cluster = True
    n_rows = None  # counting could execute the dataset

    def __init__(self, dataset):
        self._dataset = dataset

    @functools.cached_property
    def names(self):
        """The names of the columns, which may need a cluster."""
        return self._dataset.columns() or []  # None without rows

    def blocks(self, pool):
        """Yield the reference, the first row and the end of each block."""
        with self._in_order():
            for bundle in self._dataset.iter_internal_ref_bundles():
                for entry, piece in zip(bundle.blocks, bundle.slices, strict=True):
                    start, stop = 0, entry.metadata.num_rows
                    if piece is not None:
                        start, stop = piece.start_offset, piece.end_offset
                    yield entry.ref, start, stop

    @contextlib.contextmanager
    def _in_order(self):
        """Let the dataset yield its blocks in their order, and log only errors."""
        context, logger = self._dataset.context, logging.getLogger("ray.data")
        options = context.execution_options
        before = options.preserve_order, context.enable_progress_bars, logger.level
        options.preserve_order, context.enable_progress_bars = True, False
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            options.preserve_order, context.enable_progress_bars, level = before
            logger.setLevel(level)


def open_source(source, outputs):
    """Return a source without reading its rows.

    Parameters
    ----------
    source : path or ray.data.Dataset
        The source.

    outputs : dict of str to Folder
        Folders to which the call writes, by their role.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError
        If it is neither a dataset of Ray, nor Parquet files, nor local images, or if
        outputs are among its files.
    """
    if isinstance(source, ray.data.Dataset):
        return RayDataset(source)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "source must be a path or a dataset of Ray; got "
            f"{type(source).__name__}. Convert it, as by ray.data.from_pandas."
        )
    folder = Folder.at(source)
    files, folders = _list_files(folder)
    for role, output in outputs.items():
        if any(directory.shows(output) for directory in folders):
            raise ValueError(
                f"The {role} {output.path} is in the source {folder.path}, or is the "
                "source. The next call would read its files. Pass another folder."
            )
    suffixes = {os.path.splitext(file)[1].lower() for file in files}
    if suffixes == {".parquet"}:
        return ParquetFiles(folder, files)
    if not suffixes or suffixes - _IMAGE_SUFFIXES:
        raise ValueError(
            f"The source {folder.path} must have Parquet files or images, and nothing "
            f"else; it has {sorted(suffixes) or 'no files'}. For other files, pass a "
            "dataset of Ray."
        )
    if not folder.is_local:
        raise ValueError(
            f"The images in {folder.path} are not on a local disk. Pass "
            "ray.data.read_binary_files(..., include_paths=True) and columns='bytes'."
        )
    return Table(pa.table({"path": files}))


def _list_files(folder):
    """Return the paths of the files in a folder, or of a file, and all folders.

    Hidden files and folders are skipped.

    Raises
    ------
    OSError
        If a symbolic link is broken, or a folder is read twice because of a link.
    """
    info = folder.system.get_file_info(folder.path)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"There is no source {folder.path}. Check the path.")
    if info.is_file:
        return [folder.path], []
    if folder.is_local:
        return _walk(folder)
    selector = fs.FileSelector(folder.path, recursive=True)
    files = []
    for info in folder.system.get_file_info(selector):
        if info.is_file and is_visible(relative_path(info.path, folder.path)):
            files.append(info.path)
    return sorted(files), [folder]


def _walk(folder):
    """List a local folder with symbolic links, of which pyarrow skips broken ones."""
    files, folders = [], {}  # by their real paths
    for path, folder_names, names in os.walk(
        folder.path, followlinks=True, onerror=_raise
    ):
        first = folders.setdefault(os.path.realpath(path), path)
        if first != path:
            raise OSError(
                f"{path} and {first} are the same folder, by a symbolic link. The source "
                "would have its files twice. Delete the link."
            )
        folder_names[:] = filter(is_visible, folder_names)  # which os.walk enters
        for file in [os.path.join(path, name) for name in filter(is_visible, names)]:
            if not os.path.exists(file):
                raise FileNotFoundError(
                    f"The symbolic link {file} is broken. Mend or delete it."
                )
            files.append(file)
    return sorted(files), [Folder(folder.system, path) for path in folders]


def _raise(error):
    raise error
