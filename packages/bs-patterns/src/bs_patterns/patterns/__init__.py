"""The patterns, one family per module."""
