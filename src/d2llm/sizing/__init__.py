"""The verb ``size``: what an index and its searches will cost, before anything is built."""
