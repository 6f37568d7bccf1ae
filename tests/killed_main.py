"""`dmdd_jax.main` with a small network, that sends itself a signal.

DIE='step 3 9' sends itself signal 9 before it takes step 3, and DIE='save 4 15'
signal 15 as soon as the checkpoint of step 4 is being saved.
"""

import os

from dmdd_jax import cli
from dmdd_jax import main
from dmdd_jax import trainer as trainer_lib
from dmdd_jax.models import resnet
from dmdd_jax.training import checkpoint

WHERE, STEP, SIGNAL = os.environ.get('DIE', 'nowhere 0 0').split()


def _die(where, step):
  if (where, step) == (WHERE, int(STEP)):
    os.kill(os.getpid(), int(SIGNAL))


def _batches(self, first, shard=None, original=trainer_lib.Trainer.batches):
  for step, batch in enumerate(original(self, first, shard), first):
    _die('step', step)
    yield batch


def _save(manager, step, state, meta, original=checkpoint.save):
  original(manager, step, state, meta)
  _die('save', step)


if __name__ == '__main__':
  small = resnet.Spec((1, 1, 1, 1), bottleneck=False)
  resnet.SPECS['resnet18'] = small
  trainer_lib.Trainer.batches = _batches
  checkpoint.save = _save
  cli.run(main.main)
