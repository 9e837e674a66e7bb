"""Measurements and their statistics: quality, speed, memory."""
