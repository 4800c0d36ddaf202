# Runs automount(8) with a map of this program. Arguments: a folder with `a.img`, the program, the map of
# contrib/. Needs a mount namespace and
# a session of its own: the names of the program in /usr/sbin are in an overlay, and automount ends its process group.
set -eu
cd "$1"
mounted() { grep -q " $1 $2 " /proc/self/mounts; }
gone() { ! mounted "$@"; }
until_true() { n=0; until "$@"; do n=$((n + 1)); [ $n -lt 300 ] || { echo "never: $*" >&2; exit 1; }; sleep .1; done; }
mkdir run upper auto
mount --bind run /run
mount -t tmpfs none upper
mkdir upper/u upper/w
mount -t overlay -o lowerdir=/usr/sbin,upperdir=upper/u,workdir=upper/w overlay /usr/sbin
cp "$2" /usr/sbin/vmdkfuse
ln -sf vmdkfuse /usr/sbin/mount.fuse.vmdkfuse
sed "s|/vm/Fedora.vmdk|$PWD/a.img|" "$3" >map
echo "$PWD/auto $PWD/map --timeout=1" >master
automount -f -p "$PWD/pid" "$PWD/master" >log 2>&1 &
automount=$!
# Also after a failure: the daemon ends with its mount.
trap 'umount -l auto/fedora auto 2>/dev/null || :; kill -KILL $automount 2>/dev/null || :; cat log >&2' EXIT
until_true mounted "$PWD/auto" autofs
timeout -s KILL 30 cmp a.img auto/fedora/a.raw
mounted "$PWD/auto/fedora" fuse.vmdkfuse
until_true gone "$PWD/auto/fedora" fuse.vmdkfuse
timeout -s KILL 30 cmp a.img auto/fedora/a.raw
kill $automount
wait $automount || :
gone "$PWD/auto" autofs
gone "$PWD/auto/fedora" fuse.vmdkfuse
