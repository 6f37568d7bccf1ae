"""The TFDS builder of Magnetic tile defects."""
