"""functrain: training as a value passing through pure functions."""
