"""Shared by the tests: random codecs, a dense oracle, comparison."""
