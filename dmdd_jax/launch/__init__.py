"""Processes: hosts, groups of devices, sweeps, Ray, preemption."""
