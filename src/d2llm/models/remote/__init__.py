"""Models behind an API: the machine that asks them (``endpoint.py``), which teachers, writers and backbones share."""
