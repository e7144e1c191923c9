"""What is in the volume group, and its life: runs as root."""
