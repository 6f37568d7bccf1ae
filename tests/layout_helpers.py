"""Fake data sets, a few small files in each layout."""

import json

import numpy as np
from PIL import Image


def picture(height=12, width=16, channels=3, seed=0):
  shape = (height, width, channels) if channels else (height, width)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, array, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path, **kwargs)
  return path


def mask(height=12, width=16):
  defect = np.zeros((height, width), np.uint8)
  defect[2:7, 3:9] = 255
  return defect


def mvtec(root):
  """A category 'nut' of 4 train, 2 test good, 2 scratch and 1 dent images."""
  nut = root / 'nut'
  for i in range(4):
    save(nut / f'train/good/{i:03d}.png', picture(seed=i))
  for i in range(2):
    save(nut / f'test/good/{i:03d}.png', picture(seed=10 + i))
    save(nut / f'test/scratch/{i:03d}.png', picture(seed=20 + i))
    save(nut / f'ground_truth/scratch/{i:03d}_mask.png', mask())
  save(nut / 'test/dent/000.PNG', picture(seed=30))
  save(nut / 'ground_truth/dent/000.bmp', mask())  # The other legal name.
  return root


def _loco(root):
  for i in range(3):
    save(root / f'pushpins/train/good/{i:03d}.png', picture(seed=i))
  save(root / 'pushpins/validation/good/000.png', picture(seed=5))
  save(root / 'pushpins/test/good/000.png', picture(seed=6))
  for kind in ('logical_anomalies', 'structural_anomalies'):
    save(root / f'pushpins/test/{kind}/000.png', picture(seed=7))
    first, second = np.zeros((2, 12, 16), np.uint8)
    first[:4], second[8:] = 255, 130
    truth = root / f'pushpins/ground_truth/{kind}/000'
    save(truth / '000.png', first)
    save(truth / '001.png', second)
  config = [
    {
      'defect_name': 'relative',
      'pixel_value': 255,
      'saturation_threshold': 0.5,
      'relative_saturation': True,
    },
    {
      'defect_name': 'absolute',
      'pixel_value': 130,
      'saturation_threshold': 10,
      'relative_saturation': False,
    },
  ]
  (root / 'pushpins/defects_config.json').write_text(json.dumps(config))
  return 'pushpins', (3, 1, 2), {'logical_anomalies', 'structural_anomalies'}


def _mvtec_ad_2(root):
  for i in range(3):
    save(root / f'can/train/good/{i:03d}_regular.png', picture(seed=i))
  save(root / 'can/validation/good/000_regular.png', picture(seed=5))
  public = root / 'can/test_public'
  save(public / 'good/000_regular.png', picture(seed=6))
  save(public / 'bad/000_regular.png', picture(seed=7))
  save(public / 'bad/000_underexposed.png', picture(seed=8))
  for name in ('000_regular', '000_underexposed'):
    save(public / f'ground_truth/bad/{name}_mask.png', mask())
  save(root / 'can/test_private/000_regular.png', picture(seed=9))
  save(root / 'can/test_private_mixed/000_mixed.png', picture(seed=9))
  return 'can', (3, 1, 2), {'bad'}


def _visa(root):
  rows = ['object,split,label,image,mask']
  for i, split in enumerate(('train', 'train', 'test')):
    name = f'candle/Data/Images/Normal/{i:04d}.JPG'
    save(root / name, picture(seed=i))
    rows.append(f'candle,{split},normal,{name},')
    rows.append(f'pcb1,{split},normal,pcb1/{i}.JPG,')
  image = 'candle/Data/Images/Anomaly/000.JPG'
  truth = 'candle/Data/Masks/Anomaly/000.png'
  save(root / image, picture(seed=9))
  save(root / truth, mask() // 85)  # Values are numbers of defect kinds.
  rows.append(f'candle,test,anomaly,{image},{truth}')
  (root / 'split_csv').mkdir()
  (root / 'split_csv/1cls.csv').write_text('\n'.join(rows) + '\n')
  return 'candle', (2, 1, 1), {'anomaly'}


def _btad(root):
  for i in range(3):
    save(root / f'01/train/ok/{i:04d}.bmp', picture(seed=i))
  save(root / '01/test/ok/0000.bmp', picture(seed=6))
  save(root / '01/test/ko/0000.bmp', picture(seed=7))
  save(root / '01/ground_truth/ko/0000.png', mask())
  return '01', (3, 1, 1), {'ko'}


def _mpdd(root):
  for i in range(3):
    save(root / f'tubes/train/good/{i:03d}.png', picture(seed=i))
  save(root / 'tubes/test/good/000.png', picture(seed=6))
  save(root / 'tubes/test/anomalous/000.png', picture(seed=7))
  save(root / 'tubes/ground_truth/anomalous/000_mask.png', mask())
  return 'tubes', (3, 1, 1), {'anomalous'}


def _kolektor(root):
  for split, start in (('train', 10), ('test', 20)):
    for i in range(3):
      save(root / f'{split}/{start + i}.png', picture(seed=start + i))
      save(root / f'{split}/{start + i}_GT.png', mask() * (i == 1))
  return 'kolektorsdd2', (2, 2, 1), {'defect'}


def _tiles(root):
  for i in range(5):
    save(root / f'MT_Free/Imgs/exp1_{i}.jpg', picture(seed=i))
    save(root / f'MT_Free/Imgs/exp1_{i}.png', 0 * mask())
  for kind in ('Crack', 'Blowhole'):
    save(root / f'MT_{kind}/Imgs/exp2_1.jpg', picture(seed=8))
    save(root / f'MT_{kind}/Imgs/exp2_1.png', mask())
  (root / 'README.md').write_text('x')
  return 'magnetic_tile', (4, 1, 2), {'crack', 'blowhole'}


# Each makes a tree and returns a category, its counts (train, test good, test
# defective) and the names of its defects.
SETS = {
  'mvtec_loco': _loco,
  'mvtec_ad_2': _mvtec_ad_2,
  'visa': _visa,
  'btad': _btad,
  'mpdd': _mpdd,
  'kolektorsdd2': _kolektor,
  'magnetic_tile': _tiles,
}
