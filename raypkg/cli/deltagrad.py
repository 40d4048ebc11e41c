"""The commands on a run that `effray deltagrad train` recorded: delete, add, stream, verify, log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raypkg.core.errors import UserError
from raypkg.methods.deltagrad.settings import ReplaySettings, RequestSettings

from .options import PLACE, TRUST, ExampleHelp, say
from .setting_options import SettingsCommand, metavar, overrides, setting_options

if TYPE_CHECKING:
    from raypkg.methods.deltagrad.requests import Removal, Request
    from raypkg.methods.deltagrad.run import RecordedRun

RUN = click.Argument(["run"])
REPLAY = [  # defaults are the run's settings, so none is shown
    click.Option(
        [f"--{name.replace('_', '-')}", f"--replay.{name}", f"replay__{name}"],
        metavar=metavar(field),
        help=field.description,
    )
    for name, field in ReplaySettings.model_fields.items()
]
CLUSTER = [option for option in setting_options(RequestSettings) if (option.name or "").startswith("cluster__")]


def command(*parameters: click.Parameter, replays: bool = True) -> Callable[[Callable[..., None]], click.Command]:
    """Declare a command on a run that computes gradients, by default to replay its training."""
    every = [RUN, *parameters, PLACE, TRUST, *CLUSTER, *(REPLAY if replays else ())]
    return click.command(cls=SettingsCommand, schema=RequestSettings, params=every)


@command(
    click.Option(["--ids"], metavar="IDS", help="3,14,15, or a file: one a line, or parquet with a column id or index"),
    click.Option(["--where"], metavar="CONDITION", help="such as 'age > 60 and label = yes', on a table's columns"),
    click.Option(
        ["--from-audit"], type=int, metavar="N", help="the N worst samples of the run's latest `effray audit`"
    ),
    click.Option(["--verify", "verified"], is_flag=True, help="retrain afterwards and compare, as `verify` does"),
)
def delete(
    run: str, root: str, ids: str | None, where: str | None, from_audit: int | None, verified: bool, **values: Any
) -> None:
    """Unlearn samples: update the model as if they had not been in its training.

    RUN is a run of `effray deltagrad train`. Ids are positions in the training split, from 0. If a table has a column
    of ids, as those of `effray embed` do, they are the values of that column. --from-audit also shows the predicted and
    the actual change of the held-out loss.

    Example:
        effray deltagrad train --name one && effray deltagrad delete one --ids 0,1,2
    """
    from raypkg.methods.deltagrad.requests import Request, read_ids, worst_of_audit
    from raypkg.runs.catalog import locate

    if sum(each is not None for each in (ids, where, from_audit)) != 1:
        raise UserError("give one of --ids, --where and --from-audit")
    removal = None
    if ids is not None:
        request = Request("delete", read_ids(ids))
    elif from_audit is None:
        request = Request("delete_where", where)
    else:
        removal = worst_of_audit(locate(root, run), root, from_audit)
        request = Request("delete", removal.ids)
    _answer_one(run, root, request, values, removal, verified)


@command(
    click.Option(["--ids"], metavar="IDS", help="deleted samples to put back where they were; a list or a file"),
    click.Option(["--data"], metavar="NAME", help="new samples: a data set like the run's; its train split is added"),
)
def add(run: str, root: str, ids: str | None, data: str | None, **values: Any) -> None:
    """Learn samples: update the model as if they had been in its training.

    RUN is a run of `effray deltagrad train`. New samples get the next ids, and a random batch in every epoch.

    Example:
        effray deltagrad train --name two && effray deltagrad add two --data digits
    """
    from raypkg.methods.deltagrad.requests import Request, read_ids

    if (ids is None) == (data is None):
        raise UserError("give one of --ids and --data")
    request = Request("add", data) if ids is None else Request("restore", read_ids(ids))
    _answer_one(run, root, request, values)


@command(
    click.Argument(["queue"], type=Path),
    click.Option(["--together"], type=click.IntRange(1), help="most requests in one replay (default: all that wait)"),
)
def stream(run: str, queue: Path, root: str, together: int | None, **values: Any) -> None:
    """Answer a queue of requests in order, each once; an interrupted stream resumes.

    QUEUE has a JSON object per line: {"delete": [3, 7], "id": "ticket 12"}, or delete_where, restore, add. The id, a
    text or an integer, identifies a request. One replay answers all that wait, up to the first that is refused.

    Example:
        effray deltagrad train --name five && echo '{"delete": [3], "id": "a"}' > q && effray deltagrad stream five q
    """
    from raypkg.methods.deltagrad.requests import read_queue, unanswered

    requests = read_queue(queue)
    with _opened(run, root, values, "the same command answers the rest") as (recorded, settings):
        waiting = unanswered(recorded, requests)
        say(f"{len(waiting)} of {len(requests)} requests to answer")
        while waiting:
            entry = _answer(recorded, waiting[:together], settings)
            waiting = waiting[len(entry["requests"]) :]


@command(replays=False)
def verify(run: str, root: str, **values: Any) -> None:
    """Retrain with the samples in use and report the model's distance from the result.

    RUN is a run of `effray deltagrad train`. This takes the time that a replay saves.

    Example:
        effray deltagrad train --name three && effray deltagrad verify three
    """
    with _opened(run, root, values) as (recorded, settings):
        _verify(recorded, settings)


def _verify(recorded: RecordedRun, settings: RequestSettings) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from raypkg.methods.deltagrad import answer
    from raypkg.runs.document import terminal

    verdict = answer.verify(recorded, settings.cluster, _follow)
    relative = verdict.distance / verdict.norm
    table = Table(title="against retraining", title_justify="left", box=SIMPLE, show_header=False, show_edge=False)
    distance = f"{verdict.distance:.3e} (of norm {verdict.norm:.4g}: {relative:.1e})"
    table.add_row("distance of the weights", distance)
    table.add_row("test samples predicted differently", f"{verdict.disagreement:.2%}")
    table.add_row("test accuracy", f"{verdict.accuracy:.2%}, retrained {verdict.retrained_accuracy:.2%}")
    table.add_row("cost of retraining", f"{verdict.samples:,} gradients, {verdict.seconds:.2f} s")
    terminal().print(table)


@click.command(cls=ExampleHelp, params=[RUN, PLACE, TRUST])
def log(run: str, root: str) -> None:
    """Show all deletions and additions, with their requests, and check the digests of log and history.

    Example:
        effray deltagrad train --name four && effray deltagrad log four
    """
    from rich.box import SIMPLE
    from rich.table import Table

    from raypkg.methods.deltagrad.journal import Journal
    from raypkg.runs.catalog import locate
    from raypkg.runs.document import terminal

    entries = Journal(locate(root, run).storage).entries
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for name in ("", "when", "what", "requests", "samples", "exact", "seconds", "model"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        requests = entry.get("requests", ())
        is_replay = "exact" in entry
        table.add_row(
            str(entry["number"]),
            entry["time"][:16].replace("T", " "),
            _counts(entry) if is_replay else "trained",
            f"{len(requests)} together" if len(requests) > 1 else "".join(request["id"] or "–" for request in requests),
            f"{entry['samples']:,}",
            f"{entry['exact']}/{entry['steps']}" if is_replay else "",
            f"{entry['seconds']:.2f}" if is_replay else "",
            entry["model"][:10],
        )
        for request in requests if len(requests) > 1 else ():
            table.add_row("", "", _counts(request), request["id"])
    if entries:
        terminal().print(table)  # even if its data set, which the checks need, is gone
    with _opened(run, root, {}) as (recorded, _):
        history = recorded.history()
        history.check()
    say(f"{len(entries)} entries and {len(history)} steps of the history are as they were written")


def _counts(done: Mapping[str, Any]) -> str:
    return ", ".join(f"{done[kind]:,} {kind}" for kind in ("deleted", "restored", "new") if done.get(kind))


COMMANDS = [delete, add, stream, verify, log]


@contextmanager
def _opened(
    run: str, root: str, values: Mapping[str, Any], rest: str = "the run is as it was"
) -> Iterator[tuple[RecordedRun, RequestSettings]]:
    """Open a run, with the settings of a request.

    Ctrl-C and SIGTERM end in one line, with ``rest``: the state of the run, or the way to resume.
    """
    from raypkg.methods.deltagrad.run import open_recorded
    from raypkg.runs.catalog import locate

    try:
        with open_recorded(locate(root, run)) as recorded:
            yield recorded, RequestSettings.over(recorded.settings.replay, overrides(RequestSettings, values, ()))
    except (KeyboardInterrupt, SystemExit):
        raise UserError(f"interrupted; {rest}") from None


def _answer_one(
    run: str,
    root: str,
    request: Request,
    values: Mapping[str, Any],
    removal: Removal | None = None,
    verified: bool = False,
) -> None:
    from raypkg.methods.deltagrad.answer import held_out

    rest = "the run is as it was, and the same command starts again"
    with _opened(run, root, values, rest) as (recorded, settings):
        known = len(recorded.journal.entries)
        try:
            before = held_out(recorded, removal.on) if removal else (0.0, 0.0)
            _answer(recorded, [request], settings)
            if removal:
                loss, accuracy = held_out(recorded, removal.on)
                say(
                    f"{'held-out' if removal.on == 'valid' else 'test'} loss {before[0]:.4f} → {loss:.4f}, a change of"
                    f" {loss - before[0]:+.4f}, predicted {removal.change:+.4f} by audit {removal.audit};"
                    f" accuracy {before[1]:.2%} → {accuracy:.2%}"
                )
            if verified:
                _verify(recorded, settings)
        except (KeyboardInterrupt, SystemExit):
            if recorded.journal.stored() > known:
                raise UserError("interrupted, but the request is answered") from None
            raise


def _answer(run: RecordedRun, requests: Sequence[Request], settings: RequestSettings) -> dict[str, Any]:
    """Answer requests by one replay, up to the first that is refused; return the entry in the journal."""
    from raypkg.methods.deltagrad.answer import answer, estimate
    from raypkg.methods.deltagrad.requests import change_of, id_at

    first_new = len(run.split)
    change = change_of(run, requests)
    if (times := estimate(run, change, settings.replay)) > 1:
        say(f"estimate: {times:.1f} times as long as training again")
    entry = answer(run, change, settings, _follow)
    ids = ""
    if entry["new"]:
        first, last = (id_at(run.split, position) for position in (first_new, len(run.split) - 1))
        ids = f" (ids {first} … {last})"
    say(
        f"{entry['number']}: {entry['deleted']} deleted, {entry['restored']} put back, {entry['new']} new{ids};"
        f" {entry['exact']} of {entry['steps']} steps exact, {entry['gradients']:,} gradients, {entry['seconds']:.2f} s"
    )
    return entry


def _follow(steps: Iterable[Any], total: int) -> Iterable[Any]:
    from rich.progress import track

    from raypkg.runs.document import terminal

    console = terminal()
    return track(steps, "replaying", total, console=console, transient=True, disable=not console.is_terminal)
