"""The command line: `enginehouse serve|config|…`. Parsing only; the work is elsewhere."""

from __future__ import annotations

import os
import sys
from importlib import metadata

import click

from enginehouse import __version__
from enginehouse.config.commands import config_group


class CommandLine(click.Group):
    """Backends bring commands of their own by the entry point group `enginehouse.commands`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *_installed_commands()})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        command = super().get_command(context, name)
        if command is not None or name not in _installed_commands():
            return command
        try:
            loaded: click.Command = _installed_commands()[name].load()
        except ImportError as problem:
            raise click.ClickException(f"'{name}' can't be loaded: {problem}") from problem
        return loaded


def _installed_commands() -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group="enginehouse.commands")}


@click.group(cls=CommandLine)
@click.version_option(__version__, prog_name="enginehouse")
def main() -> None:
    """One server for every model that you have."""


main.add_command(config_group)


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def serve(flags: tuple[str, ...]) -> None:
    """Serve model repositories. Takes Triton's flags; --help lists them."""
    from enginehouse.options import HelpRequested, OptionError, parse_options

    try:
        options = parse_options(flags, os.environ)
    except HelpRequested as request:
        click.echo(str(request))
        return
    except OptionError as problem:
        click.echo(str(problem), err=True)
        sys.exit(1)
    from enginehouse.app import run

    sys.exit(run(options))
