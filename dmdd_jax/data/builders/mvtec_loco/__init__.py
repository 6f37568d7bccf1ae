"""The TFDS builder of MVTec LOCO AD."""
