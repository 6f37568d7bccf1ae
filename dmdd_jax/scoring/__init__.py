"""From distances to a verdict: the one place where a score is made."""
