# fstab lines through the real mount(8) and umount(8). Follows install.sh.
fail() { echo "failed: $*" >&2; exit 1; }
# The status of a command and its error, in $status and the file `error`.
status_of() { status=0; "$@" 2>error || status=$?; }
# Waits for a condition, less long than the test that runs this script.
until_true() {
  n=0
  until "$@"; do n=$((n + 1)); [ $n -lt 450 ] || fail "never: $*"; sleep .1; done
}
# Mounts what fstab lists, and again, which must do nothing.
mount_all_twice() {
  mount -a -T fstab
  before=$(cat /proc/self/mountinfo)
  mount -a -T fstab
  [ "$before" = "$(cat /proc/self/mountinfo)" ] || fail 'the second mount -a changed something'
}
as_user() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
server=
# Also after a failure nothing goes on: neither a daemon nor what was started here.
clean() {
  touch done
  [ -z "$server" ] || kill $server 2>/dev/null || :
  for point in mnt/*; do vmdkfuse --unmount "$PWD/$point" >/dev/null 2>&1 || umount -l "$point" 2>/dev/null || :; done
}
trap clean EXIT
mounted() { findmnt -n -o SOURCE "$1" 2>/dev/null; }
not_mounted() { [ -z "$(mounted "$1")" ] || fail "$1 is mounted"; }
chmod 755 .
mkdir disks mnt "mnt/b c" mnt/toml mnt/user mnt/nbd mnt/plain
vmdkfuse --create disks/a.vmdk create-size=8M
vmdkfuse --create "disks/b c.vmdk" create-size=8M
ln -s disks link
cat >disks/two.toml <<TOML
[mount]
mountpoint = "../mnt/toml"
options = "ro"
[[disk]]
file = "a.vmdk"
[[disk]]
file = "b c.vmdk"
TOML

echo '== a path, a path with a blank, and a TOML file; a second mount -a does nothing'
cat >fstab <<FSTAB
$PWD/link/a.vmdk $PWD/mnt/plain vmdkfuse rw,nofail,_netdev,x-systemd.automount,uhelper=vmdkfuse,name="a,b\\040c" 0 0
$PWD/disks/b\\040c.vmdk $PWD/mnt/b\\040c fuse.vmdkfuse ro,noexec,uhelper=vmdkfuse 0 0
FSTAB
mount_all_twice
[ "$(mounted mnt/plain)" = "$PWD/disks/a.vmdk" ] || fail "source: $(mounted mnt/plain)"
[ "$(mounted 'mnt/b c')" = "$PWD/disks/b c.vmdk" ] || fail "source: $(mounted 'mnt/b c')"
df --output=source mnt/plain | grep -qx "$PWD/disks/a.vmdk"
[ -f "mnt/plain/a,b c" ] || fail 'quotes around the name'
[ -f "mnt/b c/b c.raw" ]
findmnt -n -o OPTIONS 'mnt/b c' | grep -q noexec

echo '== remount has an answer, and changes nothing'
status_of mount -o remount,ro "$PWD/mnt/plain"
[ $status != 0 ] && grep -q 'unmount it, and mount it again' error || fail "remount: $status $(cat error)"
findmnt -n -o OPTIONS mnt/plain | grep -q '^rw'

echo '== umount returns when the lock is gone'
for round in 1 2 3; do
  dd if=/dev/urandom of='mnt/plain/a,b c' bs=1M count=4 conv=notrunc status=none
  umount mnt/plain
  # qemu does not wait for the lock, as this program would.
  qemu-io -f vmdk -c 'read 0 512' disks/a.vmdk >/dev/null || fail 'the image is locked after umount'
  mount -T fstab "$PWD/mnt/plain"
done
umount mnt/plain 'mnt/b c'

echo '== without the helper of umount(8), the next mount waits for the lock'
for round in 1 2 3 4 5 6 7 8; do
  for type in vmdkfuse fuse.vmdkfuse; do
    mount -t $type "$PWD/disks/a.vmdk" "$PWD/mnt/plain"
    dd if=/dev/urandom of=mnt/plain/a.raw bs=1M count=4 conv=notrunc status=none
    umount mnt/plain
  done
done

echo '== a TOML file, by mount(8), as program, and unmounted by it'
echo "$PWD/disks/two.toml $PWD/mnt/toml vmdkfuse nofail,uhelper=vmdkfuse 0 0" >fstab
mount_all_twice
[ "$(mounted mnt/toml)" = "$PWD/disks/two.toml" ] || fail "source: $(mounted mnt/toml)"
[ -f mnt/toml/a.raw ] && [ -f "mnt/toml/b c.raw" ] || fail 'two disks'
umount mnt/toml
vmdkfuse --config disks/two.toml
[ "$(mounted mnt/toml)" = "$PWD/disks/two.toml" ] || fail "source: $(mounted mnt/toml)"
status_of vmdkfuse mnt/plain file=disks/a.vmdk
[ $status = 1 ] && grep -q "mounted on $PWD/mnt/toml" error || fail "the holder of the lock: $(cat error)"
vmdkfuse --unmount --config disks/two.toml
not_mounted mnt/toml
status_of vmdkfuse --unmount --config disks/two.toml
[ $status = 1 ] && grep -q 'nothing is mounted there' error || fail "$status $(cat error)"

echo '== an NBD export'
nbdkit -f -U "$PWD/socket" memory 8M &
server=$!
until_true test -S socket
echo "nbd+unix:///?socket=$PWD/socket $PWD/mnt/nbd vmdkfuse _netdev,uhelper=vmdkfuse 0 0" >fstab
mount_all_twice
[ "$(mounted mnt/nbd)" = "nbd+unix:///?socket=$PWD/socket" ] || fail "source: $(mounted mnt/nbd)"
[ "$(stat -c %s mnt/nbd/disk.raw)" = 8388608 ] || fail 'size of the export'
umount mnt/nbd
kill $server
wait $server || :
server=

echo '== a dead mount is cleared'
vmdkfuse --config disks/two.toml -P "$PWD/pid"
pid=$(cat pid)
kill -KILL "$pid"
ended() { [ ! -d "/proc/$1" ] || grep -q '^State:.*Z' "/proc/$1/status"; }
until_true ended "$pid"
vmdkfuse --unmount --config disks/two.toml
not_mounted mnt/toml

echo '== exit statuses of the helpers'
status_of mount.vmdkfuse "$PWD/disks/a.vmdk" "$PWD/mnt/plain" -o nonsense
[ $status = 1 ] || fail "usage: $status"
status_of mount.vmdkfuse "$PWD/disks/none.vmdk" "$PWD/mnt/plain"
[ $status = 32 ] && grep -q none.vmdk error || fail "mount failure: $status $(cat error)"
status_of umount.vmdkfuse "$PWD/mnt/plain"
[ $status = 32 ] || fail "unmount failure: $status"
chmod 600 "disks/b c.vmdk"
chown 65534 mnt/user
status_of as_user mount.vmdkfuse "$PWD/disks/b c.vmdk" "$PWD/mnt/user"
[ $status = 1 ] || fail "permission: $status $(cat error)"
status_of vmdkfuse mnt/plain file=disks/none.vmdk
[ $status = 1 ] || fail "program: $status"

echo '== user= warns; a password in an address is refused'
mount.vmdkfuse "$PWD/disks/a.vmdk" "$PWD/mnt/plain" -o user=anna,exec,suid,dev 2>error
grep -q 'username=' error || fail "no warning: $(cat error)"
umount mnt/plain
status_of mount.vmdkfuse https://anna:secret@localhost/x.vmdk "$PWD/mnt/plain"
[ $status = 1 ] && grep -q 'credentials=' error && ! grep -q secret error || fail "password: $status $(cat error)"

echo '== another mount namespace'
unshare -m --propagation private sh -c 'echo $$ >other; while [ ! -e done ]; do sleep .1; done' &
until_true test -s other
mount.vmdkfuse "$PWD/disks/a.vmdk" "$PWD/mnt/plain" -N "/proc/$(cat other)/ns/mnt"
not_mounted mnt/plain
grep -q "$PWD/mnt/plain fuse.vmdkfuse\|$PWD/mnt/plain " "/proc/$(cat other)/mounts" || fail 'not mounted there'
umount.vmdkfuse "$PWD/mnt/plain" -N "$(cat other)"
! grep -q "$PWD/mnt/plain " "/proc/$(cat other)/mounts" || fail 'still mounted there'
touch done
wait

echo '== a lazy unmount returns at once, and the daemon ends at the last close'
vmdkfuse mnt/plain file=disks/a.vmdk -P "$PWD/pid"
exec 3<mnt/plain/a.raw
umount -l mnt/plain
not_mounted mnt/plain
[ -e pid ] || fail 'the daemon has ended'
exec 3<&-
until_true test ! -e pid
vmdkfuse mnt/plain file=disks/a.vmdk -P "$PWD/pid"
umount -f mnt/plain
not_mounted mnt/plain
until_true test ! -e pid

echo '== an ordinary user mounts and unmounts what fstab permits'
chown 65534:65534 disks/a.vmdk mnt/user
cp /etc/fstab fstab 2>/dev/null || : >fstab
echo "$PWD/disks/a.vmdk $PWD/mnt/user vmdkfuse noauto,users 0 0" >>fstab
mount --bind fstab /etc/fstab
as_user mount "$PWD/mnt/user"
as_user head -c 512 mnt/user/a.raw >first
[ "$(stat -c %s first)" = 512 ] || fail 'the user cannot read'
as_user umount "$PWD/mnt/user"
not_mounted mnt/user
sed -i '$d' fstab
echo "$PWD/disks/a.vmdk $PWD/mnt/user fuse.vmdkfuse noauto,user 0 0" >>fstab
as_user mount "$PWD/mnt/user"
as_user umount "$PWD/mnt/user"
not_mounted mnt/user
umount /etc/fstab
echo '== passed'
