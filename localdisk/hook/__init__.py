"""Runs as user vdsm: reads images on shared storage and writes local disks; never runs LVM, is never root."""
