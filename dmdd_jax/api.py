"""From Python, in a script or a notebook; docs/api.md explains it.

Synopsis:

  inspector = dmdd_jax.train('parts/good', workdir='runs/parts', minutes=20)
  for result in inspector('new/'):
    print(result.score, result.verdict)
  metrics = inspector.evaluate('parts/test', masks='parts/ground_truth')
  inspector.export('parts.onnx')
  figure = inspector.show('new/a.png')
  print(inspector.report())
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import json
import os
import shlex
from typing import Any

from absl import logging
import jax
import ml_collections
import numpy as np
import tqdm.auto

from configs import folder as folder_config
from dmdd_jax import budget
from dmdd_jax import cli
from dmdd_jax import config as config_lib
from dmdd_jax import predict
from dmdd_jax import provenance
from dmdd_jax import run as run_lib
from dmdd_jax import storage
from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import inputs
from dmdd_jax.report import overlays
from dmdd_jax.report import page
from dmdd_jax.scoring import trained as trained_lib

# Fields of a config that name images, and so may be lists of them.
_IMAGE_FIELDS = ('normal', 'defect', 'masks', 'test_normal')


def train(
  images: inputs.Sources | None,
  workdir: str | os.PathLike,
  minutes: float | None = None,
  config: Mapping[str, Any] | None = None,
  *,
  progress: bool = True,
  **fields: Any,
) -> 'Inspector':
  """Trains on images of good parts, and loads what was trained.

  It is `python -m dmdd_jax.main --config configs/folder.py` with the same
  fields: the same call, or that command, goes on where another one ended.

  Args:
    images: of good parts: a folder, with all below it; a glob; or a list of
      files and of arrays, uint8 (H, W, 3) or (H, W). None where `fields` name
      another layout.
    workdir: gets a folder of the category, tables and report.html.
    minutes: picks `train.total_steps` by the time that a step takes here. A
      workdir that was begun keeps its number of steps.
    config: fields of configs/default.py, {'train.batch_size': 4}, or nested.
    progress: show a bar.
    **fields: the same with a double underscore for the dot,
      `train__batch_size=4`; they win. `data__defect` and `data__test_normal`
      take lists too, `data__masks` a list of files.

  Returns:
    The trained model.

  Raises:
    ValueError, FileNotFoundError: a field, or an image, cannot be used.
    NonFiniteError: the training broke down.
    Preempted: SIGTERM came and the state is saved.
  """
  changes = config_lib.flatten(config or {})
  changes |= {name.replace('__', '.'): value for name, value in fields.items()}
  if images is not None:
    changes['data.normal'] = images
  both = [field for field in budget.STEPS if field in changes]
  if minutes is not None and both:
    raise ValueError(f'minutes picks config.{both[0]}: give one of the two')
  workdir = os.path.expanduser(workdir)
  full = _configure(changes, workdir)
  names = run_lib.categories(full)
  if len(names) > 1 or jax.process_count() > 1:
    raise ValueError(
      'dmdd_jax.train trains one category in one process, not'
      f' {", ".join(names)} in {jax.process_count()}: use'
      ' python -m dmdd_jax.main for more'
    )
  config_lib.check(run_lib.for_category(full, names[0]))
  cli.use_compilation_cache()
  if minutes is not None:
    full = _with_budget(full, changes, workdir, minutes)
  command = command_line(full, workdir)
  logging.info('the same from a command line: %s', command)
  with provenance.command_is(command), _bar(progress) as on_step:
    run_lib.run_categories(full, workdir, progress=on_step)
  return Inspector(workdir, category=names[0])


def load(workdir: str | os.PathLike, step: int | None = None) -> 'Inspector':
  """Loads a trained category.

  Args:
    workdir: the folder that holds `checkpoints/`, or that of a run of one
      category.
    step: which checkpoint, by default the newest.

  Raises:
    CheckpointError: there is none, or it cannot be read.
  """
  return Inspector(workdir, step)


def command_line(config: ml_collections.ConfigDict, workdir: str) -> str:
  """The command that trains by this config, as a shell takes it.

  Args:
    config: made from configs/folder.py.
    workdir: of the run.
  """
  base = config_lib.flatten(folder_config.get_config().to_dict())
  name = os.path.join('configs', os.path.basename(folder_config.__file__))
  if not os.path.isfile(name):
    name = os.path.abspath(folder_config.__file__)
  words = ['python', '-m', 'dmdd_jax.main', '--config', name]
  words += ['--workdir', workdir]
  for field, value in config_lib.flatten(config.to_dict()).items():
    if base[field] != value:
      words.append(f'--config.{field}={value}')
  return shlex.join(words)


class Inspector(predict.Inspector):
  """A trained model; also evaluates, exports, draws and reports.

  It has `config`, `calibration` and `step` of `predict.Inspector` too.

  Attributes:
    workdir: the folder it was loaded from.
    folder: that of its category, with `checkpoints/`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    step: int | None = None,
    category: str = '',
  ):
    """Loads a checkpoint; see `load`.

    Args:
      workdir: of a category, or of a run.
      step: which checkpoint, by default the newest.
      category: of the run; '' where there is one alone.
    """
    self.workdir = os.path.expanduser(workdir)
    self.folder = os.path.join(self.workdir, category)
    config, state, calibration, _ = trained_lib.load_workdir(self.folder, step)
    super().__init__(config, state, calibration)
    own = storage.path(os.path.join(self.folder, 'checkpoints'))
    if not own.is_dir():
      self.folder = trained_lib.trained_folders(self.folder)[0]
    # Of the results that `report` shows, if they are not the run's.
    self._evaluated: str | None = None

  def __call__(self, images: inputs.Sources) -> list[predict.Result]:
    """Inspects images, with a bar where they are many.

    Args:
      images: a file, a folder, a glob, an array, or a list of files and arrays.
        Arrays are uint8 (H, W, 3) or (H, W); a stack is (N, H, W, 3).

    Raises:
      MissingDataError: there is no image.
      BadImageError: a file or an array that is no image, named.
    """
    images, size, results = _as_list(images), self.batch_size, []
    starts = range(0, len(images), size)
    for start in tqdm.auto.tqdm(starts, unit='batch', disable=len(starts) < 2):
      results += super().__call__(images[start : start + size])
    return results

  def evaluate(
    self,
    images: inputs.Path | Mapping[str, inputs.Sources] | None = None,
    masks: inputs.Masks | None = None,
    *,
    output: str | os.PathLike | None = None,
    **options: Any,
  ) -> dict[str, Any]:
    """Measures the model on test images.

    Args:
      images: a folder with the folder `good` and one per kind of defect, as
        MVTec AD's `test`; or {'good': ..., 'scratch': ...}, each as `train`
        takes them. None takes the test images of the run, as `--mode evaluate`.
      masks: a folder with a folder per kind of defect, with ID.png or
        ID_mask.png for the image ID; or {'scratch': list}, files or arrays in
        the order of the images, non-zero on defects. None gives image metrics
        alone.
      output: gets results.json, pictures/, scores.csv and report.html; the
        folder `evaluation` of the category for given images, else the workdir.
      **options: fields of `config.eval` to change, `smoothing_sigma=4.0`.

    Returns:
      What stands in results.json: `image_auroc`, `pixel_auroc`, `au_pro` ...,
      fractions in [0, 1] or NaN, where `undefined` has the reason.

    Raises:
      ValueError, FileNotFoundError: an image or option cannot be used.
    """
    if images is None and masks is not None:
      raise ValueError('masks is given without images: give both')
    target, records = os.fspath(output or self.folder), None
    if images is not None:
      target = os.fspath(output or os.path.join(self.folder, 'evaluation'))
      records = inputs.list_test(images, masks, os.path.join(target, 'inputs'))
    command = _call(self.folder, (images, masks, output), options)
    with provenance.command_is(command):
      results = run_lib.evaluate_workdir(
        self.folder,
        target,
        changes={f'eval.{name}': value for name, value in options.items()},
        step=self.step,
        records=records,
      )
    page.try_write(target, [target], [self.folder])
    self._evaluated = None if target == self.folder else target
    return results

  def export(
    self, path: str | os.PathLike, images: str | os.PathLike | None = None
  ) -> dict[str, Any]:
    """Writes the model as one file, if the file equals it.

    Args:
      path: .onnx is for onnxruntime, any other suffix is StableHLO for jax.
      images: a file, a folder or a glob to compare on; training images by
        default.

    Returns:
      The file's metadata, see docs/deploy.md.

    Raises:
      ExportError: the file is not equal, or the model cannot be exported.
    """
    # The extra `onnx` is needed for this alone.
    from dmdd_jax.export import write as export_lib

    path = os.fspath(path)
    file_format = 'onnx' if path.lower().endswith('.onnx') else 'stablehlo'
    images = None if images is None else os.fspath(images)
    return export_lib.export(self.folder, file_format, path, images, self.step)

  def show(self, image: inputs.Source):
    """The image, its map and the outlined defect.

    Args:
      image: a file, or an array uint8 (H, W, 3) or (H, W).

    Returns:
      A matplotlib figure, which a notebook shows; `savefig` writes it.
    """
    # A notebook knows how to show figures once this is imported.
    import matplotlib.pyplot  # noqa: F401

    name = 'array'
    if not isinstance(image, np.ndarray):
      name = os.path.basename(image)
      image = images_lib.read_image(image, None, self.config.data.white_level)
    [result] = self([image])
    if image.ndim == 2:
      image = np.stack([image] * 3, axis=-1)
    return overlays.overlay(
      image,
      result.map,
      None,
      pixel_threshold=self.calibration.pixel_threshold,
      limits=overlays.calibrated_range(self.calibration),
      name=name,
      text=f'score {result.score:.2f}, {result.verdict}',
    )

  def report(self) -> str:
    """Writes report.html, and returns its path.

    Of the last `evaluate` of this inspector; of the run where there was none.

    Raises:
      FileNotFoundError: there are no results.
    """
    if self._evaluated is None:
      return page.write(self.workdir)
    return page.write(self._evaluated, [self._evaluated], [self.folder])


def _configure(
  changes: Mapping[str, Any], workdir: str
) -> ml_collections.ConfigDict:
  """configs/folder.py with these fields changed; lists become folders.

  Raises:
    ValueError: there is no such field, or it has another type.
  """
  config = folder_config.get_config()
  for field, value in changes.items():
    if unknown := cli.unknown_field(config, field):
      raise ValueError(f'config.{field}: {unknown}')
    section, _, name = field.partition('.')
    if (
      section == 'data'
      and name in _IMAGE_FIELDS
      and not isinstance(value, inputs.PATH)
    ):
      value = _kept(value, workdir, name)
    if isinstance(value, os.PathLike):
      value = os.fspath(value)
    try:
      config.update_from_flattened_dict({field: value})
    except (TypeError, ValueError) as error:
      raise ValueError(f'config.{field} is {value!r}: {error}') from error
  return config


def _kept(images: Iterable[inputs.Source], workdir: str, name: str) -> str:
  """The folder of a list of images, below the workdir."""
  if storage.is_remote(workdir):
    raise ValueError(
      f'data.{name} is a list, which is kept in the workdir; {workdir} is not'
      ' on this machine. Name a folder or a glob, or a local workdir.'
    )
  folder = os.path.join(storage.absolute(workdir), 'inputs', name)
  begun = bool(storage.folders(workdir, 'config.json'))
  inputs.keep(images, folder, replace=not begun)
  return folder


def _with_budget(
  config: ml_collections.ConfigDict,
  changes: Mapping[str, Any],
  workdir: str,
  minutes: float,
) -> ml_collections.ConfigDict:
  """The config with the steps of the workdir, or with those of `minutes`."""
  [category] = run_lib.categories(config)
  path = storage.path(os.path.join(workdir, category, 'config.json'))
  if not path.exists():
    single = run_lib.for_category(config, category)
    picked = budget.pick(single, minutes, 'train.batch_size' in changes)
    stored = config_lib.flatten(picked.to_dict())
  else:
    stored = config_lib.flatten(json.loads(path.read_text()))
    logging.info(
      '%s was begun with %d steps of %d pairs: they are kept, whatever minutes'
      ' is. Another budget needs another workdir.',
      os.path.dirname(path),
      stored['train.total_steps'],
      stored['train.batch_size'],
    )
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(
    {f: stored[f] for f in budget.FIELDS if f not in changes}
  )
  return config


@contextlib.contextmanager
def _bar(show: bool) -> Iterator[Callable[[int, int], None]]:
  """A bar of steps, for a terminal or a notebook."""
  with contextlib.ExitStack() as stack:
    bars: list[tqdm.auto.tqdm] = []

    def advance(done: int, total: int) -> None:
      if not bars:  # Not before the first step, whose number is then known.
        bar = tqdm.auto.tqdm(
          total=total, initial=done - 1, unit='step', disable=not show
        )
        bars.append(stack.enter_context(bar))
      bars[0].update()
      if done == total:  # Before the evaluation.
        bars[0].close()

    yield advance


def _as_list(images: inputs.Sources) -> list[inputs.Source]:
  """Files and arrays of what `Inspector` is called with."""
  if isinstance(images, inputs.PATH):
    return list(files.list_inputs(images, field='images').images)
  if isinstance(images, np.ndarray) and images.ndim < 4:
    return [images]  # A row of an image would pass for a grey image.
  return list(images)


def _call(
  workdir: str, arguments: Sequence[Any], options: Mapping[str, Any]
) -> str:
  """A call of `evaluate` as a command; '...' stands for lists and arrays.

  Args:
    workdir: of the category.
    arguments: images, masks and output.
    options: of `config.eval`.
  """

  def text(value: Any) -> str:
    if value is None or isinstance(value, inputs.PATH):
      return repr(value if value is None else os.fspath(value))
    if isinstance(value, Mapping):
      parts = (f'{k!r}: {text(part)}' for k, part in value.items())
      return f'{{{", ".join(parts)}}}'
    return '...'

  if all(value is None for value in arguments) and not options:
    words = ['python', '-m', 'dmdd_jax.main', '--mode', 'evaluate']
    return shlex.join([*words, '--workdir', workdir])
  images, masks, output = map(text, arguments)
  words = [images, masks, f'output={output}']
  words += [f'{name}={value!r}' for name, value in options.items()]
  code = f'dmdd_jax.load({workdir!r}).evaluate({", ".join(words)})'
  return shlex.join(['python', '-c', f'import dmdd_jax; {code}'])
