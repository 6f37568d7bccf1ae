"""Steps, losses, optimisers, train state, checkpoints, faults."""
