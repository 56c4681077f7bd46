"""Inference over compressed KV caches: one prefill, every policy and ratio. See README.md."""
