"""Simpler sequence modules with the pair ``prefill``/``score`` of ``method.Longer``, for comparison in one harness."""
