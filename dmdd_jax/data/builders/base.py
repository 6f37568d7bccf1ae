"""What the builders share: a layout of `data.layouts` as a TFDS data set."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
from typing import Any

from absl import logging
import numpy as np
import tensorflow_datasets as tfds

from configs import default
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import layouts
from dmdd_jax.data import records as records_lib


@contextlib.contextmanager
def _lock(path: os.PathLike) -> Iterator[None]:
  """Waits until no other process holds this file; its end lets go of it."""
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, 'w')
  except OSError:  # Read-only: nothing is prepared there, but it may be read.
    yield
    return
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logging.info('another process is at work: waiting for %s', path)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


class LayoutBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of one layout, a builder config per category.

  Attributes:
    LAYOUT: its name in `config.data.name`.
    ARCHIVES: file names under which its archive is known.
    LICENCE: shown before it is prepared.
    HOMEPAGE: where the data and their terms are described.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  LAYOUT = ''
  ARCHIVES: tuple[str, ...] = ()
  LICENCE = ''
  HOMEPAGE = ''

  def __init_subclass__(cls, **kwargs) -> None:
    """Fills in what follows from the attributes."""
    archives = ''.join(f'{name} or ' for name in cls.ARCHIVES)
    cls.MANUAL_DOWNLOAD_INSTRUCTIONS = (
      f'Get the set from {cls.HOMEPAGE} and put {archives}its unpacked folder'
      ' into manual_dir, or name the unpacked folder as manual_dir.'
    )
    cls.BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name=name)
      for name in layouts.CATEGORIES[cls.LAYOUT]
    ]
    super().__init_subclass__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(None, None, 3)),
          'mask': tfds.features.Image(shape=(None, None, 1)),
          'label': tfds.features.ClassLabel(names=['good', 'defective']),
          'defect': tfds.features.Text(),
          'filename': tfds.features.Text(),
          **self.extra_features(),
        }
      ),
      homepage=self.HOMEPAGE,
      license=self.LICENCE,
      disable_shuffling=True,
    )

  def download_and_prepare(self, **kwargs) -> None:
    """As TFDS does it, one process at a time.

    At once they would unpack the same archive into the same place. Those that
    had to wait take what the first one has prepared.
    """
    with _lock(self.data_dir_root / f'.{self.name}.lock'):
      super().download_and_prepare(**kwargs)
      if not self.info.initialized:
        self.info.read_from_directory(self.data_path)

  def extra_features(self) -> dict[str, Any]:
    """More features of an example; none here."""
    return {}

  def extra_values(
    self, root: str, record: records_lib.Record
  ) -> dict[str, Any]:
    """The values of `extra_features` of one record."""
    del root, record
    return {}

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    logging.info('%s: licence: %s', self.name, self.LICENCE)
    root = self._root(dl_manager)
    data = default.get_config().data
    data.name, data.root = self.LAYOUT, os.fspath(root)
    data.category = self.builder_config.name
    dataset = layouts.list_dataset(data)
    return {
      'train': self._generate_examples(root, dataset.train),
      'test': self._generate_examples(root, dataset.test),
    }

  def _root(self, dl_manager: tfds.download.DownloadManager) -> str:
    """The unpacked folder: `manual_dir`, or what its archive holds.

    Raises:
      MissingDataError: nothing is there; where to get it and where to put it.
    """
    try:
      manual = os.fspath(dl_manager.manual_dir)
    except (AssertionError, FileNotFoundError) as error:
      raise files.MissingDataError(
        f'{self.name}: {self.MANUAL_DOWNLOAD_INSTRUCTIONS} ({error})'
      ) from None
    for name in self.ARCHIVES:
      archive = os.path.join(manual, name)
      if os.path.isfile(archive):
        kind = tfds.download.ExtractMethod
        kind = kind.ZIP if name.endswith('.zip') else kind.TAR  # Also .tar.xz.
        resource = tfds.download.Resource(path=archive, extract_method=kind)
        return self._unwrap(os.fspath(dl_manager.extract(resource)))
    return self._unwrap(manual)

  def _unwrap(self, folder: str) -> str:
    """The folder of the categories, where a set is in a folder of its own."""
    entries = [e for e in os.listdir(folder) if not e.startswith('.')]
    inner = os.path.join(folder, entries[0]) if len(entries) == 1 else ''
    # A single category is no wrapper; a set without categories has no folder
    # of their name.
    names = {config.name for config in self.BUILDER_CONFIGS}
    if not os.path.isdir(inner) or (len(names) > 1 and entries[0] in names):
      return folder
    return self._unwrap(inner)

  def _generate_examples(
    self, root: str, records: tuple[records_lib.Record, ...]
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, record in enumerate(records):
      image = images_lib.read_image(record.image, None)
      mask = np.zeros((*image.shape[:2], 1), np.uint8)
      if record.mask is not None:
        mask = 255 * images_lib.read_mask(record.mask, None)
      filename = os.path.relpath(record.image, root).replace(os.sep, '/')
      yield (
        f'{index:06d}/{filename}',
        {
          'image': image,
          'mask': mask,
          'label': record.label,
          'defect': record.defect,
          'filename': filename,
          **self.extra_values(root, record),
        },
      )
