"""Plan to source: module.py, train.py, and the small runtime that travels with them."""
