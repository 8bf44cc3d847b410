"""The bundled data sets match their descriptions."""

import io
import re
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from sklembed.datasets import load_emoji, load_openclipart, make_composites

LOADERS = [load_emoji, load_openclipart]
SHAPES = {load_emoji: (1906, 3), load_openclipart: (3052, 6)}
TEXT = {load_emoji: ["name", "keywords"], load_openclipart: ["title"]}


@pytest.fixture(scope="module", params=LOADERS, ids=lambda loader: loader.__name__)
def loader(request):
    return request.param


@pytest.fixture(scope="module")
def bunch(loader):
    return loader()


def open_images(bunch):
    for content in bunch.data["image"]:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            yield image


def words(text):
    """Words of a text in the singular, without the "and" of a class name."""
    return {word.removesuffix("s") for word in re.findall("[a-z]+", text.lower())} - {
        "and"
    }


def rows_naming_their_class(bunch, column):
    classes = np.array(bunch.target_names)[bunch.target]
    cells = bunch.data[column]
    return sum(
        bool(words(cell or "") & words(name))
        for cell, name in zip(cells, classes, strict=True)
    )


def test_shapes_and_types(loader, bunch):
    n_rows, n_columns = SHAPES[loader]
    assert bunch.data.shape == (n_rows, n_columns)
    assert bunch.frame.shape == (n_rows, n_columns + 1)
    assert bunch.feature_names == list(bunch.data)
    assert bunch.target.dtype == np.int64
    assert set(bunch.target) == set(range(len(bunch.target_names)))
    assert bunch.target_names == sorted(bunch.target_names)
    assert bunch.groups.shape == (n_rows,)
    assert bunch.groups.dtype.kind == "U"


def test_cells_are_python_objects(loader, bunch):
    """Cells are str, bytes or None, whatever the string type of pandas."""
    assert {type(cell) for cell in bunch.data["image"]} == {bytes}
    for column in TEXT[loader]:
        assert bunch.data[column].dtype == object
        assert {type(cell) for cell in bunch.data[column]} <= {str, type(None)}
        assert all(
            cell is None or cell == " ".join(cell.split()) != ""
            for cell in bunch.data[column]
        )


def test_numbers_of_openclipart():
    data = load_openclipart().data
    assert data["svg_kb"].dtype == np.float64
    assert (data["svg_kb"] > 0).all()
    for column in ["n_path", "n_group", "n_gradient"]:
        assert data[column].dtype == np.int64
        assert (data[column] >= 0).all()


def test_as_frame_and_return_X_y_say_the_same(loader, bunch):
    arrays = loader(as_frame=False)
    assert isinstance(arrays.data, np.ndarray) and arrays.data.dtype == object
    assert isinstance(arrays.target, np.ndarray) and arrays.target.dtype == np.int64
    assert arrays.frame is None
    assert arrays.feature_names == bunch.feature_names
    assert arrays.data.tolist() == bunch.data.to_numpy(dtype=object).tolist()

    X, y = loader(return_X_y=True)
    pd.testing.assert_frame_equal(X, bunch.data)
    pd.testing.assert_series_equal(y, bunch.target)
    pd.testing.assert_frame_equal(pd.concat([X, y], axis=1), bunch.frame)

    X, y = loader(return_X_y=True, as_frame=False)
    assert X.tolist() == arrays.data.tolist()
    np.testing.assert_array_equal(y, arrays.target)


def test_images_open_and_have_alpha(loader, bunch):
    for image in open_images(bunch):
        assert image.format == "PNG"
        assert image.has_transparency_data
        assert image.convert("RGBA").getextrema()[3][1] > 0  # not fully transparent
        if loader is load_emoji:
            assert image.size == (64, 64)
        else:
            assert 16 <= max(image.size) <= 96
            assert image.mode == "P" and len(image.getpalette()) <= 3 * 64


def test_description_counts_the_classes(bunch):
    description = bunch.DESCR
    for label, name in enumerate(bunch.target_names):
        of_class = bunch.target == label
        n_groups = len(set(bunch.groups[of_class]))
        assert re.search(
            rf"^{name} +{of_class.sum()} +{n_groups}$", description, re.MULTILINE
        )
    assert f":Number of Instances: {len(bunch.data)}\n" in description
    assert f":Number of Classes: {len(bunch.target_names)}\n" in description
    assert f":Number of Groups: {len(set(bunch.groups))}\n" in description


def test_description_of_emoji():
    emoji = load_emoji()
    description = " ".join(emoji.DESCR.split())
    keywords = emoji.data["keywords"]
    assert emoji.data["name"].is_unique
    assert f"{keywords.isna().sum()} cells of keywords are None" in description
    assert (
        f"{keywords.dropna().str.split(', ').str.len().mean():.0f} on average"
        in description
    )
    assert f"{(emoji.groups == 'country-flag').sum()} of the 270 flags" in description
    assert f"there are {emoji.data['image'].nunique():,} different ones" in description
    n_names = rows_naming_their_class(emoji, "name")
    assert f"{n_names} names do because" in description
    pairs = pd.DataFrame(
        {"image": emoji.data["image"], "target": emoji.target}
    ).drop_duplicates()
    assert pairs["image"].is_unique  # equal images are of one class


def test_emoji_keywords_never_name_a_class():
    emoji = load_emoji()
    of_classes = set().union(*map(words, emoji.target_names))
    of_keywords = set().union(*map(words, emoji.data["keywords"].dropna()))
    assert not of_classes & of_keywords


def test_emoji_subgroups_are_of_one_class():
    emoji = load_emoji()
    assert (
        len(set(zip(emoji.groups, emoji.target, strict=True)))
        == len(set(emoji.groups))
        == 98
    )


def test_description_of_openclipart():
    clipart = load_openclipart()
    description = " ".join(clipart.DESCR.split())
    title = clipart.data["title"]
    creators, titles = Counter(clipart.groups), Counter(title.dropna())
    n_series = sum(count >= 20 for count in titles.values())
    assert f"{title.isna().sum()} titles are None" in description
    assert f"in {title.isna().sum()} rows" in description
    assert f"{titles['card']} playing cards" in description
    assert f"The {creators['unknown']} images without a creator" in description
    assert f"drew {creators.most_common(1)[0][1]} of the images" in description
    assert f"{rows_naming_their_class(clipart, 'title')} contain a word" in description
    assert f"{len(titles):,} different ones, and {n_series} of them" in description
    assert clipart.data["image"].is_unique


@pytest.mark.parametrize("random_state", range(3))
def test_every_class_can_be_split_by_group(bunch, random_state):
    """Three folds by group: each class is in every training set."""
    cv = StratifiedGroupKFold(3, shuffle=True, random_state=random_state)
    for train, _ in cv.split(bunch.data, bunch.target, bunch.groups):
        assert len(set(bunch.target.iloc[train])) == len(bunch.target_names)


def test_licences_are_there():
    emoji, clipart = load_emoji().license, load_openclipart().license
    apache = (
        Path(load_emoji().filename)
        .with_name("APACHE-2.0.txt")
        .read_text(encoding="utf-8")
    )
    assert "END OF TERMS AND CONDITIONS" in apache
    for phrase in [
        "Apache License, Version 2.0",
        "Google Inc.",
        "Cal Henderson",
        "Miles Johnson",
        "UNICODE LICENSE V3",
        "*Changes:*",
    ]:
        assert phrase in " ".join(emoji.split())
    assert "public domain" in clipart and "*Changes:*" in clipart
    assert "Apache" not in clipart


def test_files_are_small_and_plain():
    """Files are plain archives without timestamps, so that builds are reproducible."""
    paths = [Path(loader().filename) for loader in LOADERS]
    assert sum(path.stat().st_size for path in paths) <= 12e6
    for path in paths:
        with ZipFile(path) as archive:
            assert archive.testzip() is None
            names = archive.namelist()
            assert names == ["table.csv", *sorted(names[1:])]
            assert {entry.date_time[0] for entry in archive.infolist()} == {1980}


# Images with masks


def test_composites_are_what_they_say():
    made = make_composites(40, image_size=48, random_state=0)
    assert all(
        p.shape == (48, 48, 3) and p.dtype == np.uint8 for p in made.data["image"]
    )
    assert all(m.shape == (48, 48) and m.dtype == np.uint8 for m in made.target)
    assert made.target_names == ["background", "object"]
    assert {value for mask in made.target for value in np.unique(mask)} == {0, 1}
    empty = [not mask.any() for mask in made.target]
    assert sum(empty) == 10
    shares = [mask.mean() for mask in made.target if mask.any()]
    assert 0.005 < min(shares) and max(shares) < 0.65
    assert set(made.groups) <= set(load_emoji().groups)


def test_equal_seeds_make_equal_composites():
    one, same, other = (
        make_composites(6, image_size=32, random_state=s) for s in (3, 3, 4)
    )
    assert all(
        (a == b).all()
        for a, b in zip(one.data["image"], same.data["image"], strict=True)
    )
    assert all((a == b).all() for a, b in zip(one.target, same.target, strict=True))
    assert any(
        (a != b).any()
        for a, b in zip(one.data["image"], other.data["image"], strict=True)
    )


def test_masks_hold_classes_where_asked():
    of_classes = {"objects": "openclipart", "target": "class", "empty_fraction": 0}
    made = make_composites(60, image_size=32, random_state=0, **of_classes)
    assert made.target_names == ["background", *load_openclipart().target_names]
    assert all(len(np.unique(mask[mask > 0])) == 1 for mask in made.target)
    assert max(mask.max() for mask in made.target) < len(made.target_names)


def test_no_two_groups_share_their_textures():
    made = make_composites(60, image_size=32, empty_fraction=1, random_state=0)
    means = pd.DataFrame([image.mean(axis=(0, 1)) for image in made.data["image"]])
    within = means.groupby(made.groups).transform("mean")
    several = pd.Series(made.groups).duplicated(keep=False).to_numpy()
    assert ((means - within)[several].abs().mean() < 0.3 * means.std()).all()


def test_a_drawing_is_used_again_only_when_all_have_been():
    made = make_composites(1906, image_size=16, random_state=0)
    assert Counter(made.groups) == Counter(load_emoji().groups)


@pytest.mark.parametrize(
    "options", [{"n_samples": 0}, {"objects": "cats"}, {"empty_fraction": 2}]
)
def test_composites_of_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_composites(**options)
