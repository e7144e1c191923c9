#!/bin/sh
# The first process of a User Mode Linux guest (usermode.py).  Its root directory is the machine's own,
# read-only; it makes the guest a whole machine with a throw-away overlay over it, runs $BED_RUN/command
# there, leaves the exit status in $BED_RUN/status, and switches off.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
exec </dev/null 2>&1

# Switched off for good: the kernel would wait for nobody.
off() {
    echo o >/proc/sysrq-trigger
    sleep 60
}
trap off EXIT
set -e

mount -t proc proc /proc
mount -t sysfs sys /sys
modules=$(readlink "$BED_RUN/modules")/$(uname -r)
repository=$(readlink "$BED_RUN/root")
insmod "$modules/kernel/fs/overlayfs/overlay.ko"

mount -t tmpfs bed /mnt
mkdir /mnt/upper /mnt/work /mnt/root /mnt/repository
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work bed /mnt/root
mount --bind "/mnt/root$repository" /mnt/repository # it may lie below one of these:
mount -t tmpfs -o mode=755 run /mnt/root/run
mount -t tmpfs -o mode=1777 tmp /mnt/root/tmp
mount -t tmpfs -o mode=1777 tmp /mnt/root/var/tmp
mkdir -p "/mnt/root$repository"
mount --bind /mnt/repository "/mnt/root$repository"
for kept in /dev /proc /sys; do
    mount --rbind "$kept" "/mnt/root$kept"
done
mkdir -p /mnt/root/lib/modules
rm -rf "/mnt/root/lib/modules/$(uname -r)"
mkdir "/mnt/root/lib/modules/$(uname -r)" /mnt/root/run/bed-host
mount --bind "$modules" "/mnt/root/lib/modules/$(uname -r)"
# mount of Debian 13 and later wants an option with a name, kernels before 6.11 know none
mount -t hostfs -o "hostfs=$BED_RUN" bed /mnt/root/run/bed-host 2>/dev/null ||
    mount -t hostfs -o "$BED_RUN" bed /mnt/root/run/bed-host
cd /mnt/root
mkdir .old
pivot_root . .old
cd /
umount -l /.old
rmdir /.old

mkdir -p /dev/pts /dev/shm /run/udev /run/lock
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
rm -rf /var/run
ln -s /run /var/run
ip link set lo up
hostname bed
echo "127.0.0.1 bed" >>/etc/hosts
if [ -x /usr/lib/systemd/systemd-udevd ]; then
    /usr/lib/systemd/systemd-udevd --daemon 2>/dev/null
else
    /lib/systemd/systemd-udevd --daemon 2>/dev/null
fi
udevadm trigger --action=add --type=devices --subsystem-match=block
udevadm settle

code=0
sh /run/bed-host/command || code=$?
sync
echo "$code" >/run/bed-host/status
