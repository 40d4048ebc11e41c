"""`effray deltagrad` as a script, for: ray job submit --working-dir . -- python jobs/deltagrad.py train --seed 1."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["deltagrad", *sys.argv[1:]])
