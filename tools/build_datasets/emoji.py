"""Build ``data/emoji.zip`` from two npm packages: ``python -m tools.build_datasets.emoji``.

Without ``--source`` the packages are downloaded, which needs ``npm``.
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

# The words of the nine class names. "flag" and "animal" are tags of nearly every flag and animal.
CLASS_WORDS = set(
    "activity activities animal animals nature body bodies drink drinks emotion emotions "
    "flag flags food foods object objects people place places smiley smileys "
    "symbol symbols travel".split()
)


def read_rows(datasource: Path, emojibase: Path) -> list[dict]:
    """One row per emoji: pictures and classes from one package, words from the other."""
    pictures = _read_tar(datasource, "package/img/google/64/")
    emoji = json.loads(
        _read_tar(datasource, "package/emoji.json")["package/emoji.json"]
    )
    words = json.loads(
        _read_tar(emojibase, "package/en/data.json")["package/en/data.json"]
    )
    words = {_key(item["hexcode"]): item for item in words}
    return [
        {
            "file": item["image"],
            "image": pictures["package/img/google/64/" + item["image"]],
            "name": _name(words[_key(item["unified"])]),
            "keywords": _keywords(words[_key(item["unified"])]),
            "group": item["subcategory"],
            "target": item["category"],
        }
        for item in emoji
        if item["category"] != "Component"
    ]


def _read_tar(path: Path, prefix: str) -> dict[str, bytes]:
    """Contents of the files whose name starts with ``prefix``, read in one pass."""
    with tarfile.open(path) as archive:
        return {
            member.name: archive.extractfile(member).read()
            for member in archive
            if member.isfile() and member.name.startswith(prefix)
        }


def _key(codepoints: str) -> str:
    """Code points without the variation selector, which the two packages use differently."""
    return codepoints.replace("-FE0F", "")


def _name(item: dict) -> str:
    """Lower-case short name; the prefix "flag: " would repeat the class name."""
    return item["label"].lower().removeprefix("flag: ")


def _keywords(item: dict) -> str:
    """Comma-separated lower-case tags, without the words of the class names."""
    tags = (tag.lower() for tag in item.get("tags", []))
    return ", ".join(tag for tag in tags if tag not in CLASS_WORDS)


if __name__ == "__main__":
    run("emoji", __doc__, ARCHIVES, read_rows)
