"""What a run leaves behind: its folder, checkpoints, metrics, plots and, when asked, its W&B record."""

import os

ROOT = os.environ.get("EFFRAY_RUNS") or "runs"  # a folder or URI, unless --root names another
