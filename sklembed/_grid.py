"""Search in a grid of settings."""

from collections.abc import Callable, Sequence


def descend(
    error: Callable[[tuple[int, ...]], float],
    sizes: Sequence[int],
    position: tuple[int, ...],
) -> tuple[int, ...]:
    """Move to neighbours, one axis at a time, while the error falls.

    Parameters
    ----------
    error : callable
        Takes a position in the grid; called once for each position.
    sizes : sequence of int
        Number of values on each axis.
    position : tuple of int
        The start.

    Returns
    -------
    position : tuple of int
        A position whose neighbours have no smaller error.
    """
    errors = {position: error(position)}
    best = None
    while best != position:
        best = position
        for axis in range(len(sizes)):
            for step in (1, -1):
                position = _walk(error, errors, sizes, position, axis, step)
    return position


def _walk(error, errors, sizes, position, axis, step):
    """Move along one axis in one direction while the error falls."""
    while 0 <= position[axis] + step < sizes[axis]:
        neighbour = (*position[:axis], position[axis] + step, *position[axis + 1 :])
        if neighbour not in errors:
            errors[neighbour] = error(neighbour)
        if not errors[neighbour] < errors[position]:  # also if an error is NaN
            break
        position = neighbour
    return position
