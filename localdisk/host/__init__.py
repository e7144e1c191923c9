"""Puts the program on a host, takes it away, and judges the host: runs as root."""
