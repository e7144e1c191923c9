"""Collects and shows what is on this host: changes nothing but the file of metrics."""
