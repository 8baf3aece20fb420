"""Speed, side by side with vLLM's dense cache: of the ops, and of whole engines."""
