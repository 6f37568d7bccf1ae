"""The TFDS builder of MVTec AD."""
