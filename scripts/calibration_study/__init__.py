"""Ablations of the calibration, each alone, at equal bytes (scripts/measure_calibration.py)."""
