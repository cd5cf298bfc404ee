"""A reproducible companion to five explainable-AI papers"""

__version__ = "0.1.0"
