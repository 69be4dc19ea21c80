# Runs outside the new system ($1) but with its root's view of owners, whether mmdebstrap runs as root or not.
# Writes the disk to standard input, which the builder opened for writing: the file's folder may be closed to this
# user, and standard output belongs to mmdebstrap.
# Features are spelled out, so that the image doesn't depend on the version of e2fsprogs.
# All tables are written now: left to the guest, the kernel would write them while the user works.
set -eu
PATH=$PATH:/usr/sbin:/sbin
view="$1.view"
trap 'umount -R "$view" || true; rmdir "$view"' EXIT

# The new system without what is mounted in it (proc, sys, dev): the guest mounts its own. What mmdebstrap keeps in
# tmp is covered, not removed: should its configuration for apt vanish, apt would go on with that of this host.
mkdir "$view"
mount --bind "$1" "$view"
mount -t tmpfs -o mode=755 tmpfs "$view/dev"
mount -t tmpfs -o mode=755 tmpfs "$view/run"
mount -t tmpfs -o mode=1777 tmpfs "$view/tmp"

features=none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg
features=$features,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum
uuid=52657061-794d-4967-8261-746500000001
export E2FSPROGS_FAKE_TIME="$SOURCE_DATE_EPOCH"
mke2fs -q -F -t ext4 -b 4096 -I 256 -O "$features" -U "$uuid" -L desktop -m 1 \
    -E "hash_seed=$uuid,lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0" \
    -d "$view" /proc/self/fd/0 "$DISK_MIB"M >&2
