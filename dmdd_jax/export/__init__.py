"""One file for other programs: StableHLO, ONNX, and the loaders of both.

`loader` needs jax and numpy alone, `onnx_loader` onnxruntime and numpy alone.
"""
