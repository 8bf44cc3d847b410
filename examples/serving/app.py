"""Serve a saved pipeline with FastAPI.

.. code-block:: bash

    pip install fastapi uvicorn
    SKLEMBED_MODEL=model uvicorn app:app --app-dir examples/serving
    curl localhost:8000/predict --json '{"rows": [{"title": "a red cat", "price": 3.5}]}'
"""

import asyncio
import contextlib
import os

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from service import Batcher, Service


class Request(BaseModel):
    """Rows of the table; absent columns are missing."""

    rows: list[dict[str, str | bool | int | float | None]] = Field(
        min_length=1, max_length=1000
    )


@contextlib.asynccontextmanager
async def lifespan(app):
    """Load the pipeline and its encoders before the first request."""
    app.state.service = Service(os.environ["SKLEMBED_MODEL"])
    app.state.service.warm_up()
    app.state.batcher = Batcher(app.state.service.predict)
    app.state.worker = asyncio.create_task(app.state.batcher.run())
    yield
    app.state.worker.cancel()


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health():
    """Return the columns of the table, while requests are answered."""
    if app.state.worker.done():
        raise HTTPException(503, "The worker has stopped; restart the service.")
    return {"columns": app.state.service.columns}


@app.post("/predict")
async def predict(request: Request):
    """Return a prediction for each row."""
    try:
        app.state.service.check(request.rows)
        return {"predictions": await app.state.batcher(request.rows)}
    except (TypeError, ValueError, OSError) as error:
        raise HTTPException(422, str(error)) from error
