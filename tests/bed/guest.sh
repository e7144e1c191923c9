#!/bin/sh
# What boot.py's throw-away guest in qemu runs as root: `guest.sh REPOSITORY`.  The machine's own file system is
# mounted on /mnt/host (virtme.py), and this mounts the run directory on /run/bed-host.
# Makes the guest a whole machine, runs `command` of the run directory there and leaves its exit status in
# `status`: a guest that dies before that has no status at all.
set -e

# The init of the guest leaks its ports; LVM complains about each.
exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- </dev/null 2>&1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8
report() {
    code=$?
    echo "$code" >/run/bed-host/status
    exit "$code"
}
mkdir /run/bed-host
mount -t 9p -o trans=virtio,version=9p2000.L bed-run /run/bed-host
trap report EXIT

# For every process of the guest (udevd included), puts a root directory of our own in the place of
# virtme's: the host's own file system below one throw-away overlay.  Everything can be written there
# (/rhev can be made), nothing has virtme's stand-ins over it (sudoers, shadow, lvm.conf are the
# machine's own), and what was read once stays cached: a Python that imports something starts three
# times as fast.  What this machine writes to /tmp meanwhile is not seen there.
new_root() {
    mkdir /mnt/upper /mnt/work /mnt/root /mnt/repository
    mount -t overlay -o lowerdir=/mnt/host,upperdir=/mnt/upper,workdir=/mnt/work bed /mnt/root
    mount --bind "/mnt/root$1" /mnt/repository # it may lie below one of these:
    mount -t tmpfs -o mode=1777 tmp /mnt/root/tmp
    mount -t tmpfs -o mode=1777 tmp /mnt/root/var/tmp
    for kept in /dev /proc /sys /run; do
        mount --rbind "$kept" "/mnt/root$kept"
    done
    mkdir -p "/mnt/root$1"
    mount --bind /mnt/repository "/mnt/root$1"
    mkdir /mnt/root/.old
    cd /mnt/root
    pivot_root . .old
    cd /
    umount -l /.old
    rmdir /.old
}

new_root "$1"
echo "127.0.0.1 $(uname -n)" >>/etc/hosts
python3 "$1/tests/bed/reaper.py" sh /run/bed-host/command
