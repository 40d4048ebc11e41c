"""`effray sparse` as a script, for: ray job submit --working-dir . -- python jobs/sparse.py --dataset digits."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["sparse", *sys.argv[1:]])
