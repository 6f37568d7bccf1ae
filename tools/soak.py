"""Kills a training at random moments and compares its end with one left alone.

  python tools/soak.py --workdir runs/soak --steps 2000 --kills 10

Both trainings are of configs/demo.py, made small, on generated surfaces. Says
what each kill left, whether the ends are equal, and how much memory the
training that was left alone held on the way.
"""

import os
import random
import signal
import subprocess
import sys
import time

from absl import flags
import numpy as np

from dmdd_jax import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'New folder.', required=True)
_STEPS = flags.DEFINE_integer('steps', 2000, 'Steps of each training.')
_KILLS = flags.DEFINE_integer('kills', 10, 'Half by SIGKILL, half by SIGTERM.')
_EVERY = flags.DEFINE_integer('checkpoint_every', 100, 'Steps.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments.')


def start(workdir: str) -> subprocess.Popen:
  """Starts or continues a training in a folder, its log beside it."""
  fields = {
    'data.root': os.path.join(_WORKDIR.value, 'data'),
    'data.image_size': 32,
    'head.width': 4,
    'head.dilations': '(1, 2)',
    'train.batch_size': 4,
    'train.total_steps': _STEPS.value,
    'train.distill_steps': _STEPS.value // 2,
    'train.checkpoint_every': _EVERY.value,
  }
  command = [sys.executable, '-m', 'dmdd_jax.main', '--workdir', workdir]
  command += ['--config', 'configs/demo.py']
  command += [f'--config.{name}={value}' for name, value in fields.items()]
  with open(f'{workdir}.log', 'a') as log:
    return subprocess.Popen(command, stdout=log, stderr=log)


def watch(process: subprocess.Popen) -> tuple[float, list[int]]:
  """Waits for a process: its seconds, and its resident MB at each second."""
  began, memory = time.monotonic(), []
  while process.poll() is None:
    with open(f'/proc/{process.pid}/statm') as file:
      pages = int(file.read().split()[1])
    memory.append(pages * os.sysconf('SC_PAGE_SIZE') >> 20)
    time.sleep(1.0)
  return time.monotonic() - began, memory


def wait_for_steps(process: subprocess.Popen, log: str) -> None:
  """Waits until a training that was just started says that it takes steps."""
  with open(log) as file:
    file.seek(0, os.SEEK_END)
    while process.poll() is None and 'steps/s' not in file.read():
      time.sleep(0.2)


def main(argv: list[str]) -> None:
  """Runs both trainings and prints what was found; status 1 if they differ."""
  del argv
  os.makedirs(_WORKDIR.value, exist_ok=True)
  whole, killed = (os.path.join(_WORKDIR.value, n) for n in ('whole', 'killed'))
  process = start(whole)
  seconds, memory = watch(process)
  if process.returncode:
    sys.exit(f'error: the training failed; see {whole}.log')
  held = f'{memory[len(memory) // 2]} MB at half, {memory[-2]} MB at the end'
  print(f'left alone: {seconds:.0f} s, {held}')
  rng = random.Random(_SEED.value)
  for kill in range(_KILLS.value):
    process = start(killed)
    wait_for_steps(process, f'{killed}.log')
    time.sleep(rng.uniform(0.0, 1.5) * seconds / _KILLS.value)
    how = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
    process.send_signal(how)
    status = process.wait()
    saved = sorted(os.listdir(os.path.join(killed, 'surface', 'checkpoints')))
    print(f'{how.name}: exit status {status}, checkpoints {saved}', flush=True)
  if start(killed).wait():
    sys.exit(f'error: the training failed; see {killed}.log')
  import jax  # After the flags: it takes a second.

  from dmdd_jax import evaluate

  states = [evaluate.load_workdir(folder)[1] for folder in (whole, killed)]
  equal = jax.tree.map(np.array_equal, *states)
  print(f'equal bit for bit: {all(jax.tree.leaves(equal))}')
  sys.exit(0 if all(jax.tree.leaves(equal)) else 1)


if __name__ == '__main__':
  cli.run(main)
