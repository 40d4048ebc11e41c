"""`effray tune` as a script, for: ray job submit --working-dir . -- python jobs/tune.py crest --dataset digits."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["tune", *sys.argv[1:]])
