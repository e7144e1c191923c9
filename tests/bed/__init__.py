"""The test bed: an oVirt host as localdisk sees it, on a real kernel with device-mapper.

    boot.py       runs a command as root on such a kernel (this machine's or a throw-away one)
    places.py     which of these kernels this machine can have: each is tried
    here.py, usermode.py, virtme.py   the places; guest.py: what guests have in common
    packages.py   installs Debian packages, and fetches those of another release
    host.py       makes that kernel an oVirt host: users, rules, hook links, VG, shared storage
    usermode.sh, guest.sh, reaper.py   what runs first in a guest: its root directory, its first process
    player.py     plays vdsm's side of the hook contract
    vdsm.py       plays vdsm starting and stopping a whole VM with it
    storage.py    builds shared storage as vdsm lays it out, and hashes what the guest sees of it
    vm.py         the disk JSON and the domain XML of a VM with such disks; its boot sector
    libvirt.py    a real libvirt to start that VM with
    shell.py      runs commands

Standard library only, nothing of the product is imported: the bed stays an independent witness.
"""
