"""The TFDS builder of BTAD (beanTech Anomaly Detection)."""
