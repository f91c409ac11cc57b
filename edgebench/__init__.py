"""The instruments around `vit.py`: what measures, protects and records a run without changing what it learns."""
