"""The command line: `enginehouse serve|config|…`."""

import click


@click.group()
def main() -> None:
    """One server for every model that you have."""
