"""Build ``data/openclipart.zip`` from two Debian packages.

Run ``python -m tools.build_datasets.openclipart`` on Debian or a derivative. ``dpkg``
unpacks the packages. Without ``--source``, ``apt-get`` downloads them.
"""

import html
import io
import re
import subprocess
import tempfile
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from ._files import Archive, run

VERSION = "1:0.18+dfsg-19"
ARCHIVES = [
    Archive(
        "openclipart-png_1%3a0.18+dfsg-19_all.deb",
        ["apt-get", "download", f"openclipart-png={VERSION}"],
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    ),
    Archive(
        "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
        ["apt-get", "download", f"openclipart-svg={VERSION}"],
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    ),
]

# Folders of large series with similar images, and the folder without a subject.
EXCLUDED_FOLDERS = {"icons", "stars", "flags", "patterns", "unsorted"}
MIN_CLASS_SIZE = 40
MAX_PIXELS = 16_000_000
LONGEST_SIDE = 96
SMALLEST_SIDE = 16  # some images have as few as 3 x 2 pixels
N_COLOURS = 64
Image.MAX_IMAGE_PIXELS = None  # _thumbnail checks the size first

DC = "{http://purl.org/dc/elements/1.1/}"
CC = "{http://web.resource.org/cc/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"

# Titles of series that nearly equal the name of their folder, signs_and_symbols.
SERIES = {"AIGA Symbol Signs", "Map Symbols"}

UNKNOWN = "unknown"
# Spellings that the rules of `_creator` do not unify. Each person is one group.
ALIASES = {
    "andrew fitzsimon": "andy fitzsimon",
    "andrew z": "andrei z",
    "anonymous": UNKNOWN,
    "architetto francesco rollandin": "francesco rollandin",
    "dan gerhrads": "dan gerhards",
    "jean maurice le clec": "jean maurice le clech",
    "jean vitor balin": "jean victor balin",
    "jonadab the unsightly one": "jonadab",
    "none": UNKNOWN,
    "nubldoff": "nurbldoff",
    "rollandin francesco": "francesco rollandin",
}


def read_rows(png_package: Path, svg_package: Path) -> list[dict]:
    """Return a row for each unique public-domain image in a large enough folder."""
    with tempfile.TemporaryDirectory() as scratch:
        for package in (png_package, svg_package):
            subprocess.run(["dpkg", "-x", package, scratch], check=True)
        root = Path(scratch) / "usr/share/openclipart"
        rows = []
        for png in (root / "png").rglob("*.png"):
            path = png.relative_to(root / "png")
            # A link stands for an image in another folder.
            if png.is_symlink() or EXCLUDED_FOLDERS & set(path.parts):
                continue
            row = _read_row(root, path)
            if row is not None:
                rows.append(row)
    rows = _drop_copies(rows)
    sizes = Counter(row["target"] for row in rows)
    return [row for row in rows if sizes[row["target"]] >= MIN_CLASS_SIZE]


def _read_row(root: Path, path: Path) -> dict | None:
    """Return a row, or None if the image is unreadable, too large or not public domain."""
    svg = (root / "svg" / path).with_suffix(".svg")
    try:
        tree = ET.parse(svg).getroot()
    except (ET.ParseError, FileNotFoundError):
        return None
    if not _is_public_domain(tree):
        return None
    image = _thumbnail(root / "png" / path)
    if image is None:
        return None
    tags = Counter(element.tag.rpartition("}")[2] for element in tree.iter())
    return {
        "file": path.as_posix(),
        "image": image,
        "title": _title(_dublin_core(tree, "title")),
        "svg_kb": svg.stat().st_size / 1000,
        "n_path": tags["path"],
        "n_group": tags["g"],
        "n_gradient": tags["linearGradient"] + tags["radialGradient"],
        "group": _creator(_dublin_core(tree, "creator")),
        "target": path.parts[0],
    }


def _drop_copies(rows: list[dict]) -> list[dict]:
    """Keep the first of equal thumbnails, and none if they have different classes."""
    classes: dict[bytes, set[str]] = {}
    for row in rows:
        classes.setdefault(row["image"], set()).add(row["target"])
    first: dict[bytes, dict] = {}
    for row in sorted(rows, key=lambda row: row["file"]):
        if len(classes[row["image"]]) == 1:
            first.setdefault(row["image"], row)
    return list(first.values())


def _is_public_domain(tree: ET.Element) -> bool:
    """Return whether the RDF has licences, all of them the public domain."""
    licences = list(tree.iter(CC + "license"))
    for licence in licences:
        url = licence.get(RDF + "resource") or ""
        if not re.sub("[^a-z]", "", url.lower()).endswith("publicdomain"):
            return False
    return bool(licences)


def _thumbnail(path: Path) -> bytes | None:
    """Return a palette PNG without margins, or None for too large or small images."""
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            return None
        small = image.convert("RGBA")
    small = small.crop(small.getchannel("A").getbbox())
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    if max(small.size) < SMALLEST_SIDE or small.getextrema()[3][1] == 0:
        return None
    buffer = io.BytesIO()
    _quantize(small).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _quantize(image: Image.Image) -> Image.Image:
    """Reduce an image to a palette, and round extreme alpha values.

    Averaging leaves backgrounds not fully transparent and ink not fully opaque.
    """
    image = image.quantize(N_COLOURS, method=Image.Quantize.FASTOCTREE)
    palette = np.array(image.getpalette("RGBA")).reshape(-1, 4)
    alpha = palette[:, 3]
    alpha[alpha < 8] = 0
    alpha[alpha >= 240] = 255
    image.putpalette(palette.ravel().tolist(), "RGBA")
    return image


def _dublin_core(tree: ET.Element, name: str) -> str:
    """Return the text of the first Dublin Core element with a name."""
    element = tree.find(f".//{CC}Work/{DC}{name}")
    if element is None:
        return ""
    return _readable("".join(element.itertext()))


def _readable(text: str) -> str:
    """Decode entities and twice-encoded UTF-8, and collapse white space."""
    text = html.unescape(text)
    try:
        text = text.encode("latin-1").decode("utf-8")
    except UnicodeError:  # not encoded twice
        text = re.sub("[\x80-\x9f]", lambda match: _from_cp1252(match[0]), text)
    return " ".join(text.split())


def _from_cp1252(control: str) -> str:
    """Return the character of a control code in the Windows code page."""
    return control.encode("latin-1").decode("cp1252", errors="ignore")


def _title(text: str) -> str:
    """Return the title without underscores, signature and suffix; "" for a series."""
    text = text.removeprefix("Clipart by Nicu Buculei - ").removesuffix(".svg")
    text = " ".join(text.replace("_", " ").split())
    return "" if text in SERIES else text


def _creator(text: str) -> str:
    """Return the first creator in one spelling, without accents and addresses."""
    text = unicodedata.normalize("NFKD", text)
    text = text.encode("ascii", "ignore").decode().lower()
    text = re.sub(r"<.*?>|\(.*?\)|\[.*?\]|^mailto:|^http://", "", text)
    text = re.split(r",| and | et al\b| - |@", text)[0]
    # The dots of initials, but not of addresses.
    text = re.sub(r"\.(?=\W|$|[a-z]\.)", "", text)
    text = " ".join(text.replace("-", " ").split())
    text = ALIASES.get(text, text)
    if text in ("", "hash"):  # HASH(0x89c79d4): an error in the upload
        return UNKNOWN
    return text


if __name__ == "__main__":
    run("openclipart", __doc__, ARCHIVES, read_rows)
