"""A saved pipeline as a service: rows in, predictions out, in batches."""

import asyncio
import base64
import warnings

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

import sklembed
from sklembed import FrozenEncoder


class Service:
    """Predict rows, which are dicts of JSON types, with a saved pipeline.

    Images are texts in base64. Paths are not accepted, so that a request cannot read
    files of the server. Only a `MultimodalVectorizer` knows which columns have images,
    so other encoders of images are refused.
    """

    def __init__(self, directory):
        self.model = sklembed.load(directory)
        if not hasattr(self.model, "feature_names_in_"):
            raise ValueError(
                f"The model in {directory} was not fitted on a table with names of "
                "columns. Fit it on a DataFrame, and save it again."
            )
        self.columns = list(self.model.feature_names_in_)
        self.encoders = list(_frozen_encoders(self.model, set()))
        self.image_columns = self._image_columns()
        for encoder in self.encoders:
            encoder.set_params(store=None)  # new cells are encoded and forgotten

    def _image_columns(self):
        first = self.model.steps[0][1] if hasattr(self.model, "steps") else self.model
        if hasattr(first, "kinds_") and not first.specific_transformers:
            kinds = first.kinds_["kind"]
            return kinds.index[kinds == "image"].tolist()
        if any(_encodes_images(encoder) for encoder in self.encoders):
            raise ValueError(
                "Images are served only as columns of a MultimodalVectorizer without "
                "specific_transformers."
            )
        return []

    def warm_up(self):
        """Load the models of the encoders, so that no request waits for them."""
        for encoder in self.encoders:
            if hasattr(encoder, "space_"):  # fitted, and so a part that predicts
                encoder.warm_up()

    def check(self, rows):
        """Raise a ValueError if a row has unknown columns or no image in base64."""
        for number, row in enumerate(rows):
            unknown = row.keys() - set(self.columns)
            if unknown:
                raise ValueError(
                    f"Row {number} has the unknown columns {sorted(unknown)}; expected "
                    f"{self.columns}."
                )
            for name in self.image_columns:
                try:
                    _decode(row.get(name))
                except (TypeError, ValueError) as error:
                    raise ValueError(
                        f"Row {number} has no image in base64 in column {name!r}."
                    ) from error

    def predict(self, rows):
        """Return the probabilities by class, or the prediction, of each row."""
        # As objects, so that the types of a row do not depend on the other rows.
        table = pd.DataFrame(rows, columns=self.columns, dtype=object)
        for name in self.image_columns:
            images = [_decode(cell) for cell in table[name]]
            table[name] = pd.Series(images, dtype=object)
        try:
            with warnings.catch_warnings():
                # Alone, a cell of another kind is an error. It must be one among others.
                warnings.filterwarnings("error", message="Column .* is read as")
                return self._predict(table)
        except UserWarning as warning:
            message = str(warning).removesuffix(" They count as missing.")
            raise ValueError(message) from warning

    def _predict(self, table):
        classes = getattr(self.model, "classes_", None)
        is_one_target = classes is not None and np.ndim(classes[0]) == 0
        if not (is_one_target and hasattr(self.model, "predict_proba")):
            return _as_json(self.model.predict(table))
        names = [str(label) for label in classes]
        rows_of_probabilities = _as_json(self.model.predict_proba(table))
        return [dict(zip(names, row, strict=True)) for row in rows_of_probabilities]


class Batcher:
    """Predict the rows of concurrent requests together.

    A request to an idle model is predicted at once. Requests that arrive while the
    model predicts form the next batch, and then the batch waits a moment for more.
    """

    def __init__(self, predict, max_rows=64, max_wait=0.002):
        self.predict = predict
        self.max_rows = max_rows
        self.max_wait = max_wait
        self._queue = asyncio.Queue()
        self._is_busy = False
        self._is_stopped = False
        self._unanswered = set()

    async def __call__(self, rows):
        """Return the predictions of the rows of one request.

        Raises
        ------
        RuntimeError
            If the task of `run` has ended, or ends before the request is answered.
        """
        if self._is_stopped:
            raise RuntimeError(_STOPPED)
        future = asyncio.get_running_loop().create_future()
        self._unanswered.add(future)
        future.add_done_callback(self._unanswered.discard)
        self._queue.put_nowait((rows, future))
        return await future

    async def run(self):
        """Answer requests until the task is cancelled."""
        try:
            while True:
                requests = await self._next_requests()
                self._is_busy = len(requests) > 1
                await self._answer(requests)
        finally:
            self._is_stopped = True
            for future in list(self._unanswered):
                _finish(future, error=RuntimeError(_STOPPED))

    async def _next_requests(self):
        requests = [await self._queue.get()]
        n_rows = len(requests[0][0])
        deadline = asyncio.get_running_loop().time()
        if self._is_busy:
            deadline += self.max_wait
        while n_rows < self.max_rows:
            try:
                async with asyncio.timeout_at(deadline):
                    request = await self._queue.get()
            except TimeoutError:
                break
            requests.append(request)
            n_rows += len(request[0])
        return requests

    async def _answer(self, requests):
        rows = [row for rows, _ in requests for row in rows]
        try:
            predictions = await asyncio.to_thread(self.predict, rows)
            if len(predictions) != len(rows):
                raise RuntimeError(
                    f"predict returned {len(predictions)} predictions of {len(rows)} "
                    "rows."
                )
        except Exception as error:
            if len(requests) == 1:
                _finish(requests[0][1], error=error)
                return
            for request in requests:  # one invalid row must not fail the other requests
                await self._answer([request])
            return
        start = 0
        for rows, future in requests:
            _finish(future, predictions[start : start + len(rows)])
            start += len(rows)


_STOPPED = "The service has stopped."


def _finish(future, result=None, error=None):
    """Set the result of a request, unless its client has gone."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _as_json(values):
    """Return a list, with None for numbers that are not finite."""
    values = np.asarray(values)
    if values.dtype.kind == "f":
        values = np.where(np.isfinite(values), values.astype(object), None)
    return values.tolist()


def _frozen_encoders(part, visited):
    """Yield the encoders of a fitted model, parameters and fitted copies."""
    if id(part) in visited:
        return
    visited.add(id(part))
    if isinstance(part, FrozenEncoder):
        yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from _frozen_encoders(value, visited)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _frozen_encoders(value, visited)
    elif isinstance(part, BaseEstimator):
        yield from _frozen_encoders(vars(part), visited)


def _encodes_images(encoder):
    space = getattr(encoder, "space_", {"modality": encoder.modality})
    return space["modality"] == "image"


def _decode(cell):
    """Return the bytes of an image in base64; None for a missing image."""
    if pd.isna(cell):
        return None
    return base64.b64decode(cell, validate=True)
