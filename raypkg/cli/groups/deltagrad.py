"""The commands on a run that `effray deltagrad train` recorded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raypkg.core.errors import UserError
from raypkg.methods.deltagrad.settings import DeltaGradSettings, ReplaySettings
from raypkg.runs import ROOT

from ..options import ROOT_HELP, ExampleHelp, metavar

if TYPE_CHECKING:
    from raypkg.core.settings import Cluster
    from raypkg.methods.deltagrad.books import Books
    from raypkg.methods.deltagrad.requests import Request

WORKERS = "Ray actors that hold the data and compute gradients; 0 = this process"


def on_run(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the run and where it computes."""
    command = click.option("--root", default=ROOT, show_default=True, help=ROOT_HELP)(command)
    command = click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help=WORKERS)(command)
    command = click.option(
        "--threads", type=click.IntRange(1), default=1, show_default=True, help="of this process or of each actor"
    )(command)
    return click.argument("run")(command)


def replaying(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the settings of the replay; those that are left out are the run's."""
    for name, field in reversed(ReplaySettings.model_fields.items()):
        option = click.option(f"--{name.replace('_', '-')}", name, metavar=metavar(field), help=field.description)
        command = option(command)
    return on_run(command)


@click.command(cls=ExampleHelp)
@click.option("--ids", metavar="IDS", help="3,14,15, or a file: one a line, or parquet with a column id or index")
@click.option("--where", metavar="CONDITION", help="such as 'age > 60 and label = yes', on a table's columns")
@replaying
def delete(ids: str | None, where: str | None, **given: Any) -> None:
    """Make the model as if some samples had not been in its training.

    RUN is a run of `effray deltagrad train`. Ids are positions in the training split, from 0 on.

    Example:
        effray deltagrad train --name one && effray deltagrad delete one --ids 0,1,2
    """
    from raypkg.methods.deltagrad.requests import read_ids

    _answer_one("delete", None if ids is None else read_ids(ids), "delete_where", where, "--ids and --where", given)


@click.command(cls=ExampleHelp)
@click.option("--ids", metavar="IDS", help="deleted samples to put back where they were; a list or a file")
@click.option("--data", metavar="NAME", help="new samples: a data set like the run's, whose train split is added")
@replaying
def add(ids: str | None, data: str | None, **given: Any) -> None:
    """Make the model as if further samples had been in its training.

    RUN is a run of `effray deltagrad train`. New samples get the next ids, and a batch in every epoch, by seed.

    Example:
        effray deltagrad train --name two && effray deltagrad add two --data digits
    """
    from raypkg.methods.deltagrad.requests import read_ids

    _answer_one("restore", None if ids is None else read_ids(ids), "add", data, "--ids and --data", given)


@click.command(cls=ExampleHelp)
@replaying
@click.argument("queue", type=Path)
@click.option("--together", type=click.IntRange(1), default=1, show_default=True, help="requests in one replay")
def stream(queue: Path, together: int, **given: Any) -> None:
    """Answer a queue of requests in order, each once, however often this is stopped and started again.

    QUEUE holds a JSON object a line: {"delete": [3, 7], "id": "ticket 12"}, or delete_where, restore, add. A request is
    known by its id and answered once.

    Example:
        effray deltagrad train --name five && echo '{"delete": [3], "id": "a"}' > q && effray deltagrad stream five q
    """
    from raypkg.methods.deltagrad.requests import batches, read_queue, unanswered

    requests = read_queue(queue)
    with _opened(given) as (books, cluster):
        waiting = unanswered(books, requests)
        click.echo(f"{len(waiting)} of {len(requests)} requests to answer")
        for some in batches(waiting, together):
            _answer(books, some, cluster)


@click.command(cls=ExampleHelp)
@on_run
def verify(**given: Any) -> None:
    """Train again with the samples that are in use and tell how far the model is from that.

    RUN is a run of `effray deltagrad train`. The comparison is what the replays save: it takes the whole time.

    Example:
        effray deltagrad train --name three && effray deltagrad verify three
    """
    from raypkg.methods.deltagrad.run import compare_with_retraining as compare
    from raypkg.methods.deltagrad.show import verdict
    from raypkg.runs.show import terminal

    with _opened(given) as (books, cluster):
        terminal().print(verdict(compare(books, cluster, _follow)))


@click.command(cls=ExampleHelp)
@on_run
def log(**given: Any) -> None:
    """Show what was deleted and added, when and by which request, and check that nothing of it was changed.

    Example:
        effray deltagrad train --name four && effray deltagrad log four
    """
    from raypkg.methods.deltagrad.show import ledger
    from raypkg.runs.show import terminal

    with _opened(given) as (books, _):
        history = books.history()
        history.check()
        terminal().print(ledger(books.ledger.entries))
        click.echo(
            f"{len(books.ledger.entries)} entries and {len(history)} steps of the history are as they were written"
        )


COMMANDS = [delete, add, stream, verify, log]


def _answer_one(kind: str, ids: Any, other: str, value: str | None, names: str, given: dict[str, Any]) -> None:
    from raypkg.methods.deltagrad.requests import Request

    if (ids is None) == (value is None):
        raise UserError(f"give one of {names}")
    with _opened(given) as (books, cluster):
        _answer(books, [Request(kind, ids) if value is None else Request(other, value)], cluster)


def _answer(books: "Books", requests: Sequence["Request"], cluster: "Cluster") -> None:
    from raypkg.methods.deltagrad.requests import change_of
    from raypkg.methods.deltagrad.run import answer

    first = len(books.split)
    entry = answer(books, change_of(books, requests), cluster, _follow)
    new = f" (ids {first} … {len(books.split) - 1})" if entry["new"] else ""
    estimate = "" if entry["estimate"] is None else f", by estimate {entry['estimate']:.1e} from retraining"
    click.echo(
        f"{entry['number']}: {entry['deleted']} deleted, {entry['restored']} put back, {entry['new']} new{new};"
        f" {entry['exact']} of {entry['steps']} steps exact, {entry['gradients']:,} gradients,"
        f" {entry['seconds']:.2f} s{estimate}"
    )


@contextmanager
def _opened(given: dict[str, Any]) -> Iterator[tuple["Books", "Cluster"]]:
    from raypkg.core.settings import Cluster
    from raypkg.methods.deltagrad.books import open_books
    from raypkg.runs.folder import locate

    replay: dict[str, Any] = {f"replay.{n}": given[n] for n in ReplaySettings.model_fields if given.get(n) is not None}
    if replay.keys() & {"replay.period", "replay.burn_in"}:
        if "replay.tolerance" in replay:
            raise UserError("--tolerance chooses the exact steps: --period and --burn-in would do nothing")
        replay["replay.tolerance"] = None
    cluster = Cluster(workers=given["workers"], cpus_per_worker=given["threads"])
    folder = locate(given["root"], given["run"])
    with open_books(folder, DeltaGradSettings, replay) as books:
        yield books, cluster


def _follow(steps: Iterable[Any], total: int) -> Iterable[Any]:
    from rich.progress import track

    from raypkg.runs.show import terminal

    console = terminal()
    return track(steps, "replaying", total, console=console, transient=True, disable=not console.is_terminal)
