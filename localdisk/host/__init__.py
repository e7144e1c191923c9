"""Installs the program on a host, uninstalls it, and checks the host: runs as root."""
