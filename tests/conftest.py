"""Offline settings, a store for the run, tiny checkpoints, and what several tests share."""

import os
import tempfile

# Set before transformers or scipy are imported: nothing is downloaded, the user's store is not
# used, and scikit-learn runs its array API check instead of skipping it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SCIPY_ARRAY_API"] = "1"
os.environ["SKLEMBED_STORE"] = os.path.join(
    tempfile.mkdtemp(prefix="sklembed-test-"), "store.sqlite"
)

import numpy as np
import pytest
import sklearn
from packaging.version import Version

from sklembed import CallableBackend, ContrastiveProjector, EmbeddingStore

VISION = ("vit", "dinov2", "dinov2_registers", "resnet", "convnext", "swin")
DECODERS = ("llama", "qwen", "gpt2")
MODERNBERT = {
    "pad_token_id": 0,
    "bos_token_id": 2,
    "cls_token_id": 2,
    "eos_token_id": 3,
    "sep_token_id": 3,
}
# A method of CalibratedClassifierCV; temperatures are new in scikit-learn 1.8.
CALIBRATION = (
    "temperature" if Version(sklearn.__version__) >= Version("1.8") else "sigmoid"
)
WORDS = "the a cat dog sat ran on under mat tree and then slept".split()


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` without a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(tmp_path / "store.sqlite")


def small_projector(**options):
    defaults = {
        "passthrough": False,
        "n_components": 4,
        "hidden_layer_sizes": (16,),
        "max_epochs": 5,
        "batch_size": 32,
        "random_state": 0,
    }
    return ContrastiveProjector(**(defaults | options))


def same_weights(one, other, **tolerance):
    assert one.weights_.keys() == other.weights_.keys()
    for name, value in one.weights_.items():
        np.testing.assert_allclose(
            value, other.weights_[name], err_msg=name, **tolerance
        )


def count_letters(texts):
    """Encode texts by the counts of eight letters and the length."""
    return np.array(
        [[text.count(letter) for letter in "aeinorst"] + [len(text)] for text in texts]
    )


def mean_colours(images):
    """Encode images by the mean and standard deviation of each channel."""
    pixels = [np.asarray(image, dtype=float).reshape(-1, 3) for image in images]
    return np.array([np.r_[p.mean(axis=0), p.std(axis=0)] for p in pixels])


@pytest.fixture
def text_backend():
    return CallableBackend(
        lambda: count_letters,
        name="letters",
        version="1",
        modality="text",
        n_features=9,
    )


@pytest.fixture
def image_backend():
    return CallableBackend(
        lambda: mean_colours,
        name="colours",
        version="1",
        modality="image",
        n_features=6,
    )


@pytest.fixture
def clusters():
    """Three noisy classes: an array of shape (90, 20), dtype float32, and labels."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 30)
    X = rng.normal(size=(3, 20))[y] + rng.normal(scale=1.5, size=(90, 20))
    return X.astype(np.float32), y


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Directories of tiny random checkpoints for `from_pretrained`, by name."""
    import torch
    import transformers as hf

    root = tmp_path_factory.mktemp("checkpoints")
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    vision = small | {"image_size": 32, "patch_size": 8}
    text = small | {"vocab_size": len(WORDS) + 5, "max_position_embeddings": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {
            "bert": hf.BertModel(hf.BertConfig(**text)),
            "vit": hf.ViTModel(hf.ViTConfig(**vision), add_pooling_layer=False),
            "dinov2": hf.Dinov2Model(hf.Dinov2Config(**vision, mlp_ratio=2)),
            "resnet": hf.ResNetModel(
                hf.ResNetConfig(
                    embedding_size=6, hidden_sizes=[8, 10, 12, 16], depths=[1] * 4
                )
            ),
            "dinov2_registers": hf.Dinov2WithRegistersModel(
                hf.Dinov2WithRegistersConfig(
                    **vision, mlp_ratio=2, num_register_tokens=3
                )
            ),
            "convnext": hf.ConvNextModel(
                hf.ConvNextConfig(
                    hidden_sizes=[8, 10, 12, 16], depths=[1] * 4, image_size=64
                )
            ),
            "mpnet": hf.MPNetModel(hf.MPNetConfig(**text, pad_token_id=1)),
            "modernbert": hf.ModernBertModel(hf.ModernBertConfig(**text, **MODERNBERT)),
            "qwen": hf.Qwen3Model(
                hf.Qwen3Config(**text, num_key_value_heads=2, head_dim=8)
            ),
            "llama": hf.LlamaModel(hf.LlamaConfig(**text, num_key_value_heads=2)),
            "gpt2": hf.GPT2Model(
                hf.GPT2Config(
                    vocab_size=len(WORDS) + 5,
                    n_embd=16,
                    n_layer=2,
                    n_head=2,
                    n_positions=24,
                )
            ),
            "roberta": hf.RobertaModel(hf.RobertaConfig(**text, pad_token_id=1)),
            "t5": hf.T5EncoderModel(
                hf.T5Config(
                    vocab_size=len(WORDS) + 5, d_model=16, d_ff=24, d_kv=8, num_layers=2
                )
            ),
            "swin": hf.SwinModel(
                hf.SwinConfig(
                    image_size=32,
                    patch_size=4,
                    window_size=4,
                    embed_dim=8,
                    depths=[1, 1],
                    num_heads=[1, 2],
                )
            ),
            "siglip": hf.SiglipModel(
                hf.SiglipConfig(
                    text_config=text | {"projection_size": 16}, vision_config=vision
                )
            ),
            "clip": hf.CLIPModel(
                hf.CLIPConfig(
                    text_config=text
                    | {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2},
                    vision_config=vision,
                    projection_dim=12,
                )
            ),
        }
    for name, model in models.items():
        model.save_pretrained(root / name)
        if name not in VISION:
            pad = {} if name in ("llama", "gpt2") else {"pad_token": "[PAD]"}
            side = "left" if name in DECODERS else "right"
            _tokenizer(padding_side=side, **pad).save_pretrained(root / name)
        if name == "clip":
            hf.CLIPImageProcessorPil(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            ).save_pretrained(root / name)
        elif name in (*VISION, "siglip"):
            side = 64 if name in ("resnet", "convnext") else 32
            processor = hf.ViTImageProcessorPil(size={"height": side, "width": side})
            processor.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


def _tokenizer(**options):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        **options,
    )
