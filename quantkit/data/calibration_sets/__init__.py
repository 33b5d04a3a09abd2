"""Calibration sets, one YAML manifest a set; `quantkit calib` lists them."""
