"""Regions of a map, and what the server's answers say of them."""

import base64
import io

import numpy as np
from PIL import Image
import pytest
from scipy import ndimage
import serve_helpers

from dmdd_jax.serve import regions


def _by_scipy(values, threshold):
  """Peak, area and box (top, left, height, width) of each region."""
  labels, count = ndimage.label(values >= threshold, np.ones((3, 3)))
  boxes = ndimage.find_objects(labels)
  found = [
    (
      values[labels == i + 1].max(),
      (labels == i + 1).sum(),
      *(part.start for part in boxes[i]),
      *(part.stop - part.start for part in boxes[i]),
    )
    for i in range(count)
  ]
  return sorted(found, key=lambda region: -region[0])[: regions.MOST]


@pytest.mark.parametrize('seed', range(20))
def test_regions_are_those_of_scipy(seed):
  rng = np.random.default_rng(seed)
  values = rng.random((40, 40))
  if seed % 2:
    values = ndimage.gaussian_filter(values, 1.5)
  threshold = np.quantile(values, rng.random())
  found = regions.find(values, threshold, 40, 40)
  assert [
    (x.peak, x.area, x.top, x.left, x.height, x.width) for x in found
  ] == _by_scipy(values, threshold)


def test_a_snake_is_one_region():
  values = np.zeros((30, 30))
  values[::2] = 1
  values[1::4, -1] = values[3::4, 0] = 1
  (region,) = regions.find(values, 1.0, 30, 30)
  assert region.area == values.sum()


def test_a_region_is_in_pixels_of_the_image():
  values = np.zeros((10, 10))
  values[2:4, 5:8] = [[1, 2, 3], [4, 5, 6]]
  assert regions.find(values, 1.0, height=20, width=100) == [
    regions.Region(left=50, top=4, width=30, height=4, area=120, peak=6)
  ]
  assert regions.find(values, 7.0, 20, 100) == []
  assert regions.find(values, None, 20, 100) == []


def test_an_answer_has_regions_and_on_request_a_preview():
  file = io.BytesIO()
  pixels = np.zeros((32, 64), np.uint16)
  pixels[:16, :32] = 65535
  Image.fromarray(pixels).save(file, 'TIFF')
  with serve_helpers.serving() as address:
    plain = serve_helpers.post(address, file.getvalue()).json()
    answer = serve_helpers.post(
      address, file.getvalue(), '/v1/inspect?preview=true'
    ).json()
  assert plain['preview'] is None
  assert (
    plain['regions']
    == answer['regions']
    == [
      {'left': 0, 'top': 0, 'width': 32, 'height': 16, 'area': 512, 'peak': 1}
    ]
  )
  preview = Image.open(io.BytesIO(base64.b64decode(answer['preview'])))
  assert (preview.format, preview.size) == ('JPEG', (64, 32))
  assert preview.getpixel((8, 8))[0] > 245
  assert preview.getpixel((50, 8))[0] < 10
