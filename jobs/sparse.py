"""`effray sparse` as a script, for: ray job submit --working-dir . -- python jobs/sparse.py --dataset digits."""

import sys

from raypkg.cli import main

if __name__ == "__main__":
    main(["sparse", *sys.argv[1:]])
