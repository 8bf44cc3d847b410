"""The door to skorch: weights and history come out, and nothing else is left behind."""

import threading

import numpy as np
import pytest
import torch
from skorch.callbacks import EarlyStopping
from skorch.dataset import ValidSplit

from sklembed._training import TrainingOptions, train
from sklembed.nn.modules import Projection

OPTIONS = {"max_epochs": 3, "batch_size": 16, "lr": 1e-2, "weight_decay": 0.0, "device": "cpu"}


@pytest.fixture
def regression():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 5)).astype(np.float32)
    return X, X @ rng.normal(size=(5, 2)).astype(np.float32)


def fit(data, *, dropout=0.2, seed=0, **options):
    def make_module(generator):
        return Projection(
            [5, 8, 2],
            dropout=dropout,
            generator=generator,
            mean=torch.zeros(5),
            scale=torch.ones(5),
        )

    return train(
        make_module,
        torch.nn.functional.mse_loss,
        *data,
        TrainingOptions(**(OPTIONS | {"seed": seed} | options)),
    )


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_training_lowers_the_loss(regression):
    _, history = fit(regression, max_epochs=30, dropout=0.0)
    assert history[-1]["train_loss"] < 0.1 * history[0]["train_loss"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 31))


def test_weights_are_numpy_and_history_plain(regression):
    weights, history = fit(regression)
    assert all(
        type(value) is np.ndarray and value.dtype == np.float32 for value in weights.values()
    )
    assert all(isinstance(value, int | float) for epoch in history for value in epoch.values())


def test_equal_seeds_give_equal_weights_and_others_differ(regression):
    weights, _ = fit(regression)
    again, _ = fit(regression)
    other, _ = fit(regression, seed=1)
    assert_same(weights, again)
    assert not np.array_equal(weights["layers.0.weight"], other["layers.0.weight"])


def test_global_random_states_are_neither_read_nor_changed(regression):
    weights, _ = fit(regression)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    after_seeding, _ = fit(regression)
    assert_same(weights, after_seeding)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_threads_do_not_disturb_each_other(regression):
    alone = [fit(regression, seed=seed)[0] for seed in range(4)]
    together = [None] * 4

    def work(seed):
        together[seed] = fit(regression, seed=seed)[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


def test_skorch_params_reach_the_net(regression):
    _, history = fit(
        regression,
        max_epochs=200,
        skorch_params={
            "train_split": ValidSplit(4),
            "callbacks": [("stop", EarlyStopping(patience=2, threshold=0.1))],
        },
    )
    assert len(history) < 200
    assert "valid_loss" in history[0]


@pytest.mark.parametrize(
    "params", [{"optimizer": torch.optim.RMSprop}, {"iterator_train": torch.utils.data.DataLoader}]
)
def test_skorch_params_may_replace_what_has_options_of_our_own(regression, params):
    _, history = fit(regression, skorch_params=params)
    assert len(history) == 3


def test_a_partial_last_batch_is_trained_on(regression):
    X, Y = (array[:17] for array in regression)  # 16 + 1 rows
    _, history = fit((X, Y))
    assert history[0]["train_batch_count"] == 2


def test_unknown_device_is_refused(regression):
    with pytest.raises(ValueError, match="device='gpu9' cannot be used here"):
        fit(regression, device="gpu9")
