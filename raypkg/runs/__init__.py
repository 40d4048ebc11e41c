"""Run folders: storage, metrics, checkpoints, plots, reports and W&B tracking."""

import os

ROOT = os.environ.get("EFFRAY_RUNS") or "runs"  # a folder or URI, unless --root names another
