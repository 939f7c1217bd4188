"""Pure functions on tensors and arrays: losses, pooling, scoring, ranking. No I/O, no models, no global state."""
