"""Small PyTorch models for tests, saved in each form. Classes stand here because TorchScript reads their source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn


class Identity(nn.Module):
    def forward(self, INPUT: torch.Tensor) -> torch.Tensor:
        return INPUT


class Counting(nn.Module):
    """Answers with memory of its own, which the next call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Parameter(torch.zeros(1, 4), requires_grad=False)

    def forward(self, INPUT: torch.Tensor) -> torch.Tensor:
        return self.total.add_(INPUT)


class SumAndDifference(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return left + right, left - right


class WithDefault(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2 if scale is None else x * scale


class FromDict(nn.Module):
    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"total": inputs["a"] + inputs["b"]}


class Shout(nn.Module):
    def forward(self, words: list[str]) -> list[str]:
        return [word.upper() for word in words]


class WritesItsInput(nn.Module):
    def forward(self, INPUT: torch.Tensor) -> torch.Tensor:
        return INPUT.add_(1)


class Pair(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


class NamedTupleResult(nn.Module):
    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(x * 2, x + 1)


class NamedResults(nn.Module):
    def forward(self, x: torch.Tensor, *, Mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x * Mask, "hidden": x + 1}


def save_script(path: Path, module: nn.Module) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scripted: Any = torch.jit.script(module)
    scripted.save(str(path))
    return path


def exported(module: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
    """With the first dimension of every tensor free, and the same for all."""
    batch = torch.export.Dim("batch", max=1024)

    def free(_: Any) -> dict[int, Any]:
        return {0: batch}

    names = list(module.forward.__code__.co_varnames[1 : 1 + len(args)])
    shapes = {
        **{name: free(value) for name, value in zip(names, args, strict=True)},
        **{k: free(v) for k, v in kwargs.items()},
    }
    return torch.export.export(module.eval(), args, kwargs, dynamic_shapes=shapes)


def save_export(path: Path, program: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    return path


CLASS_SOURCE = """
import torch
from torch import nn


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        return torch.relu(self.part(x))
"""


def save_class(folder: Path, save: Callable[[Any, Path], None], filename: str) -> nn.Linear:
    """model.py and the weights of its one layer, which is what comes back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(CLASS_SOURCE)
    torch.manual_seed(1)
    linear = nn.Linear(4, 2)
    save({f"part.linear.{key}": value for key, value in linear.state_dict().items()}, folder / filename)
    return linear


class IdentityByName(nn.Module):
    def forward(self, INPUT: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"OUTPUT": INPUT}


class Heavy(nn.Module):
    """As many bytes of weights as asked for, all zero."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_bytes // 4))

    def forward(self, INPUT: torch.Tensor) -> torch.Tensor:
        return INPUT + self.weight.sum()


class HeavyByName(Heavy):
    def forward(self, INPUT: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"OUTPUT": INPUT + self.weight.sum()}
