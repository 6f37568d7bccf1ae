"""Writes a JAX function as ONNX, primitive by primitive.

`onnx_primitives` translates the single primitives; a primitive that ONNX cannot
compute as jax does raises `UnknownPrimitiveError`. What does not depend on the
images is computed while writing and stored as a constant.

Synopsis:

  onnx.write('model.onnx', lambda images: {'score': ...}, (256, 256, 3),
             {'category': 'screw'})
"""

from collections.abc import Callable, Mapping, Sequence
import json
from typing import Any

import jax
from jax import export as jax_export
from jax.extend import core as jax_core
import numpy as np

from dmdd_jax.export import onnx_primitives as primitives

OPSET = 18
# The version of the file format that came with the opset.
_IR_VERSION = 8

UnknownPrimitiveError = primitives.UnknownPrimitiveError


def write(
  path: str,
  function: Callable[[jax.Array], Mapping[str, jax.Array]],
  shape: Sequence[int],
  metadata: Mapping[str, Any],
) -> None:
  """Writes an ONNX model with one input, `images`, of any batch size.

  Args:
    path: the file.
    function: uint8 images (N, *shape) -> named outputs, their first axis N.
    shape: of one image.
    metadata: becomes the file's properties, beside the opset; values that are
      not text are stored as JSON.

  Raises:
    UnknownPrimitiveError: a primitive cannot be translated; the message names
      it and the parameters or types that prevent it. No file is written.
    ModuleNotFoundError: the package `onnx` is missing.
  """
  onnx = _import_onnx()
  (batch,) = jax_export.symbolic_shape('batch')
  spec = jax.ShapeDtypeStruct((batch, *shape), np.uint8)
  closed, outputs = jax.make_jaxpr(function, return_shape=True)(spec)
  graph = _Graph(onnx)
  values = graph.run(closed.jaxpr, closed.consts, ['images'])
  names = [
    path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(outputs)
  ]
  for name, value in zip(names, values, strict=True):
    graph.add('Identity', [value], outputs=[name])
  model = onnx.helper.make_model(
    onnx.helper.make_graph(
      graph.nodes,
      'dmdd_jax',
      [graph.describe('images', spec)],
      [graph.describe(name, outputs[name]) for name in names],
      graph.constants,
    ),
    opset_imports=[onnx.helper.make_opsetid('', OPSET)],
    ir_version=_IR_VERSION,
    producer_name='dmdd_jax',
  )
  properties = {'opset': OPSET, **metadata}
  onnx.helper.set_model_props(
    model,
    {
      name: value if isinstance(value, str) else json.dumps(value)
      for name, value in properties.items()
    },
  )
  onnx.checker.check_model(model)
  onnx.save(model, path)


def _import_onnx() -> Any:
  try:
    import onnx
    import onnx.helper
    import onnx.numpy_helper
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "--format=onnx needs the extra: pip install -e '.[onnx]'"
    ) from error
  return onnx


class _Graph:
  """Nodes and constants of an ONNX graph in the making."""

  def __init__(self, onnx: Any):
    self.nodes, self.constants = [], []
    self._onnx, self._count = onnx, 0

  def run(
    self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[primitives.Value]
  ) -> list[primitives.Value]:
    """Translates a jaxpr; returns the values of its outputs."""
    values = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    values |= zip(jaxpr.invars, inputs, strict=True)

    def value(atom: Any) -> primitives.Value:
      if isinstance(atom, jax_core.Literal):
        return np.asarray(atom.val, atom.aval.dtype)
      if values[atom] is None:
        raise UnknownPrimitiveError(
          "top_k's indices are read, and only its values have a translation to"
          ' ONNX in dmdd_jax/export/onnx_primitives.py; use --format=stablehlo'
        )
      return values[atom]

    for equation in jaxpr.eqns:
      arguments = [value(atom) for atom in equation.invars]
      results = self._translate(equation, arguments)
      values |= zip(equation.outvars, results, strict=True)
    return [value(atom) for atom in jaxpr.outvars]

  def add(
    self,
    operator: str,
    inputs: Sequence[primitives.Value],
    outputs: Sequence[str] = ('',),
    **attributes: Any,
  ) -> str:
    """Adds a node; returns the name of its first output."""
    outputs = [name or self._name() for name in outputs]
    names = [self._as_name(value) for value in inputs]
    self.nodes.append(
      self._onnx.helper.make_node(operator, names, outputs, **attributes)
    )
    return outputs[0]

  def describe(self, name: str, spec: jax.ShapeDtypeStruct) -> Any:
    """The declared type of an input or output."""
    shape = [d if isinstance(d, int) else str(d) for d in spec.shape]
    return self._onnx.helper.make_tensor_value_info(
      name, self.element_type(spec.dtype), shape
    )

  def element_type(self, dtype: Any) -> int:
    """ONNX's number of a numpy type."""
    return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

  def _name(self) -> str:
    self._count += 1
    return f'v{self._count}'

  def _as_name(self, value: primitives.Value) -> str:
    if isinstance(value, str):
      return value
    name = self._name()
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    self.constants.append(self._onnx.numpy_helper.from_array(array, name))
    return name

  def _translate(
    self, equation: Any, inputs: list[primitives.Value]
  ) -> list[primitives.Value | None]:
    """The values of an equation's outputs."""
    name, parameters = equation.primitive.name, equation.params
    if name in primitives.CALLS:
      inner = parameters[primitives.CALLS[name]]
      return self.run(inner.jaxpr, inner.consts, inputs)
    if name in ('stop_gradient', 'copy', 'copy_p'):
      return inputs
    if not any(isinstance(value, str) for value in inputs):
      return primitives.constants(equation, inputs)
    # Only top_k has more outputs; `run` refuses where they are read.
    output = primitives.translate(self, equation, inputs)
    return [output] + [None] * (len(equation.outvars) - 1)
