"""The verb ``evaluate``: who takes part, how each is measured, and what the figures mean."""
