"""Download pinned archives and write the zip file of a data set reproducibly."""

import argparse
import csv
import hashlib
import io
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

DATA = Path(__file__).parents[2] / "sklembed" / "datasets" / "data"


class Archive(NamedTuple):
    """A published archive, the command that downloads it, and its SHA-256 hash."""

    filename: str
    command: Sequence[str]
    sha256: str


def run(name: str, doc: str, archives: Sequence[Archive], read_rows: Callable) -> None:
    """Run a build from the command line: read archives and write ``NAME.zip``."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--source", type=Path, help="folder that contains the archives")
    parser.add_argument("--output", type=Path, default=DATA / f"{name}.zip")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.source or Path(scratch)
        paths = [_download(archive, folder) for archive in archives]
        rows = read_rows(*paths)
    _write_zip(args.output, rows)
    print(f"{args.output}: {len(rows)} rows, {args.output.stat().st_size / 1e6:.2f} MB")


def _download(archive: Archive, folder: Path) -> Path:
    """Download an archive if needed, check its hash, and return its path."""
    path = folder / archive.filename
    if not path.exists():
        subprocess.run(archive.command, cwd=folder, check=True)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != archive.sha256:
        raise ValueError(
            f"{path} has sha256 {sha256}, expected {archive.sha256}. Delete the file."
        )
    return path


def _write_zip(path: Path, rows: Sequence[dict]) -> None:
    """Write ``table.csv`` and the images, the bytes ``image`` as ``file``."""
    rows = sorted(rows, key=lambda row: row["file"])
    table = io.StringIO(newline="")
    columns = [column for column in rows[0] if column != "image"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with ZipFile(path, "w") as archive:
        archive.writestr(
            _entry("table.csv", ZIP_DEFLATED), table.getvalue(), compresslevel=9
        )
        for row in rows:  # a PNG is already compressed
            archive.writestr(_entry(row["file"], ZIP_STORED), row["image"])


def _entry(name: str, compression: int) -> ZipInfo:
    """Return a zip entry that does not depend on time, user or platform."""
    entry = ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = compression
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry
