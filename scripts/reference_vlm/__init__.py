"""Training recipe and data sets of the reference vision-language model (examples/reference-vlm)."""
