"""Measure a CLIP-style model, and say it in one HTML file.

The package takes functions and arrays and knows no model, no loader and no other package of this
repository: `zeroshot`, `linear_probe` and `retrieval` turn features into metrics, `results` stores
them in CLIP_benchmark's JSON, `html` and `charts` show them without a network.
"""

__version__ = "0.1.0"
