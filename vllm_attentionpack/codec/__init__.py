"""The method, in plain PyTorch: transform, bit allocation, quantisation, byte layout.

Imports neither vLLM nor Triton. Read in this order: `layout` (bytes), `quantize` (codes and
scales), `positions` (moments under RoPE), `transform` (bases), `allocate` (ranks and bits),
`codec` (one layer, ready to encode and reconstruct).
"""
