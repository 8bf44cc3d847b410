"""scikit-learn's callbacks, if the installed version has them."""

from contextlib import contextmanager

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """The part of the interface that estimators use, without callbacks."""

        def _init_callback_context(self, **_):
            return None

    def with_callbacks(method):  # type: ignore[no-redef]
        """Return the method unchanged."""
        return method


def begin(estimator, context, X, y):
    """Report the beginning of a task to the callbacks."""
    if context is not None:
        context.call_on_fit_task_begin(estimator=estimator, X=X, y=y)


def end(estimator, context, X, y, attributes=None):
    """Report the end of a task to the callbacks; return whether one requests a stop.

    `attributes`, or a function that returns them, are the fitted attributes up to this task.
    """
    if context is None:
        return False
    stop = context.call_on_fit_task_end(
        estimator=estimator, X=X, y=y, reconstruction_attributes=attributes
    )
    return bool(stop)


@contextmanager
def task(estimator, context, X, y):
    """Report the beginning and the end of the task in the block."""
    begin(estimator, context, X, y)
    yield
    end(estimator, context, X, y)


def subtask(context, name, max_subtasks, task_id=None):
    """Open a task within another; `task_id` distinguishes tasks that run at the same time."""
    return context and context.subcontext(
        task_name=name, task_id=task_id, max_subtasks=max_subtasks
    )


@contextmanager
def fitting(estimator, context, inner, X, y):
    """Report a task in which `estimator` fits `inner`, and pass the callbacks on to `inner`."""
    if context is None:
        yield
        return
    with context.propagate_callback_context(inner), task(estimator, context, X, y):
        yield


def each_epoch(estimator, context, X, y, fitted_attributes=None):
    """Return a function that reports an epoch to the callbacks; None without callbacks.

    ``fitted_attributes(history, weights)`` returns the attributes of the estimator as of that
    epoch; without it, callbacks cannot evaluate the estimator during training.
    """
    if context is None:
        return None

    def after_epoch(history, weights):
        epoch = subtask(context, "epoch", 0)
        begin(estimator, epoch, X, y)
        attributes = None
        if fitted_attributes is not None:

            def attributes():
                return fitted_attributes(history, weights())

        return end(estimator, epoch, X, y, attributes)

    return after_epoch
