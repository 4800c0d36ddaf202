# Mounts a disk in the background and prints what it writes to the system log, until it has ended. Arguments: a folder with
# `a.img`, the program. Needs a mount namespace of its own: its /dev/log is the socket of a reader here.
set -eu
cd "$1"
mkdir dev mnt
mount -t tmpfs none dev
for name in fuse null zero urandom; do
  touch dev/$name
  mount --bind /dev/$name dev/$name
done
mount --rbind dev /dev
python3 -c '
import socket
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.bind("/dev/log")
log.settimeout(60)
print("bound", flush=True)
message = ""
while not message.endswith("unmounted"):
    message = log.recv(65536).decode()
    print(message, flush=True)
' >log &
reader=$!
n=0
until [ -s log ]; do
  n=$((n + 1))
  [ $n -lt 600 ]
  sleep .1
done
"$2" -r -v mnt file=a.img
umount mnt
wait $reader
cat log
