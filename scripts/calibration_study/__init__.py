"""Ablations of the calibration, each alone, at equal bytes; run by scripts/measure_calibration.py."""
