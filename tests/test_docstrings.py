"""Docstrings: every name of an `Attributes:` section is one of the class."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import dmdd_jax

# Modules that an extra of setup.cfg installs the imports of.
OPTIONAL = {
  'fastapi',
  'onnx',
  'prometheus_client',
  'pydantic',
  'python_multipart',
  'ray',
  'uvicorn',
}
MODULES = sorted(
  module.name
  for module in pkgutil.walk_packages(dmdd_jax.__path__, 'dmdd_jax.')
)


def documented(docstring):
  """The names of a docstring's `Attributes:` section."""
  section = re.search(
    r'^Attributes:\n(.*?)(?=^\S|\Z)',
    inspect.cleandoc(docstring),
    re.DOTALL | re.MULTILINE,
  )
  return re.findall(r'^  (\w+):', section[1], re.MULTILINE) if section else []


def real(cls):
  """Fields, constants, properties, and what a plain `__init__` sets on `self`.

  What a Flax module's `setup` sets is not one of its attributes: only its
  fields are given by a caller.
  """
  names = {
    name
    for name in dir(cls)
    if not inspect.isroutine(inspect.getattr_static(cls, name))
  }
  for base in cls.__mro__:
    names |= set(inspect.get_annotations(base))
  if dataclasses.is_dataclass(cls) or '__init__' not in vars(cls):
    return names
  tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))
  return names | {
    node.attr
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
    and isinstance(node.ctx, ast.Store)
    and isinstance(node.value, ast.Name)
    and node.value.id == 'self'
  }


def public_classes(module):
  """Classes that the module defines under a public name."""
  return [
    value
    for name, value in vars(module).items()
    if inspect.isclass(value)
    and value.__module__ == module.__name__
    and not name.startswith('_')
  ]


@pytest.mark.parametrize('name', MODULES)
def test_attributes_are_those_of_the_class(name):
  try:
    module = importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name not in OPTIONAL:
      raise
    pytest.skip(f'{error.name} is not installed')
  for cls in public_classes(module):
    unknown = set(documented(cls.__doc__ or '')) - real(cls)
    assert not unknown, f'{cls.__name__} documents {sorted(unknown)}'


class Example:
  """A class.

  Attributes:
    size: set in __init__; with a colon: and
      a second line: of its text.
    area: a property.
    name: an annotation.
    wrong: nothing.

  Raises:
    ValueError: it is no attribute.
  """

  name: str

  def __init__(self):
    self.size = 1

  @property
  def area(self):
    return self.size**2


@dataclasses.dataclass
class Fields:
  """A dataclass.

  Attributes:
    size: a field.
    other: none; a method sets it.
  """

  size: int = 0

  def setup(self):
    self.other = 1


def test_a_name_that_is_not_real_is_seen():
  assert documented(Example.__doc__) == ['size', 'area', 'name', 'wrong']
  assert set(documented(Example.__doc__)) - real(Example) == {'wrong'}
  assert set(documented(Fields.__doc__)) - real(Fields) == {'other'}
  assert documented('No section.') == []
