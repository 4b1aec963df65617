"""The attention of the suite: KiT (kit.py), its retrieval, its layout, its operator and the readable reference.

An attention is a module file with a class `Attention(dim, heads, *, shift=False, <settings>)` that maps normalised
tokens [B, H, W, C] to [B, H, W, C] and states its cost with `macs(height, width)`.  The baselines keep the same
signature.
"""
