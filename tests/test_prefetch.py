"""prefetch: the parent encodes what a pipeline or a search will ask for; workers load nothing."""

import os

import numpy as np
import pandas as pd
import pytest
from conftest import count_letters
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import BaggingClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sklembed import (
    CallableBackend,
    EmbeddingStore,
    FrozenEncoder,
    PerModalityUnion,
    prefetch,
)

N_ROWS = 24


def _load_in_the_parent_only():
    assert os.getpid() == int(os.environ["PREFETCHING_PROCESS"])
    return count_letters


@pytest.fixture
def only_here(monkeypatch):
    """A text backend that loads in this process and in no worker."""
    monkeypatch.setenv("PREFETCHING_PROCESS", str(os.getpid()))
    return CallableBackend(
        _load_in_the_parent_only,
        name="here",
        version="1",
        modality="text",
        n_features=9,
    )


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    notes = [f"note {i % 20} {'xo'[i % 2]}" if i % 5 else None for i in range(N_ROWS)]
    pictures = [rng.integers(0, 255, (3, 3, 3), dtype=np.uint8) for _ in range(N_ROWS)]
    X = pd.DataFrame(
        {"note": notes, "picture": pictures, "size": np.arange(N_ROWS) * 1.0}
    )
    return X, np.arange(N_ROWS) % 2


def union_of(text, image=None):
    branches = [("text", text, "note"), ("numbers", StandardScaler(), ["size"])]
    return PerModalityUnion(branches + ([("image", image, "picture")] if image else []))


def classifier():
    return make_pipeline(FunctionTransformer(np.nan_to_num), LogisticRegression())


def test_workers_find_everything_and_load_nothing(only_here, store, table):
    X, y = table
    encoder = FrozenEncoder(only_here, store=store)
    pipeline = make_pipeline(
        union_of(encoder), *(step for _, step in classifier().steps)
    )
    search = GridSearchCV(
        pipeline,
        {"logisticregression__C": [0.1, 1]},
        cv=3,
        n_jobs=2,
        error_score="raise",
    )
    report = prefetch(search, X)
    settings = {"pooling": None, "layer": None, "unit_length": False}
    assert report.to_dict("records") == [
        {"path": "permodalityunion__text", "model": "here", "cells": 16, "encoded": 16}
        | settings
    ]
    search.fit(X, y)
    stats = encoder.stats()
    assert stats["encoded"] == stats["rows"] == 16
    assert stats["served"] > 16
    assert prefetch(search, X)["encoded"].tolist() == [0]


def test_every_branch_is_prefetched_with_the_rows_that_it_sees(
    text_backend, image_backend, store, table
):
    text = make_pipeline(FrozenEncoder(text_backend, store=store), StandardScaler())
    pipeline = make_pipeline(
        union_of(text, FrozenEncoder(image_backend, store=store)), LogisticRegression()
    )
    report = prefetch(pipeline, table[0]).set_index("path")
    assert report.loc["permodalityunion__text__frozenencoder", "encoded"] == 16
    assert report.loc["permodalityunion__image", "encoded"] == N_ROWS


@pytest.mark.parametrize(
    ("join", "columns"),
    [(PerModalityUnion, "picture"), (PerModalityUnion, []), (ColumnTransformer, [])],
)
def test_encoders_that_nothing_reaches_are_no_obstacle(
    text_backend, store, table, join, columns
):
    """Because their branch selects no column, or no row has its modality."""
    encoder = FrozenEncoder(text_backend, store=store)
    branches = [("text", encoder, "note"), ("image", make_pipeline(encoder), columns)]
    report = prefetch(join(branches), table[0].assign(picture=None))
    assert report["path"].tolist() == ["text"]


def test_candidates_that_differ_before_or_in_the_encoder_are_all_prefetched(
    text_backend, store, table
):
    X, y = table
    upper = FunctionTransformer(lambda notes: notes.fillna("none").str.upper())
    lower = FunctionTransformer(lambda notes: notes.fillna("none").str.lower())
    pipeline = make_pipeline(
        ColumnTransformer(
            [
                (
                    "text",
                    make_pipeline(upper, FrozenEncoder(text_backend, store=store)),
                    "note",
                )
            ]
        ),
        LogisticRegression(),
    )
    grid = {
        "columntransformer__text__functiontransformer": [upper, lower],
        "columntransformer__text__frozenencoder__normalize": [True, False],
        "logisticregression__C": [0.1, 1, 10],
    }
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise")
    report = prefetch(search, X)
    assert report["encoded"].tolist() == [
        34,
        34,
    ]  # 17 upper, 17 lower; one row for each setting
    encoded = store.stats()["encoded"].sum()
    search.fit(X, y)
    assert store.stats()["encoded"].sum() == encoded


def test_an_encoder_that_only_a_candidate_brings_is_found(text_backend, store, table):
    pipeline = make_pipeline(FunctionTransformer(), LogisticRegression())
    grid = {"functiontransformer": [FrozenEncoder(text_backend, store=store)]}
    report = prefetch(GridSearchCV(pipeline, grid), table[0][["note"]])
    assert report["encoded"].tolist() == [16]


def test_randomised_searches_need_a_seed(text_backend, store, table):
    pipeline = make_pipeline(FrozenEncoder(text_backend, store=store), classifier())
    options = {"frozenencoder__normalize": [True, False]}
    search = RandomizedSearchCV(pipeline, options, n_iter=2, random_state=0)
    assert len(prefetch(search, table[0][["note"]])) == 2
    with pytest.raises(
        ValueError, match="candidates of RandomizedSearchCV cannot be known"
    ):
        prefetch(search.set_params(random_state=None), table[0][["note"]])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda pipeline: pipeline,
        lambda pipeline: VotingClassifier(
            [("a", pipeline), ("b", LogisticRegression())]
        ),
        lambda pipeline: CalibratedClassifierCV(pipeline),
    ],
)
def test_encoders_within_other_estimators_are_found(text_backend, store, table, wrap):
    encoder = FrozenEncoder(text_backend, store=store)
    pipeline = make_pipeline(make_union(encoder, encoder), classifier())
    assert prefetch(wrap(pipeline), table[0][["note"]])["encoded"].sum() == 16


def test_searches_within_other_estimators_are_walked(text_backend, store, table):
    encoders = [
        FrozenEncoder(text_backend, store=store, normalize=n) for n in (True, False)
    ]
    pipeline = make_pipeline(encoders[0], classifier())
    search = GridSearchCV(pipeline, {"frozenencoder": encoders})
    assert len(prefetch(BaggingClassifier(search), table[0][["note"]])) == 2


def test_a_candidate_that_brings_an_encoder_and_sets_it_is_found(
    text_backend, store, table
):
    pipeline = make_pipeline(FunctionTransformer(), LogisticRegression())
    other = make_pipeline(FrozenEncoder(text_backend, store=store), classifier())
    grid = {
        "logisticregression": [other],
        "logisticregression__frozenencoder__normalize": [True],
    }
    prefetch(GridSearchCV(pipeline, grid), table[0][["note"]])
    (stats,) = store.stats().to_dict("records")
    assert '"unit_length": true' in stats["description"]


def test_a_randomised_search_that_leaves_the_encoder_alone_needs_no_seed(
    text_backend, store, table
):
    pipeline = make_pipeline(
        FrozenEncoder(text_backend, store=store), LogisticRegression()
    )
    search = RandomizedSearchCV(pipeline, {"logisticregression__C": [1, 2]})
    assert prefetch(search, table[0][["note"]])["encoded"].tolist() == [16]


def test_bad_cells_are_found_before_anything_is_encoded(text_backend, store, table):
    X = table[0].assign(note=["fine"] * (N_ROWS - 1) + [3])
    with pytest.raises(TypeError, match="Row 23 .*expected a str, got int"):
        prefetch(union_of(FrozenEncoder(text_backend, store=store)), X)
    assert store.stats().empty


class HiddenEncoder(TransformerMixin, BaseEstimator):
    def __init__(self, inside):
        self.inside = inside


class NeedsLabels(TransformerMixin, BaseEstimator):
    def fit(self, X, y):
        return self

    def transform(self, X):
        return X


def test_what_cannot_be_prefetched_is_said(text_backend, store, table):
    encoder = FrozenEncoder(text_backend, store=store)
    X = table[0][["note"]]
    with pytest.raises(ValueError, match="contains no FrozenEncoder"):
        prefetch(LogisticRegression(), X)
    with pytest.raises(ValueError, match="'frozenencoder' has store=None"):
        prefetch(make_pipeline(FrozenEncoder(text_backend, store=None)), X)
    with pytest.raises(
        ValueError, match=r"cannot determine the input of the encoders \['inside'\]"
    ):
        prefetch(HiddenEncoder(encoder), X)
    with pytest.raises(TypeError) as caught:
        prefetch(make_pipeline(NeedsLabels(), encoder), X)
    assert (
        "replays the step 'needslabels' on all rows, without labels"
        in caught.value.__notes__[0]
    )


def test_a_store_that_only_reads_is_refused(text_backend, store):
    FrozenEncoder(text_backend, store=store).transform(["a"])
    encoder = FrozenEncoder(
        text_backend, store=EmbeddingStore(store.path, read_only=True)
    )
    with pytest.raises(
        ValueError, match="is read-only, so no vectors can be stored in it"
    ):
        prefetch(encoder, ["a", "b"])
