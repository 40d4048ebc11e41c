"""`effray lipt` as a script, for: ray job submit --working-dir . -- python jobs/lipt.py --dataset digits."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["lipt", *sys.argv[1:]])
