"""`effray compare` as a script, for: ray job submit --working-dir . -- python jobs/compare.py crest."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["compare", *sys.argv[1:]])
