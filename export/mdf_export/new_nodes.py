"""Nodes that take the place of others, named under a scope."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper, numpy_helper


class NewNodes:
    """Nodes in the order in which they were made: `nodes`."""

    def __init__(self, scope: str) -> None:
        self.nodes: list[NodeProto] = []
        self._scope = scope

    def op(self, kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Append a node and return its first output."""
        name = f"{self._scope}/{kind}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, inputs, outputs or [name], name=name, **attributes)
        )
        return str(self.nodes[-1].output[0])

    def constant(self, value: npt.NDArray[Any]) -> str:
        return self.op("Constant", value=numpy_helper.from_array(value))

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant: a shape, axes, or bounds."""
        return self.constant(np.array(values, np.int64))
