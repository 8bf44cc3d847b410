"""multimodal_pipeline: the steps, and a model of a table in one line."""

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC

from sklembed import (
    CallableBackend,
    DecisionFusionClassifier,
    EmbeddingClassifier,
    EmbeddingRegressor,
    FrozenEncoder,
    FusionClassifier,
    KernelFusionClassifier,
    multimodal_pipeline,
)

ANIMALS, VEHICLES = ["cat", "dog", "owl", "bee"], ["car", "bus", "van", "train"]


def _load():
    """Return the numbers of 20 letters in each text."""
    letters = "abcdefghijklmnoprstu"
    return lambda texts: np.array([[t.count(c) for c in letters] for t in texts])


LETTERS = FrozenEncoder(
    CallableBackend(_load, name="letters", version="1", modality="text", n_features=20),
    store=None,
)


def _load_pixels():
    """Return the pixels of tiny images."""
    return lambda images: np.array(
        [np.asarray(image.resize((2, 2))).ravel() for image in images], dtype=float
    )


IMAGES = FrozenEncoder(
    CallableBackend(
        _load_pixels, name="pixels", version="1", modality="image", n_features=12
    ),
    store=None,
)


def table(n_rows=60, seed=0):
    """Return a table of two classes with missing titles and prices, and its targets."""
    rng = np.random.default_rng(seed)
    y = np.arange(n_rows) % 2
    titles = []
    for label in y:
        word = rng.choice([ANIMALS, VEHICLES][label])
        titles.append(
            f"a {rng.choice(['red', 'blue', 'new'])} {word} {rng.choice(['here', 'there'])}"
        )
    prices = np.round(rng.lognormal(1 + y, 0.5), 2)
    X = pd.DataFrame(
        {
            "title": titles,
            "price": [f"${price:,.2f}" for price in prices],
            "shop": rng.choice(["north", "south", "west"], n_rows),
        }
    )
    X.loc[[3, 8], "title"] = None
    X.loc[[4, 8], "price"] = None
    return X, np.array(["pet", "ride"])[y], prices


def test_one_line_from_a_table_to_probabilities():
    X, y, _ = table()
    model = multimodal_pipeline("classifier", text_encoder=LETTERS)
    model.set_params(embeddingclassifier__random_state=0).fit(X, y)
    new, y_new, _ = table(30, seed=1)
    probabilities = model.predict_proba(new)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert model.score(new, y_new) > 0.8
    assert list(model[0].kinds_["kind"]) == ["text", "numeric", "categorical"]
    assert list(model[-1].blocks_) == ["title", "title_lexical", "table"]
    assert model[-1].table_blocks_ == ["table"]


def test_a_regressor_reads_the_same_table():
    X, y, prices = table()
    X["kind"] = y
    model = multimodal_pipeline("regressor", text_encoder=LETTERS)
    model.set_params(embeddingregressor__random_state=0)
    assert model.fit(X, np.log(prices)).score(X, np.log(prices)) > 0.5


@pytest.mark.parametrize(
    "estimator, steps",
    [
        ("classifier", ["embeddingclassifier"]),
        ("regressor", ["embeddingregressor"]),
        (HistGradientBoostingClassifier(), ["histgradientboostingclassifier"]),
        (RandomForestRegressor(), ["randomforestregressor"]),
        (KernelFusionClassifier(), ["kernelfusionclassifier"]),
        (FusionClassifier(), ["fusionclassifier"]),
        (Ridge(), ["simpleimputer", "standardscaler", "ridge"]),
        (SVC(), ["simpleimputer", "standardscaler", "svc"]),
    ],
)
def test_the_estimator_decides_the_preprocessing(estimator, steps):
    pipeline = multimodal_pipeline(estimator, text_encoder=LETTERS)
    assert list(pipeline.named_steps) == ["multimodalvectorizer", *steps]


HEADS = [
    HistGradientBoostingClassifier(max_iter=5),
    LogisticRegression(),
    KernelFusionClassifier(),
    DecisionFusionClassifier(LogisticRegression()),
    FusionClassifier(max_epochs=5),
    EmbeddingClassifier(members=["linear"]),
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_every_kind_of_estimator_is_fitted_with_missing_cells(head):
    X, y, _ = table()
    model = multimodal_pipeline(clone(head), text_encoder=LETTERS).fit(X, y)
    assert model.score(X, y) > 0.7


def test_images_are_a_block_of_their_own():
    X, y, _ = table()
    colors = {"pet": 40, "ride": 200}
    rng = np.random.default_rng(0)
    X["photo"] = [
        (colors[label] + rng.integers(0, 20, (4, 4, 3))).astype(np.uint8) for label in y
    ]
    model = multimodal_pipeline(
        KernelFusionClassifier(), text_encoder=LETTERS, image_encoder=IMAGES
    )
    assert model.fit(X, y).score(X, y) == 1
    assert "photo" in model[-1].blocks_


def test_parameters_reach_the_vectorizer():
    pipeline = multimodal_pipeline(
        kinds={"shop": "name"},
        text_encoder=None,
        image_encoder=None,
        lexical=False,
        n_jobs=2,
    )
    vectorizer, head = pipeline[0], pipeline[-1]
    assert vectorizer.kinds == {"shop": "name"}
    assert vectorizer.text_encoder is None
    assert vectorizer.image_encoder is None
    assert vectorizer.lexical is False
    assert vectorizer.n_jobs == head.n_jobs == 2


def test_grid_search_cross_validation_and_pickle():
    X, y, _ = table()
    head = EmbeddingClassifier(members=["linear"], cv=2, random_state=0)
    model = multimodal_pipeline(head, text_encoder=LETTERS)
    grid = {
        "multimodalvectorizer__lexical": [True, False],
        "embeddingclassifier__members": [["linear"], ["kernel"]],
    }
    search = GridSearchCV(model, grid, cv=2).fit(X, y)
    assert search.best_score_ > 0.7
    assert cross_val_score(model, X, y, cv=2).mean() > 0.7
    best = search.best_estimator_
    loaded = pickle.loads(pickle.dumps(best))
    np.testing.assert_array_equal(loaded.predict_proba(X), best.predict_proba(X))


def test_groups_reach_the_head():
    X, y, _ = table()
    head = EmbeddingClassifier(members=["linear"], cv=3, random_state=0)
    model = multimodal_pipeline(head, text_encoder=LETTERS)
    model.fit(X, y, embeddingclassifier__groups=np.arange(len(y)) // 4)
    assert model.score(X, y) > 0.7


@pytest.mark.parametrize(
    "estimator, error, message",
    [
        (
            "classify",
            ValueError,
            "'classifier', 'regressor' or an estimator; got 'classify'",
        ),
        (Ridge, TypeError, r"Pass Ridge\(\) instead of Ridge"),
        (LETTERS, TypeError, "must have fit and predict"),
        (EmbeddingRegressor, TypeError, "not a class"),
    ],
)
def test_other_estimators_are_refused(estimator, error, message):
    with pytest.raises(error, match=message):
        multimodal_pipeline(estimator)
