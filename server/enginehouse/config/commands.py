"""`enginehouse config lint|show|convert|…`: the command line of this package. Prints; decides nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from enginehouse.config import tensors
from enginehouse.config.completion import at_poll
from enginehouse.config.json_form import to_wire
from enginehouse.config.json_schema import json_schema
from enginehouse.config.lint import Finding, Severity, is_model_folder, lint_file, lint_model, lint_repository
from enginehouse.config.reading import SUFFIXES, config_path, print_config, read_config, read_file
from enginehouse.config.reference import reference
from enginehouse.config.schema import ModelConfig
from enginehouse.config.validation import check_tensors
from enginehouse.errors import EnginehouseError
from enginehouse.types import TensorSpec

_SPELLINGS = {"pbtxt": ".pbtxt", "yaml": ".yaml", "json": ".json"}
_EXISTING = click.Path(exists=True, path_type=Path)
_variant = click.option("--model-config-name", "variant", default="", help="Read configs/NAME where it is.")


@click.group("config")
def config_group() -> None:
    """Check, print and convert model configs."""


@config_group.command()
@click.argument("paths", nargs=-1, required=True, type=_EXISTING)
@_variant
@click.option("--strict", is_flag=True, help="Warnings fail, too.")
def lint(paths: tuple[Path, ...], variant: str, strict: bool) -> None:
    """Say what is wrong or odd about configs, models or whole repositories.

    Exits with 1 if something is wrong.
    """
    findings = [finding for path in paths for finding in _findings(path, variant)]
    for finding in findings:
        click.echo(str(finding))
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    warnings = len(findings) - errors
    click.echo(f"{errors} errors, {warnings} warnings" if findings else "nothing wrong", err=True)
    sys.exit(1 if errors or (strict and warnings) else 0)


def _findings(path: Path, variant: str) -> Iterator[Finding]:
    if path.is_file():
        return lint_file(path)
    if is_model_folder(path):
        return lint_model(path.resolve(), variant)
    return lint_repository(path, variant)


@config_group.command()
@click.argument("path", type=_EXISTING)
@click.option("--format", "spelling", type=click.Choice([*_SPELLINGS, "wire"]), default="yaml", show_default=True)
@click.option("--as-written", is_flag=True, help="Without what the server adds.")
@click.option("--explain", is_flag=True, help="Show instead what a client sends and gets, and what the model sees.")
@_variant
def show(path: Path, spelling: str, as_written: bool, explain: bool, variant: str) -> None:
    """Print a model's config as the server completes it, before the backend looks.

    `wire` is what /v2/models/M/config answers.
    """
    try:
        config = _config_of(path, variant, as_written)
    except EnginehouseError as error:
        raise click.ClickException(str(error)) from None
    if explain:
        click.echo(explanation(config))
    elif spelling == "wire":
        click.echo(json.dumps(to_wire(config), indent=2, ensure_ascii=False))
    else:
        click.echo(print_config(config, _SPELLINGS[spelling]), nl=False)


def _config_of(path: Path, variant: str, as_written: bool) -> ModelConfig:
    if path.is_file():
        return read_file(path).config
    found = read_config(path, variant)
    config = found.config if found is not None else ModelConfig()
    return config if as_written else at_poll(config, path.resolve())


def explanation(config: ModelConfig) -> str:
    """Shapes with the batch axis, as clients send them and as the model sees them."""
    if problem := next(check_tensors(config), None):
        return f"not clear before the backend has looked: {problem.text}"
    rows = int(config.max_batch_size)
    batch = f"up to {rows} rows in front" if rows else "no batch axis (max_batch_size is 0)"
    lines = [f"{config.name}: {config.backend or config.platform or 'no backend'}, {batch}"]
    views = (
        ("input", tensors.request_inputs(config), tensors.model_inputs(config)),
        ("output", tensors.request_outputs(config), tensors.model_outputs(config)),
    )
    for direction, outside, inside in views:
        for seen, own in zip(outside, inside, strict=True):
            text = f"  {direction} {seen.name}: {seen.datatype.wire_name} {_shape(seen)}"
            text += f", {_shape(own)} in the model" if own.dims != seen.dims else ""
            lines.append(text + (", may be left out" if seen.optional else ""))
    return "\n".join(lines)


def _shape(spec: TensorSpec) -> str:
    return "[" + ", ".join("any" if dim < 0 else str(dim) for dim in spec.dims) + "]"


@config_group.command()
@click.argument("path", type=_EXISTING)
@click.option("--to", "spelling", type=click.Choice(list(_SPELLINGS)), help="Default: that of --output, or yaml.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="A file to write. Default: standard output.")
@_variant
def convert(path: Path, spelling: str | None, output: Path | None, variant: str) -> None:
    """Write a config in another spelling. PATH is a config file or a model's folder."""
    try:
        source = config_path(path, variant) if path.is_dir() else path
        if source is None:
            raise click.ClickException(f"{path} has no config file")
        suffix = _SPELLINGS[spelling] if spelling else (output.suffix if output is not None else ".yaml")
        if suffix not in SUFFIXES:
            raise click.ClickException(f"'{suffix}' is no spelling; there are {', '.join(SUFFIXES)}")
        content = print_config(read_file(source).config, suffix)
    except EnginehouseError as error:
        raise click.ClickException(str(error)) from None
    if output is None:
        click.echo(content, nl=False)
    else:
        output.write_text(content, encoding="utf-8")


@config_group.command()
def schema() -> None:
    """Print the JSON Schema of config.yaml and config.json, for editors."""
    click.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


@config_group.command("reference")
def print_reference() -> None:
    """Print every field with its type and meaning, as Markdown."""
    click.echo(reference(), nl=False)
