#!/usr/bin/env python3
"""Measures vmdkfuse and its peers in Debian in one run, through the file that each of them shows.

Needs root: it mounts a tmpfs for the images, so that all of them are backed by memory, and drops page caches. It runs in
its own mount and process namespaces, so that no process or mount outlives it. Compare rows of one table only: the speed
of a machine varies from run to run.

Environment: BENCH_SIZE, size of the disk in bytes or with K, M, G (default 4G; --quick: 64M). Needs about 1.6 times that
size and another half GiB of free memory.
"""
import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import images
import plot
from contender import ALL, LIMITS, PEERS, Failed, Mount, Spec, contender, nbd_contender

HERE = os.path.dirname(os.path.abspath(__file__))
MIB, GIB = 1 << 20, 1 << 30
INSIDE = "VMDKFUSE_BENCH_INSIDE"

# name -> (title, True if more is better, digits)
MEASURES = {
    "start": ("start to first byte, ms", False, 1),
    "cold": ("sequential 1 MiB, page cache cold, MiB/s", True, 0),
    "warm": ("sequential 1 MiB again, page cache warm, MiB/s", True, 0),
    "direct": ("O_DIRECT 1 MiB QD4, MiB/s", True, 0),
    "all": ("whole disk with holes, O_DIRECT 1 MiB QD4, MiB/s", True, 0),
    "r1": ("random 4 KiB O_DIRECT QD1, IOPS", True, 0),
    "r16": ("random 4 KiB O_DIRECT QD16, IOPS", True, 0),
    "rb": ("random 4 KiB buffered, page cache cold, IOPS", True, 0),
    "cpu": ("daemon CPU of cold, s/GiB", False, 2),
    "rss": ("peak RSS, MiB", False, 0),
}


def main():
    options = parse()
    if os.geteuid() != 0:
        sys.exit("bench: needs root: it mounts a tmpfs and drops page caches")
    if INSIDE not in os.environ:
        sys.exit(in_namespaces())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("bench: interrupted"))
    for tool in ("fio", "cc", "qemu-img", "setpriv"):
        if not shutil.which(tool):
            sys.exit(f"bench: {tool} is missing; contrib/setup.sh bench installs it")
    work = options.work
    os.makedirs(work, exist_ok=True)
    check_memory(options.size)
    # Space for the raw disk, one VMDK, and the bare server.
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=755,size={options.size * 9 // 4 + 64 * MIB}", "bench", work], check=True)
    try:
        results = Bench(options).run()
    finally:
        subprocess.run(["umount", "-l", work])
        with contextlib.suppress(OSError):
            os.rmdir(work)
    write(results, options)


def in_namespaces():
    """Runs this program again in new namespaces, whose processes and mounts the kernel removes with it; returns its status."""
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    inner = subprocess.Popen([*command, sys.executable, *sys.argv], env=dict(os.environ, **{INSIDE: "1"}))
    # unshare(1) does not forward SIGTERM. Ctrl-C in a terminal reaches the inner program directly.
    signal.signal(signal.SIGTERM, lambda *_: inner.kill())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return inner.wait() and 1


def parse():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument(
        "--contender", action="append", default=[], metavar="[NAME=]PROGRAM",
        help="program to compare with the peers, or the name of a peer to treat as one; repeatable (an old and a new build)",
    )
    a.add_argument("--kinds", default=",".join(ALL), help="comma-separated list, default %(default)s")
    a.add_argument("--measures", default=",".join(MEASURES), help="comma-separated list, default %(default)s")
    a.add_argument("--rounds", type=int, help="default 3")
    a.add_argument("--time", type=float, help="length of a random run in seconds, default 3")
    a.add_argument("--cap", type=float, help="limit of a sequential run in seconds, default 8")
    a.add_argument("--quick", action="store_true", help="64M, one round, 0.3 s: tests the benchmark; the figures mean nothing")
    a.add_argument("--work", default="/tmp/vmdkfuse-bench", help="where to mount the tmpfs, default %(default)s")
    a.add_argument("--out", help="folder of bench.md, bench.json and bench.svg; default that of this script, with --quick target/bench")
    o = a.parse_args()
    o.kinds, o.measures = o.kinds.split(","), o.measures.split(",")
    for word in o.kinds:
        word in ALL or a.error(f"unknown kind {word}")
    for word in o.measures:
        word in MEASURES or a.error(f"unknown measure {word}")
    o.rounds = o.rounds or (1 if o.quick else 3)
    o.time = o.time or (0.3 if o.quick else 3)
    o.cap = o.cap or (2 if o.quick else 8)
    o.size = bytes_of(os.environ.get("BENCH_SIZE", "64M" if o.quick else "4G")) // MIB * MIB
    o.out = os.path.abspath(o.out or (os.path.join(HERE, "../../target/bench") if o.quick else HERE))
    o.work = os.path.abspath(o.work)
    o.specs = specs(o.contender, a.error)
    return o


def specs(words, error):
    """Returns everything to measure; contenders last."""
    peers = {p.name: p for p in PEERS}
    new = []
    for word in words:
        name, _, program = word.rpartition("=")
        if program in peers:
            peer = peers.pop(program)
            new.append(type(peer)(**{**vars(peer), "role": "contender"}))
            continue
        if not os.access(program, os.X_OK) or os.path.isdir(program):
            error(f"{program} is neither an executable file nor a peer; peers are {', '.join(p.name for p in PEERS)}")
        name = name or os.path.basename(program)
        new.append(contender(name, os.path.abspath(program)))
        new.append(contender(name + ", ordinary user", os.path.abspath(program), user=True))
        new.append(nbd_contender(name + ", NBD", os.path.abspath(program)))
    return [*LIMITS, *peers.values(), *new]


def bytes_of(text):
    unit = {"K": 1 << 10, "M": MIB, "G": GIB}.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


def check_memory(size):
    # Memory for the data of the raw disk and of one VMDK (half of its size each), the page cache of a cold read, and pretouch.
    need = size * 8 // 5 + GIB // 2
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:"))
    if free < need:
        sys.exit(f"bench: needs {need >> 20} MiB of free memory, but only {free >> 20} MiB are available; set BENCH_SIZE")


class Bench:
    """One run over all kinds of image. Results: values[kind][name][measure] = one number per round."""

    def __init__(self, options):
        self.o, self.values, self.failures = options, {}, []

    def run(self):
        o, began, load = self.o, time.time(), os.getloadavg()[0]
        raw = f"{o.work}/disk.raw"
        log(f"creating the disk: {o.size / GIB:g} GiB")
        images.make_raw(raw, o.size)
        command = ["cc", "-O2", "-o", f"{o.work}/fusefloor", f"{HERE}/fusefloor.c", "-lpthread"]
        subprocess.run(command, check=True)
        o.specs = [self.installed(s) for s in o.specs]
        for kind in o.kinds:
            if kind == "nbd":
                with images.served(raw, f"{o.work}/nbd.sock"):
                    self.kind(kind, raw, raw)
                continue
            image = f"{o.work}/{kind}.vmdk"
            images.make_vmdk(raw, image, kind)
            try:
                self.kind(kind, raw, image)
            finally:
                images.remove_vmdk(image)
        return {
            "size": o.size, "rounds": o.rounds, "kernel": os.uname().release, "processors": len(os.sched_getaffinity(0)),
            "seconds": round(time.time() - began), "load": [round(load, 2), round(os.getloadavg()[0], 2)],
            "contenders": [s.name for s in o.specs if s.role == "contender"],
            "limits": [*(s.name for s in o.specs if s.role == "limit"), "nbdcopy to null"],
            "values": {kind: self.in_order(rows) for kind, rows in self.values.items()}, "failures": self.failures,
        }

    def in_order(self, rows):
        """Returns the rows in the order of the programs, not in that of the measurements."""
        order = [s.name for s in self.o.specs]
        return {name: rows[name] for name in sorted(rows, key=lambda n: order.index(n) if n in order else 0)}

    def installed(self, spec):
        """Returns the spec with its program copied to a folder where an ordinary user may run it; a home may be private."""
        if not spec.program:
            return spec
        copy = f"{self.o.work}/{spec.name.removesuffix(', ordinary user').removesuffix(', NBD').replace('/', '_')}"
        shutil.copy(spec.program, copy)
        os.chmod(copy, 0o755)
        return type(spec)(**{**vars(spec), "program": copy})

    def kind(self, kind, raw, image):
        """Mounts all programs at once and runs each measure on all of them in turn, so that A and B are seconds apart."""
        taking_part = [s for s in self.o.specs if kind in s.kinds]
        new = lambda s: Mount(s, raw if s.raw else image, self.o.work, self.o.size)
        running = []
        try:
            for spec in taking_part:
                mount = new(spec)
                running.append(mount)
                try:
                    self.begin(kind, mount, new, raw)
                except (Failed, OSError) as e:
                    self.fail(kind, spec, "start", e)
                    mount.end()
                    running.remove(mount)
            for what in ("cold", "direct", "all", "r1", "r16", "rb"):
                if what in self.o.measures:
                    if kind == "nbd" and what == "all":
                        limit = Spec("nbdcopy to null", None, "", role="limit")
                        for _ in range(self.o.rounds):
                            speed = images.copy_speed(f"{self.o.work}/nbd.sock", self.o.size)
                            self.add(kind, limit, {"all": speed})
                    for mount in rounds(running, self.o.rounds):
                        self.measure(kind, mount, what)
            for mount in running:
                if mount.pids and "rss" in self.o.measures:
                    self.add(kind, mount.spec, {"rss": mount.peak_rss_mib()})
        finally:
            for mount in running:
                mount.end()

    def begin(self, kind, mount, new, raw):
        """Measures the start time, leaves `mount` running, and checks the content of its file."""
        if mount.command and not mount.spec.user and "start" in self.o.measures:
            for _ in range(self.o.rounds):
                trial = new(mount.spec)
                try:
                    self.add(kind, mount.spec, {"start": trial.start() * 1000})
                finally:
                    trial.end()
        mount.start()
        if not mount.same_as(raw, min(self.o.size, 256 * MIB)):
            raise Failed("its file differs from the raw disk")

    def measure(self, kind, mount, what):
        try:
            got = getattr(self, what)(mount)
        except (Failed, OSError, subprocess.TimeoutExpired) as e:
            return self.fail(kind, mount.spec, what, e)
        log(f"  {kind} {what} {mount.spec.name}: " + " ".join(f"{k}={v:.4g}" for k, v in got.items()))
        self.add(kind, mount.spec, got)

    def cold(self, mount):
        """Measures `cold`, and with it `cpu` and `warm`."""
        size = images.dense(self.o.size)
        mount.drop_cache()
        pretouch(size)
        before = mount.cpu_seconds()
        read = self.fio(mount, "read", "1M", ["--ioengine=psync", f"--size={size}"], self.o.cap)
        got = {"cold": read["bw_bytes"] / MIB}
        if mount.pids and "cpu" in self.o.measures:
            got["cpu"] = (mount.cpu_seconds() - before) / (read["io_bytes"] / GIB)
        if "warm" in self.o.measures:
            words = ["--ioengine=psync", "--invalidate=0", f"--size={read['io_bytes'] // MIB * MIB}"]
            got["warm"] = self.fio(mount, "read", "1M", words, self.o.cap)["bw_bytes"] / MIB
        mount.drop_cache()
        return got

    def rb(self, mount):
        """Measures `rb`. Each page is read once, so that all reads are cold."""
        size = images.dense(self.o.size)
        mount.drop_cache()
        pretouch(size)
        words = ["--ioengine=psync", "--norandommap=0", f"--size={size}"]
        got = {"rb": self.fio(mount, "randread", "4k", words, self.o.time)["iops"]}
        mount.drop_cache()
        return got

    def direct(self, mount):
        return {"direct": self.sequential(mount, images.dense(self.o.size), self.o.cap)}

    def all(self, mount):
        return {"all": self.sequential(mount, self.o.size, self.o.cap * 2)}

    def sequential(self, mount, size, cap):
        words = ["--direct=1", "--ioengine=libaio", "--iodepth=4", f"--size={size}"]
        return self.fio(mount, "read", "1M", words, cap)["bw_bytes"] / MIB

    def r1(self, mount):
        return {"r1": self.random(mount, ["--ioengine=psync"])}

    def r16(self, mount):
        return {"r16": self.random(mount, ["--ioengine=libaio", "--iodepth=16"])}

    def random(self, mount, words):
        words = [*words, "--direct=1", "--time_based", f"--size={images.dense(self.o.size)}"]
        return self.fio(mount, "randread", "4k", words, self.o.time)["iops"]

    def fio(self, mount, pattern, block, words, seconds):
        """Runs one fio job on the file of the mount and returns the `read` section of its report."""
        if mount.spec.command is None:
            # A tmpfs has no O_DIRECT in older kernels, and the speed of the file itself is the same without it.
            words = [w for w in words if w != "--direct=1"]
        command = ["fio", "--name=j", f"--filename={mount.file}", f"--rw={pattern}", f"--bs={block}", "--readonly",
                   "--output-format=json", "--norandommap", "--randrepeat=0", "--allow_file_create=0",
                   f"--runtime={int(seconds * 1000)}ms", *words]  # fmt: skip
        done = mount.run(command)
        try:
            job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        except ValueError:
            raise Failed("fio: " + (done.stderr or done.stdout).strip()[:200]) from None
        if job["error"] or not job["read"]["io_bytes"]:
            raise Failed(f"fio: error {job['error']} {done.stderr.strip()[:200]}")
        return job["read"]

    def add(self, kind, spec, got):
        for measure, value in got.items():
            self.values.setdefault(kind, {}).setdefault(spec.name, {}).setdefault(measure, []).append(value)

    def fail(self, kind, spec, what, why):
        log(f"  {kind} {what} {spec.name}: FAILED: {why}")
        self.failures.append(f"{kind}, {spec.name}, {what}: {why}")


def rounds(mounts, count):
    """Yields A B C, then C B A, so that a drift of the machine's speed affects all programs equally."""
    for n in range(count):
        yield from mounts if n % 2 == 0 else reversed(mounts)


def pretouch(size):
    """Touches and frees memory. In a virtual machine the first use of memory that the host had reclaimed is slow, which
    must not count as time of the measured program."""
    import mmap

    mmap.mmap(-1, int(size * 1.25), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def log(text):
    print(text, file=sys.stderr, flush=True)


# ---- output ----------------------------------------------------------------------------------------------------


def write(results, options):
    os.makedirs(options.out, exist_ok=True)
    text = report(results, options.measures)
    for name, content in (
        ("bench.md", text),
        ("bench.json", json.dumps(results, indent=1) + "\n"),
        ("bench.svg", plot.draw(results)),
    ):
        with open(os.path.join(options.out, name), "w") as f:
            f.write(content)
    print(text, end="")
    log(f"bench.md, bench.json and bench.svg are in {options.out}")
    if results["failures"]:
        sys.exit(1)


def report(results, measures):
    """Returns Markdown with a table of medians and one of ratios for each kind of image."""
    lines = [
        f"Medians of {results['rounds']} round(s), {results['size'] / GIB:g} GiB disk in memory, {results['processors']} processors,"
        f" Linux {results['kernel']}. Load average {results['load'][0]} before and {results['load'][1]} after."
        " **Bold** marks the best peer of a column; ± is half the spread of the rounds, if it is 10 % or more.",
        "",
        *(f"- `{m}`: {MEASURES[m][0]}" for m in measures),
    ]
    for kind, rows in results["values"].items():
        columns = [m for m in measures if any(m in row for row in rows.values())]
        lines += ["", f"### {kind}", "", header(columns), *medians_table(results, rows, columns)]
        ratios = ratio_table(results, rows, columns)
        if ratios:
            lines += ["", "Ratio to peers and limits, above 1 is better (also where less is better); in brackets the range over the rounds:", ""]
            lines += [header(columns), *ratios]
    lines += ["", *(f"FAILED: {f}" for f in results["failures"])] if results["failures"] else []
    return "\n".join(lines) + "\n"


def header(columns):
    return "| | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns)


def medians_table(results, rows, columns):
    best = {m: best_peer(results, rows, m) for m in columns}
    for name, row in rows.items():
        cells = [f"**{c}**" if best[m] == name else c for m, c in ((m, cell(row, m)) for m in columns)]
        role = " (limit)" if name in results["limits"] else ""
        yield f"| {name}{role} | " + " | ".join(cells) + " |"


def cell(row, measure):
    values = row.get(measure)
    if not values:
        return ""
    median = statistics.median(values)
    spread = (max(values) - min(values)) / median / 2 if median else 0
    return f"{median:,.{MEASURES[measure][2]}f}" + (f" ±{spread * 100:.0f}%" if spread >= 0.1 else "")


def best_peer(results, rows, measure):
    """Returns the peer with the best median, or None."""
    peers = [n for n in rows if n not in results["limits"] and n not in results["contenders"] and rows[n].get(measure)]
    pick = max if MEASURES[measure][1] else min
    return pick(peers, key=lambda n: statistics.median(rows[n][measure]), default=None)


def ratio_table(results, rows, columns):
    lines = []
    for name in (n for n in results["contenders"] if n in rows):
        cells = []
        for m in columns:
            peer = best_peer(results, rows, m)
            against = ratio(rows, name, peer, m) if peer else ""
            cells.append(f"{against} {peer}" if against else "")
        lines.append(f"| {name} to the best peer | " + " | ".join(cells) + " |")
        for limit in (n for n in results["limits"] if n in rows):
            cells = [ratio(rows, name, limit, m) for m in columns]
            lines.append(f"| {name} to the {limit} | " + " | ".join(cells) + " |")
    return lines


def ratio(rows, one, other, measure):
    """Returns the factor by which `one` is better than `other`: of the medians, and the range over the rounds."""
    a, b = rows[one].get(measure), rows[other].get(measure)
    if not a or not b or not all(a) or not all(b):
        return ""
    better = (lambda x, y: x / y) if MEASURES[measure][1] else (lambda x, y: y / x)
    pairs = [better(x, y) for x, y in zip(a, b)]
    text = f"{better(statistics.median(a), statistics.median(b)):.2f}"
    return text + (f" ({min(pairs):.2f}–{max(pairs):.2f})" if len(pairs) > 1 else "")


if __name__ == "__main__":
    main()
