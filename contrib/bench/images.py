"""The measured images: one raw disk, and its conversions by qemu-img to kinds of VMDK.

The first quarter of the disk is all data; the speed measures read it. The rest is about one third data, in islands of
64 KiB to 16 MiB with holes between them. 70 % of the data cannot be compressed, the other 30 % resemble text. The content
depends only on the size.
"""
import contextlib
import os
import random
import subprocess
import time

KIB64 = 64 << 10
MIB = 1 << 20
SEED = 20261120

# kind -> subformat of qemu-img
KINDS = {
    "sparse": "monolithicSparse", "flat": "monolithicFlat", "stream": "streamOptimized", "chain": "monolithicSparse",
}  # fmt: skip
# Number of deltas of a chain over its base. Each delta holds one MiB of every STRIDE MiB of the dense part.
DELTAS, STRIDE = 3, 8


def dense(size):
    """Returns the length of the first part of the disk, which has no holes."""
    return size // 4


def make_raw(path, size):
    """Writes the raw disk as a sparse file."""
    rng = random.Random(SEED)
    texts = [_text(rng) for _ in range(8)]
    with open(path, "wb") as f:
        f.truncate(size)
        for start, length in _islands(rng, size):
            f.seek(start)
            end = start + length
            while f.tell() < end:
                n = min(KIB64 * rng.choice((1, 2, 4, 8)), end - f.tell())
                if rng.random() < 0.7:
                    f.write(rng.randbytes(n))
                else:
                    at = rng.randrange(MIB - n)
                    f.write(rng.choice(texts)[at : at + n])


def make_vmdk(raw, path, kind):
    """Converts the raw disk into a VMDK of one of `KINDS`. For a chain, `path` is the newest delta."""
    if kind == "chain":
        return _make_chain(raw, path)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={KINDS[kind]}", raw, path]
    subprocess.run(command, check=True)


@contextlib.contextmanager
def served(raw, sock):
    """Serves the raw disk with an NBD server on the Unix socket `sock`."""
    server = subprocess.Popen(["nbdkit", "-f", "-r", "-U", sock, "file", raw], stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while not os.path.exists(sock):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"nbdkit did not create {sock} within 10 seconds")
            time.sleep(0.01)
        yield
    finally:
        server.terminate()
        server.wait()


def copy_speed(sock, size):
    """Returns the MiB/s of nbdcopy, which discards the data: the limit for a client of this server."""
    began = time.perf_counter()
    subprocess.run(["nbdcopy", "--no-extents", f"nbd+unix:///?socket={sock}", "null:"], check=True)
    return size / MIB / (time.perf_counter() - began)


def remove_vmdk(path):
    """Removes a VMDK, its extent file and its parents."""
    for name in (path, path.replace(".vmdk", "-flat.vmdk"), *(_link(path, n) for n in range(DELTAS))):
        if os.path.exists(name):
            os.unlink(name)


def _link(path, number):
    """Returns the path of a link of the chain: 0 is the base, `DELTAS` the newest delta."""
    return path if number == DELTAS else path.replace(".vmdk", f"-{number}.vmdk")


def _make_chain(raw, path):
    """Creates a base with all data, and deltas that repeat parts of them, so that a read meets all links."""
    make_vmdk(raw, _link(path, 0), "sparse")
    size = os.path.getsize(raw)
    for number in range(1, DELTAS + 1):
        delta, piece = _link(path, number), path + ".piece"
        parent = os.path.basename(_link(path, number - 1))
        command = ["qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", parent, delta]
        subprocess.run(command, check=True)
        for at in range(number * MIB, dense(size), STRIDE * MIB):
            with open(raw, "rb") as source, open(piece, "wb") as f:
                source.seek(at)
                f.write(source.read(MIB))
            subprocess.run(["qemu-io", "-f", "vmdk", "-c", f"write -q -s {piece} {at} {MIB}", delta], check=True)
        os.unlink(piece)


def _islands(rng, size):
    """Yields (offset, length) of all data ranges, in order."""
    yield 0, dense(size)
    at = dense(size)
    while True:
        at += KIB64 * round(2 ** rng.uniform(0, 8))
        length = KIB64 * round(2 ** rng.uniform(0, 8))
        if at + length > size:
            return
        if rng.random() < 0.68:
            yield at, length
        at += length


def _text(rng):
    """Returns one MiB of words."""
    words = [b"%x" % rng.getrandbits(rng.choice((8, 16, 24, 40))) for _ in range(400)]
    line = b" ".join(rng.choices(words, k=20000)) + b"\n"
    return (line * (MIB // len(line) + 1))[:MIB]
