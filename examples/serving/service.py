"""A saved pipeline as a service: rows in, predictions out, in batches."""

import asyncio
import base64

import pandas as pd

import sklembed


class Service:
    """Predict rows, which are dicts of JSON types, with a saved pipeline.

    Images are texts in base64. Paths are not accepted, so that a request cannot read
    files of the server.
    """

    def __init__(self, directory):
        self.model = sklembed.load(directory)
        self.columns = list(self.model.feature_names_in_)
        self.image_columns = []
        kinds = getattr(self.model[0], "kinds_", None)
        if kinds is not None:
            self.image_columns = kinds.index[kinds["kind"] == "image"].tolist()
        params = self.model.get_params()
        # New cells are encoded and forgotten.
        stores = [name for name in params if name.endswith("__store")]
        self.model.set_params(**dict.fromkeys(stores))

    def warm_up(self):
        """Load the models of the encoders, so that no request waits for them."""
        for part in self.model.get_params().values():
            if hasattr(part, "warm_up"):
                part.warm_up()

    def check(self, rows):
        """Raise a ValueError if a row has unknown columns or a damaged image."""
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
        if not hasattr(self.model, "predict_proba"):
            return self.model.predict(table).tolist()
        classes = [str(label) for label in self.model.classes_]
        rows_of_probabilities = self.model.predict_proba(table).tolist()
        return [dict(zip(classes, row, strict=True)) for row in rows_of_probabilities]


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

    async def __call__(self, rows):
        """Return the predictions of the rows of one request."""
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((rows, future))
        return await future

    async def run(self):
        """Answer requests until the task is cancelled."""
        while True:
            requests = await self._next_requests()
            self._is_busy = len(requests) > 1
            await self._answer(requests)

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


def _finish(future, result=None, error=None):
    """Set the result of a request, unless its client has gone."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _decode(cell):
    """Return the bytes of an image in base64; None for a missing image."""
    if pd.isna(cell):
        return None
    return base64.b64decode(cell, validate=True)
