"""Strict loading of the teacher's weights, from files, the hub and a seed."""

import hashlib
import os
import pathlib

import huggingface_hub
from huggingface_hub import constants as hub_constants
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dmdd_jax.models import pretrained
from dmdd_jax.models import resnet

TAPS = pathlib.Path(__file__).parent / 'data' / 'teacher_taps.npz'


def torch_weights(arch):
  """Random weights under the names and shapes that PyTorch's network used."""
  rng = np.random.default_rng(3)
  with np.load(TAPS) as archive:
    lines = archive[f'{arch}/shapes'].item().decode().splitlines()
  out = {}
  for line in lines:
    name, *shape = line.split()
    # In [0.5, 1.5): legal as a variance too.
    out[name] = rng.random(tuple(map(int, shape)), np.float32) + 0.5
  return out


@pytest.fixture(scope='module')
def shared_weights():
  return torch_weights('resnet18')


@pytest.fixture
def weights(shared_weights):
  """A copy, so that a test may add, drop and replace names."""
  return dict(shared_weights)


def save(path, tensors):
  if path.suffix == '.npz':
    np.savez(path, **tensors)
  else:
    safetensors.numpy.save_file(tensors, path)
  return str(path)


def assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def check_variables(variables, weights):
  """A sample of every kind of leaf, indexed by hand."""
  params, stats = variables['params'], variables['batch_stats']
  kernel = params['layer2_0']['downsample_0']['kernel']
  weight = weights['layer2.0.downsample.0.weight']
  assert kernel.shape == (1, 1, 64, 128) and weight.shape == (128, 64, 1, 1)
  assert kernel[0, 0, 5, 7] == weight[7, 5, 0, 0]
  kernel, weight = params['conv1']['kernel'], weights['conv1.weight']
  assert kernel[6, 2, 1, 9] == weight[9, 1, 6, 2]
  for leaf, name in (('scale', 'weight'), ('bias', 'bias')):
    np.testing.assert_array_equal(
      params['layer3_1']['bn2'][leaf], weights[f'layer3.1.bn2.{name}']
    )
  for leaf in ('mean', 'var'):
    np.testing.assert_array_equal(
      stats['bn1'][leaf], weights[f'bn1.running_{leaf}']
    )
  dtypes = {x.dtype for x in jax.tree.leaves(variables)}
  assert dtypes == {np.dtype(np.float32)}


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors'])
def test_a_local_file_is_mapped_and_fingerprinted(tmp_path, weights, suffix):
  path = save(tmp_path / f'teacher{suffix}', weights)
  variables, fingerprint = pretrained.load('resnet18', path)
  check_variables(variables, weights)
  content = pathlib.Path(path).read_bytes()
  assert fingerprint == f'sha256:{hashlib.sha256(content).hexdigest()}'


@pytest.mark.parametrize(
  ('suffix', 'dtype'),
  [
    ('.npz', np.float16),
    ('.npz', np.float64),
    ('.safetensors', np.float16),
    ('.safetensors', np.float64),
    ('.safetensors', ml_dtypes.bfloat16),
  ],
)
def test_every_float_type_becomes_float32(tmp_path, weights, suffix, dtype):
  cast = {k: v.astype(dtype) for k, v in weights.items()}
  path = save(tmp_path / f'teacher{suffix}', cast)
  variables, _ = pretrained.load('resnet18', path)
  check_variables(variables, {k: v.astype(np.float32) for k, v in cast.items()})


def test_the_names_shapes_and_tree_are_the_modules(weights):
  assert pretrained.torch_shapes('resnet18') == {
    name: value.shape for name, value in weights.items()
  }
  random, _ = pretrained.load('resnet18', 'random')
  mapped = pretrained.from_torch('resnet18', weights, 'test')
  shapes = [jax.tree.map(np.shape, tree) for tree in (random, mapped)]
  assert shapes[0] == shapes[1]


def test_only_layer4_fc_and_counters_are_ignored(weights):
  expected = pretrained.from_torch('resnet18', weights, 'test')
  weights['fc.weight'] = np.zeros((1000, 512), np.float32)
  weights['layer4.0.conv1.weight'] = np.full((2, 2), np.nan)
  weights['layer1.0.bn1.num_batches_tracked'] = np.array(7)
  assert_same(pretrained.from_torch('resnet18', weights, 'test'), expected)
  for name in ('fc2.weight', 'layer40.weight', 'head.fc.weight', 'fc'):
    with pytest.raises(pretrained.WeightsError, match=f'unknown {name}: '):
      pretrained.from_torch(
        'resnet18', weights | {name: np.zeros(3, np.float32)}, 'test'
      )


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path, weights):
  del weights['bn1.bias'], weights['layer3.1.conv2.weight']
  weights['layer1.2.conv1.weight'] = np.zeros((64, 64, 3, 3), np.float32)
  weights['layer2.0.conv1.weight'] = np.zeros((128, 64, 1, 1), np.float32)
  weights['layer2.0.bn1.bias'] = np.zeros(128, np.int8)
  path = save(tmp_path / 'teacher.npz', weights)
  with pytest.raises(pretrained.WeightsError) as caught:
    pretrained.load('resnet18', path)
  first, *lines, last = str(caught.value).splitlines()
  assert path in first and 'it fits none of' in first
  assert sorted(line.strip() for line in lines) == [
    'missing bn1.bias: expected (64,)',
    'missing layer3.1.conv2.weight: expected (256, 256, 3, 3)',
    (
      'shape of layer2.0.conv1.weight: found (128, 64, 1, 1), '
      'expected (128, 64, 3, 3)'
    ),
    (
      'type of layer2.0.bn1.bias: found int8, '
      'expected one of float16, bfloat16, float32, float64'
    ),
    'unknown layer1.2.conv1.weight: found (64, 64, 3, 3)',
  ]
  assert '--config.teacher.weights' in last


@pytest.mark.parametrize(
  ('asked', 'given'),
  [
    ('resnet18', 'resnet34'),
    ('resnet34', 'resnet18'),
    ('resnet50', 'resnet34'),
    ('wide_resnet50_2', 'resnet50'),
    ('resnet50', 'wide_resnet50_2'),
  ],
)
def test_weights_of_another_architecture_are_recognised(asked, given):
  with pytest.raises(pretrained.WeightsError, match=f'it fits {given}\\)'):
    pretrained.from_torch(asked, torch_weights(given), 'test')


def test_the_input_channels_must_agree(weights):
  with pytest.raises(pretrained.WeightsError, match=r'conv1.weight.*64, 1, 7'):
    pretrained.from_torch('resnet18', weights, 'test', image_channels=1)
  weights['conv1.weight'] = weights['conv1.weight'][:, :1]
  variables = pretrained.from_torch('resnet18', weights, 'test', 1)
  assert variables['params']['conv1']['kernel'].shape == (7, 7, 1, 64)


def test_values_no_network_has_are_refused_by_name(weights):
  weights['conv1.weight'] = weights['conv1.weight'].copy()
  weights['conv1.weight'][3, 1, 2, 2] = np.nan
  weights['bn1.weight'] = np.full(64, 1e300)  # beyond float32
  weights['layer1.0.bn2.running_var'] = np.linspace(-0.5, 1, 64)
  weights['layer1.0.bn2.running_mean'] = np.linspace(-0.5, 1, 64)  # legal
  with pytest.raises(pretrained.WeightsError) as caught:
    pretrained.from_torch('resnet18', weights, 'some.npz')
  first, *lines, _ = str(caught.value).splitlines()
  assert 'some.npz' in first
  assert sorted(line.strip() for line in lines) == [
    'bn1.weight: not finite',
    'conv1.weight: not finite',
    'layer1.0.bn2.running_var: a negative variance, -0.5',
  ]


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors'])
@pytest.mark.parametrize('keep', [0, 5, 1000, -3])
def test_a_damaged_file_is_one_clear_error(tmp_path, weights, suffix, keep):
  path = pathlib.Path(save(tmp_path / f'teacher{suffix}', weights))
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(pretrained.WeightsError) as caught:
    pretrained.load('resnet18', str(path))
  message = str(caught.value)
  assert str(path) in message and '--config.teacher.weights' in message
  assert '\n' not in message


def test_arrays_that_are_not_arrays_are_refused(tmp_path):
  pickled = tmp_path / 'pickled.npz'
  np.savez(pickled, **{'conv1.weight': np.array({'a': 1}, dtype=object)})
  bare = tmp_path / 'bare.npz'
  with bare.open('wb') as f:
    np.save(f, np.zeros(3))
  for path in (pickled, bare):
    with pytest.raises(pretrained.WeightsError, match=path.name):
      pretrained.load('resnet18', str(path))


def test_a_path_that_is_no_weights_file_says_what_would_be(tmp_path):
  with pytest.raises(FileNotFoundError) as caught:
    pretrained.load('resnet18', str(tmp_path / 'absent.safetensors'))
  assert str(tmp_path / 'absent.safetensors') in str(caught.value)
  checkpoint = tmp_path / 'resnet18.pth'
  checkpoint.write_bytes(b'pickle')
  with pytest.raises(pretrained.WeightsError, match='save_file'):
    pretrained.load('resnet18', str(checkpoint))
  for weights in ('', str(tmp_path)):
    with pytest.raises(pretrained.WeightsError, match=r'\.npz'):
      pretrained.load('resnet18', weights)
  with pytest.raises(ValueError, match='resnet101'):
    pretrained.load('resnet101', 'random')


def test_random_depends_on_the_seed_alone():
  first, fingerprint = pretrained.load('resnet18', 'random', rng_seed=5)
  assert fingerprint == 'random:resnet18:5'
  again, _ = pretrained.load('resnet18', 'random', rng_seed=5)
  assert_same(first, again)
  other, fingerprint = pretrained.load('resnet18', 'random', rng_seed=6)
  assert fingerprint == 'random:resnet18:6'
  kernel = first['params']['layer3_1']['conv2']['kernel']
  assert (kernel != other['params']['layer3_1']['conv2']['kernel']).all()
  # He, fan out: variance 2 / (3 * 3 * 256); 590k samples.
  np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 2304), rtol=0.01)
  assert {type(x) for x in jax.tree.leaves(first)} == {np.ndarray}


def test_random_takes_any_number_of_channels():
  variables, _ = pretrained.load('resnet18', 'random', image_channels=1)
  assert variables['params']['conv1']['kernel'].shape == (7, 7, 1, 64)


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
  """huggingface_hub itself, offline, on an empty cache; returns the cache."""
  monkeypatch.setattr(hub_constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(hub_constants, 'HF_HUB_CACHE', str(tmp_path))
  return tmp_path


def cached_path(cache, arch):
  revision, _ = pretrained.HUB_FILES[arch]
  folder = cache / f'models--timm--{arch}.tv_in1k' / 'snapshots' / revision
  folder.mkdir(parents=True)
  return folder / 'model.safetensors'


def test_the_hub_out_of_reach_names_the_ways_out(offline_hub):
  with pytest.raises(pretrained.WeightsError) as caught:
    pretrained.load('resnet34', 'hub')
  message = str(caught.value)
  revision, _ = pretrained.HUB_FILES['resnet34']
  for part in (
    'timm/resnet34.tv_in1k',
    revision,
    '--config.teacher.weights=',
    'HF_HOME',
  ):
    assert part in message
  assert '\n' not in message


def test_a_failing_connection_is_the_same_error(monkeypatch):
  def fail(*unused_args, **unused_kwargs):
    raise RuntimeError('connection reset\nand much more')

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
  with pytest.raises(pretrained.WeightsError, match=r'connection reset\)'):
    pretrained.load('resnet18', 'hub')


def test_the_hubs_cache_serves_offline(offline_hub, weights, monkeypatch):
  path = save(cached_path(offline_hub, 'resnet18'), weights)
  digest = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
  revision, _ = pretrained.HUB_FILES['resnet18']
  monkeypatch.setitem(pretrained.HUB_FILES, 'resnet18', (revision, digest))
  variables, fingerprint = pretrained.load('resnet18', 'hub')
  check_variables(variables, weights)
  assert fingerprint == f'sha256:{digest}'


def test_a_hub_file_other_than_the_pinned_one_is_refused(offline_hub, weights):
  path = save(cached_path(offline_hub, 'resnet18'), weights)
  with pytest.raises(pretrained.WeightsError, match='not the pinned') as caught:
    pretrained.load('resnet18', 'hub')
  assert path in str(caught.value)


def test_every_architecture_has_a_full_pin():
  assert set(pretrained.HUB_FILES) == set(resnet.SPECS)
  for revision, digest in pretrained.HUB_FILES.values():
    assert len(revision) == 40 and len(digest) == 64
    int(revision, 16), int(digest, 16)


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50'])
def test_the_real_files_load(arch):
  root = os.environ.get('DMDD_TEST_DATA')
  if not root:
    pytest.skip('DMDD_TEST_DATA is not set: no real weights')
  path = pathlib.Path(root, 'weights', f'{arch}_layers1-3.safetensors')
  variables, fingerprint = pretrained.load(arch, str(path))
  content = path.read_bytes()
  assert fingerprint == f'sha256:{hashlib.sha256(content).hexdigest()}'
  raw = safetensors.numpy.load(content)
  np.testing.assert_array_equal(
    variables['params']['layer3_0']['conv1']['kernel'][0, 0, 3],
    raw['layer3.0.conv1.weight'][:, 3, 0, 0].astype(np.float32),
  )
  # Nothing of the file is left unused, nothing is made up.
  assert len(jax.tree.leaves(variables)) == len(raw)
