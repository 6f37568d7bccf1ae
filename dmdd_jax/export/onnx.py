"""Writes a JAX function as ONNX, primitive by primitive.

Only what this package's models are made of is known; anything else is an error,
never an approximation. What depends on no input is computed here and stored.
Convolutions and poolings carry their explicit padding over (converters have
dropped it), between two transpositions that runtimes optimise away.

Synopsis:

  onnx_writer.write('model.onnx', lambda images: {'score': ...}, (256, 256, 3),
                    {'category': 'screw'})
"""

from collections.abc import Callable, Mapping, Sequence
import json
import string
from typing import Any, NoReturn

import jax
from jax import export as jax_export
from jax.extend import core as jax_core
import numpy as np

OPSET = 18
# The version of the file format that came with the opset.
_IR_VERSION = 8

# A tensor of the graph by its name, or a value known now.
Value = str | np.ndarray


class UnknownPrimitiveError(ValueError):
  """The function has a part that is not translated."""


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
    metadata: goes to the file's properties, with the opset; what is no text
      as JSON.

  Raises:
    UnknownPrimitiveError: naming the primitive.
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
    self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value]
  ) -> list[Value]:
    """Translates a jaxpr; returns the values of its outputs."""
    values = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    values |= zip(jaxpr.invars, inputs, strict=True)

    def value(atom: Any) -> Value:
      if isinstance(atom, jax_core.Literal):
        return np.asarray(atom.val)
      if values[atom] is None:
        raise UnknownPrimitiveError(
          "top_k's indices are read, and only its values have a translation to"
          ' ONNX in dmdd_jax/export/onnx.py; use --format=stablehlo'
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
    inputs: Sequence[Value],
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
    shape = [d if isinstance(d, int) else 'batch' for d in spec.shape]
    return self._onnx.helper.make_tensor_value_info(
      name, self.element_type(spec.dtype), shape
    )

  def element_type(self, dtype: Any) -> int:
    """ONNX's number of a numpy type."""
    return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

  def _name(self) -> str:
    self._count += 1
    return f'v{self._count}'

  def _as_name(self, value: Value) -> str:
    if isinstance(value, str):
      return value
    name = self._name()
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    self.constants.append(self._onnx.numpy_helper.from_array(array, name))
    return name

  def _translate(
    self, equation: Any, inputs: list[Value]
  ) -> list[Value | None]:
    """The values of an equation's outputs."""
    name, parameters = equation.primitive.name, equation.params
    if name in _CALLS:
      inner = parameters[_CALLS[name]]
      return self.run(inner.jaxpr, inner.consts, inputs)
    if name in ('stop_gradient', 'copy', 'copy_p'):
      return inputs
    if name == 'broadcast_in_dim':
      return [_broadcast(self, equation, inputs[0])]
    if not any(isinstance(value, str) for value in inputs):
      values = equation.primitive.bind(*inputs, **parameters)
      values = values if equation.primitive.multiple_results else [values]
      return [np.asarray(value) for value in values]
    if name in _ELEMENTWISE:
      return [self.add(_ELEMENTWISE[name], inputs)]
    if name not in _TRANSLATIONS:
      raise UnknownPrimitiveError(
        f'{name} has no translation to ONNX in dmdd_jax/export/onnx.py; use'
        ' --format=stablehlo'
      )
    output = _TRANSLATIONS[name](self, equation, inputs)
    # Only top_k has more outputs; `run` refuses where they are read.
    return [output] + [None] * (len(equation.outvars) - 1)


# What runs a function once and as it is, and which parameter that is.
_CALLS = {
  'closed_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
}
_ELEMENTWISE = {
  'abs': 'Abs',
  'add': 'Add',
  'div': 'Div',
  'exp': 'Exp',
  'logistic': 'Sigmoid',
  'max': 'Max',
  'min': 'Min',
  'mul': 'Mul',
  'neg': 'Neg',
  'sqrt': 'Sqrt',
  'sub': 'Sub',
}


def _refuse(equation: Any, *parameters: str) -> NoReturn:
  """Raises UnknownPrimitiveError naming a primitive and its parameters."""
  values = ', '.join(f'{name}={equation.params[name]}' for name in parameters)
  raise UnknownPrimitiveError(
    f'{equation.primitive.name} with {values} has no translation to ONNX in'
    ' dmdd_jax/export/onnx.py; use --format=stablehlo'
  )


def _sizes(shape: Sequence[Any], batch: int) -> np.ndarray:
  """A shape as ONNX has it, with `batch` in the place of the symbolic size."""
  return np.array([d if isinstance(d, int) else batch for d in shape], np.int64)


def _broadcast(graph: _Graph, equation: Any, value: Value) -> Value:
  """Known values keep 1 for the batch: what meets them broadcasts."""
  shape = equation.params['shape']
  (source,), axes = equation.invars, equation.params['broadcast_dimensions']
  spread = [1] * len(shape)
  for axis, size in zip(axes, source.aval.shape):
    spread[axis] = size
  target = _sizes(shape, 1)
  if not isinstance(value, str):
    return np.broadcast_to(np.reshape(value, _sizes(spread, 1)), target)
  if len(spread) != len(source.aval.shape):
    value = graph.add('Reshape', [value, _sizes(spread, -1)])
  if list(_sizes(spread, 1)) != list(target):
    value = graph.add('Expand', [value, target])
  return value


def _reshape(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  shape = equation.outvars[0].aval.shape
  return graph.add('Reshape', [inputs[0], _sizes(shape, -1)])


def _transpose(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  permutation = list(equation.params['permutation'])
  return graph.add('Transpose', inputs, perm=permutation)


def _convolution(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  """NHWC or any other order, to ONNX's NCHW and back."""
  parameters = equation.params
  numbers = parameters['dimension_numbers']
  x, kernel = inputs
  if (
    isinstance(kernel, str)
    or set(parameters['lhs_dilation']) != {1}
    or parameters['batch_group_count'] != 1
  ):
    _refuse(equation, 'lhs_dilation', 'batch_group_count')
  x = graph.add('Transpose', [x], perm=list(numbers.lhs_spec))
  x = graph.add(
    'Conv',
    [x, np.transpose(kernel, numbers.rhs_spec)],
    strides=list(parameters['window_strides']),
    pads=_pads(parameters['padding']),
    dilations=list(parameters['rhs_dilation']),
    group=parameters['feature_group_count'],
  )
  back = [int(axis) for axis in np.argsort(numbers.out_spec)]
  return graph.add('Transpose', [x], perm=back)


def _max_pool(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  """Over height and width of an NHWC array alone."""
  parameters = equation.params
  sides = ('window_dimensions', 'window_strides', 'window_dilation')
  for name in (*sides, 'base_dilation', 'padding'):
    value = parameters[name]
    plain = (0, 0) if name == 'padding' else 1
    outer = value if name == 'base_dilation' else (value[0], *value[3:])
    if len(value) != 4 or any(item != plain for item in outer):
      _refuse(equation, name)
  x = graph.add('Transpose', inputs, perm=[0, 3, 1, 2])
  x = graph.add(
    'MaxPool',
    [x],
    kernel_shape=list(parameters['window_dimensions'][1:3]),
    strides=list(parameters['window_strides'][1:3]),
    pads=_pads(parameters['padding'][1:3]),
    dilations=list(parameters['window_dilation'][1:3]),
  )
  return graph.add('Transpose', [x], perm=[0, 2, 3, 1])


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
  """ONNX lists all starts, then all ends."""
  return [low for low, _ in padding] + [high for _, high in padding]


def _dot(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  """A product with contracted and batch axes, as an Einsum."""
  contracted, shared = equation.params['dimension_numbers']
  letters = iter(string.ascii_lowercase)
  names = [[''] * len(atom.aval.shape) for atom in equation.invars]
  for axes in (shared, contracted):
    for left, right in zip(*axes):
      names[0][left] = names[1][right] = next(letters)
  for side in names:
    side[:] = [name or next(letters) for name in side]
  kept = [names[0][axis] for axis in shared[0]]
  for side, (inner, outer) in enumerate(zip(contracted, shared)):
    kept += [
      name
      for axis, name in enumerate(names[side])
      if axis not in (*inner, *outer)
    ]
  left, right = (''.join(side) for side in names)
  return graph.add(
    'Einsum', inputs, equation=f'{left},{right}->{"".join(kept)}'
  )


def _reduce(operator: str) -> Callable[..., str]:
  def translate(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
    axes = np.array(equation.params['axes'], np.int64)
    return graph.add(operator, [inputs[0], axes], keepdims=0)

  return translate


def _concatenate(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  return graph.add('Concat', inputs, axis=equation.params['dimension'])


def _stack(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  axis = equation.params['axis']
  parts = [graph.add('Unsqueeze', [x, np.array([axis])]) for x in inputs]
  return graph.add('Concat', parts, axis=axis)


def _gather(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  """x[..., i] with a known i: one index along one axis."""
  numbers = equation.params['dimension_numbers']
  axes, index = numbers.start_index_map, inputs[1]
  if (
    isinstance(index, str)
    or index.size != 1
    or tuple(axes) != tuple(numbers.collapsed_slice_dims)
  ):
    _refuse(equation, 'dimension_numbers')
  slices = list(equation.params['slice_sizes'])
  size = equation.invars[0].aval.shape
  whole = all(
    isinstance(length, str)
    or slices[i] == length
    or not isinstance(length, int)
    for i, length in enumerate(size)
    if i != axes[0]
  )
  if (
    slices[axes[0]] != 1
    or not whole
    or getattr(numbers, 'operand_batching_dims', ())
  ):
    _refuse(equation, 'slice_sizes')
  return graph.add(
    'Gather', [inputs[0], index.reshape(()).astype(np.int64)], axis=axes[0]
  )


def _slice(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  """Of any axes but the batch, which is always taken whole."""
  parameters = equation.params
  size = equation.invars[0].aval.shape
  axes = [i for i, length in enumerate(size) if isinstance(length, int)]
  strides = parameters['strides'] or (1,) * len(size)
  for i, length in enumerate(size):
    bounds = parameters['start_indices'][i], parameters['limit_indices'][i]
    if i not in axes and (bounds != (0, length) or strides[i] != 1):
      _refuse(equation, 'start_indices', 'limit_indices', 'strides')
  parts = (parameters['start_indices'], parameters['limit_indices'])
  arrays = [np.array([part[i] for i in axes], np.int64) for part in parts]
  steps = np.array([strides[i] for i in axes], np.int64)
  return graph.add('Slice', [inputs[0], *arrays, np.array(axes), steps])


def _reverse(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  axes = np.array(equation.params['dimensions'], np.int64)
  start, step = np.full_like(axes, -1), np.full_like(axes, -1)
  end = np.full_like(axes, np.iinfo(np.int64).min)
  return graph.add('Slice', [inputs[0], start, end, axes, step])


def _cast(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  return graph.add(
    'Cast', inputs, to=graph.element_type(equation.params['new_dtype'])
  )


def _square(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  del equation
  return graph.add('Mul', [inputs[0], inputs[0]])


def _power(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  exponent = np.float32(equation.params['y'])
  return graph.add('Pow', [inputs[0], np.asarray(exponent)])


def _reciprocal_root(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  del equation
  return graph.add('Reciprocal', [graph.add('Sqrt', inputs)])


def _top_k(graph: _Graph, equation: Any, inputs: list[Value]) -> str:
  count = np.array([equation.params['k']], np.int64)
  return graph.add(
    'TopK',
    [inputs[0], count],
    outputs=['', ''],
    axis=equation.params['axis'],
  )


_TRANSLATIONS = {
  'concatenate': _concatenate,
  'conv_general_dilated': _convolution,
  'convert_element_type': _cast,
  'dot_general': _dot,
  'expand_dims': _reshape,
  'gather': _gather,
  'integer_pow': _power,
  'reduce_max': _reduce('ReduceMax'),
  'reduce_sum': _reduce('ReduceSum'),
  'reduce_window_max': _max_pool,
  'reshape': _reshape,
  'rev': _reverse,
  'rsqrt': _reciprocal_root,
  'slice': _slice,
  'square': _square,
  'squeeze': _reshape,
  'stack': _stack,
  'top_k': _top_k,
  'transpose': _transpose,
}
