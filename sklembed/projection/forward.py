"""The numpy forward pass of a projection, and the maps between the spaces of two projections."""

import numpy as np
from scipy import linalg

_CHUNK_ROWS = 1024  # of a forward pass: a chunk stays in the caches of the processor


def project(weights, X, similarity):
    """Run a network in numpy; "cosine" gives unit vectors."""
    n_layers = sum(name.endswith(".weight") for name in weights)
    biases = [weights[f"layers.{layer}.bias"] for layer in range(n_layers)]
    matrices = [weights[f"layers.{layer}.weight"].T for layer in range(n_layers)]
    # Dividing the weights by the scale is safe; subtracting the mean must be done on the rows,
    # because it would cancel for columns far from 0.
    first = weights["layers.0.weight"] / weights["scale"]
    matrices[0] = np.ascontiguousarray(first.T)
    Z = np.empty((len(X), len(biases[-1])), dtype=np.float32)
    for start in range(0, len(X), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        H = X[rows] - weights["mean"]
        for matrix, bias in zip(matrices[:-1], biases[:-1], strict=True):
            H = product(H, matrix)
            H += bias
            np.maximum(H, 0, out=H)
        product(H, matrices[-1], out=Z[rows])
        Z[rows] += biases[-1]
        if similarity == "cosine":
            normalize(Z[rows])
    return Z


def normalize(Z):
    """Scale rows to unit length, in place."""
    norms = np.sqrt(np.einsum("ij,ij->i", Z, Z))
    Z /= np.maximum(norms, np.finfo(np.float32).tiny)[:, None]


def match(source, target):
    """Return the linear map of one space onto another, by ridge regression on the same rows.

    Unlike a rotation, it also equalises the scale of each direction in the two spaces.
    """
    gram = source.T @ source
    ridge = 0.01 * np.trace(gram) / len(gram)
    gram[np.diag_indices_from(gram)] += ridge + np.finfo(np.float32).tiny
    return linalg.solve(gram, source.T @ target, assume_a="pos")


def reduce(components, X):
    """Return the scaled principal components of rows."""
    return product(X - components["mean"], components["axes"].T)


def product(rows, matrix, out=None):
    """Multiply rows by a matrix, so that the result of a row depends on that row alone.

    BLAS uses another kernel for a single column, in which rounding can depend on the position
    of the row.
    """
    if matrix.shape[1] == 1:
        return np.einsum("ij,jk->ik", rows, matrix, out=out)
    return np.matmul(rows, matrix, out=out)
