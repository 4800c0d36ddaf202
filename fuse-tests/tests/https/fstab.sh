# fstab lines of a datastore and of a web server, through the real mount(8) and umount(8). Follows ../cli/install.sh. Further
# arguments: the port and thumbprint of the datastore's server, the port and certificate of the web server.
datastore=$3 thumbprint=$4 web=$5 certificate=$6
fail() { echo "failed: $*" >&2; exit 1; }
source_of() { findmnt -n -o SOURCE "$1" 2>/dev/null || :; }
trap 'for point in mnt/*; do umount -l "$point" 2>/dev/null || :; done' EXIT
mkdir -p mnt/esx mnt/web
cat >fstab <<FSTAB
[LocalDS_0]\\040b\\040c/x\\040y.vmdk $PWD/mnt/esx vmdkfuse _netdev,server=127.0.0.1,port=$datastore,datacenter=DC0,credentials=$PWD/login,thumbprint=$thumbprint,uhelper=vmdkfuse 0 0
https://127.0.0.1:$web/b%20c/x%20y.vmdk $PWD/mnt/web fuse.vmdkfuse _netdev,ro,cainfo=$certificate,uhelper=vmdkfuse 0 0
FSTAB
mount -a -T fstab
before=$(cat /proc/self/mountinfo)
mount -a -T fstab
[ "$before" = "$(cat /proc/self/mountinfo)" ] || fail 'the second mount -a changed something'
[ "$(source_of mnt/esx)" = '[LocalDS_0] b c/x y.vmdk' ] || fail "source: $(source_of mnt/esx)"
[ "$(source_of mnt/web)" = "https://127.0.0.1:$web/b%20c/x%20y.vmdk" ] || fail "source: $(source_of mnt/web)"
df --output=source mnt/esx | grep -qxF '[LocalDS_0] b c/x y.vmdk'
cmp expected 'mnt/esx/x y.raw'
cmp expected 'mnt/web/x y.raw'
if grep -q 'se%cr' /proc/self/mountinfo; then fail 'the password is in the mount table'; fi
for point in esx web; do
  umount "mnt/$point"
  mount -T fstab "$PWD/mnt/$point"
  umount "$PWD/mnt/$point"
  [ -z "$(source_of "mnt/$point")" ] || fail "$point is mounted"
done
