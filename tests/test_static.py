"""Static token embeddings: vectors against model2vec and sentence-transformers."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from sklembed import EmbeddingStore, FrozenEncoder, prefetch

WORDS = "the a cat dog sat ran on under mat tree and then sl ##ept ##s".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCABULARY = {token: i for i, token in enumerate(SPECIAL + WORDS)}
TEXTS = [
    "the cat sat",
    "Cats and dogs slept, then ran",
    "",
    "unknown",
    "a wolf slept under the tree",
    "the dog " * 40,
    "mat",
]


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    return tokenizer


def unigram():
    """Its unknown token has a number instead of a name."""
    pieces = [(token, -float(i)) for i, token in enumerate(VOCABULARY)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


N_TOKENS = len(VOCABULARY)


def table(n_rows=N_TOKENS, dtype="float32"):
    vectors = np.random.default_rng(0).normal(size=(n_rows, 6))
    if dtype == "int8":
        return np.rint(40 * vectors).clip(-127, 127).astype(dtype)
    return vectors.astype(dtype)


def save_static(path, tensors, config, tokenizer=None):
    path.mkdir()
    (tokenizer or word_pieces()).save(str(path / "tokenizer.json"))
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def static(tmp_path):
    """A directory as model2vec writes it."""
    config = {"model_type": "model2vec", "normalize": True}
    return save_static(tmp_path / "static", {"embeddings": table()}, config)


def save_sentence_transformer(path, *modules, dtype="float32", **options):
    """Save a directory with sentence-transformers. Return its path and vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    embedding = StaticEmbedding(word_pieces(), embedding_weights=table(dtype=dtype))
    model = SentenceTransformer(modules=[embedding, *modules], device="cpu", **options)
    model.save(str(path))
    saved = SentenceTransformer(str(path), device="cpu")
    return path, saved.encode(TEXTS, show_progress_bar=False)


def encode(model, cells, **options):
    return FrozenEncoder(model, store=None, **options).transform(cells)


CLUSTERED = {
    "embeddings": table(5),
    "mapping": np.arange(N_TOKENS) % 5,
    "weights": np.linspace(0.5, 2, N_TOKENS, dtype="float32"),
}


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"embeddings": table()}, {}),
        ({"embeddings": table()}, {"normalize": True, "max_length": 5}),
        ({"embeddings": table()}, {"max_length": None}),
        ({"embeddings": table(), "weights": CLUSTERED["weights"]}, {}),
        ({"embeddings": table(5), "mapping": CLUSTERED["mapping"]}, {}),
        (CLUSTERED, {"normalize": True}),
        (CLUSTERED | {"embeddings": table(5, "float16")}, {"normalize": True}),
        (CLUSTERED | {"embeddings": table(5, "int8")}, {}),
        ({"embeddings": table(dtype="float16")}, {}),
        ({"embeddings": table(dtype="float64")}, {"normalize": True}),
        ({"embeddings": table(dtype="int8")}, {"normalize": True}),
    ],
)
@pytest.mark.parametrize("tokenizer", [word_pieces, unigram])
def test_vectors_equal_model2vec(tmp_path, tensors, config, tokenizer):
    library = pytest.importorskip("model2vec")
    config = {"model_type": "model2vec"} | config
    path = save_static(tmp_path / "static", tensors, config, tokenizer())
    model = library.StaticModel.from_pretrained(path)
    np.testing.assert_allclose(
        encode(path, TEXTS), model.encode(TEXTS), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        encode(path, TEXTS, max_length=3),
        model.encode(TEXTS, max_length=3),
        rtol=1e-6,
        atol=1e-6,
    )
    tokens = encode(path, TEXTS, output="tokens", max_length=3)[:, 0]
    expected = model.encode_as_sequence(TEXTS, max_length=3)
    for vectors, expected_vectors in zip(tokens, expected, strict=True):
        np.testing.assert_allclose(vectors, expected_vectors, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_directories_that_model2vec_saves(tmp_path, dtype):
    """They also have sentence-transformers files, and no model_type by default."""
    library = pytest.importorskip("model2vec")
    model = library.StaticModel(
        table(dtype=dtype), word_pieces(), normalize=True, max_length=2
    )
    model.save_pretrained(tmp_path / "static")
    vectors = encode(tmp_path / "static", TEXTS)
    np.testing.assert_allclose(vectors, model.encode(TEXTS), rtol=1e-6, atol=1e-6)
    # The limit is also in the tokenizer file, where a larger one must replace it.
    vectors = encode(tmp_path / "static", TEXTS, max_length=4)
    expected = model.encode(TEXTS, max_length=4)
    np.testing.assert_allclose(vectors, expected, rtol=1e-6, atol=1e-6)


def test_unknown_words_are_left_out(static):
    vectors = encode(static, ["the wolf cat", "the cat", "wolf"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    rows = table()[[VOCABULARY["the"], VOCABULARY["cat"]]]
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_array_equal(vectors[2], np.zeros(6))


@pytest.mark.parametrize(
    "options",
    [{}, {"truncate_dim": 4}, {"prompts": {"q": "the "}, "default_prompt_name": "q"}],
)
@pytest.mark.parametrize("is_normalized", [False, True])
def test_vectors_equal_sentence_transformers(tmp_path, options, is_normalized):
    from sentence_transformers.sentence_transformer.modules import Normalize

    modules = [Normalize()] if is_normalized else []
    path, expected = save_sentence_transformer(tmp_path / "st", *modules, **options)
    encoder = FrozenEncoder(path, store=None)
    np.testing.assert_allclose(encoder.transform(TEXTS), expected, atol=1e-6)
    assert len(encoder.get_feature_names_out()) == expected.shape[1]
    description = encoder._backend().describe()
    assert description["unit_length"] == (
        is_normalized and "truncate_dim" not in options
    )


def test_half_precision_equals_sentence_transformers_up_to_rounding(tmp_path):
    path, expected = save_sentence_transformer(tmp_path / "st", dtype="float16")
    np.testing.assert_allclose(encode(path, TEXTS), expected, rtol=2e-3, atol=2e-3)


def test_a_folder_of_older_releases_is_read(tmp_path):
    path, expected = save_sentence_transformer(tmp_path / "st")
    (path / "0_StaticEmbedding").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (path / name).rename(path / "0_StaticEmbedding" / name)
    module = {"path": "0_StaticEmbedding"}
    module["type"] = "sentence_transformers.models.StaticEmbedding"
    (path / "modules.json").write_text(json.dumps([module]))
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-6)


def test_the_limit_of_a_tokenizer_holds(tmp_path):
    """sentence-transformers cuts texts as the tokenizer file says, also on the left."""
    from sentence_transformers import SentenceTransformer

    path, _ = save_sentence_transformer(tmp_path / "st")
    tokenizer = word_pieces()
    tokenizer.enable_truncation(4, direction="left")
    tokenizer.save(str(path / "tokenizer.json"))
    expected = SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-6)
    with pytest.raises(ValueError, match="max_length=5, but .* at most 4 tokens"):
        encode(path, TEXTS, max_length=5)


def test_max_length_cuts_texts(static):
    cut = encode(static, ["a on a cat ran"], max_length=2)
    np.testing.assert_array_equal(cut, encode(static, ["a on"]))


def test_a_vector_does_not_depend_on_its_batch(static):
    vectors = encode(static, TEXTS)
    np.testing.assert_array_equal(vectors, encode(static, TEXTS, batch_size=1))
    np.testing.assert_array_equal(vectors[::-1], encode(static, TEXTS[::-1]))


def test_neither_torch_nor_transformers_is_imported(static, tmp_path):
    code = f"""
import sys
from sklembed import FrozenEncoder
encoder = FrozenEncoder({str(static)!r}, store={str(tmp_path / "store.sqlite")!r})
print(encoder.fit(["the cat"]).transform(["the cat", "a dog"]).shape)
print({{"torch", "transformers", "model2vec"}} & set(sys.modules))
"""
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, check=True, capture_output=True, text=True)
    assert out.stdout == "(2, 6)\nset()\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "layer=0"),
        ({"layer": [-1, -2]}, r"layer=\(-1, -2\)"),
        ({"layer_aggregation": "mean"}, "layer_aggregation='mean'"),
        ({"pooling": "cls"}, "pooling='cls'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"device": "cuda"}, "device='cuda'"),
        ({"modality": "image"}, "modality='image'"),
    ],
)
def test_parameters_without_an_effect_are_refused(static, options, message):
    with pytest.raises(ValueError, match=f"{message}, but .* static token embeddings"):
        FrozenEncoder(static, **options).fit(TEXTS)


def test_pooling_of_tokens_is_refused(static):
    with pytest.raises(ValueError, match="pooling='mean' would have no effect"):
        FrozenEncoder(static, output="tokens", pooling="mean").fit(TEXTS)


def test_texts_have_no_grid(static):
    with pytest.raises(ValueError, match="encodes text; only images have a grid"):
        FrozenEncoder(static).grid_shape()


def test_other_values_without_an_effect_are_accepted(static):
    options = {"pooling": "mean", "dtype": "float32", "device": "cpu"}
    encoder = FrozenEncoder(static, modality="text", **options)
    assert encoder.fingerprint() == FrozenEncoder(static).fingerprint()
    assert encoder.fingerprint() != FrozenEncoder(static, max_length=3).fingerprint()


@pytest.mark.parametrize("library", ["model2vec", "sentence-transformers"])
def test_a_fitted_encoder_returns_stored_vectors(tmp_path, store, static, library):
    path = static
    if library == "sentence-transformers":
        path, _ = save_sentence_transformer(tmp_path / "st")
    encoder = FrozenEncoder(path, store=store)
    vectors = encoder.fit_transform(TEXTS)
    np.testing.assert_array_equal(vectors, encode(path, TEXTS))
    assert encoder.verify(TEXTS)["max_error"] == 0
    served = encoder.stats()["served"]
    np.testing.assert_array_equal(encoder.transform(TEXTS), vectors)
    assert encoder.stats()["served"] == served + len(TEXTS)
    shutil.move(path, tmp_path / "moved")
    unpickled = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(unpickled.transform(TEXTS), vectors)
    with pytest.raises(OSError, match="There is no directory"):
        unpickled.transform(["a new text"])
    unpickled.set_params(model=tmp_path / "moved")
    assert unpickled.transform(["a new cat"]).shape == (1, 6)


def test_changed_embeddings_have_another_fingerprint(static):
    encoder = FrozenEncoder(static, store=None).fit(TEXTS)
    save_file({"embeddings": 2 + table()}, static / "model.safetensors")
    with pytest.warns(UserWarning, match="has changed since fit"):
        vectors = encoder.transform(["the cat"])
    np.testing.assert_array_equal(vectors, encode(static, ["the cat"]))


def test_prefetch_encodes_each_text_once(static, tmp_path):
    encoder = FrozenEncoder(static, store=EmbeddingStore(tmp_path / "s.sqlite"))
    assert prefetch(encoder, [*TEXTS, *TEXTS])["encoded"].tolist() == [len(TEXTS)]
    assert prefetch(encoder, TEXTS)["encoded"].tolist() == [0]


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_damaged_files_are_named(static, name):
    content = (static / name).read_bytes()
    (static / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=f"{name}.* (Download|download)"):
        encode(static, TEXTS)
    (static / name).unlink()
    with pytest.raises(OSError, match=f"no file '{name}'"):
        encode(static, TEXTS)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeddings": table(8)}, "19 tokens, and its weights 8"),
        (CLUSTERED | {"embeddings": table(3)}, "19, in a table of 3 vectors"),
        ({"other": table()}, r"they are \['other'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(static, tensors, message):
    save_file(tensors, static / "model.safetensors")
    with pytest.raises(OSError, match=message):
        encode(static, TEXTS)


def test_weights_in_bfloat16_are_refused(static):
    import torch
    from safetensors.torch import save_file as save_tensors

    embeddings = torch.from_numpy(table()).bfloat16()
    save_tensors({"embeddings": embeddings}, static / "model.safetensors")
    with pytest.raises(OSError, match="numpy cannot read .*Save them in float16"):
        encode(static, TEXTS)


def test_modules_that_are_not_supported_are_named(tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense

    path, _ = save_sentence_transformer(tmp_path / "st", Dense(6, 3))
    with pytest.raises(ValueError, match="a Dense module after StaticEmbedding"):
        FrozenEncoder(path).fit(TEXTS)


@pytest.mark.parametrize("library", ["model2vec", "sentence-transformers"])
def test_a_hub_model_is_found_in_the_local_cache(
    static, tmp_path, monkeypatch, library
):
    path = static
    if library == "sentence-transformers":
        path, _ = save_sentence_transformer(tmp_path / "st")
    commit = "ab" * 19 + ("01" if library == "model2vec" else "02")
    folder = tmp_path / "hub" / f"models--someone--{library}"
    shutil.copytree(path, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    absent = folder / ".no_exist" / commit
    absent.mkdir(parents=True)
    for name in ("config.json", "modules.json", "1_Normalize/config.json"):
        if not (path / name).exists():
            (absent / name).parent.mkdir(exist_ok=True)
            (absent / name).touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path / "hub")
    vectors = encode(f"someone/{library}", TEXTS, local_files_only=True)
    np.testing.assert_array_equal(vectors, encode(path, TEXTS))
