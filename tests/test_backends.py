"""Backends of users' own: what CallableBackend asks for, accepts and refuses."""

import functools
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from joblib import wrap_non_picklable_objects
from PIL import Image

from sklembed import CallableBackend, FrozenEncoder


def encoder_of(load, name, n_features=3, modality="text", **options):
    backend = CallableBackend(
        load, name=name, version="1", modality=modality, n_features=n_features
    )
    return FrozenEncoder(backend, store=None, **options)


def test_a_backend_is_loaded_once_a_process_and_not_cloned():
    from sklearn.base import clone

    loads = []

    def load():
        loads.append(1)
        return lambda texts: np.ones((len(texts), 2))

    backend = CallableBackend(
        load, name="once", version="1", modality="text", n_features=2
    )
    encoder = FrozenEncoder(backend, store=None)
    for text in "abc":
        clone(encoder).transform([text])
    assert len(loads) == 1
    assert clone(encoder).model is backend


def scaled(factor):
    def load():
        return lambda texts: np.full((len(texts), 3), factor)

    return load


def fill(factor):
    return scaled(factor)()


def test_another_function_of_the_same_name_and_version_is_warned_of():
    encoder_of(scaled(1.0), "scaled").transform(["a"])
    encoder_of(scaled(1.0), "scaled").transform(["a"])
    with pytest.warns(UserWarning, match="Another function load .* Change the version"):
        vectors = encoder_of(scaled(2.0), "scaled").transform(["a"])
    np.testing.assert_array_equal(vectors, [[1, 1, 1]])
    with pytest.warns(UserWarning, match="Another function load"):
        encoder_of(lambda: scaled(1.0)(), "scaled").transform(["a"])
    encoder_of(functools.partial(fill, 1.0), "filled").transform(["a"])
    with pytest.warns(UserWarning, match="Another function load"):
        encoder_of(functools.partial(fill, 2.0), "filled").transform(["a"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"load": 3}, TypeError, "load must be a function"),
        ({"modality": "sound"}, ValueError, "modality must be one of"),
        ({"n_features": None}, ValueError, "n_features must be the width.*got None"),
        ({"name": ""}, TypeError, "name must be a non-empty str"),
        ({"version": 1}, TypeError, "version must be a non-empty str"),
    ],
)
def test_a_callable_backend_checks_its_arguments(options, error, message):
    good = {
        "load": list,
        "name": "n",
        "version": "1",
        "modality": "text",
        "n_features": 1,
    }
    with pytest.raises(error, match=message):
        CallableBackend(**(good | options))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda texts: None, "load must take no arguments.*requires arguments"),
        (
            lambda: "text",
            "load must return the encoding function, or a pair.*returned 'text'",
        ),
    ],
)
def test_a_load_of_the_wrong_form_is_refused(load, message):
    backend = CallableBackend(
        load, name=message, version="1", modality="text", n_features=1
    )
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


def test_a_load_may_return_a_step_for_threads_and_the_model():
    def load():
        return str.split, lambda cells: np.array(
            [[len(words), 0, 0] for words in cells]
        )

    vectors = encoder_of(load, "two steps").transform(["one", "one and two"])
    assert vectors[:, 0].tolist() == [1, 3]


def test_tokens_of_a_function_are_arrays_of_their_own_length():
    def load():
        return lambda texts: [np.ones((len(text.split()), 3)) for text in texts]

    tokens = encoder_of(load, "tokens", output="tokens").transform(
        ["one", None, "one and two"]
    )
    assert tokens.shape == (3, 1)
    assert tokens.dtype == object
    assert [None if t is None else t.shape for t in tokens[:, 0]] == [
        (1, 3),
        None,
        (3, 3),
    ]
    assert tokens[0, 0].dtype == np.float32


def test_tokens_of_the_wrong_shape_are_refused():
    def load():
        return lambda texts: [np.ones(3) for text in texts]

    with pytest.raises(
        ValueError, match=r"returned shape \[\(3,\)\].*1 arrays of shape"
    ):
        encoder_of(load, "no tokens", output="tokens").transform(["one"])


def test_a_function_has_no_grid():
    with pytest.raises(ValueError, match="not available for the backend object"):
        encoder_of(lambda: list, "none").grid_shape()


def pickled(encoder):
    """Pickle as joblib does for its workers, functions by value."""
    return pickle.dumps(wrap_non_picklable_objects(encoder))


def test_a_pickle_that_carries_a_model_along_is_warned_of_once():
    model = np.zeros(200_000)

    def captures():
        return lambda texts: model[: len(texts), None]

    def loads_inside():
        return lambda texts: np.zeros(200_000)[: len(texts), None]

    encoder = encoder_of(captures, "captures", n_features=1)
    with pytest.warns(
        UserWarning, match=r"'captures'.* is a pickle of 2 MB.*inside of load"
    ):
        content = pickled(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickled(encoder)
        pickled(pickle.loads(content))
        pickled(encoder_of(loads_inside, "loads inside", n_features=1))
    np.testing.assert_array_equal(pickle.loads(content).transform(["a"]), [[0]])


def image_encoder(name, **options):
    def load():
        return lambda images: np.array([image.size for image in images])

    backend = CallableBackend(
        load, name=name, version="1", modality="image", n_features=2, **options
    )
    return FrozenEncoder(backend, store=None)


def test_jpegs_are_reduced_for_a_model_with_an_image_size():
    buffer = io.BytesIO()
    Image.new("RGB", (256, 512)).save(buffer, "JPEG")
    photograph = buffer.getvalue()
    pixels = np.zeros((512, 256, 3), dtype=np.uint8)
    vectors = image_encoder("sizes", image_size=32).transform([photograph, pixels])
    assert vectors.tolist() == [[128, 256], [256, 512]]
    vectors = image_encoder("sizes").transform([photograph, pixels])
    assert vectors.tolist() == [[256, 512], [256, 512]]


def test_only_an_image_size_changes_the_fingerprint_of_an_image_encoder():
    fingerprints = set()
    for image_size in (None, 32, 64):
        encoder = image_encoder("n", image_size=image_size)
        fingerprints.add(encoder.fingerprint())
    assert len(fingerprints) == 3
    assert "39c6c9d16a4396c37eadf1972f83ebb0" in fingerprints  # existing stores


@pytest.mark.parametrize("image_size", [0, -1, 2.5, "224", (224, 224)])
def test_an_image_size_is_a_positive_integer(image_size):
    with pytest.raises(ValueError, match="positive integer, or None; got"):
        image_encoder("n", image_size=image_size)


def test_texts_have_no_image_size():
    with pytest.raises(ValueError, match="no effect: the cells are text"):
        CallableBackend(
            list, name="n", version="1", modality="text", n_features=1, image_size=1
        )


def network_on(device):
    def load():
        network = torch.nn.Linear(2, 3, bias=False)
        torch.nn.init.constant_(network.weight, 2.0)
        return lambda text: torch.tensor([len(text), 1.0]), network.to(device)

    return load


def test_a_network_on_an_accelerator_is_not_offered_to_runtimes():
    networks = []
    for device in ("cpu", "meta"):
        backend = encoder_of(network_on(device), f"network on {device}").model
        networks.append(backend.encoding(backend.load()).network)
    assert networks[0] is not None
    assert networks[1] is None


@pytest.mark.gpu
def test_a_network_runs_on_the_device_of_its_weights():
    vectors = encoder_of(network_on("cuda"), "on a GPU").transform(["ab", "abcd"])
    np.testing.assert_allclose(vectors, [[6.0] * 3, [10.0] * 3], rtol=1e-3)
