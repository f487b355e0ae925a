"""Sharding algebra: layouts, conversions between them, and one rule per operator."""
