"""TrainedEstimator: the base class of estimators that train a small network."""

from collections.abc import Iterable
from copy import copy
from itertools import repeat
from numbers import Integral, Real

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.preprocessing import StandardScaler
from sklearn.utils._param_validation import Interval

from sklembed import _callbacks
from sklembed._callbacks import CallbackSupportMixin
from sklembed._display import DocLinkMixin
from sklembed._persistence import Saved
from sklembed._targets import hold_back


class TrainedEstimator(DocLinkMixin, Saved, CallbackSupportMixin, BaseEstimator):
    """Base class of estimators that train one small network on the rows of a table.

    A subclass writes `__init__` and `fit`. Its `fit` calls `_begin_fit`, reads the table, calls
    `_set_structure`, divides the rows with `_split_rows` and ends in `_train_network`, which sets
    `weights_`, `history_`, `n_iter_` and `n_parameters_`. Predictions use `weights_` alone.

    Warm start, early stopping, callbacks of scikit-learn and saving are the same in all
    subclasses.
    """

    _parameter_constraints: dict = {
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 2, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "warm_start": ["boolean"],
        "device": [str],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "skorch_params": [dict, None],
    }

    def _begin_fit(self):
        """Return whether `fit` continues from the weights of the previous fit.

        If not, these weights are deleted, so that an estimator whose fit fails is not fitted.
        """
        if not self.warm_start and hasattr(self, "weights_"):
            del self.weights_
        return hasattr(self, "weights_")

    def _set_structure(self, structure, resume):
        """Keep the arguments that determine the shapes of the network.

        Raises
        ------
        ValueError
            If training is resumed and the fitted network has another structure.
        """
        if resume and structure != self.structure_:
            raise ValueError(
                f"The fitted network has the structure {self.structure_}, but the parameters and "
                f"X require {structure}, so training cannot be resumed. Clone the estimator to "
                "fit a new network."
            )
        self.structure_ = structure

    def _split_rows(self, rows, strata, seed, suffices=len, needs="one row"):
        """Divide rows into training rows and the validation set of early stopping.

        Parameters
        ----------
        rows : ndarray of int
            Positions of the rows.
        strata : ndarray of int of shape (n_samples,) or None
            Class of each row; both parts have them in nearly equal proportions.
        seed : int
            Seeds the split.
        suffices : callable
            Takes the positions of a part and returns whether it can be used.
        needs : str
            Minimum content of a part, for the error message.

        Returns
        -------
        rows : Rows
            Without early stopping, all rows are training rows.
        """
        from sklembed._training import Rows

        if not self.early_stopping:
            return Rows(rows)
        train, valid = hold_back(rows, strata, self.validation_fraction, seed)
        if not (suffices(train) and suffices(valid)):
            raise ValueError(
                f"early_stopping with validation_fraction={self.validation_fraction} splits "
                f"{len(rows)} rows into {len(train)} training rows and a validation set of "
                f"{len(valid)}, but each needs at least {needs}. Change validation_fraction, or "
                "set early_stopping=False."
            )
        return Rows(train, valid)

    def _train_network(
        self,
        make_module,
        loss,
        X,
        y,
        rows,
        seed,
        *,
        sample_weight=None,
        resume=False,
        on_epoch=None,
        **options,
    ):
        """Train the network and set the attributes that training determines.

        Parameters are those of `sklembed._training.train`; `options` override parameters of
        the estimator.
        """
        from sklembed._training import Trained, TrainingOptions, train

        trained = train(
            make_module,
            loss,
            X,
            y,
            rows,
            TrainingOptions.of(self, seed, **options),
            sample_weight=sample_weight,
            start=Trained(self.weights_, self.history_) if resume else None,
            on_epoch=on_epoch,
        )
        self._set_trained(trained.history, trained.weights)
        self.n_parameters_ = trained.n_parameters

    def _set_trained(self, history, weights):
        """Set the attributes that training determines."""
        self.weights_ = weights
        self.history_ = history
        self.n_iter_ = len(history)

    def _report_epochs(self, context, X, y, update=None):
        """Return a function that reports each epoch to the callbacks; None without callbacks.

        `update` takes an estimator and sets its attributes that depend on `weights_` and on the
        training rows.
        """

        def fitted_attributes(history, weights):
            fitted = copy(self)  # training may still fail, so self must not change
            fitted._set_trained(history, weights)
            if update is not None:
                update(fitted)
            attributes = vars(fitted).items()
            return {name: value for name, value in attributes if name.endswith("_")}

        return _callbacks.each_epoch(self, context, X, y, fitted_attributes)

    def __sklearn_is_fitted__(self):
        return hasattr(self, "weights_")


def moments(
    batches: Iterable[np.ndarray], weights: Iterable[np.ndarray | None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and scale of each column of a block, which is read in batches to save memory.

    The scale of a constant column is 1, also if rounding to float32 leaves a small variance.
    `weights` are the weights of the rows, an array for each batch.
    """
    scaler = StandardScaler()
    weights = repeat(None) if weights is None else weights
    for batch, weight in zip(batches, weights, strict=False):
        scaler.partial_fit(batch, sample_weight=weight)
    mean, scale = scaler.mean_, scaler.scale_
    constant = scale <= 10 * np.finfo(np.float32).eps * np.abs(mean)
    return mean.astype(np.float32), np.where(constant, 1, scale).astype(np.float32)
