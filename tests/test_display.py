"""How objects look in notebooks and in logs."""

import inspect
import io
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import sklembed
from sklembed import EmbeddingStore, FrozenEncoder, PerModalityUnion
from sklembed._display import DOCUMENTATION, DocLinkMixin, progress_bar
from sklembed.evaluation import EncoderRanking, ModalityReport, modality_report

ESTIMATORS = [
    name
    for name in sklembed.__all__
    if inspect.isclass(getattr(sklembed, name))
    and issubclass(getattr(sklembed, name), BaseEstimator)
]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_diagram_of_an_estimator_links_to_its_page(name):
    """docs/api.rst lists each name, and its page is named after it (test_documentation.py)."""
    Estimator = getattr(sklembed, name)
    assert issubclass(Estimator, DocLinkMixin)
    link = Estimator._get_doc_link(Estimator.__new__(Estimator))
    assert link == f"{DOCUMENTATION}/api/sklembed.{name}.html"


def test_a_subclass_of_a_user_links_nowhere():
    class Encoder(FrozenEncoder):
        """Defined outside of sklembed."""

    assert Encoder("a/model")._get_doc_link() == ""


def test_the_diagram_of_a_union_shows_its_fitted_branches():
    X = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 5.0], "c": [0.0, 1.0]})
    inner = PerModalityUnion([("left", make_pipeline(StandardScaler()), ["a"])])
    union = PerModalityUnion(
        [("inner", inner, ["a", "b"])], remainder=StandardScaler(with_mean=False)
    )
    unfitted = union._repr_html_()
    assert all(name in unfitted for name in ("inner", "left", "remainder"))
    block = union.fit(X)._sk_visual_block_()
    assert block.names == ("inner", "remainder")
    assert block.estimators == tuple(union.named_transformers_.values())
    assert "StandardScaler" in union._repr_html_()


def test_the_diagram_of_a_fitted_vectorizer_shows_its_branches(text_backend):
    X = pd.DataFrame({"note": ["a red cat", "two blue birds"], "price": [3.0, 4.0]})
    vectorizer = sklembed.MultimodalVectorizer(
        text_encoder=FrozenEncoder(text_backend, store=None), lexical=False
    )
    assert "sk-parallel" in vectorizer._repr_html_()  # the encoder is a parameter
    assert not hasattr(vectorizer, "_sk_visual_block_")
    assert vectorizer.fit(X)._sk_visual_block_().names == ("note", "table")
    assert "OneHotEncoder" in vectorizer._repr_html_()


def test_a_store_shows_its_statistics(text_backend, tmp_path):
    store = EmbeddingStore(tmp_path / "<store>.sqlite")
    assert "does not exist yet" in store._repr_html_()
    assert not list(tmp_path.iterdir())
    FrozenEncoder(text_backend, store=store).transform(["one", "two"])
    html = store._repr_html_()
    assert "2 vectors" in html
    assert "<td>2</td>" in html
    assert "&lt;store&gt;" in html
    (tmp_path / "notes").write_text("not a database, just some notes " * 50)
    assert "notes" in EmbeddingStore(tmp_path / "notes")._repr_html_()


def test_reports_are_tables():
    rng = np.random.default_rng(0)
    names = ["a__0", "a__1", "b__0"]
    X = pd.DataFrame(rng.normal(size=(40, 3)), columns=names)
    report = modality_report(
        LogisticRegression(), X, X["a__0"] > 0, cv=2, noise=[1.0], missing=()
    )
    assert isinstance(report, ModalityReport)
    ranking = EncoderRanking(pd.DataFrame({"encoder": ["<x>"], "score": [0.5]}), "<x>")
    for result, heading, cell in (
        (report, "Shapley values", "a + b"),
        (ranking, "best encoder", "0.5"),
    ):
        for text in (repr(result), result._repr_html_()):
            assert text.count(heading) == 1
            assert cell in text
    assert report._repr_html_().count("<table") == 3
    assert "<x>" not in ranking._repr_html_()


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_a_progress_bar_overwrites_lines_only_in_a_terminal(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(verbose=1, desc="encoding", total=500, unit=" cells") as progress:
        for _ in range(500):
            progress.update()
    text = stream.getvalue()
    assert "encoding: 100%" in text
    assert ("\r" in text) == stream.isatty()
    if not stream.isatty():
        first, last = text.splitlines()
        assert "0/500" in first
        assert "500/500" in last
    assert list(progress_bar([1, 2], verbose=0)) == [1, 2]
    assert stream.getvalue() == text


def test_no_progress_bar_is_made_otherwise():
    """Bars of tqdm itself would fill logs, and be no widgets in notebooks."""
    importing = []
    for path in Path(sklembed.__file__).parent.rglob("*.py"):
        if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.MULTILINE):
            importing.append(path.name)
    assert importing == ["_display.py"]
