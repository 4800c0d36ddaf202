# Uses the installed package: create, write, mount by fstab, helpers, library. Leaves nothing. Standard input of a shell in the
# system that the package is installed in (deb-test.sh, rpm-test.sh).
cd /root
vmdkfuse --create disk.vmdk create-size=8M
mkdir -p /mnt/a
vmdkfuse /mnt/a file=disk.vmdk
head -c 1M /dev/urandom >data
dd if=data of=/mnt/a/disk.raw bs=64K conv=notrunc status=none
vmdkfuse --unmount /mnt/a
vmdkfuse --check disk.vmdk
echo '/root/disk.vmdk /mnt/a vmdkfuse ro,nofail,uhelper=vmdkfuse 0 0' >fstab
mount -a -T fstab
mount -a -T fstab
cmp -n 1048576 data /mnt/a/disk.raw
umount /mnt/a
mount -t fuse.vmdkfuse /root/disk.vmdk /mnt/a -o ro,uhelper=vmdkfuse
umount /mnt/a
for helper in mount.vmdkfuse mount.fuse.vmdkfuse umount.vmdkfuse umount.fuse.vmdkfuse; do test -x "/sbin/$helper"; done
LD_PRELOAD=libvmware-bdwrapper.so.0 true 2>error
test ! -s error
rm -r disk.vmdk data error fstab /mnt/a
