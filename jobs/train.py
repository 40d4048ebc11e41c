"""`effray train` as a script, for: ray job submit --working-dir . -- python jobs/train.py --dataset digits."""

import sys

from raypkg.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
