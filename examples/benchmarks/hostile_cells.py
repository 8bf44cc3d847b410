"""Hostile images, texts and objects for encoders, in separate processes."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from victims import DOCUMENTED, HANG_SECONDS, Attack, forked, without_warnings

from sklembed import CallableBackend, FrozenEncoder
from sklembed.datasets import load_emoji, load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm


def measure_cells(folder, options):
    """Pass hostile cells to encoders in separate processes."""
    scale = options.cells / 60_000
    amounts = {
        "mutated images": int(40_000 * scale),
        "mutated images, EfficientNet-lite0": int(3_000 * scale),
        "texts": int(8_000 * scale),
        "texts, MiniLM": int(3_000 * scale),
        "objects": int(6_000 * scale),
        "bombs and special images": 0,
    }
    figures = Counter(dict.fromkeys(CELL_COUNTS, 0))
    for kind, n_cells in amounts.items():
        counts = run_cells(folder, kind, n_cells)
        figures[f"{kind}: cells tried"] = counts.pop("cells tried", 0)
        figures[f"{kind}: vectors"] = counts.pop("vectors", 0)
        for name, count in counts.items():
            figures[name] += count
    n_cells = sum(figures[f"{kind}: cells tried"] for kind in amounts)
    return {"cells tried": n_cells} | dict(figures)


CELL_COUNTS = (
    "crashes",
    "hangs",
    "errors of another kind",
    "vectors that are not finite",
    "bombs that were decoded",
    "code executed",
)


def run_cells(folder, kind, n_cells):
    """Run one kind of cells; start again after a cell that ends or stops the process."""
    progress, counts = folder / "progress", Counter()
    first = 0
    while first <= n_cells:
        progress.write_text(str(first))
        result = folder / "result"
        result.unlink(missing_ok=True)
        with forked(try_cells, kind, first, n_cells, folder) as process:
            age = 0
            while process.exitcode is None and age < HANG_SECONDS:
                process.join(1)
                age = time.time() - progress.stat().st_mtime
        if result.exists():
            counts.update(json.loads(result.read_text()))
            return counts
        counts["hangs" if age >= HANG_SECONDS else "crashes"] += 1
        print(f"{kind}: stopped after cell {progress.read_text()}", file=sys.stderr)
        first = int(progress.read_text()) + COLUMN
    return counts


COLUMN = 64  # cells in a call


def try_cells(kind, first, n_cells, folder):
    """Encode cells in columns, and write the counts to a file."""
    os.chdir(folder)  # where code in cells would create a file
    counts = Counter({"cells tried": 0, "vectors": 0})
    # Images of more pixels than this would take most of the time.
    if kind.startswith("mutated"):
        Image.MAX_IMAGE_PIXELS = 20_000_000
    columns, encoder = CELLS[kind](first, n_cells, folder)
    if kind.startswith("bombs"):
        count_bombs(encoder, counts)
    start = first
    with without_warnings():
        for cells in columns:
            (folder / "progress").write_text(str(start))
            try_column(encoder, cells, counts)
            start += len(cells)
    counts["code executed"] += (folder / "canary").exists()
    (folder / "result").write_text(json.dumps(counts))


def as_column(cells):
    """Return cells of any type as an array."""
    column = np.empty(len(cells), dtype=object)
    for row, cell in enumerate(cells):
        column[row] = cell
    return column


def try_column(encoder, cells, counts):
    """Encode a column of cells, and count the outcomes."""
    counts["cells tried"] += len(cells)
    try:
        vectors = encoder.transform(as_column(cells))
    except (TypeError, ValueError, OSError) as error:
        if len(cells) > 1 and isinstance(error, TypeError):
            for cell in cells:  # one cell of a wrong type costs the column
                counts["cells tried"] -= 1
                try_column(encoder, [cell], counts)
        counts["errors of another kind"] += not str(error)
    except Exception as error:
        print(
            f"{error!r} for {[repr(cell)[:80] for cell in cells][:1]}", file=sys.stderr
        )
        counts["errors of another kind"] += 1
    else:
        is_finite = np.isfinite(vectors).all(axis=1)
        is_missing = np.isnan(vectors).all(axis=1)
        counts["vectors"] += int(is_finite.sum())
        counts["vectors that are not finite"] += int((~is_finite & ~is_missing).sum())


def memory_mib(name):
    """Return the memory or the peak memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) // 1024


def count_bombs(encoder, counts):
    """Encode decompression bombs, and count those that are decoded."""
    counts["bombs that were decoded"] = 0
    for name, bomb in bombs().items():
        counts["bombs"] += 1
        before = memory_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the earlier peak
        with without_warnings():
            vectors = encoder.transform([bomb])
        growth = memory_mib("VmHWM") - before
        counts["most MiB for a bomb"] = max(growth, counts["most MiB for a bomb"])
        if not np.isnan(vectors).all():
            print(f"the bomb {name} was decoded", file=sys.stderr)
            counts["bombs that were decoded"] += 1


def in_columns(cells):
    """Yield lists of cells."""
    column = []
    for cell in cells:
        column.append(cell)
        if len(column) == COLUMN:
            yield column
            column = []
    if column:
        yield column


def colour_encoder():
    """Return an encoder of images by their mean colour."""

    def load():
        return lambda images: np.array([np.asarray(i).mean((0, 1)) for i in images])

    backend = CallableBackend(
        load, name="colour", version="1", modality="image", n_features=3, image_size=16
    )
    return FrozenEncoder(backend, store=None, errors="missing")


def length_encoder():
    """Return an encoder of texts by their length and their mean code point."""

    def encode(texts):
        return np.array([[len(text), max(map(ord, text), default=0)] for text in texts])

    backend = CallableBackend(
        lambda: encode, name="length", version="1", modality="text", n_features=2
    )
    return FrozenEncoder(backend, store=None, errors="missing")


# Formats that Pillow writes, with the modes and options of its files.
FORMATS = [
    ("PNG", "RGB", {}),
    ("PNG", "P", {}),
    ("PNG", "1", {}),
    ("PNG", "LA", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "I;16", {}),
    ("PNG", "RGB", {"save_all": True}),
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {"progressive": True}),
    ("JPEG", "CMYK", {}),
    ("MPO", "RGB", {"save_all": True}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("WEBP", "RGB", {"save_all": True}),
    ("GIF", "P", {}),
    ("GIF", "P", {"save_all": True}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "CMYK", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "I;16", {}),
    ("TIFF", "F", {}),
    ("TIFF", "RGB", {"save_all": True}),
    ("BMP", "RGB", {}),
    ("DIB", "P", {}),
    ("PPM", "RGB", {}),
    ("TGA", "RGBA", {"compression": "tga_rle"}),
    ("ICO", "RGBA", {}),
    ("ICNS", "RGBA", {}),
    ("JPEG2000", "RGB", {}),
    ("AVIF", "RGB", {}),
    ("DDS", "RGBA", {}),
    ("PCX", "P", {}),
    ("SGI", "RGB", {}),
    ("XBM", "1", {}),
    ("IM", "RGB", {}),
    ("MSP", "1", {}),
    ("SPIDER", "F", {}),
    ("EPS", "RGB", {}),
    ("PDF", "RGB", {}),
]


def real_files():
    """Return the bundled images in all formats."""
    cells = [
        *load_emoji().data["image"][::60],
        *load_openclipart().data["image"][::100],
    ]
    files = list(cells)
    for number, (kind, mode, options) in enumerate(FORMATS):
        for cell in cells[number % 7 :: 7]:
            with Image.open(io.BytesIO(cell)) as image:
                frame = image.convert("RGBA").resize((48, 40))
            if mode == "I;16":
                frame = frame.convert("I").convert("I;16")
            frame = frame.convert(mode)
            if options.get("save_all"):
                options = options | {"append_images": [frame.rotate(90)]}
            buffer = io.BytesIO()
            frame.save(buffer, kind, **options)
            files.append(buffer.getvalue())
    return files


EXTREMES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


def mutated(files, rng):
    """Return a file with a few mutations."""
    content = bytearray(rng.choice(files))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        size = max(1, len(content))
        place = int(rng.random() ** rng.choice([1, 4]) * size)  # often in the header
        length = rng.randrange(1, 64)
        kind = rng.randrange(8)
        if kind == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            content[place : place + 1] = bytes([rng.choice([0, 1, 127, 128, 255])])
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + length]
        elif kind == 4:
            content[place:place] = content[place : place + length] * rng.choice([1, 9])
        elif kind == 5:
            order = rng.choice("<>")
            width = rng.choice("HI")
            value = rng.choice(EXTREMES) & (0xFFFF if width == "H" else 0xFFFFFFFF)
            number = struct.pack(order + width, value)
            content[place : place + len(number)] = number
        elif kind == 6:
            content[place : place + length] = rng.randbytes(length)
        else:
            other = rng.choice(files)
            content[place:] = other[int(rng.random() * len(other)) :]
    if content.startswith(b"\x89PNG") and rng.random() < 0.7:
        return with_right_checksums(content)
    return bytes(content)


def with_right_checksums(content):
    """Return a PNG whose checksums are right, so that the decoder reads on."""
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunk = content[place + 4 : place + 8 + length]
        parts.append(content[place : place + 4] + chunk)
        parts.append(struct.pack(">I", zlib.crc32(chunk)))
        place += 12 + length
    return b"".join(parts)


def mutated_cells(first, n_cells, folder):
    """Yield mutated files as bytes, dicts, and paths with any suffix."""
    files = real_files()
    for number in range(first, n_cells):
        rng = random.Random(number)
        content = mutated(files, rng)
        if number % 10 == 1:
            path = (
                folder / f"{number % COLUMN}{rng.choice(['.png', '.jpg', '.gif', ''])}"
            )
            path.write_bytes(content)
            yield rng.choice([str, Path])(path)
        elif number % 10 == 2:
            yield {"bytes": content, "path": "elsewhere.png"}
        else:
            yield content


def make_mutated(first, n_cells, folder):
    return in_columns(mutated_cells(first, n_cells, folder)), colour_encoder()


def make_mutated_for_network(first, n_cells, folder):
    encoder = FrozenEncoder(efficientnet_lite0(), store=None, errors="missing")
    # Other mutations than above.
    cells = mutated_cells(10**6 + first, 10**6 + n_cells, folder)
    return in_columns(cells), encoder


SPECIAL_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b" * 1000,
    "\ud800",
    "\udfff lone \ud83d",
    "\u202eright to left\u202c\u200f\u2067",
    "\N{FAMILY}\u200d\N{WOMAN}\u200d\N{GIRL}\U0001f3fd" * 500,
    "\U0001f1e9" * 999,
    "Z" + "\u0300" * 5000,
    "\ufeff\ufffe\uffff\U0010ffff",
    "\r\n\t\v\f\x1b[2J",
    "a" * 1_000_000,
    "a word " * 150_000,
    "\u4e2d" * 350_000,
    "$(touch canary); `touch canary` | touch canary",
    "'; DROP TABLE cells; --",
    "../../../etc/passwd",
    "{{7*7}} ${7*7} %s %n {0.__class__}",
    "nan",
    "None",
    "<script>",
    "[PAD] [CLS] [SEP] [MASK] [UNK] ##a",
]


def hypothesis_cells(strategy, n_cells, derive):
    """Return examples of a strategy of hypothesis, the same in every run."""
    from hypothesis import HealthCheck, Phase, given, settings

    cells = []

    @settings(
        max_examples=n_cells,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(cell):
        cells.append(derive(cell))

    collect()
    return cells


def text_cells(n_cells):
    from hypothesis import strategies as st

    characters = st.characters(codec=None, exclude_categories=())
    texts = st.text(characters, max_size=200) | st.text("ab \0\ud800\u202e\u200d")
    texts |= st.text(characters, min_size=300, max_size=3000)
    return [*SPECIAL_TEXTS, *hypothesis_cells(texts, n_cells, str)]


def make_texts(first, n_cells, folder):
    cells = text_cells(n_cells)[first:]
    return in_columns(cells), length_encoder()


def make_texts_for_network(first, n_cells, folder):
    encoder = FrozenEncoder(minilm(), store=None, errors="missing", runtime="torch")
    return in_columns(text_cells(n_cells)[first:]), encoder


def make_objects(first, n_cells, folder):
    from hypothesis import strategies as st
    from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.complex_numbers(),
        st.decimals(),
        st.fractions(),
        st.datetimes(),
        st.binary(),
        st.text(),
        st.builds(lambda: 10**5000),  # too many digits for a str
        st.sampled_from([pd.NA, pd.NaT, np.ma.masked, np.float32("nan"), ..., int]),
    )
    keys = st.sampled_from(["bytes", "path", "url"]) | st.integers()
    nested = st.recursive(
        scalars, lambda part: st.lists(part) | st.dictionaries(keys, part), max_leaves=5
    )
    objects = st.one_of(
        scalars,
        nested,
        st.builds(Path, st.text("abc/.~\0 ")),
        st.builds(memoryview, st.binary()),
        arrays(scalar_dtypes(), array_shapes(min_dims=0, max_dims=4, max_side=5)),
        st.builds(pd.Series, st.lists(st.integers(), max_size=3)),
    )
    cells = hypothesis_cells(objects, n_cells, lambda cell: cell)
    encoders = [colour_encoder(), length_encoder()]
    return ([cell] for cell in cells[first:]), _Both(encoders)


class _Both:
    """Encode a cell as an image and as a text."""

    def __init__(self, encoders):
        self._encoders = encoders

    def transform(self, column):
        vectors = []
        for encoder in self._encoders:
            with contextlib.suppress(*DOCUMENTED):
                vectors.append(encoder.transform(column).mean(axis=1, keepdims=True))
        return np.vstack(vectors) if vectors else np.full((1, 1), np.nan)


def png(size, depth, colour, rows, *chunks):
    """Return a PNG of any size, by the specification."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows, 9))]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*parts, (b"IEND", b"")]:
        checksum = zlib.crc32(kind + data)
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", checksum)
    return content


def icon(kind, content):
    """Return an icon whose header has a small size and that contains a PNG."""
    if kind == "ICO":
        entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22)
        return struct.pack("<HHH", 0, 1, 1) + entry + content
    block = b"ic07" + struct.pack(">I", 8 + len(content)) + content
    return b"icns" + struct.pack(">I", 8 + len(block)) + block


def bombs():
    """Return small files of images with more pixels, or data, than is allowed."""
    side = 12_000  # 144 million pixels, 18 MB of one bit each
    rows = bytes(side * (1 + side // 8))
    large = png((side, side), 1, 0, rows)
    text = b"bomb\0\0" + zlib.compress(bytes(200 << 20))
    profile = b"bomb\0\0" + zlib.compress(bytes(200 << 20))
    jpeg = io.BytesIO()
    Image.new("L", (8, 8)).save(jpeg, "JPEG")
    start = jpeg.getvalue().index(b"\xff\xc0") + 5
    wide = struct.pack(">HH", 65_500, 65_500)
    gif = io.BytesIO()
    Image.new("P", (8, 8)).save(gif, "GIF")
    webp = io.BytesIO()
    Image.new("L", (16_000, 6_000)).save(webp, "WEBP", lossless=True, method=0)
    tiff = io.BytesIO()
    Image.new("1", (side, side)).save(tiff, "TIFF", compression="group4")
    return {
        "PNG": large,
        "PNG of 10,000 million pixels": png((100_000, 100_000), 1, 0, b"\0" * 99),
        "PNG with a text": png((2, 2), 8, 0, bytes(6), (b"zTXt", text)),
        "PNG with a profile": png((2, 2), 8, 0, bytes(6), (b"iCCP", profile)),
        "ICO": icon("ICO", large),
        "ICNS": icon("ICNS", large),
        "JPEG": jpeg.getvalue()[:start] + wide + jpeg.getvalue()[start + 4 :],
        "GIF": gif.getvalue()[:6] + b"\xff\xff\xff\xff" + gif.getvalue()[10:],
        "BMP": b"BM"
        + struct.pack("<IIIIiiHH", 99, 0, 54, 40, 60_000, 60_000, 1, 1)
        + bytes(200),
        "PPM": b"P6 99999 99999 255\n" + bytes(999),
        "QOI": b"qoif" + struct.pack(">IIBB", 60_000, 60_000, 3, 0) + bytes(99),
        "WEBP": webp.getvalue(),
        "TIFF": tiff.getvalue(),
    }


def special_images(folder):
    """Return images that are valid but unusual, and files that are not images."""
    cells = real_files()
    good = cells[0]
    path = folder / "archive.png"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../canary", "")
    broken = bytearray(good)
    broken[-20] ^= 1  # the checksum of the last chunk of pixels
    frames = io.BytesIO()
    first, second = Image.new("P", (4, 4)), Image.new("P", (4, 4), 1)
    first.save(frames, "GIF", save_all=True, append_images=[second, first] * 2000)
    return [
        *cells,
        bytes(broken),
        *(good[:length] for length in (0, 1, 8, 33, len(good) // 2, len(good) - 1)),
        frames.getvalue(),
        Image.new("L", (0, 5)),
        Image.new("RGB", (0, 0)),
        np.zeros((0, 3, 3), np.uint8),
        np.zeros((1, 1), np.uint8),
        np.zeros((1, 1, 3), float),
        png((0, 0), 8, 2, b""),
        png((1, 1), 16, 6, bytes(9)),
        path,
        pickle.dumps(Attack("canary")),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "; touch canary #.png",
        "| touch canary",
        "$(touch canary).png",
        "file:///etc/passwd",
        "http://127.0.0.1/image.png",
        "/dev/zero",
        "/proc/self/mem",
        folder,
    ]


def make_special(first, n_cells, folder):
    cells = special_images(folder)[first:]
    return ([cell] for cell in cells), colour_encoder()


CELLS = {
    "mutated images": make_mutated,
    "mutated images, EfficientNet-lite0": make_mutated_for_network,
    "texts": make_texts,
    "texts, MiniLM": make_texts_for_network,
    "objects": make_objects,
    "bombs and special images": make_special,
}
