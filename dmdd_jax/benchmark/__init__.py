"""Speed and memory: how it is measured, and the suites."""
