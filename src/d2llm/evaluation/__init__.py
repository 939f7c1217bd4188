"""The verb ``evaluate``: which systems are compared, how each is measured, and how to read the results."""
