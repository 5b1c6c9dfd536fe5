"""Functions of the fit under torch.compile, with the plain function where that is impossible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Compiler:
    """Compiles the functions of one fit; `disable` makes all of them plain again.

    Attributes:
        enabled: whether functions run compiled.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def wrap(self, function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
        """The function, compiled when first called with some shapes.

        Args:
            function: without side effects.
            dynamic: as in torch.compile; False = anew for every shape.
        """
        if not self.enabled:
            return function
        compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=dynamic)

        def call(*arguments: Any) -> Any:
            return compiled(*arguments) if self.enabled else function(*arguments)

        return call

    def disable(self, error: Exception) -> None:
        """Goes on without compiled functions, saying why."""
        self.enabled = False
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        logger.warning("Fitting without compiled kernels, which is slower: %s", reason)


def varying(tensor: Tensor, axis: int = 0) -> Tensor:
    """The same values for a compiled function, which must expect another size of `axis` later.

    An alias, because the sizes of parameters themselves count as fixed.
    """
    alias = tensor.view_as(tensor)
    torch._dynamo.maybe_mark_dynamic(alias, axis)
    return alias
