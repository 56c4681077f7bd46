"""Prefill, compression and decoding: the only part that knows how a model attends."""
