"""Foundations without torch: errors, registry, settings, seeds."""
