"""Load the data sets that install with the package."""

import csv
import io
from importlib import resources
from zipfile import ZipFile

import numpy as np
import pandas as pd
from sklearn.utils import Bunch

_DATA = resources.files(__package__) / "data"


def load_emoji(*, return_X_y: bool = False, as_frame: bool = True) -> Bunch | tuple:
    """Load 1,906 emoji in 9 classes, each with an image, a name and keywords.

    The class is the top-level group of an emoji in Unicode's list, such as "Food &
    Drink".

    Parameters
    ----------
    return_X_y : bool, default=False
        If True, return ``(data, target)`` instead of a Bunch.
    as_frame : bool, default=True
        If True, the data are a DataFrame and the target is a Series. If False, the data
        are an array of Python objects and the target is an array.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        Dictionary-like object with these attributes.

        data : DataFrame or ndarray of shape (1906, 3)
            Columns ``image`` (bytes of a PNG file with alpha, 64 x 64 pixels), ``name``
            and ``keywords`` (separated by commas, or None).
        target : Series or ndarray of shape (1906,)
            The class as an integer, 0 to 8.
        target_names : list of str
            The names of the classes.
        feature_names : list of str
            The names of the columns.
        groups : ndarray of shape (1906,)
            The subgroup of each emoji. Emoji of one subgroup are similar: keep them
            together with :class:`~sklearn.model_selection.StratifiedGroupKFold`.
        frame : DataFrame of shape (1906, 4) or None
            Data and target, if ``as_frame=True``.
        DESCR : str
            The full description.
        license : str
            Sources, licences and changes.
        filename : str
            The path of the file.

    (data, target) : tuple
        If ``return_X_y`` is True.

    Examples
    --------
    >>> from sklembed.datasets import load_emoji
    >>> emoji = load_emoji()
    >>> emoji.data.shape
    (1906, 3)
    >>> emoji.data["name"].iloc[0]
    'keycap: #'
    >>> emoji.target_names[:3]
    ['Activities', 'Animals & Nature', 'Flags']
    """
    return _load("emoji", {}, return_X_y, as_frame)


def load_openclipart(
    *, return_X_y: bool = False, as_frame: bool = True
) -> Bunch | tuple:
    """Load 3,052 pieces of clip art in 14 classes, each with an image and a title.

    Four numbers describe the original SVG file. The class is the top folder of an image
    in the Open Clip Art Library.

    Parameters
    ----------
    return_X_y : bool, default=False
        If True, return ``(data, target)`` instead of a Bunch.
    as_frame : bool, default=True
        If True, the data are a DataFrame and the target is a Series. If False, the data
        are an array of Python objects and the target is an array.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        Dictionary-like object with these attributes.

        data : DataFrame or ndarray of shape (3052, 6)
            Columns ``image`` (bytes of a PNG file with alpha, at most 96 x 96 pixels),
            ``title`` (or None), ``svg_kb`` (size of the SVG file in kilobytes), and
            ``n_path``, ``n_group`` and ``n_gradient`` (its numbers of elements).
        target : Series or ndarray of shape (3052,)
            The class as an integer, 0 to 13.
        target_names : list of str
            The names of the classes.
        feature_names : list of str
            The names of the columns.
        groups : ndarray of shape (3052,)
            The creator of each image, or "unknown". Creators often drew series: keep
            their images together with
            :class:`~sklearn.model_selection.StratifiedGroupKFold`.
        frame : DataFrame of shape (3052, 7) or None
            Data and target, if ``as_frame=True``.
        DESCR : str
            The full description.
        license : str
            Sources, licences and changes.
        filename : str
            The path of the file.

    (data, target) : tuple
        If ``return_X_y`` is True.

    Examples
    --------
    >>> from sklembed.datasets import load_openclipart
    >>> clipart = load_openclipart()
    >>> clipart.data.shape
    (3052, 6)
    >>> clipart.feature_names
    ['image', 'title', 'svg_kb', 'n_path', 'n_group', 'n_gradient']
    >>> clipart.target_names[:3]
    ['animals', 'buildings', 'computer']
    """
    dtypes = {
        "svg_kb": float,
        "n_path": np.int64,
        "n_group": np.int64,
        "n_gradient": np.int64,
    }
    return _load("openclipart", dtypes, return_X_y, as_frame)


def _load(
    name: str, dtypes: dict[str, type], return_X_y: bool, as_frame: bool
) -> Bunch | tuple:
    """Read a data set in the requested form."""
    columns = _read_zip(f"{name}.zip")
    groups = np.array(columns.pop("group"))
    target_names, target = np.unique(columns.pop("target"), return_inverse=True)
    # Text and bytes remain Python objects, whatever the string type of pandas is.
    data = pd.DataFrame(columns, dtype=object).astype(dtypes)
    feature_names, frame = list(data), None
    target = target.astype(np.int64)
    if as_frame:
        target = pd.Series(target, name="target")
        frame = pd.concat([data, target], axis=1)
    else:
        data = data.to_numpy(dtype=object)
    if return_X_y:
        return data, target
    return Bunch(
        data=data,
        target=target,
        target_names=target_names.tolist(),
        feature_names=feature_names,
        groups=groups,
        frame=frame,
        DESCR=(_DATA / f"{name}.rst").read_text(encoding="utf-8"),
        license=_read_license(name),
        filename=str(_DATA / f"{name}.zip"),
    )


def _read_zip(filename: str) -> dict[str, list]:
    """Return the table as columns of text, with None for empty cells, and of images."""
    with (_DATA / filename).open("rb") as file, ZipFile(file) as archive:
        table = archive.read("table.csv").decode("utf-8")
        rows = list(csv.DictReader(io.StringIO(table, newline="")))
        columns = {"image": [archive.read(row.pop("file")) for row in rows]}
    for key in rows[0]:
        columns[key] = [row[key] or None for row in rows]
    return columns


def _read_license(name: str) -> str:
    """Return the part of ``LICENSES.md`` about one data set."""
    text = (_DATA / "LICENSES.md").read_text(encoding="utf-8")
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0].strip()
