"""Reads and changes texts of vdsm and libvirt; starts no process and opens no device."""
