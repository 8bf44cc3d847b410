"""Checkpoints, saved pipelines, stores and shards that try to execute code."""

import contextlib
import io
import json
import os
import pickle
import shutil
import sqlite3
import struct
import sys
import zipfile
from hashlib import blake2b
from pathlib import Path

import numpy as np
from victims import (
    HANG_SECONDS,
    Attack,
    forked,
    make_shards,
    make_store,
    number_encoder,
    outcome_of,
    small_pipelines,
    without_warnings,
)

import sklembed
from sklembed import EmbeddingStore, FrozenEncoder
from sklembed.encoders import minilm


def measure_attacks(folder, options):
    """Load files that try to execute code, each in a separate process."""
    # Imported before the forks, to save time.
    import torch  # noqa: F401
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer  # noqa: F401

    counts = {"attacks": 0, "refused with an error": 0, "loaded without the code": 0}
    faults = ("code executed", "crashes or hangs", "errors of another kind")
    counts |= dict.fromkeys(faults, 0)
    for number, (name, attack) in enumerate(ATTACKS.items()):
        work = folder / str(number)
        work.mkdir()
        counts["attacks"] += 1
        with forked(try_attack, attack, name, work) as process:
            process.join(HANG_SECONDS)
            counts["crashes or hangs"] += process.exitcode != 0
        if (work / "outcome").exists():
            counts[(work / "outcome").read_text()] += 1
        if (work / "canary").exists():
            print(f"{name}: code was executed", file=sys.stderr)
            counts["code executed"] += 1
    return counts


def try_attack(attack, name, work):
    """Run one attack, and write its outcome to a file."""
    sys.path.insert(0, str(work))
    code = f"open({str(work / 'canary')!r}, 'w')\n"
    (work / "hostile.py").write_text(code + "class Model: pass\n")
    os.chdir(work)
    with without_warnings():
        outcome = outcome_of(lambda: attack(work), name)
    if outcome == "right":
        outcome = "loaded without the code"
    (work / "outcome").write_text(outcome)


def text_checkpoint(work):
    """Copy MiniLM to a folder."""
    model = work / "model"
    shutil.copytree(minilm(), model)
    return model


def change_json(path, **values):
    """Change values in a JSON file, which need not exist."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def encode_by(model, **options):
    FrozenEncoder(str(model), store=None, **options).transform(["a text"])


def attack_weights(content, name="pytorch_model.bin", **options):
    """Return an attack by a file in place of the weights."""

    def attack(work):
        model = text_checkpoint(work)
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(content(work / "canary"))
        encode_by(model, **options)

    return attack


def pickled(canary):
    return pickle.dumps(Attack(canary))


def torch_file(canary):
    import torch

    buffer = io.BytesIO()
    torch.save({"embeddings.weight": Attack(canary)}, buffer)
    return buffer.getvalue()


def traversing_zip(canary):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(canary))
        archive.writestr("../canary", "")
        archive.writestr(str(canary), "")
    return buffer.getvalue()


def attack_safetensors(header, data=b""):
    """Return an attack by the header of a safetensors file."""

    def attack(work):
        encode = attack_weights(lambda canary: header + data, "model.safetensors")
        encode(work)

    return attack


def attack_static(header):
    """Return an attack by the weights of static token embeddings."""

    def attack(work):
        model = work / "static"
        model.mkdir()
        shutil.copy(Path(minilm()) / "tokenizer.json", model)
        (model / "config.json").write_text('{"model_type": "model2vec"}')
        (model / "model.safetensors").write_bytes(header)
        encode_by(model)

    return attack


def safetensors(header):
    """Return a safetensors file with a header and no data."""
    return struct.pack("<Q", len(header)) + header


HEADERS = {
    "of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "longer than the file": struct.pack("<Q", 99) + b"{}",
    "that is a list": safetensors(b"[1, 2]"),
    "that is nested": safetensors(b'{"a":' + b"[" * 100_000),
    "with offsets beyond the file": safetensors(
        b'{"embeddings":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'
    ),
    "with negative offsets": safetensors(
        b'{"embeddings":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'
    ),
    "with a shape that overflows": safetensors(
        b'{"embeddings":{"dtype":"F32","shape":[4294967296,4294967296,4],'
        b'"data_offsets":[0,0]}}'
    ),
    "with an object for a type": safetensors(
        b'{"embeddings":{"dtype":"O","shape":[0],"data_offsets":[0,0]}}'
    ),
    "without offsets": safetensors(b'{"embeddings":{"dtype":"F32","shape":[0]}}'),
    "with a number for a tensor": safetensors(b'{"embeddings": 3}'),
}


def attack_json(name, text_model=True, **values):
    """Return an attack by values in a JSON file of a checkpoint."""

    def attack(work):
        model = text_checkpoint(work)
        shutil.copy(work / "hostile.py", model)
        change_json(model / name, **values)
        encode_by(model)

    return attack


def attack_modules(modules, **files):
    """Return an attack by the modules of a sentence-transformers model."""

    def attack(work):
        model = text_checkpoint(work)
        shutil.copy(work / "hostile.py", model)
        first, pooling, *_ = json.loads((model / "modules.json").read_text())
        (model / "modules.json").write_text(json.dumps([first, pooling, *modules]))
        dense = model / "2_Dense"
        dense.mkdir()
        config = {"in_features": 384, "out_features": 3, "bias": False}
        config["activation_function"] = "torch.nn.modules.activation.Tanh"
        (dense / "config.json").write_text(json.dumps(config | files))
        (dense / "pytorch_model.bin").write_bytes(torch_file(work / "canary"))
        encode_by(model, allow_pickle="pickle" in files)

    return attack


def attack_index(shard):
    """Return an attack by an index that names a file elsewhere."""

    def attack(work):
        model = text_checkpoint(work)
        shutil.move(model / "model.safetensors", work / "elsewhere.safetensors")
        target = shard.replace("WORK", str(work))
        index = {"metadata": {}, "weight_map": {"embeddings.weight": target}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        encode_by(model)

    return attack


def attack_images(work):
    """Attack by the code of an image processor."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ViTModel(config).save_pretrained(work / "model")
    shutil.copy(work / "hostile.py", work / "model")
    change_json(
        work / "model" / "preprocessor_config.json",
        image_processor_type="Model",
        auto_map={"AutoImageProcessor": "hostile.Model"},
    )
    encoder = FrozenEncoder(str(work / "model"), store=None)
    encoder.transform([np.zeros((9, 9, 3), np.uint8)])


def attack_pipeline(old, new):
    """Return an attack by the configuration of a saved pipeline, with a right digest."""

    def attack(work):
        directory = work / "model"
        sklembed.save(small_pipelines()[0][0], directory)
        text = (directory / "config.json").read_text()
        assert old in text
        config = json.loads(text.replace(old, new))
        del config["digest"]
        content = json.dumps(config).encode()
        config["digest"] = blake2b(content, digest_size=16).hexdigest()
        (directory / "config.json").write_text(json.dumps(config))
        sklembed.load(directory)

    return attack


def attack_pickled_pipeline(work):
    """Attack by a pickle in place of the configuration."""
    sklembed.save(small_pipelines()[0][0], work / "model")
    (work / "model" / "config.json").write_bytes(pickled(work / "canary"))
    sklembed.load(work / "model")


def attack_pipeline_weights(header):
    """Return an attack by the weights of a saved pipeline, with right digests."""

    def attack(work):
        directory = work / "model"
        sklembed.save(small_pipelines()[0][0], directory)
        (path,) = directory.glob("weights-*")
        path.unlink()
        digest = blake2b(header, digest_size=16).hexdigest()
        (directory / f"weights-{digest}.safetensors").write_bytes(header)
        config = json.loads((directory / "config.json").read_text())
        config["weights"] = digest
        del config["digest"]
        content = json.dumps(config).encode()
        config["digest"] = blake2b(content, digest_size=16).hexdigest()
        (directory / "config.json").write_text(json.dumps(config))
        sklembed.load(directory)

    return attack


def attack_store(statement, use=EmbeddingStore.stats):
    """Return an attack by SQL in the file of a store."""

    def attack(work):
        make_store(work)
        with contextlib.closing(sqlite3.connect(work / "store.sqlite")) as db, db:
            db.executescript(statement.replace("CANARY", str(work / "canary")))
        number_encoder(work / "store.sqlite").transform(["1", "1000"])
        use(EmbeddingStore(work / "store.sqlite"))

    return attack


def attack_shards(work):
    """Attack by an extension type of Arrow whose metadata is a pickle."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sklembed.scale import import_vectors

    make_shards(work)
    (file, *_) = sorted((work / "shards").glob("*/*.parquet"))
    table = pq.read_table(file)
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickled(work / "canary"),
    }
    field = pa.field("digest", pa.binary(16), metadata=metadata)
    schema = pa.schema([field, table.schema.field("vector")], table.schema.metadata)
    pq.write_table(table.cast(schema), file)
    import_vectors(EmbeddingStore(work / "imported.sqlite"), work / "shards")


SCALER = '"class": ["sklearn.preprocessing._data", "StandardScaler"]'


UFUNC = '{"ufunc": "sinh"}'


CODE = {"AutoConfig": "hostile.Model", "AutoModel": "hostile.Model"}


DENSE = "sentence_transformers.models.Dense"


ATTACKS = {
    "pickle": attack_weights(pickled),
    "pickle, allowed": attack_weights(pickled, allow_pickle=True),
    "torch file": attack_weights(torch_file),
    "torch file, allowed": attack_weights(torch_file, allow_pickle=True),
    "zip with paths": attack_weights(traversing_zip),
    "zip with paths, allowed": attack_weights(traversing_zip, allow_pickle=True),
    "pickle with the name of safetensors": attack_weights(
        pickled, "model.safetensors", allow_pickle=True
    ),
    "configuration with code": attack_json("config.json", auto_map=CODE),
    "unknown model with code": attack_json(
        "config.json", auto_map=CODE, model_type="hostile"
    ),
    "tokenizer with code": attack_json(
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["hostile.Model", "hostile.Model"]},
        tokenizer_class="HostileTokenizer",
    ),
    "image processor with code": attack_images,
    "weights of another name": attack_json(
        "config.json", transformers_weights="adapter_model.bin"
    ),
    "weights elsewhere": attack_json(
        "config.json", transformers_weights="../elsewhere.safetensors"
    ),
    "kernel from a hub": attack_json(
        "config.json", attn_implementation="hostile/kernel:function"
    ),
    "configuration of wrong types": attack_json(
        "config.json", hidden_size="os.system", num_attention_heads=[]
    ),
    "configuration that divides by zero": attack_json(
        "config.json", num_attention_heads=0
    ),
    "os.system as a module": attack_modules([{"path": "2_Dense", "type": "os.system"}]),
    "hostile module": attack_modules([{"path": "2_Dense", "type": "hostile.Model"}]),
    "dense layer as a pickle": attack_modules([{"path": "2_Dense", "type": DENSE}]),
    "dense layer as a pickle, allowed": attack_modules(
        [{"path": "2_Dense", "type": DENSE}], pickle=False
    ),
    "os.system as an activation": attack_modules(
        [{"path": "2_Dense", "type": DENSE}], activation_function="os.system"
    ),
    "module elsewhere": attack_modules([{"path": "../static", "type": DENSE}]),
    "shard above": attack_index("../elsewhere.safetensors"),
    "shard of an absolute path": attack_index("WORK/elsewhere.safetensors"),
    "os.system as a function": attack_pipeline(UFUNC, '{"function": ["os", "system"]}'),
    "os.system called by a partial": attack_pipeline(
        UFUNC, '{"partial": [{"function": ["os", "system"]}, ["touch canary"], {}]}'
    ),
    "Popen as a class": attack_pipeline(SCALER, '"class": ["subprocess", "Popen"]'),
    "hostile class": attack_pipeline(SCALER, '"class": ["hostile", "Model"]'),
    "hostile function": attack_pipeline(UFUNC, '{"function": ["hostile", "Model"]}'),
    "eval as a type": attack_pipeline(UFUNC, '{"type": ["builtins", "eval"]}'),
    "numpy.load as a ufunc": attack_pipeline(UFUNC, '{"ufunc": "load"}'),
    "pickle in a pipeline": attack_pipeline(UFUNC, '{"pickle": "gASV"}'),
    "pickle in place of a pipeline": attack_pickled_pipeline,
    "trigger in a store": attack_store(
        "CREATE TRIGGER hostile AFTER INSERT ON cells BEGIN "
        "SELECT load_extension('hostile'), writefile('CANARY', ''); END"
    ),
    "view in place of a table": attack_store(
        "ALTER TABLE vectors RENAME TO old; CREATE VIEW vectors AS "
        "SELECT id, writefile('CANARY', vector) AS vector FROM old"
    ),
    "description that is nested": attack_store(
        "UPDATE models SET description = '" + "[" * 100_000 + "'"
    ),
    "description of another type": attack_store("UPDATE models SET description = '3'"),
    "pickle in a type of Arrow": attack_shards,
}

for _name, _header in HEADERS.items():
    ATTACKS[f"safetensors with a header {_name}"] = attack_safetensors(_header)
    ATTACKS[f"static embeddings with a header {_name}"] = attack_static(_header)
    ATTACKS[f"pipeline with a header {_name}"] = attack_pipeline_weights(_header)
