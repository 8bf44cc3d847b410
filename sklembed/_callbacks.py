"""scikit-learn's callbacks, where the installed version has them."""

from contextlib import contextmanager

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """What an estimator needs to run without callbacks."""

        def _init_callback_context(self, **_):
            return None

    def with_callbacks(method):  # type: ignore[no-redef]
        """Return the method as it is."""
        return method


def begin(estimator, context, X, y):
    """Tell callbacks that a task begins."""
    if context is not None:
        context.call_on_fit_task_begin(estimator=estimator, X=X, y=y)


def end(estimator, context, X, y, attributes=None):
    """Tell callbacks that a task has ended; return whether one asks to stop.

    `attributes`, or a function that returns them, make the estimator as fitted so far.
    """
    return context is not None and bool(
        context.call_on_fit_task_end(
            estimator=estimator, X=X, y=y, reconstruction_attributes=attributes
        )
    )


def subtask(context, name, max_subtasks, task_id=None):
    """Open a task within another; `task_id` tells it from those that may run at the same time."""
    return context and context.subcontext(
        task_name=name, task_id=task_id, max_subtasks=max_subtasks
    )


@contextmanager
def fitting(estimator, context, inner, X, y):
    """Tell callbacks of a task in which `estimator` fits `inner`, and hand them on to that one."""
    if context is None:
        yield
        return
    with context.propagate_callback_context(inner):
        begin(estimator, context, X, y)
        yield
        end(estimator, context, X, y)


def each_epoch(estimator, context, X, y, so_far=None):
    """Return what tells callbacks of each epoch of a training, or None where there are none.

    ``so_far(history, weights)`` returns the attributes that training has led to by then; without
    it, callbacks cannot ask for the estimator as fitted so far.
    """
    if context is None:
        return None

    def after_epoch(history, weights):
        epoch = subtask(context, "epoch", 0)
        begin(estimator, epoch, X, y)
        attributes = so_far and (lambda: so_far(history, weights()))
        return end(estimator, epoch, X, y, attributes)

    return after_epoch
