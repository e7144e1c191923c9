"""Texts that vdsm and libvirt write and read, in and out: no process is started and no device is opened."""
