"""Directory of exported networks beside a store: files, verdicts, listing, removal.

Each network has a folder under the hash of its key:

- ``description.json`` contains the key;
- ``network/`` contains the exported files and ``files.json``, their checksums;
- ``verdict-….json`` says for one precision and processor whether the network agreed
  with torch;
- ``attempt-…`` exists while a process exports or checks the network.

Folders appear by renaming, so that no process sees a half-written network. Nothing is
ever unpickled.
"""

import contextlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

from filelock import FileLock

RECIPE = "sklembed.json"  # of an exported text model
_FORMAT_VERSION = 1  # part of every key
_READ_BYTES = 1 << 22
_MAX_DEATHS = 2  # of processes that exported or checked a network


def directory_beside(store_path) -> Path:
    """Return the directory of the networks that belong to a store."""
    return Path(f"{store_path}.networks")


def name_directory(directory) -> str:
    """Return the name of a checkpoint directory: the last two parts of its path."""
    return "/".join(Path(directory).resolve().parts[-2:])


@dataclass(frozen=True)
class NetworkEntry:
    """Folder of one network in one runtime; it may be empty.

    Parameters
    ----------
    folder : Path
        The folder, which need not exist.

    description : dict
        Name of the model, and everything that changes the exported files, of JSON
        types.
    """

    folder: Path
    description: dict

    @classmethod
    def of(cls, directory, key, *, model) -> "NetworkEntry":
        """Return the entry of a key, which a readable name of the model describes."""
        key = key | {"format": _FORMAT_VERSION}
        text = json.dumps(key, sort_keys=True)
        name = blake2b(text.encode(), digest_size=16).hexdigest()
        return cls(Path(directory, name), {"model": model} | key)

    @property
    def network(self) -> Path:
        """Folder of the exported files."""
        return self.folder / "network"

    def is_intact(self) -> bool:
        """Return whether all exported files have their size and checksum."""
        recorded = read_json(self.network / "files.json")
        try:
            return recorded is not None and recorded == checksums(self.network)
        except OSError:
            return False

    def write(self, export) -> None:
        """Write the network by `export`, which takes a folder, and then rename it."""
        draft = self.folder / f"draft-{uuid.uuid4().hex}"
        draft.mkdir(parents=True)
        try:
            export(draft)
            write_json(draft / "files.json", checksums(draft))
            for verdict in self.folder.glob("verdict-*.json"):
                verdict.unlink()  # of other files
            shutil.rmtree(self.network, ignore_errors=True)  # damaged
            draft.rename(self.network)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    @contextlib.contextmanager
    def attempt(self):
        """Lock the entry, and leave a trace if the process dies in the block.

        Raises
        ------
        RuntimeError
            If several processes have died in the block.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # after clear()
            for draft in self.folder.glob("draft-*"):
                shutil.rmtree(draft, ignore_errors=True)
            write_json(self.folder / "description.json", self.description)
            # No other process is in the block, so that these processes have died.
            deaths = len(list(self.folder.glob("attempt-*")))
            if deaths >= _MAX_DEATHS:
                raise RuntimeError(f"{deaths} processes died while they tried it")
            trace = self.folder / f"attempt-{uuid.uuid4().hex}"
            trace.touch()
            try:
                yield
                for old in self.folder.glob("attempt-*"):
                    old.unlink(missing_ok=True)
            finally:
                trace.unlink(missing_ok=True)

    def verdict(self, condition) -> dict | None:
        """Return the verdict under a condition (precision and processor), or None."""
        verdict = read_json(self._verdict_path(condition))
        if verdict is None or not isinstance(verdict.get("accepted"), bool):
            return None
        return {"reason": "the reason is damaged"} | verdict

    def record(self, condition, verdict) -> None:
        """Write a verdict, a dict of JSON types with the key "accepted"."""
        write_json(self._verdict_path(condition), verdict)

    def _verdict_path(self, condition):
        key = blake2b(condition.encode(), digest_size=8).hexdigest()
        return self.folder / f"verdict-{key}.json"


def list_networks(directory) -> list[dict]:
    """List the exported networks: their description, size in bytes and time."""
    rows = []
    for folder in _entries(directory):
        description = read_json(folder / "description.json")
        files = folder / "network" / "files.json"
        if description is None or not files.exists():
            continue
        with contextlib.suppress(OSError):  # deleted by another process
            sizes = [path.stat().st_size for path in files.parent.iterdir()]
            n_bytes = sum(sizes) - files.stat().st_size
            exported = files.stat().st_mtime
            rows.append(description | {"bytes": n_bytes, "exported": exported})
    return rows


def clear_networks(directory, model=None) -> int:
    """Delete the networks of all models or of one; return the number of folders."""
    n_deleted = 0
    for folder in _entries(directory):
        description = read_json(folder / "description.json") or {}
        if model in (None, description.get("model")):
            with FileLock(f"{folder}.lock"):
                shutil.rmtree(folder, ignore_errors=True)
            _delete_lock(f"{folder}.lock")
            n_deleted += 1
    if model is None:
        for lock in Path(directory).glob("*.lock"):
            _delete_lock(lock)
    with contextlib.suppress(OSError):  # absent, or not empty
        Path(directory).rmdir()
    return n_deleted


def _delete_lock(path):
    """Delete the file of a lock, unless another process holds it on Windows."""
    with contextlib.suppress(OSError):
        Path(path).unlink(missing_ok=True)


def _entries(directory):
    try:
        return sorted(path for path in Path(directory).iterdir() if path.is_dir())
    except OSError:  # there is no directory
        return []


def checksums(folder, leave_out="files.json") -> dict:
    """Map the names of files, except one, to their size and CRC-32."""
    by_name = {}
    for path in sorted(folder.iterdir()):
        if path.name == leave_out:
            continue
        checksum = 0
        with open(path, "rb") as file:
            while chunk := file.read(_READ_BYTES):
                checksum = crc32(chunk, checksum)
        by_name[path.name] = [path.stat().st_size, checksum]
    return by_name


def read_json(path) -> dict | None:
    """Return the dict in a JSON file; None if the file is absent or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path, content) -> None:
    """Write a dict to a JSON file under a temporary name, then rename the file."""
    draft = Path(f"{path}.{uuid.uuid4().hex}")
    try:
        draft.write_text(json.dumps(content, sort_keys=True), encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
