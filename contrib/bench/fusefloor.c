// fusefloor: the simplest FUSE server for one file; it measures the limit of the kernel's transport.
//
//   fusefloor [-t THREADS] FILE MOUNTPOINT
//
// It shows FILE as MOUNTPOINT/disk, read-only, and implements the kernel's protocol itself (no libfuse): requests of up
// to 1 MiB, one cloned device descriptor per thread, one pread and one writev per request. It needs root (it calls
// mount(2)), stays in the foreground, and exits when it is unmounted.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_READ (1u << 20)
#define HEAD 4096
enum { ROOT = FUSE_ROOT_ID, DISK = 2, CACHE_SECONDS = 60 };

static int device, disk;
static struct stat disk_stat;

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static void answer(int dev, uint64_t unique, int error, const void *body, size_t size) {
  size_t sent = error ? 0 : size;
  struct fuse_out_header head = {.len = sizeof head + sent, .error = -error, .unique = unique};
  struct iovec parts[2] = {{&head, sizeof head}, {(void *)body, sent}};
  // ENOENT: the request was interrupted, so the kernel drops the reply
  if (writev(dev, parts, sent ? 2 : 1) < 0 && errno != ENOENT) perror("answer");
}

static struct fuse_attr attributes(uint64_t inode) {
  struct fuse_attr a = {.ino = inode, .nlink = 1, .blksize = 4096, .mode = S_IFREG | 0444};
  if (inode == ROOT) {
    a.mode = S_IFDIR | 0755;
    a.nlink = 2;
  } else {
    a.size = disk_stat.st_size;
    a.blocks = disk_stat.st_blocks;
  }
  return a;
}

static void init(int dev, uint64_t unique, const struct fuse_init_in *in) {
  uint32_t wanted = FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES;
  struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION,
                              .minor = in->minor < FUSE_KERNEL_MINOR_VERSION ? in->minor : FUSE_KERNEL_MINOR_VERSION,
                              .flags = in->flags & wanted,
                              .max_readahead = MAX_READ,
                              .max_background = 64,
                              .congestion_threshold = 48,
                              .max_write = MAX_READ,
                              .max_pages = MAX_READ / 4096,
                              .time_gran = 1};
  answer(dev, unique, 0, &out, sizeof out);
}

static void lookup(int dev, uint64_t unique, const char *name) {
  struct fuse_entry_out out = {.nodeid = DISK, .entry_valid = CACHE_SECONDS, .attr_valid = CACHE_SECONDS};
  out.attr = attributes(DISK);
  answer(dev, unique, strcmp(name, "disk") ? ENOENT : 0, &out, sizeof out);
}

static void readdir(int dev, uint64_t unique, const struct fuse_read_in *in) {
  char buf[64] = {0};
  struct fuse_dirent *entry = (void *)buf;
  *entry = (struct fuse_dirent){.ino = DISK, .off = 1, .namelen = 4, .type = S_IFREG >> 12};
  memcpy(entry->name, "disk", 4);
  answer(dev, unique, 0, buf, in->offset ? 0 : FUSE_DIRENT_SIZE(entry));
}

static void *serve(void *arg) {
  int dev = (int)(intptr_t)arg;
  char *request = aligned_alloc(4096, MAX_READ + HEAD), *data = aligned_alloc(4096, MAX_READ);
  if (!request || !data) fail("memory");
  for (;;) {
    if (read(dev, request, MAX_READ + HEAD) < 0) {
      if (errno == EINTR || errno == EAGAIN || errno == ENOENT) continue;
      if (errno == ENODEV) exit(0);  // unmounted
      fail("read");
    }
    const struct fuse_in_header *head = (void *)request;
    const void *in = head + 1;
    switch (head->opcode) {
    case FUSE_INIT: init(dev, head->unique, in); break;
    case FUSE_LOOKUP: lookup(dev, head->unique, in); break;
    case FUSE_GETATTR: {
      struct fuse_attr_out out = {.attr_valid = CACHE_SECONDS, .attr = attributes(head->nodeid)};
      answer(dev, head->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_OPEN:
    case FUSE_OPENDIR: {
      struct fuse_open_out out = {.open_flags = head->opcode == FUSE_OPEN ? FOPEN_KEEP_CACHE : 0};
      answer(dev, head->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_READDIR: readdir(dev, head->unique, in); break;
    case FUSE_READ: {
      const struct fuse_read_in *want = in;
      ssize_t got = pread(disk, data, want->size < MAX_READ ? want->size : MAX_READ, want->offset);
      answer(dev, head->unique, got < 0 ? errno : 0, data, got < 0 ? 0 : got);
      break;
    }
    case FUSE_STATFS: {
      struct fuse_statfs_out out = {0};
      answer(dev, head->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_FLUSH: answer(dev, head->unique, 0, 0, 0); break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT: break;  // these requests have no reply
    case FUSE_DESTROY: answer(dev, head->unique, 0, 0, 0); exit(0);
    default: answer(dev, head->unique, ENOSYS, 0, 0);
    }
  }
}

int main(int argc, char **argv) {
  int threads = 2, option;
  char options[100];
  while ((option = getopt(argc, argv, "t:")) != -1) {
    if (option != 't') return 2;
    threads = atoi(optarg);
  }
  if (argc - optind != 2) {
    fprintf(stderr, "usage: fusefloor [-t THREADS] FILE MOUNTPOINT\n");
    return 2;
  }
  disk = open(argv[optind], O_RDONLY | O_CLOEXEC);
  if (disk < 0 || fstat(disk, &disk_stat)) fail(argv[optind]);
  device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
  if (device < 0) fail("/dev/fuse");
  snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", device);
  if (mount("fusefloor", argv[optind + 1], "fuse.fusefloor", MS_NODEV | MS_NOSUID | MS_RDONLY, options)) fail("mount");
  for (int i = 1; i < threads; i++) {
    pthread_t thread;
    int clone = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (clone < 0 || ioctl(clone, FUSE_DEV_IOC_CLONE, &device)) fail("clone of /dev/fuse");
    if (pthread_create(&thread, 0, serve, (void *)(intptr_t)clone)) fail("thread");
  }
  serve((void *)(intptr_t)device);
}
