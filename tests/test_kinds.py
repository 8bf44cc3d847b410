"""The kind of each column of a table of real-looking columns, in pandas and polars."""

import base64
import datetime
import decimal
import functools
import io
import json
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sklembed import MultimodalVectorizer
from sklembed.vectorizer.kinds import KINDS, read_column
from sklembed.vectorizer.parsing import (
    find_date_format,
    parse_boolean,
    parse_column,
    parse_number,
)

FOLDER = Path(tempfile.mkdtemp(prefix="sklembed-photos-"))
N_ROWS = [30, 200, 2500]

WORDS = (
    "silver river quiet garden broken window yellow engine paper lantern winter market "
    "little station golden harbour morning forest empty bottle green shadow old bridge"
).split()
GERMAN = "der Zug hält heute nicht am Bahnhof weil die Weiche im Schnee festgefroren ist".split()
FRENCH = (
    "la vieille maison au bord du lac est vendue depuis hier soir sans témoin".split()
)
RUSSIAN = "старый дом стоит на берегу тихой реки рядом с лесом и дорогой".split()
CHINESE = "今天天气很好我们一起去公园散步然后回家吃饭看书睡觉"
JAPANESE = "今日はとても天気がいいので公園へ散歩に行きましょう"
FIRST = (
    "Anna Omar Li Sofia Jonas Priya Mateo Chloe Ivan Noor Emma Lucas Aiko Zoe".split()
)
LAST = "Smith Garcia Müller Tanaka Okafor Rossi Novak Dubois Silva Kim Haddad".split()
CITIES = (
    "Paris Lima Oslo Cairo Delhi Quito Turin Lagos Seoul Minsk Havana Prague Dublin "
    "Naples Boston Dallas Kyoto Accra Tunis Malaga Porto Ghent Basel Graz Bergen Vienna "
    "Krakow Zagreb Riga Tallinn Vilnius Sofia Athens Izmir Ankara Beirut Amman Doha "
    "Muscat Sanaa Tehran Kabul Lahore Karachi Mumbai Chennai Dhaka Yangon Hanoi Manila"
).split()


def png(number):
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sparse(cells, share=0.3):
    """Set a share of the cells to None, evenly."""
    step = int(1 / share)
    return [None if i % step == 0 else cell for i, cell in enumerate(cells)]


@functools.cache
def make_columns(n):
    """Return cells and the expected kind of each column, by name."""
    rng = np.random.default_rng(n)

    def words(vocabulary, low, high, sep=" "):
        return [
            sep.join(rng.choice(vocabulary, rng.integers(low, high))) for _ in range(n)
        ]

    def days(form):
        start = datetime.date(2019, 1, 1)
        return [
            (start + datetime.timedelta(int(d))).strftime(form)
            for d in rng.integers(0, 2000, n)
        ]

    def pick(values):
        return rng.choice(values, n).tolist()

    money = rng.lognormal(5, 2, n).round(2)
    ids = rng.permutation(10**6)[:n]
    paths = []
    for i in range(min(n, 40)):
        path = FOLDER / f"photo_{i}.png"
        if not path.exists():
            path.write_bytes(png(i))
        paths.append(str(path))
    image_bytes = [png(i % 40) for i in range(n)]
    columns = {
        # free text
        "review": (words(WORDS, 8, 30), "text"),
        "title": (words(WORDS, 2, 6), "text"),
        "emoji_name": (
            [
                f"{WORDS[i % 24]}{i}" if i % 3 == 0 else f"{rng.choice(WORDS)} face {i}"
                for i in range(n)
            ],
            "text",
        ),
        "german": (words(GERMAN, 5, 12), "text"),
        "french": (words(FRENCH, 5, 12), "text"),
        "russian": (words(RUSSIAN, 5, 12), "text"),
        "chinese": (
            ["".join(rng.choice(list(CHINESE), 12)) for _ in range(n)],
            "text",
        ),
        "japanese": (
            ["".join(rng.choice(list(JAPANESE), 12)) for _ in range(n)],
            "text",
        ),
        "mixed_language": (
            [
                " ".join(rng.choice((GERMAN, FRENCH[:13], WORDS[:13])[i % 3][:13], 6))
                for i in range(n)
            ],
            "text",
        ),
        "sparse_note": (
            [
                f"{a} please" if i % 8 == 0 else None
                for i, a in enumerate(words(WORDS, 3, 9))
            ],
            "text",
        ),
        "html": ([f"<p>{w}</p>" for w in words(WORDS, 5, 9)], "text"),
        "address": (
            [
                f"{rng.integers(1, 99)} {a} Street {c}"
                for a, c in zip(words(WORDS, 1, 3), pick(CITIES), strict=True)
            ],
            "text",
        ),
        "keywords": (words(WORDS, 3, 7, ", "), "text"),
        "string_dtype_text": (
            pd.Series(words(WORDS, 4, 9), dtype="string"),
            "text",
        ),
        # names and codes
        "sku": (
            [
                f"{c}-{k:04d}"
                for c, k in zip(pick(["AB", "CD", "XY"]), ids % 10**4, strict=True)
            ],
            "name",
        ),
        "email": (
            [
                f"{a}.{b}{i}@example.com".lower()
                for i, (a, b) in enumerate(zip(pick(FIRST), pick(LAST), strict=True))
            ],
            "name",
        ),
        "url": (
            [f"https://example.com/{a}/{i}.jpg" for i, a in enumerate(pick(WORDS))],
            "name",
        ),
        "phone": (
            [
                f"+1-{a}-{b:04d}"
                for a, b in zip(
                    pick([202, 303, 415, 212]), rng.integers(0, 9999, n), strict=True
                )
            ],
            "name",
        ),
        "zip_text": ([f"{z:05d}" for z in rng.integers(501, 99950, n)], "name"),
        "json": (
            [
                json.dumps({"a": int(a), "tag": t})
                for a, t in zip(ids, pick(WORDS), strict=True)
            ],
            "name",
        ),
        "username": (
            [
                f"{a.lower()}{b}"
                for a, b in zip(pick(FIRST + LAST), rng.integers(0, 99, n), strict=True)
            ],
            "name",
        ),
        "surname": (
            [
                f"{rng.choice(LAST)}{rng.choice(['', 'son', 'ez', 'ova', 'sen'])}"
                + "aeiou"[i % 5]
                for i in range(n)
            ],
            "name",
        ),
        "ip_address": (
            [f"192.168.{a}.{b}" for a, b in rng.integers(0, 255, (n, 2))],
            "name",
        ),
        "icd_code": (
            [
                f"{rng.choice(list('EIJK'))}{a}.{b}"
                for a, b in zip(
                    rng.integers(10, 99, n), rng.integers(0, 9, n), strict=True
                )
            ],
            "name",
        ),
        "version": (
            [f"{a}.{b}.{c}" for a, b, c in rng.integers(0, 20, (n, 3))],
            "name",
        ),
        "missing_file": ([f"gone/photo_{i}.png" for i in range(n)], "name"),
        "clock": (
            [
                f"{a:02d}:{b:02d}"
                for a, b in zip(
                    rng.integers(0, 24, n), rng.integers(0, 60, n), strict=True
                )
            ],
            "name",
        ),
        # dates
        "date_iso": (days("%Y-%m-%d"), "datetime"),
        "date_us": (days("%m/%d/%Y"), "datetime"),
        "date_german": (days("%d.%m.%Y"), "datetime"),
        "date_words": (days("%B %d, %Y"), "datetime"),
        "date_short": (days("%d-%b-%y"), "datetime"),
        "date_digits": (days("%Y%m%d"), "datetime"),
        "date_integers": ([int(d) for d in days("%Y%m%d")], "datetime"),
        "timestamp": (days("%Y-%m-%dT08:%d:00Z"), "datetime"),
        "date_sparse": (sparse(days("%d/%m/%Y")), "datetime"),
        "date_dirty": (
            ["unknown" if i % 20 == 0 else d for i, d in enumerate(days("%Y-%m-%d"))],
            "datetime",
        ),
        "date_objects": (
            [datetime.date(2020, 1 + i % 12, 1 + i % 27) for i in range(n)],
            "datetime",
        ),
        "date_dtype": (pd.Series(pd.to_datetime(days("%Y-%m-%d"))), "datetime"),
        "date_zone": (
            pd.Series(pd.to_datetime(days("%Y-%m-%d"))).dt.tz_localize("Europe/Paris"),
            "datetime",
        ),
        # numbers
        "price_dollar": ([f"${m:,.2f}" for m in money], "numeric"),
        "price_euro": (
            [f"{m:_.2f} €".replace(".", ",").replace("_", ".") for m in money],
            "numeric",
        ),
        "price_code": ([f"USD {m:.2f}" for m in money], "numeric"),
        "balance": (
            [f"({m:,.2f})" if i % 4 == 0 else f"{m:,.2f}" for i, m in enumerate(money)],
            "numeric",
        ),
        "percent": ([f"{p} %" for p in rng.integers(0, 101, n)], "numeric"),
        "number_text": ([str(v) for v in rng.normal(size=n).round(3)], "numeric"),
        "number_dirty": (
            [
                "n/a" if i % 7 == 0 else str(v)
                for i, v in enumerate(rng.integers(0, 500, n))
            ],
            "numeric",
        ),
        "scientific": ([f"{m:.3e}" for m in money], "numeric"),
        "rating": (pick([1, 2, 3, 4, 5]), "numeric"),
        "rating_half": (pick([1.0, 1.5, 2.0, 4.5, None]), "numeric"),
        "count": (rng.poisson(30, n).tolist(), "numeric"),
        "population": ((ids * 7 + 1000).tolist(), "numeric"),
        "unique_price": (rng.permutation(50 * n)[:n].tolist(), "numeric"),
        "rank": (rng.permutation(n).tolist(), "numeric"),
        "zip_number": (rng.integers(10000, 99999, n).tolist(), "numeric"),
        "latitude": (rng.uniform(-90, 90, n).tolist(), "numeric"),
        "nullable_int": (
            pd.Series(sparse(rng.integers(0, 90, n).tolist()), dtype="Int64"),
            "numeric",
        ),
        "nullable_float": (
            pd.Series(sparse(rng.normal(size=n).tolist()), dtype="Float64"),
            "numeric",
        ),
        "float32": (pd.Series(rng.normal(size=n), dtype="float32"), "numeric"),
        "decimals": ([decimal.Decimal(str(m)) for m in money], "numeric"),
        "duration": (
            pd.Series(pd.to_timedelta(rng.integers(1, 9999, n), unit="s")),
            "numeric",
        ),
        # categories
        "colour": (pick(["red", "green", "blue"]), "categorical"),
        "size_label": (pick(["S", "M", "L", "XL"]), "categorical"),
        "country_of_few": (pick(CITIES[:8]), "categorical"),
        "satisfaction": (
            pick(["very good", "rather good", "not so good"]),
            "categorical",
        ),
        "category_dtype": (
            pd.Series(pick(["ant", "bee", "cow"]), dtype="category"),
            "categorical",
        ),
        "category_integers": (
            pd.Series(pick([3, 7, 11]), dtype="category"),
            "categorical",
        ),
        "flag_or_missing": (sparse(["late"] * n), "categorical"),
        "grade_text": (pick(["1a", "1b", "2a", "2b"]), "categorical"),
        # booleans
        "bool_python": (pick([True, False]), "boolean"),
        "bool_yes": (pick(["yes", "no"]), "boolean"),
        "bool_true": (pick(["True", "False"]), "boolean"),
        "bool_letter": (pick(["Y", "N"]), "boolean"),
        "bool_01": (pick([0, 1]), "boolean"),
        "bool_01_text": (pick(["0", "1"]), "boolean"),
        "bool_float": (sparse(pick([0.0, 1.0])), "boolean"),
        "bool_nullable": (
            pd.Series(sparse(pick([True, False])), dtype="boolean"),
            "boolean",
        ),
        "bool_unknown": (
            ["unknown" if i % 9 == 0 else v for i, v in enumerate(pick(["yes", "no"]))],
            "boolean",
        ),
        # images
        "image_bytes": (image_bytes, "image"),
        "image_path": ([paths[i % len(paths)] for i in range(n)], "image"),
        "image_dict": ([{"bytes": b, "path": None} for b in image_bytes], "image"),
        "image_base64": ([base64.b64encode(b).decode() for b in image_bytes], "image"),
        "image_uri": (
            [
                "data:image/png;base64," + base64.b64encode(b).decode()
                for b in image_bytes
            ],
            "image",
        ),
        "image_array": (
            [np.full((4, 4, 3), i % 50, dtype=np.uint8) for i in range(n)],
            "image",
        ),
        "image_pil": (
            [Image.new("RGB", (4, 4), (i % 50, 0, 0)) for i in range(n)],
            "image",
        ),
        "image_sparse": (sparse(image_bytes), "image"),
        # dropped
        "constant": (["same"] * n, "dropped"),
        "constant_number": ([3.5] * n, "dropped"),
        "all_missing": ([None] * n, "dropped"),
        "all_blank": (["", " "] * (n // 2), "dropped"),
        "row_number": (list(range(n)), "dropped"),
        "shuffled_counter": ((rng.permutation(n) + 5000).tolist(), "dropped"),
        "customer_id": (ids.tolist(), "dropped"),
        "orderId": ([str(i + 10**5) for i in ids], "dropped"),
        "uuid": (
            [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(n)],
            "dropped",
        ),
        "sha1": ([rng.bytes(20).hex() for _ in range(n)], "dropped"),
        "serial_text": ([f"SN{i:07d}" for i in ids], "dropped"),
        "barcode": ([str(4 * 10**12 + 977 * int(i)) for i in ids], "dropped"),
        "pickles": ([bytes([i % 250, 1, 2, 3]) for i in range(n)], "dropped"),
    }
    return columns


NAMES = list(make_columns(30))
# Not a type of polars, or read by polars as another one.
NOT_IN_POLARS = {"image_array", "image_pil", "category_integers"}


def test_the_table_has_all_kinds_and_many_columns():
    expected = [kind for _, kind in make_columns(30).values()]
    assert len(expected) >= 90
    assert set(expected) == set(KINDS)


@pytest.mark.parametrize("n", N_ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_the_kind_of_a_column(name, n):
    cells, expected = make_columns(n)[name]
    reading = read_column(pd.Series(cells), name)
    assert reading.kind == expected, reading.reason
    assert reading.reason
    observed = pd.Series(cells).dropna()
    assert reading.n_missing == (n if name == "all_blank" else n - len(observed))


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_IN_POLARS))
def test_the_kind_of_a_polars_column(name):
    polars = pytest.importorskip("polars")
    cells, expected = make_columns(200)[name]
    if isinstance(cells, pd.Series):
        cells = [None if pd.isna(cell) else cell for cell in cells]
    if name == "duration":  # old versions of polars do not read durations of pandas
        cells = [cell and cell.to_pytimedelta() for cell in cells]
    table = polars.DataFrame({name: polars.Series(name, cells, strict=False)})
    table = table.with_columns(x=polars.lit(1.5))
    kinds = MultimodalVectorizer(text_encoder=None, image_encoder="x").describe(table)
    assert kinds.kind[name] == expected, kinds.reason[name]
    assert kinds.missing[name] == sum(map(is_blank, cells))


def is_blank(cell):
    return cell is None or (isinstance(cell, str) and not cell.strip())


@pytest.mark.parametrize("name", NAMES)
def test_the_kind_does_not_depend_on_the_order_of_rows(name):
    cells, expected = make_columns(200)[name]
    order = np.random.default_rng(0).permutation(200)
    assert read_column(pd.Series(cells).iloc[order], name).kind == expected


@pytest.mark.parametrize("name", NAMES)
def test_four_fifths_of_the_rows_have_the_same_kind(name):
    """As the folds of cross-validation have."""
    cells, expected = make_columns(200)[name]
    rows = np.random.default_rng(1).permutation(200)[:160]
    assert read_column(pd.Series(cells).iloc[rows], name).kind == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_observed_cell_of_clean_columns_is_parsed(name):
    cells, kind = make_columns(200)[name]
    column = pd.Series(cells)
    reading = read_column(column, name)
    if kind == "dropped" or "dirty" in name or "unknown" in name:
        return
    parsed = parse_column(column, kind, reading.form)
    assert parsed.isna().sum() == reading.n_missing
    if kind in ("numeric", "boolean"):
        assert parsed.dtype == np.float64
    if kind == "datetime":
        assert parsed.dtype == "datetime64[us]"


def test_the_unique_integers_of_an_unnamed_column_with_repeats_are_numeric():
    column = pd.Series(np.random.default_rng(0).integers(0, 100, 5000))
    assert read_column(column, "x").kind == "numeric"


def test_years_are_no_identifier():
    assert read_column(pd.Series(range(1980, 2024)), "x").kind == "numeric"


def test_unique_integers_are_kept_if_rows_are_few_or_a_value_is_missing():
    assert read_column(pd.Series(range(10)), "customer_id").kind == "numeric"
    column = pd.Series([*range(50), None], dtype="Int64")
    assert read_column(column, "customer_id").kind == "numeric"


def test_floats_are_no_identifier():
    assert read_column(pd.Series(np.arange(50.0)), "customer_id").kind == "numeric"


@pytest.mark.parametrize(
    ("text", "decimal", "expected"),
    [
        ("1,234.50", ".", 1234.5),
        ("1.234,50", ",", 1234.5),
        ("1 234,50", ",", 1234.5),
        ("1'234.5", ".", 1234.5),
        ("1\u202f234", ".", 1234),
        ("$3", ".", 3),
        ("-$3.10", ".", -3.1),
        ("$ -3.10", ".", -3.1),
        ("US$5", ".", 5),
        ("3 EUR", ".", 3),
        ("12,5 €", ",", 12.5),
        ("(1,000)", ".", -1000),
        ("−4", ".", -4),
        ("15 %", ".", 15),
        ("+1e-3", ".", 0.001),
        (".5", ".", 0.5),
        (decimal.Decimal("1.5"), ".", 1.5),
        (True, ".", 1),
    ],
)
def test_numbers_are_parsed(text, decimal, expected):
    assert parse_number(text, decimal) == pytest.approx(expected)


@pytest.mark.parametrize(
    "cell",
    "12 kg|1,23|1,2345.6|555-1234|1.2.3|$|%|one|2024-01-01|--1|1 2|e5||(3".split("|")
    + [None, [1], 1j],
)
def test_other_cells_are_no_numbers(cell):
    assert np.isnan(parse_number(cell, "."))


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("Yes", 1), (" no ", 0), ("T", 1), (0, 0), (1.0, 1), (True, 1), ("perhaps", None)],
)
def test_booleans_are_parsed(cell, expected):
    parsed = parse_boolean(cell)
    assert np.isnan(parsed) if expected is None else parsed == expected


DAY = datetime.datetime(2021, 11, 23)


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%d",
        "%Y/%m/%d",
        "%m/%d/%Y",
        "%d/%m/%Y",
        "%d.%m.%Y",
        "%d.%m.%y",
        "%d %B %Y",
        "%d-%b-%Y",
        "%B %d, %Y",
        "%b %d, %Y",
        "%b %d %Y",
        "%B %d %Y",
        "%a, %d %b %Y",
        "%Y%m%d",
        "%Y-%m-%dT%H:%M:%S",
        "%Y-%m-%d %H:%M",
        "%m/%d/%Y %I:%M %p",
        "%d.%m.%Y %H:%M:%S",
    ],
)
def test_dates_are_parsed(form):
    days = [DAY + datetime.timedelta(days=40 * i, hours=i) for i in range(30)]
    column = pd.Series([day.strftime(form) for day in days])
    reading = read_column(column, "when")
    assert reading.kind == "datetime"
    parsed = parse_column(column, "datetime", reading.form)
    assert list(parsed.dt.date) == [day.date() for day in days]


def test_the_month_is_first_if_both_orders_fit():
    assert find_date_format(["01/02/2003", "03/04/2005"], 0.9) == "%m/%d/%Y"
    assert find_date_format(["01/02/2003", "13/04/2005"], 0.9) == "%d/%m/%Y"


def test_time_zones_are_converted_to_utc():
    column = pd.Series(["2020-01-01T04:00:00+02:00", "2020-01-01T04:00:00+03:00"] * 5)
    reading = read_column(column, "when")
    parsed = parse_column(column, "datetime", reading.form)
    assert list(parsed.dt.hour[:2]) == [2, 1]


@pytest.mark.parametrize(
    ("cells", "received", "advice"),
    [
        ([["a", "b"], ["c"]], "list", "MultiLabelBinarizer"),
        ([{"a": 1}, {"b": 2}], "dict", "json_normalize"),
        ([np.zeros(3), np.ones(3)], "ndarray", "numpy.stack"),
        ([{1, 2}, {3}], "set", "MultiLabelBinarizer"),
        ([object(), object()], "object", "texts or numbers"),
    ],
)
def test_objects_that_are_no_images_are_refused(cells, received, advice):
    column = pd.Series([None, *cells])
    with pytest.raises(
        ValueError, match=f"Row 1 of column 'tags' is a {received}"
    ) as e:
        read_column(column, "tags")
    assert advice in str(e.value)
    assert "kinds={'tags': 'dropped'}" in str(e.value)
    assert read_column(column, "tags", "dropped").kind == "dropped"


def test_images_among_texts_are_refused():
    with pytest.raises(ValueError, match="'photo' mixes images with other cells"):
        read_column(pd.Series([png(1), "a", "b"]), "photo")


def test_a_column_of_floats_among_texts_is_read_as_text():
    column = pd.Series([7, 8.0, "a red cat", "two blue birds", "no dog"] * 5)
    reading = read_column(column, "note")
    parsed = parse_column(column, "text", None)
    assert not reading.are_texts
    assert parsed[0] == "7" and parsed[1] == "8"
