"""A trained model as a pure function with its weights: what is exported."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np


class ExportError(ValueError):
  """No file can give what the checkpoint gives; nothing is written."""


@dataclasses.dataclass(frozen=True)
class Program:
  """What is exported.

  Attributes:
    function: (weights, uint8 images (N, S, S, 3)) -> {'score', 'map'}.
    weights: of the function, by name.
    metadata: what a file says of itself.
  """

  function: Callable[..., dict[str, jax.Array]]
  weights: dict[str, np.ndarray]
  metadata: dict[str, Any]
