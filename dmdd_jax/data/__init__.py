"""Images on disk to batches: listing, demo surfaces, synthesis, pipeline.

Nothing in this package imports jax, and `records` and `surfaces` do not import
TensorFlow, so a folder can be listed and checked in a moment.
"""
