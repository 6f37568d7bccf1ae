"""File names and which files a program looks at."""

import os

from dmdd_jax.data import files


def test_a_printable_name_is_valid_utf8():
  for name, shown in {
    b'caf\xc3\xa9 \xe6\x97\xa5.png': 'caf\u00e9 \u65e5.png',
    b'caf\xe9.png': 'caf\ufffd.png',
    b'a\nb\x1b[31m.png': 'a\ufffdb\ufffd[31m.png',
  }.items():
    assert files.printable(os.fsdecode(name)) == shown
    shown.encode()
