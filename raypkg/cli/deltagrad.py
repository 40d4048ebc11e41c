"""The commands on a run that `effray deltagrad train` recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raypkg.core.errors import UserError
from raypkg.methods.deltagrad.settings import ReplaySettings, RequestSettings
from raypkg.runs import ROOT

from .options import ROOT_HELP, SHOWN_ROOT, TRUST, ExampleHelp
from .setting_options import SettingsCommand, metavar, overrides, setting_options

if TYPE_CHECKING:
    from raypkg.methods.deltagrad.queues import Request
    from raypkg.methods.deltagrad.recorded_run import RecordedRun

RUN = click.Argument(["run"])
PLACE = click.Option(["--root"], default=ROOT, show_default=SHOWN_ROOT, help=ROOT_HELP)
REPLAY = [  # the run's settings where they are left out, so no default is shown
    click.Option(
        [f"--{name.replace('_', '-')}", f"--replay.{name}", f"replay__{name}"],
        metavar=metavar(field),
        help=field.description,
    )
    for name, field in ReplaySettings.model_fields.items()
]
CLUSTER = [option for option in setting_options(RequestSettings) if (option.name or "").startswith("cluster__")]
Decorator = Callable[[Callable[..., None]], click.Command]


def computing(*parameters: click.Parameter) -> Decorator:
    """Make a command on a run that computes gradients."""
    return click.command(cls=SettingsCommand, schema=RequestSettings, params=[RUN, *parameters, PLACE, TRUST, *CLUSTER])


def replaying(*parameters: click.Parameter) -> Decorator:
    """Make a command on a run that replays its training."""
    return computing(*parameters, *REPLAY)


@replaying(
    click.Option(["--ids"], metavar="IDS", help="3,14,15, or a file: one a line, or parquet with a column id or index"),
    click.Option(["--where"], metavar="CONDITION", help="such as 'age > 60 and label = yes', on a table's columns"),
)
def delete(run: str, root: str, ids: str | None, where: str | None, **values: Any) -> None:
    """Make the model as if some samples had not been in its training.

    RUN is a run of `effray deltagrad train`. Ids are positions in the training split, from 0 on; those of a table
    that says which samples its rows stand for, as one of `effray embed`, are the ids of these.

    Example:
        effray deltagrad train --name one && effray deltagrad delete one --ids 0,1,2
    """
    from raypkg.methods.deltagrad.ids import read_ids
    from raypkg.methods.deltagrad.queues import Request

    if (ids is None) == (where is None):
        raise UserError("give one of --ids and --where")
    request = Request("delete_where", where) if ids is None else Request("delete", read_ids(ids))
    _answer_one(run, root, request, values)


@replaying(
    click.Option(["--ids"], metavar="IDS", help="deleted samples to put back where they were; a list or a file"),
    click.Option(["--data"], metavar="NAME", help="new samples: a data set like the run's; its train split is added"),
)
def add(run: str, root: str, ids: str | None, data: str | None, **values: Any) -> None:
    """Make the model as if further samples had been in its training.

    RUN is a run of `effray deltagrad train`. New samples get the next ids, and a batch in every epoch, by seed.

    Example:
        effray deltagrad train --name two && effray deltagrad add two --data digits
    """
    from raypkg.methods.deltagrad.ids import read_ids
    from raypkg.methods.deltagrad.queues import Request

    if (ids is None) == (data is None):
        raise UserError("give one of --ids and --data")
    request = Request("add", data) if ids is None else Request("restore", read_ids(ids))
    _answer_one(run, root, request, values)


@replaying(
    click.Argument(["queue"], type=Path),
    click.Option(["--together"], type=click.IntRange(1), default=1, show_default=True, help="requests in one replay"),
)
def stream(run: str, queue: Path, root: str, together: int, **values: Any) -> None:
    """Answer a queue of requests in order, each once, however often this is stopped and started again.

    QUEUE holds a JSON object a line: {"delete": [3, 7], "id": "ticket 12"}, or delete_where, restore, add. A request is
    known by its id, a text or an integer, and answered once.

    Example:
        effray deltagrad train --name five && echo '{"delete": [3], "id": "a"}' > q && effray deltagrad stream five q
    """
    from raypkg.methods.deltagrad.queues import read_queue
    from raypkg.methods.deltagrad.requests import grouped, unanswered

    requests = read_queue(queue)
    with _opened(run, root, "the same command answers the rest") as recorded:
        settings = _request_settings(recorded, values)
        waiting = unanswered(recorded, requests)
        click.echo(f"{len(waiting)} of {len(requests)} requests to answer")
        for group in grouped(waiting, together):
            _answer(recorded, group, settings)


@computing()
def verify(run: str, root: str, **values: Any) -> None:
    """Train again with the samples that are in use and tell how far the model is from that.

    RUN is a run of `effray deltagrad train`. The comparison is what the replays save: it takes the whole time.

    Example:
        effray deltagrad train --name three && effray deltagrad verify three
    """
    from raypkg.methods.deltagrad.show import verdict_table
    from raypkg.methods.deltagrad.verify import compare_with_retraining
    from raypkg.runs.show import terminal

    with _opened(run, root) as recorded:
        settings = _request_settings(recorded, values)
        verdict = compare_with_retraining(recorded, settings.cluster, _follow)
        terminal().print(verdict_table(verdict))


@click.command(cls=ExampleHelp, params=[RUN, PLACE, TRUST])
def log(run: str, root: str) -> None:
    """Show what was deleted and added, when and by which request, and check that nothing of it was changed.

    Example:
        effray deltagrad train --name four && effray deltagrad log four
    """
    from raypkg.methods.deltagrad.show import log_table
    from raypkg.runs.show import terminal

    with _opened(run, root) as recorded:
        entries = recorded.ledger.entries
        history = recorded.history()
        history.check()
        terminal().print(log_table(entries))
        click.echo(f"{len(entries)} entries and {len(history)} steps of the history are as they were written")


COMMANDS = [delete, add, stream, verify, log]


@contextmanager
def _opened(run: str, root: str, rest: str = "the run is as it was") -> Iterator[RecordedRun]:
    """Open a run; Ctrl-C and SIGTERM end in one line, with ``rest``: what there is to do then."""
    from raypkg.methods.deltagrad.recorded_run import open_recorded
    from raypkg.runs.folder import locate

    try:
        with open_recorded(locate(root, run)) as recorded:
            yield recorded
    except (KeyboardInterrupt, SystemExit):
        raise UserError(f"interrupted; {rest}") from None


def _request_settings(run: RecordedRun, values: dict[str, Any]) -> RequestSettings:
    return RequestSettings.over(run.settings.replay, overrides(RequestSettings, values, ()))


def _answer_one(run: str, root: str, request: Request, values: dict[str, Any]) -> None:
    with _opened(run, root, "the run is as it was, and the same command begins anew") as recorded:
        settings = _request_settings(recorded, values)
        known = recorded.stored_entries
        try:
            _answer(recorded, [request], settings)
        except (KeyboardInterrupt, SystemExit):
            if recorded.stored_entries > known:
                raise UserError("interrupted, but the request is answered") from None
            raise


def _answer(run: RecordedRun, requests: Sequence[Request], settings: RequestSettings) -> None:
    from raypkg.methods.deltagrad.answer import answer
    from raypkg.methods.deltagrad.ids import id_at
    from raypkg.methods.deltagrad.requests import change_of

    first_new = len(run.split)
    entry = answer(run, change_of(run, requests), settings, _follow)
    ids = ""
    if entry["new"]:
        first, last = (id_at(run.split, position) for position in (first_new, len(run.split) - 1))
        ids = f" (ids {first} … {last})"
    estimate = "" if entry["estimate"] is None else f", by estimate {entry['estimate']:.1e} from retraining"
    click.echo(
        f"{entry['number']}: {entry['deleted']} deleted, {entry['restored']} put back, {entry['new']} new{ids};"
        f" {entry['exact']} of {entry['steps']} steps exact, {entry['gradients']:,} gradients,"
        f" {entry['seconds']:.2f} s{estimate}"
    )


def _follow(steps: Iterable[Any], total: int) -> Iterable[Any]:
    from rich.progress import track

    from raypkg.runs.show import terminal

    console = terminal()
    return track(steps, "replaying", total, console=console, transient=True, disable=not console.is_terminal)
