"""Flax modules: the teacher's taps, the decoupled student, the head."""
