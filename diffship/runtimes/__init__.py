"""Engines that run what the exporters wrote; nothing here needs torch."""
