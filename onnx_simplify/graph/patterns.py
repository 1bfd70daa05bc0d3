"""Which weights are zero: looked up once for each initializer, however often that is asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

Form = tuple[object, ...]


class Patterns:
    """Boolean arrays that say where initializers are not zero, in one form or several.

    The same weights may serve nodes that read them in different ways (transposed, in groups).
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: dict[str, tuple[gs.Constant, dict[Form, np.ndarray]]] = {}

    def get(self, tensor: gs.Constant, form: Form, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The pattern of an initializer.

        Args:
            tensor: the initializer; another one of the same name is not mistaken for it.
            form: the way in which it is read.
            compute: computes the pattern, if it is not known.
        """
        owner, known = self._known.get(tensor.name, (None, {}))
        if owner is not tensor:
            known = {}
            self._known[tensor.name] = tensor, known
        if form not in known:
            known[form] = compute()
        return known[form]

    def set(self, tensor: gs.Constant, form: Form, pattern: np.ndarray) -> None:
        """Declare what the pattern of a new initializer is."""
        self._known[tensor.name] = tensor, {form: pattern}
