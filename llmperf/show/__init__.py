"""Figures, widgets, and what only a lesson needs."""
