"""Habits of Windows that Linux can imitate: drives, backslashes, and files in use."""

import ntpath
import os
from pathlib import Path

import numpy as np
import pytest

from sklembed import EmbeddingStore
from sklembed.encoders import database
from sklembed.encoders.checkpoints import Checkpoint
from sklembed.encoders.database import Space
from sklembed.encoders.file_hashes import hash_directory

SPACE = Space("f", {"name": "test"}, 3)


def fill(store):
    """Encode and store two cells; return their values."""

    def encode(claims):
        for claimed in claims:
            yield claimed, claimed, np.ones((len(claimed), 3), dtype=np.float32)

    keys = [bytes(16), bytes(15) + b"1"]
    pieces = store.fill(SPACE, keys, encode=encode, claim_size=2)
    return np.concatenate([values for _, values in pieces])


@pytest.fixture
def files_in_use(monkeypatch):
    """Make files with these suffixes impossible to delete, as open files are on Windows."""
    unlink, in_use = Path.unlink, []

    def unlink_closed(path, missing_ok=False):
        if path.name.endswith(tuple(in_use)):
            raise PermissionError(13, "used by another process", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_closed)
    return in_use


def test_an_empty_file_becomes_a_store(tmp_path, monkeypatch):
    def rename(path, target):
        if Path(target).exists():
            raise FileExistsError(183, "cannot create a file that exists", target)
        os.rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    path = tmp_path / "store.sqlite"
    path.touch()
    fill(EmbeddingStore(path))
    assert database.exists(path)


def test_the_locked_file_of_a_dead_session_is_no_error(tmp_path, files_in_use):
    store = EmbeddingStore(tmp_path / "store.sqlite")
    sessions = tmp_path / "store.sqlite.sessions"
    sessions.mkdir()
    owner = 32 * "a"
    (sessions / owner).touch()
    files_in_use.append(owner)
    assert (fill(store) == 1).all()


def test_a_locked_network_is_no_error(tmp_path, files_in_use):
    store = EmbeddingStore(tmp_path / "store.sqlite")
    fill(store)
    folder = store.networks_directory / "entry"
    folder.mkdir(parents=True)
    files_in_use.append(".lock")
    store.clear()
    assert not folder.exists()


@pytest.fixture
def backslashes(monkeypatch):
    """Return paths as on Windows, where relative paths have backslashes."""
    relpath = os.path.relpath
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(
        os.path, "relpath", lambda *paths: relpath(*paths).replace("/", "\\")
    )


def test_a_checkpoint_has_the_same_key_with_backslashes(tmp_path, request):
    folder = tmp_path / "model" / "1_Pooling"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    key = hash_directory(str(tmp_path / "model"))
    request.getfixturevalue("backslashes")
    copy = tmp_path / "copy"  # the key of the first directory is remembered
    (tmp_path / "model").rename(copy)
    assert hash_directory(str(copy)) == key


@pytest.mark.parametrize("path", [r"C:\models\minilm", r"models\minilm"])
def test_a_path_of_windows_is_no_hub_id(path):
    with pytest.raises(OSError, match="There is no directory"):
        Checkpoint(path, local_files_only=True).identity()


def test_folders_of_a_dataset_may_be_on_two_drives(monkeypatch):
    pytest.importorskip("pyarrow")
    from sklembed.scale.shards import is_visible, relative_path

    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(os.path, "relpath", ntpath.relpath)
    assert relative_path(r"D:\out", r"C:\data") == ".."
    assert is_visible(relative_path(r"C:\data\out", r"C:\data"))
    assert not is_visible(relative_path(r"C:\data\a\_hidden\b", r"C:\data"))
