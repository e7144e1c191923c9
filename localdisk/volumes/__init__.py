"""Reads and changes local disks and template LVs in the volume group: runs as root."""
