"""Text for calibration, evaluation and prompts."""
