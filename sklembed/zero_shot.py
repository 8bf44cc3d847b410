"""ZeroShotClassifier: classes told by texts, without a labelled row."""

from collections.abc import Mapping
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

from sklembed._table.blocks import known_block, observed_rows
from sklembed._validation import (
    check_no_label_lists,
    check_no_missing_label,
    sorted_labels,
)

_PLACE = "{}"  # of the class's name, in a template
_TEMPERATURE = 0.01  # of CLIP and SigLIP, where training has kept it
_TEMPERATURES = (1e-3, 10.0)  # that calibration looks between


class ZeroShotClassifier(ClassifierMixin, BaseEstimator):
    """Classify rows by how alike they are to texts that describe the classes [1]_.

    A class is the mean, scaled to unit length, of the unit vectors of its texts in a space that
    texts share with the rows' modality. A row belongs to the class it is most alike to;
    probabilities are the softmax of the cosines over a temperature. No labelled row is needed.

    Parameters
    ----------
    encoder : estimator
        What brings rows and texts into one space.

        - A cross-modal estimator, which has ``encode(X, modality)``: :class:`SharedFusionEncoder`,
          :class:`CrossAttentionAdaptor`, :class:`CanonicalAligner`, :class:`ModalityGapAligner`.
          It is cloned and fitted on the rows of `fit`; one that is fitted already, in
          :class:`~sklearn.frozen.FrozenEstimator`, is used as it is.
        - A :class:`FrozenEncoder` of a dual encoder such as CLIP or SigLIP. `X` is then the column
          that it takes.

    prompts : str, list of str or dict, default="a picture of {}"
        The texts of a class: a template with ``{}`` for its name, several of them, whose vectors
        are averaged, or for each class its text or texts.

    classes : array-like of shape (n_classes,) or None, default=None
        The classes; None takes those that `prompts` holds texts for, if it is a dict, else the
        labels in `y`.

    text_encoder : transformer or None, default=None
        Maps a list of texts to what the text block holds: the :class:`FrozenEncoder` of that
        branch or, if more steps or a weight follow it there, the fitted branch itself,
        ``union.named_transformers_["text"]``. Used as it is. None is the text tower of a dual
        encoder.

    modality : str, default="image"
        The block by which rows are classified. Of no use to a dual encoder.

    text_modality : str, default="text"
        The block that texts are encoded as. Of no use to a dual encoder.

    temperature : {"learnt", "calibrated"} or float, default="learnt"
        What cosines are divided by. "learnt" is the temperature that `encoder` was trained with,
        .01 where it has none. "calibrated" is the one under which the labels in `y` are likeliest;
        rows that the encoder was trained on are closer to their texts than new ones, so give it
        others, or wrap the classifier in
        ``CalibratedClassifierCV(..., method="temperature")``.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes, sorted.

    prompts_ : dict
        The texts of each class.

    class_embeddings_ : ndarray of shape (n_classes, n_components), dtype float32
        The classes in the shared space, of unit length.

    temperature_ : float
        The temperature.

    encoder_ : estimator
        The encoder, fitted.

    n_features_in_ : int
        Number of columns seen during fit, where it has seen any.

    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Their names, where they have any.

    See Also
    --------
    SharedFusionEncoder : Learns the space from pairs.

    References
    ----------
    .. [1] Radford et al. Learning Transferable Visual Models From Natural Language Supervision.
       arXiv 2103.00020, section 3.1. LightCRL (arXiv 2403.04650) and others follow it.

    Examples
    --------
    >>> import numpy as np
    >>> from sklembed import CanonicalAligner, ZeroShotClassifier
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat(["cat", "dog", "cow"], 50)
    >>> means = {"cat": [3, 0, 0], "dog": [0, 3, 0], "cow": [0, 0, 3]}
    >>> text = np.array([means[name] for name in y]) + rng.normal(size=(150, 3))
    >>> X = np.hstack([text, text @ rng.normal(size=(3, 5)) + rng.normal(size=(150, 5))])
    >>> class Texts:
    ...     def transform(self, texts):
    ...         return np.array([means[text.split()[-1]] for text in texts], dtype=float)
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
            StrOptions({"learnt", "calibrated"}),
            Interval(Real, 0, None, closed="neither"),
        ],
    }

    def __init__(
        self,
        encoder,
        prompts="a picture of {}",
        *,
        classes=None,
        text_encoder=None,
        modality="image",
        text_modality="text",
        temperature="learnt",
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
            What `encoder` is fitted on. A frozen one learns nothing: there `X` is looked at only to
            calibrate, and may be None.

        y : array-like of shape (n_samples,) or None, default=None
            Labels. They name the classes, if nothing else does, and calibrate the temperature,
            where that is asked for; otherwise they are not used.

        Returns
        -------
        self : ZeroShotClassifier
            The fitted classifier.

        Raises
        ------
        ValueError
            If nothing names two classes, a template has no placeholder, a class has no text or the
            same as another, there is no encoder of texts or no such block, rows to fit on or labels
            to calibrate by are lacking, or a label is of no class.
        """
        self.classes_, self.prompts_ = self._find_prompts(y)
        labels = self._calibration_labels(X, y)
        texts = self._encode_texts(self._text_encoder())  # before anything is trained
        self.encoder_ = clone(self.encoder)
        if not self._is_dual():
            if X is None and not isinstance(self.encoder, FrozenEstimator):
                raise ValueError(
                    f"X is None, but the {type(self.encoder).__name__} has to be fitted on it. "
                    "Give rows, or a fitted encoder as FrozenEstimator(encoder)."
                )
            self.encoder_.fit(X, None)
            known_block(self.modality, self.encoder_.blocks_)
        self.class_embeddings_ = self._class_embeddings(texts)
        if labels is not None:
            self.temperature_ = _likeliest_temperature(self._cosines(X), labels)
        elif self.temperature == "learnt":
            self.temperature_ = getattr(self.encoder_, "temperature_", _TEMPERATURE)
        else:
            self.temperature_ = self.temperature
        return self

    def predict(self, X):
        """Return the class that each row is most alike to.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows, as `encoder` takes them, with all their columns; blocks but that of `modality`
            may be NaN.

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
        if classes is None:
            classes = list(self.prompts) if isinstance(self.prompts, Mapping) else y
        if classes is None:
            raise ValueError(
                "Nothing names the classes: pass classes, prompts as a dict from classes to texts, "
                "or y."
            )
        if np.any(pd.isna(np.asarray(classes))):
            raise ValueError(
                f"A class is None or NaN: {list(classes)[:10]}. Leave it out."
            )
        classes = sorted_labels(column_or_1d(classes))[0]
        if len(classes) < 2:
            raise ValueError(
                f"Two classes are needed at least; got {classes.tolist()}."
            )
        texts = {label: self._texts_of(label) for label in classes.tolist()}
        seen = {}
        for label, own in texts.items():
            twin = seen.setdefault(frozenset(own), label)
            if twin != label:
                raise ValueError(
                    f"The classes {twin!r} and {label!r} have the same texts, {own[:3]}, so that "
                    "nothing can tell them apart. Change the prompts."
                )
        return classes, texts

    def _texts_of(self, label):
        """Return the texts of a class."""
        if isinstance(self.prompts, Mapping):
            if label not in self.prompts:
                raise ValueError(
                    f"prompts has no text for class {label!r}; it has some for "
                    f"{list(self.prompts)[:10]}."
                )
            texts = self.prompts[label]
            texts = (
                [texts]
                if isinstance(texts, str) or not np.iterable(texts)
                else list(texts)
            )
        else:
            templates = (
                [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)
            )
            lacking = [
                t for t in templates if not isinstance(t, str) or _PLACE not in t
            ]
            if lacking:
                raise ValueError(
                    f"The template {lacking[0]!r} has no {_PLACE} for the class's name, so that "
                    "all classes would get the same text. Put it in, or pass a dict from classes "
                    "to texts."
                )
            texts = [template.replace(_PLACE, str(label)) for template in templates]
        if not texts or not all(
            isinstance(text, str) and text.strip() for text in texts
        ):
            raise ValueError(
                f"The texts of class {label!r} must be words; got {texts!r}."
            )
        return texts

    def _calibration_labels(self, X, y):
        """Return the position of each label among the classes, or None where none are asked for."""
        if self.temperature != "calibrated":
            return None
        if y is None or X is None:
            raise ValueError(
                "temperature='calibrated' needs labelled rows; X or y is None. Give both to fit."
            )
        check_no_missing_label(y)
        y = column_or_1d(y, warn=True)
        check_consistent_length(X, y)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(
                f"y holds {unknown.tolist()[0]!r}, which is none of the classes "
                f"{self.classes_[:10].tolist()}, so there is nothing to calibrate by."
            )
        return np.searchsorted(self.classes_, y)

    def _is_dual(self):
        """Tell whether the encoder is a dual encoder, not one of blocks."""
        if hasattr(self.encoder, "encode"):
            return False
        if get_tags(self.encoder).requires_fit:
            raise ValueError(
                f"A {type(self.encoder).__name__} as encoder has no method encode(X, modality), "
                "and is no frozen dual encoder either. Pass a cross-modal estimator, and put the "
                "steps before it into a pipeline: make_pipeline(union, ZeroShotClassifier(...))."
            )
        return True

    def _text_encoder(self):
        """Return what texts are encoded by, before anything is trained."""
        if self.text_encoder is not None:
            return self.text_encoder
        if not self._is_dual():
            raise ValueError(
                f"{type(self.encoder).__name__} takes vectors, not texts: pass text_encoder, the "
                f"FrozenEncoder of its block {self.text_modality!r}."
            )
        try:
            return clone(self.encoder).set_params(modality="text")
        except ValueError as error:
            raise ValueError(
                f"{type(self.encoder).__name__} has no parameter modality, and so no text tower: "
                "pass text_encoder."
            ) from error

    def _encode_texts(self, encoder):
        """Return the vectors, or tokens, of the texts of all classes."""
        texts = [text for own in self.prompts_.values() for text in own]
        try:
            return encoder.transform(texts)
        except ValueError as error:
            error.add_note(
                "This was in encoding the prompts; they go through text_encoder."
            )
            raise

    def _class_embeddings(self, texts):
        """Return the unit vector of each class, given what its texts were encoded to."""
        z = texts
        if not self._is_dual():
            try:
                z = self.encoder_.encode(texts, self.text_modality)
            except ValueError as error:
                error.add_note(
                    "This was in what text_encoder made of the prompts: it must give what the "
                    f"block {self.text_modality!r} was made of."
                )
                raise
        if z.dtype == object:
            raise ValueError(
                f"{self.encoder!r} gives tokens, and a class is one vector. Set output='pooled'."
            )
        z = normalize(np.asarray(z, dtype=np.float32))
        ends = np.cumsum([len(own) for own in self.prompts_.values()])[:-1]
        return normalize(np.stack([part.mean(axis=0) for part in np.split(z, ends)]))

    @property
    def n_features_in_(self):
        """Number of columns seen during fit."""
        return self.encoder_.n_features_in_

    @property
    def feature_names_in_(self):
        """Names of the columns seen during fit, where they have any."""
        return self.encoder_.feature_names_in_

    def _cosines(self, X):
        """Return the cosine of each row and class."""
        if self._is_dual():
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
                f"Row {missing[0]} has no {self.modality!r} to be classified by ({len(missing)} "
                "such rows). Leave them out."
            )
        return (normalize(z) @ self.class_embeddings_.T).astype(np.float64)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        tags.input_tags.allow_nan = True  # in other blocks
        return tags


def _likeliest_temperature(cosines, labels):
    """Return the temperature under which the labels are likeliest."""

    def loss(log_temperature):
        logits = cosines / np.exp(log_temperature)
        return np.mean(
            logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
        )

    return float(
        np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded").x)
    )
