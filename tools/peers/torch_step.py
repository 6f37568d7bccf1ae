"""The distillation step in PyTorch, to compare speed with: no part of dmdd_jax.

  TORCH/bin/python tools/peers/torch_step.py --data batch.npz \
    --arch resnet18 --dtype bfloat16 --compile --repeats 5

Frozen teacher on x_n and x_a in one batch, the `reverse` student on x_a in
training mode, NGM and AIM, the backward pass and Adam: what `steps.train_step`
does with `train.student.kind` adam and `loss.focus` 0, on the batch in a file
of `image`, `normal` (B, S, S, 3) and `mask` (B, S, S, 1). Channels last;
autocast with `--dtype bfloat16`. Prints a line of JSON: seconds of each step,
the trained parameters, the last loss, the versions. Needs torch and numpy;
without torch it says so, exit status 3.
"""

import argparse
import json
import sys
import time

import numpy as np

try:
  import torch
  from torch import nn
  from torch.nn import functional
except ImportError:
  print('torch is not installed for this Python', file=sys.stderr)
  sys.exit(3)

# Blocks of the first three stages, bottleneck blocks or not, base width.
ARCHS = {
  'resnet18': ((2, 2, 2), False, 64),
  'resnet34': ((3, 4, 6), False, 64),
  'resnet50': ((3, 4, 6), True, 64),
  'wide_resnet50_2': ((3, 4, 6), True, 128),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1):
  """A bias-free convolution and batch norm."""
  return nn.Sequential(
    nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
    nn.BatchNorm2d(outputs),
  )


class Block(nn.Module):
  """A residual block of `features`, times 4 for a bottleneck."""

  def __init__(self, arch: str, inputs: int, features: int, stride: int = 1):
    super().__init__()
    _, bottleneck, base = ARCHS[arch]
    if bottleneck:
      width, self.outputs = features * base // 64, 4 * features
      self.body = nn.Sequential(
        conv_norm(inputs, width, 1),
        nn.ReLU(),
        conv_norm(width, width, 3, stride),
        nn.ReLU(),
        conv_norm(width, self.outputs, 1),
      )
    else:
      self.outputs = features
      self.body = nn.Sequential(
        conv_norm(inputs, features, 3, stride),
        nn.ReLU(),
        conv_norm(features, features, 3),
      )
    self.shortcut = nn.Identity()
    if stride > 1 or inputs != self.outputs:
      self.shortcut = conv_norm(inputs, self.outputs, 1, stride)

  def forward(self, x):
    return functional.relu(self.body(x) + self.shortcut(x))


class Teacher(nn.Module):
  """The stem and three stages; returns their outputs."""

  def __init__(self, arch: str):
    super().__init__()
    self.stem = nn.Sequential(
      conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    self.stages, channels, self.channels = nn.ModuleList(), 64, []
    for stage, count in enumerate(ARCHS[arch][0]):
      blocks = []
      for index in range(count):
        stride = 2 if stage and not index else 1
        blocks.append(Block(arch, channels, 64 * 2**stage, stride))
        channels = blocks[-1].outputs
      self.stages.append(nn.Sequential(*blocks))
      self.channels.append(channels)

  def forward(self, x):
    taps, x = [], self.stem(x)
    for stage in self.stages:
      x = stage(x)
      taps.append(x)
    return taps


class Student(nn.Module):
  """Bottleneck and decoder over the teacher's taps, then two branches each."""

  def __init__(self, arch: str, channels: list[int]):
    super().__init__()
    last = channels[-1]
    self.fuse = nn.ModuleList()
    for level, width in enumerate(channels):
      layers = []
      for _ in range(len(channels) - 1 - level):
        layers += [conv_norm(width, last, 3, 2), nn.ReLU()]
        width = last
      self.fuse.append(nn.Sequential(*layers))
    first = Block(arch, last * len(channels), 512, 2)
    self.embed = nn.Sequential(first, Block(arch, first.outputs, 512))
    self.decoder, self.branches, width = nn.ModuleList(), nn.ModuleList(), None
    width = first.outputs
    for stage in reversed(range(len(channels))):
      head = Block(arch, width, 64 * 2**stage)
      width = head.outputs
      self.decoder.append(
        nn.Sequential(head, Block(arch, width, 64 * 2**stage))
      )
      self.branches.append(
        nn.ModuleList(
          nn.Sequential(conv_norm(width, width, 1), nn.ReLU()) for _ in range(2)
        )
      )

  def forward(self, taps):
    fused = [layers(tap) for layers, tap in zip(self.fuse, taps)]
    x, pairs = self.embed(torch.cat(fused, 1)), []
    for blocks, branches in zip(self.decoder, self.branches):
      x = functional.interpolate(
        x, scale_factor=2, mode='bilinear', align_corners=False
      )
      x = blocks(x)
      pairs.append(tuple(branch(x) for branch in branches))
    return pairs[::-1]


def distance(a, b):
  """1 - cos of the channel vectors, in float32."""
  a, b = a.float(), b.float()
  square = (a * a).sum(1) * (b * b).sum(1)
  return 1.0 - (a * b).sum(1) * torch.rsqrt(square + 1e-12)


def loss_of(teacher, student, image, normal, mask):
  """NGM and AIM of a batch in NCHW."""
  mean, std = (
    torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in (MEAN, STD)
  )
  with torch.no_grad():
    taps = teacher((torch.cat([normal, image]) - mean) / std)
  halves = [tap.chunk(2) for tap in taps]
  total = 0.0
  pairs = student([half[1] for half in halves])
  for (normality, abnormality), (of_normal, of_image) in zip(pairs, halves):
    cells = functional.avg_pool2d(mask, mask.shape[2] // normality.shape[2])
    total = total + distance(normality, of_normal).mean()
    gap = distance(abnormality, of_image) - cells[:, 0]
    total = total + gap.abs().mean()
  return total


def measure(arguments: argparse.Namespace) -> dict:
  """Seconds of each step, after two that are not counted."""
  torch.manual_seed(0)
  if arguments.threads:
    torch.set_num_threads(arguments.threads)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.backends.cuda.matmul.allow_tf32 = arguments.dtype == 'tf32'
  torch.backends.cudnn.allow_tf32 = arguments.dtype == 'tf32'
  torch.backends.cudnn.benchmark = True
  place = {'device': device, 'memory_format': torch.channels_last}
  with np.load(arguments.data) as data:
    batch = [
      torch.from_numpy(data[name]).permute(0, 3, 1, 2).contiguous().to(**place)
      for name in ('image', 'normal', 'mask')
    ]
  teacher = Teacher(arguments.arch).to(**place).eval()
  student = Student(arguments.arch, teacher.channels).to(**place).train()
  optimizer = torch.optim.Adam(student.parameters(), 1e-4, betas=(0.5, 0.999))
  loss_function = torch.compile(loss_of) if arguments.compile else loss_of

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    bfloat16 = arguments.dtype == 'bfloat16'
    with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
      loss = loss_function(teacher, student, *batch)
    loss.backward()
    optimizer.step()
    return loss.item()  # Waits for the device.

  seconds = []
  for _ in range(arguments.repeats + 2):
    started = time.perf_counter()
    loss = step()
    seconds.append(time.perf_counter() - started)
  return {
    'seconds': seconds[2:],
    'parameters': sum(p.numel() for p in student.parameters()),
    'loss': loss,
    'device': device,
    'threads': torch.get_num_threads(),
    'torch': torch.__version__,
  }


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', required=True, help='.npz file of a batch')
  parser.add_argument('--arch', choices=sorted(ARCHS), default='resnet18')
  types = ('float32', 'tf32', 'bfloat16')
  parser.add_argument('--dtype', choices=types, default='float32')
  parser.add_argument('--compile', action='store_true')
  parser.add_argument('--threads', type=int, default=0, help="0: torch's own")
  parser.add_argument('--repeats', type=int, default=5)
  print(json.dumps(measure(parser.parse_args())))


if __name__ == '__main__':
  main()
