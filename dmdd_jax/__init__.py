"""DMDD (Dual-Modeling Decouple Distillation) anomaly detection on JAX/Flax."""
