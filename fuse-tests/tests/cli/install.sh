# Start of a script that uses mount(8). Arguments: a folder, the program. Needs a mount namespace of its own: the names of the
# program in /usr/sbin are in an overlay.
set -eu
cd "$1"
mkdir -p upper run
mount --bind run /run
mount -t tmpfs none upper
mkdir upper/u upper/w
mount -t overlay -o lowerdir=/usr/sbin,upperdir=upper/u,workdir=upper/w overlay /usr/sbin
cp "$2" /usr/sbin/vmdkfuse
for helper in mount.vmdkfuse mount.fuse.vmdkfuse umount.vmdkfuse umount.fuse.vmdkfuse; do
  ln -sf vmdkfuse "/usr/sbin/$helper"
done
