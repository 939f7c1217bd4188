"""The parts of the verb ``mine``: lists of candidates, how negatives are drawn, what is no negative, the audit."""
