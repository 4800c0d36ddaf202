"""Command templates of the measured programs, and a running mount of one of them.

Placeholders of a template: {img} the image, {fmt} its format in qemu's terms, {mnt} a new directory, {cover} a new empty
file, {stem} the image's name without its extension, {uri} and {sock} the server of the kind nbd, {floor} the bare FUSE
server, {bin} the contender's program.
"""
import os
import signal
import subprocess
import time
from dataclasses import dataclass

VMDK = ("sparse", "chain", "flat", "stream")
# The VMDK kinds, and the raw disk served by an NBD server.
ALL = (*VMDK, "nbd")
TICKS = os.sysconf("SC_CLK_TCK")
# The "ordinary user" is Debian's user nobody with the group nogroup.
AS_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
# Seconds until a start fails, and until a process that does not exit is signalled or killed.
START_LIMIT = 20.0
END_LIMIT = 8.0


@dataclass(frozen=True)
class Spec:
    """One program or limit to measure."""

    name: str
    command: str | None
    file: str
    kinds: tuple = ALL
    role: str = "peer"  # peer, limit or contender
    raw: bool = False  # reads the raw disk instead of the VMDK
    user: bool = False  # started and read by an ordinary user
    program: str = ""


LIMITS = [
    Spec("raw file", None, "{img}", role="limit", raw=True),
    Spec("bare FUSE server", "{floor} -t 2 {img} {mnt}", "{mnt}/disk", role="limit", raw=True),
]
PEERS = [
    Spec(
        "nbdfuse + qemu-nbd",
        "nbdfuse -r {mnt}/disk --socket-activation qemu-nbd -r -f {fmt} {img}",
        "{mnt}/disk",
        kinds=VMDK,
    ),
    Spec(
        "qemu-storage-daemon",
        "qemu-storage-daemon"
        " --blockdev driver=file,filename={img},node-name=f,read-only=on,auto-read-only=off"
        " --blockdev driver={fmt},file=f,node-name=d,read-only=on"
        " --export type=fuse,id=e,node-name=d,mountpoint={cover},writable=off",
        "{cover}",
        kinds=VMDK,
    ),
    Spec("nbdfuse", "nbdfuse -r {mnt}/disk {uri}", "{mnt}/disk", kinds=("nbd",)),
    Spec(
        "qemu-storage-daemon, NBD",
        "qemu-storage-daemon"
        " --blockdev driver=nbd,server.type=unix,server.path={sock},node-name=d,read-only=on"
        " --export type=fuse,id=e,node-name=d,mountpoint={cover},writable=off",
        "{cover}",
        kinds=("nbd",),
    ),
    Spec("vmdkmount", "vmdkmount {img} {mnt}", "{mnt}/vmdk1", kinds=("sparse", "stream")),
]


def contender(name, program, user=False):
    """Returns the spec of a build of vmdkfuse with default options."""
    command, file = "{bin} -r {mnt} file={img}", "{mnt}/{stem}.raw"
    return Spec(name, command, file, kinds=VMDK, role="contender", user=user, program=program)


def nbd_contender(name, program):
    """Returns the spec of a build of vmdkfuse that reads the NBD server."""
    return Spec(name, "{bin} -r {mnt} {uri}", "{mnt}/disk.raw", kinds=("nbd",), role="contender", program=program)


class Failed(Exception):
    """A program failed; the message gives the reason."""


class Mount:
    """A program that serves one image. `start` and `end` may be called once each, `end` in any state."""

    count = 0

    def __init__(self, spec, image, work, size):
        Mount.count += 1
        self.spec, self.size, self.pids, self.process = spec, size, [], None
        self.token = f"{os.getpid()}-{Mount.count}"
        self.mnt, self.cover, self.log = (f"{work}/{self.token}.{end}" for end in ("mnt", "cover", "log"))
        stem = os.path.basename(image).rsplit(".", 1)[0]
        words = {"img": image, "fmt": "raw" if spec.raw else "vmdk", "mnt": self.mnt, "cover": self.cover}
        words |= {"sock": f"{work}/nbd.sock", "uri": f"nbd+unix:///?socket={work}/nbd.sock"}
        words |= {"stem": stem, "floor": f"{work}/fusefloor", "bin": spec.program}
        self.file = spec.file.format(**words)
        self.command = [part.format(**words) for part in spec.command.split()] if spec.command else None
        self.prefix = AS_USER if spec.user else []

    def start(self):
        """Starts the program and returns the seconds until the first 4 KiB were read."""
        if not self.command:
            return 0.0
        os.mkdir(self.mnt)
        open(self.cover, "w").close()
        if self.spec.user:
            os.chown(self.mnt, 65534, 65534)
        env = dict(os.environ, VMDKFUSE_BENCH_MOUNT=self.token, LC_ALL="C")
        with open(self.log, "w") as log:
            began = time.perf_counter()
            self.process = subprocess.Popen(
                self.prefix + self.command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        while not self._readable():
            if self.process.poll() not in (None, 0) or time.perf_counter() - began > START_LIMIT:
                with open(self.log) as log:
                    raise Failed("did not start: " + log.read().strip()[-300:])
            time.sleep(0.0005)
        took = time.perf_counter() - began
        self.pids = marked(self.token)
        return took

    def _readable(self):
        """Returns True if the file has its full size and its first bytes can be read."""
        if self.spec.user:
            # Without allow_other only that user can access the mount; not even root can.
            command = [*self.prefix, "dd", f"if={self.file}", "of=/dev/null", "bs=4096", "count=1", "status=none"]
            return subprocess.run(command, capture_output=True).returncode == 0
        try:
            if os.stat(self.file).st_size != self.size:
                return False
            with open(self.file, "rb", buffering=0) as f:
                return len(f.read(4096)) == 4096
        except OSError:
            return False

    def run(self, command, timeout=300):
        """Runs a command as the user that can access the mount."""
        return subprocess.run(self.prefix + command, capture_output=True, text=True, timeout=timeout)

    def drop_cache(self):
        """Drops the whole page cache: with passthrough or the kernel view the pages belong to another file than the mount's."""
        self.run(["dd", f"if={self.file}", "of=/dev/null", "iflag=nocache", "count=0", "status=none"])
        with open("/proc/sys/vm/drop_caches", "w") as f:
            f.write("1")

    def same_as(self, raw, length):
        """Returns True if the first `length` bytes of the file are those of the raw disk."""
        return self.run(["cmp", f"--bytes={length}", raw, self.file]).returncode == 0

    def cpu_seconds(self):
        """Returns the CPU time of its processes so far."""
        total = 0
        for pid in self.pids:
            try:
                with open(f"/proc/{pid}/stat") as f:
                    fields = f.read().rsplit(")", 1)[1].split()
                total += int(fields[11]) + int(fields[12])
            except OSError:
                pass
        return total / TICKS

    def peak_rss_mib(self):
        """Returns the sum of the peak RSS of its processes; shared pages count once per process."""
        total = 0
        for pid in self.pids:
            try:
                with open(f"/proc/{pid}/status") as f:
                    total += sum(int(line.split()[1]) for line in f if line.startswith("VmHWM:"))
            except OSError:
                pass
        return total / 1024

    def end(self):
        """Unmounts the file system, stops the processes, and removes the files."""
        if not self.process:
            return
        for path in (self.mnt, self.cover):
            if path in mounted():
                subprocess.run(["umount", path], capture_output=True)
        stop(self.token)
        for path in (self.mnt, self.cover):
            while path in mounted() and subprocess.run(["umount", "-l", path], capture_output=True).returncode == 0:
                pass
        self.process.wait()
        self.process = None
        os.rmdir(self.mnt)
        os.unlink(self.cover)
        os.unlink(self.log)


def mounted():
    """Returns the mount points of this namespace."""
    with open("/proc/self/mounts") as f:
        return {line.split()[1] for line in f}


def marked(token):
    """Returns the ids of the processes of a start, including daemons: they inherit its token in their environment."""
    mark, found = b"VMDKFUSE_BENCH_MOUNT=" + token.encode() + b"\0", []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                if mark in f.read() + b"\0":
                    found.append(int(pid))
        except OSError:
            pass
    return found


def stop(token):
    """Waits for the processes of a start, which exit after an unmount; then sends SIGTERM, then SIGKILL."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        for pid in marked(token) if number else ():
            try:
                os.kill(pid, number)
            except OSError:
                pass
        end = time.monotonic() + (2.0 if number is None else END_LIMIT)
        while marked(token):
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        else:
            return
