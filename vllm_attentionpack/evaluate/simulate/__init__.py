"""Any cache format, compared inside the running engine without a restart: seconds per codec.

Prompts run once through the real engine, which leaves what the decoder was given (`recording`).
The engine's own model then runs again on it, with attention replaced (`step`): every query reads
what a codec (`codec`) gives back for keys and values, prompt tokens included, so errors pass from
layer to layer as they would when serving. Divergence, agreement and accuracy come from that
(`measure`).
"""
