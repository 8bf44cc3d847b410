"""Build ``data/emoji.zip`` from two npm packages.

Run ``python -m tools.build_datasets.emoji``. Without ``--source``, ``npm`` downloads the
packages.
"""

import json
import tarfile
from pathlib import Path

from ._files import Archive, run

ARCHIVES = [
    Archive(
        "emoji-datasource-google-16.0.0.tgz",
        ["npm", "pack", "emoji-datasource-google@16.0.0"],
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    Archive(
        "emojibase-data-17.0.0.tgz",
        ["npm", "pack", "emojibase-data@17.0.0"],
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
]

# Words of the nine class names. Nearly every flag has the tag "flag", for example.
CLASS_WORDS = set(
    "activity activities animal animals nature body bodies drink drinks emotion emotions "
    "flag flags food foods object objects people place places smiley smileys "
    "symbol symbols travel".split()
)


def read_rows(datasource: Path, emojibase: Path) -> list[dict]:
    """Return a row for each emoji, with images and words of different packages."""
    images = _read_tar(datasource, "package/img/google/64/")
    emoji = _read_json(datasource, "package/emoji.json")
    words = {}
    for item in _read_json(emojibase, "package/en/data.json"):
        words[_key(item["hexcode"])] = item
    rows = []
    for item in emoji:
        if item["category"] == "Component":
            continue
        word = words[_key(item["unified"])]
        row = {
            "file": item["image"],
            "image": images["package/img/google/64/" + item["image"]],
            "name": _name(word),
            "keywords": _keywords(word),
            "group": item["subcategory"],
            "target": item["category"],
        }
        rows.append(row)
    return rows


def _read_json(path: Path, name: str) -> list[dict]:
    return json.loads(_read_tar(path, name)[name])


def _read_tar(path: Path, prefix: str) -> dict[str, bytes]:
    """Return the content of the files whose name starts with ``prefix``, by name."""
    contents = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(prefix):
                contents[member.name] = archive.extractfile(member).read()
    return contents


def _key(codepoints: str) -> str:
    """Remove the variation selector, which the two packages use differently."""
    return codepoints.replace("-FE0F", "")


def _name(item: dict) -> str:
    """Return the short name in lower case; the prefix "flag: " reveals the class."""
    return item["label"].lower().removeprefix("flag: ")


def _keywords(item: dict) -> str:
    """Return comma-separated tags in lower case, without words of class names."""
    tags = (tag.lower() for tag in item.get("tags", []))
    return ", ".join(tag for tag in tags if tag not in CLASS_WORDS)


if __name__ == "__main__":
    run("emoji", __doc__, ARCHIVES, read_rows)
