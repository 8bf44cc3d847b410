"""Text models in directories that need neither torch nor transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sklembed import EmbeddingStore, FrozenEncoder
from sklembed.encoders import inference, runtimes

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

TEXTS = ["the cat", "a dog sat on the mat", None, "", "cat dog " * 200, "Ein Mäuschen"]


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """A directory with an export of BERT."""
    directory = tmp_path_factory.mktemp("exports") / "bert"
    encoder = FrozenEncoder(checkpoints["bert"], store=None, max_length=20)
    encoder.export(directory, runtime="openvino")
    return directory


@pytest.mark.parametrize(
    ("family", "runtime", "parameters"),
    [
        ("bert", "openvino", {"layer": [0, 2], "pooling": "max", "max_length": 20}),
        ("qwen", "onnx", {"pooling": "last"}),
        ("siglip", "openvino", {"modality": "text", "normalize": True}),
    ],
)
def test_vectors_and_fingerprint_are_those_of_torch(
    checkpoints, family, runtime, parameters, tmp_path
):
    encoder = FrozenEncoder(
        checkpoints[family], store=None, runtime="torch", **parameters
    )
    encoder.export(tmp_path / "export", runtime=runtime)
    # The exported parameters may be passed again, as by set_params(model=...).
    export = encoder.set_params(runtime="auto")
    expected, fingerprint = export.transform(TEXTS), export.fingerprint()
    export.set_params(model=tmp_path / "export")
    np.testing.assert_allclose(export.transform(TEXTS), expected, atol=1e-5)
    assert export.fingerprint() == fingerprint


def test_a_process_needs_neither_torch_nor_transformers(exported, checkpoints):
    code = f"""
import sys
import numpy as np
from sklembed import FrozenEncoder
vectors = FrozenEncoder({str(exported)!r}, store=None).transform(["the cat", "a dog"])
np.save({str(exported.with_name("vectors.npy"))!r}, vectors)
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    expected = FrozenEncoder(checkpoints["bert"], store=None).transform(
        ["the cat", "a dog"]
    )
    vectors = np.load(exported.with_name("vectors.npy"))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_stored_vectors_are_shared_with_the_checkpoint(exported, checkpoints, tmp_path):
    store = EmbeddingStore(tmp_path / "store.sqlite")
    encoder = FrozenEncoder(
        checkpoints["bert"], store=store, max_length=20, runtime="torch"
    )
    encoder.fit_transform(["the cat"])
    export = FrozenEncoder(exported, store=store)
    export.transform(["the cat"])
    assert export.stats()["encoded"] == 1
    assert export.stats()["runtime"] == "openvino"
    # A fitted encoder moves to the export.
    encoder.set_params(model=str(exported), runtime="auto")
    encoder.transform(["the cat", "a dog"])
    assert encoder.stats()["encoded"] == 2
    store.clear(model=exported)
    assert store.stats().empty


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pooling": "cls"}, "pooling='cls', but .* was exported with pooling='auto'"),
        ({"max_length": 8}, "max_length=8, but .* exported with max_length=20"),
        ({"runtime": "onnx"}, "exported with runtime='openvino'"),
        ({"output": "tokens"}, "exported with output='pooled'"),
        ({"device": "cuda"}, "exported for the CPU"),
    ],
)
def test_other_parameters_are_an_error(exported, parameters, message):
    encoder = FrozenEncoder(exported, store=None, **parameters)
    with pytest.raises(ValueError, match=message):
        encoder.transform(["a"])


def test_damaged_files_are_an_error(exported, tmp_path):
    inference._LOADED.clear()  # models stay loaded for other directories, too
    for name in ("network.bin", "tokenizer.json"):
        damaged = tmp_path / name
        damaged.mkdir()
        for file in exported.iterdir():
            content = file.read_bytes()
            if file.name == name:
                content = content[:-1]
            (damaged / file.name).write_bytes(content)
        with pytest.raises(OSError, match="damaged or incomplete"):
            FrozenEncoder(damaged, store=None).transform(["a"])
    (damaged / "sklembed.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(OSError, match="another version of sklembed"):
        FrozenEncoder(damaged, store=None).transform(["a"])


def test_int8_is_bound_to_the_processor(exported, tmp_path):
    recipe = json.loads((exported / "sklembed.json").read_text())
    recipe["description"]["instructions"] = "other"
    (tmp_path / "sklembed.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="for processors with other, and this one has"):
        FrozenEncoder(tmp_path, store=None).transform(["a"])


def test_what_cannot_be_exported_is_refused(checkpoints, text_backend, tmp_path):
    for model, parameters, message in [
        (checkpoints["vit"], {}, "only pooled vectors of texts"),
        (checkpoints["bert"], {"output": "tokens"}, "only pooled vectors of texts"),
        (text_backend, {}, "no checkpoint for transformers"),
    ]:
        with pytest.raises(ValueError, match=message):
            FrozenEncoder(model, store=None, **parameters).export(tmp_path / "export")
    with pytest.raises(ValueError, match="runtime must be one of"):
        FrozenEncoder(checkpoints["bert"]).export(tmp_path / "export", runtime="torch")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty, and no earlier export"):
        FrozenEncoder(checkpoints["bert"], store=None).export(tmp_path)


def test_an_export_with_other_vectors_is_not_kept(checkpoints, tmp_path, monkeypatch):
    load = runtimes._LOADERS["openvino"]

    def load_wrong(*arguments):
        run = load(*arguments)
        return lambda arrays: [output + 1 for output in run(arrays)]

    monkeypatch.setitem(runtimes._LOADERS, "openvino", load_wrong)
    encoder = FrozenEncoder(checkpoints["bert"], store=None)
    with pytest.raises(ValueError, match="differ from torch"):
        encoder.export(tmp_path / "export", runtime="openvino")
    assert list(tmp_path.iterdir()) == []
