"""Nearest rows of a table by the vectors of its cells, and thresholds of near duplicates."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import beta
from sklearn.base import clone
from sklearn.utils import gen_batches
from sklearn.utils.validation import check_consistent_length

from sklembed._table.blocks import resolve_blocks
from sklembed._table.columns import as_frame, is_frame
from sklembed._table.tokens import average_tokens
from sklembed._validation import sorted_labels
from sklembed.encoders.cells import decode
from sklembed.encoders.prefetch import contains_encoder, list_jobs

ALL = "(all)"  # the name of the space of all columns together
_SHRINKAGE = 0.1  # of variances, before whitening
_BLOCK_CELLS = 2**22  # similarities in memory at once: 16 MiB
_N_QUERIES = 2000  # rows whose neighbours determine a threshold
_NEAR, _FAR = 5, 20  # ranks of these neighbours
_LEAST_QUERIES = 30
# Largest share of rows with equal neighbours, of all columns together and of one of
# several columns.
_MOST_EQUAL, _MOST_EQUAL_OF_COLUMN = 0.5, 0.1
_LEAST_WIDTH = 16  # columns of a block of embeddings; narrower ones are table columns
_SIDE = 12  # of thumbnails, in pixels
_INNER = 0.88  # part of each side of an image in the thumbnail of its inner part


@dataclass
class Space:
    """The vectors by which the rows of a table are compared.

    `rows` are the observed rows of the table, `vectors` have unit length, and equal
    `codes` mean cells of equal content. `cells` is None for blocks of embeddings.
    `thumbnails`, of shape (2, n_rows, n_values), are the vectors of the pixels of images
    and of their inner parts. The space of all columns has no vectors but `columns`, the
    spaces of each column.
    """

    name: str
    modality: str
    rows: np.ndarray
    vectors: np.ndarray | None
    codes: np.ndarray
    cells: list | None = None
    thumbnails: np.ndarray | None = None
    columns: tuple = ()

    def similarities(self, rows):
        """Return the cosines of some of the rows with all rows.

        The cosine of two images is the mean of two: of embeddings and of pixels. The
        cosine of pixels is the largest of the two images, and of one image and the inner
        part of the other.
        """
        if self.columns:
            of_columns = [column.similarities(rows) for column in self.columns]
            return sum(of_columns) / len(of_columns)
        similarities = self.vectors[rows] @ self.vectors.T
        if self.thumbnails is None:
            return similarities
        images, inner_parts = self.thumbnails
        of_pixels = images[rows] @ images.T
        np.maximum(of_pixels, images[rows] @ inner_parts.T, out=of_pixels)
        np.maximum(of_pixels, inner_parts[rows] @ images.T, out=of_pixels)
        return (similarities + of_pixels) / 2

    def take(self, positions):
        """Return a space of some of the rows, without cells."""
        thumbnails = self.thumbnails
        if thumbnails is not None:
            thumbnails = thumbnails[:, positions]
        rows, vectors = self.rows[positions], self.vectors[positions]
        codes = self.codes[positions]
        return replace(
            self,
            rows=rows,
            vectors=vectors,
            codes=codes,
            cells=None,
            thumbnails=thumbnails,
        )

    def positions(self, n_rows):
        """Return the position of each row of the table, -1 if it is missing."""
        positions = np.full(n_rows, -1, dtype=np.intp)
        positions[self.rows] = np.arange(len(self.rows))
        return positions


class Components:
    """Connected components of rows, updated by lists of pairs."""

    def __init__(self, n_rows):
        self.labels = np.arange(n_rows)

    def join(self, rows, others):
        """Join the components of each pair of rows."""
        pairs = self.labels[rows], self.labels[others]
        shape = len(self.labels), len(self.labels)
        graph = coo_matrix((np.ones(len(rows), dtype=bool), pairs), shape=shape)
        _, merged = connected_components(graph, directed=False)
        self.labels = merged[self.labels]

    def join_equal(self, rows, codes):
        """Join rows of equal code."""
        _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        self.join(rows, rows[first[inverse]])

    def groups(self):
        """Return the number of each row's component, in the order of first rows."""
        return pd.factorize(self.labels)[0].astype(np.intp)


def make_spaces(estimator, X, vectors):
    """Return the vectors to compare, and the columns of X that are no embeddings."""
    if vectors is not None:
        spaces = []
        for name, values in vectors.items():
            check_consistent_length(X, values)
            spaces.append(_block_space(str(name), np.asarray(values)))
        return spaces, _as_positional_frame(X)
    if contains_encoder(estimator):
        table = _as_positional_frame(X)
        return _encoder_spaces(estimator, table), table
    spaces, table = _spaces_of_blocks(estimator, X)
    if not spaces:
        warnings.warn(
            "There are no embeddings to compare: the estimator contains no "
            f"FrozenEncoder, and X has no block of at least {_LEAST_WIDTH} numbers. "
            "Only equal rows and single columns are examined. Put the encoders into the "
            "estimator, or pass vectors.",
            UserWarning,
            stacklevel=3,
        )
    return spaces, table


def _as_positional_frame(X):
    """Return X as a DataFrame whose index is the position of the rows."""
    return as_frame(X).reset_index(drop=True)


def _encoder_spaces(estimator, table):
    """Encode the cells of each encoder, or read their vectors from its store."""
    jobs, names = [], []
    for path, encoder, part in list_jobs(estimator, table):
        name = getattr(part, "name", None)
        if is_frame(part):
            name = part.columns[0]
        names.append(path if name is None else str(name))
        jobs.append((path, clone(encoder), part))
    spaces, keys = [], set()
    for name, (path, encoder, part) in zip(names, jobs, strict=True):
        # By its steps, `fit_transform` and `digests` would hash all cells twice.
        column, backend, space = encoder._validate(part, fitting=True)
        encoder._fit(column, backend, space)
        key = encoder.fingerprint(), tuple(column.keys)
        if key in keys:  # the same encoder and cells, in another candidate of a search
            continue
        keys.add(key)
        vectors = encoder._transform(column, backend, space)
        if vectors.dtype == object:
            vectors = average_tokens(vectors[:, 0], encoder.space_["n_features"])
        observed = np.flatnonzero(~np.isnan(vectors).any(axis=1))
        cells = part.iloc[:, 0] if is_frame(part) else pd.Series(part)
        space = Space(
            name=path if names.count(name) > 1 else name,
            modality=encoder.space_["modality"],
            rows=_rows_of(part, len(table), path)[observed],
            vectors=_prepare(vectors[observed], encoder.space_["modality"]),
            codes=pd.factorize(np.array(column.keys, dtype=object)[observed])[0],
            cells=cells.iloc[observed].tolist(),
        )
        if space.modality == "image" and len(observed):
            space.thumbnails = _thumbnails(space)
        spaces.append(space)
    return spaces


def _thumbnails(space):
    """Return the whitened pixels of images and of their inner parts.

    Embeddings of drawings change with the quality of a file. Pixels of small images do
    not, but they change with the frame.
    """
    _, first, inverse = np.unique(space.codes, return_index=True, return_inverse=True)
    pixels = np.empty((2, len(first), 3 * _SIDE**2), dtype=np.float32)
    for number, position in enumerate(first):
        image = decode(space.cells[position], "image", min_size=_SIDE)
        pixels[:, number] = _thumbnail(image, 1), _thumbnail(image, _INNER)
    mean, directions = _whitening(pixels[0][inverse])
    whitened = [_as_unit((part - mean) @ directions)[inverse] for part in pixels]
    return np.stack(whitened)


def _thumbnail(image, share):
    """Return the pixels of the reduced inner part of an image, as one row."""
    margins = np.multiply((1 - share) / 2, image.size)
    box = (*margins, *(image.size - margins))
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX, box=box)
    return np.asarray(small, dtype=np.float32).ravel()


def _rows_of(part, n_rows, path):
    """Return the rows of the table that the input of an encoder contains."""
    if len(part) == n_rows:
        return np.arange(n_rows)
    if not hasattr(part, "iloc"):
        raise ValueError(
            f"The input of the encoder {path!r} has {len(part)} of {n_rows} rows and no "
            "index, so they cannot be matched with the rows of X. Pass vectors, or let "
            "the steps before the encoder return DataFrames."
        )
    return part.index.to_numpy()


def _prepare(vectors, modality):
    """Return vectors of unit length, whitened unless they are embeddings of texts.

    Sentence encoders are trained for the cosine. The other vectors have a few
    directions of large variance, in which unrelated rows are similar.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    if modality == "text" or len(vectors) < 2:
        return _as_unit(vectors)
    mean, directions = _whitening(vectors)
    return _as_unit((vectors - mean) @ directions)


def _whitening(vectors):
    """Return the mean and the matrix that make vectors white."""
    mean = vectors.mean(axis=0)
    centred = vectors - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(vectors))
    variances = np.maximum(variances, 0) + _SHRINKAGE * variances.mean()
    scale = np.sqrt(np.maximum(variances, np.finfo(np.float32).tiny))
    return mean, directions / scale


def join_spaces(spaces, n_rows):
    """Return a space of all columns, in which the cosine is the mean over columns."""
    if len(spaces) < 2:
        return []
    codes = np.zeros(n_rows, dtype=np.intp)
    for space in spaces:
        of_column = np.zeros(n_rows, dtype=np.intp)  # 0 is a missing cell
        of_column[space.rows] = space.codes + 1
        codes = pd.factorize(codes * (of_column.max() + 1) + of_column)[0]
    # A row without an image would be as near as its text alone.
    complete = np.arange(n_rows)
    for space in spaces:
        complete = np.intersect1d(complete, space.rows)
    columns = []
    for space in spaces:
        columns.append(space.take(space.positions(n_rows)[complete]))
    joint = Space(ALL, "all", complete, None, codes[complete], columns=tuple(columns))
    return [joint]


def _as_unit(vectors):
    """Return vectors of unit length; zero vectors stay zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def _spaces_of_blocks(estimator, X):
    """Return the blocks of a table of embeddings, and its other columns."""
    table = _as_positional_frame(X)
    numeric = table.select_dtypes("number")
    names = [str(name) for name in table.columns]
    blocks = {}
    for name, value in estimator.get_params(deep=True).items():
        if name.split("__")[-1] == "blocks" and isinstance(value, Mapping):
            blocks = resolve_blocks(value, names, table.shape[1], table)
    if not blocks and numeric.shape[1] == table.shape[1]:
        blocks = {"X": slice(0, table.shape[1])}
        if all("__" in name for name in names):
            blocks = resolve_blocks(None, names, table.shape[1])
    spaces, compared = [], np.zeros(table.shape[1], dtype=bool)
    for name, columns in blocks.items():
        values = table.iloc[:, columns]
        if values.shape[1] >= _LEAST_WIDTH:
            compared[columns] = True
            spaces.append(_block_space(str(name), values.to_numpy(dtype=np.float32)))
    return spaces, table.loc[:, ~compared]


def _block_space(name, values):
    """Return a block of embeddings as a space; rows with NaN are missing."""
    observed = np.flatnonzero(~np.isnan(values).any(axis=1))
    values = np.ascontiguousarray(values[observed])
    as_bytes = [row.tobytes() for row in values]
    codes = pd.factorize(np.array(as_bytes, dtype=object))[0]
    return Space(name, "vectors", observed, _prepare(values, "vectors"), codes)


def find_thresholds(spaces, y, groups, classes, threshold, false_alarms):
    """Return a table of the threshold of each space, and of its estimates."""
    names = [space.name for space in spaces]
    passed = threshold
    if not isinstance(threshold, Mapping):
        passed = dict.fromkeys(names, threshold)
    unknown = [name for name in passed if name not in names]
    if unknown:
        raise ValueError(
            f"threshold names the columns {unknown}, but the columns that are compared "
            f"are {names}."
        )
    records = []
    for space in spaces:
        limit = passed.get(space.name, "auto")
        record = {"column": space.name, "modality": space.modality}
        if isinstance(limit, str) and limit == "auto":
            alpha, most_equal = false_alarms / len(spaces), _MOST_EQUAL
            if space.name != ALL:
                alpha /= max(len(space.rows), 1)
                if len(spaces) > 1:
                    most_equal = _MOST_EQUAL_OF_COLUMN
            record |= _estimate_threshold(space, y, groups, classes, alpha, most_equal)
        elif not isinstance(limit, Real) or isinstance(limit, bool):
            raise TypeError(
                f"threshold must be 'auto', a number, or a dict of these; got {limit!r} "
                f"for {space.name!r}."
            )
        elif not 0 <= limit <= 2:
            raise ValueError(
                "threshold must be a cosine distance between 0 and 2; got "
                f"{limit!r} for {space.name!r}."
            )
        else:
            record["threshold"] = float(limit)
        records.append(record)
    fields = ["column", "modality", "threshold", "typical distance", "dimension"]
    table = pd.DataFrame(records, columns=[*fields, "n_rows"])
    return table.set_index("column")


def _estimate_threshold(space, y, groups, classes, alpha, most_equal):
    """Estimate the threshold from distances within classes; see `leak_report`."""
    labels = np.zeros(len(space.rows), dtype=np.intp)
    if classes:
        labels = sorted_labels(y[space.rows])[1]
    relatives = np.arange(len(space.rows))
    if groups is not None:
        relatives = pd.factorize(np.asarray(groups)[space.rows])[0]
    near, far = _ranked_distances(space, labels, relatives)
    if len(far) < _LEAST_QUERIES and classes:  # classes are small
        near, far = _ranked_distances(space, np.zeros_like(labels), relatives)
    record = {"threshold": 0.0, "n_rows": len(far)}
    if len(far) < _LEAST_QUERIES:
        warnings.warn(
            f"Only {len(far)} rows of column {space.name!r} have {_FAR} neighbours, too "
            "few to estimate a threshold, so only equal cells are compared. Pass "
            "threshold.",
            UserWarning,
            stacklevel=4,
        )
        return record
    typical = np.median(far)
    record["typical distance"] = typical**2 / 2
    distinct_rows = near > 0
    if np.mean(~distinct_rows) < most_equal:
        log_ratio = np.median(np.log(near[distinct_rows] / far[distinct_rows]))
        expected = np.log(beta.median(_NEAR, _FAR - _NEAR))
        record["dimension"] = expected / min(log_ratio, -np.finfo(float).eps)
        share = beta.ppf(alpha, 1, _FAR - 1) ** (1 / record["dimension"])
        record["threshold"] = (typical * share) ** 2 / 2
    return record


def _ranked_distances(space, labels, relatives):
    """Return the distances to two neighbours of the same label that are no relatives.

    Parameters
    ----------
    space : Space
        The vectors.
    labels, relatives : ndarray of shape (n_rows,)
        Class and group of each row.

    Returns
    -------
    near, far : ndarray of shape (n_queries,)
        Euclidean distances to the neighbours of rank `_NEAR` and `_FAR`, of rows that
        are spread evenly over the table; rows with fewer neighbours are omitted.
    """
    n_rows = len(labels)
    n_queries = min(n_rows, _N_QUERIES)
    queries = np.linspace(0, n_rows - 1, n_queries).astype(np.intp)
    near, far = [np.empty(0)], [np.empty(0)]
    if n_rows <= _FAR:
        return near[0], far[0]
    for block in gen_batches(n_queries, max(1, _BLOCK_CELLS // n_rows)):
        rows = queries[block]
        squared = 2 - 2 * space.similarities(rows)
        excluded = labels[rows, None] != labels
        excluded |= relatives[rows, None] == relatives
        squared[excluded] = np.inf
        ranked = np.partition(squared, [_NEAR - 1, _FAR - 1], axis=1)
        ranked = ranked[np.isfinite(ranked[:, _FAR - 1])]
        # Rounding errors of equal vectors are below 1e-6.
        ranked[ranked < 1e-6] = 0
        near.append(np.sqrt(ranked[:, _NEAR - 1]))
        far.append(np.sqrt(ranked[:, _FAR - 1]))
    return np.concatenate(near), np.concatenate(far)


def no_nearest():
    """Return an empty table of nearest neighbours, with its dtypes."""
    dtypes = {"column": object, "fold": int, "row": int, "nearest": int}
    dtypes |= {"distance": float, "equal": bool, "leaked": bool}
    return pd.DataFrame(columns=list(dtypes)).astype(dtypes)


def nearest_across_folds(space, folds, limit, components):
    """Find the nearest training row of each test row, and join near duplicates.

    Parameters
    ----------
    space : Space
        The vectors.
    folds : list of (train, test)
        Rows of the table.
    limit : float
        The threshold.
    components : Components
        Updated by all pairs of rows below the threshold, also within folds.

    Returns
    -------
    nearest : DataFrame
        The columns of `LeakReport.nearest_` before "same target".
    """
    n_rows = max(max(train.max(), test.max()) for train, test in folds) + 1
    positions = space.positions(max(n_rows, space.rows.max(initial=-1) + 1))
    pieces = []
    for number, (train, test) in enumerate(folds):
        train, test = positions[train], positions[test]
        train, test = np.sort(train[train >= 0]), np.sort(test[test >= 0])
        if len(train) and len(test):
            nearest = np.empty(len(test), dtype=np.intp)
            pieces.append((number, train, test, nearest, np.empty(len(test))))
    if limit > 0:
        components.join_equal(space.rows, space.codes)
    for block in gen_batches(
        len(space.rows), max(1, _BLOCK_CELLS // max(len(space.rows), 1))
    ):
        similarity = space.similarities(block)
        if limit > 0:
            rows, others = np.nonzero(similarity > 1 - limit)
            components.join(space.rows[block.start + rows], space.rows[others])
        for _, train, test, nearest, distance in pieces:
            part = slice(*np.searchsorted(test, [block.start, block.stop]))
            to_train = similarity[test[part] - block.start][:, train]
            best = to_train.argmax(axis=1)
            nearest[part] = train[best]
            distance[part] = 1 - to_train[np.arange(len(best)), best]
    tables = [no_nearest()]
    for number, train, test, nearest, distance in pieces:
        equal = _set_equal(space.codes, train, test, nearest)
        distance = np.where(equal, 0, np.maximum(distance, 0))
        columns = {
            "column": space.name,
            "fold": number,
            "row": space.rows[test],
            "nearest": space.rows[nearest],
            "distance": distance,
            "equal": equal,
            "leaked": distance < limit,
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _set_equal(codes, train, test, nearest):
    """Set the nearest row of test cells that equal a training cell; return their mask."""
    first = np.full(codes.max() + 1, -1, dtype=np.intp)
    first[codes[train[::-1]]] = train[::-1]
    equal_row = first[codes[test]]
    equal = equal_row >= 0
    nearest[equal] = equal_row[equal]
    return equal
