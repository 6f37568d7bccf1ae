"""The TFDS builder of KolektorSDD2."""
