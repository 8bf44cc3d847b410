"""ZeroShotClassifier: classes described by texts, without labelled rows."""

from collections.abc import Mapping
from itertools import chain
from numbers import Real

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context, clone
from sklearn.frozen import FrozenEstimator
from sklearn.preprocessing import normalize
from sklearn.utils import check_consistent_length, column_or_1d, get_tags
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data

from sklembed._display import DocLinkMixin
from sklembed._table.blocks import known_block, observed_rows
from sklembed._validation import (
    check_no_label_lists,
    check_no_missing_label,
    sorted_labels,
)

_PLACEHOLDER = "{}"  # of the class name, in a template
_TEMPERATURE = 0.01  # of CLIP; also the default for encoders without a temperature
_TEMPERATURE_BOUNDS = (1e-3, 10.0)  # of calibration


class ZeroShotClassifier(DocLinkMixin, ClassifierMixin, BaseEstimator):
    """Classify rows by their similarity to texts that describe the classes [1]_.

    Texts and the rows' modality share an embedding space. A class embedding is the mean
    of the unit vectors of its texts, scaled to unit length. The predicted class has the
    largest cosine similarity to the row; probabilities are the softmax of the cosines
    divided by a temperature. No labelled rows are needed.

    Parameters
    ----------
    encoder : estimator
        Maps rows and texts into one space.

        - A cross-modal estimator with a method ``encode(X, modality)``, such as
          :class:`SharedFusionEncoder`, :class:`CrossAttentionAdaptor`,
          :class:`CanonicalAligner` or :class:`ModalityGapAligner`. It is cloned and
          fitted on the rows passed to `fit`. A fitted one is used without change if it
          is wrapped in :class:`~sklearn.frozen.FrozenEstimator`.
        - A :class:`FrozenEncoder` of a dual encoder such as CLIP or SigLIP. `X` is then
          its input column.

    prompts : str, list of str or dict, default="an image of {}"
        The texts of a class: a template with ``{}`` for its name, or several templates,
        whose vectors are averaged, or a dict with one or more texts for each class.

    classes : array-like of shape (n_classes,) or None, default=None
        The classes. If None, the keys of `prompts` if it is a dict, otherwise the
        labels in `y`.

    text_encoder : transformer or None, default=None
        Maps a list of texts to the vectors of the text block. Pass the
        :class:`FrozenEncoder` of that branch or, if the branch has further steps or a
        weight, the fitted branch ``union.named_transformers_["text"]``. It is not
        fitted. If None, the text tower of a dual encoder is used.

    modality : str, default="image"
        The block by which rows are classified. Ignored by dual encoders.

    text_modality : str, default="text"
        The block as which texts are encoded. Ignored by dual encoders.

    temperature : {"learned", "calibrated"} or float, default="learned"
        Temperature by which cosines are divided. "learned" is the temperature with
        which `encoder` was trained, or 0.01 if it has none. "calibrated" maximizes the
        likelihood of the labels in `y`. Rows on which the encoder was trained are
        closer to their texts than new rows are. Calibrate on other rows, or wrap the
        classifier in ``CalibratedClassifierCV(..., method="temperature")``, which needs
        scikit-learn 1.8.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes, sorted.

    prompts_ : dict
        The texts of each class.

    class_embeddings_ : ndarray of shape (n_classes, n_components), dtype float32
        The class embeddings, of unit length.

    temperature_ : float
        The temperature.

    encoder_ : estimator
        The fitted encoder.

    n_features_in_ : int
        Number of columns seen during fit. Defined only if the encoder has it.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns seen during fit. Defined only if `X` has string column
        names.

    See Also
    --------
    SharedFusionEncoder : Learns a shared space from pairs.

    References
    ----------
    .. [1] Radford et al. Learning Transferable Visual Models From Natural Language
       Supervision. arXiv 2103.00020, section 3.1. LightCRL (arXiv 2403.04650) and
       others follow it.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CanonicalAligner, ZeroShotClassifier
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat(["cat", "dog", "cow"], 50)
    >>> means = {"cat": [3, 0, 0], "dog": [0, 3, 0], "cow": [0, 0, 3]}
    >>> text = np.array([means[name] for name in y]) + rng.normal(size=(150, 3))
    >>> image = text @ rng.normal(size=(3, 5)) + rng.normal(size=(150, 5))
    >>> X = np.hstack([text, image])
    >>> class Texts:
    ...     def transform(self, texts):
    ...         return np.array([means[text.split()[-1]] for text in texts], float)
    >>> aligner = CanonicalAligner(blocks={"text": slice(0, 3), "image": slice(3, 8)})
    >>> classifier = ZeroShotClassifier(
    ...     aligner, classes=["cat", "cow", "dog"], text_encoder=Texts()
    ... )
    >>> classifier.fit(X).score(X, y) > 0.8
    True
    """

    _parameter_constraints: dict = {
        "encoder": [HasMethods(["fit", "encode"]), HasMethods(["fit", "transform"])],
        "prompts": [str, list, tuple, Mapping],
        "classes": ["array-like", None],
        "text_encoder": [HasMethods("transform"), None],
        "modality": [str],
        "text_modality": [str],
        "temperature": [
            StrOptions({"learned", "calibrated"}),
            Interval(Real, 0, None, closed="neither"),
        ],
    }

    def __init__(
        self,
        encoder,
        prompts="an image of {}",
        *,
        classes=None,
        text_encoder=None,
        modality="image",
        text_modality="text",
        temperature="learned",
    ):
        self.encoder = encoder
        self.prompts = prompts
        self.classes = classes
        self.text_encoder = text_encoder
        self.modality = modality
        self.text_modality = text_modality
        self.temperature = temperature

    @_fit_context(prefer_skip_nested_validation=False)
    def fit(self, X, y=None):
        """Fit the encoder, unless it is frozen, and encode the texts of the classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training data of `encoder`. A frozen encoder uses it only for calibration;
            otherwise it may be None.

        y : array-like of shape (n_samples,) or None, default=None
            Labels. They define the classes if neither `classes` nor a dict of `prompts`
            does, and are used if the temperature is calibrated.

        Returns
        -------
        self : ZeroShotClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If there are fewer than two classes, a template has no placeholder, a class
            has no text or the same texts as another, there is no text encoder or block
            of that name, rows to fit on or labels for calibration are missing, or a
            label is not in the classes.
        """
        self.classes_, self.prompts_ = self._find_prompts(y)
        labels = self._calibration_labels(X, y)
        texts = self._encode_texts(self._find_text_encoder())  # before any training
        self.encoder_ = clone(self.encoder)
        if not self._has_dual_encoder():
            if X is None and not isinstance(self.encoder, FrozenEstimator):
                raise ValueError(
                    f"X is None, but {type(self.encoder).__name__} must be fitted. "
                    "Pass rows, or a fitted encoder as FrozenEstimator(encoder)."
                )
            self.encoder_.fit(X, None)
            known_block(self.modality, self.encoder_.blocks_)
        self.class_embeddings_ = self._embed_classes(texts)
        if labels is not None:
            self.temperature_ = _calibrate_temperature(self._cosines(X), labels)
        elif self.temperature == "learned":
            self.temperature_ = getattr(self.encoder_, "temperature_", _TEMPERATURE)
        else:
            self.temperature_ = self.temperature
        return self

    def predict(self, X):
        """Return the class with the largest cosine similarity to each row.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Input of `encoder`, with all its columns. Blocks other than `modality` may
            be NaN.

        Returns
        -------
        y : ndarray of shape (n_samples,)
            Classes.

        Raises
        ------
        ValueError
            If a row lacks the modality.
        """
        check_is_fitted(self)
        return self.classes_[self._cosines(X).argmax(axis=1)]

    def predict_proba(self, X):
        """Return the probability of each class.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows, as for `predict`.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes), dtype float64
            Columns in the order of `classes_`.

        Raises
        ------
        ValueError
            If a row lacks the modality.
        """
        check_is_fitted(self)
        return softmax(self._cosines(X) / self.temperature_, axis=1)

    def _find_prompts(self, y):
        """Return the classes, sorted, and the texts of each."""
        classes = self.classes
        if classes is None and y is not None:
            check_no_label_lists(y)
            classes = y
        if self.classes is None and isinstance(self.prompts, Mapping):
            classes = list(self.prompts)
        if classes is None:
            raise ValueError("No classes given. Pass classes, a dict of prompts, or y.")
        if np.any(pd.isna(np.asarray(classes))):
            raise ValueError(
                f"A class is None or NaN: {list(classes)[:10]}. Leave it out."
            )
        classes = sorted_labels(column_or_1d(classes))[0]
        if len(classes) < 2:
            raise ValueError(
                f"At least two classes are needed; got {classes.tolist()}."
            )
        prompts = {label: self._class_texts(label) for label in classes.tolist()}
        label_of_texts = {}
        for label, texts in prompts.items():
            twin = label_of_texts.setdefault(frozenset(texts), label)
            if twin != label:
                raise ValueError(
                    f"The classes {twin!r} and {label!r} have the same texts, "
                    f"{texts[:3]}, and cannot be distinguished. Change the prompts."
                )
        return classes, prompts

    def _class_texts(self, label):
        """Return the texts of a class."""
        if isinstance(self.prompts, Mapping):
            if label not in self.prompts:
                raise ValueError(
                    f"prompts has no text for class {label!r}, only for "
                    f"{list(self.prompts)[:10]}. Add its texts."
                )
            texts = _as_list(self.prompts[label])
        else:
            texts = []
            for template in _as_list(self.prompts):
                if not isinstance(template, str) or _PLACEHOLDER not in template:
                    raise ValueError(
                        f"The template {template!r} has no {_PLACEHOLDER} for the "
                        "class's name, so all classes would get the same text. Add it, "
                        "or pass a dict from classes to texts."
                    )
                texts.append(template.replace(_PLACEHOLDER, str(label)))
        valid = all(isinstance(text, str) and text.strip() for text in texts)
        if not texts or not valid:
            raise ValueError(
                f"The texts of class {label!r} must be non-empty strings; got "
                f"{texts!r}."
            )
        return texts

    def _calibration_labels(self, X, y):
        """Return the position of each label in the classes, for calibration only."""
        if self.temperature != "calibrated":
            return None
        if y is None or X is None:
            raise ValueError(
                "temperature='calibrated' needs labelled rows, but X or y is None. "
                "Pass both to fit."
            )
        check_no_missing_label(y)
        y = column_or_1d(y, warn=True)
        check_consistent_length(X, y)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(
                f"y has the label {unknown.tolist()[0]!r}, which is none of the "
                f"classes {self.classes_[:10].tolist()}. Calibrate on rows of these "
                "classes."
            )
        return np.searchsorted(self.classes_, y)

    def _has_dual_encoder(self):
        """Return whether the encoder is a dual encoder and not a cross-modal one."""
        if hasattr(self.encoder, "encode"):
            return False
        if get_tags(self.encoder).requires_fit:
            raise ValueError(
                f"A {type(self.encoder).__name__} as encoder has no method encode(X, "
                "modality), and is not a frozen dual encoder. Pass a cross-modal "
                "estimator, and put preceding steps into a pipeline: "
                "make_pipeline(union, ZeroShotClassifier(...))."
            )
        return True

    def _find_text_encoder(self):
        """Return the transformer that encodes texts."""
        if self.text_encoder is not None:
            return self.text_encoder
        if not self._has_dual_encoder():
            raise ValueError(
                f"{type(self.encoder).__name__} takes vectors, not texts. Set "
                "text_encoder to the FrozenEncoder of its block "
                f"{self.text_modality!r}."
            )
        try:
            return clone(self.encoder).set_params(modality="text")
        except ValueError as error:
            raise ValueError(
                f"{type(self.encoder).__name__} has no parameter modality, and so no "
                "text tower. Set text_encoder."
            ) from error

    def _encode_texts(self, text_encoder):
        """Return the vectors, or tokens, of the texts of all classes."""
        texts = list(chain.from_iterable(self.prompts_.values()))
        try:
            return text_encoder.transform(texts)
        except ValueError as error:
            error.add_note("This was in encoding the prompts by text_encoder.")
            raise

    def _embed_classes(self, texts):
        """Return the unit vector of each class from the vectors of its texts."""
        z = texts
        if not self._has_dual_encoder():
            try:
                z = self.encoder_.encode(texts, self.text_modality)
            except ValueError as error:
                error.add_note(
                    "This was in encoding the output of text_encoder, which must have "
                    f"the columns of the block {self.text_modality!r}."
                )
                raise
        if z.dtype == object:
            raise ValueError(
                f"{self.encoder!r} returns tokens, but a class needs a single vector. "
                "Set output='pooled'."
            )
        z = normalize(np.asarray(z, dtype=np.float32))
        ends = np.cumsum([len(texts) for texts in self.prompts_.values()])[:-1]
        return normalize(np.stack([part.mean(axis=0) for part in np.split(z, ends)]))

    @property
    def n_features_in_(self):
        """Number of columns seen during fit."""
        return self.encoder_.n_features_in_

    @property
    def feature_names_in_(self):
        """Names of the columns seen during fit, if they are strings."""
        return self.encoder_.feature_names_in_

    def _cosines(self, X):
        """Return the cosine similarity of each row and class."""
        if self._has_dual_encoder():
            z = self.encoder_.transform(X)
        else:
            validate_data(self.encoder_, X, skip_check_array=True, reset=False)
            part = self.encoder_.blocks_[self.modality]
            block = X.iloc[:, part] if hasattr(X, "iloc") else np.asarray(X)[:, part]
            z = self.encoder_.encode(block, self.modality)
        z = np.asarray(z, dtype=np.float32)
        missing = np.flatnonzero(~observed_rows(z))
        if len(missing):
            raise ValueError(
                f"Row {missing[0]} has no {self.modality!r}, by which rows are "
                f"classified ({len(missing)} such rows). Leave them out."
            )
        return (normalize(z) @ self.class_embeddings_.T).astype(np.float64)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.input_tags.allow_nan = True  # in other blocks
        return tags


def _as_list(texts):
    """Return one or more texts as a list."""
    if isinstance(texts, str) or not np.iterable(texts):
        return [texts]
    return list(texts)


def _calibrate_temperature(cosines, labels):
    """Return the temperature that maximizes the likelihood of the labels."""
    rows = np.arange(len(labels))

    def loss(log_temperature):
        logits = cosines / np.exp(log_temperature)
        return np.mean(logsumexp(logits, axis=1) - logits[rows, labels])

    bounds = np.log(_TEMPERATURE_BOUNDS)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))
