"""A run's folder is its own: names that are harmless anywhere, one maker, and files that are what the run left."""

import fcntl
import multiprocessing
import os
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

import raypkg
from raypkg.cli import main
from raypkg.core.errors import UserError, redacted
from raypkg.core.settings import Dataset, Experiment, Training
from raypkg.runs.catalog import GOING, state_of
from raypkg.runs.folder import RunFolder, create, environment
from raypkg.runs.storage import Storage

BAD_NAMES = [
    "#x",
    "%2e%2e",
    "a%2F..%2Fx",
    "?a",
    "-x",
    "..",
    "a/b",
    "a b",
    "a\n",
    "",
    "x\u202ey",
    "\udcff",
    "a:b",
    "a\\b",
]
GOOD_NAMES = ["one", "größe", "[red]", "lr=0.1,seed=2", "a+b@c_d-e.f", "日本"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "a\\b", "x" * 101, "x.part", *GOOD_NAMES])
def test_a_name_is_a_folder_of_that_name_or_refused_if_it_could_be_read_as_more(name, tmp_path):
    for root, place in ((str(tmp_path), tmp_path / "train"), (f"file://{tmp_path}/b", tmp_path / "b" / "train")):
        with nullcontext() if name in GOOD_NAMES else pytest.raises(UserError, match=r"1 to 100 letters, digits or"):
            assert create(root, "train", name, Experiment()).name == name and (place / name).is_dir()
    assert name in GOOD_NAMES or not list(tmp_path.iterdir())


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(create, [(str(tmp_path), "train", None, Experiment(seed=n)) for n in range(12)])
    assert len({folder.name for folder in folders}) == 12
    assert {folder.config["seed"] for folder in folders} == set(range(12))


def test_the_loser_of_a_name_deletes_nothing(tmp_path):
    create(str(tmp_path), "train", "one", Experiment())
    with pytest.raises(UserError, match="run 'one' exists in"):
        create(str(tmp_path), "train", "one", Experiment(seed=1))
    assert RunFolder(Storage(str(tmp_path)) / "train" / "one").config["seed"] == 0
    (tmp_path / "train" / "two").mkdir()
    with pytest.raises(UserError, match="has no settings yet; if no process is starting it, delete the folder"):
        create(str(tmp_path), "train", "two", Experiment())


def test_settings_with_credentials_are_not_kept(tmp_path):
    dataset = Dataset(only="s3://KEY:SECRET@bucket/coreset.parquet")
    with pytest.raises(UserError, match="credentials in its URI") as told:
        create(str(tmp_path), "train", "one", Experiment(dataset=dataset))
    assert "SECRET" not in str(told.value) and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_finished_is_not_left(tmp_path, monkeypatch):
    def full(storage, name, content):
        raise UserError("the disk is full")

    monkeypatch.setattr(Storage, "write", full)
    with pytest.raises(UserError, match="the disk is full"):
        create(str(tmp_path), "train", "one", Experiment())
    assert not list((tmp_path / "train").iterdir())  # the folder around it may be the user's


def test_two_claims_at_once_both_give_way(tmp_path, monkeypatch):
    (tmp_path / "one" / "claims").mkdir(parents=True)  # which object stores do not need
    monkeypatch.setattr(Storage, "local", None)
    mine = Storage(str(tmp_path), "one")
    original = mine.write

    def write(name, content):
        original(name, content)
        original("claims/other", b"")  # who was as fast

    mine.write = write
    assert not mine.claim() and mine.list("claims") == ["other"]


@pytest.fixture
def run(tmp_path):
    folder = create(str(tmp_path), "train", "one", Experiment())
    folder.storage.write("model.safetensors", b"weights")
    folder.finish_phase("train", {"costs": [], "elapsed": 1.0})
    return folder


def test_settings_that_were_cut_at_the_end_of_a_line_are_told_from_whole_ones(run):
    file = run.storage.local / "config.toml"
    lines = file.read_bytes().splitlines(keepends=True)
    for end in range(1, len(lines)):
        file.write_bytes(b"".join(lines[:end]))
        with pytest.raises(UserError, match=r"config.toml' has been changed or cut short"):
            _ = run.config
    file.write_bytes(b"".join(lines[1:]))  # without the digest, as a hand would write it
    assert run.config["seed"] == 0


@pytest.mark.parametrize("content", [None, b"weight", b"Weights", b""])
def test_a_finished_phase_whose_file_is_not_what_it_left_is_not_done(run, content):
    assert run.phase("train")["files"].keys() == {"model.safetensors"}
    file = run.storage.local / "model.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors (is missing|has been changed).* that phase 'train' left"):
        run.phase("train")


def test_a_file_that_a_later_phase_wrote_anew_is_that_phases(run):
    run.storage.write("model.safetensors", b"better weights")
    run.finish_phase("more", {"costs": [], "elapsed": 1.0})
    assert run.phase("train") and run.phase("more")
    run.storage.write("model.safetensors", b"weights")
    with pytest.raises(UserError, match="that phase 'more' left"):
        run.phase("more")


SECRETS = ["SECRET", "SE'CRET", "SE/CRET", "SE@CRET", 'SE"CRET', "SE:CRET", "SE CRET", "S E@C"]  # of any characters
ADDRESSES = [  # without secrets, or also with those in a query
    "s3://bucket?endpoint_override=127.0.0.1:9000&region=x", "http://127.0.0.1:8265/x of a@b", "s3://bucket/run@v2",
    "/data/a@b/c", "parquet:/data/a@b", "http://127.0.0.1:8265/x",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *(
            (f"use s3:{s}KEY:{each}@bucket/x here", f"use s3:{s}***@bucket/x here")
            for each in SECRETS
            for s in ("//", "/")
        ),
        *zip(ADDRESSES, ADDRESSES, strict=True),
        ("'s3://bucket?secret_key=SECRET&region=x' is bad", "'s3://bucket?secret_key=***&region=x' is bad"),
        ("s3://bucket?region=x&session_token=SECRET", "s3://bucket?region=x&session_token=***"),
        ("s3://bucket?endpoint_override=KEY:SECRET@host:1", "s3://***@host:1"),
        ("s3://b?endpoint_override=http%3A%2F%2FKEY%3ASECRET%40host", "s3://b?endpoint_override=***%40host"),
        ("abfs://:SECRET@account.dfs.core.windows.net/x", "abfs://***@account.dfs.core.windows.net/x"),
    ],
)
def test_secrets_and_nothing_else_are_redacted_in_errors_and_stored_commands(monkeypatch, text, shown):
    assert redacted(text) == str(UserError(text)) == shown
    monkeypatch.setattr("sys.argv", ["effray", text])
    assert environment()["command"][-1] == shown


def test_an_error_of_a_remote_file_system_is_one_line(tmp_path, monkeypatch):
    def fail(storage, folder, recursive=False):
        raise pa.ArrowException("no token\nfor Azure")  # which is no OSError

    monkeypatch.setattr(Storage, "_entries", fail)
    with pytest.raises(UserError, match=r"cannot list .*no token for Azure"):
        Storage(str(tmp_path)).times()


DRAWN = """
import torch
from raypkg import Split

def load(root, *, split):
    return Split.from_tensors(torch.randn(60, 4), torch.arange(60) % 3)

def seeded(root, *, split):
    draws = torch.Generator().manual_seed(len(split))
    return Split.from_tensors(torch.randn(60, 4, generator=draws), torch.arange(60) % 3)
"""


@pytest.fixture
def effray(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command in a folder of its own, and gives back its exit code and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "drawn_code.py").write_text(DRAWN)

    def effray(line):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*line.split(), "--cluster.workers", "0"])
        return ended.value.code or 0, capsys.readouterr().err

    yield effray
    sys.modules.pop("drawn_code", None)


def test_a_rerun_takes_another_seed_and_share_held_out_and_a_finished_run_that_lost_a_file_is_not_whole(effray):
    assert effray("train --name one --dataset drawn_code:seeded --model linear --train.epochs 1") == (0, "")
    for name, option in (("two", "--seed 1"), ("three", "--dataset.validation 0.3")):
        assert effray(f"train --name {name} --config runs/train/one/config.toml {option}") == (0, "")
    assert effray("train --resume one") == (0, "")
    Path("runs/train/one/model.safetensors").unlink()
    code, message = effray("train --resume one")
    assert code == 2 and "model.safetensors is missing: it is not the one that run 'one' left" in message


def test_a_resumed_or_repeated_run_refuses_other_samples_and_lost_settings(effray, monkeypatch):
    def finish(folder, summary):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", finish)
        effray("train --name one --dataset drawn_code:load --model linear --train.epochs 1")
    for again in ("--resume one", "--name two --config runs/train/one/config.toml"):
        code, message = effray(f"train {again}")
        assert code == 2 and "gives other samples than those the run began with" in message
        assert message.count("\n") == 1
    Path("runs/train/one/config.toml").write_text("")
    code, message = effray("train --resume one")
    assert code == 2 and "config.toml' is missing or empty" in message


def test_a_model_that_was_changed_neither_selects_nor_is_exported_nor_loaded(effray):
    effray("train --name one --model mlp --train.epochs 1")
    file = Path("runs/train/one/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    code, message = effray("select --model-from one --rule grand")
    assert code == 2 and "model.safetensors has been changed or cut short" in message
    with pytest.raises(UserError, match=r"model.safetensors has been changed or cut short"):
        raypkg.load_model("runs/train/one")


def test_a_trained_model_predicts_samples_as_they_are_stored(effray):
    effray("train --name one --model mlp --train.epochs 3")
    model = raypkg.load_model(Path("runs/train/one"))
    test = raypkg.load_data("digits").test
    x, y = test.batch(range(len(test)))
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).squeeze().numpy()) for pixels in x]
    labels, probabilities, names = model.predict(pictures)
    assert probabilities.equal(model.predict(x).probabilities) and names[0] == model.classes[labels[0]]
    assert model.predict([picture.resize((24, 16)).convert("RGB") for picture in pictures]).labels.shape == y.shape
    right = (labels == y).double().mean().item()
    measured = raypkg.evaluate(model, test, precision="float32")
    assert right == pytest.approx(measured["accuracy"])
    assert right > 0.5
    for wrong in (x / 255, x[0], x.numpy(), x[:, :, :4]):
        with pytest.raises(UserError, match="predict takes uint8"):
            model.predict(wrong)


def test_the_front_door_tells_what_it_takes():
    digits = raypkg.load_data("digits")
    model = raypkg.build_model("linear", digits.train.shape, 10, seed=0)
    with pytest.raises(UserError, match="a Data is no Split"):
        raypkg.Run.simple(model, digits)
    with pytest.raises(UserError, match="settings are given, so epochs would do nothing"):
        raypkg.Run.simple(model, digits.train, Training(), epochs=2)
    with pytest.raises(UserError, match=r"Linear is not of the form head\(features\(x\)\)"):
        raypkg.head_view(torch.nn.Linear(4, 2), [])
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has Coreset"):
        _ = raypkg.nothing
    assert set(raypkg.__all__) <= set(dir(raypkg)) and all(hasattr(raypkg, name) for name in dir(raypkg))


def test_work_begins_while_somebody_looks_whether_anybody_works_there(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, (folder,)).start()
    with Storage(str(tmp_path)).locked("run 'one'"):
        assert state_of(Storage(str(tmp_path))) == GOING
