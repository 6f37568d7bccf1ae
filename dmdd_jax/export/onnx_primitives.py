"""ONNX operators for the primitives of this package's models.

A primitive is translated only if ONNX computes what jax does; everything else
raises `UnknownPrimitiveError`. So arithmetic is on float32 alone, and the uint8
images are only moved and cast to float32. Infinities and NaN are not promised:
runtimes differ on them. A constant cannot have the batch's size in its shape.

Convolutions and poolings keep their explicit padding, which other converters
have dropped. They stand between two transpositions, which runtimes optimise
away.
"""

from collections.abc import Callable, Sequence
import string
from typing import Any, NoReturn

import numpy as np

# The name of a tensor that depends on the images, or a constant.
Value = str | np.ndarray


class UnknownPrimitiveError(ValueError):
  """The function has a primitive that ONNX cannot compute as jax does."""


# Primitives that call a function once, and the parameter that holds it.
CALLS = {
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


# Primitives that compute nothing, so uint8 can pass through them.
_MOVES = {
  'broadcast_in_dim',
  'concatenate',
  'convert_element_type',
  'expand_dims',
  'gather',
  'reshape',
  'rev',
  'slice',
  'squeeze',
  'stack',
  'transpose',
}


def translate(graph: Any, equation: Any, inputs: list[Value]) -> Value:
  """Adds the nodes of an equation that depends on the images.

  Args:
    graph: `add(operator, inputs, **attributes)` adds a node and returns the
      name of its output.
    equation: of a jaxpr; of its outputs only the first is computed.
    inputs: one for each input of the equation; at least one is a name.

  Returns:
    The equation's first output.

  Raises:
    UnknownPrimitiveError: ONNX cannot compute it as jax does.
  """
  name = equation.primitive.name
  if name not in _ELEMENTWISE and name not in _TRANSLATIONS:
    raise UnknownPrimitiveError(
      f'{name} has no translation to ONNX in'
      ' dmdd_jax/export/onnx_primitives.py; use --format=stablehlo'
    )
  _check_types(equation)
  if name in _ELEMENTWISE:
    return graph.add(_ELEMENTWISE[name], inputs)
  return _TRANSLATIONS[name](graph, equation, inputs)


def constants(equation: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  """The outputs of an equation that does not depend on the images.

  Raises:
    UnknownPrimitiveError: they depend on the size of the batch.
  """
  if equation.primitive.name == 'dim_as_value':
    _refuse(equation, 'dim')
  if any(_symbolic(atom.aval.shape) for atom in equation.outvars):
    # Where the shape is a parameter, it tells more than the types do.
    _refuse(equation, *({'shape'} & equation.params.keys()))
  values = equation.primitive.bind(*inputs, **equation.params)
  values = values if equation.primitive.multiple_results else [values]
  return [np.asarray(value) for value in values]


def _refuse(equation: Any, *parameters: str, reason: str = '') -> NoReturn:
  """Raises UnknownPrimitiveError naming the primitive and what prevents it.

  Args:
    equation: holds the primitive.
    *parameters: the names of the parameters that prevent it.
    reason: what else prevents it; the types if neither is given.
  """
  reasons = [f'{name}={equation.params[name]}' for name in parameters]
  if reason:
    reasons.insert(0, reason)
  if not reasons:
    inputs, outputs = (
      ', '.join(str(atom.aval) for atom in atoms)
      for atoms in (equation.invars, equation.outvars)
    )
    reasons = [f'{inputs or "no input"} -> {outputs}']
  raise UnknownPrimitiveError(
    f'{equation.primitive.name} with {", ".join(reasons)} has no translation to'
    ' ONNX in dmdd_jax/export/onnx_primitives.py; use --format=stablehlo'
  )


def _check_types(equation: Any) -> None:
  """Refuses arithmetic on anything but float32, and arrays without elements."""
  name = equation.primitive.name
  # A gather's index is a constant, and a top_k's index is never read.
  data = [equation.invars[0]] if name == 'gather' else equation.invars
  types = {atom.aval.dtype for atom in (*data, equation.outvars[0])}
  allowed = {np.dtype(np.float32)}
  if name in _MOVES:
    allowed.add(np.dtype(np.uint8))
  # In a Reshape of ONNX, a size of 0 means the size of the input.
  empty = any(
    0 in atom.aval.shape for atom in (*equation.invars, *equation.outvars)
  )
  if empty or not types <= allowed:
    _refuse(equation)


def _symbolic(shape: Sequence[Any]) -> list[Any]:
  """The sizes that depend on the batch's."""
  return [size for size in shape if not isinstance(size, int)]


def _sizes(equation: Any, shape: Sequence[Any]) -> np.ndarray:
  """A shape for Reshape, which infers one size, the one of the batch, as -1."""
  if len(_symbolic(shape)) > 1:
    _refuse(equation)
  return np.array([d if isinstance(d, int) else -1 for d in shape], np.int64)


def _broadcast(graph: Any, equation: Any, inputs: list[Value]) -> Value:
  """Adds axes and repeats along axes, the batch's axis excepted."""
  shape = equation.params['shape']
  (source,), axes = equation.invars, equation.params['broadcast_dimensions']
  spread = [1] * len(shape)
  for axis, size in zip(axes, source.aval.shape, strict=True):
    spread[axis] = size
  if any(
    new != old and not isinstance(new, int) for new, old in zip(shape, spread)
  ):
    _refuse(equation, 'shape', 'broadcast_dimensions')
  (value,) = inputs
  if len(spread) != len(source.aval.shape):
    value = graph.add('Reshape', [value, _sizes(equation, spread)])
  if list(spread) != list(shape):
    # Expand keeps a size where the target has 1.
    target = [d if isinstance(d, int) else 1 for d in shape]
    value = graph.add('Expand', [value, np.array(target, np.int64)])
  return value


def _reshape(graph: Any, equation: Any, inputs: list[Value]) -> str:
  transposed = equation.params.get('dimensions') is not None
  if equation.primitive.name == 'reshape' and transposed:
    _refuse(equation, 'dimensions')
  sizes = _sizes(equation, equation.outvars[0].aval.shape)
  return graph.add('Reshape', [inputs[0], sizes])


def _transpose(graph: Any, equation: Any, inputs: list[Value]) -> str:
  permutation = list(equation.params['permutation'])
  return graph.add('Transpose', inputs, perm=permutation)


def _convolution(graph: Any, equation: Any, inputs: list[Value]) -> str:
  """Of a constant kernel: from any order of axes to NCHW and back."""
  parameters = equation.params
  numbers = parameters['dimension_numbers']
  x, kernel = inputs
  if isinstance(kernel, str):
    _refuse(equation, reason='a kernel that depends on the images')
  if (
    not parameters['padding']
    or set(parameters['lhs_dilation']) != {1}
    or parameters['batch_group_count'] != 1
  ):
    _refuse(equation, 'lhs_dilation', 'batch_group_count')
  x = graph.add('Transpose', [x], perm=list(numbers.lhs_spec))
  x = graph.add(
    'Conv',
    [x, np.transpose(kernel, numbers.rhs_spec)],
    strides=list(parameters['window_strides']),
    pads=_pads(equation, parameters['padding']),
    dilations=list(parameters['rhs_dilation']),
    group=parameters['feature_group_count'],
  )
  back = [int(axis) for axis in np.argsort(numbers.out_spec)]
  return graph.add('Transpose', [x], perm=back)


def _max_pool(graph: Any, equation: Any, inputs: list[Value]) -> str:
  """Over height and width of an NHWC array alone."""
  parameters = equation.params
  window, padding = parameters['window_dimensions'], parameters['padding']
  for name in ('base_dilation', 'window_dilation'):
    if len(window) != 4 or set(parameters[name]) != {1}:
      _refuse(equation, 'window_dimensions', name)
  for name in ('window_dimensions', 'window_strides'):
    if parameters[name][0] != 1 or parameters[name][3] != 1:
      _refuse(equation, name)
  # onnxruntime refuses a window that fits into the padding.
  if (
    (padding[0], padding[3]) != ((0, 0), (0, 0))
    or max(padding[1]) >= window[1]
    or max(padding[2]) >= window[2]
  ):
    _refuse(equation, 'window_dimensions', 'padding')
  x = graph.add('Transpose', inputs, perm=[0, 3, 1, 2])
  x = graph.add(
    'MaxPool',
    [x],
    kernel_shape=list(parameters['window_dimensions'][1:3]),
    strides=list(parameters['window_strides'][1:3]),
    pads=_pads(equation, parameters['padding'][1:3]),
  )
  return graph.add('Transpose', [x], perm=[0, 2, 3, 1])


def _pads(equation: Any, padding: Sequence[tuple[int, int]]) -> list[int]:
  """ONNX lists all starts, then all ends, and cannot cut a side."""
  if min(map(min, padding)) < 0:
    _refuse(equation, 'padding')
  return [low for low, _ in padding] + [high for _, high in padding]


def _dot(graph: Any, equation: Any, inputs: list[Value]) -> str:
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
  def translate(graph: Any, equation: Any, inputs: list[Value]) -> str:
    axes = np.array(equation.params['axes'], np.int64)
    if not axes.size:  # ONNX would reduce all of them.
      return inputs[0]
    return graph.add(operator, [inputs[0], axes], keepdims=0)

  return translate


def _concatenate(graph: Any, equation: Any, inputs: list[Value]) -> str:
  return graph.add('Concat', inputs, axis=equation.params['dimension'])


def _stack(graph: Any, equation: Any, inputs: list[Value]) -> str:
  axis = equation.params['axis']
  parts = [graph.add('Unsqueeze', [x, np.array([axis])]) for x in inputs]
  return graph.add('Concat', parts, axis=axis)


def _gather(graph: Any, equation: Any, inputs: list[Value]) -> str:
  """x[..., i] with a constant i, which drops the axis."""
  parameters, index = equation.params, inputs[1]
  numbers, lengths = parameters['dimension_numbers'], parameters['slice_sizes']
  axes, shape = numbers.start_index_map, equation.invars[0].aval.shape
  if (
    isinstance(index, str)
    or index.shape != (1,)
    or tuple(axes) != tuple(numbers.collapsed_slice_dims)
    or numbers.operand_batching_dims
  ):
    _refuse(equation, 'dimension_numbers')
  (axis,), (position,) = axes, index.tolist()
  if tuple(lengths) != (*shape[:axis], 1, *shape[axis + 1 :]):
    _refuse(equation, 'slice_sizes')
  # Outside, the mode says what is read. ONNX counts from the end, or fails.
  if not isinstance(shape[axis], int) or not 0 <= position < shape[axis]:
    reason = f'index {position} outside axis {axis} of {shape}'
    _refuse(equation, 'mode', reason=reason)
  return graph.add('Gather', [inputs[0], np.array(position)], axis=axis)


def _slice(graph: Any, equation: Any, inputs: list[Value]) -> str:
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
  arrays += [np.array(axes, np.int64), steps]
  return graph.add('Slice', [inputs[0], *arrays])


def _reverse(graph: Any, equation: Any, inputs: list[Value]) -> str:
  axes = np.array(equation.params['dimensions'], np.int64)
  start, step = np.full_like(axes, -1), np.full_like(axes, -1)
  end = np.full_like(axes, np.iinfo(np.int64).min)
  return graph.add('Slice', [inputs[0], start, end, axes, step])


def _cast(graph: Any, equation: Any, inputs: list[Value]) -> str:
  if equation.params['new_dtype'] != np.float32:
    _refuse(equation, 'new_dtype')
  return graph.add('Cast', inputs, to=graph.element_type(np.float32))


def _square(graph: Any, equation: Any, inputs: list[Value]) -> str:
  del equation
  return graph.add('Mul', [inputs[0], inputs[0]])


def _power(graph: Any, equation: Any, inputs: list[Value]) -> str:
  exponent = np.float32(equation.params['y'])
  return graph.add('Pow', [inputs[0], np.asarray(exponent)])


def _reciprocal_root(graph: Any, equation: Any, inputs: list[Value]) -> str:
  del equation
  return graph.add('Reciprocal', [graph.add('Sqrt', inputs)])


def _top_k(graph: Any, equation: Any, inputs: list[Value]) -> str:
  count = np.array([equation.params['k']], np.int64)
  return graph.add(
    'TopK',
    [inputs[0], count],
    outputs=['', ''],
    axis=equation.params['axis'],
  )


_TRANSLATIONS = {
  'broadcast_in_dim': _broadcast,
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
