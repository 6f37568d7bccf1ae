"""Kills a training at random steps; its end must equal an undisturbed one's.

  python tools/soak.py --workdir runs/soak --steps 2000 --kills 10

Both trainings are of configs/demo.py, made small. Prints the checkpoints after
each kill, whether the ends are equal, and the memory of the undisturbed one.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

from absl import flags
import numpy as np

from dmdd_jax import cli

_WORKDIR = cli.define_path('workdir', None, 'New folder.', required=True)
_STEPS = flags.DEFINE_integer('steps', 2000, 'Steps of each training.')
_KILLS = flags.DEFINE_integer('kills', 10, 'Half by SIGKILL, half by SIGTERM.')


def start(workdir: str) -> subprocess.Popen:
  """Starts or continues a training in a folder, its log beside it."""
  command = [sys.executable, '-m', 'dmdd_jax.main', '--workdir', workdir]
  command += ['--config', 'configs/demo.py', '--config.data.image_size=32']
  command += [f'--config.data.root={_WORKDIR.value}/data']
  command += ['--config.head.width=4', '--config.train.batch_size=2']
  command += [f'--config.train.total_steps={_STEPS.value}']
  command += [f'--config.train.distill_steps={_STEPS.value // 2}']
  command += ['--config.train.checkpoint_every=100']
  with open(f'{workdir}.log', 'a') as log:
    return subprocess.Popen(command, stdout=log, stderr=log)


def watch(process: subprocess.Popen, log: str) -> dict[int, int]:
  """Waits for a training: {step: resident MB when the log named the step}."""
  memory = {}
  with open(log) as file, open(f'/proc/{process.pid}/statm') as statm:
    while process.poll() is None:
      if steps := re.findall(r'step (\d+)/', file.read()):
        statm.seek(0)
        pages = int(statm.read().split()[1])
        memory[int(steps[-1])] = pages * os.sysconf('SC_PAGE_SIZE') >> 20
      time.sleep(0.2)
  return memory


def kill(workdir: str, how: signal.Signals, step: int) -> str:
  """Continues a training and kills it once the log names that step."""
  process = start(workdir)
  with open(f'{workdir}.log') as file:
    file.seek(0, os.SEEK_END)
    steps = ['0']
    while process.poll() is None and int(steps[-1]) < step:
      time.sleep(0.2)
      steps += re.findall(r'step (\d+)/', file.read())
  process.send_signal(how)
  saved = f'{workdir}/surface/checkpoints'
  return f'status {process.wait()}, checkpoints {sorted(os.listdir(saved))}'


def main(argv: list[str]) -> None:
  """Runs both trainings and compares them; status 1 if they differ."""
  del argv
  os.makedirs(_WORKDIR.value, exist_ok=True)
  whole, killed = (os.path.join(_WORKDIR.value, n) for n in ('whole', 'killed'))
  memory = watch(start(whole), f'{whole}.log')
  print(f'undisturbed, MB after steps: {memory}', flush=True)
  steps = sorted(random.Random(0).sample(range(_STEPS.value), _KILLS.value))
  for index, step in enumerate(steps):
    how = (signal.SIGKILL, signal.SIGTERM)[index % 2]
    print(f'{how.name} at {step}: {kill(killed, how, step)}', flush=True)
  if start(killed).wait():
    sys.exit(f'error: the training failed; see {killed}.log')
  import jax  # After the flags: it takes seconds.

  from dmdd_jax.scoring import trained as trained_lib

  ends = []
  for folder in (f'{whole}/surface', f'{killed}/surface'):
    with open(f'{folder}/results.json') as file:
      results = json.load(file)
    names = ('image_auroc', 'pixel_auroc', 'pixel_ap', 'au_pro', 'validation')
    figures = {name: results[name] for name in names}
    ends.append((trained_lib.load_workdir(folder)[1], figures))
  equal = all(jax.tree.leaves(jax.tree.map(np.array_equal, *ends)))
  print(f'equal bit for bit: {equal}; {ends[0][1]}')
  sys.exit(0 if equal else 1)


if __name__ == '__main__':
  cli.run(main)
