"""Calibration sets, one YAML manifest per set; `quantkit calib` lists them."""
