"""Build ``data/openclipart.zip`` from two Debian packages.

Run ``python -m tools.build_datasets.openclipart`` on Debian or a derivative: ``dpkg`` opens
the packages and, without ``--source``, ``apt-get`` downloads them.
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

# Large series that look alike, and the folder that has no subject.
LEFT_OUT = {"icons", "stars", "flags", "patterns", "unsorted"}
MIN_CLASS_SIZE = 40
MAX_PIXELS = 16_000_000
LONGEST_SIDE = 96
SMALLEST_SIDE = 16  # some pictures were drawn as specks of 3 x 2 pixels
N_COLOURS = 64
Image.MAX_IMAGE_PIXELS = None  # _thumbnail looks at the size before it reads a pixel

DC = "{http://purl.org/dc/elements/1.1/}"
CC = "{http://web.resource.org/cc/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"

# Names of whole series that are nearly the name of their folder, signs_and_symbols.
SERIES = {"AIGA Symbol Signs", "Map Symbols"}

UNKNOWN = "unknown"
# Spellings that the rules of `_creator` do not bring together: one person is one group.
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
    """One row per picture that is public domain, unique and in a folder of some size."""
    with tempfile.TemporaryDirectory() as scratch:
        for package in (png_package, svg_package):
            subprocess.run(["dpkg", "-x", package, scratch], check=True)
        root = Path(scratch) / "usr/share/openclipart"
        paths = [
            path.relative_to(root / "png") for path in (root / "png").rglob("*.png")
        ]
        rows = [_read_row(root, path) for path in paths if _is_wanted(root, path)]
    rows = _drop_copies([row for row in rows if row])
    sizes = Counter(row["target"] for row in rows)
    return [row for row in rows if sizes[row["target"]] >= MIN_CLASS_SIZE]


def _is_wanted(root: Path, path: Path) -> bool:
    """Whether the picture is of a kept series and not a link to one filed elsewhere."""
    return not LEFT_OUT & set(path.parts) and not (root / "png" / path).is_symlink()


def _read_row(root: Path, path: Path) -> dict | None:
    """Row of one picture, or None if it is unreadable, not public domain or huge."""
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
    """Keep the first by name of images with equal thumbnails, and none of two classes."""
    classes: dict[bytes, set[str]] = {}
    for row in rows:
        classes.setdefault(row["image"], set()).add(row["target"])
    first: dict[bytes, dict] = {}
    for row in sorted(rows, key=lambda row: row["file"]):
        if len(classes[row["image"]]) == 1:
            first.setdefault(row["image"], row)
    return list(first.values())


def _is_public_domain(tree: ET.Element) -> bool:
    """Whether the RDF names a licence and every licence it names is the public domain."""
    uses = [element.get(RDF + "resource") for element in tree.iter(CC + "license")]
    return bool(uses) and all(
        re.sub("[^a-z]", "", (use or "").lower()).endswith("publicdomain")
        for use in uses
    )


def _thumbnail(path: Path) -> bytes | None:
    """Palette PNG without clear margins, None for a picture too large or next to nothing."""
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
    """Palette picture; averaging leaves grounds not quite clear and ink not quite opaque."""
    image = image.quantize(N_COLOURS, method=Image.Quantize.FASTOCTREE)
    palette = image.getpalette("RGBA")
    palette[3::4] = [
        0 if alpha < 8 else 255 if alpha >= 240 else alpha for alpha in palette[3::4]
    ]
    image.putpalette(palette, "RGBA")
    return image


def _dublin_core(tree: ET.Element, name: str) -> str:
    """All text below the first Dublin Core element of that name in the description."""
    element = tree.find(f".//{CC}Work/{DC}{name}")
    return "" if element is None else _readable("".join(element.itertext()))


def _readable(text: str) -> str:
    """Text with entities and twice-encoded UTF-8 undone and white space collapsed."""
    text = html.unescape(text)
    try:
        text = text.encode("latin-1").decode("utf-8")
    except UnicodeError:  # it was right before
        text = re.sub("[\x80-\x9f]", lambda match: _from_cp1252(match[0]), text)
    return " ".join(text.split())


def _from_cp1252(control: str) -> str:
    """Return the character that a Windows editor meant by a control code."""
    return control.encode("latin-1").decode("cp1252", errors="ignore")


def _title(text: str) -> str:
    """Title with blanks for underscores, without signature or ending; "" if it has none."""
    text = text.removeprefix("Clipart by Nicu Buculei - ").removesuffix(".svg")
    text = " ".join(text.replace("_", " ").split())
    return "" if text in SERIES else text


def _creator(text: str) -> str:
    """Creator in lower case, without accents, addresses and co-authors, one spelling a person."""
    text = (
        unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    )
    text = re.sub(r"<.*?>|\(.*?\)|\[.*?\]|^mailto:|^http://", "", text)
    text = re.split(r",| and | et al\b| - |@", text)[0]
    text = re.sub(
        r"\.(?=\W|$|[a-z]\.)", "", text
    )  # the dots of initials, not of addresses
    text = " ".join(text.replace("-", " ").split())
    text = ALIASES.get(text, text)
    return (
        text if text and text != "hash" else UNKNOWN
    )  # HASH(0x89c79d4): a slip of the upload


if __name__ == "__main__":
    run("openclipart", __doc__, ARCHIVES, read_rows)
