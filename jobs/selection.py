"""`effray select` as a script, for: ray job submit --working-dir . -- python jobs/selection.py --dataset digits."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["select", *sys.argv[1:]])
