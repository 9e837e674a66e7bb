"""Rows as tables and plots, of one results file or several."""
