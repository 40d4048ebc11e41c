"""All commands. Heavy imports, pydantic among them, stay inside: the list of commands needs none."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

import raypkg
from raypkg.core.errors import UserError, unknown
from raypkg.experiments import experiment

from .options import PLACE, ExampleHelp, say
from .runs import diff, evaluate, export, list_runs, predict, remove_runs
from .studies import compare_tables, report_page, tune


class Effray(ExampleHelp, click.Group):
    """Fixed commands, and one for every experiment."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the experiments, then the other commands."""
        return [*experiment.names, *super().list_commands(context)]

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line on each command, without importing an experiment."""
        lines = dict(experiment.lines)
        lines |= {name: self.commands[name].get_short_help_str() for name in super().list_commands(context)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, lines[name]) for name in self.list_commands(context)])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Make the command of an experiment on request."""
        if name in experiment:
            from .setting_options import experiment_command

            return experiment_command(experiment[name])
        return super().get_command(context, name)

    def resolve_command(self, context: click.Context, arguments: list[str]) -> tuple[Any, Any, list[str]]:
        """Name the nearest command to one that does not exist."""
        if arguments[0] not in self.list_commands(context):
            raise unknown("command", arguments[0], self.list_commands(context))
        return super().resolve_command(context, arguments)


CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),  # ``--model_from`` is ``--model-from``
}


@click.group(cls=Effray, context_settings=CONTEXT)
@click.version_option(raypkg.__version__)
def effray() -> None:
    """Gradient-based, data-efficient training on Ray.

    Example:
        effray lipt
    """


for command in (list_runs, remove_runs, predict, evaluate, diff, export, tune, compare_tables, report_page):
    effray.add_command(command)


@effray.command(cls=ExampleHelp, params=[PLACE])
@click.argument("run")
@click.option("--against", metavar="RUN", help="another run whose scores and coreset to compare with")
@click.option("--format", "form", type=click.Choice(["markdown", "latex", "csv", "json"]), help="print the tables so")
def show(run: str, root: str, against: str | None, form: str | None) -> None:
    """Show a finished run: costs, results and the place of its plots; or the trials of a sweep.

    An unfinished run is shown with the progress of its phases and the command that resumes it. RUN is a name, or a path
    to a run folder. --format latex is for a paper (with booktabs), json for programs.

    Example:
        effray lipt --name first && effray show first
    """
    from raypkg.runs.catalog import locate
    from raypkg.runs.document import show_run, terminal
    from raypkg.studies.show import show_resumption, show_study, written
    from raypkg.studies.study import Study, is_study

    from .execute import show_unfinished

    folder = locate(root, run)
    if form:
        if against:
            raise UserError("--against prints no table: leave out --format")
        click.echo(written(folder, form))
        return
    comparison = ""
    if against is not None:
        from raypkg.experiments.coreset_files import compare  # it imports PyTorch

        other = locate(root, against)
        for each in (folder, other):
            if is_study(each.storage):
                raise UserError(f"--against: {each.name} is a sweep, and only runs are compared")
        comparison = compare(folder, other)
    if is_study(folder.storage):
        study = Study(folder.storage)
        show_study(study)
        show_resumption(study, root)
    elif folder.summary is None:
        show_unfinished(folder, root)
    else:
        show_run(folder, terminal())
        if comparison:
            terminal().print(comparison)


@effray.command(cls=ExampleHelp)
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List everything that can be chosen by name; of NAME, the options and the source.

    NAME is a kind in that list, or its first word, such as coreset; or one of the names.

    Example:
        effray methods craig
    """
    from rich.table import Column, Table

    from raypkg.coresets.rules import coreset
    from raypkg.data.sources import dataset
    from raypkg.engine.run import hook
    from raypkg.methods import registries
    from raypkg.models import model
    from raypkg.runs.document import terminal

    kinds = {registry.kind: registry for registry in (experiment, coreset, model, dataset, hook, *registries())}
    if name is None:
        overview = Table("kind", Column("names", overflow="fold"), box=None)  # fits a screen
        for kind, registry in kinds.items():
            overview.add_row(kind, ", ".join(registry.entries))
        terminal().print(overview)
        return
    names = {word for kind, registry in kinds.items() for word in (kind, kind.partition(" ")[0], *registry.entries)}
    if name not in names:
        raise unknown("method", name, names)
    for kind, registry in kinds.items():
        of_kind = name in (kind, kind.partition(" ")[0])
        chosen = [entry for entry in registry.entries.values() if of_kind or name == entry.name]
        columns = [Column(title, overflow="fold") for title in ("name", "what it is", "options", "source")]
        table = Table(*columns, title=kind, title_justify="left")
        for entry in chosen:
            options = ", ".join(f"{option}={field.default}" for option, field in entry.schema.model_fields.items())
            table.add_row(entry.name, entry.help, options, entry.source)
        if chosen:
            terminal().print(table)


@effray.command(cls=ExampleHelp)
@click.argument("name")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="an option of the source, such as size=64")
def data(name: str, pairs: tuple[str, ...]) -> None:
    """Describe a data set; the first time, import it into the cache.

    NAME is what --dataset takes: digits, cifar10, parquet:PATH, folder:PATH or package.module:function.

    Example:
        effray data digits
    """
    from raypkg.data import load_data
    from raypkg.data.opening import describe
    from raypkg.runs.document import terminal

    from .setting_options import parsed_pairs

    terminal().print(describe(name, load_data(name, parsed_pairs(pairs))))


@effray.command(cls=ExampleHelp)
@click.argument("folder", default="effray-tutorial")
def tutorial(folder: str) -> None:
    """Copy a notebook and small data that lead from one's own images to a verdict, in ten minutes.

    FOLDER must not exist (default: effray-tutorial). Most cells are commands, which a terminal runs as well; the
    notebook needs Jupyter (`jupyter lab`).

    Example:
        effray tutorial
    """
    from PIL import Image

    from raypkg.data import load_data

    if (place := Path(folder)).exists():
        raise UserError(f"{place} exists: give a new folder")
    data = load_data("digits")
    x, y = data.train.batch(range(len(data.train)))
    images = {f"digits/{c}/{i:04}.png": each for i, (each, c) in enumerate(zip(x, y.tolist(), strict=True))}
    x, y = data.test.batch(range(len(data.test)))
    images |= {f"new/{c}.png": x[y.tolist().index(c)] for c in range(data.test.num_classes)}  # none is in digits/
    try:
        with TemporaryDirectory(dir=place.parent) as temporary:  # renamed when it is complete
            new = Path(temporary, place.name)
            for file, pixels in images.items():
                new.joinpath(file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[0].numpy()).save(new / file)
            for source in Path(__file__).with_name("tutorial").glob("*.*"):
                shutil.copyfile(source, new / source.name)
            new.rename(place)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from error
    say(f"{place}: open tutorial.ipynb there, as by `cd {place} && jupyter lab tutorial.ipynb`")
