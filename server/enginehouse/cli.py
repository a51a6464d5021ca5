"""The command line: `enginehouse serve|config|…`. Parsing only; the work is elsewhere."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Any

import click

from enginehouse import __version__
from enginehouse.config.commands import config_group


class BroughtCommand(click.Command):
    """A command of a backend, found by the entry point group `enginehouse.commands`; imported when it is used."""

    def __init__(self, entry: metadata.EntryPoint) -> None:
        super().__init__(entry.name, short_help=f"From {entry.module}.")
        self._entry = entry

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            command: click.Command = self._entry.load()
        except ImportError as problem:
            raise click.ClickException(f"'{self.name}' can't be loaded: {problem}") from problem
        return command.make_context(info_name, args, parent, **extra)


class CommandLine(click.Group):
    """Our own commands, and those that backends bring."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_installed_commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is not None or cmd_name not in _installed_commands():
            return command
        return BroughtCommand(_installed_commands()[cmd_name])


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
