"""`effray tune` as a script, for: ray job submit --working-dir . -- python jobs/tune.py crest --dataset digits."""

import sys

from raypkg.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
