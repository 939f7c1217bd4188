"""An index and its student: encode, search, prove, read again, explain."""
