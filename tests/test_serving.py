"""The example of a service: batches, errors of single requests, warm-up."""

import asyncio
import base64
import io
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

import sklembed
from sklembed import FrozenEncoder, PerModalityUnion, multimodal_pipeline

JSON = {"Content-Type": "application/json"}
EXAMPLES = Path(__file__).parents[1] / "examples" / "serving"
if not EXAMPLES.exists():
    pytest.skip("the examples are not installed", allow_module_level=True)
sys.path.append(str(EXAMPLES))
from service import Batcher, Service  # noqa: E402


def answer(batcher, requests):
    """Send requests at the same time, and return their answers or errors."""

    async def send():
        worker = asyncio.create_task(batcher.run())
        calls = [batcher(rows) for rows in requests]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        worker.cancel()
        return answers

    return asyncio.run(send())


class Doubling:
    """A model that doubles numbers and records its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append(rows)
        if None in rows:
            raise ValueError("None is not a number")
        return [2 * row for row in rows]


def test_requests_are_batched_and_answered_in_their_order():
    predict = Doubling()
    answers = answer(Batcher(predict), [[1], [2, 3], [4]])
    assert answers == [[2], [4, 6], [8]]
    assert predict.batches == [[1, 2, 3, 4]]


def test_a_full_batch_does_not_wait_for_more():
    predict = Doubling()
    batcher = Batcher(predict, max_rows=2, max_wait=60)
    assert answer(batcher, [[number] for number in range(6)])[-1] == [10]
    assert predict.batches == [[0, 1], [2, 3], [4, 5]]


def test_requests_that_arrive_in_the_meantime_are_the_next_batch():
    predict, resume = Doubling(), threading.Event()

    def wait(rows):
        resume.wait(10)
        return predict(rows)

    async def send():
        batcher = Batcher(wait)
        worker = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher([1]))
        await asyncio.sleep(0.05)  # the model predicts the first request
        others = [asyncio.create_task(batcher([number])) for number in (2, 3)]
        await asyncio.sleep(0)
        resume.set()
        await asyncio.gather(first, *others)
        worker.cancel()

    asyncio.run(send())
    assert predict.batches == [[1], [2, 3]]


def test_an_invalid_request_does_not_fail_the_others():
    first, error, last = answer(Batcher(Doubling()), [[1], [None], [3]])
    assert (first, last) == ([2], [6])
    assert isinstance(error, ValueError)


def test_a_client_that_has_gone_does_not_stop_the_worker():
    async def send():
        batcher = Batcher(Doubling())
        gone = asyncio.create_task(batcher([1]))
        await asyncio.sleep(0)
        gone.cancel()
        worker = asyncio.create_task(batcher.run())
        assert await batcher([2]) == [4]
        worker.cancel()

    asyncio.run(send())


@pytest.mark.parametrize("n_predictions", [0, 3])
def test_a_model_that_loses_rows_is_an_error(n_predictions):
    (error,) = answer(Batcher(lambda rows: [0] * n_predictions), [[1, 2]])
    assert isinstance(error, RuntimeError)
    assert f"returned {n_predictions} predictions of 2 rows" in str(error)


def test_requests_to_a_batcher_that_stops_are_answered():
    resume = threading.Event()

    async def send():
        batcher = Batcher(lambda rows: resume.wait(10) and rows)
        worker = asyncio.create_task(batcher.run())
        calls = [asyncio.create_task(batcher([1]))]
        await asyncio.sleep(0.05)  # the model predicts the first request
        calls.append(asyncio.create_task(batcher([2])))
        await asyncio.sleep(0)
        worker.cancel()
        resume.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        with pytest.raises(RuntimeError, match="has stopped"):
            await batcher([3])
        return answers

    for error in asyncio.run(send()):
        assert isinstance(error, RuntimeError)


def in_base64(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def service(checkpoints, tmp_path_factory):
    """Return a service of texts, images and numbers, and rows of JSON types."""
    directory = tmp_path_factory.mktemp("service")
    options = {"store": str(directory / "store.sqlite"), "dtype": "float32"}
    images = [Image.new("RGB", (8, 8), (6 * i, 0, 0)) for i in range(40)]
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "text": [f"the {word} sat" for word in rng.choice(["cat", "dog"], 40)],
            "photo": images,
            "number": rng.normal(size=40),
            "code": rng.choice([3, 4], 40),
        }
    )
    table.loc[1, "text"] = None
    model = multimodal_pipeline(
        LogisticRegression(max_iter=1000),
        kinds={"text": "text", "code": "categorical"},
        text_encoder=FrozenEncoder(checkpoints["bert"], **options),
        image_encoder=FrozenEncoder(checkpoints["vit"], **options),
    )
    model.fit(table, np.arange(40) % 2)
    sklembed.save(model, directory / "model")
    rows = table.assign(photo=[in_base64(image) for image in images])
    rows = [
        {k: None if pd.isna(v) else v for k, v in row.items()}
        for row in rows.to_dict("records")
    ]
    return Service(directory / "model"), rows, model.predict_proba(table)


def test_a_service_predicts_rows_of_json(service):
    service, rows, expected = service
    service.warm_up()
    service.check(rows)
    predictions = service.predict(rows)
    assert predictions[0].keys() == {"0", "1"}
    found = [list(row.values()) for row in predictions]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    del rows[2]["number"]
    assert 0 < service.predict(rows[2:3])[0]["0"] < 1


def test_a_row_is_predicted_the_same_alone_and_among_others(service):
    service, rows, _ = service
    for row, among in zip(rows[:4], service.predict(rows), strict=False):
        (alone,) = service.predict([row])
        np.testing.assert_allclose(alone["1"], among["1"], atol=1e-6)


def test_a_cell_of_another_kind_is_refused_alone_and_among_others(service):
    service, rows, _ = service
    row = rows[0] | {"number": "abc"}
    for table in ([row], [row, *rows[1:]]):
        with pytest.raises(ValueError, match=r"'number' .*'abc'") as caught:
            service.predict(table)
        assert "count as missing" not in str(caught.value)


def test_a_service_forgets_cells(service):
    encoder = service[0].model[0].union_.named_transformers_["text"]
    assert encoder.store is None


def test_encoders_that_are_named_by_a_path_are_warmed_up(
    checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setenv("SKLEMBED_STORE", str(tmp_path / "store.sqlite"))
    X = pd.DataFrame({"text": ["a cat sat", "the dog ran"] * 10})
    model = multimodal_pipeline(
        LogisticRegression(),
        kinds={"text": "text"},
        text_encoder=checkpoints["bert"],
        lexical=False,
    )
    sklembed.save(model.fit(X, [0, 0, 1, 1] * 5), tmp_path / "model")
    service = Service(tmp_path / "model")
    (encoder,) = [part for part in service.encoders if hasattr(part, "space_")]
    assert encoder.store is None
    warmed = []
    monkeypatch.setattr(FrozenEncoder, "warm_up", lambda self: warmed.append(self))
    service.warm_up()
    assert warmed == [encoder]


def test_images_of_other_pipelines_are_refused(checkpoints, tmp_path):
    # A text of a request would be the path of a file of the server.
    encoder = FrozenEncoder(checkpoints["vit"], store=None)
    images = pd.Series([Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)])
    union = PerModalityUnion([("photo", encoder, "photo")])
    model = make_pipeline(union, Ridge()).fit(
        pd.DataFrame({"photo": images}), [0, 1, 2, 3]
    )
    sklembed.save(model, tmp_path)
    with pytest.raises(ValueError, match="served only as columns of a Multimodal"):
        Service(tmp_path)


def test_a_model_of_arrays_is_refused(tmp_path):
    sklembed.save(Ridge().fit([[0.0], [1.0]], [0, 1]), tmp_path)
    with pytest.raises(ValueError, match="Fit it on a DataFrame"):
        Service(tmp_path)


@pytest.mark.parametrize("n_targets", [1, 2])
def test_a_model_that_is_no_pipeline_is_served(n_targets, tmp_path):
    X = pd.DataFrame({"a": [0.0, 1.0, 2.0, 3.0]})
    y = np.array([[0, 1], [0, 1], [1, 0], [1, 0]])[:, :n_targets].squeeze()
    model = DecisionTreeClassifier(random_state=0).fit(X, y)
    sklembed.save(model, tmp_path)
    expected = [{"0": 0.0, "1": 1.0}] if n_targets == 1 else [[1, 0]]
    assert Service(tmp_path).predict([{"a": 3.0}]) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"texts": "a cat"}, r"Row 1 has the unknown columns \['texts'\]; expected"),
        ({"photo": "/etc/passwd"}, "Row 1 has no image in base64 in column 'photo'"),
        ({"photo": 3}, "Row 1 has no image in base64 in column 'photo'"),
    ],
)
def test_invalid_rows_are_refused(service, row, message):
    with pytest.raises(ValueError, match=message):
        service[0].check([{}, row])


def test_a_regressor_returns_numbers(tmp_path):
    X = pd.DataFrame({"a": [0.0, 1.0, 2.0]})
    model = make_pipeline(StandardScaler(), Ridge(alpha=1e-9)).fit(X, [1.0, 2.0, 3.0])
    sklembed.save(model, tmp_path)
    predictions = Service(tmp_path).predict([{"a": 3.0}])
    np.testing.assert_allclose(predictions, [4.0])


def test_predictions_that_are_not_finite_are_null(tmp_path):
    model = TransformedTargetRegressor(
        Ridge(alpha=1e-9), func=np.exp, inverse_func=np.log, check_inverse=False
    )
    sklembed.save(model.fit(pd.DataFrame({"a": [1.0, 2.0]}), [0.0, 1.0]), tmp_path)
    with np.errstate(invalid="ignore"):
        (prediction,) = Service(tmp_path).predict([{"a": -5.0}])  # log(-9.3)
    assert prediction is None


def test_the_app_answers(service, tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    service, rows, expected = service
    sklembed.save(service.model, tmp_path)
    monkeypatch.setenv("SKLEMBED_MODEL", str(tmp_path))
    from app import app

    with testclient.TestClient(app) as client:
        assert client.get("/health").json() == {"columns": service.columns}
        reply = client.post("/predict", json={"rows": rows[:2]}).json()
        probability = reply["predictions"][1]["1"]
        np.testing.assert_allclose(probability, expected[1, 1], atol=1e-6)
        assert client.post("/predict", json={"rows": []}).status_code == 422
        refused = client.post("/predict", json={"rows": [{"texts": "a"}]})
        assert refused.status_code == 422
        assert "unknown columns" in refused.json()["detail"]
        # Neither may be echoed, because JSON cannot represent them.
        for body in (
            '{"rows": NaN}',
            '{"rows": "\\ud800"}',
            '{"rows": [{"\\ud800": []}]}',
        ):
            refused = client.post("/predict", content=body, headers=JSON)
            assert refused.status_code == 422
            assert "body/rows" in refused.json()["detail"]
        number = {"rows": [{"number": 10**400}]}
        assert client.post("/predict", json=number).status_code == 422
