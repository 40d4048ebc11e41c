"""`effray embed` as a script, for: ray job submit --working-dir . -- python jobs/embedding.py --dataset digits."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["embed", *sys.argv[1:]])
