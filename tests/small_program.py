"""Runs a program as `python` does, with a small network for ResNet-18.

python tests/small_program.py -m dmdd_jax.main --config ...
python tests/small_program.py -c 'import dmdd_jax; ...'
python tests/small_program.py tools/export.py --workdir ...
"""

import runpy
import sys

from dmdd_jax.models import resnet

if __name__ == '__main__':
  resnet.SPECS['resnet18'] = resnet.Spec(
    (1, 1, 1, 1), bottleneck=False, channels=4
  )
  kind = sys.argv[1]
  if kind == '-m':
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
  elif kind == '-c':
    del sys.argv[0]
    exec(sys.argv.pop(1), {'__name__': '__main__'})
  else:
    del sys.argv[0]
    runpy.run_path(kind, run_name='__main__')
