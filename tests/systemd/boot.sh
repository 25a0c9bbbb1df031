#!/usr/bin/env bash
# Becomes systemd, as PID 1 of a machine made of this one: its files under an overlay that nothing gets through, and its own
# processes, mounts, control groups, network and /dev. Called by machine.py inside `unshare`.
#
#   boot.sh WORK PYTHON PACKAGES SOURCE...    WORK: an empty folder; the installation of Python to use, its site-packages, and the
#                                            folders that go before them on its path. They appear in /opt.
set -euo pipefail
work=$1 python=$2 packages=$3
shift 3

mount --make-rprivate /
mount -t tmpfs tmpfs "$work"
mkdir "$work"/{upper,overlay,root}
root=$work/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/overlay" "$root"

# Python, and hotgraph as the unit expects it. Not where they are: that may be a home folder, which the sandbox hides.
rm -rf "$root"/opt "$root"/etc/systemd/system "$root"/etc/hotgraph "$root"/var/{cache,lib,log}/hotgraph "$root"/var/log/journal
name=python$("$python/bin/python3" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
mkdir -p "$root"/opt/{python,source} "$root"/opt/hotgraph/{bin,lib/"$name"/site-packages} "$root/etc/systemd/system"
bind() { mount --bind "$1" "$2" && mount -o remount,bind,ro "$2"; }
bind "$python" "$root/opt/python"
bind "$packages" "$root/opt/hotgraph/lib/$name/site-packages"
ln -s "/opt/python/bin/$name" "$root/opt/hotgraph/bin/python"
printf 'home = /opt/python/bin\ninclude-system-site-packages = false\n' >"$root/opt/hotgraph/pyvenv.cfg"
number=0
for source in "$@"; do
    mkdir "$root/opt/source/$number"
    bind "$source" "$root/opt/source/$number"
    number=$((number + 1))
done

mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root"/dev/{pts,shm}
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 fuse:10:229; do
    IFS=: read -r name major minor <<<"$node"
    mknod -m 666 "$root/dev/$name" c "$major" "$minor"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s pts/ptmx "$root/dev/ptmx"
ip link set lo up
ip address add 192.0.2.1/32 dev lo # not one that systemd calls localhost

# What a boot does to the kernel stays undone: the kernel is not ours.
for unit in systemd-{sysctl,modules-load,binfmt,remount-fs,random-seed,update-utmp,udevd,udev-trigger}.service \
    systemd-{sysusers,tmpfiles-setup,tmpfiles-setup-dev,journal-flush,machine-id-commit,hwdb-update}.service \
    kmod-static-nodes.service systemd-ask-password-{console,wall}.path proc-sys-fs-binfmt_misc.automount \
    dev-{hugepages,mqueue}.mount sys-{kernel-debug,kernel-tracing,kernel-config,fs-fuse-connections}.mount tmp.mount; do
    ln -s /dev/null "$root/etc/systemd/system/$unit"
done
printf '[Unit]\nRequires=systemd-journald.service sysinit.target\nAfter=sysinit.target\n' >"$root/etc/systemd/system/small.target"

mkdir "$root/run/before"
cd "$root"
pivot_root . run/before
umount -l /run/before
rmdir /run/before
mount --make-rshared /
systemd=/usr/lib/systemd/systemd
[ -x "$systemd" ] || systemd=/lib/systemd/systemd
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin "$systemd" --system --unit=small.target \
    --log-target=journal --show-status=0 --default-standard-output=journal
