"""`effray predict` and `effray evaluate`: a finished run's model on new images, texts and rows, and on known labels."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import samples
from raypkg import UserError, load_data, load_model
from raypkg.experiments.prediction import Evaluation

PIXELS = samples.pixels(24)
LABELS = np.arange(24) % 3
ROWS = "x,y,label\n" + "".join(f"{i % 2}.5,{i},{'ab'[i % 2]}\n" for i in range(40))
PLAIN = "--train.epochs 2 --train.precision float32"


def predictions(file="out.jsonl"):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_metrics_are_those_of_their_definitions():
    rng = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200, 4, generator=rng).softmax(1)
    y = torch.randint(3, (200,), generator=rng)  # class 3 is never true
    found = Evaluation.of(y, probabilities)
    best, labels = probabilities.double().max(1)
    f1, error = [], 0.0
    for c in range(4):
        right = ((labels == c) & (y == c)).sum().item()
        f1.append(2 * right / ((labels == c).sum() + (y == c).sum()).item())
    for k in range(15):
        inside = (best > k / 15) & (best <= (k + 1) / 15)
        gap = (labels[inside] == y[inside]).double().sum() - best[inside].sum()
        error += abs(gap).item() / 200
    assert found.accuracy == pytest.approx((labels == y).double().mean().item())
    assert found.macro_f1 == pytest.approx(sum(f1) / 4)
    assert found.calibration == pytest.approx(float(error))
    low, high = found.interval
    for edge in (low, high):  # Wilson: the shares whose distance from the observed one is 1.96 of their deviations
        assert abs(found.accuracy - edge) == pytest.approx(1.96 * (edge * (1 - edge) / 200) ** 0.5, rel=1e-4)


def test_evaluate_agrees_with_the_run_and_stores_predictions(effray, refusal):
    effray(f"train --name one --model linear {PLAIN}")
    text = effray("evaluate one")
    summary = json.loads(Path("runs/train/one/summary.json").read_text())
    assert f"test accuracy {summary['test_accuracy']:.2%} (95 % interval" in text
    table = pq.read_table("runs/train/one/evaluations/test.parquet").to_pydict()
    right = np.mean([a == b for a, b in zip(table["truth"], table["label"], strict=True)])
    assert right == pytest.approx(summary["test_accuracy"])
    assert Path("runs/train/one/plots/confusion-test.png").exists()
    assert "train accuracy" in effray("evaluate one --split train")
    effray(f"train --name views --model linear {PLAIN} --train.evaluate_views shifted")
    shifted = json.loads(Path("runs/train/views/summary.json").read_text())["test_accuracy"]
    assert shifted != summary["test_accuracy"] and f"test accuracy {shifted:.2%}" in effray("evaluate views")
    effray(f"train --name noisy --model linear {PLAIN} --dataset.noise 0.3")
    effray("evaluate noisy --split train")
    truth = pq.read_table("runs/train/noisy/evaluations/train.parquet")["truth"].to_pylist()
    assert truth == [str(label) for label in load_data("digits").train.y.tolist()]  # not the drawn labels
    Path("a.csv").write_text(ROWS)
    assert "have the shape [2], those of run 'one' [1, 8, 8]" in refusal("evaluate one --dataset table:a.csv")
    assert "does nothing without --dataset" in refusal("evaluate one --set size=3")
    effray("rm one --yes")  # what they stored is the run's
    assert not Path("runs/train/one").exists()


def test_predict_images_by_file_or_folder(effray, refusal):
    samples.write_folder(Path("set/train"), PIXELS, LABELS)
    effray(f"train --name one --dataset folder:set --model linear {PLAIN}")
    effray("predict one set --out out.jsonl")
    found = predictions()
    assert len(found) == 24 and Path(found[0]["input"]).is_file()
    model = load_model("runs/train/one")
    for row in found[:5]:
        pixels = torch.from_numpy(np.array(Image.open(row["input"]))).permute(2, 0, 1)[None]
        expected = model.predict(pixels)
        assert row["label"] == expected.names[0]
        assert row["p(dog)"] == pytest.approx(expected.probabilities[0, 1].item(), abs=1e-6)
    assert found[0]["label"] in effray(f"predict one {found[0]['input']}")
    Path("strange").mkdir()
    os.link(found[0]["input"], b"strange/\xfe.png")  # not UTF-8
    effray("predict one strange --out out.jsonl")
    assert [(row["input"], row["label"]) for row in predictions()] == [("strange/\\xfe.png", found[0]["label"])]
    Path("empty").mkdir()
    Path("broken.png").write_bytes(b"\x89PNG no")
    for source, problem in {"broken.png": "broken.png", "none": "does not exist", "empty": "holds no samples"}.items():
        assert problem in refusal(f"predict one {source}")
    assert "unknown format of predictions '.txt'" in refusal("predict one set --out out.txt")


def test_predict_rows_without_labels_in_any_order_of_columns(effray, refusal):
    Path("a.csv").write_text(ROWS)
    effray(f"train --name one --dataset table:a.csv --model linear {PLAIN}")
    Path("new.csv").write_text("y,x\n" + "".join(f"{i},{i % 2}.5\n" for i in range(40)))
    effray("predict one new.csv --out deeper/out.parquet")
    Path("deeper/out.parquet").rename("out.parquet")
    table = pq.read_table("out.parquet")
    expected = load_model("runs/train/one").predict([[i % 2 + 0.5, i] for i in range(40)])
    assert table["label"].to_pylist() == expected.names and table["input"].to_pylist() == [*range(40)]
    np.testing.assert_allclose(table["p(b)"].to_numpy(), expected.probabilities[:, 1].numpy(), atol=1e-6)
    Path("more.csv").write_text("id,y,label,x\n123456789,3,,1.5\nn,4,,0.5\n")  # other columns may hold anything
    effray("predict one more.csv --out out.parquet")
    expected = load_model("runs/train/one").predict([[1.5, 3], [0.5, 4]])
    np.testing.assert_allclose(pq.read_table("out.parquet")["p(b)"], expected.probabilities[:, 1], atol=1e-6)
    diverged = load_model("runs/train/one")
    diverged.head.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match="its training diverged"):
        diverged.predict([[1.0, 2.0]])
    Path("lacks.csv").write_text("y\n1\n")
    assert "'x'. Allowed: y" in refusal("predict one lacks.csv")
    Path("turned.csv").write_text("y,x,label\n" + "".join(f"{i},{i % 2}.5,{'ab'[i % 2]}\n" for i in range(40)))
    expected = "the samples of 'table:turned.csv' have the columns y, x, those of run 'one' x, y"
    assert expected in refusal("evaluate one --dataset table:turned.csv")
    for file in ("a.csv/b.csv", f"{'n' * 250}.csv"):
        assert "cannot write" in refusal(f"predict one a.csv --out {file}")


def test_predict_texts(effray, refusal):
    rows = "".join(f"{'good' if i % 2 else 'bad'} film {i}\t{i % 2}\n" for i in range(40))
    Path("a.tsv").write_text(f"text\tlabel\n{rows}")
    effray(f"train --name one --dataset text:a.tsv --model transformer {PLAIN}")
    lines = ["a good film", "bad, bad film"]
    Path("new.txt").write_text("\n".join(lines))
    Path("new.csv").write_text('text\na good film\n"bad, bad film"\n')
    expected = load_model("runs/train/one").predict(lines)
    for file in ("new.txt", "new.csv"):
        effray(f"predict one {file} --out out.jsonl")
        assert [(row["input"], row["label"]) for row in predictions()] == [*zip(lines, expected.names, strict=True)]
    Path("marked.txt").write_bytes("\ufeffa good film\n\na bad\u2028film\r\n".encode())
    effray("predict one marked.txt --out out.parquet")
    expected = load_model("runs/train/one").predict(["a good film", "", "a bad\u2028film"])
    np.testing.assert_allclose(pq.read_table("out.parquet")["p(1)"], expected.probabilities[:, 1], atol=1e-6)
    Path("empty.txt").touch()
    assert "'empty.txt' holds no samples" in refusal("predict one empty.txt")
    Path("id.csv").write_text("id,comment\n7,a good film\n")
    assert "none of the usual columns of texts among id, comment" in refusal("predict one id.csv")
    assert "'.' is a folder: needed is a file of texts" in refusal("predict one .")


def test_diff_pairs_the_predictions_of_two_runs(effray, refusal):
    effray(f"train --name one --model linear {PLAIN}")
    effray("train --name two --model linear --train.epochs 1 --train.precision float32")
    text = effray("diff one two")
    assert re.search(r"train\.epochs +2 +1\n", text) and "cluster" not in text
    tables = []
    for name in ("one", "two"):
        effray(f"evaluate {name}")
        table = pq.read_table(f"runs/train/{name}/evaluations/test.parquet").to_pydict()
        tables.append(np.array(table["truth"]) == np.array(table["label"]))
    b, c = (tables[0] & ~tables[1]).sum(), (tables[1] & ~tables[0]).sum()
    assert f"{b} right only there, {c} only in two" in text
    assert f"accuracy {100 * (tables[0].mean() - tables[1].mean()):+.2f} points for one" in text
    Path("a.csv").write_text(ROWS)
    effray(f"train --name rows --dataset table:a.csv --model linear {PLAIN}")
    assert "tested on different samples" in effray("diff one rows")
    assert "unknown run" in refusal("diff one none")
