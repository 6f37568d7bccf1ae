"""What training takes on TPUs, from programs compiled without any.

libtpu compiles for a topology that is not there. The very step functions are
compiled, and read: operations, bytes, memory and collectives of each device.
Google's published peaks then bound the time of a step. Nothing is run, so
nothing here is a measurement.

Synopsis:

  mesh = plan.make_mesh('v5e:2x2')
  plans = [plan.read(program) for program in plan.programs(config, mesh)]
  print(plan.format_tables(plans))
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import os
import re
import time

from absl import logging
from flax import traverse_util
import jax
from jax.experimental import topologies
import ml_collections
import numpy as np

from dmdd_jax import config as config_lib
from dmdd_jax import sharding
from dmdd_jax.data import tiles
from dmdd_jax.export import write as export_lib
from dmdd_jax.models import dmdd
from dmdd_jax.scoring import score as score_lib
from dmdd_jax.training import muon
from dmdd_jax.training import steps
from dmdd_jax.training import train_state

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Bytes that a device sends for each byte of the result, over n devices in a
# ring, n - 1 over n times this.
_SENT = {'all-reduce': 2.0}
# Muon's products have full float32 precision: six passes in bfloat16.
_FLOAT32_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of a chip.

  Attributes:
    flops: bfloat16 operations a second. By default float32 convolutions
      multiply in bfloat16 too.
    memory: bytes that the compiler may use.
    memory_rate: bytes a second, from and to that memory.
    link_rate: bytes a second that it sends over all its links to other chips.
  """

  flops: float
  memory: float
  memory_rate: float
  link_rate: float


# https://docs.cloud.google.com/tpu/docs/v5e and /v6e, read on 2026-11-28; the
# memory is that of the compiler's own message where a program does not fit.
CHIPS = {
  'TPU v5 lite': Chip(197e12, 15.75 * 2**30, 819e9, 200e9),
  'TPU v6 lite': Chip(918e12, 31.25 * 2**30, 1600e9, 400e9),
}


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to compile.

  Attributes:
    name: 'distill', 'segment', 'joint', 'predict' or 'exported'.
    rows: pairs or images in a call, over all devices.
    steps: how many calls a training makes.
    mesh: its devices.
    lowered: what `.compile()` compiles.
    fixed: bytes of arguments on each device that do not grow with `rows`.
    muon: operations of Muon's products on the device that has most.
  """

  name: str
  rows: int
  steps: int
  mesh: jax.sharding.Mesh
  lowered: jax.stages.Lowered
  fixed: int
  muon: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a compiled program takes, on each device and for each call.

  Attributes:
    program: its name.
    devices: how many share a call.
    rows: pairs or images in a call, over all devices.
    steps: how many calls a training makes.
    flops: floating-point operations, as XLA counts them; a loop's body counts
      once.
    moved: bytes to and from the chip's memory, see `traffic`.
    memory: {kind: bytes}; 'peak' is all that is held at a time.
    capacity: bytes of memory of the chip.
    largest: pairs or images in a call that fit, if all but state and code
      grows in proportion; 0 where these do not fit.
    collectives: {kind: (count, bytes of their results)}.
    seconds: {'compute', 'memory', 'links': the least time each takes}.
    padding: bytes of all results in memory over bytes of their numbers.
    copies: (count, bytes) of operations that only change a layout.
    casts: (count, bytes) of operations that only change a type.
    compiled_in: seconds of compilation.
  """

  program: str
  devices: int
  rows: int
  steps: int
  flops: float
  moved: float
  memory: dict[str, int]
  capacity: float
  largest: int
  collectives: dict[str, tuple[int, int]]
  seconds: dict[str, float]
  padding: float
  copies: tuple[int, int]
  casts: tuple[int, int]
  compiled_in: float

  @property
  def bound(self) -> float:
    """Seconds that a call takes at least, if all three overlap."""
    return max(self.seconds.values())


def make_mesh(topology: str) -> jax.sharding.Mesh:
  """The mesh of a topology like 'v5e:2x2', whose devices only compile.

  Raises:
    ValueError: libtpu is not installed, or does not know the topology.
  """
  # Otherwise libtpu asks for the metadata of a cloud machine, for minutes.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # Chips belong to one process at a time; nothing here uses any.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    described = topologies.get_topology_desc(
      platform='tpu', topology_name=topology
    )
  except Exception as error:  # JAX raises what libtpu and its loader raise.
    raise ValueError(
      f'--topology={topology!r}: {error}. Install libtpu'
      " (pip install -c constraints.txt -e '.[tpu]') and use a name like"
      ' v5e:2x2'
    ) from error
  mesh = sharding.make_mesh(described.devices)
  kind = described.devices[0].device_kind
  if kind not in CHIPS:
    raise ValueError(
      f'--topology={topology!r} has chips {kind!r}, whose peaks are not in'
      f' dmdd_jax/plan.py; it has those of {", ".join(CHIPS)}'
    )
  return mesh


def programs(
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  names: Sequence[str] = (),
) -> Iterator[Program]:
  """The steps of a training, the prediction, and the exported function.

  Args:
    config: of one category.
    mesh: the devices to compile for; the exported function takes one of them.
    names: which programs; () is all that the config has.

  Raises:
    ValueError: the config is impossible, a batch does not divide over the
      mesh, or a program is not one of the config's.
  """
  config_lib.check(config)
  sharding.check_batch_size(mesh, config.train.batch_size, 'train.batch_size')
  train, makers = config.train, {}
  phases = [steps.phase(config, step) for step in range(train.total_steps)]
  for phase in dict.fromkeys(phases):
    makers[phase] = (_train_program, phases.count(phase))
  makers |= {'predict': (_predict_program, 0), 'exported': (_exported, 0)}
  if unknown := set(names) - set(makers):
    raise ValueError(
      f'--programs={",".join(names)}: the config has no'
      f' {", ".join(sorted(unknown))}; choose from {", ".join(makers)}'
    )
  model = dmdd.from_config(config)
  state = jax.eval_shape(
    lambda: train_state.create(config, model, jax.random.key(0))
  )
  for name in names or makers:
    make, count = makers[name]
    yield make(config, model, mesh, state, name, count)


def _train_program(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  mesh: jax.sharding.Mesh,
  state: train_state.TrainState,
  phase: str,
  count: int,
) -> Program:
  rows, side = config.train.batch_size, tiles.input_side(config.data)
  batch = {
    name: jax.ShapeDtypeStruct((rows, side, side, channels), np.float32)
    for name, channels in (('image', 3), ('normal', 3), ('mask', 1))
  }
  step = steps.make_train_steps(config, model, mesh)[phase]
  work = 0
  for part in steps.PHASES[phase]:
    if config.train[part].kind == 'muon':
      leaves = jax.tree.leaves(state.params[part])
      shapes = [x.shape for x in leaves if x.ndim == 4]
      work += max(
        sum(muon.operations(shapes[i]) for i in own)
        for own in muon.assign(shapes, mesh.size)
      )
  lowered = step.lower(state, batch)
  return Program(phase, rows, count, mesh, lowered, _bytes(state), work)


def _predict_program(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  mesh: jax.sharding.Mesh,
  state: train_state.TrainState,
  name: str,
  count: int,
) -> Program:
  rows = math.ceil(config.eval.batch_size / mesh.size) * mesh.size
  variables = train_state.variables(state)
  lowered = score_lib.make_predict_step(config, model, mesh).lower(
    variables, score_lib.Fusion(), _images(config, rows)
  )
  return Program(name, rows, count, mesh, lowered, _bytes(variables), 0)


def _exported(
  config: ml_collections.ConfigDict,
  model: dmdd.DMDD,
  mesh: jax.sharding.Mesh,
  state: train_state.TrainState,
  name: str,
  count: int,
) -> Program:
  """The function that a StableHLO archive holds, for one device."""
  del model
  rows, one = config.eval.batch_size, sharding.make_mesh(mesh.devices[:1])
  variables = train_state.variables(state)
  lowered = jax.jit(
    export_lib.make_function(config, score_lib.Fusion()),
    in_shardings=sharding.replicated(one),
    out_shardings=sharding.replicated(one),
  ).lower(traverse_util.flatten_dict(variables, sep='/'), _images(config, rows))
  return Program(name, rows, count, one, lowered, _bytes(variables), 0)


def _images(
  config: ml_collections.ConfigDict, rows: int
) -> jax.ShapeDtypeStruct:
  side = tiles.input_side(config.data)
  return jax.ShapeDtypeStruct((rows, side, side, 3), np.uint8)


def _bytes(tree: object) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def read(program: Program, folder: str = '') -> Plan:
  """Compiles a program and reads what it takes.

  Args:
    program: of `programs`.
    folder: where the compiled program's text is written, `NAME.hlo`; '' keeps
      none.

  Raises:
    ValueError: the program does not fit into the chip's memory.
  """
  chip = CHIPS[program.mesh.devices.flat[0].device_kind]
  logging.info('compiling %s for %d devices', program.name, program.mesh.size)
  started = time.perf_counter()
  try:
    compiled = program.lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise ValueError(
      f'{program.name}: {program.rows} rows do not fit: {error}'
    ) from error
  compiled_in = time.perf_counter() - started
  text = compiled.as_text()
  if folder:
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f'{program.name}.hlo'), 'w') as file:
      file.write(text)
  cost, memory = compiled.cost_analysis(), _memory(compiled)
  devices, called = program.mesh.size, collectives(text)
  moved = float(traffic(text))
  compute = cost['flops'] + (_FLOAT32_PASSES - 1) * program.muon
  fixed = program.fixed + memory['code']
  grows, room = memory['peak'] - fixed, max(chip.memory - fixed, 0.0)
  return Plan(
    program.name,
    devices,
    program.rows,
    program.steps,
    cost['flops'],
    moved,
    memory,
    chip.memory,
    int(room / grows * program.rows / devices) * devices,
    called,
    {
      'compute': compute / chip.flops,
      'memory': moved / chip.memory_rate,
      'links': sent(called, devices) / chip.link_rate,
    },
    **waste(text),
    compiled_in=compiled_in,
  )


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Bytes by kind; what is donated is held once."""
  stats = compiled.memory_analysis()
  memory = {
    'arguments': stats.argument_size_in_bytes,
    'results': stats.output_size_in_bytes - stats.alias_size_in_bytes,
    'temporaries': stats.temp_size_in_bytes,
    'code': stats.generated_code_size_in_bytes,
  }
  return memory | {'peak': sum(memory.values())}


def sent(collectives: Mapping[str, tuple[int, int]], devices: int) -> float:
  """Bytes that each device sends for collectives, in rings of all devices."""
  share = (devices - 1) / devices
  return share * sum(
    _SENT.get(kind, 1.0) * size for kind, (_, size) in collectives.items()
  )


def format_tables(plans: Sequence[Plan], categories: int = 1) -> str:
  """Markdown of plans: a table of costs, one of the bounds, one of waste.

  Args:
    plans: in the order of their rows.
    categories: how many trainings the last line adds up.
  """
  costs, bounds, waste = [], [], []
  for plan in plans:
    seconds = plan.seconds
    called = ', '.join(
      f'{count} {kind} ({size / 1e6:.3g} MB)'
      for kind, (count, size) in plan.collectives.items()
    )
    *kinds, peak = (f'{size / 1e9:.2f}' for size in plan.memory.values())
    costs.append(
      [plan.program, plan.rows, plan.devices, f'{plan.flops / 1e9:.0f}']
      + [f'{plan.moved / 1e9:.1f}', f'{" + ".join(kinds)} = {peak}']
      + [plan.largest, called or 'none']
    )
    bounds.append(
      [plan.program, *(f'{1e3 * s:.2f}' for s in seconds.values())]
      + [f'{plan.rows / plan.bound:.0f}']
    )
    waste.append(
      [plan.program, f'{plan.padding:.2f}']
      + [f'{n} ({b / 1e6:.0f} MB)' for n, b in (plan.copies, plan.casts)]
      + [f'{plan.compiled_in:.0f}']
    )
  capacity = plans[0].capacity / 1e9
  kinds = ' + '.join(kind for kind in plans[0].memory if kind != 'peak')
  tables = [
    _table(
      ('program', 'rows', 'devices', 'GFLOP', 'GB moved')
      + (f'memory, GB of {capacity:.1f}: {kinds}', 'largest batch')
      + ('collectives',),
      costs,
    ),
    _table(
      ('program', *(f'{kind}, ms' for kind in plans[0].seconds), 'rows/s'),
      bounds,
    ),
    _table(('program', 'padding', 'copies', 'casts', 'compiled in, s'), waste),
  ]
  if total := sum(plan.steps * plan.bound for plan in plans):
    tables.append(
      f'{categories} trainings of'
      f' {sum(plan.steps for plan in plans)} steps take at least'
      f' {categories * total / 60:.1f} minutes.\n'
    )
  return '\n'.join(tables)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
  return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)


# --- the compiled program's text ----------------------------------------------

# `%name = type operation(operands)`, with or without ROOT.
_INSTRUCTION = re.compile(
  r'^ *(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)'
)
# `f32[8,128]{1,0:T(8,128)S(1)}`: type, sizes, order from minor to major, tile.
_ARRAY = re.compile(
  r'\b(pred|[a-z]+[0-9]+\w*)\[([\d,]*)\]'
  r'(?:\{([\d,]*)(?::(?:T\(([\d,]+)\))?([^}]*))?\})?'
)
_UNWRITTEN = ('parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element')
# A custom call here is one that XLA takes apart, or puts slices together.
_UNMOVED = (*_UNWRITTEN, 'while', 'conditional', 'call', 'custom-call')


def _instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
  """(name, type, operation, operands) of each line with an instruction."""
  for line in text.splitlines():
    if match := _INSTRUCTION.match(line):
      yield match.groups()


def _sizes(
  kind: str, padded: bool = False, in_memory: bool = False
) -> list[int]:
  """Bytes of each array of a type.

  Args:
    kind: the type, an array's or a tuple's.
    padded: as they lie in memory, instead of their numbers alone.
    in_memory: 0 for an array that is on the chip, `S(1)` and others.
  """
  sizes = []
  for element, shape, order, tile, rest in _ARRAY.findall(kind):
    dims = [int(size) for size in shape.split(',') if size]
    if padded and tile and order:
      minor = [int(axis) for axis in order.split(',')]
      for axis, step in zip(minor, reversed(tile.split(','))):
        dims[axis] = math.ceil(dims[axis] / int(step)) * int(step)
    bits = 8 if element == 'pred' else int(re.findall(r'\d+', element)[0])
    is_away = in_memory and 'S(' in rest
    sizes.append(0 if is_away else math.prod(dims) * bits // 8)
  return sizes


def traffic(text: str) -> int:
  """Bytes that a compiled program reads from and writes to a chip's memory.

  Of its main computation alone, without what loops and branches do inside.
  """
  kinds, total = {}, 0
  for name, kind, operation, operands in _instructions(_main(text)):
    kinds[name] = kind
    if operation in ('copy-start', 'slice-start'):
      # Source, target, and a word of context. A slice moves its target's size.
      size = _sizes(kind, padded=True)[1]
      ends = _sizes(kind, in_memory=True)[:2]
      total += size * sum(end > 0 for end in ends)
    elif operation not in _UNMOVED and not operation.endswith('-done'):
      read = [kinds.get(operand, '') for operand in _names(operands)]
      for each in (kind, *read):
        total += sum(_sizes(each, padded=True, in_memory=True))
  return total


def _main(text: str) -> str:
  """The main computation of a program."""
  return text.partition('\nENTRY ')[2]


def _names(operands: str) -> list[str]:
  return re.findall(r'%([\w.-]+)', operands)


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """{kind: (count, bytes of their results)} of a compiled program's text."""
  collectives: dict[str, tuple[int, int]] = {}
  for _, kind, operation, _ in _instructions(text):
    name = operation.removesuffix('-start')
    if name in COLLECTIVES:
      sizes = _sizes(kind)
      # But for all-reduce, the type of a start has its operands too.
      both = name != operation and name != 'all-reduce'
      count, size = collectives.get(name, (0, 0))
      collectives[name] = count + 1, size + (max(sizes) if both else sum(sizes))
  return collectives


def waste(text: str) -> dict[str, float | tuple[int, int]]:
  """`Plan.padding`, `copies` and `casts` of a compiled program's text."""
  numbers = held = 0
  counts = {'copies': [0, 0], 'casts': [0, 0]}
  for name, kind, operation, _ in _instructions(_main(text)):
    if operation in _UNWRITTEN:
      continue
    size = sum(_sizes(kind))
    numbers, held = numbers + size, held + sum(_sizes(kind, padded=True))
    for key, pattern in (
      ('copies', r'(transpose|copy)(_(transpose|copy|bitcast))*(_fusion)?'),
      ('casts', r'convert(_(convert|bitcast))*(_fusion)?'),
    ):
      if re.fullmatch(pattern + r'[\d.]*(\.remat\d*|\.clone)*', name):
        counts[key][0] += 1
        counts[key][1] += size
  return {
    'padding': held / max(numbers, 1),
    **{key: tuple(count) for key, count in counts.items()},
  }
