"""The parts of the verb ``mine``: candidate lists, sampling of negatives, filters for false negatives, the audit."""
