"""The hash of a checkpoint directory: what changes it, and the file that remembers it."""

import builtins
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from sklembed.encoders import file_hashes
from sklembed.encoders.checkpoints import Checkpoint


@pytest.fixture
def memo(tmp_path, monkeypatch):
    """Path of the memo beside a store of this test; nothing counts as written recently."""
    monkeypatch.setenv("SKLEMBED_STORE", str(tmp_path / "cache" / "store.sqlite"))
    monkeypatch.setattr(file_hashes, "_RACY_NS", -(10**12))
    return tmp_path / "cache" / "store.sqlite.checkpoints.json"


@pytest.fixture
def directory(tmp_path):
    """A checkpoint of two files, of which one is in a folder."""
    path = tmp_path / "checkpoint"
    (path / "folder").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "folder" / "weights.bin").write_text("weights")
    return path


def identify(directory):
    """Return the identity as a new process would, and the names of the files it read."""
    file_hashes._hash_files.cache_clear()
    names = []

    def recording_open(path, *args, **options):
        if Path(str(path)).is_relative_to(directory):
            names.append(os.path.relpath(path, directory))
        return builtins.open(path, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_hashes, "open", recording_open, raising=False)
        return Checkpoint(str(directory)).identity(), names


def test_a_new_process_reads_no_file_of_a_known_directory(directory, memo):
    identity, names = identify(directory)
    assert names == ["config.json", "folder/weights.bin"]
    assert identify(directory) == (identity, [])
    assert os.stat(memo).st_mode & 0o777 == 0o600


def test_the_identity_is_that_of_earlier_releases(directory, memo):
    (directory / "README.md").write_text("ignored")
    (directory / ".hidden").write_text("ignored")
    (directory / "loop").symlink_to(directory)
    assert identify(directory)[0] == "962d870a5f6bb74eee168e9ed697c78a"


@pytest.mark.parametrize("change", ["time", "inode", "time set back"])
def test_a_file_of_the_same_size_is_hashed_again(directory, memo, change):
    identity, _ = identify(directory)
    weights = directory / "folder" / "weights.bin"
    status = weights.stat()
    if change == "inode":
        (directory / "new").write_text("changed")
        os.replace(directory / "new", weights)
    else:
        time.sleep(0.02)  # a tick of the clock of the file system
        weights.write_text("changed")
    if change != "time":
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed, names = identify(directory)
    assert names == ["config.json", "folder/weights.bin"]
    assert changed != identity
    weights.write_text("weights")
    assert identify(directory)[0] == identity


def test_equal_files_of_another_path_are_hashed_for_themselves(directory, memo):
    identity, _ = identify(directory)
    moved = directory.rename(directory.with_name("moved"))
    assert identify(moved) == (identity, ["config.json", "folder/weights.bin"])
    link = directory.with_name("link")
    link.symlink_to(moved)
    assert identify(link) == (identity, [])


def test_recently_written_files_are_not_remembered(directory, memo, monkeypatch):
    monkeypatch.setattr(file_hashes, "_RACY_NS", 2_000_000_000)
    identity, _ = identify(directory)
    assert not memo.exists()
    assert identify(directory)[1]


def damage(memo, kind):
    content = memo.read_bytes()
    if kind == "half-written":
        memo.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        memo.write_bytes(b"")
    elif kind == "bit":
        digit = b"1" if content[-3:-2] != b"1" else b"2"
        memo.write_bytes(content[:-3] + digit + content[-2:])
    elif kind == "version":
        memo.write_bytes(content.replace(b"checkpoints-1", b"checkpoints-0"))
    else:
        memo.unlink()
        memo.mkdir()


@pytest.mark.parametrize(
    "kind", ["half-written", "empty", "bit", "version", "directory"]
)
def test_an_unusable_memo_means_hashing_again(directory, memo, kind):
    identity, _ = identify(directory)
    damage(memo, kind)
    again, names = identify(directory)
    assert again == identity
    assert len(names) == 2
    if kind != "directory":
        assert identify(directory) == (identity, [])  # the memo is repaired
    assert [path.name for path in memo.parent.iterdir()] == [memo.name]


@pytest.mark.parametrize("fault", ["full disk", "no directory", "invalid path"])
def test_a_memo_that_cannot_be_written_is_skipped(directory, memo, monkeypatch, fault):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    if fault == "full disk":
        monkeypatch.setattr(file_hashes.os, "replace", fail)
    elif fault == "no directory":
        memo.parent.write_text("a file")
    else:
        monkeypatch.setenv("SKLEMBED_STORE", ":memory:")
    identity, names = identify(directory)
    assert identify(directory) == (identity, names)
    assert len(names) == 2
    if fault == "full disk":
        assert not list(memo.parent.iterdir())  # no draft either


def test_the_memo_has_a_bounded_number_of_entries(directory, memo, monkeypatch):
    monkeypatch.setattr(file_hashes, "_MEMO_SIZE", 3)
    for number in range(5):
        (directory / "config.json").write_text(str(number) * (number + 1))
        identify(directory)
    assert len(file_hashes._remembered_hashes()) == 3
    assert not identify(directory)[1]  # the newest


def test_processes_that_write_at_once_leave_a_readable_memo(memo):
    """One of two writers may lose its entry, and no reader sees half a file."""
    memo.parent.mkdir()
    file_hashes._remember_hash("0", "hash 0")
    children = []
    for number in range(3):
        child = os.fork()
        if child == 0:
            for i in range(20):
                file_hashes._remember_hash(f"{number}-{i}", f"hash {number}-{i}")
                if not file_hashes._remembered_hashes():
                    os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    hashes = file_hashes._remembered_hashes()
    assert len(hashes) >= 2  # each adds to the ones it reads
    assert all(value == f"hash {key}" for key, value in hashes.items())
    assert [path.name for path in memo.parent.iterdir()] == [memo.name]


class Code:
    """An object whose pickle would create a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_the_pickle_of_a_dense_layer_is_refused_and_never_runs_code(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "dense").mkdir()
    torch.save({"w": Code(tmp_path / "canary")}, tmp_path / "dense/pytorch_model.bin")
    with pytest.raises(ValueError, match="dense/pytorch_model.bin are pickles"):
        Checkpoint(str(tmp_path)).tensors("dense")
    checkpoint = Checkpoint(str(tmp_path), allow_pickle=True)
    with pytest.raises(OSError, match="contains more than weights"):
        checkpoint.tensors("dense")
    shutil.copy(tmp_path / "dense/pytorch_model.bin", tmp_path)
    with pytest.raises(OSError, match="contains more than weights"):
        checkpoint.check_weights()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../file.json", "/etc/hosts", "a/../../file.json"])
def test_files_outside_a_checkpoint_are_refused(tmp_path, name):
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(OSError, match="not within the checkpoint"):
        Checkpoint(str(tmp_path / "model")).file(name)


def header(text):
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        (2**63).to_bytes(8, "little") + b"{}",
        header(b"[1, 2]"),
        header(b'{"a":' + b"[" * 10_000),
        header(b'{"a": 3}'),
        header(b'{"a": {"dtype": "F32", "shape": [0]}}'),
        header(b'{"a": {"dtype": "O", "shape": [0], "data_offsets": [0, 0]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'),
    ],
)
def test_a_hostile_header_is_damage(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(OSError, match="model.safetensors' is damaged or truncated"):
        Checkpoint(str(tmp_path)).check_weights()


@pytest.mark.parametrize("weight_map", [["a"], {"a": 3}, None])
def test_an_index_without_files_is_damage(tmp_path, weight_map):
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="does not map weights to files"):
        Checkpoint(str(tmp_path)).check_weights()


def test_an_index_and_a_configuration_name_no_pickle(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    index = {"weight_map": {"a": "adapter_model.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="adapter_model.bin are pickles"):
        Checkpoint(str(tmp_path)).check_weights()
    config = {"transformers_weights": "adapter_model.bin"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="adapter_model.bin are pickles"):
        Checkpoint(str(tmp_path)).check_weights()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is not valid JSON"),
        ('{"model_type": "bert", "hidden_size": "os.system"}', "cannot be read"),
        ('{"text_config": {"attn_implementation": "a/kernel"}}', "code on the hub"),
    ],
)
def test_a_hostile_configuration_is_an_error(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((OSError, ValueError), match=message):
        Checkpoint(str(tmp_path)).config()
