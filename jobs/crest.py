"""`effray crest` as a script, for: ray job submit --working-dir . -- python jobs/crest.py --dataset digits."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["crest", *sys.argv[1:]])
