"""DeltaGrad as an estimator: effray's own run bit for bit, scikit-learn's checks, folders, deaths and bad input."""

import copy
import os
import pickle
import warnings
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from disk import STEPS, Disk, death
from forked import DEATH, Process
from raypkg import DeltaGrad, deltagrad, load_data
from raypkg.cli import main
from raypkg.core.errors import UserError
from raypkg.engine.batches import shuffled
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.storage import Storage

EPOCHS, BATCH, SEED = 6, 200, 3
SOME = [3, 14, 15]


X = np.random.default_rng(0).normal(size=(90, 4))
Y = np.where(X[:, 0] > 0, "yes", "no")
XT, YT = torch.from_numpy(X.astype(np.float32)), torch.from_numpy((Y == "yes").astype(np.int64))


def small(**changes):
    return DeltaGrad(**{"epochs": 6, "batch_size": 30, "lr": 1.0, **changes})


def same(model, other):
    assert np.array_equal(model.coef_, other.coef_) and np.array_equal(model.intercept_, other.intercept_)


# effray's own run


def effray(line):
    with pytest.raises(SystemExit) as ended:
        main(["deltagrad", *line.split()])
    assert not ended.value.code


def weights(root):
    saved = load_tensors(Storage(str(root / "deltagrad/a")), "model.safetensors")
    return saved["head.weight"].numpy(), saved["head.bias"].numpy()


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("replay", [{}, {"period": 2, "burn_in": 4}], ids=["T0", "short"])
def test_a_script_gives_the_weights_of_effrays_own_run(tmp_path, replay):
    options = f"--train.epochs {EPOCHS} --train.batch_size {BATCH} --seed {SEED} --dataset.validation 0"
    effray(f"train --name a --root {tmp_path} --dataset digits {options} --cluster.workers 0")
    trained = weights(tmp_path)
    request = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in replay.items())
    effray(f"delete a --root {tmp_path} --ids 3,14,15 {request}")
    deleted = weights(tmp_path)

    train = load_data("digits").train
    x, y = train.batch(range(len(train)))
    model = DeltaGrad(epochs=EPOCHS, batch_size=BATCH, seed=SEED, **replay).fit(x, y)
    assert np.array_equal(model.coef_, trained[0]) and np.array_equal(model.intercept_, trained[1])
    model.delete(SOME)
    assert np.array_equal(model.coef_, deleted[0]) and np.array_equal(model.intercept_, deleted[1])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("loop", ["float64", "scaled", "scaled, zero_grad first"])
def test_a_head_recorded_in_another_loop_gives_the_weights_of_the_estimator(fused, loop):
    estimator = small(scale="none", schedule="constant", weight_decay=0.01).fit(X, Y)
    head = nn.Linear(4, 2).double()
    history = estimator._run.history()
    nn.utils.vector_to_parameters(history[0].w, head.parameters())
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, weight_decay=0.01, fused=fused)
    recorder = deltagrad.record(head, optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=loop != "float64")

    def step(ids, factor=1.0):
        recorder.batch(ids)
        if loop.endswith("first"):
            optimizer.zero_grad()
        losses = nn.functional.cross_entropy(head(XT[ids].double()), YT[ids], reduction="none")
        scaler.scale(losses @ torch.full_like(losses, factor / len(ids))).backward()
        scaler.step(optimizer)
        scaler.update()
        if not loop.endswith("first"):
            optimizer.zero_grad()

    for epoch in range(6):
        if scaler.is_enabled():
            step(torch.arange(20), factor=torch.inf)  # skipped
        for ids in shuffled(90, 30, 0, epoch):
            step(ids)
    model = recorder.finish(XT, YT)
    same(model, estimator)
    same(model.delete(SOME), estimator.delete(SOME))
    assert model.verify() == estimator.verify() < 0.1
    with pytest.raises(UserError, match="another loop"):
        model.add(X[:2], [0, 1])
    same(pickle.loads(pickle.dumps(model)).delete([20]), estimator.delete([20]))


def recorded(*batches, head=None, **options):
    head = head or nn.Linear(4, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, **options)
    recorder = deltagrad.record(head, optimizer)
    for ids in batches:
        recorder.batch(ids)
        nn.functional.cross_entropy(head(XT), YT).backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.optimizer = optimizer
    return recorder


ALL = range(90)


def finished_twice():
    recorder = recorded(ALL, ALL)
    with pytest.raises(UserError, match="is not that of the mean cross-entropy"):
        recorder.finish(XT, 1 - YT)
    assert recorder.finish(XT, YT).verify() < 1e-5  # the refused samples left no trace
    recorder.finish(XT, YT)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: recorded(ALL, ALL).finish(XT, 1 - YT), "the gradient of step 0 is not that of the mean cross-entropy"),
        (finished_twice, "the model has been returned before"),
        (lambda: recorded().finish(XT, YT), "finish: no step was recorded"),
        (lambda: recorded(ALL).optimizer.step(), r"a step without batch\(ids\) before it"),
        (lambda: recorded(momentum=0.9), r"not SGD with momentum 0\.9"),
        (lambda: deltagrad.record(nn.Linear(4, 2), recorded().optimizer), "an optimizer of its weight and bias only"),
        (lambda: recorded(head=nn.Linear(4, 2).bfloat16()), "takes an nn.Linear with bias in float32 or float64"),
        (lambda: recorded(ALL, range(-1, 89), ALL).finish(XT, YT), "id -1 is no row of X, which are 0 … 89"),
    ],
)
def test_a_record_that_is_not_of_these_samples_is_refused(act, message):
    with pytest.raises(UserError, match=message):
        act()


# Forms of data, and additions


def as_table(x):
    return pa.table({f"c{column}": x[:, column] for column in range(x.shape[1])})


@pytest.mark.parametrize("form", [torch.from_numpy, as_table, list, np.asfortranarray], ids=lambda form: form.__name__)
def test_samples_come_in_any_form(form):
    model = small().fit(form(X), pa.array(Y))
    same(model, small().fit(X, Y))
    assert np.array_equal(model.predict_proba(form(X)), model.predict_proba(X))
    assert model.score(form(X), Y) > 0.7 and set(model.predict(X)) <= {"no", "yes"}
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1)


def test_an_approximation_is_near_the_deletion_and_changes_nothing():
    model = small(period=1).fit(X, Y)
    for gone in (SOME, [20]):
        before = model.coef_
        w, b = model.approximate(gone)
        assert np.array_equal(model.coef_, before) and b.shape == (2,)
        pickle.loads(pickle.dumps(model)).delete([30])
        model.delete(gone)  # the next factor is of the new record
        assert np.linalg.norm(w - model.coef_) < np.linalg.norm(before - model.coef_)  # 0.11 and 0.63 of it
    with pytest.raises(ValueError, match="id 20 is deleted already"):
        model.approximate([20])
    with pytest.raises(UserError, match="the model has 2,402 parameters, its Hessian is factored up to 2,048"):
        small().fit(np.tile(X, 300), Y).approximate([1])


def test_additions_continue_the_ids_and_can_be_deleted():
    model = small(period=1).fit(X, Y)
    assert [*model.add(X[:3], Y[:3]), *model.add(X[3:4], Y[3:4])] == [90, 91, 92, 93]
    assert model.verify() < 1e-9
    with_them = model.coef_
    assert model.delete([91, 93, 0]).verify() < 1e-9 and not np.array_equal(model.coef_, with_them)
    with pytest.raises(ValueError, match="id 91 is deleted already"):
        model.delete([91])


# Folders


@pytest.mark.parametrize("kept", [False, True], ids=["temporary", "folder"])
def test_saved_and_loaded_equals_never_saved(tmp_path, kept):
    model = small(history=tmp_path / "kept" if kept else None, burn_in=3).fit(X, Y).delete(SOME)
    model.add(X[:3], Y[:3])
    model.save(tmp_path / "saved")
    loaded = DeltaGrad.load(tmp_path / "saved")
    assert {**loaded.get_params(), "history": None} == {**model.get_params(), "history": None}
    for each in (model, loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        each.delete([20, 91])
        each.add(X[:2], Y[:2])
        same(each, model)
    same(DeltaGrad.load(tmp_path / "saved"), model)
    if kept:
        same(DeltaGrad.load(tmp_path / "kept"), model)


def test_a_temporary_folder_ends_with_the_object():
    model = small()
    folders = [model.fit(X, Y)._run.storage.root for _ in range(2)]
    assert [os.path.exists(folder) for folder in folders] == [False, True]
    del model
    assert not os.path.exists(folders[1])


def test_folders_that_are_no_place_for_a_record_are_refused(tmp_path):
    model = small(history=tmp_path / "a").fit(X, Y)
    with pytest.raises(UserError, match="holds a record or other files"):
        small(history=tmp_path / "a").fit(X, Y)
    with pytest.raises(UserError, match="exists: save to a new folder"):
        model.save(tmp_path)
    other = DeltaGrad.load(tmp_path / "a").delete([1])
    with pytest.raises(UserError, match="changed by another process: load it again"):
        model.delete([2])
    same(model, other)  # the state on the disk
    same(model.delete([2]), small().fit(X, Y).delete([1]).delete([2]))
    content = (tmp_path / "a/config.toml").read_text()
    (tmp_path / "a/config.toml").write_text(content.replace("0.0001", "0.0002"))
    with pytest.raises(UserError, match=r"config\.toml' has been changed or cut short"):
        DeltaGrad.load(tmp_path / "a")


def killed(root, prepared):
    """Kill ``prepared(folder)()`` at each write to a folder of its own in turn; yield these, up to the undisturbed."""
    for at in range(1, 100):
        folder = root / f"{at}"
        work = prepared(folder)

        def dying(work=work, folder=folder, at=at):
            Disk(folder, death, at, STEPS).install()
            work()

        ended = Process(dying, root).end()
        assert ended.code in (0, DEATH), ended.err
        yield folder
        if not ended.code:
            return


@pytest.mark.parametrize("change", ["delete", "add"])
def test_killed_at_any_write_the_folder_has_the_old_state_or_the_new(tmp_path, change):
    old = small(history=tmp_path / "first").fit(X, Y)
    arguments = (SOME,) if change == "delete" else (X[:2], Y[:2])
    new, states = small().fit(X, Y), []
    getattr(new, change)(*arguments)

    def copied(folder):
        old.save(folder)
        return partial(getattr(DeltaGrad.load(folder), change), *arguments)

    for folder in killed(tmp_path, copied):
        left = DeltaGrad.load(folder)
        states.append(np.array_equal(left.coef_, new.coef_))
        same(left, new if states[-1] else old)
        if not states[-1]:
            getattr(left, change)(*arguments)
            same(left, new)
    assert states == sorted(states) and {False, True} == set(states)


def test_killed_at_any_write_a_training_is_complete_or_can_begin_again(tmp_path):
    expected = small().fit(X, Y).delete(SOME)
    complete = []
    for folder in killed(tmp_path, lambda folder: lambda: small(history=folder).fit(X, Y)):
        try:
            left = DeltaGrad.load(folder)
            complete.append(True)
        except UserError:
            left = small(history=folder).fit(X, Y)
            complete.append(False)
        same(left.delete(SOME), expected)
    assert complete == sorted(complete) and {False, True} == set(complete)


# Bad input


def bad(text, value):
    x = X.copy()
    x[3, 1] = value
    return pytest.param(lambda model: model.fit(x, Y), r"row 3 of x holds NaN or infinity", id=text)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        bad("NaN", np.nan),
        (lambda model: model.delete([1, 1]), "id 1 is given 2 times"),
        (lambda model: model.delete([90]), r"id 90 is unknown, allowed are 0 … 89"),
        (lambda model: model.delete([0.5]), r"ids are float64 \[1\], needed are integers"),
        (lambda model: model.delete([]), r"needed are integers \[m\], at least one"),
        (lambda model: model.delete(np.uint64([2**63])), r"ids are uint64 \[1\], needed are integers .* below 2⁶³"),
        (lambda model: model.delete(range(90)), "would delete every sample"),
        (lambda model: model.delete(np.flatnonzero(Y == "no")), "would delete the whole class"),
        (lambda model: model.add(X[:1], ["noo"]), r"unknown class 'noo', did you mean 'no'"),
        (lambda model: model.add(X[:1], Y[:2]), r"y has shape \[2\], needed are 1 labels"),
        (lambda model: model.add(X[:1, :3], Y[:1]), "X has 3 features, but DeltaGrad is expecting 4"),
        (lambda model: model.predict(X[0]), r"X has shape \[4\], needed is \[n, D\]"),
        (lambda model: model.fit(X, X[:, 0]), "Unknown label type: continuous"),
        (lambda model: model.fit(X, ["one"] * 90), "y has one class, 'one'"),
        (lambda model: model.fit(X, np.arange(90).astype("M8[D]")), "Unknown label type: date. Labels are texts"),
        (lambda model: model.fit(X, np.array([1, "a"] * 45, object)), "Unknown label type: int, str"),
        (lambda model: DeltaGrad.load("nowhere"), r"nowhere' holds no complete record .* does not exist or has no log"),
        (lambda model: model.set_params(lr=-1).fit(X, Y), r"train\.lr = -1: "),
        (lambda model: model.set_params(lr=1e300).fit(X, Y), "the loss became"),
        (lambda model: model.set_params(rate=1), "unknown parameter 'rate'"),
    ],
)
def test_bad_input_is_one_error_and_changes_nothing(act, message):
    model = small().fit(X, Y)
    with pytest.raises(UserError, match=message) as error:
        act(model)
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    twin = small().fit(X, Y)
    same(model, twin)
    model.set_params(**twin.get_params())
    same(model.delete(SOME), twin.delete(SOME))


@pytest.mark.parametrize("use", ["predict", "predict_proba", "delete", "verify", "save"])
def test_nothing_works_before_fit(use):
    with pytest.raises(UserError, match="has not been trained: call fit"):
        getattr(small(), use)(*([] if use == "verify" else [X]))
    assert not hasattr(small(), "coef_")


# scikit-learn

EXPECTED_FAILURES = {
    "check_supervised_y_2d": "a column of labels is taken as it is: the warning is a class of scikit-learn's"
}


def test_scikit_learns_checks_pass():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it does not inherit from BaseEstimator
        results = checks.check_estimator(
            DeltaGrad(epochs=40, batch_size=64, lr=1.0),
            expected_failed_checks=EXPECTED_FAILURES,
            on_fail=None,
            on_skip=None,
        )
    failed, xfail, passed = ([each["check_name"] for each in results if each["status"] == status]
                             for status in ("failed", "xfail", "passed"))  # fmt: skip
    assert not failed and set(xfail) == EXPECTED_FAILURES.keys() and len(passed) >= 50


def test_it_works_in_scikit_learns_search():
    selection = pytest.importorskip("sklearn.model_selection")
    search = selection.GridSearchCV(small(), {"lr": [1e-6, 1.0], "epochs": np.array([6])}, cv=2).fit(X, Y)
    assert search.best_params_["lr"] == 1.0 and search.best_estimator_.delete([1]).verify() < 0.1
