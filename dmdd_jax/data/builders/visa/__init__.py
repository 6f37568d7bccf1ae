"""The TFDS builder of VisA."""
