"""Training returns weights and history, and leaves nothing else behind."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from skorch import NeuralNet
from skorch.callbacks import EarlyStopping
from skorch.dataset import Dataset, ValidSplit

from sklembed import _training
from sklembed._training import (
    Batches,
    Rows,
    Trained,
    TrainingOptions,
    _fits,
    train,
)
from sklembed.nn.projection import Projection

OPTIONS = {
    "max_epochs": 3,
    "batch_size": 16,
    "lr": 1e-2,
    "weight_decay": 0.0,
    "device": "cpu",
}


@pytest.fixture
def regression():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 5)).astype(np.float32)
    return X, X @ rng.normal(size=(5, 2)).astype(np.float32)


def squared_error(output, target, weight):
    losses = (output - target).square().mean(dim=-1)  # (n_networks, batch)
    if weight is None:
        return losses.mean(dim=-1)
    return (losses * weight).sum(-1) / weight.sum(-1)


def fit(data, *, dropout=0.2, seed=0, rows=None, more=None, **options):
    more = more or {}

    def make_module(generator):
        return Projection(
            [5, 8, 2],
            n_networks=None if rows is None else len(rows),
            dropout=dropout,
            generator=generator,
            mean=torch.zeros(5),
            scale=torch.ones(5),
        )

    trained = train(
        make_module,
        squared_error,
        *data,
        Rows(np.arange(len(data[0]))) if rows is None else rows,
        TrainingOptions(**(OPTIONS | {"seed": seed} | options)),
        **more,
    )
    return trained.weights, trained.history


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
        type(value) is np.ndarray and value.dtype == np.float32
        for value in weights.values()
    )
    assert all(
        isinstance(value, int | float) for epoch in history for value in epoch.values()
    )


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


def test_skorch_params_may_bring_another_optimizer(regression):
    _, history = fit(regression, skorch_params={"optimizer": torch.optim.RMSprop})
    assert len(history) == 3


@pytest.mark.parametrize(
    "name", ["module", "criterion", "iterator_train", "iterator_valid__rows"]
)
def test_skorch_params_may_not_replace_what_keeps_networks_apart(regression, name):
    with pytest.raises(ValueError, match=f"skorch_params sets {name}"):
        fit(regression, skorch_params={name: torch.utils.data.DataLoader})


# Several networks at once


def three_parts(n=100):
    order = np.random.default_rng(0).permutation(n)
    return [Rows(order[:40]), Rows(order[30:100]), Rows(order[50:60])]


def test_networks_trained_together_are_those_trained_alone(regression):
    """Of other sizes too: what fills their smaller batches counts for nothing."""
    together, _ = fit(regression, rows=three_parts(), dropout=0.0)
    for number, rows in enumerate(three_parts()):
        # Alone it would take fewer steps; so it gets the batches that it has beside the others.
        size = -(-len(rows.train) // 5)
        alone, _ = fit(regression, rows=[rows], dropout=0.0, batch_size=size)
        for name in ("layers.0.weight", "layers.1.bias"):
            np.testing.assert_allclose(
                together[name][number], alone[name][0], atol=1e-5
            )


def test_a_network_knows_nothing_of_rows_that_are_not_its_own(regression):
    X, Y = regression
    rows = three_parts()
    weights, _ = fit((X, Y), rows=rows)
    X, Y = X.copy(), Y.copy()
    X[rows[0].train], Y[rows[0].train] = 1e3, -1e3
    elsewhere = np.setdiff1d(rows[2].train, rows[0].train)
    assert len(elsewhere) == len(rows[2].train)
    changed, _ = fit((X, Y), rows=rows)
    assert not np.array_equal(
        weights["layers.0.weight"][0], changed["layers.0.weight"][0]
    )
    np.testing.assert_array_equal(
        weights["layers.0.weight"][2], changed["layers.0.weight"][2]
    )


def test_every_row_is_seen_once_an_epoch(regression):
    X, Y = (torch.from_numpy(array) for array in regression)
    X[:, 0] = torch.arange(100)
    batches = Batches(Dataset(X, Y), 16, rows=three_parts(), seed=0)
    seen = [[], [], []]
    for x, (y, weight) in batches:
        assert x.shape[:2] == y.shape[:2] == weight.shape
        for network in range(3):
            seen[network] += x[network, weight[network] > 0, 0].long().tolist()
    for network, rows in enumerate(three_parts()):
        assert sorted(seen[network]) == sorted(rows.train.tolist())


def test_each_network_goes_back_to_its_best_epoch(regression):
    """One network is given targets that turn round, so that it gets worse on its own rows."""
    X, Y = regression
    Y = Y.copy()
    Y[:40] = np.random.default_rng(1).normal(size=(40, 2)) * 5  # nothing to learn
    rows = [
        Rows(np.arange(30), np.arange(30, 40)),
        Rows(np.arange(40, 90), np.arange(90, 100)),
    ]
    options = {"rows": rows, "dropout": 0.0, "max_epochs": 200, "n_iter_no_change": 5}
    weights, history = fit((X, Y), **options)
    assert len(history) > 20  # the second goes on when the first has long stopped
    few = [len(fit((X, Y), **(options | {"rows": [part]}))[1]) for part in rows]
    assert few[0] < few[1] <= len(history)
    losses = [epoch["valid_loss"] for epoch in history]
    assert np.isfinite(losses).all()


def test_training_resumes_from_weights_with_other_batches(regression):
    start = Trained(*fit(regression, max_epochs=2))
    weights, history = fit(regression, max_epochs=3, more={"start": start})
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4, 5]
    assert history[:2] == start.history
    assert history[-1]["train_loss"] < history[1]["train_loss"]
    # The third epoch of an uninterrupted training draws batches from the same generator.
    uninterrupted, _ = fit(regression, max_epochs=5)
    assert not np.array_equal(
        weights["layers.0.weight"], uninterrupted["layers.0.weight"]
    )


def test_a_single_network_is_a_stack_of_one_without_its_axis(regression):
    X, y = regression
    single, history = fit((X, y), rows=None)
    stack, history_of_stack = fit((X, y), rows=[Rows(np.arange(100))])
    for name, value in single.items():
        expected = stack[name][0] if name.startswith("layers") else stack[name]
        np.testing.assert_allclose(value, expected, atol=1e-5)
    assert [e["epoch"] for e in history] == [e["epoch"] for e in history_of_stack]


def test_a_partial_last_batch_is_trained_on(regression):
    X, Y = (array[:17] for array in regression)  # 16 + 1 rows
    _, history = fit((X, Y))
    assert history[0]["train_batch_count"] == 2


def test_unknown_device_is_refused(regression):
    with pytest.raises(ValueError, match="device='gpu9' cannot be used here"):
        fit(regression, device="gpu9")


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning"
)  # torch's own, within
@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_compiled_network_is_trained_alike(regression, early_stopping):
    """Compiled by the backend that needs no compiler; weights keep their names."""
    rows = [Rows(np.arange(60)), Rows(np.arange(40))]
    if early_stopping:
        rows = [replace(part, valid=np.arange(60, 100)) for part in rows]
    compiled = {"compile": True, "compile__backend": "aot_eager"}
    plain, _ = fit(regression, rows=rows)
    weights, history = fit(regression, rows=rows, skorch_params=compiled)
    assert weights.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_allclose(weights[name], value, atol=1e-5)
    start = {"start": Trained(weights, history)}
    gone_on, _ = fit(regression, rows=rows, skorch_params=compiled, more=start)
    assert gone_on.keys() == plain.keys()


def test_batches_are_on_the_device_of_the_targets():
    """X may be in the memory of the host: "meta" stands for an accelerator here."""
    dataset = Dataset(torch.ones(9, 2), torch.ones(9, device="meta"))
    weight = torch.ones(9, device="meta")
    batches = Batches(dataset, 4, rows=Rows(np.arange(9)), sample_weight=weight)
    for X, (y, weight_of_batch) in batches:
        devices = {X.device.type, y.device.type, weight_of_batch.device.type}
        assert devices == {"meta"}


def test_rows_leave_half_of_the_free_memory_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 1000))
    rows = np.ones(100, dtype=np.float32)
    assert _fits(rows, torch.device("cuda"))
    assert not _fits(np.tile(rows, 2), torch.device("cuda"))
    assert _fits(np.tile(rows, 2), torch.device("cpu"))


def test_a_lack_of_device_memory_is_explained(regression, monkeypatch):
    def run_out(net, X, y):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(NeuralNet, "partial_fit", run_out)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(regression)
    assert "Lower batch_size, or n_jobs" in caught.value.__notes__[0]


def test_an_interruption_by_the_user_is_no_early_stop(regression, monkeypatch):
    """skorch takes a KeyboardInterrupt for early stopping, and returns the network."""

    def interrupt(network, X):
        raise KeyboardInterrupt

    monkeypatch.setattr(Projection, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(regression)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, three_parts()], ids=["one", "three"])
def test_rows_in_the_memory_of_the_host_give_the_same_network(
    regression, monkeypatch, rows
):
    on_device, _ = fit(regression, rows=rows, device="cuda")
    monkeypatch.setattr(_training, "_fits", lambda array, device: False)
    in_host_memory, _ = fit(regression, rows=rows, device="cuda")
    assert_same(on_device, in_host_memory)
