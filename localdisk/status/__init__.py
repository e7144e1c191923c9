"""Looks and shows: changes nothing but the file of metrics."""
