"""multimodal_pipeline: from a table to a model in one line."""

from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags

from sklembed.ensemble import EmbeddingClassifier, EmbeddingRegressor
from sklembed.vectorizer import MultimodalVectorizer, default_table_vectorizer

_ESTIMATORS = {"classifier": EmbeddingClassifier, "regressor": EmbeddingRegressor}


def multimodal_pipeline(
    estimator="classifier",
    *,
    kinds=None,
    text_encoder="sentence-transformers/all-MiniLM-L6-v2",
    image_encoder="facebook/dinov2-small",
    lexical=True,
    n_jobs=None,
) -> Pipeline:
    """Return a pipeline that reads a table of texts, images and numbers, and predicts.

    The first step is a :class:`MultimodalVectorizer`, which decides how each column is
    read. The last is the estimator, which needs no tuning if it is "classifier" or
    "regressor". For any other estimator, the pipeline has the preprocessing that it
    needs: an imputer and a scaler, unless it accepts missing values, as gradient
    boosting does.

    Parameters
    ----------
    estimator : {"classifier", "regressor"} or estimator, default="classifier"
        The final estimator. "classifier" is :class:`EmbeddingClassifier`, "regressor"
        is :class:`EmbeddingRegressor`. It is not cloned.

    kinds : dict of str to str or None, default=None
        The kind of single columns, which overrides the rules of the vectorizer, such as
        ``{"code": "name"}``.

    text_encoder : str, path, backend, transformer or None, \
            default="sentence-transformers/all-MiniLM-L6-v2"
        Encoder of texts.

    image_encoder : str, path, backend, transformer or None, \
            default="facebook/dinov2-small"
        Encoder of images.

    lexical : bool or transformer, default=True
        Encoder of the characters of texts and names.

    n_jobs : int or None, default=None
        Number of jobs to run in parallel, as in scikit-learn: None means 1, and -1
        means all processors.

    Returns
    -------
    pipeline : :class:`~sklearn.pipeline.Pipeline`
        The pipeline, not fitted.

    Raises
    ------
    TypeError
        If `estimator` is a class instead of an instance, or cannot predict.
    ValueError
        If `estimator` is another string.

    See Also
    --------
    MultimodalVectorizer : The first step, with all its parameters.
    skrub.tabular_pipeline : A pipeline of tables without images and neural encoders.

    Examples
    --------
    >>> import pandas as pd
    >>> from sklembed import CallableBackend, multimodal_pipeline
    >>> def load():
    ...     return lambda texts: [[len(text), text.count("s")] for text in texts]
    >>> letters = CallableBackend(
    ...     load, name="letters", version="1", modality="text", n_features=2
    ... )
    >>> X = pd.DataFrame({
    ...     "title": ["a red cat", "two cats", "red cars", "one blue car"] * 10,
    ...     "price": ["$3.50", "$12.00", None, "$1,250.00"] * 10,
    ... })
    >>> y = ["pet", "pet", "car", "car"] * 10
    >>> model = multimodal_pipeline(
    ...     "classifier", text_encoder=letters, kinds={"title": "text"}
    ... )
    >>> model.fit(X, y).predict(X[:4])
    array(['pet', 'pet', 'car', 'car'], dtype='<U3')
    >>> model[0].kinds_["kind"].to_dict()
    {'title': 'text', 'price': 'numeric'}
    """
    estimator = _as_estimator(estimator, n_jobs)
    vectorizer = MultimodalVectorizer(
        kinds=kinds,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        lexical=lexical,
        n_jobs=n_jobs,
    )
    steps = [vectorizer]
    if not get_tags(estimator).input_tags.allow_nan:
        if "blocks" in estimator.get_params(deep=False):
            # Blocks of NaN are missing modalities, which the estimator supports.
            vectorizer.set_params(table_vectorizer=_complete_table())
        else:
            steps += [SimpleImputer(add_indicator=True), StandardScaler()]
    return make_pipeline(*steps, estimator)


def _complete_table():
    """Return a transformer of table columns that leaves no value missing."""
    return make_pipeline(
        default_table_vectorizer(), SimpleImputer(add_indicator=True), StandardScaler()
    )


def _as_estimator(estimator, n_jobs):
    """Return the final estimator, by name or as passed."""
    if isinstance(estimator, str):
        if estimator not in _ESTIMATORS:
            raise ValueError(
                f"estimator must be 'classifier', 'regressor' or an estimator; got "
                f"{estimator!r}."
            )
        return _ESTIMATORS[estimator](n_jobs=n_jobs)
    if isinstance(estimator, type):
        raise TypeError(
            "estimator must be an instance, not a class. Pass "
            f"{estimator.__name__}() instead of {estimator.__name__}."
        )
    if not (hasattr(estimator, "fit") and hasattr(estimator, "predict")):
        raise TypeError(
            f"estimator must have fit and predict, as classifiers and regressors do; "
            f"got {estimator!r}."
        )
    return estimator
