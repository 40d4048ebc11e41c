"""`effray embed` as a script, for: ray job submit --working-dir . -- python jobs/embedding.py --dataset digits."""

import sys

from raypkg.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
