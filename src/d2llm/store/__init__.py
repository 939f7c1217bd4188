"""The durable index: table, vectors and their formats, words, windows, filters, versions."""
