"""`enginehouse convert`: builds a TensorRT plan from an ONNX file, on the GPU that will run it.

Which shapes the plan is for is decided here, purely; the building is one function at the end.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from enginehouse.errors import Cancelled, EnginehouseError, Internal, InvalidArgument, Unsupported
from enginehouse_backends.onnx_runtime.onnx_file import OnnxValue, read_onnx_file
from enginehouse_backends.tensorrt_engine.library import load_library, new_logger, require_gpu
from enginehouse_backends.tensorrt_engine.profiles import Range, Shape

PRECISIONS = ("as-is", "fp16", "bf16", "int8", "fp8")
_SIZE = re.compile(r"^(\d+)([KMG]iB)?$")
_FACTORS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class Settings:
    source: Path
    target: Path
    profiles: Sequence[Mapping[str, Range]]
    precision: str = "as-is"
    workspace_bytes: int = 4 << 30
    timing_cache: Path | None = None
    optimization_level: int = 3
    is_version_compatible: bool = False
    is_hardware_compatible: bool = False


# --- which shapes --------------------------------------------------------------------------------------


def parse_shapes(text: str) -> tuple[str, Range]:
    """`name=1x8:4x8:8x8` (least, best, most) or `name=4x8`. Raises InvalidArgument."""
    name, equals, shapes = text.partition("=")
    parts = [
        tuple(int(size) for size in part.split("x")) for part in shapes.split(":") if re.match(r"^\d+(x\d+)*$", part)
    ]
    if not equals or len(parts) != shapes.count(":") + 1 or len(parts) not in (1, 3):
        raise InvalidArgument(
            f"--shapes {text}: it must be NAME=LEAST:BEST:MOST, such as ids=1x16:8x128:32x512, or NAME=SIZES"
        )
    least, best, most = parts if len(parts) == 3 else parts * 3
    in_order = all(a <= b <= c for a, b, c in zip(least, best, most, strict=False))
    if not len(least) == len(best) == len(most) or not in_order:
        raise InvalidArgument(f"--shapes {text}: least, best and most must be of one rank and in order")
    return name, Range(least, best, most)


def complete_profile(inputs: Sequence[OnnxValue], given: Mapping[str, Range], max_batch_size: int) -> dict[str, Range]:
    """A range for every input that varies. Where only the first dimension is free, it is the batch.

    Raises InvalidArgument for inputs that the file lacks, ranges that don't fit, and sizes that nobody gave.
    """
    by_name = {value.name: value for value in inputs}
    for name in given:
        if name not in by_name:
            raise InvalidArgument(f"--shapes {name}: the file's inputs are {', '.join(by_name)}")
    profile: dict[str, Range] = {}
    for value in inputs:
        dims = tuple(dim if isinstance(dim, int) else -1 for dim in value.dims or ())
        if value.name in given:
            profile[value.name] = _checked(value.name, dims, given[value.name])
        elif -1 in dims:
            profile[value.name] = _by_batch(value.name, dims, max_batch_size)
    return profile


def _checked(name: str, dims: Shape, held: Range) -> Range:
    fits = len(held.least) == len(dims) and all(
        dim in (-1, low) and dim in (-1, high) for dim, low, high in zip(dims, held.least, held.most, strict=True)
    )
    if not fits:
        raise InvalidArgument(f"--shapes {name}: {held} doesn't fit the file's {list(dims)} (-1 is free)")
    return held


def _by_batch(name: str, dims: Shape, max_batch_size: int) -> Range:
    if -1 in dims[1:]:
        raise InvalidArgument(
            f"input '{name}' has the shape {list(dims)}: say which sizes it comes in with "
            f"--shapes {name}=LEAST:BEST:MOST"
        )
    rest = dims[1:]
    return Range((1, *rest), (max(1, max_batch_size // 2), *rest), (max_batch_size, *rest))


def parse_size(text: str) -> int:
    found = _SIZE.match(text)
    if found is None:
        raise InvalidArgument(f"{text} is no size; write bytes, or 512MiB, or 4GiB")
    return int(found[1]) * _FACTORS[found[2]]


# --- the command ---------------------------------------------------------------------------------------


@click.command("convert")
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--shapes", multiple=True, metavar="NAME=LEAST:BEST:MOST", help="Sizes that an input comes in.")
@click.option("--max-batch-size", default=8, show_default=True, help="For inputs of which only the batch is free.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="as-is", show_default=True)
@click.option("--workspace", default="4GiB", show_default=True, help="Memory that a kernel may use.")
@click.option("--timing-cache", type=click.Path(dir_okay=False, path_type=Path), help="Makes later builds quicker.")
@click.option("--optimization-level", type=click.IntRange(0, 5), default=3, show_default=True)
@click.option("--version-compatible", is_flag=True, help="Runs on later TensorRT versions too.")
@click.option("--hardware-compatible", is_flag=True, help="Runs on every GPU since Ampere.")
def convert(source: Path, target: Path, shapes: tuple[str, ...], max_batch_size: int, **options: Any) -> None:
    """Build the TensorRT plan TARGET from the ONNX file SOURCE, on this machine's GPU."""
    try:
        given = dict(parse_shapes(text) for text in shapes)
        profile = complete_profile(read_onnx_file(source).inputs, given, max_batch_size)
        settings = Settings(
            source,
            target,
            [profile] if profile else [],
            options["precision"],
            parse_size(options["workspace"]),
            options["timing_cache"],
            options["optimization_level"],
            options["version_compatible"],
            options["hardware_compatible"],
        )
        library = load_library()
        require_gpu(f"converting {source}")
        build(library, settings, Console())
    except EnginehouseError as problem:
        raise click.ClickException(str(problem)) from problem


# --- building ------------------------------------------------------------------------------------------


def build(library: Any, settings: Settings, console: Console) -> None:
    """Writes the target. Raises Internal or Unsupported with TensorRT's own words."""
    logger = new_logger(library)
    builder = library.Builder(logger)
    network = parsed_network(library, builder, logger, settings)
    config = builder.create_builder_config()
    configure(library, builder, config, network, settings)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        monitor = config.progress_monitor = new_monitor(library, progress)
        before = signal.signal(signal.SIGINT, lambda number, frame: monitor.stop())
        try:
            plan = builder.build_serialized_network(network, config)
        finally:
            signal.signal(signal.SIGINT, before)
    if monitor.is_stopped:
        raise Cancelled("stopped; nothing was written")
    if plan is None:
        raise Internal(f"TensorRT can't build {settings.source}: {logger.take()}")
    settings.target.parent.mkdir(parents=True, exist_ok=True)
    settings.target.write_bytes(bytes(plan))
    if settings.timing_cache is not None:
        settings.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    console.print(f"{settings.target}: {settings.target.stat().st_size / (1 << 20):.1f} MiB")


def parsed_network(library: Any, builder: Any, logger: Any, settings: Settings) -> Any:
    network = builder.create_network(0)
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(settings.source)):
        problems = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise Unsupported(f"TensorRT can't read {settings.source}: {problems or logger.take()}")
    return network


def configure(library: Any, builder: Any, config: Any, network: Any, settings: Settings) -> None:
    config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    for flag in builder_flags(library, settings):
        config.set_flag(flag)
    if settings.is_hardware_compatible:
        config.hardware_compatibility_level = library.HardwareCompatibilityLevel.AMPERE_PLUS
    for ranges in settings.profiles:
        profile = builder.create_optimization_profile()
        for name, held in ranges.items():
            profile.set_shape(name, held.least, held.best, held.most)
        config.add_optimization_profile(profile)
    cache_path = settings.timing_cache
    if cache_path is not None:
        content = cache_path.read_bytes() if cache_path.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(content), False)


def builder_flags(library: Any, settings: Settings) -> list[Any]:
    """Raises Unsupported where this TensorRT takes precisions from the file alone (11 and later)."""
    flags = []
    if settings.precision != "as-is":
        name = settings.precision.upper()
        if not hasattr(library.BuilderFlag, name):
            raise Unsupported(
                f"TensorRT {library.__version__} computes in the types that the ONNX file says: export it in "
                f"{settings.precision} and convert it as it is"
            )
        flags.append(getattr(library.BuilderFlag, name))
    if settings.is_version_compatible:
        flags.append(library.BuilderFlag.VERSION_COMPATIBLE)
    return flags


def new_monitor(library: Any, progress: Progress) -> Any:
    """TensorRT's phases as nested bars. Ctrl-C ends the build at its next step."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self._task_by_phase: dict[str, TaskID] = {}
            self.is_stopped = False

        def stop(self) -> None:
            self.is_stopped = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._task_by_phase[phase_name] = progress.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._task_by_phase:
                progress.update(self._task_by_phase[phase_name], completed=step + 1)
            return not self.is_stopped

        def phase_finish(self, phase_name: str) -> None:
            task = self._task_by_phase.pop(phase_name, None)
            if task is not None:
                progress.remove_task(task)

    return Monitor()
