"""Serve a saved pipeline with FastAPI.

.. code-block:: bash

    pip install fastapi uvicorn
    SKLEMBED_MODEL=model uvicorn app:app --app-dir examples/serving
    curl localhost:8000/health  # the columns of the table
    curl localhost:8000/predict --json '{"rows": [{"title": "a red cat", "price": 3.5}]}'

Put a proxy in front of it that limits the size of a request.
"""

import asyncio
import contextlib
import os

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
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


@app.exception_handler(RequestValidationError)
async def refuse(request, error):
    """Return where a request is invalid, without its content.

    The content may be large, or contain texts and numbers that JSON cannot represent.
    """
    (first, *_) = error.errors()
    place = "/".join(str(part) for part in first["loc"])
    return JSONResponse({"detail": printable(f"{place}: {first['msg']}")}, 422)


def printable(message):
    """Return a text that can be sent as UTF-8."""
    return str(message).encode(errors="backslashreplace").decode()


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
    except RuntimeError as error:  # the service stops
        raise HTTPException(503, printable(error)) from error
    except (ArithmeticError, TypeError, ValueError, OSError) as error:
        raise HTTPException(422, printable(error)) from error
