"""localdisk: oVirt VMs run from fast local copies of their disks."""

__version__ = "0.1.0"
