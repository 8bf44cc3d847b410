"""PerModalityUnion: remainder, weights, indicator, mixed tables and tokens."""

import pickle
import re
from copy import deepcopy

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    OneHotEncoder,
    StandardScaler,
)
from sklearn.utils import get_tags

from sklembed import (
    CallableBackend,
    ContrastiveProjector,
    EmbeddingStore,
    FrozenEncoder,
    PerModalityUnion,
)


@pytest.fixture
def table():
    """Six rows of a text, three numbers and a flag, with missing cells."""
    return pd.DataFrame(
        {
            "note": ["a red cat", None, "a blue dog", "red", "blue", "a dog"],
            "height": [1.0, 2.0, np.nan, 4.0, np.nan, 6.0],
            "width": [0.5, 1.5, np.nan, 2.5, 3.5, 9.5],
            "depth": [3.0, 1.0, 4.0, 1.0, 5.0, 9.0],
            "flag": [1.0, np.nan, 0.0, 1.0, 1.0, 0.0],
        },
        index=list("uvwxyz"),
    )


@pytest.fixture
def text(text_backend):
    return ("text", FrozenEncoder(text_backend, store=None), "note")


SIZE = ("size", make_pipeline(SimpleImputer(), StandardScaler()), ["height", "width"])


class Recorder(TransformerMixin, BaseEstimator):
    """Record the arguments of fit."""

    def fit(self, X, y=None, sample_weight=None, groups=None):
        self.fitted_on_, self.y_ = X, y
        self.sample_weight_, self.groups_ = sample_weight, groups
        return self

    def transform(self, X):
        return np.asarray(X, dtype=float)


# The remainder


@pytest.mark.parametrize(
    "remainder", ["passthrough", StandardScaler(), PCA(1)], ids=repr
)
@pytest.mark.parametrize("method", ["fit", "fit_transform"])
def test_the_remainder_is_a_last_branch_that_names_the_columns_left(
    table, text, remainder, method
):
    ours = PerModalityUnion([text, SIZE], remainder=remainder).set_output(
        transform="pandas"
    )
    theirs = PerModalityUnion([text, SIZE, ("rest", remainder, ["depth", "flag"])])
    table["flag"] = table["flag"].fillna(0)
    getattr(ours, method)(table)
    found, expected = ours.transform(table), theirs.fit(table).transform(table)
    np.testing.assert_array_equal(found, expected)
    assert ours.transformers_[-1][0] == "remainder"
    assert ours.transformers_[-1][2] == ["depth", "flag"]
    assert ours.named_transformers_["remainder"] is ours.transformers_[-1][1]
    assert ours.blocks_["remainder"] == theirs.blocks_["rest"]
    names = [
        name.replace("rest__", "remainder__") for name in theirs.get_feature_names_out()
    ]
    assert found.columns.tolist() == names


def test_without_missing_rows_the_remainder_is_that_of_column_transformer(table):
    table = table.drop(columns="note").dropna()
    branches = [("w", MinMaxScaler(), ["width"]), ("f", "drop", ["flag"])]
    options = {
        "remainder": StandardScaler(),
        "transformer_weights": {"w": 3.0, "remainder": 0.5},
    }
    ours = PerModalityUnion(branches, **options).set_output(transform="pandas")
    theirs = ColumnTransformer(branches, **options).set_output(transform="pandas")
    pd.testing.assert_frame_equal(
        ours.fit_transform(table), theirs.fit_transform(table)
    )


def test_the_columns_of_a_dropped_branch_do_not_come_back_in_the_remainder(table, text):
    union = PerModalityUnion(
        [text, ("flag", "drop", "flag")], remainder=Recorder()
    ).fit(table)
    assert union.named_transformers_["remainder"].fitted_on_.columns.tolist() == [
        "height",
        "width",
        "depth",
    ]


def test_no_remainder_where_no_column_is_left(table):
    union = PerModalityUnion(
        [("all", "passthrough", slice("height", None))], remainder=PCA(7)
    )
    union.fit(table.drop(columns="note"))
    assert union.blocks_ == {"all": slice(0, 4)}
    assert list(union.named_transformers_) == ["all"]


def test_the_default_drops_what_no_branch_names(table):
    union = PerModalityUnion([SIZE]).fit(table)
    assert union.blocks_ == {"size": slice(0, 2)}


def test_all_branches_may_be_dropped_where_there_is_a_remainder(table):
    union = PerModalityUnion([("n", "drop", "note")], remainder="passthrough")
    np.testing.assert_array_equal(
        union.fit_transform(table), table.drop(columns="note")
    )
    with pytest.raises(
        ValueError, match="All branches are 'drop'; keep at least one, or set rem"
    ):
        union.fit(table[["note"]])


def test_which_columns_are_left_is_settled_in_fit_by_name(table, text):
    union = PerModalityUnion([text, SIZE], remainder="passthrough")
    expected = union.fit_transform(table)
    moved = table[["flag", "width", "depth", "note", "height"]].assign(extra=1.0)
    np.testing.assert_array_equal(union.transform(moved), expected)
    with pytest.raises(
        ValueError, match="Branch 'remainder' selects column 'depth', which is no"
    ):
        union.transform(table.drop(columns="depth"))


def test_which_columns_are_left_is_settled_in_fit_by_position(table):
    X = table.drop(columns="note").to_numpy()
    union = PerModalityUnion([("a", "passthrough", [-1])], remainder="passthrough")
    np.testing.assert_array_equal(union.fit_transform(X), X[:, [3, 0, 1, 2]])
    assert union.transformers_[-1][2] == [0, 1, 2]
    names = ["a__x3", "remainder__x0", "remainder__x1", "remainder__x2"]
    assert union.get_feature_names_out().tolist() == names
    with pytest.raises(
        ValueError, match="X has 3 features, but PerModalityUnion is expecting 4"
    ):
        union.transform(X[:, :3])


def test_columns_of_one_name_cannot_be_told_apart(table):
    union = PerModalityUnion(
        [SIZE, ("n", "drop", "note")], remainder="passthrough"
    ).fit(table)
    twice = table.rename(columns={"note": "depth"})
    message = "'remainder' selects column 'depth', but X has 2 columns of that name. Rename them"
    with pytest.raises(ValueError, match=message):
        union.transform(twice)


def test_rows_that_lack_the_remainder_are_not_shown_to_it(table, text):
    table["depth"] = table["depth"].where(table["flag"].notna())
    union = PerModalityUnion([text, SIZE], remainder=Recorder()).fit(
        table, np.arange(6)
    )
    assert union.named_transformers_["remainder"].y_.tolist() == [0, 2, 3, 4, 5]
    assert np.isnan(union.transform(table)[1, union.blocks_["remainder"]]).all()


def test_a_remainder_without_any_observed_row_is_refused_by_name(table):
    table["flag"] = np.nan
    union = PerModalityUnion([("all", "passthrough", [1, 2, 3]), ("n", "drop", [0])])
    with pytest.raises(
        ValueError, match="Branch 'remainder' has nothing to learn from: column "
    ):
        union.set_params(remainder="passthrough").fit(table)


def test_a_remainder_that_is_not_numbers_is_refused_by_name(table):
    with pytest.raises(
        TypeError, match="Branch 'remainder' returned object columns that are not"
    ):
        PerModalityUnion([SIZE], remainder="passthrough").fit_transform(table)


def test_an_error_in_the_remainder_says_where_it_was(table, text):
    union = PerModalityUnion([text, SIZE], remainder=PCA(7))
    with pytest.raises(ValueError, match="n_components=7") as caught:
        union.fit(table.fillna({"flag": 0}))
    assert caught.value.__notes__ == [
        "This was in branch 'remainder' of PerModalityUnion, which received all rows."
    ]


@pytest.mark.parametrize("remainder", ["keep", None, 3])
def test_a_remainder_that_is_no_transformer_is_refused(table, text, remainder):
    with pytest.raises(
        ValueError, match="The 'remainder' parameter of PerModalityUnion must be"
    ):
        PerModalityUnion([text], remainder=remainder).fit(table)


@pytest.mark.parametrize("name", ["remainder", "transformer_weights", "add_indicator"])
def test_a_branch_must_not_bear_the_name_of_a_parameter(table, name):
    with pytest.raises(ValueError, match=f"'{name}' is a parameter of the union"):
        PerModalityUnion([(name, "passthrough", ["height"])]).fit(table)


def test_parts_of_the_remainder_are_those_that_fit_shows_it(table, text):
    union = PerModalityUnion([text, ("w", "drop", "width")], remainder=Recorder())
    parts = {
        name: (transformer, part) for name, transformer, part in union.iter_parts(table)
    }
    assert list(parts) == ["text", "remainder"]
    assert parts["remainder"][0] is union.remainder
    fitted = union.fit(table).named_transformers_["remainder"]
    pd.testing.assert_frame_equal(parts["remainder"][1], fitted.fitted_on_)


def test_parameters_reach_into_the_remainder(table, text):
    union = PerModalityUnion(
        [text, SIZE], remainder=StandardScaler(), add_indicator=True
    )
    assert union.get_params()["remainder__with_mean"] is True
    assert "remainder__with_mean" not in union.get_params(deep=False)
    assert union.set_params(remainder__with_mean=False).remainder.with_mean is False
    union.set_params(
        remainder=MinMaxScaler(), text__normalize=True, add_indicator=False
    )
    assert isinstance(union.remainder, MinMaxScaler)
    assert union.get_params()["text__normalize"] is True
    with pytest.raises(
        ValueError, match="Invalid parameter 'colour' for estimator MinMaxScaler"
    ):
        union.set_params(remainder__colour=1)


def test_a_clone_has_the_options_and_none_of_what_was_learned(table, text):
    options = {
        "remainder": StandardScaler(with_mean=False),
        "transformer_weights": {"text": 2.0},
        "add_indicator": True,
    }
    union = PerModalityUnion([text, SIZE], **options).fit(table)
    twin = clone(union)
    assert not hasattr(twin, "transformers_")
    assert twin.remainder is not union.remainder
    assert twin.get_params()["remainder__with_mean"] is False
    assert twin.transformer_weights == {"text": 2.0}
    assert not hasattr(union.remainder, "scale_")  # fit fits a clone
    np.testing.assert_array_equal(twin.fit_transform(table), union.transform(table))


def test_a_pickle_transforms_as_before(table):
    union = PerModalityUnion(
        [SIZE, ("n", "drop", "note")],
        remainder=StandardScaler(),
        transformer_weights={"size": 0.5},
        add_indicator=True,
    ).fit(table)
    loaded = pickle.loads(pickle.dumps(union))
    np.testing.assert_array_equal(loaded.transform(table), union.transform(table))
    assert (
        loaded.get_feature_names_out().tolist()
        == union.get_feature_names_out().tolist()
    )


@pytest.mark.parametrize("metadata", ["sample_weight", "groups"])
def test_metadata_is_routed_into_the_remainder_and_cut_to_its_rows(
    table, text, metadata
):
    with sklearn.config_context(enable_metadata_routing=True):
        recorder = Recorder().set_fit_request(**{metadata: True})
        union = PerModalityUnion(
            [text, ("d", "passthrough", ["depth"])], remainder=recorder
        )
        table.loc["v", ["height", "width"]] = (
            np.nan
        )  # all that remains, besides its flag
        pipeline = make_pipeline(union)
        pipeline.fit(table, np.arange(6), **{metadata: np.arange(6) / 10})
    fitted = pipeline[-1].named_transformers_["remainder"]
    np.testing.assert_array_equal(
        getattr(fitted, f"{metadata}_"), [0.0, 0.2, 0.3, 0.4, 0.5]
    )


def test_metadata_that_only_the_remainder_asks_for_may_find_no_column_left(table):
    with sklearn.config_context(enable_metadata_routing=True):
        recorder = Recorder().set_fit_request(sample_weight=True)
        union = PerModalityUnion(
            [("all", "passthrough", slice(None))], remainder=recorder
        )
        union.fit(table[["depth", "width"]], sample_weight=np.ones(6))
    assert union.blocks_ == {"all": slice(0, 2)}


def test_groups_reach_the_splitter_of_a_projector_in_the_remainder():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 4))
    X[:6, 2:] = np.nan
    seen = {}

    class Spy(GroupKFold):
        def split(self, X, y=None, groups=None):
            seen["groups"] = groups
            return super().split(X, y, groups)

    with sklearn.config_context(enable_metadata_routing=True):
        projector = ContrastiveProjector(
            2,
            hidden_layer_sizes=(4,),
            max_epochs=1,
            cv=Spy(3).set_split_request(groups=True),
        )
        union = PerModalityUnion([("a", "passthrough", [0, 1])], remainder=projector)
        groups = np.repeat(np.arange(10), 6)
        make_pipeline(union, HistGradientBoostingClassifier()).fit(
            X, np.arange(60) % 2, groups=groups
        )
    np.testing.assert_array_equal(seen["groups"], groups[6:])


def test_single_nan_is_allowed_where_the_remainder_allows_it():
    def allows_nan(remainder):
        union = PerModalityUnion([("a", StandardScaler(), [0])], remainder=remainder)
        return get_tags(union).input_tags.allow_nan

    assert allows_nan("drop")
    assert allows_nan("passthrough")
    assert allows_nan(StandardScaler())
    assert not allows_nan(PCA())


def test_the_diagram_shows_the_remainder(table, text):
    union = PerModalityUnion([text], remainder=MinMaxScaler())
    for shown in (union, clone(union).fit(table)):
        html = shown._repr_html_()
        assert "remainder" in html
        assert "MinMaxScaler" in html
    assert "MinMaxScaler" not in clone(union).set_params(remainder="drop")._repr_html_()


def test_the_remainder_is_a_task_of_callbacks(table):
    pytest.importorskip("sklearn.callback")  # of scikit-learn >= 1.9
    tasks = []

    class Record:
        def setup(self, estimator, context):
            pass

        def teardown(self, estimator, context):
            pass

        def on_fit_task_begin(self, estimator, context, **_):
            pass

        def on_fit_task_end(self, estimator, context, **_):
            tasks.append(context.task_name)

    union = PerModalityUnion([SIZE, ("n", "drop", "note")], remainder=StandardScaler())
    union.set_callbacks(Record()).fit(table)
    assert tasks == ["fit-size", "fit-remainder", "fit"]


# Parameters that are set after fit


def vowels_stored_at(path):
    backend = CallableBackend(
        load_count_vowels, name="words", version="1", modality="text", n_features=2
    )
    return FrozenEncoder(backend, output="tokens", store=path)


def rows_in(path):
    return int(EmbeddingStore(path).stats()["rows"].sum())


WAYS_INTO_A_BRANCH = {
    "text": lambda encoder: PerModalityUnion([("text", encoder, "note")]),
    "text__frozenencoder": lambda encoder: PerModalityUnion(
        [("text", make_pipeline(encoder), "note")]
    ),
    "text__frozenencoder-1": lambda encoder: PerModalityUnion(
        [("text", make_pipeline(FunctionTransformer(), make_union(encoder)), "note")]
    ),
    "inner__text": lambda encoder: PerModalityUnion(
        [("inner", PerModalityUnion([("text", encoder, "note")]), ["note"])]
    ),
    "remainder": lambda encoder: PerModalityUnion(
        [("h", "drop", slice("height", None))], remainder=encoder
    ),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("way", WAYS_INTO_A_BRANCH)
def test_set_params_reaches_fitted_branches(tmp_path, table, way, loaded):
    path, other = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    pipeline = make_pipeline(WAYS_INTO_A_BRANCH[way](vowels_stored_at(path))).fit(table)
    pipeline.transform(table)
    if loaded:
        joblib.dump(pipeline, tmp_path / "pipeline.joblib")
        pipeline = joblib.load(tmp_path / "pipeline.joblib")
    [name] = [key for key in pipeline.get_params() if key.endswith("__store")]
    before, new = rows_in(path), table.assign(note="unheard of")
    pipeline.set_params(**{name: None})
    pipeline.transform(new)
    assert rows_in(path) == before
    assert pipeline.get_params()[name] is None
    pipeline.set_params(**{name: other}).transform(new)
    assert (rows_in(path), rows_in(other)) == (before, 1)


def test_a_clone_and_the_original_of_a_clone_keep_their_parameters(table):
    original = PerModalityUnion([SIZE])
    union = clone(original).fit(table)
    twin = clone(union)
    union.set_params(size__standardscaler__with_mean=False)
    assert union.named_transformers_["size"][-1].with_mean is False
    for untouched in (original, twin):
        assert untouched.get_params()["size__standardscaler__with_mean"] is True


def test_setting_the_parameters_that_are_set_changes_nothing(table, text):
    union = PerModalityUnion(
        [text, SIZE, ("d", "passthrough", ["depth"])], remainder=Recorder()
    )
    table["flag"] = table["flag"].fillna(0)
    expected = union.fit_transform(table)
    union.set_params(**union.get_params(deep=True))
    union.set_params(**union.get_params(deep=False))
    union.set_params(transformers=list(union.transformers))
    np.testing.assert_array_equal(union.transform(table), expected)


def test_a_replaced_step_takes_the_place_of_the_fitted_one(table, text):
    union = PerModalityUnion([("text", make_pipeline(text[1]), "note")]).fit(table)
    encoder = clone(text[1]).set_params(normalize=True)
    blocks = union.set_params(text__frozenencoder=encoder).transform(table)
    np.testing.assert_array_equal(blocks, encoder.transform(table["note"]))
    unfitted = clone(PerModalityUnion([SIZE])).fit(table)
    unfitted.set_params(size__standardscaler=MinMaxScaler())
    with pytest.raises(NotFittedError):
        unfitted.transform(table)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"size": "drop"}, ["size"]),
        ({"size": StandardScaler()}, ["size"]),
        ({"remainder": "passthrough"}, ["remainder"]),
        ({"transformers": [("d", "passthrough", ["depth"])]}, ["text", "size", "d"]),
        ({"transformers": [("size", SIZE[1], ["depth"])]}, ["text", "size"]),
    ],
)
def test_a_branch_that_is_replaced_after_fit_has_to_be_fitted_again(
    table, text, params, names
):
    union = PerModalityUnion([text, SIZE]).fit(table).set_params(**params)
    message = (
        re.escape(f"The branches {names}") + ".* replaced .* after fit.* Call fit again"
    )
    for replaced in (union, deepcopy(union)):
        with pytest.raises(ValueError, match=message):
            replaced.transform(table)
    union.fit(table.dropna()).transform(table.dropna())


def test_weights_and_missing_rows_are_those_that_are_set(table):
    union = PerModalityUnion([SIZE]).fit(table)
    expected = union.transform(table)
    union.set_params(transformer_weights={"size": 2.0}, missing_rows="skip")
    blocks = union.transform(table)
    assert np.isnan(blocks[2]).all()
    observed = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(blocks[observed], 2 * expected[observed])
    with pytest.raises(ValueError, match="has a weight for 'image'"):
        union.set_params(transformer_weights={"image": 2.0}).transform(table)


# Weights


def test_weights_are_a_scaling_afterwards(table, text):
    union = PerModalityUnion([text, SIZE], remainder="passthrough")
    plain = union.fit_transform(table)
    weights = {"text": 0.1, "size": np.float32(3), "remainder": 0}
    weighted = clone(union).set_params(transformer_weights=weights)
    expected = plain.copy()
    for name, block in union.blocks_.items():
        expected[:, block] *= weights[name]
    found = weighted.fit_transform(table)
    np.testing.assert_array_equal(found, expected)  # NaN stays NaN, even with weight 0
    np.testing.assert_array_equal(weighted.transform(table), found)
    assert (
        weighted.get_feature_names_out().tolist()
        == union.get_feature_names_out().tolist()
    )


def test_branches_without_a_weight_have_the_weight_1(table, text):
    union = PerModalityUnion([text, SIZE], transformer_weights={"size": 2})
    plain = clone(union).set_params(transformer_weights=None).fit_transform(table)
    blocks = union.fit_transform(table)
    np.testing.assert_array_equal(blocks[:, :9], plain[:, :9])
    np.testing.assert_array_equal(blocks[:, 9:], 2 * plain[:, 9:])


def test_a_weight_of_double_precision_leaves_float32(table, text):
    union = PerModalityUnion([text], transformer_weights={"text": np.float64(0.1)})
    assert union.fit_transform(table).dtype == np.float32


def test_what_is_dropped_keeps_its_weight_for_when_it_comes_back(table, text):
    union = PerModalityUnion(
        [text, SIZE], transformer_weights={"text": 2.0, "remainder": 3.0}
    )
    assert clone(union).set_params(text="drop").fit_transform(table).shape == (6, 2)


def test_unknown_branches_have_no_weight(table, text):
    message = (
        r"transformer_weights has a weight for 'image', but the branches are "
        r"\['text', 'size', 'remainder'\]"
    )
    with pytest.raises(ValueError, match=message):
        PerModalityUnion([text, SIZE], transformer_weights={"image": 2.0}).fit(table)


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf, "2", None], ids=repr)
def test_what_is_no_weight_is_refused(table, text, weight):
    with pytest.raises(
        ValueError, match="finite number that is not negative; got .* 'text'"
    ):
        PerModalityUnion([text], transformer_weights={"text": weight}).fit(table)


def test_weights_are_a_dict(table, text):
    with pytest.raises(
        ValueError, match="The 'transformer_weights' parameter of PerModalityUnion"
    ):
        PerModalityUnion([text], transformer_weights=[1.0]).fit(table)


# The indicator


@pytest.mark.parametrize("n_jobs", [None, 2])
@pytest.mark.parametrize("remainder", ["drop", "passthrough"])
def test_the_indicator_is_where_a_row_lacks_the_modality(table, remainder, n_jobs):
    union = PerModalityUnion(
        [
            ("w", "passthrough", ["width"]),
            SIZE,
            ("n", "drop", "note"),
            ("d", "drop", "depth"),
        ],
        remainder=remainder,
        n_jobs=n_jobs,
    )
    plain = union.fit_transform(table)
    with_indicator = clone(union).set_params(add_indicator=True)
    found = with_indicator.fit_transform(table)
    columns = {"w": ["width"], "size": ["height", "width"], "remainder": ["flag"]}
    lacking = [table[columns[name]].isna().all(axis=1) for name in union.blocks_]
    np.testing.assert_array_equal(found, np.column_stack([plain, *lacking]))
    np.testing.assert_array_equal(with_indicator.transform(table), found)
    missing = slice(plain.shape[1], found.shape[1])
    assert with_indicator.blocks_ == union.blocks_ | {"missing": missing}
    names = [f"missing__{name}" for name in union.blocks_]
    assert with_indicator.get_feature_names_out()[missing].tolist() == names
    assert "missing" not in with_indicator.named_transformers_


def test_the_indicator_is_as_wide_where_no_training_row_lacks_anything(table, text):
    union = PerModalityUnion([text, SIZE], remainder="passthrough", add_indicator=True)
    union.fit(table.dropna())
    nothing = table.iloc[[0]].assign(
        note=None, height=np.nan, width=np.nan, depth=np.nan, flag=np.nan
    )
    np.testing.assert_array_equal(
        union.transform(table.dropna())[:, -3:], np.zeros((3, 3))
    )
    np.testing.assert_array_equal(union.transform(nothing)[:, -3:], [[1, 1, 1]])


def test_the_indicator_is_not_weighted(table, text):
    union = PerModalityUnion(
        [text], transformer_weights={"text": 0.5}, add_indicator=True
    )
    assert union.fit_transform(table)[:, -1].tolist() == [0, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="has a weight for 'missing'"):
        union.set_params(transformer_weights={"missing": 0.5}).fit(table)


def test_a_branch_may_be_called_missing_where_there_is_no_indicator(table):
    union = PerModalityUnion([("missing", "passthrough", ["depth"])]).fit(table)
    assert union.get_feature_names_out().tolist() == ["missing__depth"]
    assert union.transform(table).shape == (6, 1)
    with pytest.raises(
        ValueError, match="'missing' is the block that add_indicator adds"
    ):
        union.set_params(add_indicator=True).fit(table)


def test_the_indicator_is_that_of_the_fit(table, text):
    union = PerModalityUnion([text], add_indicator=True)
    expected = union.fit_transform(table)
    np.testing.assert_array_equal(
        union.set_params(add_indicator=False).transform(table), expected
    )
    assert len(union.get_feature_names_out()) == expected.shape[1]


def test_the_indicator_is_named_under_set_output(table, text):
    union = PerModalityUnion([text, SIZE], add_indicator=True).set_output(
        transform="pandas"
    )
    frame = union.fit_transform(table)
    assert frame["missing__text"].tolist() == [0, 1, 0, 0, 0, 0]
    assert frame["missing__size"].tolist() == [0, 0, 1, 0, 0, 0]


# Numbers, categories, and an embedding of two columns, beside a text


def joined(part):
    """Join a title and a body, either of which may be missing."""
    rows = np.asarray(part, dtype=object)
    texts = np.empty((len(rows), 1), dtype=object)
    texts[:, 0] = [
        " ".join(cell for cell in row if isinstance(cell, str)) for row in rows
    ]
    return texts


def one_name(_, names):
    """Name the output column of `joined`."""
    return ["+".join(names)]


@pytest.fixture
def mixed():
    """120 rows with missing cells in each of four modalities."""
    rng = np.random.default_rng(0)
    y = np.repeat(["cat", "dog"], 60)
    sound = np.where(y == "cat", "aaa", "ooo")
    X = pd.DataFrame(
        {
            "note": [f"{word} {rng.integers(9)}" for word in sound],
            "title": [f"{word} of {rng.integers(9)}" for word in sound],
            "body": [f"it is {word}" for word in sound],
            "age": rng.normal(size=120),
            "weight": rng.normal(size=120) + 2 * (y == "cat"),
            "colour": rng.choice(["red", "blue"], 120),
        }
    ).astype({"note": object, "title": object, "body": object, "colour": object})
    for column in X:
        X.loc[rng.random(120) < 0.2, column] = (
            np.nan if X[column].dtype == float else None
        )
    X.loc[5, ["age", "weight"]] = np.nan
    X.loc[6, ["title", "body"]] = None
    return X, y


@pytest.fixture
def mixed_union(text_backend):
    encoder = FrozenEncoder(text_backend, store=None)
    both = FunctionTransformer(joined, feature_names_out=one_name)
    return PerModalityUnion(
        [
            ("note", encoder, "note"),
            ("article", make_pipeline(both, encoder), ["title", "body"]),
            (
                "labs",
                make_pipeline(SimpleImputer(), StandardScaler()),
                ["age", "weight"],
            ),
            (
                "kind",
                OneHotEncoder(sparse_output=False, handle_unknown="ignore"),
                ["colour"],
            ),
        ]
    )


def test_a_branch_embeds_two_columns_and_sees_rows_that_have_either(mixed, mixed_union):
    X, _ = mixed
    block = mixed_union.fit_transform(X)[:, mixed_union.blocks_["article"]]
    lacking = X["title"].isna() & X["body"].isna()
    np.testing.assert_array_equal(np.isnan(block).all(axis=1), lacking)
    np.testing.assert_array_equal(np.isnan(block).any(axis=1), lacking)
    encoder = clone(mixed_union.transformers[0][1])
    texts = X["title"].str.cat(X["body"], sep=" ", na_rep="").str.strip()[~lacking]
    np.testing.assert_array_equal(block[~lacking], encoder.fit_transform(texts))


def test_numbers_and_categories_stand_beside_embeddings(mixed, mixed_union):
    X, _ = mixed
    frame = mixed_union.set_output(transform="pandas").fit_transform(X)
    assert frame.columns[[0, 9]].tolist() == [
        "note__frozenencoder0",
        "article__frozenencoder0",
    ]
    categories = ["kind__colour_blue", "kind__colour_red", "kind__colour_nan"]
    names = ["labs__age", "labs__weight", *categories]
    assert frame.columns[18:].tolist() == names
    expected = make_pipeline(SimpleImputer(), StandardScaler()).fit_transform(
        X[["age", "weight"]]
    )
    np.testing.assert_array_equal(frame[names[:2]], expected)
    one_hot = (X[["colour"]].fillna("nan").to_numpy() == ["blue", "red", "nan"]).astype(
        float
    )
    np.testing.assert_array_equal(frame[names[2:]], one_hot)
    unknown = mixed_union.transform(X.assign(colour="green"))
    assert (unknown[names[2:]] == 0).all(axis=None)


@pytest.mark.parametrize("kind", ["pandas", "polars", "numpy"])
def test_every_kind_of_table_gives_the_same_mixed_blocks(mixed, mixed_union, kind):
    X, _ = mixed
    expected = clone(mixed_union).set_params(add_indicator=True).fit_transform(X)
    table = {
        "pandas": X,
        "polars": pl.from_pandas(X),
        "numpy": X.to_numpy(dtype=object),
    }[kind]
    union = clone(mixed_union).set_params(add_indicator=True)
    if kind == "numpy":
        union.transformers = [
            (name, step, columns)
            for (name, step, _), columns in zip(
                union.transformers, [0, [1, 2], [3, 4], [5]], strict=True
            )
        ]
    np.testing.assert_allclose(union.fit_transform(table), expected, atol=1e-12)
    np.testing.assert_allclose(union.transform(table), expected, atol=1e-12)
    if kind != "numpy":
        union.set_output(transform=kind)
        assert (
            list(union.transform(table).columns)
            == union.get_feature_names_out().tolist()
        )


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_the_remainder_of_a_frame_holds_its_categories(mixed, mixed_union, kind):
    X, _ = mixed
    *branches, (_, one_hot, _) = mixed_union.transformers
    union = PerModalityUnion(branches, remainder=one_hot, add_indicator=True)
    table = X if kind == "pandas" else pl.from_pandas(X)
    expected = clone(mixed_union).set_params(add_indicator=True).fit_transform(X)
    np.testing.assert_allclose(union.fit_transform(table), expected, atol=1e-12)


def test_a_mixed_table_is_searched_over(mixed, mixed_union):
    X, y = mixed
    union = mixed_union.set_params(add_indicator=True)
    trees = GridSearchCV(
        make_pipeline(union, HistGradientBoostingClassifier(max_iter=10)),
        {"permodalityunion__article": ["drop", mixed_union.transformers[1][1]]},
        cv=3,
        error_score="raise",
    ).fit(X, y)
    linear = GridSearchCV(
        make_pipeline(union, SimpleImputer(), LogisticRegression(max_iter=1000)),
        {
            "permodalityunion__add_indicator": [False, True],
            "permodalityunion__transformer_weights": [None, {"kind": 0.0, "note": 2.0}],
            "permodalityunion__remainder": ["drop"],
        },
        cv=3,
        error_score="raise",
    ).fit(X, y)
    assert trees.best_score_ > 0.85
    assert linear.best_score_ > 0.85


def test_a_transformer_for_the_remainder_can_be_searched_over():
    y = np.arange(40) % 2
    X = pd.DataFrame({"noise": np.zeros(40), "signal": y * 1.0})
    union = PerModalityUnion([("noise", "passthrough", ["noise"])])
    search = GridSearchCV(
        make_pipeline(union, LogisticRegression()),
        {"permodalityunion__remainder": ["drop", "passthrough", StandardScaler()]},
        cv=4,
    ).fit(X, y)
    assert search.best_params_ == {"permodalityunion__remainder": "passthrough"}
    assert search.cv_results_["mean_test_score"].tolist() == [0.5, 1.0, 1.0]


# Tokens: one object column for a branch


def count_vowels(texts):
    """Encode each word of a text by its length and its vowels."""
    return [
        np.array([[len(word), sum(map(word.count, "aeiou"))] for word in text.split()])
        for text in texts
    ]


def load_count_vowels():
    return count_vowels


@pytest.fixture
def words():
    backend = CallableBackend(
        load_count_vowels, name="words", version="1", modality="text", n_features=2
    )
    return ("words", FrozenEncoder(backend, output="tokens", store=None), "note")


WORDS, SIZES = "words__frozenencoder0", ["size__height", "size__width"]


def assert_same_tokens(found, expected):
    """Compare token columns, in which None is a missing cell."""
    assert [cell is None for cell in found] == [cell is None for cell in expected]
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b, strict=True)


@pytest.fixture
def tokens(words, table):
    """The tokens of the texts from the encoder, without a union."""
    return words[1].transform(table["note"])[:, 0]


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_tokens_stand_beside_numbers_in_a_frame(table, words, text, tokens, n_jobs):
    union = PerModalityUnion([text, words, SIZE], n_jobs=n_jobs).set_output(
        transform="pandas"
    )
    frame = union.fit_transform(table)
    assert [np.shape(cell) for cell in frame[WORDS]][:4] == [(3, 2), (), (3, 2), (1, 2)]
    assert_same_tokens(frame[WORDS], tokens)
    assert frame[WORDS].iloc[0].dtype == np.float32
    numbers = (
        PerModalityUnion([text, SIZE])
        .set_output(transform="pandas")
        .fit_transform(table)
    )
    pd.testing.assert_frame_equal(frame.drop(columns=WORDS), numbers)
    assert frame.columns.tolist() == union.get_feature_names_out().tolist()
    assert union.blocks_ == {
        "text": slice(0, 9),
        "words": slice(9, 10),
        "size": slice(10, 12),
    }
    assert union.holds_tokens_ == {"text": False, "words": True, "size": False}


@pytest.mark.parametrize("method", ["fit", "fit_transform"])
def test_tokens_of_a_row_do_not_depend_on_the_rows_beside_it(
    table, words, tokens, method
):
    """Even if all rows are missing, which would be NaN for numbers."""
    union = PerModalityUnion([words, SIZE]).set_output(transform="pandas")
    getattr(union, method)(table)
    assert_same_tokens(union.transform(table)[WORDS], tokens)
    alone = union.transform(table.loc[["v"]])
    assert alone[WORDS].tolist() == [None]
    assert alone.dtypes.tolist() == [object, float, float]
    assert alone.index.tolist() == ["v"]


def test_tokens_alone_are_an_array_of_objects_even_where_all_are_equally_many(words):
    X = pd.DataFrame({"note": ["a cat", "the dog"], "title": ["red one", "blue two"]})
    union = PerModalityUnion([words, ("title", words[1], "title")])
    for found in (union.fit_transform(X), union.fit(X).transform(X)):
        assert found.shape == (2, 2)
        assert found.dtype == object
        for column in ("note", "title"):
            expected = words[1].transform(X[column])[:, 0]
            assert_same_tokens(found[:, list(X).index(column)], expected)
    frame = union.set_output(transform="pandas").transform(X)
    assert frame.columns.tolist() == [WORDS, "title__frozenencoder0"]
    assert frame.dtypes.tolist() == [object, object]
    assert union.transform(X.assign(note=None))[WORDS].tolist() == [None, None]


def test_frames_inside_branches_change_nothing(table, words, tokens):
    with sklearn.config_context(transform_output="pandas"):
        frame = PerModalityUnion([SIZE, words]).fit_transform(table)
    assert_same_tokens(frame[WORDS], tokens)
    assert frame[SIZES].dtypes.tolist() == [float, float]


def test_a_cell_without_tokens_at_fit_does_not_decide_for_later_ones():
    """As with a damaged image under errors='missing', which fit cannot detect."""

    def split(column):
        cells = np.full((len(column), 1), None, dtype=object)
        for row, cell in enumerate(column):
            cells[row, 0] = np.ones((len(cell), 2)) if cell else None
        return cells

    X = pd.DataFrame({"note": ["", "abc"]})
    union = PerModalityUnion([("a", FunctionTransformer(split), "note")]).fit(X)
    assert_same_tokens(union.transform(X)[:, 0], [None, np.ones((3, 2))])


def test_tokens_come_unchanged_through_pipelines_clones_and_pickles(
    table, words, tokens
):
    union = PerModalityUnion([words, SIZE], add_indicator=True)
    again = PerModalityUnion([("again", "passthrough", WORDS)], remainder="passthrough")
    pipeline = make_pipeline(make_pipeline(union), again).set_output(transform="pandas")
    frame = clone(pipeline).fit_transform(table)
    assert_same_tokens(frame[f"again__{WORDS}"], tokens)
    numbers = [
        f"remainder__{name}" for name in [*SIZES, "missing__words", "missing__size"]
    ]
    assert frame.columns.tolist() == [f"again__{WORDS}", *numbers]
    assert frame[numbers].dtypes.tolist() == [float] * 4
    pipeline.fit(table)
    loaded = pickle.loads(pickle.dumps(pipeline))
    pd.testing.assert_frame_equal(loaded.transform(table)[numbers], frame[numbers])
    assert_same_tokens(loaded.transform(table)[f"again__{WORDS}"], tokens)
    nested = PerModalityUnion([("inner", PerModalityUnion([words]), ["note"])])
    assert_same_tokens(nested.fit_transform(table)[:, 0], tokens)
    assert nested.get_feature_names_out().tolist() == [f"inner__{WORDS}"]


def test_the_remainder_may_be_a_column_of_tokens(table, words, tokens):
    union = PerModalityUnion([SIZE], remainder=words[1]).set_output(transform="pandas")
    frame = union.fit_transform(table[["note", "height", "width"]])
    assert_same_tokens(frame["remainder__frozenencoder0"], tokens)


def test_a_weight_multiplies_each_cell_of_tokens_and_leaves_float32(
    table, words, tokens
):
    table["title"] = table["note"].fillna(
        "a red cat"
    )  # a repeated cell is weighted once
    union = PerModalityUnion(
        [words, ("title", words[1], "title")],
        transformer_weights={"words": 0.5, "title": 2},
    )
    found = union.fit_transform(table)
    assert_same_tokens(found[:, 0], [None if t is None else t / 2 for t in tokens])
    assert_same_tokens(
        found[:, 1], [2 * (tokens[0] if t is None else t) for t in tokens]
    )
    assert found[0, 0].dtype == np.float32


def test_the_indicator_is_where_tokens_are_none(table, words):
    union = PerModalityUnion([words], add_indicator=True).set_output(transform="pandas")
    frame = union.fit_transform(table)
    assert frame["missing__words"].tolist() == [
        float(cell is None) for cell in frame[WORDS]
    ]
    assert frame["missing__words"].dtype == float
    assert union.holds_tokens_ == {"words": True, "missing": False}


@pytest.mark.parametrize("indicator", [False, True])
def test_tokens_beside_numbers_are_refused_where_the_output_is_no_frame(
    table, words, indicator
):
    beside, numbers = ([], "missing") if indicator else ([SIZE], "size")
    union = PerModalityUnion([words, *beside], add_indicator=indicator).fit(table)
    message = (
        rf"Branches \['words'\] return tokens and \['{numbers}'\] return numbers, and only a "
        r"DataFrame can contain both. Call set_output\(transform='pandas'\)"
    )
    for run in (union.transform, union.fit_transform):
        with pytest.raises(ValueError, match=message):
            run(table)


def test_polars_has_no_column_of_tokens(table, words):
    union = PerModalityUnion([words]).set_output(transform="polars")
    message = (
        r"Branches \['words'\] return tokens.* polars does not support. Use set_output"
    )
    with pytest.raises(ValueError, match=message):
        union.fit_transform(table)
    frame = union.set_output(transform="pandas").fit_transform(pl.from_pandas(table))
    assert frame[WORDS].iloc[1] is None


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a", "b"], "column 'a' has text, such as 'a'"),
        ([1.0, "01234"], "column 'a' has text, such as '01234'"),
        ([[1, 2], [3]], "setting an array element with a sequence"),
        ([[[1, 2], [3]], [3]], "setting an array element with a sequence"),
        ([np.ones(2), np.ones(3)], "setting an array element with a sequence"),
        ([np.ones((2, 2)), "b"], "tokens are float arrays .* but a cell is str"),
        ([np.ones((2, 2)), np.ones(3)], r"a cell is float64 of shape \(3,\)"),
        ([np.ones((2, 2), dtype=np.uint8), None], r"a cell is uint8 of shape \(2, 2\)"),
    ],
)
def test_other_objects_are_refused_by_branch(cells, message):
    X = pd.DataFrame({"a": pd.Series(cells, dtype=object)})
    with pytest.raises(
        TypeError, match=f"'a' returned object columns .*{message}"
    ) as caught:
        PerModalityUnion([("a", "passthrough", "a")]).fit_transform(X)
    assert "or one column of tokens, such as FrozenEncoder(output='tokens')" in str(
        caught.value
    )


def test_two_columns_of_tokens_are_two_branches():
    cells = pd.Series([np.ones((2, 2)), np.ones((3, 2))], dtype=object)
    X = pd.DataFrame({"a": cells, "b": cells})
    with pytest.raises(
        TypeError, match="'both' returned object columns .* one column of tokens"
    ):
        PerModalityUnion([("both", "passthrough", ["a", "b"])]).fit_transform(X)
    apart = PerModalityUnion([("a", "passthrough", "a"), ("b", "passthrough", "b")])
    assert apart.fit_transform(X).shape == (2, 2)
