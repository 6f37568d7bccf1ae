"""The suites of the benchmark by name.

Synopsis:

  report = suites.run('metrics', measure.Options())
"""


# The module of each suite, imported when it is run: some need much.
