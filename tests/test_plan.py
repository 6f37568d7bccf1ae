"""Plans for TPUs: the numbers read from programs, by hand and for real."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import model_helpers
import pytest

from dmdd_jax import plan
from dmdd_jax import sharding
from dmdd_jax.models import resnet

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
TEXT = """
HloModule jit_step

%body (x: f32[4]) -> f32[4] {
  ROOT %all-reduce.1 = f32[4]{0:T(128)} all-reduce(%x), to_apply=%add
}

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.2 = (f32[8]{0:T(128)}, /*index=1*/bf16[3,5]{1,0}) all-reduce(%x)
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %copy.3 = f32[8,64]{0,1:T(8,128)} copy(%x)
  %convert_bitcast_fusion.1 = bf16[8,64]{1,0:T(8,128)(2,1)} fusion(%x)
  ROOT %copy_add_fusion = f32[8,64]{1,0:T(8,128)S(1)} fusion(%x), kind=kLoop
}
"""


def test_collectives_are_counted_with_the_bytes_of_their_results():
  # 4 numbers; 8 of four bytes and 15 of two; a gathered array of 8.
  assert plan.collectives(TEXT) == {
    'all-reduce': (2, 16 + 32 + 30),
    'all-gather': (1, 32),
  }


def test_a_ring_sends_a_sum_twice():
  found = {'all-reduce': (3, 100), 'all-gather': (1, 40)}
  assert plan.sent(found, 4) == pytest.approx(0.75 * (2 * 100 + 40))
  assert plan.sent(found, 1) == 0.0


def test_traffic_is_what_leaves_the_chip():
  array, row = 4 * 8 * 128, 4 * 128
  expected = (row + 30) + array  # The sums, and their operand.
  expected += (8 + 32) + array  # The start of a gather.
  expected += (4 * 64 * 128) + array  # The copy to another layout.
  expected += array // 2 + array  # The cast.
  expected += array  # The last result stays on the chip.
  assert plan.traffic(TEXT) == expected
  moves = TEXT.replace(
    '  ROOT',
    '  %s = ((f32[8,64]{1,0:T(8,128)}), f32[2,64]{1,0:T(2,128)S(1)},'
    ' u32[]{:S(2)}) slice-start(%x)\n  ROOT',
  )
  assert plan.traffic(moves) == expected + 4 * 2 * 128


def test_padding_copies_and_casts_are_those_of_the_main_computation():
  waste = plan.waste(TEXT)
  assert waste['copies'] == (1, 4 * 8 * 64)
  assert waste['casts'] == (1, 2 * 8 * 64)
  # Numbers and their rows of 128; without a tile nothing is added.
  sums, kept = 32 + 30, 40 + 32
  numbers = sums + kept + (4 + 2 + 4) * 8 * 64
  held = 4 * 128 + 30 + kept + 4 * 64 * 128 + (2 + 4) * 8 * 128
  assert waste['padding'] == pytest.approx(held / numbers)


@pytest.fixture
def small_config():
  small = resnet.Spec((1, 1, 1, 1), bottleneck=False, channels=4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnet.SPECS, 'resnet18', small)
    yield model_helpers.tiny_config(
      data__root='x',
      train__head__kind='muon',
      train__total_steps=5,
      train__distill_steps=0,
    )


def test_what_a_program_takes(small_config, monkeypatch):
  """On a chip with the processor's name: all but TPU's own is the same."""
  device = jax.devices()[0]
  chip = plan.Chip(1e9, 1e9, 1e8, 1e7)
  monkeypatch.setitem(plan.CHIPS, device.device_kind, chip)
  mesh = sharding.make_mesh([device])
  plans = [plan.read(p) for p in plan.programs(small_config, mesh)]
  assert [p.program for p in plans] == ['segment', 'predict', 'exported']
  assert [p.rows for p in plans] == [4, 16, 16]
  segment, predict, exported = plans
  assert segment.steps == 5 and predict.steps == 0
  # One device's prediction is the function that is exported, but for outputs.
  assert predict.flops == pytest.approx(exported.flops, rel=0.1)
  for p in plans:
    assert p.collectives == {} and p.seconds['links'] == 0.0
    assert p.seconds['memory'] == p.moved / 1e8
    parts = dict(p.memory)
    assert parts.pop('peak') == sum(parts.values())
    # As many rows as fit beside what does not grow.
    per_row = p.memory['peak'] / p.rows
    assert p.largest >= int(1e9 / per_row)
    assert p.bound >= p.flops / 1e9
  assert predict.seconds['compute'] == predict.flops / 1e9
  assert segment.seconds['compute'] > segment.flops / 1e9  # Muon's passes.
  table = plan.format_tables(plans, categories=3)
  assert '3 trainings of 5 steps take at least' in table


def test_impossible_plans_are_refused(small_config):
  mesh = sharding.make_mesh(jax.devices()[:1])
  with pytest.raises(ValueError, match=r'no distill; choose from segment, pr'):
    next(plan.programs(small_config, mesh, ['distill']))
  small_config.train.total_steps = -1
  with pytest.raises(ValueError, match=r'config\.train\.total_steps'):
    next(plan.programs(small_config, mesh))


TINY = """
import runpy, sys
from dmdd_jax.models import resnet
resnet.SPECS['resnet18'] = resnet.Spec((1, 1, 1, 1), False, channels=4)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu (the extra tpu) is not installed',
)
def test_the_tool_compiles_for_four_chips_that_are_not_there(tmp_path):
  output = tmp_path / 'plan.json'
  fields = {
    'data.image_size': 32,
    'student.trunk': 'encoder',
    'head.width': 4,
    'train.batch_size': 8,
    'train.total_steps': 4,
    'train.distill_steps': 4,
  }
  command = [sys.executable, '-c', TINY, 'tools/plan.py']
  command += ['--topology=v5e:2x2', '--config=configs/mvtec.py:screw,pill']
  command += ['--programs=distill', f'--output={output}']
  done = subprocess.run(
    command + [f'--config.{name}={value}' for name, value in fields.items()],
    cwd=REPOSITORY,
    env={**os.environ, 'PYTHONPATH': str(REPOSITORY)},
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  (found,) = json.loads(output.read_text())
  assert found['devices'] == 4 and found['rows'] == 8
  assert set(found['collectives']) == {'all-reduce'}
  assert found['padding'] > 1.0
  assert '2 trainings of 4 steps' in done.stdout
