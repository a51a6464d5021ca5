"""Optimization profiles: which of a plan's ranges of shapes a batch runs in. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from enginehouse.errors import InvalidArgument

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Of one input: shapes, or for a shape tensor its values."""

    least: Shape
    best: Shape
    most: Shape

    def holds(self, shape: Shape) -> bool:
        return len(shape) == len(self.least) and all(
            low <= size <= high for low, size, high in zip(self.least, shape, self.most, strict=True)
        )

    def distance(self, shape: Shape) -> int:
        return sum(abs(size - best) for size, best in zip(shape, self.best, strict=True))

    def __str__(self) -> str:
        return f"{list(self.least)} to {list(self.most)}"


Profile = Mapping[str, Range]
"""By input; inputs of fixed shape are left out."""


def choose_profile(model: str, profiles: Mapping[int, Profile], shapes: Mapping[str, Shape]) -> int:
    """The profile that holds the shapes and was built for the nearest ones.

    Raises InvalidArgument that lists what would fit.
    """
    fitting = {
        number: sum(held.distance(shapes[name]) for name, held in profile.items() if name in shapes)
        for number, profile in profiles.items()
        if all(held.holds(shapes[name]) for name, held in profile.items() if name in shapes)
    }
    if fitting:
        return min(fitting, key=lambda number: fitting[number])
    asked = ", ".join(f"'{name}' {list(shape)}" for name, shape in shapes.items())
    allowed = "; ".join(
        f"profile {number}: " + ", ".join(f"'{name}' {held}" for name, held in profile.items())
        for number, profile in profiles.items()
    )
    raise InvalidArgument(f"model '{model}': no optimization profile of its instance holds {asked}. Allowed: {allowed}")


def profile_numbers(model: str, named: Sequence[str], num_profiles: int) -> list[int]:
    """The instance group's `profile` as numbers; all of the plan's where it names none.

    Raises InvalidArgument for one that the plan lacks.
    """
    if not named:
        return list(range(num_profiles))
    numbers = []
    for text in named:
        if not text.isdigit() or int(text) >= num_profiles:
            raise InvalidArgument(
                f"model '{model}': the instance group names profile '{text}', the plan has 0 to {num_profiles - 1}"
            )
        numbers.append(int(text))
    return numbers


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Shapes to capture a CUDA graph for. Batches of `least_rows` or more rows may use it, the rest being idle."""

    shapes: Mapping[str, Shape]
    least_rows: int

    @property
    def num_rows(self) -> int:
        return max((shape[0] for shape in self.shapes.values() if shape), default=0)

    def holds(self, shapes: Mapping[str, Shape]) -> bool:
        if shapes.keys() != self.shapes.keys():
            return False
        if all(shapes[name] == shape for name, shape in self.shapes.items()):
            return True
        rows = {shape[:1] for shape in shapes.values()}
        same_rest = all(shapes[name][1:] == shape[1:] for name, shape in self.shapes.items())
        return same_rest and len(rows) == 1 and self.least_rows <= rows.pop()[0] <= self.num_rows


def smallest_holding(graphs: Sequence[GraphShape], shapes: Mapping[str, Shape]) -> int | None:
    """Index of the graph to use, or None."""
    holding = [index for index, graph in enumerate(graphs) if graph.holds(shapes)]
    return min(holding, key=lambda index: graphs[index].num_rows) if holding else None
