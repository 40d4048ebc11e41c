"""A wrong name is told before PyTorch is imported, so the answer comes at once."""

import subprocess
import sys

import pytest

NAMES_FIRST = """
import sys
from raypkg.cli import main

try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def told(arguments, folder):
    """Return the error of a command that must end without PyTorch."""
    command = [sys.executable, "-c", NAMES_FIRST, *arguments.split(), "--cluster.workers", "0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --model resnt8", "effray: unknown model 'resnt8', did you mean 'resnet8'? "),
        ("train --dataset digts", "effray: unknown dataset 'digts', did you mean 'digits'? "),
        ("train --hooks agnt", "effray: unknown hook 'agnt', did you mean 'agent'? "),
        ("select --rule gradmtch", "effray: unknown coreset rule 'gradmtch', did you mean 'gradmatch'? "),
        ("lipt --select.rule gradmtch", "effray: unknown coreset rule 'gradmtch', did you mean 'gradmatch'? "),
        ("lipt --pretrain.method lipd", "effray: unknown pre-training 'lipd', did you mean 'lipt'? "),
        ("lipt --pretrain.merge men", "effray: unknown merge 'men', did you mean 'mean'? "),
        ("lipt --pretrain.sparsity snp", "effray: unknown sparse initialisation 'snp', did you mean 'snip'? "),
        ("sparse --density 0.1 --growth randm", "effray: unknown growth rule 'randm', did you mean 'random'? "),
        ("sparse --density 0.1 --drop sett", "effray: unknown drop rule 'sett', did you mean 'set'? "),
        ("crest --model resnt8", "effray: unknown model 'resnt8', did you mean 'resnet8'? "),
        ("deltagrad train --model linea", "effray: unknown model 'linea', did you mean 'linear'? "),
    ],
)
def test_a_wrong_name_is_told_before_pytorch_is_imported(arguments, message, tmp_path):
    assert told(arguments, tmp_path).startswith(message)
    assert not list(tmp_path.iterdir())
