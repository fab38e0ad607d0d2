"""Measurements against reference implementations; nothing here is imported by the packages."""
