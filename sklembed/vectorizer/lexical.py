"""LexicalEncoder: vectors of the characters of short texts and codes."""

from numbers import Integral

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils._param_validation import Interval
from sklearn.utils.extmath import randomized_svd
from sklearn.utils.validation import check_is_fitted

# Distinct texts that fit reads, spread evenly. More cost time and change little.
_N_TEXTS = 20_000
# N-grams of a single text say nothing about others, but few texts may share none.
_FEW_TEXTS = 100
_LONGEST_VOCABULARY = 50_000


class LexicalEncoder(TransformerMixin, BaseEstimator):
    """Encode a column of texts by their characters: tf-idf and a truncated SVD.

    N-grams of three and four characters within words recognise parts of codes, names
    and misspelt words. Words that `fit` has not seen are encoded by the n-grams that
    they share with texts of `fit`.

    Parameters
    ----------
    n_components : int, default=30
        Largest width of the vectors. Columns with few texts or n-grams have fewer.

    Attributes
    ----------
    vectorizer_ : TfidfVectorizer
        The fitted n-grams.

    components_ : ndarray of shape (n_features_out, n_ngrams), dtype float32
        The right singular vectors of the n-grams.
    """

    _parameter_constraints: dict = {
        "n_components": [Interval(Integral, 1, None, closed="left")]
    }

    def __init__(self, n_components=30):
        self.n_components = n_components

    def fit(self, X, y=None):
        """Learn n-grams and components from the distinct texts of a column.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of texts, none of them missing.

        y : None
            Ignored.

        Returns
        -------
        self : LexicalEncoder
            The encoder.
        """
        self.fit_transform(X, y)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X, y=None):
        """Fit and transform.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of texts, none of them missing.

        y : None
            Ignored.

        Returns
        -------
        vectors : ndarray of shape (n_samples, n_features_out), dtype float32
            The vectors.
        """
        codes, texts = _distinct_texts(X)
        positions = np.arange(len(texts))
        if len(texts) > _N_TEXTS:
            positions = np.linspace(0, len(texts) - 1, _N_TEXTS).astype(np.intp)
        sample = [texts[position] for position in positions]
        # Rows of equal texts count once for each row, as in tf-idf without a sample.
        repeats = np.bincount(codes, minlength=len(texts))[positions]
        tfidf = self._fit_ngrams(sample)
        weighted = tfidf.multiply(np.sqrt(repeats)[:, np.newaxis]).tocsr()
        n_components = min(self.n_components, *tfidf.shape)
        # TruncatedSVD refuses a single n-gram and divides by a variance of zero.
        _, _, components = randomized_svd(weighted, n_components, random_state=0)
        self.components_ = components.astype(np.float32)
        return self._encode(codes, texts)

    def transform(self, X):
        """Return the vector of each text.

        Parameters
        ----------
        X : DataFrame, Series or array-like of shape (n_samples,) or (n_samples, 1)
            One column of texts, none of them missing.

        Returns
        -------
        vectors : ndarray of shape (n_samples, n_features_out), dtype float32
            The vectors. A text that shares no n-gram with texts of `fit` is zero.
        """
        check_is_fitted(self)
        return self._encode(*_distinct_texts(X))

    def get_feature_names_out(self, input_features=None):
        """Return the names of the output columns.

        Parameters
        ----------
        input_features : None
            Ignored.

        Returns
        -------
        names : ndarray of shape (n_features_out,), dtype object
            "lexical0", "lexical1", and so on.
        """
        check_is_fitted(self)
        width = len(self.components_)
        return np.asarray([f"lexical{i}" for i in range(width)], dtype=object)

    def _fit_ngrams(self, texts):
        """Fit the n-grams, and return tf-idf of shape (n_texts, n_ngrams)."""
        min_df = 1 if len(texts) < _FEW_TEXTS else 2
        self.vectorizer_ = TfidfVectorizer(
            analyzer="char_wb",
            ngram_range=(3, 4),
            sublinear_tf=True,
            min_df=min_df,
            max_features=_LONGEST_VOCABULARY,
            dtype=np.float32,
        )
        try:
            return self.vectorizer_.fit_transform(texts)
        except ValueError:  # no n-gram is in two texts
            self.vectorizer_.set_params(min_df=1)
            return self.vectorizer_.fit_transform(texts)

    def _encode(self, codes, texts):
        vectors = self.vectorizer_.transform(texts) @ self.components_.T
        return vectors[codes]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.no_validation = True  # cells are texts, which check_array would refuse
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        return tags


def _distinct_texts(X):
    """Return the position of each text among the distinct ones, and these."""
    if hasattr(X, "to_numpy"):
        X = X.to_numpy()
    cells = np.asarray(X, dtype=object).reshape(-1)
    codes, texts = pd.factorize(cells)
    return codes, [str(text) for text in texts]
