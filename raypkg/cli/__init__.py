"""The command line: ``effray EXPERIMENT`` for every experiment, and what surrounds them."""

import logging
import os
import sys
from collections.abc import Sequence


def script(arguments: Sequence[str] | None = None) -> None:
    """Run the command line as a process of its own, of which nothing is left when the command has ended."""
    from .ending import SwiftEnd

    end = SwiftEnd()
    try:
        main(arguments)
    except SystemExit as ended:
        end.code = int(ended.code or 0)
        if end.code and _waits_in_vain(ended):
            end.now()  # Ray's own end would wait for the cluster, or meet the waiting thread and change the code
        raise


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line within this process, which goes on; a user's mistake is one line and exit code 2.

    Raises:
        SystemExit: always, with the exit code.
    """
    import click

    from raypkg.core.errors import UserError

    from .commands import effray
    from .ending import orderly_end

    logging.basicConfig(format="effray: %(message)s")
    try:
        try:
            with orderly_end():
                code = effray.main(arguments, prog_name="effray", standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as error:  # a group without its command
            print(error.ctx.get_help())
            code = 0
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        _fail(str(error), 2)
    except click.ClickException as error:
        _fail(str(UserError(error.format_message())), error.exit_code)
    except click.Abort:
        _fail("interrupted", 130)
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _waits_in_vain(ended: SystemExit) -> bool:
    from raypkg.cluster.workers import are_abandoned
    from raypkg.core.errors import ClusterLost

    return isinstance(ended.__context__, ClusterLost) or are_abandoned()


def _fail(message: str, code: int) -> None:
    print(f"effray: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
