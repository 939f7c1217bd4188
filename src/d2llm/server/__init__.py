"""The HTTP server for indexes and their students.

A request passes four layers: its route (``native``, ``corpus_routes``, ``dialects``), which checks it and makes its
response; the ``ServedIndex``, which queues it and runs it on the ``OpenVersion`` that is served; and that version's
``Searcher`` (or ``Index``, for a write).
"""
