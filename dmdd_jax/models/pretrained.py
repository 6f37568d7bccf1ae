"""Weights of the teacher: torchvision's names to a Flax tree, strictly.

A file of torchvision weights (`layer1.0.conv1.weight`, ...) becomes the
variables of `resnet.ResNet(arch, stages=3)`. Nothing is guessed: a name that is
missing, left over or of another shape is an error that lists all of them. Three
kinds of names are passed over: `layer4.*` and `fc.*`, which the teacher does
not run, and `*.num_batches_tracked`, which are counters and not weights.

Synopsis:

  variables, fingerprint = pretrained.load('resnet18', 'hub')
  taps = resnet.ResNet('resnet18').apply(variables, images)
"""

from collections.abc import Mapping
import hashlib
import pathlib

from absl import logging
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dmdd_jax.models import initial
from dmdd_jax.models import resnet

# The taps of the teacher: layer1, layer2, layer3.
STAGES = 3

# torchvision's IMAGENET1K_V1 weights on the hub: the commit of
# `timm/<arch>.tv_in1k` and the sha256 of its model.safetensors, as public
# projects that download and verify these files record them.
HUB_FILES = {
  'resnet18': (
    'bbd144b3e5565108aad885f145491d11bc6ce807',
    '694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81',
  ),
  'resnet34': (
    '1b7b21cca82ff974d341713f777bf740c2db38c4',
    '0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235',
  ),
  'resnet50': (
    '78f3ecfdb38e06d9b8397f662e7ab8fee96026fa',
    '5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888',
  ),
  'wide_resnet50_2': (
    '343c5fa59ca8a131e0cdf42144a641b36a0387c2',
    'df6fb6c4824769769de18e14088475fd6ee94236849aa4e5d8022ba9d9a9a16c',
  ),
}
HUB_FILENAME = 'model.safetensors'

_IGNORED_PREFIXES = ('layer4.', 'fc.')
_IGNORED_SUFFIX = '.num_batches_tracked'
_DTYPES = ('float16', 'bfloat16', 'float32', 'float64')
_LEAVES = {
  ('params', 'kernel'): 'weight',
  ('params', 'scale'): 'weight',
  ('params', 'bias'): 'bias',
  ('batch_stats', 'mean'): 'running_mean',
  ('batch_stats', 'var'): 'running_var',
}


class WeightsError(ValueError):
  """The teacher's weights cannot be had, read or used; the message says why."""


def load(
  arch: str,
  weights: str,
  *,
  image_channels: int = 3,
  rng_seed: int = 0,
) -> tuple[dict, str]:
  """Loads the variables of `resnet.ResNet(arch, stages=3)`.

  Args:
    arch: a key of `resnet.SPECS`.
    weights: 'hub' for torchvision's ImageNet weights from the Hugging Face hub
      (its cache first, at a pinned revision), 'random' for He-initialised ones,
      or the path of a .safetensors or .npz file with torchvision's names in
      float16, bfloat16, float32 or float64.
    image_channels: input channels of `conv1`; a file must agree.
    rng_seed: seed of 'random', unused otherwise.

  Returns:
    `{'params': ..., 'batch_stats': ...}`, nested dicts of float32 NumPy arrays,
    and the fingerprint: 'sha256:<hex digest of the file>' or
    'random:<arch>:<seed>'.

  Raises:
    ValueError: `arch` is unknown.
    FileNotFoundError: there is no file at that path.
    WeightsError: the hub cannot be reached, the file cannot be read, or its
      names, shapes or values do not fit.
  """
  resnet.get_spec(arch)
  if weights == 'random':
    variables = _random(arch, image_channels, rng_seed)
    return variables, f'random:{arch}:{rng_seed}'
  path = _download(arch) if weights == 'hub' else _local(arch, weights)
  tensors = _read(path)
  digest = _sha256(path)
  if weights == 'hub' and digest != HUB_FILES[arch][1]:
    raise WeightsError(
      f'{path} is not the pinned {HUB_FILENAME} of {hub_repo(arch)}: its'
      f' sha256 is {digest}, expected {HUB_FILES[arch][1]}. Delete it and'
      ' download again, or name it with --config.teacher.weights= if you trust'
      ' it.'
    )
  variables = from_torch(arch, tensors, str(path), image_channels)
  logging.info('teacher %s from %s, sha256 %s', arch, path, digest)
  return variables, f'sha256:{digest}'


def hub_repo(arch: str) -> str:
  """The hub repository of `arch`, e.g. 'timm/resnet18.tv_in1k'."""
  return f'timm/{arch}.tv_in1k'


def torch_shapes(
  arch: str, image_channels: int = 3
) -> dict[str, tuple[int, ...]]:
  """torchvision's name and shape (convolutions OIHW) of every weight needed."""
  return {
    name: _torch_shape(leaf.shape)
    for _, name, leaf in _leaves(arch, image_channels)
  }


def from_torch(
  arch: str,
  tensors: Mapping[str, np.ndarray],
  source: str,
  image_channels: int = 3,
) -> dict:
  """Maps torchvision's tensors to Flax variables; strict.

  Args:
    arch: a key of `resnet.SPECS`.
    tensors: torchvision's names to arrays, convolutions OIHW.
    source: what to call the tensors in an error, usually a path.
    image_channels: input channels of `conv1`.

  Returns:
    `{'params': ..., 'batch_stats': ...}` of float32 NumPy arrays.

  Raises:
    WeightsError: names are missing, left over, of another shape or not of a
      floating type; values are not finite; a running variance is negative.
  """
  needed = {k: v for k, v in tensors.items() if not _ignored(k)}
  problems = _mismatches(needed, torch_shapes(arch, image_channels))
  if problems:
    raise WeightsError(
      f'{source} does not hold the weights of a torchvision {arch} '
      f'({_guess(needed, arch, image_channels)}):\n  '
      + '\n  '.join(problems)
      + '\nGive a matching file with --config.teacher.weights=... or set '
      '--config.teacher.arch=...'
    )
  variables = {'params': {}, 'batch_stats': {}}
  bad = []
  for path, name, _ in _leaves(arch, image_channels):
    # float64 beyond float32's range becomes infinite and is refused below.
    with np.errstate(over='ignore'):
      value = np.asarray(needed[name]).astype(np.float32)
    if not np.isfinite(value).all():
      bad.append(f'{name}: not finite')
    elif name.endswith('.running_var') and value.min() < 0:
      bad.append(f'{name}: a negative variance, {value.min():g}')
    if value.ndim == 4:
      value = np.ascontiguousarray(value.transpose(2, 3, 1, 0))
    node = variables
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  if bad:
    raise WeightsError(
      f'{source} holds values no trained {arch} has; the file is damaged:\n  '
      + '\n  '.join(bad)
      + '\nGet it again, or give another with --config.teacher.weights=...'
    )
  return variables


def _random(arch: str, image_channels: int, seed: int) -> dict:
  """He-initialised variables, the same for the same seed."""
  return initial.draw(_abstract(arch, image_channels), [seed])


def _abstract(arch: str, image_channels: int) -> dict:
  """The shapes of the teacher's variables."""
  model = resnet.ResNet(arch, stages=STAGES)
  image = jax.ShapeDtypeStruct((1, 32, 32, image_channels), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), image)


def _leaves(
  arch: str, image_channels: int
) -> list[tuple[tuple[str, ...], str, jax.ShapeDtypeStruct]]:
  """(path in the Flax tree, torchvision's name, shape) of every variable."""
  tree = _abstract(arch, image_channels)
  leaves = []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = tuple(key.key for key in keys)
    module = '.'.join(path[1:-1]).replace('_', '.')
    leaves.append((path, f'{module}.{_LEAVES[path[0], path[-1]]}', leaf))
  return leaves


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """HWIO to OIHW; the shape of a vector stays."""
  if len(shape) == 4:
    return (shape[3], shape[2], shape[0], shape[1])
  return tuple(shape)


def _ignored(name: str) -> bool:
  return name.startswith(_IGNORED_PREFIXES) or name.endswith(_IGNORED_SUFFIX)


def _mismatches(
  tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """One line for each name that is missing, left over or does not fit."""
  lines = [
    f'missing {name}: expected {shape}'
    for name, shape in expected.items()
    if name not in tensors
  ]
  for name, value in tensors.items():
    if name not in expected:
      lines.append(f'unknown {name}: found {value.shape}')
    elif tuple(value.shape) != expected[name]:
      lines.append(
        f'shape of {name}: found {tuple(value.shape)}, '
        f'expected {expected[name]}'
      )
    elif value.dtype.name not in _DTYPES:
      lines.append(
        f'type of {name}: found {value.dtype.name}, '
        f'expected one of {", ".join(_DTYPES)}'
      )
  return lines


def _guess(
  tensors: Mapping[str, np.ndarray], arch: str, image_channels: int
) -> str:
  """Says which other architecture the tensors fit, if they fit one."""
  for other in resnet.SPECS:
    if other == arch:
      continue
    if not _mismatches(tensors, torch_shapes(other, image_channels)):
      return f'it fits {other}'
  return f'it fits none of {", ".join(resnet.SPECS)}'


def _local(arch: str, weights: str) -> pathlib.Path:
  """The path of a local file, refused if it is absent or of another kind."""
  path = pathlib.Path(weights).expanduser()
  if weights and not path.exists():
    raise FileNotFoundError(
      f'no teacher weights at {path.absolute()} (--config.teacher.weights='
      f"{weights}). Give a .safetensors or .npz file, 'hub' to download "
      f"{hub_repo(arch)}, or 'random'."
    )
  if not path.is_file() or path.suffix not in ('.safetensors', '.npz'):
    raise WeightsError(
      f'--config.teacher.weights={weights!r} is not a .safetensors or .npz '
      "file, 'hub' or 'random'. A PyTorch checkpoint converts, where torch is, "
      "with safetensors.torch.save_file(torch.load('in.pth', "
      "weights_only=True), 'out.safetensors')."
    )
  return path


def _download(arch: str) -> pathlib.Path:
  """The hub's file, from its cache if it is there (HF_HOME, HF_HUB_OFFLINE)."""
  repo, (revision, _) = hub_repo(arch), HUB_FILES[arch]
  try:
    path = huggingface_hub.hf_hub_download(
      repo, HUB_FILENAME, revision=revision
    )
  # The hub's, its HTTP client's and the disk's errors share no other base.
  except Exception as e:
    raise WeightsError(
      f'could not get the teacher: {HUB_FILENAME} of {repo} at revision '
      f'{revision} is not in the cache and did not download '
      f'({type(e).__name__}: {_first_line(e)}). Without a network, get '
      f'https://huggingface.co/{repo}/resolve/{revision}/{HUB_FILENAME} on '
      'another machine and either give the file with '
      '--config.teacher.weights=PATH.safetensors or copy the cache and set '
      'HF_HOME to it.'
    ) from e
  return pathlib.Path(path)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of a .safetensors or .npz file; WeightsError if damaged."""
  try:
    if path.suffix == '.safetensors':
      return safetensors.numpy.load_file(path)
    with np.load(path, allow_pickle=False) as archive:
      return {name: archive[name] for name in archive.files}
  # A damaged file raises whatever the reader trips over (zip, header, dtype).
  except Exception as e:
    raise WeightsError(
      f'cannot read the teacher weights {path} '
      f'({type(e).__name__}: {_first_line(e)}). The file is damaged, cut short '
      f'or not a {path.suffix} file: get it again, or give another with '
      '--config.teacher.weights=...'
    ) from e


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or ['no details'])[0].rstrip('.')
