"""From images on disk to batches: listing, checks, synthesis, pipeline.

No module here imports jax. The modules that list, check and read images do not
import TensorFlow, so that a folder can be listed without waiting for it.
"""
