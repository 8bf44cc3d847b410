"""Fetch pinned archives and write a data set's zip file, the same bytes every time."""

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
    """A published archive, the command that downloads it and the digest it must have."""

    filename: str
    command: Sequence[str]
    sha256: str


def run(name: str, doc: str, archives: Sequence[Archive], read_rows: Callable) -> None:
    """Command line of a build: find the archives, read their rows, write ``NAME.zip``."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument(
        "--source", type=Path, help="folder where the archives already lie"
    )
    parser.add_argument("--output", type=Path, default=DATA / f"{name}.zip")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        paths = [_obtain(archive, args.source or Path(scratch)) for archive in archives]
        rows = read_rows(*paths)
    _write_zip(args.output, rows)
    print(f"{args.output}: {len(rows)} rows, {args.output.stat().st_size / 1e6:.2f} MB")


def _obtain(archive: Archive, folder: Path) -> Path:
    """Path of the archive in ``folder``, downloaded if it is not there, with its digest checked."""
    path = folder / archive.filename
    if not path.exists():
        subprocess.run(archive.command, cwd=folder, check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise ValueError(
            f"{path} has sha256 {digest}, expected {archive.sha256}: remove it."
        )
    return path


def _write_zip(path: Path, rows: Sequence[dict]) -> None:
    """Write ``table.csv`` and the pictures; ``image`` holds bytes, ``file`` their name."""
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
        for row in rows:  # a PNG is deflated already
            archive.writestr(_entry(row["file"], ZIP_STORED), row["image"])


def _entry(name: str, compression: int) -> ZipInfo:
    """Zip entry without the clock, the user or the platform in it."""
    entry = ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = compression
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry
