"""Hashes of the files of a directory, which are remembered on this machine."""

import contextlib
import functools
import json
import os
import tempfile
import time
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from sklembed.encoders.database import default_path

# Suffixes of files that cannot change a vector. All other files are hashed.
_IGNORED_SUFFIXES = set(".md .png .jpg .svg .onnx .h5 .msgpack .ot .gguf".split())
# The file that remembers hashes of directories. Its version changes with the hash.
_MEMO_VERSION = "sklembed-checkpoints-1"
_MEMO_SIZE = 256
# A file that was written shortly before hashing may change again within the same tick of
# the clock of its file system.
_RACY_NS = 2_000_000_000


def hash_directory(directory: str) -> str:
    """Hash the files of a directory, linked folders included, that can change a vector."""
    signature, visited = [], set()
    for folder, subfolders, names in os.walk(directory, followlinks=True):
        visited.add(_folder_id(folder))
        # os.walk descends into the subfolders that remain here. Links may form a circle.
        subfolders[:] = _visible(subfolders)
        for name in _visible(subfolders):
            if _folder_id(os.path.join(folder, name)) in visited:
                subfolders.remove(name)
        for name in _visible(names):
            path = os.path.join(folder, name)
            suffix = os.path.splitext(name)[1]
            if suffix in _IGNORED_SUFFIXES or not os.path.isfile(path):
                continue
            status = os.stat(path)
            times = status.st_mtime_ns, status.st_ctime_ns
            signature.append(_File(path, status.st_size, *times, status.st_ino))
    return _hash_files(directory, tuple(signature))


def _folder_id(folder) -> tuple[int, int]:
    """Return what identifies a folder under all its names."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _visible(names) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


class _File(NamedTuple):
    """Signature of a file: a change of its content changes one of these."""

    path: str
    size: int
    modified: int  # in nanoseconds, as the next
    changed: int  # unlike `modified`, programs cannot set it
    inode: int


@functools.lru_cache(maxsize=64)
def _hash_files(root, signature) -> str:
    """Hash names and content of files, once per machine until their signature changes."""
    key = blake2b(repr((root, signature)).encode(), digest_size=16).hexdigest()
    remembered = _remembered_hashes().get(key)
    if remembered is not None:
        return remembered
    start = time.time_ns()
    hasher = blake2b(digest_size=16)
    for file in signature:
        name = os.path.relpath(file.path, root).replace(os.sep, "/")  # as on any system
        hasher.update(f"{name}\0{file.size}\0".encode())
        with open(file.path, "rb") as content:
            while chunk := content.read(1 << 22):
                hasher.update(chunk)
    newest = max((max(file.modified, file.changed) for file in signature), default=0)
    if newest < start - _RACY_NS:
        _remember_hash(key, hasher.hexdigest())
    return hasher.hexdigest()


def _memo_path() -> Path:
    """Return the file of hashes by signature, next to the default store."""
    return Path(f"{default_path()}.checkpoints.json")


def _remembered_hashes() -> dict[str, str]:
    """Read the hashes by signature; empty if the file is absent, damaged or of another version."""
    try:
        header, _, body = _memo_path().read_bytes().partition(b"\n")
    except (OSError, ValueError):  # no file, or no path for it
        return {}
    return json.loads(body) if header == _memo_header(body) else {}


def _memo_header(body) -> bytes:
    """Return the first line: the version, and a hash that reveals any damage."""
    return f"{_MEMO_VERSION} {blake2b(body, digest_size=16).hexdigest()}".encode()


def _remember_hash(key, content_hash) -> None:
    """Add a hash to the file, if it can be written. Of two writers at once, one may lose."""
    hashes = _remembered_hashes() | {key: content_hash}
    newest = dict(list(hashes.items())[-_MEMO_SIZE:])
    body = json.dumps(newest).encode()
    with contextlib.suppress(OSError, ValueError):
        path = _memo_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
        try:
            with open(descriptor, "wb") as file:
                file.write(_memo_header(body) + b"\n" + body)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
