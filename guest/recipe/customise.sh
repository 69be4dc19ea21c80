#!/bin/sh
# Runs inside the new system, as its root, once all packages are installed.
set -eu

useradd --no-create-home --shell /bin/bash --uid 1000 user
cp --recursive /etc/skel/. /home/user
passwd --delete user >/dev/null
usermod --append --groups audio,video,input user

# Windows open beside the terminal, not over it, wherever the programs would put them (name, title, x, y, size).
mkdir -p /home/user/.config/openbox
sed 's|</applications>||; s|</openbox_config>||' /etc/xdg/openbox/rc.xml >/home/user/.config/openbox/rc.xml
place() {
    cat >>/home/user/.config/openbox/rc.xml <<END
  <application name="$1" title="$2" type="normal">
    <position force="yes"><x>$3</x><y>$4</y></position>
    <size><width>$5</width><height>$6</height></size>
  </application>
END
}
place pcmanfm '*' 530 400 720 360
place abiword '*' 530 30 720 700
place gnumeric '*' 530 60 720 640
place mtpaint 'mtPaint*' 530 90 720 600
place 'netsurf*' '*' 530 30 720 700
# xpdf calls its windows that.
place win '*' 530 30 720 700
place mtpaint 'Settings Toolbar' 20 390 default default
echo '</applications></openbox_config>' >>/home/user/.config/openbox/rc.xml

chown -R user:user /home/user

echo desktop >/etc/hostname
printf '127.0.0.1 localhost desktop\n::1 localhost\n' >/etc/hosts
# Not the mirror that the build used: that may be a cache of the building host.
echo "deb http://deb.debian.org/debian bookworm main" >/etc/apt/sources.list
rm -f /etc/apt/sources.list.d/* /etc/apt/apt.conf.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/99mmdebstrap
# Blocks of deleted files are given back: what they held is garbage that no replay repeats.
echo "/dev/vda / ext4 discard,errors=remount-ro 0 1" >/etc/fstab
# mmdebstrap does this too, but only after the disk is made.
apt-get clean
find /var/lib/apt/lists -type f -delete
# Random otherwise; a fixed one keeps two builds of one recipe alike.
echo 5265706c61794d696772617465000001 >/etc/machine-id

chmod 755 /usr/local/lib/desktop/*
systemctl enable --quiet desktop.service desktop-ready.service
systemctl set-default --quiet multi-user.target
# The serial port belongs to the readiness line, tty1 to the desktop, and nothing wakes up on a timer.
systemctl mask --quiet \
    serial-getty@ttyS0.service getty@tty1.service \
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer fstrim.timer systemd-tmpfiles-clean.timer
# Nobody here debugs kernels or runs foreign binaries, and each unit takes a second or two to start under emulation.
systemctl mask --quiet \
    sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount systemd-binfmt.service
