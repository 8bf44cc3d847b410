"""Encoding on a local cluster of Ray, and with Dask, and the shards they share."""

import builtins
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import joblib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder

pq = pytest.importorskip("pyarrow.parquet")
ray = pytest.importorskip("ray")
import pyarrow as pa  # noqa: E402
from ray import cloudpickle, data  # noqa: E402
from ray.experimental import tqdm_ray  # noqa: E402

from sklembed.scale import encode_dataset, export_vectors, import_vectors  # noqa: E402
from sklembed.scale.dataset import _by_column, _import_ray, _share_resources  # noqa: E402
from sklembed.scale.shards import Folder, Index, Shards, to_keys  # noqa: E402
from sklembed.scale.target import Target  # noqa: E402
from sklembed.scale.workers import Part, Worker  # noqa: E402

# Of Ray's own code, and of the files and sockets that it leaves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")

# Workers cannot import the modules of tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def cluster():
    import conftest

    cloudpickle.register_pickle_by_value(conftest)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # otherwise other tests take their time
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def dask_cluster():
    distributed = pytest.importorskip("distributed")
    import cloudpickle as plain_cloudpickle

    plain_cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as workers,
        distributed.Client(workers) as client,
    ):
        yield client


class LocalPool:
    """Run the tasks in this process, which saves the start of others."""

    n_workers = 1

    def __init__(self, n_workers, options, encoders, *arguments):
        self._worker = Worker(lambda: encoders, *arguments)
        self.spaces = self._worker.spaces()

    def submit(self, method, *arguments, num_returns=1):
        values = []
        for argument in arguments:
            is_reference = isinstance(argument, ray.ObjectRef)
            values.append(ray.get(argument) if is_reference else argument)
        result = getattr(self._worker, method)(*values)
        if num_returns == 1:
            return ray.put(result)
        return [ray.put(part) for part in result]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def in_process(cluster, monkeypatch):
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "LOKY_MAX_CPU_COUNT"):
        monkeypatch.setenv(name, "1")  # restored after the test
    monkeypatch.setattr("sklembed.scale.workers.Pool", LocalPool)


def letters(text):
    """Embed a text by its length and the counts of three letters."""
    return [len(text), text.count("1"), text.count("2"), text.count("3")]


def embed(texts):
    """Embed texts."""
    return np.array([letters(text) for text in texts], dtype=np.float32)


def logging_backend(log, prepare=None):
    """Return a backend that appends each text that it encodes to a file."""

    def load():
        def encode(texts):
            if prepare is not None:
                prepare(texts)
            with open(log, "a", buffering=1 << 20) as file:
                file.write("".join(f"{text}\n" for text in texts))
            return embed(texts)

        return encode

    return CallableBackend(
        load, name="letters", version=str(log), modality="text", n_features=4
    )


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def encoder(log):
    return FrozenEncoder(logging_backend(log), store=None)


@pytest.fixture
def texts():
    """Texts with repeats and missing ones: two thirds are distinct."""
    rng = np.random.default_rng(0)
    texts = [f"text {i}" for i in rng.integers(0, 4000, 6000)]
    texts[0] = texts[3000] = texts[-1] = None
    return texts


@pytest.fixture
def source(tmp_path, texts):
    """A folder of three Parquet files with several row groups each."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(3):
        rows = np.arange(2000 * i, 2000 * (i + 1))
        table = pa.table({"row": rows, "text": texts[rows[0] : rows[-1] + 1]})
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=700)
    return folder


def check_output(target, texts, column="text"):
    """Check that a target has the rows in their order, with their vectors."""
    table = pq.read_table(target)
    assert table["row"].to_pylist() == list(range(len(texts)))
    assert table[column].to_pylist() == texts
    expected = [None if text is None else letters(text) for text in texts]
    embedding = table[f"{column}_embedding"]
    assert embedding.type == pa.list_(pa.float32(), 4)
    assert embedding.to_pylist() == expected
    assert not [name for name in os.listdir(target) if name.startswith("_draft")]
    manifest = json.loads((target / "_sklembed.json").read_text())
    assert manifest["complete"] and manifest["summary"]["rows"] == len(texts)


def distinct(texts):
    return {text for text in texts if text is not None}


def test_rows_keep_their_order_and_each_cell_is_encoded_once(
    cluster, encoder, source, texts, log, tmp_path
):
    summary = encode_dataset(encoder, source, tmp_path / "target", columns="text")
    check_output(tmp_path / "target", texts)
    encoded = log.read_text().splitlines()
    assert sorted(encoded) == sorted(distinct(texts))
    n_distinct = len(encoded)
    assert (summary.rows, summary.missing, summary.failed) == (6000, 3, 0)
    assert (summary.distinct, summary.encoded) == (n_distinct, n_distinct)
    assert summary.from_shards == 0


def test_a_second_call_encodes_only_new_cells(
    in_process, encoder, source, texts, log, tmp_path
):
    encode_dataset(encoder, source, tmp_path / "a", columns="text")
    log.write_text("")
    # The second target shares the shards, and the first is replaced.
    vectors = tmp_path / "a" / "_vectors"
    rows = pa.table({"row": range(3), "text": ["new", texts[1], "new"]})
    pq.write_table(rows, tmp_path / "rows.parquet")
    summary = encode_dataset(
        encoder,
        tmp_path / "rows.parquet",
        tmp_path / "b",
        columns="text",
        vectors=vectors,
    )
    check_output(tmp_path / "b", ["new", texts[1], "new"])
    assert (summary.distinct, summary.encoded, summary.from_shards) == (2, 1, 1)
    assert log.read_text() == "new\n"
    assert not (tmp_path / "b" / "_vectors").exists()

    encode_dataset(encoder, tmp_path / "rows.parquet", tmp_path / "a", columns="text")
    check_output(tmp_path / "a", ["new", texts[1], "new"])
    assert log.read_text() == "new\n"


def test_a_target_can_be_a_uri(in_process, encoder, source, texts, tmp_path):
    encode_dataset(encoder, f"file://{source}", f"file://{tmp_path}/a", columns="text")
    check_output(tmp_path / "a", texts)
    assert import_vectors(
        EmbeddingStore(tmp_path / "a.sqlite"), f"file://{tmp_path}/a/_vectors"
    )


def test_blocks_of_a_ray_dataset_keep_their_order(
    in_process, encoder, texts, log, tmp_path
):
    table = pd.DataFrame({"row": range(600), "text": texts[:600]})

    def wait(batch):  # the first block is the last one to be finished
        time.sleep(0.3 * (batch["row"].iloc[0] == 0))
        return batch

    dataset = data.from_pandas(table).repartition(4)
    dataset = dataset.map_batches(wait, batch_format="pandas")
    encode_dataset(encoder, dataset, tmp_path / "target", columns=["text"])
    check_output(tmp_path / "target", texts[:600])
    assert sorted(log.read_text().splitlines()) == sorted(distinct(texts[:600]))
    assert not dataset.context.execution_options.preserve_order


def test_columns_share_the_vectors_of_an_encoder(in_process, encoder, log, tmp_path):
    table = pa.table({"row": range(2), "a": ["x", "y"], "b": ["y", None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    other = CallableBackend(
        lambda: lambda texts: [[len(text)] for text in texts],
        name="length",
        version="1",
        modality="text",
        n_features=1,
    )
    encoders = {"a": encoder, "b": encoder}
    summary = encode_dataset(encoders, tmp_path / "rows.parquet", tmp_path / "target")
    check_output(tmp_path / "target", ["x", "y"], "a")
    check_output(tmp_path / "target", ["y", None], "b")
    assert (summary.distinct, summary.encoded, summary.missing) == (2, 2, 1)
    assert sorted(log.read_text().split()) == ["x", "y"]

    encoders["b"] = FrozenEncoder(other, store=None)
    encode_dataset(encoders, tmp_path / "rows.parquet", tmp_path / "target")
    assert pq.read_table(tmp_path / "target")["b_embedding"].to_pylist() == [[1], None]


def test_partitions_are_columns_and_absent_columns_are_null(
    in_process, encoder, tmp_path
):
    for name, columns in (("k=b", {"text": ["1"]}), ("k=a", {"text": ["2"], "n": [5]})):
        (tmp_path / "source" / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), tmp_path / "source" / name / "0.parquet")
    encode_dataset(encoder, tmp_path / "source", tmp_path / "target", columns="text")
    table = pq.read_table(tmp_path / "target").to_pydict()
    assert table["k"] == ["a", "b"]
    assert table["n"] == [5, None]
    assert table["text_embedding"] == [letters("2"), letters("1")]


@pytest.fixture
def images(tmp_path):
    """A folder of three images, two of which are equal, and their colours."""
    colours = {"a.png": 10, "b/c.png": 20, "b/d.PNG": 10}
    for name, colour in colours.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(tmp_path / "images" / name)
    return tmp_path / "images"


def test_a_folder_of_images(in_process, image_backend, images, tmp_path):
    encoder = FrozenEncoder(image_backend, store=None)
    summary = encode_dataset(encoder, images, tmp_path / "target")
    table = pd.read_parquet(tmp_path / "target")
    assert [os.path.relpath(path, images) for path in table["path"]] == [
        "a.png",
        "b/c.png",
        "b/d.PNG",
    ]
    expected = [[10, 0, 0, 0, 0, 0], [20, 0, 0, 0, 0, 0], [10, 0, 0, 0, 0, 0]]
    assert np.array_equal(np.stack(table["path_embedding"]), expected)
    assert (summary.rows, summary.encoded) == (3, 2)


def test_images_that_cannot_be_read(in_process, image_backend, images, tmp_path):
    (images / "b" / "c.png").write_bytes(b"no image")
    encoder = FrozenEncoder(image_backend, store=None)
    with pytest.raises(ValueError, match=r"Row 1 \(index 1\) of column 'path'"):
        encode_dataset(encoder, images, tmp_path / "target")
    encoder.set_params(errors="missing")
    with pytest.warns(UserWarning, match=r"1 cells .* \(index 1\) of column 'path'"):
        summary = encode_dataset(encoder, images, tmp_path / "target")
    assert (summary.encoded, summary.missing, summary.failed) == (1, 0, 1)
    vectors = pq.read_table(tmp_path / "target")["path_embedding"].to_pylist()
    assert vectors == [[10, 0, 0, 0, 0, 0], None, [10, 0, 0, 0, 0, 0]]


def test_each_row_with_an_unreadable_image_counts(
    in_process, image_backend, images, tmp_path
):
    (images / "b" / "c.png").write_bytes(b"no image")
    names = ["a.png", "b/c.png", "b/c.png", "none.png", None, "b/c.png"]
    paths = [name and str(images / name) for name in names]
    pq.write_table(pa.table({"path": paths}), tmp_path / "p.parquet", row_group_size=2)
    encoder = FrozenEncoder(image_backend, store=None, errors="missing")
    for n_encoded in (1, 0):
        with pytest.warns(UserWarning, match=r"^4 cells .* of column 'path'"):
            summary = encode_dataset(encoder, tmp_path / "p.parquet", tmp_path / "a")
        assert (summary.encoded, summary.missing, summary.failed) == (n_encoded, 1, 4)
        embedding = pq.read_table(tmp_path / "a")["path_embedding"]
        assert embedding.is_valid().to_pylist() == [True] + 5 * [False]


def test_a_vector_that_is_lost_during_a_call_is_an_error(
    in_process, encoder, source, tmp_path, monkeypatch
):
    def lose(self, *arguments):
        for path in (tmp_path / "target" / "_vectors").glob("*/*.parquet"):
            pq.write_table(pq.read_table(path)[:1], path)
        return write(self, *arguments)

    write = Worker.write
    encode_dataset(encoder, source, tmp_path / "target", columns="text")
    monkeypatch.setattr(Worker, "write", lose)
    with pytest.raises(OSError, match=r"has no vectors of \d+ of \d+ cells"):
        encode_dataset(encoder, source, tmp_path / "target", columns="text")


def test_images_in_blocks_of_ray(in_process, image_backend, images, tmp_path):
    encoder = FrozenEncoder(image_backend, store=None)
    encode_dataset(encoder, data.read_images(str(images)), tmp_path / "target")
    vectors = pq.read_table(tmp_path / "target")["image_embedding"].to_pylist()
    assert sorted(vector[0] for vector in vectors) == [10, 10, 20]


def test_a_killed_worker_is_replaced(cluster, source, texts, log, tmp_path):
    marker = str(tmp_path / "killed")

    def die_once(texts):
        if not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

    encoder = FrozenEncoder(logging_backend(log, die_once), store=None)
    encode_dataset(encoder, source, tmp_path / "target", columns="text")
    assert os.path.exists(marker)
    check_output(tmp_path / "target", texts)
    assert sorted(log.read_text().splitlines()) == sorted(distinct(texts))


def test_a_cell_that_crashes_workers_is_named(
    cluster, source, texts, log, tmp_path, monkeypatch
):
    def die(texts):
        if "text 7" in texts:
            os.kill(os.getpid(), signal.SIGKILL)

    row = texts.index("text 7")
    monkeypatch.setattr("sklembed.scale.workers.MAX_RETRIES", 0)
    encoder = FrozenEncoder(logging_backend(log, die), store=None)
    with pytest.raises(RuntimeError, match="encoded rows") as caught:
        encode_dataset(encoder, source, tmp_path / "a", columns="text", n_workers=1)
    message = str(caught.value)
    first, last = map(int, re.search(r"encoded rows (\d+) to (\d+)", message).groups())
    assert first <= row <= last < first + 700
    assert "column 'text'" in message


def crash():
    os._exit(1)


class Crashing(FrozenEncoder):
    """An encoder that ends the process that unpickles it."""

    def __reduce__(self):
        return crash, ()


def test_a_worker_that_cannot_start_is_an_error(
    cluster, encoder, source, tmp_path, monkeypatch
):
    monkeypatch.setattr("sklembed.scale.workers.MAX_RETRIES", 0)
    monkeypatch.setattr("sklembed.scale.workers._PATIENCE", 0)
    encoder = Crashing(encoder.model, store=None)
    with (
        pytest.warns(UserWarning, match="No worker has started.*needs 2 CPUs"),
        pytest.raises(RuntimeError, match="while it loaded the models"),
    ):
        encode_dataset(encoder, source, tmp_path / "a", columns="text", n_workers=1)


@pytest.mark.parametrize("type_name", ["string_view", "dictionary", "large_string"])
def test_types_of_texts(in_process, encoder, texts, tmp_path, type_name):
    column = pa.array(texts[:9]).dictionary_encode()
    if type_name != "dictionary":
        column = column.cast(pa.string()).cast(getattr(pa, type_name)())
    table = pa.table({"row": range(9), "text": column})
    pq.write_table(table, tmp_path / "a.parquet")
    encode_dataset(encoder, tmp_path / "a.parquet", tmp_path / "a", columns="text")
    check_output(tmp_path / "a", texts[:9])


DRIVER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_scale import FrozenEncoder, encode_dataset, logging_backend

encoder = FrozenEncoder(
    logging_backend({log!r}, lambda texts: time.sleep(0.03)), store=None
)
encode_dataset(encoder, {source!r}, {target!r}, columns="text", n_workers=1)
"""


def test_a_killed_driver_resumes(cluster, encoder, source, texts, log, tmp_path):
    target = tmp_path / "target"
    code = DRIVER.format(
        tests=os.path.dirname(__file__),
        log=str(log),
        source=str(source),
        target=str(target),
    )
    shards = Shards(Folder.at(target / "_vectors"), encoder._backend_and_space()[1])
    environment = os.environ | {"RAY_ADDRESS": cluster}
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not shards.names() and driver.poll() is None:
        time.sleep(0.01)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    wait_for_workers()
    committed = read_digests(shards)
    assert committed and not list(target.glob("part-*"))
    log.write_text("")
    summary = encode_dataset(encoder, source, target, columns="text")
    check_output(target, texts)
    check_not_encoded_again(log, committed)
    encoded = log.read_text().splitlines()
    assert len(encoded) == len(set(encoded)) == summary.encoded
    assert summary.encoded + len(committed) == summary.distinct == len(distinct(texts))


def wait_for_workers():
    """Wait until the workers of a killed driver are dead, so that none commits."""
    while ray.available_resources().get("CPU") != 2:
        time.sleep(0.05)


def read_digests(shards):
    keys = [shards.read_keys(name) for name in shards.names()]
    return {key.tobytes() for key in np.concatenate(keys)}


def check_not_encoded_again(log, committed):
    encoder = FrozenEncoder(logging_backend(log), store=None)
    encoded = log.read_text().splitlines()
    digests = {bytes.fromhex(digest) for digest in encoder.digests(encoded)}
    assert encoded and not digests & committed


def test_a_task_is_not_repeated_after_its_commit(encoder, log, tmp_path):
    vectors = Folder.at(tmp_path)
    worker = Worker(lambda: {"text": encoder}, vectors, n_threads=1)
    (_, space) = worker.spaces()["text"]
    vectors.folder(space.fingerprint).create()
    block, part = pa.table({"text": ["x", "y"]}), Part("part", 0, 2, 0)
    columns, _ = worker.hash(block, part)
    digests, rows, *_ = columns["text"]
    for _ in range(2):
        file = "0.parquet"
        encoded = worker.encode(block, part, "text", rows, digests, file)
        assert encoded == (file, 2, b"", [])
    assert log.read_text() == "x\ny\n"


def test_vectors_move_between_shards_and_a_store(
    in_process, encoder, source, texts, log, tmp_path, store
):
    target, shards = tmp_path / "target", tmp_path / "target" / "_vectors"
    encode_dataset(encoder, source, target, columns="text")
    n_distinct = len(distinct(texts))
    assert import_vectors(store, shards) == n_distinct
    assert import_vectors(store, shards, "letters") == 0
    log.write_text("")
    stored = FrozenEncoder(encoder.model, store=store)
    expected = [letters(text) for text in texts[1:100]]
    assert np.array_equal(stored.transform(texts[1:100]), expected)

    stored.transform(["new"])
    assert export_vectors(store, shards) == 1
    assert export_vectors(store, tmp_path / "shards") == n_distinct + 1
    summary = encode_dataset(
        encoder, source, target, columns="text", vectors=tmp_path / "shards"
    )
    assert (summary.encoded, summary.from_shards) == (0, n_distinct)
    check_output(target, texts)
    assert log.read_text() == "new\n"
    with pytest.raises(ValueError, match="no vectors of 'other'.*'letters'"):
        import_vectors(store, shards, "other")


def test_half_precision_and_tokens_in_a_store(store, tmp_path, log):
    half = EmbeddingStore(store.path, dtype="float16")
    FrozenEncoder(logging_backend(log), store=half).transform(["a", "b"])
    tokens = CallableBackend(
        lambda: lambda texts: [np.ones((2, 3)) for _ in texts],
        name="tokens",
        version="1",
        modality="text",
        n_features=3,
    )
    FrozenEncoder(tokens, output="tokens", store=store).transform(["a"])
    assert export_vectors(store, tmp_path / "shards") == 2
    other = EmbeddingStore(tmp_path / "other.sqlite", dtype="float16")
    assert import_vectors(other, tmp_path / "shards") == 2
    log.write_text("")
    encoder = FrozenEncoder(logging_backend(log), store=other)
    assert np.array_equal(encoder.transform(["b"]), [letters("b")])
    assert log.read_text() == ""


def test_a_damaged_shard_is_named(in_process, encoder, source, tmp_path):
    encode_dataset(encoder, source, tmp_path / "target", columns="text")
    (path, *_) = sorted(tmp_path.glob("target/_vectors/*/*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a vector
    path.write_bytes(content)
    with pytest.raises(OSError, match=f"{path.name} cannot be read.*delete it"):
        encode_dataset(encoder, source, tmp_path / "target", columns="text")
    path.unlink()
    summary = encode_dataset(encoder, source, tmp_path / "target", columns="text")
    assert 0 < summary.encoded < summary.distinct


def test_files_of_repeated_cells_are_read_once(
    in_process, encoder, source, tmp_path, monkeypatch
):
    def count(self, name):
        n_reads[name] += 1
        return read(self, name)

    read, n_reads = Shards.read, Counter()
    monkeypatch.setattr(Shards, "read", count)
    encode_dataset(encoder, source, tmp_path / "target", columns="text")
    assert len(n_reads) == 9 and set(n_reads.values()) == {1}
    # A cache that is too small for all of them.
    monkeypatch.setattr("sklembed.scale.shards._CACHE_BYTES", 20_000)
    (folder,) = tmp_path.glob("target/_vectors/*")
    shards = Shards(Folder.at(folder.parent), encoder._backend_and_space()[1])
    for name in shards.names() * 2:
        keys, vectors = read(shards, name)
        assert np.array_equal(shards.look_up(name, keys), vectors)
    sizes = [vectors.nbytes for _, vectors in shards._cache.values()]
    assert 0 < sum(sizes) == shards._cache_bytes <= 20_000
    assert max(n_reads.values()) == 3


def test_a_damaged_row_group_is_named(in_process, encoder, source, tmp_path):
    path = source / "1.parquet"
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 30] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"Row group 1 of .*1\.parquet cannot be read"):
        encode_dataset(encoder, source, tmp_path / "target", columns="text")


def test_errors_come_before_any_work(in_process, encoder, source, log, tmp_path):
    with pytest.raises(
        ValueError, match=r"no column 'title'. It has \['row', 'text'\]"
    ):
        encode_dataset(encoder, source, tmp_path / "target", columns="title")
    with pytest.raises(ValueError, match=r"\['row', 'text'\]: pass columns"):
        encode_dataset(encoder, source, tmp_path / "target")
    with pytest.raises(ValueError, match=r"Pass the column .*\['row', 'text'\]"):
        encode_dataset(encoder, source, tmp_path / "target", columns=[])
    with pytest.raises(ValueError, match=r"Pass the column .*\['row', 'text'\]"):
        encode_dataset({}, source, tmp_path / "target")
    with pytest.raises(ValueError, match="columns must be None"):
        encode_dataset({"text": encoder}, source, tmp_path / "target", columns="text")
    with pytest.raises(TypeError, match="must be a FrozenEncoder; got str"):
        encode_dataset({"text": "model"}, source, tmp_path / "target")
    with pytest.raises(ValueError, match="output='tokens'"):
        tokens = FrozenEncoder(encoder.model, output="tokens", store=None)
        encode_dataset(tokens, source, tmp_path / "target", columns="text")
    with pytest.raises(FileNotFoundError, match="There is no source .*nowhere"):
        encode_dataset(encoder, tmp_path / "nowhere", tmp_path / "target")
    with pytest.raises(TypeError, match="a dataset of Ray; got list"):
        encode_dataset(encoder, ["a"], tmp_path / "target")
    with pytest.raises(ValueError, match=r"Parquet files or images.*\['.txt'\]"):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.txt").touch()
        encode_dataset(encoder, tmp_path / "texts", tmp_path / "target")
    with pytest.raises(FileExistsError, match="'a.txt'"):
        encode_dataset(encoder, source, tmp_path / "texts", columns="text")
    assert not (tmp_path / "target").exists()
    assert log.read_text() == ""


def test_outputs_are_not_in_the_source(in_process, encoder, source, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(source)
    for target in (source, source / "target", link / "target"):
        with pytest.raises(ValueError, match="target .* is in the source"):
            encode_dataset(encoder, source, target, columns="text")
    target = tmp_path / "target"
    with pytest.raises(ValueError, match="vectors .* is in the source"):
        encode_dataset(encoder, link, target, columns="text", vectors=source / "v")
    (source / "linked").symlink_to(target)
    target.mkdir()
    with pytest.raises(ValueError, match="target .* is in the source"):
        encode_dataset(encoder, source, target, columns="text")
    (source / "linked").unlink()
    hidden = source / "_vectors"  # readers skip it
    encode_dataset(encoder, source, target, columns="text", vectors=hidden)
    summary = encode_dataset(encoder, source, target, columns="text", vectors=hidden)
    assert (summary.rows, summary.encoded) == (6000, 0)


def test_vectors_are_not_among_the_parts_of_a_target(
    in_process, encoder, source, store, tmp_path
):
    target = tmp_path / "target"
    for vectors in (target, target / "vectors"):
        with pytest.raises(ValueError, match="begins with an underscore"):
            encode_dataset(encoder, source, target, columns="text", vectors=vectors)
    assert not target.exists()
    encode_dataset(encoder, source, target, columns="text", vectors=target / "_others")
    assert len(pd.read_parquet(target)) == 6000
    with pytest.raises(ValueError, match="is a target.*Pass .*/target/_vectors"):
        encode_dataset(encoder, source, tmp_path / "b", columns="text", vectors=target)
    with pytest.raises(ValueError, match="is a target.*Pass .*/target/_vectors"):
        import_vectors(store, target)


def test_a_shard_of_another_model_is_an_error(
    in_process, source, texts, store, log, tmp_path
):
    for name, options in {"a": {}, "b": {"normalize": True}}.items():
        encoder = FrozenEncoder(logging_backend(log), store=None, **options)
        encode_dataset(encoder, source, tmp_path / name, columns="text")
    shard, *_ = (tmp_path / "a" / "_vectors").glob("*/*.parquet")
    other, *_ = (tmp_path / "b" / "_vectors").glob("*/*.parquet")
    shutil.copy(other, shard.with_name("other.parquet"))  # one may be the only file
    with pytest.raises(ValueError, match="has vectors of another model. Delete it"):
        import_vectors(store, tmp_path / "a" / "_vectors")


def test_other_files_among_shards(in_process, encoder, source, texts, store, tmp_path):
    target, shards = tmp_path / "target", tmp_path / "target" / "_vectors"
    encode_dataset(encoder, source, target, columns="text")
    (shards / "notes.txt").touch()
    (shards / "other").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), shards / "other" / "0.parquet")
    assert import_vectors(store, shards) == len(distinct(texts))
    (folder,) = shards.glob("????????????????*")
    pq.write_table(pa.table({"text": ["a"]}), folder / "0.parquet")
    for call in (
        lambda: import_vectors(store, shards),
        lambda: encode_dataset(encoder, source, target, columns="text"),
    ):
        with pytest.raises(ValueError, match=r"0\.parquet has no vectors of sklembed"):
            call()


def test_files_of_others_stay_in_a_target(in_process, encoder, source, texts, tmp_path):
    target = tmp_path / "target"
    encode_dataset(encoder, source, target, columns="text")
    names = ["part-list-notes.txt", "_draft-notes.txt", "part-notes/0", "_draft-a/0"]
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).touch()
    (target / f"_draft-{'0' * 32}").mkdir()  # of a dead call
    (target / "part-00000099.parquet").touch()
    encode_dataset(encoder, source, target, columns="text")
    assert all((target / name).exists() for name in names)
    assert not (target / f"_draft-{'0' * 32}").exists()
    assert not (target / "part-00000099.parquet").exists()
    rows = pq.ParquetDataset(sorted(target.glob("part-*.parquet"))).read()["row"]
    assert rows.to_pylist() == list(range(len(texts)))


def test_a_target_belongs_to_the_last_call(
    in_process, encoder, source, texts, tmp_path
):
    target = tmp_path / "target"

    def call_again(texts):
        """Start a second call, which deletes the drafts of the first one."""
        if not list(target.glob("part-*")):
            (drafts,) = target.glob("_draft-*")
            encode_dataset(encoder, source, target, columns="text")
            assert not drafts.exists()
            drafts.mkdir()  # as writing does in an object store

    first = FrozenEncoder(logging_backend(tmp_path / "other", call_again), store=None)
    with pytest.raises(OSError, match="Another call has taken over the target"):
        encode_dataset(first, source, target, columns="text")
    check_output(target, texts)


def test_a_lost_part_is_an_error(in_process, encoder, source, tmp_path, monkeypatch):
    def lose(self, names):
        self.drafts.delete(names[1])
        commit(self, names)

    commit = Target.commit
    encode_dataset(encoder, source, tmp_path / "target", columns="text")
    before = sorted(os.listdir(tmp_path / "target"))
    monkeypatch.setattr(Target, "commit", lose)
    with pytest.raises(OSError, match=r"1 of 9 parts .* first: part-00000001\.parquet"):
        encode_dataset(encoder, source, tmp_path / "target", columns="text")
    assert sorted(os.listdir(tmp_path / "target")) == before  # without drafts


def test_links_in_a_source(in_process, encoder, source, tmp_path):
    (source / "loop").symlink_to(source)
    with pytest.raises(OSError, match="loop and .* are the same folder"):
        encode_dataset(encoder, source, tmp_path / "target", columns="text")
    (source / "loop").unlink()
    (source / "9.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"9\.parquet is broken"):
        encode_dataset(encoder, source, tmp_path / "target", columns="text")


def test_an_error_of_a_worker_is_raised(cluster, encoder, source, tmp_path):
    with pytest.raises(TypeError, match=r"\(index \d+\) of column 'row'") as caught:
        target = tmp_path / "target"
        encode_dataset(encoder, source, target, columns="row", n_workers=1)
    assert type(caught.value) is TypeError


def test_missing_cells_and_rows_can_be_errors(in_process, encoder, source, tmp_path):
    encoder.set_params(missing="error")
    with pytest.raises(ValueError, match=r"\(index 0\) of column 'text' is missing"):
        encode_dataset(encoder, source, tmp_path / "target", columns="text")
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="no rows"):
        encode_dataset(encoder, tmp_path / "empty.parquet", tmp_path / "target")


def test_without_ray(monkeypatch, encoder, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'sklembed\[ray\]'"):
        encode_dataset(encoder, tmp_path, tmp_path / "target")


@pytest.mark.parametrize(
    ("n_cpus", "n_workers", "uses_cluster", "expected"),
    [
        (1, None, True, (1, 1, 0)),
        (2, None, False, (2, 1, 1)),
        (2, None, True, (2, 1, 0.5)),
        (16, 4, True, (4, 4, 3)),
        (16, 32, False, (32, 1, 0.5)),
    ],
)
def test_workers_share_the_cpus(n_cpus, n_workers, uses_cluster, expected):
    shared = _share_resources([{"CPU": n_cpus}], n_workers, 0, uses_cluster)
    n_workers, n_threads, options = shared
    assert (n_workers, n_threads, options["num_cpus"]) == expected


def test_there_are_as_many_workers_as_gpus_suffice_for():
    shared = _share_resources([{"CPU": 16, "GPU": 2}], None, 0.5, False)
    assert shared == (4, 4, {"num_cpus": 4, "num_gpus": 0.5})
    with pytest.raises(ValueError, match=r"have \[0\] GPUs"):
        _share_resources([{"CPU": 16}], None, 1, False)


@pytest.mark.parametrize(
    ("cpus", "gpus", "n_workers", "num_gpus", "expected"),
    [
        ((2, 2), (0, 0), 1, 0, (1, 2, 2)),
        ((2, 2), (0, 0), 3, 0, (3, 1, 1)),
        ((3, 3), (0, 0), 3, 0, (3, 2, 1)),
        ((4, 2), (0, 1), None, 1, (1, 2, 2)),
        ((4, 2), (0, 1), 4, 0.25, (4, 1, 0.5)),
    ],
)
def test_a_worker_fits_on_one_machine(cpus, gpus, n_workers, num_gpus, expected):
    pairs = zip(cpus, gpus, strict=True)
    nodes = [{"CPU": n_cpus, "GPU": n_gpus} for n_cpus, n_gpus in pairs]
    shared = _share_resources(nodes, n_workers, num_gpus, False)
    n_workers, n_threads, options = shared
    assert (n_workers, n_threads, options["num_cpus"]) == expected


def test_relative_paths_of_models_are_those_of_the_caller(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    relative, name = FrozenEncoder("model"), FrozenEncoder("other/model")
    encoders = _by_column({"a": relative, "b": name}, None, ["a", "b"])
    assert encoders["a"].model == str(tmp_path / "model")
    assert encoders["b"] is name and relative.model == "model"


def test_an_index_finds_digests():
    rng = np.random.default_rng(0)
    index, expected = Index(), {}
    for size in (5, 1, 0, 300, 20, 20, 20):
        keys = to_keys(rng.bytes(16 * size)).copy()
        keys[:, 0] %= 50  # many digests have equal first halves
        index.add(keys, np.arange(size))
        expected |= {tuple(key): i for i, key in enumerate(keys.tolist())}
    assert len(index._runs) < 4
    keys = np.array(list(expected), dtype=np.uint64)
    assert index.find(keys).tolist() == list(expected.values())
    keys[:, 1] += 1
    assert (index.find(keys) == -1).all()
    assert (Index().find(keys) == -1).all()


def test_dask_shares_a_store_and_the_shards(
    in_process, dask_cluster, encoder, source, texts, log, tmp_path, store
):
    import dask.dataframe as dd

    encoder = FrozenEncoder(encoder.model, store=store)

    def encode(part):
        vectors = encoder.transform(part["text"])
        return part.assign(text_embedding=list(vectors))

    table = dd.read_parquet(source)
    meta = table._meta.assign(text_embedding=pd.Series(dtype=object))
    encoded = table.map_partitions(encode, meta=meta).compute(scheduler=dask_cluster)
    is_missing = encoded["text"].isna().to_numpy()
    assert encoded["row"].tolist() == list(range(len(texts)))
    vectors = np.stack(encoded["text_embedding"])
    assert np.isnan(vectors[is_missing]).all() and is_missing.sum() == 3
    expected = [letters(text) for text in texts if text is not None]
    assert np.array_equal(vectors[~is_missing], expected)
    assert sorted(log.read_text().splitlines()) == sorted(distinct(texts))

    export_vectors(store, tmp_path / "target" / "_vectors")
    summary = encode_dataset(encoder, source, tmp_path / "target", columns="text")
    assert summary.encoded == 0
    check_output(tmp_path / "target", texts)


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_search_on_a_cluster_encodes_each_row_once(
    backend, cluster, dask_cluster, texts, log, store
):
    from ray.util.joblib import register_ray

    register_ray()
    X = texts[1:500]
    y = [int("1" in text) for text in X]
    encoder = FrozenEncoder(logging_backend(log), store=store)
    pipeline = make_pipeline(encoder, LogisticRegression())
    grid = {"logisticregression__C": [0.01, 100.0]}
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2)
    with joblib.parallel_config(backend):
        search.fit(X, y)
    assert sorted(log.read_text().splitlines()) == sorted(set(X))
    expected = GridSearchCV(
        make_pipeline(FunctionTransformer(embed), LogisticRegression()), grid, cv=2
    ).fit(X, y)
    scores = search.cv_results_["mean_test_score"]
    np.testing.assert_allclose(scores, expected.cv_results_["mean_test_score"])


def test_ray_does_not_replace_print(monkeypatch):
    """It would make skorch print the epochs of every later training."""
    monkeypatch.delenv("RAY_TQDM_PATCH_PRINT", raising=False)
    monkeypatch.setattr(builtins, "print", print)
    monkeypatch.setattr(tqdm_ray, "_manager", None)
    before = builtins.print
    _import_ray()
    tqdm_ray.instance()
    assert builtins.print is before
