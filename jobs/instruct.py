"""`effray instruct` as a script, for: ray job submit --working-dir . -- python jobs/instruct.py --dataset …."""

import sys

from raypkg.cli import script

if __name__ == "__main__":
    script(["instruct", *sys.argv[1:]])
