"""Implementations of the op. They share the plan and the protocol in `base` and never import one another."""
