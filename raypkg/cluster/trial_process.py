"""A process that Ray Tune runs trials in, one after another; each pauses at every row until Tune decides on it."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from ray import tune
from ray.tune.result import DONE

from .drawing import Values

Row = dict[str, Any]  # the epoch and the metric, and an error if there was one
Tell = Callable[[Row], None]
Trial = Callable[[int, Values, Tell], Row]  # takes number, settings and whom to tell; returns its last row
CLOSING = 30  # seconds for a stopped trial to close its files


class TrialProcess(tune.Trainable):
    """Runs a trial until its next row whenever Tune asks for one, and takes over the next trial when it has ended.

    A trial resumes from the checkpoints in its run folder, so Tune is given empty ones.
    """

    def setup(self, config: dict[str, Any], trial: Trial, home: str) -> None:
        """Prepare for the first trial.

        Args:
            config: its number and settings.
            trial: what to run.
            home: the user's working folder.
        """
        self._trial = trial
        self._home = home
        self._begin(config)

    def step(self) -> Row:
        """Return the next row of the trial."""
        row = self._paced.advance()
        return {**row, DONE: self._paced.ended}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Replace the trial by another; return whether the old one has ended."""
        if not self._paced.stop(CLOSING):
            return False
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Let the trial close its files before the process ends."""
        self._paced.stop(CLOSING)

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return nothing to keep; HyperBand has trials saved to pause them."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Do nothing."""

    def _begin(self, config: dict[str, Any]) -> None:
        number = config["number"]
        values = dict(config["values"])
        if os.path.isdir(self._home):  # on another machine it may not be there
            os.chdir(self._home)
        self._paced = Paced(lambda tell: self._trial(number, values, tell))


class Paced:
    """A function in a thread of its own, which advances from one row that it tells to the next.

    Args:
        function: takes whom to tell of rows, from any thread; returns the last row.

    >>> def count(tell):
    ...     tell({"epoch": 1})
    ...     return {"epoch": 2}
    >>> paced = Paced(count)
    >>> paced.advance(), paced.ended
    ({'epoch': 1}, False)
    >>> paced.advance(), paced.ended
    ({'epoch': 2}, True)
    """

    def __init__(self, function: Callable[[Tell], Row]):
        self.ended = False
        self._function = function
        self._rows: SimpleQueue[Row | Exception] = SimpleQueue()
        self._turns = threading.Semaphore(0)
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="trial", daemon=True)
        self._reporter = self._thread  # with Ray Train inside, rows come from the mailbox's thread
        self._thread.start()

    def advance(self) -> Row:
        """Return the next row; what the function raises is raised here."""
        self._turns.release()
        row = self._rows.get()
        if isinstance(row, Exception):
            raise row
        return row

    def stop(self, seconds: float) -> bool:
        """End the function where it waits, by ``SystemExit``.

        Args:
            seconds: to wait for the thread that reports to unwind, and so to close its files.

        Returns:
            Whether the function's own thread has ended.
        """
        self._stopped = True
        self._turns.release()
        self._reporter.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        last: Row | Exception
        try:
            self._await_turn()
            last = self._function(self._tell)
        except Exception as error:
            last = error
        except SystemExit as error:  # of the user's own code, if nobody stopped it: raised, it would end the process
            last = RuntimeError(f"the trial ended itself by {error!r}")
        self.ended = True
        self._rows.put(last)

    def _tell(self, row: Row) -> None:
        self._reporter = threading.current_thread()
        self._rows.put(row)
        self._await_turn()

    def _await_turn(self) -> None:
        self._turns.acquire()
        if self._stopped:
            raise SystemExit
