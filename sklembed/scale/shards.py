"""Shards: vectors in Parquet files, by the digests of their cells."""

import itertools
import json
import os
import uuid
from collections import OrderedDict
from dataclasses import asdict, dataclass

import numpy as np

from sklembed.encoders import database

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import fs
except ImportError as error:
    raise ImportError(
        "sklembed.scale needs pyarrow: pip install 'sklembed[ray]'"
    ) from error

MANIFEST = "_sklembed.json"  # marks a target, and says whether it is complete
VECTORS = "_vectors"  # folder of the shards in a target
_CACHE_BYTES = 1 << 28  # of vectors, in a worker and for each column
_METADATA = b"sklembed"  # key of the space in the metadata of a file


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or in an object store; it need not exist."""

    system: fs.FileSystem
    path: str

    @classmethod
    def at(cls, path):
        """Return the folder at a path or URI."""
        path = os.fspath(path)
        if "://" in path:
            return cls(*fs.FileSystem.from_uri(path))
        return cls(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(path)))

    @property
    def name(self):
        """The last part of the path."""
        return os.path.basename(self.path)

    @property
    def is_local(self):
        """Whether the folder is on a disk."""
        return isinstance(self.system, fs.LocalFileSystem)

    def folder(self, name):
        """Return a folder in this one."""
        return Folder(self.system, self.file(name))

    def file(self, name):
        """Return the path of a file."""
        return f"{self.path}/{name}"

    def names(self):
        """Return the names of the files and folders, sorted."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.system.get_file_info(selector))

    def folder_names(self):
        """Return the names of the folders in this one, sorted."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        entries = self.system.get_file_info(selector)
        folders = [entry for entry in entries if entry.type == fs.FileType.Directory]
        return sorted(entry.base_name for entry in folders)

    def shows(self, other):
        """Return whether a reader of this folder would read the files of another.

        Readers of datasets skip folders whose names begin with a dot or underscore.
        """
        if self.system != other.system:
            return False
        paths = self.path, other.path
        if self.is_local:
            paths = os.path.realpath(self.path), os.path.realpath(other.path)
        return is_visible(relative_path(paths[1], paths[0]))

    def delete(self, name):
        """Delete a file."""
        self.system.delete_file(self.file(name))

    def delete_folder(self, name):
        """Delete a folder in this one, with its files."""
        self.system.delete_dir(self.file(name))

    def create(self):
        """Create the folder, if there is none."""
        self.system.create_dir(self.path, recursive=True)

    def exists(self, name):
        """Return whether there is a file."""
        return self.system.get_file_info(self.file(name)).type != fs.FileType.NotFound

    def read(self, name):
        """Return the content of a file."""
        with self.system.open_input_stream(self.file(name)) as file:
            return file.read()

    def write(self, name, content):
        """Write a file that is either complete or absent, whatever happens."""
        # Object stores show a file when it is complete, and a disk when it is renamed.
        draft = f".{name}.draft" if self.is_local else name
        with self.system.open_output_stream(self.file(draft)) as file:
            file.write(content)
        if draft != name:
            self.system.move(self.file(draft), self.file(name))

    def write_table(self, name, table, **options):
        """Write a table to a Parquet file."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True, **options)
        self.write(name, sink.getvalue())

    def read_table(self, name, columns=None):
        """Read a Parquet file.

        Raises
        ------
        OSError
            If the file is damaged.
        """
        try:
            return pq.ParquetFile(
                self.file(name),
                filesystem=self.system,
                page_checksum_verification=True,
            ).read(columns)
        except (pa.ArrowException, OSError) as error:
            raise OSError(
                f"The file {self.file(name)} cannot be read: {error}. If it is damaged, "
                "delete it: the next call encodes its cells again."
            ) from error


def relative_path(path, folder):
    """Return a path relative to a folder, with slashes; ".." if it is on another drive."""
    try:
        return os.path.relpath(path, folder).replace(os.sep, "/")
    except ValueError:  # drives of Windows
        return ".."


def is_visible(path):
    """Return whether readers of datasets read a file or folder at a relative path.

    They skip hidden ones, whose names begin with a dot or underscore. The path "." is
    visible, and paths outside, which begin with "..", are not.
    """
    parts = path.split("/")
    return path == "." or not any(part.startswith((".", "_")) for part in parts)


class Shards:
    """The files with the vectors of one space.

    Parameters
    ----------
    vectors : Folder
        The folder of all spaces.

    space : Space
        The space. Its vectors are in the folder with the name of its fingerprint.
    """

    def __init__(self, vectors, space):
        self.space = space
        self.folder = vectors.folder(space.fingerprint)
        self._cache = OrderedDict()  # index and vectors by file, the oldest first
        self._cache_bytes = 0

    @classmethod
    def of_folder(cls, vectors, fingerprint):
        """Return the shards in a folder of `vectors`, or None if it has no files."""
        folder = vectors.folder(fingerprint)
        for name in folder.names():
            if name.endswith(".parquet"):
                metadata = folder.read_table(name, []).schema.metadata or {}
                if _METADATA in metadata:
                    space = json.loads(metadata[_METADATA])
                    return cls(vectors, database.Space(**space))
        return None

    def names(self):
        """Return the names of the files."""
        return [name for name in self.folder.names() if name.endswith(".parquet")]

    def write(self, name, digests, vectors):
        """Write the vectors of cells to a file.

        Parameters
        ----------
        name : str
            Name of the file.

        digests : list of bytes
            Digests of the cells, 16 bytes each.

        vectors : ndarray of shape (n_cells, n_features), dtype float32
            Their vectors.
        """
        numbers = np.ravel(vectors).astype(self.space.dtype)
        columns = {
            "digest": pa.array(digests, pa.binary(database.DIGEST_SIZE)),
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(numbers), self.space.n_features
            ),
        }
        metadata = {_METADATA: json.dumps(asdict(self.space))}
        table = pa.table(columns).replace_schema_metadata(metadata)
        self.folder.write_table(name, table, use_dictionary=False, compression="none")

    def read(self, name):
        """Return the digests in a file, as by `to_keys`, and their vectors."""
        table = self._read_table(name).combine_chunks()
        vectors = table["vector"].combine_chunks().flatten().to_numpy()
        vectors = vectors.reshape(-1, self.space.n_features)
        return _keys_of(table), vectors.astype(np.float32, copy=False)

    def read_keys(self, name):
        """Return the digests in a file, as by `to_keys`."""
        return _keys_of(self._read_table(name, ["digest"]))

    def _read_table(self, name, columns=None):
        table = self.folder.read_table(name, columns)
        metadata = (table.schema.metadata or {}).get(_METADATA)
        if metadata is None:
            raise ValueError(
                f"The file {self.folder.file(name)} has no vectors of sklembed. Move it "
                "to another folder."
            )
        if json.loads(metadata)["fingerprint"] != self.space.fingerprint:
            raise ValueError(
                f"The file {self.folder.file(name)} has vectors of another model. Delete "
                "it."
            )
        return table

    def find(self, name, keys):
        """Return a mask of the digests that are in a file, and their vectors."""
        index, vectors = self._read_cached(name)
        rows = index.find(keys)
        return rows >= 0, vectors[rows[rows >= 0]]

    def _read_cached(self, name):
        """Return the index and the vectors of a file, which repeated cells use again."""
        if name in self._cache:
            self._cache.move_to_end(name)
            return self._cache[name]
        keys, vectors = self.read(name)
        index = Index()
        index.add(keys, np.arange(len(keys)))
        self._cache[name] = index, vectors
        self._cache_bytes += vectors.nbytes
        while self._cache_bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, (_, oldest) = self._cache.popitem(last=False)
            self._cache_bytes -= oldest.nbytes
        return index, vectors

    def look_up(self, name, keys):
        """Return the vectors of digests that are in a file.

        Raises
        ------
        OSError
            If a digest is not in the file.
        """
        is_found, vectors = self.find(name, keys)
        if not is_found.all():
            raise OSError(
                f"The file {self.folder.file(name)} has no vectors of "
                f"{np.count_nonzero(~is_found)} of {len(keys)} cells, although it had "
                "them when the call began. Do not change the folder during a call; call "
                "again to encode these cells."
            )
        return vectors

    def index(self):
        """Return the names of the files, and an `Index` of the file of each digest."""
        index, names = Index(), self.names()
        for number, name in enumerate(names):
            keys = self.read_keys(name)
            index.add(keys, np.full(len(keys), number))
        return names, index


class Index:
    """Numbers by digest, in 20 bytes for each digest.

    Sorted arrays are merged with arrays that are not larger, so that there are few.
    """

    def __init__(self):
        self._runs = []  # first halves of the digests, sorted; second halves; numbers

    def add(self, keys, numbers):
        """Add digests that are not in the index, as by `to_keys`."""
        run = keys[:, 0], keys[:, 1], np.asarray(numbers, dtype=np.int32)
        while self._runs and len(self._runs[-1][0]) <= len(run[0]):
            pairs = zip(self._runs.pop(), run, strict=True)
            run = [np.concatenate(pair) for pair in pairs]
        order = np.argsort(run[0])
        self._runs.append([part[order] for part in run])

    def find(self, keys):
        """Return the number of each digest; -1 for a digest that is not in the index."""
        numbers = np.full(len(keys), -1, dtype=np.int32)
        for first_halves, second_halves, run_numbers in self._runs:
            rows = np.arange(len(keys))
            places = np.searchsorted(first_halves, keys[:, 0])
            while len(rows):  # further rounds if digests have equal first halves
                is_within = places < len(first_halves)
                rows, places = rows[is_within], places[is_within]
                is_near = first_halves[places] == keys[rows, 0]
                rows, places = rows[is_near], places[is_near]
                is_equal = second_halves[places] == keys[rows, 1]
                numbers[rows[is_equal]] = run_numbers[places[is_equal]]
                rows, places = rows[~is_equal], places[~is_equal] + 1
        return numbers


def find(table, keys):
    """Return the row of each digest in an array of digests; -1 if it is not there."""
    index = Index()
    index.add(table, np.arange(len(table)))
    return index.find(keys)


def to_keys(digests):
    """Return digests, joined to bytes, as an array of shape (n, 2) and dtype uint64."""
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def _keys_of(table):
    return to_keys(b"".join(table["digest"].to_pylist()))


def import_vectors(store, path, model=None):
    """Add the vectors in the shards of `encode_dataset` to a store.

    Parameters
    ----------
    store : EmbeddingStore
        The store. Cells that are stored keep their vectors.

    path : str or path
        The folder of the shards: ``<target>/_vectors``, or the `vectors` that were
        passed to :func:`encode_dataset`. A path, or a URI that pyarrow can read.

    model : str or None, default=None
        A fingerprint, or the name in a model's description. None imports all models.

    Returns
    -------
    n_added : int
        Number of cells that were not stored.

    Raises
    ------
    ValueError
        If there are no shards of the model.

    OSError
        If a file is damaged.

    Examples
    --------
    >>> import tempfile
    >>> from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder
    >>> from sklembed.scale import export_vectors, import_vectors
    >>> def load():
    ...     return lambda texts: [[len(text), text.count(" ")] for text in texts]
    >>> shape = CallableBackend(
    ...     load, name="lengths", version="1", modality="text", n_features=2
    ... )
    >>> folder = tempfile.mkdtemp()
    >>> store = EmbeddingStore(folder + "/a.sqlite")
    >>> vectors = FrozenEncoder(shape, store=store).transform(["to be", "or", "or"])
    >>> export_vectors(store, folder + "/vectors")
    2
    >>> import_vectors(EmbeddingStore(folder + "/b.sqlite"), folder + "/vectors")
    2
    """
    n_added = 0
    for shards in _select(Folder.at(path), model):
        for name in shards.names():
            keys, vectors = shards.read(name)
            n_added += store.add(shards.space, [key.tobytes() for key in keys], vectors)
    return n_added


def export_vectors(store, path, model=None):
    """Write the vectors of a store to shards that `encode_dataset` reads.

    Parameters
    ----------
    store : EmbeddingStore
        The store. Encoders with ``output="tokens"`` are skipped.

    path : str or path
        The folder of the shards, to be passed as `vectors` to :func:`encode_dataset`. A
        path, or a URI that pyarrow can write. Cells in the folder keep their vectors.

    model : str or None, default=None
        A fingerprint, or the name in a model's description. None exports all models.

    Returns
    -------
    n_added : int
        Number of cells that were not in the folder.

    Raises
    ------
    ValueError
        If the store has no such model.

    See Also
    --------
    import_vectors : Read the vectors of shards into a store.

    Examples
    --------
    >>> import tempfile
    >>> from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder
    >>> from sklembed.scale import export_vectors
    >>> def load():
    ...     return lambda texts: [[len(text)] for text in texts]
    >>> length = CallableBackend(
    ...     load, name="length", version="1", modality="text", n_features=1
    ... )
    >>> folder = tempfile.mkdtemp()
    >>> store = EmbeddingStore(folder + "/store.sqlite")
    >>> vectors = FrozenEncoder(length, store=store).transform(["to be", "or", "or"])
    >>> export_vectors(store, folder + "/vectors")
    2
    """
    vectors, n_added = Folder.at(path), 0
    with store._connection() as db:
        for number, space in database.spaces(db, model).items():
            if not space.ragged:
                chunks = database.iter_vectors(db, number, space)
                n_added += _export(Shards(vectors, space), chunks)
    return n_added


def _export(shards, chunks):
    """Write the vectors that are not in the shards; return their number."""
    _, index = shards.index()
    shards.folder.create()
    n_added = 0
    for digests, values in chunks:
        is_new = index.find(to_keys(b"".join(digests))) < 0
        digests, values = list(itertools.compress(digests, is_new)), values[is_new]
        if digests:
            shards.write(f"{uuid.uuid4().hex}.parquet", digests, values)
        n_added += len(digests)
    return n_added


def _select(vectors, model):
    """Return the shards of a fingerprint or name, or of all models if it is None."""
    check_is_not_target(vectors)
    matching, names = [], set()
    for name in vectors.folder_names():
        shards = Shards.of_folder(vectors, name)
        if shards is None:
            continue
        names.add(shards.space.names[-1])
        if model in (None, *shards.space.names):
            matching.append(shards)
    if not matching:
        raise ValueError(
            f"{vectors.path} has no vectors of {model or 'any model'!r}. It has vectors "
            f"of {sorted(names)}. Pass the `vectors` of encode_dataset, by default "
            "<target>/_vectors."
        )
    return matching


def check_is_not_target(vectors):
    """Raise an error if a folder of shards is the target of `encode_dataset`."""
    if vectors.exists(MANIFEST):
        raise ValueError(
            f"{vectors.path} is a target of encode_dataset, not a folder of vectors. "
            f"Pass {vectors.folder(VECTORS).path}."
        )


def embedding_name(column):
    """Return the name of the column with the vectors of a column."""
    return f"{column}_embedding"
