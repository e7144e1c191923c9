"""Runs as root for one hook: makes and releases disks in the volume group; opens no image."""
