/*
 * Checks that a listed file is a block device in every function, and keeps its bytes. Run under LD_PRELOAD:
 *
 *   listed NAME FILE BYTES OTHER
 *
 * NAME is a symbolic link to FILE, whose size is BYTES. In the end NAME is linked to OTHER instead, which has another size.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <spawn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#if defined(__x86_64__)
/* What a binary from before glibc 2.33 calls. */
#define OLD(name) __asm__(".symver " #name ", " #name "@GLIBC_2.2.5")
OLD(__xstat);
OLD(__lxstat);
OLD(__fxstat);
OLD(__xstat64);
OLD(__lxstat64);
OLD(__fxstat64);
__asm__(".symver __fxstatat, __fxstatat@GLIBC_2.4");
__asm__(".symver __fxstatat64, __fxstatat64@GLIBC_2.4");
extern int __xstat(int, const char *, struct stat *);
extern int __lxstat(int, const char *, struct stat *);
extern int __fxstat(int, int, struct stat *);
extern int __xstat64(int, const char *, struct stat64 *);
extern int __lxstat64(int, const char *, struct stat64 *);
extern int __fxstat64(int, int, struct stat64 *);
extern int __fxstatat(int, int, const char *, struct stat *, int);
extern int __fxstatat64(int, int, const char *, struct stat64 *, int);
#endif
extern int __open(const char *, int, ...);
extern int __open64(const char *, int, ...);
extern int __open_2(const char *, int);
extern int __open64_2(const char *, int);
extern int __openat_2(int, const char *, int);
extern int __openat64_2(int, const char *, int);

static const char *name, *file;
static uint64_t bytes;
static dev_t number;

/* Returns the size that a descriptor answers as a disk, or -1. */
static int64_t disk_size(int fd)
{
	uint64_t size;
	return ioctl(fd, BLKGETSIZE64, &size) ? -1 : (int64_t)size;
}

#define BLOCK(call)                                                                                   \
	do {                                                                                          \
		memset(&status, 0xee, sizeof status);                                                 \
		errno = 4711;                                                                         \
		CHECK((call) == 0 && errno == 4711, "failed");                                        \
		CHECK(S_ISBLK(status.st_mode) && (status.st_mode & 0777) == 0640, "%o", status.st_mode); \
		CHECK(status.st_rdev == number, "%lx", (long)status.st_rdev);                         \
		CHECK(status.st_size == 0 && status.st_blocks == 0 && status.st_blksize == 4096, "size"); \
	} while (0)

static void described_alike(int fd)
{
	struct stat status;
	stat(name, &status);
	number = status.st_rdev;
	char path[64];
	snprintf(path, sizeof path, "/sys/dev/block/%u:%u", major(number), minor(number));
	CHECK(major(number) >= 120 && major(number) <= 127 && access(path, F_OK), "%s", path);
	BLOCK(stat(name, &status));
	BLOCK(stat(file, &status));
	BLOCK(lstat(file, &status));
	BLOCK(fstat(fd, &status));
	BLOCK(fstatat(AT_FDCWD, name, &status, 0));
	BLOCK(fstatat(fd, "", &status, AT_EMPTY_PATH));
#if defined(__x86_64__)
	BLOCK(__xstat(1, name, &status));
	BLOCK(__lxstat(1, file, &status));
	BLOCK(__fxstat(1, fd, &status));
	BLOCK(__fxstatat(1, AT_FDCWD, name, &status, 0));
#endif
	CHECK(lstat(name, &status) == 0 && S_ISLNK(status.st_mode), "a link is a link");
}

static void described_alike_64(int fd)
{
	struct stat64 status;
	BLOCK(stat64(name, &status));
	BLOCK(lstat64(file, &status));
	BLOCK(fstat64(fd, &status));
	BLOCK(fstatat64(AT_FDCWD, name, &status, 0));
#if defined(__x86_64__)
	BLOCK(__xstat64(1, name, &status));
	BLOCK(__lxstat64(1, file, &status));
	BLOCK(__fxstat64(1, fd, &status));
	BLOCK(__fxstatat64(1, AT_FDCWD, name, &status, 0));
#endif
	static const unsigned masks[] = { STATX_BASIC_STATS, STATX_TYPE, STATX_SIZE, 0, STATX_ALL };
	for (size_t i = 0; i < sizeof masks / sizeof *masks; i++) {
		struct statx extended;
		CHECK(statx(AT_FDCWD, name, 0, masks[i], &extended) == 0, "mask %#x", masks[i]);
		CHECK(S_ISBLK(extended.stx_mode) && extended.stx_size == 0, "mask %#x", masks[i]);
		CHECK(makedev(extended.stx_rdev_major, extended.stx_rdev_minor) == number, "mask %#x", masks[i]);
		CHECK(statx(fd, "", AT_EMPTY_PATH, masks[i], &extended) == 0 && S_ISBLK(extended.stx_mode), "mask %#x",
		      masks[i]);
	}
}

/* Each way to open it for writing, and to empty it. */
#define KEEPS(call)                                                                     \
	do {                                                                            \
		errno = 4711;                                                           \
		int opened = (call);                                                    \
		CHECK(opened >= 0 && errno == 4711, "%d", opened);                      \
		CHECK(lseek(opened, 0, SEEK_END) == (off_t)bytes, "emptied");           \
		CHECK(disk_size(opened) == (int64_t)bytes, "not listed");               \
		CHECK((fcntl(opened, F_GETFL) & O_ACCMODE) != O_RDONLY, "not writable"); \
		close(opened);                                                          \
	} while (0)

static void opened_whole(void)
{
	const int flags = O_WRONLY | O_CREAT | O_TRUNC;
	const char *paths[] = { name, file };
	for (int i = 0; i < 2; i++) {
		KEEPS(open(paths[i], flags, 0600));
		KEEPS(open64(paths[i], flags, 0600));
		KEEPS(__open(paths[i], flags, 0600));
		KEEPS(__open64(paths[i], flags, 0600));
		KEEPS(openat(AT_FDCWD, paths[i], flags, 0600));
		KEEPS(openat64(99, paths[i], flags, 0600));
		KEEPS(__open_2(paths[i], O_RDWR | O_TRUNC));
		KEEPS(__open64_2(paths[i], O_RDWR | O_TRUNC));
		KEEPS(__openat_2(AT_FDCWD, paths[i], O_RDWR | O_TRUNC));
		KEEPS(__openat64_2(AT_FDCWD, paths[i], O_RDWR | O_TRUNC));
		KEEPS(creat(paths[i], 0600));
		KEEPS(creat64(paths[i], 0600));
		KEEPS(fileno(fopen(paths[i], "w")));
		KEEPS(fileno(fopen64(paths[i], "w+be")));
		KEEPS(fileno(freopen(paths[i], "w", fopen("/dev/null", "r"))));
		KEEPS(fileno(freopen64(paths[i], "wb", fopen("/dev/null", "r"))));
		CHECK(truncate(paths[i], 0) == -1 && errno == EINVAL, "truncate");
		CHECK(truncate64(paths[i], 1 << 30) == -1 && errno == EINVAL, "truncate64");
	}
	/* A relative path names it as well. */
	char *folder = strdup(file), *slash = strrchr(folder, '/');
	*slash = 0;
	int dir = open(folder, O_PATH | O_DIRECTORY);
	KEEPS(openat(dir, slash + 1, O_RDWR | O_TRUNC));
	int fd = open(name, O_RDWR);
	CHECK(ftruncate(fd, 0) == -1 && errno == EINVAL, "ftruncate");
	CHECK(ftruncate64(fd, 0) == -1 && errno == EINVAL, "ftruncate64");
	CHECK(fopen(name, "wx") == NULL && errno == EEXIST, "an exclusive open");
	close(fd);
	close(dir);
}

static void spawned(void)
{
	posix_spawn_file_actions_t actions;
	pid_t child;
	int status;
	char *arguments[] = { "printf", "hello", NULL };
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 1, name, O_WRONLY | O_TRUNC, 0);
	CHECK(posix_spawnp(&child, "printf", &actions, NULL, arguments, environ) == 0, "spawn");
	CHECK(waitpid(child, &status, 0) == child && status == 0, "status %#x", status);
	int fd = open(name, O_RDONLY);
	char text[5];
	CHECK(read(fd, text, 5) == 5 && !memcmp(text, "hello", 5), "the child wrote");
	CHECK(lseek(fd, 0, SEEK_END) == (off_t)bytes, "emptied");
	close(fd);
}

/* A descriptor that came by a socket. */
static int passed(int fd)
{
	int ends[2], got = -1;
	char byte = 0;
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof control };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	*header = (struct cmsghdr){ CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS };
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
	sendmsg(ends[0], &message, 0);
	recvmsg(ends[1], &message, 0);
	memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof got);
	close(ends[0]);
	close(ends[1]);
	return got;
}

static void known_however_it_came(int fd)
{
	int64_t size = bytes;
	CHECK(disk_size(dup(fd)) == size, "dup");
	CHECK(disk_size(dup2(fd, 50)) == size, "dup2");
	CHECK(disk_size(dup3(fd, 51, O_CLOEXEC)) == size, "dup3");
	CHECK(disk_size(fcntl(fd, F_DUPFD, 60)) == size, "F_DUPFD");
	CHECK(disk_size(passed(fd)) == size, "SCM_RIGHTS");
	CHECK(disk_size(fileno(fopen(file, "r"))) == size, "fopen");
	char path[64];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	CHECK(disk_size(open(path, O_RDONLY)) == size, "%s", path);
	int status, own = -1;
	pid_t child = vfork();
	if (child == 0)
		_exit(disk_size(own = open(name, O_RDONLY)) != size);
	CHECK(waitpid(child, &status, 0) == child && status == 0, "vfork");
	CHECK(disk_size(own) == -1 && errno == EBADF, "the child's descriptor is not the parent's");
	child = fork();
	if (child == 0)
		_exit(disk_size(fd) != size);
	CHECK(waitpid(child, &status, 0) == child && status == 0, "fork");
	/* The number of a closed descriptor means nothing. */
	dup2(open("/dev/null", O_RDWR), 50);
	CHECK(disk_size(50) == -1 && errno == ENOTTY, "a number used again");
}

/* A name that is linked to another disk leads there once it is opened. */
static void linked_again(const char *other)
{
	struct stat status;
	int old = open(name, O_RDONLY), fresh;
	unlink(name);
	CHECK(symlink(other, name) == 0, "%s", name);
	CHECK(disk_size(old) == (int64_t)bytes, "it stays until the name is opened");
	fresh = open(name, O_RDWR);
	off_t size = lseek(fresh, 0, SEEK_END);
	CHECK(size > 0 && size != (off_t)bytes && disk_size(fresh) == size, "%ld", (long)size);
	CHECK(stat(other, &status) == 0 && status.st_rdev == number, "the number follows from the name");
	CHECK(stat(file, &status) == 0 && S_ISREG(status.st_mode), "the old file is a file again");
	CHECK(disk_size(old) == -1 && errno == ENOTTY, "and no disk");
}

int main(int count, char **arguments)
{
	if (count != 5)
		return 2;
	name = arguments[1];
	file = arguments[2];
	bytes = strtoull(arguments[3], NULL, 10);
	int fd = open(name, O_RDONLY);
	described_alike(fd);
	described_alike_64(fd);
	opened_whole();
	spawned();
	known_however_it_came(fd);
	linked_again(arguments[4]);
	return failures != 0;
}
