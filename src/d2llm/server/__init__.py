"""The server: an index and its student behind HTTP."""
