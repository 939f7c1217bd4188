"""The on-disk index: table, vectors and their formats, words, windows, filters, versions."""
