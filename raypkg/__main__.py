"""The command line as a module: ``ray job submit --working-dir . -- python -m raypkg lipt``, for any command."""

from raypkg.cli import script

if __name__ == "__main__":
    script()
