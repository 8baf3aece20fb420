"""Memory: what vLLM's block manager is told about compacted pages."""
