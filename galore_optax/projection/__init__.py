"""The subspace of a leaf: which matrices it holds, their bases, refreshes and moments.

Imports `quantization`, `trace` and the foundation.
"""
