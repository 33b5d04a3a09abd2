"""Text for calibration, evaluation and prompts.

`corpus` turns text into rows of tokens, `prompts` reads files of prompts, `calibration_sets` holds the manifests of the texts
that ship. Imports checkpoint and recipe; knows no model and no method.
"""
