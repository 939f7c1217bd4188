"""An index and its student: encoding, search, exactness proofs, rereading by a teacher, explanations."""
