"""Logistic regression whose training rows may lack a class."""

import numpy as np
from sklearn.linear_model import LogisticRegression


def fit_classes(C, Z, codes, weight, n_classes, *, tol=1e-3):
    """Fit logistic regression; classes without a row get a low constant score.

    Parameters
    ----------
    C : float
        Inverse penalty.
    Z : ndarray of shape (n_samples, n_features)
        Features.
    codes : ndarray of shape (n_samples,)
        Class of each row, from 0 to ``n_classes - 1``.
    weight : ndarray of shape (n_samples,)
        Weights of the rows. Rows of weight 0 are not used.
    n_classes : int
        Number of classes.
    tol : float, default=1e-3
        Tolerance of the solver.

    Returns
    -------
    coef : ndarray of shape (n_features, n_classes)
        Coefficients. The score of the first of two classes is 0.
    intercept : ndarray of shape (n_classes,)
        Intercepts.
    """
    used = weight > 0
    Z, codes, weight = Z[used], codes[used], weight[used]
    present = np.unique(codes).astype(np.intp)
    coef = np.zeros((Z.shape[1], n_classes))
    intercept = np.full(n_classes, -np.log(len(codes) + n_classes))
    intercept[present] = 0
    if len(present) == 1:
        return coef, intercept
    model = LogisticRegression(C=C, max_iter=300, tol=tol)
    model.fit(Z, codes, sample_weight=weight)
    if len(present) == 2:
        coef[:, present[1]] = model.coef_[0]
        intercept[present[1]] = model.intercept_[0]
    else:
        coef[:, present] = model.coef_.T
        intercept[present] = model.intercept_
    return coef, intercept
