"""The HTTP server for an index and its student."""
