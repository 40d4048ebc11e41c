"""`effray train` as a script, for: ray job submit --working-dir . -- python jobs/train.py --dataset digits."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["train", *sys.argv[1:]])
