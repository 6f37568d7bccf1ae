"""Writes tests/data/teacher_taps.npz: a ResNet's taps as PyTorch computes them.

Run where torch, numpy and safetensors are installed (no JAX is needed):

  python tools/make_teacher_fixture.py \
    ../shared/data/weights/resnet18_layers1-3.safetensors

The network is torchvision's, in plain torch and float64; weights and image are
seeded NumPy, shared with the tests. Kept: samples, mean and standard deviation
of each tap, and the names and shapes of the weights.
"""

import sys
import zlib

import numpy as np

ARCHS = {  # blocks per stage, bottleneck, base width
  'resnet18': ((2, 2, 2), False, 64),
  'resnet34': ((3, 4, 6), False, 64),
  'resnet50': ((3, 4, 6), True, 64),
  'wide_resnet50_2': ((3, 4, 6), True, 128),
}


def make_image() -> np.ndarray:
  """The normalised image batch, (1, 3, 64, 96) float32."""
  rng = np.random.Generator(np.random.Philox(7))
  return rng.standard_normal((1, 3, 64, 96), np.float32)


def make_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The float32 weight of that name: He-scaled, or batch norm far from 0, 1."""
  rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
  value = rng.standard_normal(shape, np.float32)
  if len(shape) == 4:
    return value * np.float32(np.sqrt(2 / np.prod(shape[1:])))
  if name.endswith(('running_var', 'weight')):
    return np.exp(np.float32(0.3) * value)
  return np.float32(0.3) * value


def sample(tap: np.ndarray) -> np.ndarray:
  """About 500 values of a (C, H, W) tap, spread over all three axes."""
  return tap.reshape(-1)[:: tap.size // 499 | 1]


def run(arch: str, get) -> dict[str, np.ndarray]:
  """Samples and statistics of each tap, from weights `get(name, shape)`."""
  import torch
  import torch.nn.functional as F

  blocks, bottleneck, base_width = ARCHS[arch]
  shapes = []

  def load(name, *shape):
    shapes.append(' '.join([name, *map(str, shape)]))
    return torch.from_numpy(get(name, shape).astype(np.float64))

  def conv_bn(x, conv, bn, cout, kernel, stride=1):
    weight = load(f'{conv}.weight', cout, x.shape[1], kernel, kernel)
    x = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    leaves = ('running_mean', 'running_var', 'weight', 'bias')
    return F.batch_norm(x, *(load(f'{bn}.{leaf}', cout) for leaf in leaves))

  def block(x, name, planes, stride):
    plan = [(planes, 3, stride), (planes, 3)]
    if bottleneck:
      width = planes * base_width // 64
      plan = [(width, 1), (width, 3, stride), (4 * planes, 1)]
    y = conv_bn(x, f'{name}.conv1', f'{name}.bn1', *plan[0])
    for i, shape in enumerate(plan[1:], 2):
      y = conv_bn(y.relu(), f'{name}.conv{i}', f'{name}.bn{i}', *shape)
    if stride != 1 or x.shape[1] != y.shape[1]:
      names = f'{name}.downsample.0', f'{name}.downsample.1'
      x = conv_bn(x, *names, y.shape[1], 1, stride)
    return (x + y).relu()

  x = torch.from_numpy(make_image().astype(np.float64))
  x = F.max_pool2d(conv_bn(x, 'conv1', 'bn1', 64, 7, 2).relu(), 3, 2, 1)
  out = {}
  for stage, count in enumerate(blocks, 1):
    for i in range(count):
      stride = 2 if stage > 1 and i == 0 else 1
      x = block(x, f'layer{stage}.{i}', 64 * 2 ** (stage - 1), stride)
    tap = x[0].numpy()
    out[f'layer{stage}'] = sample(tap).astype(np.float32)
    out[f'layer{stage}/stats'] = np.array([tap.mean(), tap.std()])
  return out | {'shapes': np.array('\n'.join(shapes).encode())}


if __name__ == '__main__':
  import safetensors.numpy

  real = safetensors.numpy.load_file(sys.argv[1])
  runs = {arch: run(arch, make_weight) for arch in ARCHS}
  runs['real_resnet18'] = run('resnet18', lambda name, shape: real[name])
  arrays = {f'{r}/{k}': v for r, taps in runs.items() for k, v in taps.items()}
  np.savez_compressed('tests/data/teacher_taps.npz', **arrays)
