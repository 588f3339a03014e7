"""Values and pure algorithms: no I/O, no clock, no randomness."""
