"""Methods on a transformer of the user's own, as a user types them."""

import pyarrow.parquet as pq
from safetensors.torch import load_file

from raypkg.models import build_model
from sparse_training import C, D

MINE = "--dataset transformer_rows:rows --model transformer_rows:build"
PROJECTIONS = "features.encoder.layers.0.self_attn.in_proj_weight"


def test_sparse_training_with_agent_and_export(effray, tmp_path):
    effray(
        f"sparse --name one {MINE} --density 0.3 --sparse-init snip --growth gradient --train.epochs 4"
        " --agent --train.batch-size 16"
    )
    weights = load_file(tmp_path / "runs/sparse/one/model.safetensors")[PROJECTIONS]
    assert 0 < int(weights.count_nonzero()) < weights.numel()
    layers = set(pq.read_table(tmp_path / "runs/sparse/one/topology.parquet")["layer"].to_pylist())
    assert PROJECTIONS in layers and not any("norm" in name or "position" in name for name in layers)
    effray("export one --format csr")
    assert f"{PROJECTIONS}.values" in load_file(tmp_path / "runs/sparse/one/model.csr.safetensors")


def test_lipt_merges_masked_transformers(effray, tmp_path):
    effray(
        f"lipt --name one {MINE} --pretrain.models 2 --pretrain.epochs 1"
        " --pretrain.sparsity snip --pretrain.density 0.5 --train.epochs 2 --select.fraction 0.3"
    )
    merged = load_file(tmp_path / "runs/lipt/one/pretrained.safetensors")
    first = build_model("transformer_rows:build", (D,), C, seed=0).state_dict()
    kept = merged[PROJECTIONS] == first[PROJECTIONS]  # in neither of two masks of about a half
    assert 0.1 < kept.float().mean() < 0.45
    embedding = "features.position.weight"  # which no mask has
    assert not (merged[embedding] == first[embedding]).any()
    assert len(pq.read_table(tmp_path / "runs/lipt/one/coreset.parquet")) == 26  # of 86
