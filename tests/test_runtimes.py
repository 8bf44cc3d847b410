"""Networks that OpenVINO or ONNX Runtime run: equal vectors, keys, files and faults."""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import threading
import warnings
from functools import partial
from hashlib import blake2b
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone

from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder
from sklembed.encoders import cpu, frozen, inference, runtimes
from sklembed.encoders.huggingface import HuggingFaceBackend
from sklembed.encoders.networks import NetworkEntry, list_networks

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

WORDS = "the a cat dog sat ran on under mat tree and then slept".split()
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
FLAGS = frozenset({"avx2", "avx512_bf16", "avx512_vnni"})


def make_texts(n_texts=40):
    """Return distinct texts of 1 to 30 words; 24 tokens are the limit of the models."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 1 + i % 30)) for i in range(n_texts)]


def make_images(n_images=34):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n_images, 40, 30, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory of networks that a test has exported."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(autouse=True)
def export_once(monkeypatch, exported):
    """Export each network in one test; the others copy its files, which is faster."""
    for runtime, export in runtimes._EXPORTERS.items():

        def export_or_copy(
            network, inputs, precision, folder, runtime=runtime, export=export
        ):
            key = repr((runtime, network.key, precision))
            copy = exported / blake2b(key.encode()).hexdigest()
            if copy.exists():
                shutil.copytree(copy, folder, dirs_exist_ok=True)
            else:
                export(network, inputs, precision, folder)
                shutil.copytree(folder, copy)

        monkeypatch.setitem(runtimes._EXPORTERS, runtime, export_or_copy)


@pytest.fixture(autouse=True)
def forget_models(monkeypatch):
    """Start each test like a new process."""
    forget()
    yield
    forget()


def forget():
    inference._LOADED.clear()
    runtimes._LOADED.clear()
    runtimes._N_COMPARED.clear()
    runtimes._LOGGED.clear()
    runtimes._version.cache_clear()


@pytest.fixture
def bert(checkpoints, tmp_path):
    """A copy of a checkpoint, which a test may change."""
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path)
    return str(path)


def count_exports(monkeypatch, runtime="openvino"):
    """Return a list that grows with each export."""
    exports = []
    export = runtimes._EXPORTERS[runtime]

    def counted(network, *arguments):
        exports.append(network.label)
        export(network, *arguments)

    monkeypatch.setitem(runtimes._EXPORTERS, runtime, counted)
    return exports


def relative_errors(vectors, expected):
    return np.linalg.norm(vectors - expected, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_threads_of_openvino_may_run_on_all_cores(checkpoints, store):
    # Pinned to cores, the threads of several processes would share the first cores.
    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    encoder.warm_up()
    cores, is_done = [], threading.Event()

    def watch():
        while not is_done.is_set():
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError):  # of a thread that has ended
                    cores.append(os.sched_getaffinity(int(thread)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    encoder.transform(make_texts(2000))
    is_done.set()
    watcher.join()
    assert all(available == os.sched_getaffinity(0) for available in cores)


# The vectors of torch


@pytest.mark.parametrize(
    ("family", "runtime", "parameters"),
    [
        ("bert", "openvino", {}),
        ("bert", "openvino", {"layer": [0, 2], "pooling": "max"}),
        ("bert", "openvino", {"pooling": "pooler"}),
        ("modernbert", "openvino", {}),
        ("t5", "openvino", {}),
        ("qwen", "openvino", {"pooling": "last", "layer": [2, 1]}),
        ("clip", "openvino", {"modality": "text"}),
        ("clip", "openvino", {"modality": "image"}),
        ("siglip", "openvino", {"modality": "text"}),
        ("vit", "openvino", {}),
        ("swin", "openvino", {}),
        ("convnext", "openvino", {}),
        ("resnet", "openvino", {}),
    ],
)
def test_a_runtime_returns_the_vectors_of_torch(
    checkpoints, store, family, runtime, parameters
):
    parameters = {"dtype": "float32"} | parameters
    expected = FrozenEncoder(
        checkpoints[family], store=None, runtime="torch", **parameters
    )
    encoder = FrozenEncoder(
        checkpoints[family], store=store, runtime=runtime, **parameters
    )
    is_text = family not in ("vit", "swin", "convnext", "resnet")
    cells = make_texts() if is_text else make_images()
    if parameters.get("modality") == "image":
        cells = make_images()
    vectors = encoder.transform(cells)
    assert encoder.stats()["runtime"] == runtime
    assert encoder.fingerprint() == expected.fingerprint()
    assert relative_errors(vectors, expected.transform(cells)).max() < 1e-4


def test_tokens_of_a_runtime_are_those_of_torch(checkpoints, store):
    parameters = {"output": "tokens", "dtype": "float32"}
    texts = make_texts()
    expected = FrozenEncoder(checkpoints["bert"], store=None, **parameters)
    encoder = FrozenEncoder(
        checkpoints["bert"], store=store, runtime="openvino", **parameters
    )
    tokens = encoder.transform(texts)[:, 0]
    for array, other in zip(tokens, expected.transform(texts)[:, 0], strict=True):
        np.testing.assert_allclose(array, other, atol=1e-4)


def test_float32_vectors_are_shared_by_all_runtimes(checkpoints, store):
    texts = make_texts()
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    vectors = encoder.set_params(runtime="openvino").transform(texts)
    for runtime in ("torch", "auto"):
        encoder.set_params(runtime=runtime)
        np.testing.assert_array_equal(encoder.transform(texts), vectors)
    assert encoder.stats()["encoded"] == len(texts)
    assert encoder.verify(texts)["max_error"] < encoder.verify(texts)["tolerance"]


def test_a_batch_changes_vectors_by_rounding_only(checkpoints, store):
    texts = make_texts()
    encoder = FrozenEncoder(
        checkpoints["bert"], store=None, runtime="openvino", dtype="float32"
    )
    together = encoder.transform(texts)
    alone = np.vstack([encoder.transform([text]) for text in texts[:8]])
    assert relative_errors(alone, together[:8]).max() < 1e-5


# When a network is exported


def test_a_network_is_exported_once_and_the_next_process_loads_no_weights(
    checkpoints, store, monkeypatch
):
    exports = count_exports(monkeypatch)
    texts = make_texts()
    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    encoder.transform(texts[:35])
    forget()
    monkeypatch.setattr(
        HuggingFaceBackend, "load_model", lambda self: pytest.fail("weights loaded")
    )
    assert np.isfinite(encoder.transform(texts)).all()
    assert len(exports) == 1


def test_auto_exports_for_many_cells_and_then_uses_the_network_for_few(
    checkpoints, store, monkeypatch
):
    exports = count_exports(monkeypatch)
    monkeypatch.setitem(frozen._WORTH_EXPORTING, "text", 36)
    texts = make_texts(80)
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    encoder.transform(texts[:35])
    assert exports == []
    assert encoder.stats()["runtime"] == "torch"
    encoder.transform(texts[:71])
    assert len(exports) == 1
    encoder.transform(texts)
    assert len(exports) == 1
    assert encoder.stats()["runtime"] == "openvino"


def test_torch_exports_nothing(checkpoints, store, monkeypatch):
    monkeypatch.setitem(frozen._WORTH_EXPORTING, "text", 1)
    FrozenEncoder(checkpoints["bert"], store=store, runtime="torch").transform(["a"])
    assert store.networks().empty


def test_few_cells_do_not_settle_the_check(checkpoints, store, monkeypatch):
    encoder = FrozenEncoder(
        checkpoints["bert"], store=store, runtime="openvino", dtype="float32"
    )
    checked = count_compared(monkeypatch)
    for n_texts in (3, 40, 41):
        forget()
        encoder.transform(make_texts(n_texts))
    assert checked == [3, N_TRIAL, 37, N_TRIAL]  # 37 of 40 were not stored


N_TRIAL = 3  # texts, besides the cells of the call


def count_compared(monkeypatch):
    """Return a list of the numbers of cells that are compared with torch."""
    checked = []
    compare = runtimes._compare

    def counted(expected, actual, cells, widths):
        if cells:
            checked.append(len(cells))
        return compare(expected, actual, cells, widths)

    monkeypatch.setattr(runtimes, "_compare", counted)
    return checked


def test_calls_compare_their_cells_until_there_are_enough(
    checkpoints, store, monkeypatch
):
    checked = count_compared(monkeypatch)
    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    encoder.warm_up()
    texts = make_texts(42)
    for text in texts[:40]:
        encoder.transform([text])
    assert checked == [N_TRIAL] + [1] * 32
    assert encoder.stats()["runtime"] == "openvino"
    forget()  # the verdict remains
    encoder.set_params(runtime="auto").transform(texts[40:])
    assert len(checked) == 33


class TwoBranches(torch.nn.Module):
    """A network that computes what its first input needs; tracing follows one branch."""

    def forward(self, lengths):
        vectors = 3 * lengths + 1
        if (lengths > 5).any():
            vectors = torch.where(lengths > 5, 2 * vectors, vectors)
        return vectors


def test_one_cell_does_not_vouch_for_a_column(store, caplog):
    backend = CallableBackend(
        lambda: (lambda text: torch.full((3,), float(len(text))), TwoBranches()),
        name="two branches",
        version="1",
        modality="text",
        n_features=3,
    )
    encoder = FrozenEncoder(backend, store=store, runtime="openvino")
    texts = ["a" * n for n in range(1, 80)]
    encoder.transform(texts[1:2])
    vectors = encoder.transform(texts)
    expected = FrozenEncoder(backend, store=None, runtime="torch").transform(texts)
    np.testing.assert_array_equal(vectors, expected)
    assert "differ from torch" in caplog.text


def test_vectors_of_nan_are_not_compared(store, monkeypatch):
    def load():
        prepare, module = load_module()

        def prepare_small(image):
            pixels = prepare(image)
            return pixels * np.nan if image.size == (2, 2) else pixels

        return prepare_small, module

    backend = CallableBackend(
        load, name="nan", version="1", modality="image", n_features=5
    )
    encoder = FrozenEncoder(backend, store=store, runtime="openvino", errors="missing")
    with pytest.warns(UserWarning, match="1 cells"):
        encoder.transform([Image.new("RGB", (2, 2)), *make_images()])
    assert encoder.stats()["runtime"] == "openvino"
    checked = count_compared(monkeypatch)
    forget()
    encoder.transform(make_images(36))
    assert checked == []  # there is a verdict


def test_an_estimate_exports_before_it_times(store, monkeypatch, caplog):
    backend = CallableBackend(
        load_module, name="timed", version="1", modality="image", n_features=5
    )
    events = count_exports(monkeypatch)
    clock = SimpleNamespace(perf_counter=lambda: events.append("tick") or 1.0)
    monkeypatch.setattr(frozen, "time", clock)
    encoder = FrozenEncoder(backend, store=store, runtime="openvino")
    estimate = encoder.estimate(make_images())
    assert events == ["timed", "tick", "tick", "tick", "tick"]
    assert (estimate["cells"], estimate["stored"]) == (34, 0)
    assert encoder.warm_up() is encoder
    assert logged(caplog) == []


def test_stats_name_the_runtime_of_the_next_cell(checkpoints, store):
    encoder = FrozenEncoder(
        checkpoints["bert"], store=store, runtime="onnx", dtype="float32"
    )
    assert encoder.stats()["runtime"] == "onnx"
    assert encoder.set_params(runtime="auto").stats()["runtime"] == "torch"


def test_few_cells_stay_in_torch_with_a_line_of_the_log(checkpoints, store, caplog):
    caplog.set_level(logging.INFO, "sklembed")
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    encoder.transform(["a", "b"])
    assert "no network for openvino yet, and too few cells to export one" in caplog.text


def test_settings_that_a_check_depends_on_have_separate_verdicts(
    checkpoints, store, monkeypatch
):
    exports = count_exports(monkeypatch)
    texts = make_texts()
    for parameters in ({"max_length": 4}, {"max_length": 20}, {"pooling": "cls"}):
        encoder = FrozenEncoder(
            checkpoints["bert"], store=store, runtime="openvino", **parameters
        )
        auto = clone(encoder).set_params(runtime="auto")
        assert auto.stats()["runtime"] == "torch"
        encoder.transform(texts)
        assert auto.stats()["runtime"] == "openvino"
    assert len(exports) == 1


# The directory of networks


def test_networks_are_listed_and_cleared_by_the_store(checkpoints, store):
    FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino").transform(
        make_texts()
    )
    FrozenEncoder(checkpoints["vit"], store=store, runtime="openvino").transform(
        make_images()
    )
    networks = store.networks()
    names = {name.split("/")[-1] for name in networks["model"]}
    assert names == {"bert", "vit"}
    assert set(networks["runtime"]) == {"openvino"}
    assert (networks["bytes"] > 1000).all()
    store.clear()
    assert store.networks().empty
    assert not store.networks_directory.exists()


def test_one_model_s_network_is_cleared_with_its_vectors(checkpoints, store):
    for family in ("bert", "modernbert"):
        FrozenEncoder(checkpoints[family], store=store, runtime="openvino").transform(
            make_texts()
        )
    names = set(store.networks()["model"])
    (bert,) = (name for name in names if name.endswith("/bert"))
    store.clear(bert)
    assert set(store.networks()["model"]) == names - {bert}
    assert set(store.stats()["model"]) == names - {bert}


@pytest.mark.parametrize("damage", ["truncated", "changed", "lost"])
def test_a_damaged_network_is_exported_again(checkpoints, store, monkeypatch, damage):
    exports = count_exports(monkeypatch)
    texts = make_texts(80)
    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    encoder.transform(texts[:40])
    (weights,) = store.networks_directory.glob("*/network/network.bin")
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        weights.write_bytes(content[:-4] + b"\x01\x02\x03\x04")
    else:
        weights.unlink()
    forget()
    vectors = encoder.transform(texts)
    expected = FrozenEncoder(checkpoints["bert"], store=None, runtime="torch")
    assert relative_errors(vectors, expected.transform(texts)).max() < 1e-4
    assert len(exports) == 2


def test_a_half_written_export_is_not_used(checkpoints, store, monkeypatch):
    def die(network, inputs, precision, folder):
        (folder / "network.xml").write_text("<net")
        raise KeyboardInterrupt

    texts = make_texts()
    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    with monkeypatch.context() as patch:
        patch.setitem(runtimes._EXPORTERS, "openvino", die)
        with pytest.raises(KeyboardInterrupt):
            encoder.transform(texts)
    assert not list(store.networks_directory.rglob("network.xml"))
    encoder.transform(texts)
    assert encoder.stats()["runtime"] == "openvino"


def test_another_version_has_another_network(checkpoints, store, monkeypatch):
    exports = count_exports(monkeypatch)
    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    encoder.transform(make_texts(40))
    version = runtimes.metadata.version
    monkeypatch.setattr(
        runtimes.metadata,
        "version",
        lambda name: "9999" if name == "openvino" else version(name),
    )
    forget()
    encoder.transform(make_texts(80))
    assert len(exports) == 2


def test_a_checkpoint_that_changes_has_another_network(bert, store, monkeypatch):
    from safetensors.torch import load_file, save_file

    exports = count_exports(monkeypatch)
    texts = make_texts()
    encoder = FrozenEncoder(bert, store=store, runtime="openvino", dtype="float32")
    before = encoder.transform(texts)
    weights = load_file(f"{bert}/model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("dense.weight"):
            weights[name] = tensor * 2
    save_file(weights, f"{bert}/model.safetensors", {"format": "pt"})
    after = encoder.transform(texts)
    assert relative_errors(after, before).min() > 1e-2
    expected = FrozenEncoder(bert, store=None, runtime="torch", dtype="float32")
    assert relative_errors(after, expected.transform(texts)).max() < 1e-4
    assert len(exports) == 2


def fork(work):
    """Call a function in a forked process; return the number of the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads and fork
        child = os.fork()
    if child:
        return child
    signal.alarm(60)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


@needs_fork
def test_two_processes_export_once(checkpoints, store, monkeypatch, tmp_path):
    def export(*arguments):
        (tmp_path / f"exported by {os.getpid()}").touch()
        runtimes._export_openvino(*arguments)

    monkeypatch.setitem(runtimes._EXPORTERS, "openvino", export)
    texts = make_texts(80)

    def encode(cells):
        encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
        assert encoder.transform(cells).shape == (40, 16)
        assert encoder.stats()["runtime"] == "openvino"

    children = [fork(partial(encode, cells)) for cells in (texts[:40], texts[40:])]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(list(tmp_path.glob("exported by *"))) == 1
    assert store.stats()["encoded"].sum() == 80


def test_a_read_only_store_gets_no_network(checkpoints, store, monkeypatch):
    monkeypatch.setitem(frozen._WORTH_EXPORTING, "text", 1)
    FrozenEncoder(checkpoints["vit"], store=store).transform(make_images(1))
    read_only = EmbeddingStore(store.path, read_only=True)
    FrozenEncoder(checkpoints["bert"], store=read_only).transform(make_texts())
    assert read_only.networks().empty


# Refused networks


def test_a_network_that_deviates_is_refused_for_good(
    checkpoints, store, monkeypatch, caplog
):
    exports = count_exports(monkeypatch)
    load = runtimes._LOADERS["openvino"]

    def load_wrong(*arguments):
        run = load(*arguments)
        return lambda inputs: [output * 1.001 for output in run(inputs)]

    monkeypatch.setitem(runtimes._LOADERS, "openvino", load_wrong)
    texts = make_texts(80)
    encoder = FrozenEncoder(
        checkpoints["bert"], store=store, runtime="openvino", dtype="float32"
    )
    expected = FrozenEncoder(checkpoints["bert"], store=None, runtime="torch")
    for n_texts in (40, 80):
        forget()
        vectors = encoder.transform(texts[:n_texts])
        np.testing.assert_allclose(
            vectors, expected.transform(texts[:n_texts]), atol=1e-5
        )
    assert len(exports) == 1
    assert encoder.stats()["runtime"] == "torch"
    assert "differ from torch by 1.0e-03" in caplog.text
    assert len(logged(caplog)) == 2  # one line per process


def logged(caplog):
    """Return the log of this package."""
    return [record for record in caplog.records if record.name == "sklembed"]


def export_nothing(network, inputs, precision, folder):
    (folder / "network.onnx").touch()


def fail_to_export(network, inputs, precision, folder):
    raise RuntimeError("no operator 'aten::none'")


def fail_to_load(folder, precision, n_threads):
    raise RuntimeError("illegal instruction")


@pytest.mark.parametrize(
    ("step", "failure", "reason"),
    [
        ("_EXPORTERS", fail_to_export, "no operator 'aten::none'"),
        ("_LOADERS", fail_to_load, "illegal instruction"),
    ],
)
def test_torch_replaces_a_runtime_that_fails(
    checkpoints, store, monkeypatch, caplog, step, failure, reason
):
    monkeypatch.setitem(getattr(runtimes, step), "openvino", failure)
    monkeypatch.setitem(runtimes._EXPORTERS, "onnx", export_nothing)  # is slow
    monkeypatch.setitem(getattr(runtimes, step), "onnx", failure)
    monkeypatch.setitem(frozen._WORTH_EXPORTING, "text", 1)
    texts = make_texts()
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    expected = FrozenEncoder(checkpoints["bert"], store=None, runtime="torch")
    np.testing.assert_allclose(
        encoder.transform(texts), expected.transform(texts), atol=1e-5
    )
    (record,) = logged(caplog)
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert "torch runs" in record.getMessage()


def test_the_next_runtime_is_tried(checkpoints, store, monkeypatch):
    modules = []

    def export(network, inputs, precision, folder):
        modules.append(network.module())

    def load(folder, precision, n_threads):
        def run(arrays):
            tensors = map(torch.from_numpy, arrays.values())
            return [output.numpy() for output in modules[0](*tensors)]

        return run

    monkeypatch.setitem(runtimes._EXPORTERS, "openvino", fail_to_export)
    monkeypatch.setitem(runtimes._EXPORTERS, "onnx", export)
    monkeypatch.setitem(runtimes._LOADERS, "onnx", load)
    monkeypatch.setitem(frozen._WORTH_EXPORTING, "text", 1)
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    encoder.transform(make_texts())
    assert encoder.stats()["runtime"] == "onnx"


def test_a_loaded_network_that_fails_later_is_replaced(checkpoints, store, monkeypatch):
    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    encoder.transform(make_texts(40))
    forget()
    monkeypatch.setitem(runtimes._LOADERS, "openvino", fail_to_load)
    assert np.isfinite(encoder.transform(make_texts(80))).all()
    assert encoder.stats()["runtime"] == "torch"


def test_torch_runs_a_batch_that_the_runtime_cannot(store, caplog):
    """The shape of images is part of the exported network."""

    def load():
        pool = torch.nn.AdaptiveAvgPool2d(1)
        module = torch.nn.Sequential(pool, torch.nn.Flatten())

        def prepare(image):
            return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)

        return prepare, module

    backend = CallableBackend(
        load, name="mean", version="1", modality="image", n_features=3
    )
    encoder = FrozenEncoder(backend, store=store, runtime="openvino", batch_size=1)
    encoder.warm_up()  # without a cell, nothing is exported
    assert store.networks().empty
    pixels = np.random.default_rng(0).integers(0, 256, (34, 32, 24, 3), dtype=np.uint8)
    encoder.transform(list(pixels))
    assert encoder.stats()["runtime"] == "openvino"
    wide = pixels[0, :20]
    np.testing.assert_allclose(
        encoder.transform([wide])[0], wide.mean((0, 1)), rtol=1e-5
    )
    assert "torch runs a batch of mean" in caplog.text


@needs_fork
def test_a_forked_child_loads_the_network_again(checkpoints, store):
    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    texts = make_texts(80)
    encoder.transform(texts[:40])

    def encode():
        assert np.isfinite(encoder.transform(texts)).all()

    assert os.waitpid(fork(encode), 0)[1] == 0
    assert encoder.stats()["encoded"] == len(texts)


def test_a_full_disk_is_not_held_against_the_network(
    checkpoints, store, monkeypatch, caplog
):
    def write(self, export):
        raise OSError(errno.ENOSPC, "No space left on device")

    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    with monkeypatch.context() as patch:
        patch.setattr(NetworkEntry, "write", write)
        assert np.isfinite(encoder.transform(make_texts(40))).all()
    assert "No space left on device" in caplog.text
    encoder.transform(make_texts(80))
    assert encoder.stats()["runtime"] == "openvino"


def test_a_network_that_kills_two_processes_is_refused(tmp_path):
    entry = NetworkEntry.of(tmp_path, {"key": "a"}, model="deadly")
    entry.folder.mkdir()
    (entry.folder / "attempt-1").touch()
    with entry.attempt():  # a success forgets one that died
        pass
    (entry.folder / "attempt-2").touch()
    (entry.folder / "attempt-3").touch()
    with pytest.raises(RuntimeError, match="2 processes died"):
        with entry.attempt():
            pass


def test_drafts_of_dead_processes_are_deleted(tmp_path):
    entry = NetworkEntry.of(tmp_path, {"key": "a"}, model="a")
    (entry.folder / "draft-1").mkdir(parents=True)
    with entry.attempt():
        entry.write(lambda folder: (folder / "network.xml").write_text("<net/>"))
    assert entry.is_intact()
    names = sorted(path.name for path in entry.folder.iterdir())
    assert names == ["description.json", "network"]
    assert list_networks(tmp_path)[0]["model"] == "a"


# Precisions


@pytest.fixture
def other_processor(monkeypatch):
    """A processor with AVX512-BF16 and VNNI."""
    monkeypatch.setattr(cpu, "cpu_flags", lambda: FLAGS)
    monkeypatch.setattr(cpu, "processor_hash", lambda: "other")


def fingerprint(path, **parameters):
    return FrozenEncoder(path, store=None, **parameters).fingerprint()


def test_the_key_names_the_runtime_below_float32(checkpoints, other_processor):
    path = checkpoints["bert"]
    bfloat16 = {"dtype": "bfloat16"}
    keys = {
        fingerprint(path, runtime="torch", dtype="float32"),
        fingerprint(path, runtime="torch", **bfloat16),
        fingerprint(path, runtime="openvino", **bfloat16),
        fingerprint(path, runtime="onnx", dtype="int8"),
    }
    assert len(keys) == 4
    assert fingerprint(path, **bfloat16) == fingerprint(
        path, runtime="openvino", **bfloat16
    )
    assert fingerprint(path, runtime="onnx", dtype="float32") in keys


def test_int8_vectors_have_the_key_of_their_instructions(checkpoints, monkeypatch):
    keys = set()
    for name in ("avx2", "avx512_vnni", "none of them"):
        monkeypatch.setattr(cpu, "cpu_flags", partial(frozenset, [name]))
        keys.add(fingerprint(checkpoints["bert"], dtype="int8"))
    assert len(keys) == 3


def test_int8_deviates_within_its_tolerance(checkpoints, store):
    texts = make_texts()
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="int8")
    vectors = encoder.transform(texts)
    expected = FrozenEncoder(checkpoints["bert"], store=None, dtype="float32")
    errors = relative_errors(vectors, expected.transform(texts))
    assert 1e-4 < errors.max() < runtimes.TOLERANCES["int8"]
    assert encoder.stats()["dtype"] == "int8"


def test_stored_int8_vectors_are_read_where_no_runtime_is(
    checkpoints, store, monkeypatch
):
    texts = make_texts()
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="int8")
    vectors = encoder.fit_transform(texts)
    monkeypatch.setattr(runtimes, "_is_installed", lambda runtime: False)
    np.testing.assert_array_equal(encoder.transform(texts), vectors)
    with pytest.raises(ValueError, match=r"pip install 'sklembed\[onnx\]'"):
        encoder.transform(["a new cat"])


def test_a_refused_bfloat16_network_has_the_key_of_torch(
    checkpoints, store, monkeypatch, other_processor
):
    monkeypatch.setattr(cpu, "_time_bfloat16", lambda: 2.0)
    monkeypatch.setitem(runtimes._EXPORTERS, "openvino", fail_to_export)
    texts = make_texts()
    path = checkpoints["bert"]
    encoder = FrozenEncoder(path, store=store)
    vectors = encoder.fit_transform(texts)
    by_torch = FrozenEncoder(path, store=store, runtime="torch", dtype="bfloat16")
    np.testing.assert_array_equal(by_torch.transform(texts), vectors)
    assert by_torch.stats()["encoded"] == len(texts)
    assert encoder.fingerprint() == by_torch.fingerprint()
    np.testing.assert_array_equal(encoder.transform(texts), vectors)
    demanded = FrozenEncoder(path, store=store, runtime="openvino", dtype="bfloat16")
    with pytest.raises(ValueError, match="no operator 'aten::none'.*Pass dtype"):
        demanded.transform(texts)


def test_a_processor_without_the_flags_reads_and_encodes(
    checkpoints, store, monkeypatch
):
    texts = make_texts(80)
    encoder = FrozenEncoder(checkpoints["bert"], store=store)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "cpu_flags", lambda: FLAGS)
        patch.setattr(cpu, "_time_bfloat16", lambda: 2.0)
        patch.setattr(cpu, "processor_hash", lambda: "other")
        encoder.fit(texts)
    assert encoder.space_["description"]["runtime"] == "openvino"
    vectors = encoder.transform(texts)  # here in float32, under its own key
    expected = FrozenEncoder(checkpoints["bert"], store=None, dtype="float32")
    assert relative_errors(vectors, expected.transform(texts)).max() < 1e-4
    assert encoder.stats()["dtype"] == "float32"


def test_another_processor_checks_again(checkpoints, store, monkeypatch):
    encoder = FrozenEncoder(
        checkpoints["bert"], store=store, runtime="openvino", dtype="float32"
    )
    encoder.transform(make_texts(40))
    forget()
    monkeypatch.setattr(cpu, "processor_hash", lambda: "another")
    auto = clone(encoder).set_params(runtime="auto")
    assert auto.stats()["runtime"] == "torch"
    encoder.transform(make_texts(80))
    assert auto.stats()["runtime"] == "openvino"


@pytest.mark.parametrize(
    ("flags", "ratio", "expected"),
    [
        ({"avx2"}, 9.0, "float32"),
        ({"avx2", "amx_bf16"}, 0.5, "bfloat16"),
        ({"avx2", "avx512_bf16"}, 2.0, "bfloat16"),
        ({"avx2", "avx512_bf16"}, 0.9, "float32"),
    ],
)
def test_auto_decides_by_flags_and_one_timing(
    checkpoints, tmp_path, monkeypatch, flags, ratio, expected
):
    monkeypatch.setenv("SKLEMBED_STORE", str(tmp_path / "store.sqlite"))
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(cpu, "processor_hash", lambda: str(sorted(flags)))
    timings = [ratio]
    monkeypatch.setattr(cpu, "_time_bfloat16", timings.pop)  # once
    for _ in range(2):
        encoder = FrozenEncoder(checkpoints["bert"], runtime="torch")
        assert encoder.stats()["dtype"] == expected


def test_the_timing_of_a_machine_is_remembered_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SKLEMBED_STORE", str(tmp_path / "store.sqlite"))
    monkeypatch.setattr(cpu, "cpu_flags", lambda: FLAGS)
    monkeypatch.setattr(cpu, "processor_hash", lambda: "here")
    monkeypatch.setattr(cpu, "_time_bfloat16", lambda: 0.5)
    assert not cpu.bfloat16_pays()
    facts = json.loads((tmp_path / "processors.json").read_text())
    assert facts == {"here": False}
    monkeypatch.setattr(cpu, "_time_bfloat16", lambda: 5.0)
    assert not cpu.bfloat16_pays()
    (tmp_path / "processors.json").write_text("{")
    assert cpu.bfloat16_pays()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"runtime": "onnx", "dtype": "bfloat16"}, "cannot compute in bfloat16"),
        ({"runtime": "openvino", "dtype": "int8"}, "cannot compute in int8"),
        ({"runtime": "openvino", "dtype": "float16"}, "cannot compute in float16"),
        ({"runtime": "torch", "dtype": "int8"}, "dtype='int8' needs ONNX Runtime"),
        ({"runtime": "onnx", "device": "meta"}, "runs on the CPU only"),
    ],
)
def test_combinations_that_do_not_exist_are_refused_in_fit(
    checkpoints, parameters, message, monkeypatch
):
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx2"}))
    encoder = FrozenEncoder(checkpoints["bert"], store=None, **parameters)
    with pytest.raises(ValueError, match=message):
        encoder.fit(["a"])


def test_a_runtime_that_is_not_installed(checkpoints, monkeypatch):
    monkeypatch.setattr(runtimes, "_is_installed", lambda runtime: False)
    encoder = FrozenEncoder(checkpoints["bert"], store=None)
    assert np.isfinite(encoder.transform(["a"])).all()
    with pytest.raises(ImportError, match=r"pip install 'sklembed\[openvino\]'"):
        encoder.set_params(runtime="openvino").fit(["a"])
    with pytest.raises(ValueError, match=r"pip install 'sklembed\[onnx\]'"):
        encoder.set_params(runtime="auto", dtype="int8").fit(["a"])


# Modules of the user


def load_module():
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 8 * 3, 5))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def prepare(image):
        return np.asarray(image.resize((8, 8)), dtype=np.float32) / 255

    return prepare, module.eval()


def test_a_callable_backend_may_return_a_module(store):
    backend = CallableBackend(
        load_module, name="linear", version="1", modality="image", n_features=5
    )
    images = make_images()
    prepare, module = load_module()
    pixels = torch.from_numpy(np.stack([prepare(image) for image in images]))
    expected = module(pixels).detach().numpy()
    for runtime in ("torch", "openvino"):
        encoder = FrozenEncoder(backend, store=None, runtime=runtime)
        np.testing.assert_allclose(encoder.transform(images), expected, rtol=1e-4)
    assert EmbeddingStore().networks()["model"].tolist().count("linear") == 1
    stats = encoder.set_params(store=store, runtime="auto").stats()
    assert stats["runtime"] is None  # a function could be in place of the module


def test_a_cell_that_cannot_be_prepared_does_not_refuse_the_network(store):
    def load():
        prepare, module = load_module()

        def check_and_prepare(image):
            if image.size == (1, 1):
                raise ValueError("too small")
            return prepare(image)

        return check_and_prepare, module

    backend = CallableBackend(
        load, name="checking", version="1", modality="image", n_features=5
    )
    encoder = FrozenEncoder(backend, store=store, runtime="openvino", errors="missing")
    images = [Image.new("RGB", (1, 1)), *make_images()]
    with pytest.warns(UserWarning, match="1 cells .* could not be read"):
        vectors = encoder.transform(images)
    assert np.isnan(vectors[:, 0]).sum() == 1
    assert encoder.stats()["runtime"] == "openvino"


def test_a_lack_of_memory_is_not_held_against_the_network(
    checkpoints, store, monkeypatch
):
    def fail(network, inputs, precision, folder):
        raise MemoryError

    encoder = FrozenEncoder(checkpoints["bert"], store=store, runtime="openvino")
    with monkeypatch.context() as patch:
        patch.setitem(runtimes._EXPORTERS, "openvino", fail)
        encoder.transform(make_texts(40))
    encoder.transform(make_texts(80))
    assert encoder.stats()["runtime"] == "openvino"


def test_a_function_has_no_network(text_backend):
    encoder = FrozenEncoder(text_backend, store=None, runtime="openvino")
    with pytest.raises(
        ValueError, match="would have no effect: the model is a function"
    ):
        encoder.transform(["a"])
