"""What operators say of verdicts: kept, and read by training and evaluation."""

import json
import os

from PIL import Image
import pytest
import serve_helpers

from dmdd_jax.data import layouts
from dmdd_jax.serve import feedback

png, post = serve_helpers.png, serve_helpers.post


@pytest.fixture
def folder(tmp_path):
  return tmp_path / 'feedback'


@pytest.fixture
def address(folder):
  keep = feedback.open_folder(folder, ['nut'])
  with serve_helpers.serving(keep=keep) as running:
    yield running


def _say(address, content, opinion, **query):
  path = f'/v1/feedback?opinion={opinion}' + ''.join(
    f'&{name}={value}' for name, value in query.items()
  )
  return post(address, content, path)


def _entries(folder):
  lines = (folder / 'nut' / 'feedback.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_an_opinion_is_kept_with_image_score_and_reason(address, folder):
  answer = _say(address, png(10), 'defective', reason='dent', name='a.png')
  assert answer.status_code == 200, answer.text
  file = folder / answer.json()['file']
  assert file.read_bytes() == png(10)
  assert file.parent == folder / 'nut' / 'test' / 'defective'
  (entry,) = _entries(folder)
  assert entry['file'] == answer.json()['file']
  assert entry['score'] == answer.json()['score'] == pytest.approx(110 / 255)
  assert (entry['verdict'], entry['opinion']) == ('good', 'defective')
  assert (entry['reason'], entry['name']) == ('dent', 'a.png')
  assert entry['sha256'] == serve_helpers.sha256_of(png(10))
  assert entry['image_threshold'] == 0.5 and entry['time']


def test_the_latest_opinion_decides(address, folder):
  _say(address, png(10), 'defective')
  _say(address, png(10), 'good')
  files = [name for _, _, names in os.walk(folder) for name in names]
  assert len(files) == 2  # The image and the entries.
  assert len(list((folder / 'nut' / 'test' / 'good').iterdir())) == 1
  assert [entry['opinion'] for entry in _entries(folder)] == [
    'defective',
    'good',
  ]


def test_training_and_evaluation_read_what_was_kept(address, folder, tmp_path):
  _say(address, png(10), 'defective')
  _say(address, png(100), 'good')
  (tmp_path / 'normal').mkdir()
  (tmp_path / 'normal' / 'a.png').write_bytes(png(50))
  data = {
    'name': 'folder',
    'root': '',
    'category': 'nut',
    'normal': str(tmp_path / 'normal'),
    'defect': str(folder / 'nut' / 'test' / 'defective'),
    'test_normal': str(folder / 'nut' / 'test' / 'good'),
    'masks': '',
    'test_fraction': 0.5,
    'test_seed': 0,
  }
  dataset = layouts.list_dataset(data)
  assert sorted(record.label for record in dataset.test) == [0, 1]
  # With a mask drawn, it is a test split in the layout of MVTec AD.
  (defective,) = (folder / 'nut' / 'test' / 'defective').iterdir()
  masks = folder / 'nut' / 'ground_truth' / 'defective'
  masks.mkdir(parents=True)
  Image.new('L', (30, 20), 255).save(masks / f'{defective.stem}_mask.png')
  dataset = layouts.list_mvtec(folder, 'nut', with_train=False)
  assert sorted(record.label for record in dataset.test) == [0, 1]


@pytest.mark.parametrize(
  'content, query, status',
  [
    (b'x', 'opinion=good', 415),
    (png(), 'opinion=perhaps', 422),
    (png(), '', 422),
    (png(), 'opinion=good&reason=' + 'x' * 501, 422),
    (png(), 'opinion=good&category=..', 404),
  ],
)
def test_what_cannot_be_kept_is_refused(
  address, folder, content, query, status
):
  answer = post(address, content, f'/v1/feedback?{query}')
  assert answer.status_code == status
  assert not (folder / 'nut' / 'test').exists()


def test_without_the_flag_nothing_is_kept():
  with serve_helpers.serving() as address:
    answer = _say(address, png(), 'good')
    models = serve_helpers.httpx.get(f'{address}/v1/models', timeout=60).json()
  assert answer.status_code == 404 and '--feedback' in answer.json()['detail']
  assert models[0]['feedback'] is False


def test_a_disk_that_is_full_is_said():
  def keep(*args):
    raise OSError(28, 'No space left on device')

  with serve_helpers.serving(keep=keep) as address:
    answer = _say(address, png(), 'good')
    assert answer.status_code == 507
    assert 'No space left' in answer.json()['detail']
    assert post(address, png()).status_code == 200


@pytest.mark.parametrize('category', ['..', '', 'a/b'])
def test_a_category_that_is_no_folder_is_refused(folder, category):
  with pytest.raises(ValueError, match='is no name of a folder'):
    feedback.open_folder(folder, [category])


@pytest.mark.parametrize(
  'kind, suffix',
  [('PNG', 'png'), ('JPEG', 'jpg'), ('BMP', 'bmp'), ('TIFF', 'tif')]
  + [('WEBP', 'webp')],
)
def test_an_image_keeps_the_suffix_of_its_format(
  folder, tmp_path, kind, suffix
):
  Image.new('RGB', (4, 4)).save(tmp_path / 'x', kind)
  keep = feedback.open_folder(folder, ['nut'])
  content = (tmp_path / 'x').read_bytes()
  assert keep('nut', 'good', content, {}).endswith(f'.{suffix}')
