"""How a client wants each output of one request: as values, as bytes, as classes, or in shared memory.

Read by both protocols' codecs from the request, used by them again on the answer. The core never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from enginehouse.core import ServedVersion
from enginehouse.errors import Internal
from enginehouse.frontends.classification import classify
from enginehouse.frontends.shared_memory.regions import Lease
from enginehouse.types import Tensor


@dataclass(slots=True)
class OutputOption:
    """`num_classes` 0 asks for the tensor itself; `lease` is the range of shared memory it goes to."""

    binary: bool = False
    num_classes: int = 0
    lease: Lease | None = None


@dataclass(slots=True)
class OutputOptions:
    """`default` is for outputs that the request doesn't name. `leases` holds inputs' ranges too."""

    by_name: dict[str, OutputOption] = field(default_factory=dict)
    default: OutputOption = field(default_factory=OutputOption)
    leases: list[Lease] = field(default_factory=list)

    def of(self, name: str) -> OutputOption:
        return self.by_name.get(name, self.default)

    def release(self) -> None:
        """Gives the shared memory back; when the answer is written."""
        for lease in self.leases:
            lease.release()
        self.leases.clear()


def classified(tensor: Tensor, option: OutputOption, served: ServedVersion) -> Tensor:
    """The classes of the output where they were asked for, else the output."""
    if option.num_classes == 0:
        return tensor
    labels: Sequence[str] = served.labels.get(tensor.name, ())
    return classify(tensor, option.num_classes, labels, batched=served.config.max_batch_size > 0)


def write_to_lease(tensor: Tensor, lease: Lease) -> None:
    """Raises Internal where the client left too little room."""
    if tensor.nbytes > lease.num_bytes:
        raise Internal(
            f"shared memory size specified with the request for output '{tensor.name}' ({lease.num_bytes} "
            f"bytes) should be at least {tensor.nbytes} bytes to hold the results"
        )
    lease.write(tensor.host_data())
