"""ZeroShotClassifier: classes as texts, in any space that texts share with the rows."""

import pickle

import numpy as np
import pandas as pd
import pytest
from conftest import CALIBRATION
from PIL import Image
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import DataConversionWarning
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sklembed import (
    CallableBackend,
    CanonicalAligner,
    CrossAttentionAdaptor,
    FrozenEncoder,
    ModalityGapAligner,
    SharedFusionEncoder,
    ZeroShotClassifier,
)

NAMES = ["ant", "bee", "cow", "dog"]
BLOCKS = {"text": slice(0, 4), "image": slice(4, 10)}


def load():
    return count_names


def count_names(texts):
    """Encode texts by the number of occurrences of each name."""
    return np.array([[float(text.count(name)) for name in NAMES] for text in texts])


@pytest.fixture
def texts():
    backend = CallableBackend(
        load, name="names", version="1", modality="text", n_features=4
    )
    return FrozenEncoder(backend, store=None)


@pytest.fixture
def animals():
    """Captions and images of four animals: 200 rows of both blocks, and the names."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(NAMES, 50))
    text = count_names(y) + rng.normal(scale=0.2, size=(200, 4))
    image = text @ rng.normal(size=(4, 6)) + rng.normal(scale=0.2, size=(200, 6))
    return np.hstack([text, image]).astype(np.float32), y


CHEAP = {"blocks": BLOCKS, "max_epochs": 40, "batch_size": 25, "random_state": 0}
EASY = {"dropout": 0.1, "input_dropout": 0.0}
ENCODERS = {
    "SharedFusionEncoder": SharedFusionEncoder(8, **CHEAP, **EASY),
    "CrossAttentionAdaptor": CrossAttentionAdaptor(8, **CHEAP, **EASY),
    "CanonicalAligner": CanonicalAligner(blocks=BLOCKS),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_images_are_classified_by_words_in_any_learned_space(name, animals, texts):
    X, y = animals
    classifier = ZeroShotClassifier(ENCODERS[name], classes=NAMES, text_encoder=texts)
    classifier.fit(X[:100])
    X = X[100:].copy()
    X[:, BLOCKS["text"]] = np.nan
    assert classifier.score(X, y[100:]) > 0.85
    assert classifier.predict_proba(X).sum(axis=1) == pytest.approx(1.0)
    assert classifier.classes_.tolist() == NAMES


def test_an_aligner_of_one_width_will_do(texts):
    y = np.repeat(NAMES, 10)
    X = np.hstack([count_names(y), count_names(y) + 0.1])
    aligner = ModalityGapAligner(
        {"text": slice(0, 4), "image": slice(4, 8)}, method="center"
    )
    classifier = ZeroShotClassifier(aligner, classes=NAMES, text_encoder=texts)
    assert classifier.fit(X).score(X, y) == 1.0


def test_texts_can_be_classified_too(animals, texts):
    X, y = animals
    classifier = ZeroShotClassifier(
        CanonicalAligner(blocks=BLOCKS),
        classes=NAMES,
        text_encoder=texts,
        modality="text",
    )
    assert classifier.fit(X).score(X, y) > 0.9


def test_a_frozen_encoder_is_used_as_it_is_and_needs_no_rows(animals, texts):
    X, y = animals
    fitted = CanonicalAligner(blocks=BLOCKS).fit(X)
    frozen = ZeroShotClassifier(
        FrozenEstimator(fitted), classes=NAMES, text_encoder=texts
    )
    anew = ZeroShotClassifier(
        CanonicalAligner(blocks=BLOCKS), classes=NAMES, text_encoder=texts
    )
    np.testing.assert_array_equal(
        frozen.fit(None).predict_proba(X), anew.fit(X).predict_proba(X)
    )
    assert frozen.encoder_.estimator is fitted


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_dual_encoder_brings_its_own_text_tower(kind, checkpoints):
    encoder = FrozenEncoder(checkpoints[kind], modality="image", store=None)
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(p) for p in rng.integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    ]
    classifier = ZeroShotClassifier(encoder, "the {}", classes=["cat", "dog"]).fit(None)
    tower = clone(encoder).set_params(modality="text")
    words, seen = tower.transform(["the cat", "the dog"]), encoder.transform(images)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    logits = seen @ words.T / 0.01
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(classifier.predict_proba(images), expected, rtol=1e-3)


def test_a_class_is_the_mean_of_the_unit_vectors_of_its_texts(animals, texts):
    prompts = {"b": ["ant", "ant bee bee"], "a": "cow"}
    encoder = FrozenEstimator(CanonicalAligner(blocks=BLOCKS).fit(animals[0]))
    classifier = ZeroShotClassifier(encoder, prompts, text_encoder=texts).fit(None)
    assert classifier.classes_.tolist() == ["a", "b"]
    assert classifier.prompts_ == {"a": ["cow"], "b": ["ant", "ant bee bee"]}
    z = encoder.encode(texts.transform(["ant", "ant bee bee"]), "text")
    mean = (z / np.linalg.norm(z, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(
        classifier.class_embeddings_[1], mean / np.linalg.norm(mean), rtol=1e-5
    )


def test_a_template_is_filled_with_the_label_whatever_its_type(animals, texts):
    fitted = CanonicalAligner(blocks=BLOCKS).fit(animals[0])
    templates = ["the ant {} {x}", "bee {}{}"]
    classifier = ZeroShotClassifier(
        FrozenEstimator(fitted), templates, classes=[7, 3], text_encoder=texts
    )
    assert classifier.fit(None).prompts_ == {
        3: ["the ant 3 {x}", "bee 33"],
        7: ["the ant 7 {x}", "bee 77"],
    }


def test_y_names_the_classes_and_is_not_learned_from(animals, texts):
    X, y = animals
    classifier = ZeroShotClassifier(CanonicalAligner(blocks=BLOCKS), text_encoder=texts)
    shuffled = np.random.default_rng(1).permutation(y)
    np.testing.assert_array_equal(
        clone(classifier).fit(X, y).predict_proba(X),
        clone(classifier).fit(X, shuffled).predict_proba(X),
    )


def test_the_learned_temperature_is_the_encoder_s(animals, texts):
    X, _ = animals
    classifier = ZeroShotClassifier(
        ENCODERS["SharedFusionEncoder"], classes=NAMES, text_encoder=texts
    ).fit(X)
    assert classifier.temperature_ == classifier.encoder_.temperature_
    classifier.set_params(
        encoder=FrozenEstimator(classifier.encoder_), temperature=0.5
    ).fit(None)
    assert classifier.temperature_ == 0.5


def test_the_calibrated_temperature_makes_the_labels_likeliest(animals, texts):
    X, y = animals
    classifier = ZeroShotClassifier(
        CanonicalAligner(blocks=BLOCKS),
        classes=NAMES,
        text_encoder=texts,
        temperature="calibrated",
    ).fit(X, y)
    least = log_loss(y, classifier.predict_proba(X))
    for factor in (0.8, 1.25):
        other = clone(classifier).set_params(
            temperature=classifier.temperature_ * factor
        )
        assert log_loss(y, other.fit(X).predict_proba(X)) > least


def test_it_works_in_a_search_and_in_calibration(animals, texts):
    X, y = animals
    classifier = ZeroShotClassifier(CanonicalAligner(blocks=BLOCKS), text_encoder=texts)
    search = GridSearchCV(classifier, {"encoder__n_components": [1, 3]}, cv=3).fit(X, y)
    assert search.best_params_ == {"encoder__n_components": 3}
    calibrated = CalibratedClassifierCV(classifier, method=CALIBRATION, cv=3).fit(X, y)
    assert calibrated.predict_proba(X).shape == (200, 4)


def test_frames_and_pickles_do_the_same(animals, texts):
    X, _ = animals
    names = [f"text__{i}" for i in range(4)] + [f"image__{i}" for i in range(6)]
    frame = pd.DataFrame(X, columns=names)
    classifier = ZeroShotClassifier(
        CanonicalAligner(), classes=NAMES, text_encoder=texts
    )
    classifier.fit(frame)
    array = clone(classifier).set_params(encoder__blocks=BLOCKS).fit(X)
    expected = array.predict_proba(X)
    np.testing.assert_array_equal(classifier.predict_proba(frame), expected)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(array)).predict_proba(X), expected
    )
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(frame[names[::-1]])


BAD = {
    "a template without a place": (
        {"prompts": "an image"},
        "no {} for the class's name",
    ),
    "a class without a text": ({"prompts": {"ant": "ant"}}, "no text for class 'bee'"),
    "an empty text": (
        {"prompts": dict.fromkeys(NAMES, " ")},
        "must be non-empty strings",
    ),
    "no text": ({"prompts": {name: [] for name in NAMES}}, "must be non-empty strings"),
    "the same texts": ({"prompts": dict.fromkeys(NAMES, "ant")}, "have the same texts"),
    "no class": ({"classes": None}, "No classes given. Pass classes"),
    "one class": ({"classes": ["ant"]}, "At least two classes are needed"),
    "a missing class": ({"classes": ["ant", None]}, "A class is None or NaN"),
    "a text that is a number": (
        {"prompts": dict.fromkeys(NAMES, 5)},
        "must be non-empty strings; got",
    ),
    "an encoder that is a pipeline": (
        {"encoder": make_pipeline(CanonicalAligner(blocks=BLOCKS))},
        "A Pipeline as encoder has no method encode",
    ),
    "no encoder of texts": ({"text_encoder": None}, "Set text_encoder"),
    "no such block": ({"modality": "sound"}, "no modality 'sound'"),
    "no such block of texts": ({"text_modality": "words"}, "no modality 'words'"),
    "no labels to calibrate by": ({"temperature": "calibrated"}, "needs labelled rows"),
    "no temperature": ({"temperature": 0.0}, "temperature"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_to_do(case, animals, texts):
    X, _ = animals
    options, message = BAD[case]
    given = {
        "encoder": CanonicalAligner(blocks=BLOCKS),
        "classes": NAMES,
        "text_encoder": texts,
    }
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(**given | options).fit(X)


def test_an_encoder_has_rows_to_be_fitted_on_or_is_frozen(texts):
    classifier = ZeroShotClassifier(
        CanonicalAligner(blocks=BLOCKS), classes=NAMES, text_encoder=texts
    )
    with pytest.raises(ValueError, match=r"X is None.* FrozenEstimator\(encoder\)"):
        classifier.fit(None)


def test_an_encoder_that_gives_tokens_is_refused(animals, texts):
    adaptor = CrossAttentionAdaptor(8, **CHEAP | {"max_epochs": 1}, output="tokens")
    with pytest.raises(ValueError, match="returns tokens.* output='pooled'"):
        ZeroShotClassifier(adaptor, classes=NAMES, text_encoder=texts).fit(animals[0])


def test_labels_to_calibrate_by_must_be_of_a_class(animals, texts):
    X, y = animals
    classifier = ZeroShotClassifier(
        CanonicalAligner(blocks=BLOCKS),
        classes=NAMES[:3],
        text_encoder=texts,
        temperature="calibrated",
    )
    with pytest.raises(ValueError, match="'dog', which is none of the classes"):
        classifier.fit(X, y)


def test_a_row_without_the_modality_is_named(animals, texts):
    X, _ = animals
    classifier = ZeroShotClassifier(
        CanonicalAligner(blocks=BLOCKS), classes=NAMES, text_encoder=texts
    ).fit(X)
    X[3:5, BLOCKS["image"]] = np.nan
    with pytest.raises(ValueError, match="Row 3 has no 'image'.*2 such rows"):
        classifier.predict(X)


def test_an_encoder_without_texts_is_refused(image_backend):
    encoder = FrozenEncoder(image_backend, store=None)
    with pytest.raises(ValueError, match="modality='text', but") as caught:
        ZeroShotClassifier(encoder, classes=NAMES).fit(None)
    assert "encoding the prompts by text_encoder" in caught.value.__notes__[0]


def test_texts_of_another_width_are_laid_at_the_text_encoder_s_door(animals, texts):
    X, _ = animals
    blocks = {"text": slice(0, 3), "image": slice(3, 10)}
    aligner = CanonicalAligner(blocks=blocks)
    with pytest.raises(ValueError, match="has 3 columns; got 4") as caught:
        ZeroShotClassifier(aligner, classes=NAMES, text_encoder=texts).fit(X)
    assert "encoding the output of text_encoder" in caught.value.__notes__[0]


@pytest.mark.parametrize("shape", ["column", "short"])
def test_labels_to_calibrate_by_are_one_to_a_row(shape, animals, texts):
    X, y = animals
    classifier = ZeroShotClassifier(
        CanonicalAligner(blocks=BLOCKS),
        classes=NAMES,
        text_encoder=texts,
        temperature="calibrated",
    )
    if shape == "short":
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            classifier.fit(X, y[:-1])
        return
    expected = clone(classifier).fit(X, y).temperature_
    with pytest.warns(DataConversionWarning):
        assert classifier.fit(X, y[:, None]).temperature_ == expected
