"""`effray crest` as a script, for: ray job submit --working-dir . -- python jobs/crest.py --dataset digits."""

import sys

from raypkg.cli import main

if __name__ == "__main__":
    main(["crest", *sys.argv[1:]])
