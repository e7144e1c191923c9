"""The test bed: an oVirt host as localdisk sees it, on a real kernel with device-mapper.

    boot.py       runs a command as root on such a kernel (this machine's or a throw-away guest's)
    places.py     tries which kernels this machine can run
    here.py, usermode.py, virtme.py   the places; guest.py: what guests have in common
    packages.py   installs Debian packages, and fetches packages of another release
    host.py       makes that kernel an oVirt host: users, rules, hook links, VG, shared storage
    usermode.sh, guest.sh, reaper.py   run first in a guest: make its root directory, start the command
    player.py     calls one hook point as vdsm does
    vdsm.py       starts and stops a whole VM as vdsm does
    storage.py    builds shared storage as vdsm does, and hashes the guest's view of it
    vm.py         the disk JSON and the domain XML of a VM with such disks; its boot sector
    libvirt.py    a real libvirt to start that VM with
    shell.py      runs commands

The bed uses only the standard library and imports nothing of the product, so that the product's errors cannot
hide in it.
"""
