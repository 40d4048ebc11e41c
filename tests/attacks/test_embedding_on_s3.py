"""Features in an object store: stopped and resumed there, they are those of a local run."""

import signal

import pytest

from forked import effray
from raypkg.experiments import embedding
from raypkg.runs.storage import Storage
from test_embedding import EMBED, killed_after

pytestmark = pytest.mark.attack


def test_an_embedding_in_a_bucket_is_that_of_a_local_run(root, tmp_path):
    assert effray(EMBED, tmp_path).code == 0
    place = f"--root '{root}'"
    assert effray(f"{EMBED} {place}", tmp_path, lambda: killed_after(4)).code == -signal.SIGKILL
    ended = effray(f"embed --resume one --cluster.workers 0 {place}", tmp_path)
    assert ended.code == 0, ended
    remote = Storage(root) / "embed" / "one"
    assert not remote.list(embedding.PARTS)
    for file in ("train.parquet", "test.parquet"):
        assert remote.read(file) == (tmp_path / "runs/embed/one" / file).read_bytes()
