"""The TFDS builder of MPDD (Metal Parts Defect Detection)."""
