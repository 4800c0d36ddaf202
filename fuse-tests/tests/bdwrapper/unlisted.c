/*
 * Prints results, bytes and errno of every wrapped function for files that are not listed. The test compares the output
 * with and without libvmware-bdwrapper.
 *
 *   unlisted FOLDER DEVICE
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <scsi/sg.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__x86_64__)
/* What a binary from before glibc 2.33 calls. */
#define OLD(name) __asm__(".symver " #name ", " #name "@GLIBC_2.2.5")
OLD(__xstat);
OLD(__lxstat);
OLD(__fxstat);
OLD(__xstat64);
extern int __xstat(int, const char *, struct stat *);
extern int __lxstat(int, const char *, struct stat *);
extern int __fxstat(int, int, struct stat *);
extern int __xstat64(int, const char *, struct stat64 *);
#endif
extern int __open_2(const char *, int);
extern int __open64_2(const char *, int);
extern int __openat_2(int, const char *, int);
extern int __openat64_2(int, const char *, int);

/* Prints a result and errno, and sets errno to a value that no call leaves by chance. */
static long show(const char *what, long result)
{
	printf("%s: %ld, errno %d\n", what, result, errno);
	errno = 4711;
	return result;
}
#define SHOW(call) show(#call, call)

static void show_bytes(const char *what, const void *bytes, size_t len)
{
	uint64_t hash = 14695981039346656037u;
	for (size_t i = 0; i < len; i++)
		hash = (hash ^ ((const unsigned char *)bytes)[i]) * 1099511628211u;
	printf("%s: bytes %016llx\n", what, (unsigned long long)hash);
}

/* Times differ between two runs, and so do the numbers that a file system gives a file and the kernel a file system. */
static void show_status(const char *what, struct stat *status)
{
	status->st_dev = status->st_ino = status->st_blocks = 0;
	memset(&status->st_atim, 0, sizeof status->st_atim);
	memset(&status->st_mtim, 0, sizeof status->st_mtim);
	memset(&status->st_ctim, 0, sizeof status->st_ctim);
	show_bytes(what, status, sizeof *status);
}

static void status_of(const char *path)
{
	struct stat status;
	struct statx extended;
	memset(&status, 0xee, sizeof status);
	SHOW(stat(path, &status));
	show_status("stat", &status);
	SHOW(stat64(path, (struct stat64 *)&status));
	SHOW(lstat(path, &status));
	show_status("lstat", &status);
	SHOW(lstat64(path, (struct stat64 *)&status));
	SHOW(fstatat(AT_FDCWD, path, &status, AT_SYMLINK_NOFOLLOW));
	SHOW(fstatat64(AT_FDCWD, path, (struct stat64 *)&status, 0));
	show_status("fstatat64", &status);
	SHOW(fstatat(AT_FDCWD, path, &status, 0x40000000));
#if defined(__x86_64__)
	SHOW(__xstat(1, path, &status));
	SHOW(__xstat(99, path, &status));
	SHOW(__lxstat(1, path, &status));
	SHOW(__xstat64(1, path, (struct stat64 *)&status));
	show_status("__xstat64", &status);
#endif
	memset(&extended, 0, sizeof extended);
	SHOW(statx(AT_FDCWD, path, 0, STATX_TYPE | STATX_MODE | STATX_SIZE | STATX_INO, &extended));
	printf("statx: %o %llu %u:%u\n", extended.stx_mode, (unsigned long long)extended.stx_size,
	       extended.stx_rdev_major, extended.stx_rdev_minor);
	SHOW(statx(AT_FDCWD, path, 0, 0x80000000, &extended));
}

/* Ioctls that are answered for a listed disk, and one that never is. */
static void ioctls_of(int fd)
{
	static const unsigned long numbers[] = { BLKROGET, BLKGETSIZE, BLKFLSBUF, BLKRAGET, BLKSSZGET, BLKBSZGET,
		BLKGETSIZE64, BLKIOMIN, BLKIOOPT, BLKALIGNOFF, BLKPBSZGET, 0x0301, 0x030d, 0x031f, SG_GET_VERSION_NUM,
		SG_IO, 0x5382, 0x5386, BLKDISCARDZEROES, FIONREAD, 0x12345678 };
	unsigned char room[2048];
	for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
		memset(room, 0, sizeof room);
		printf("%#lx ", numbers[i]);
		SHOW(ioctl(fd, numbers[i], room));
		show_bytes("ioctl", room, sizeof room);
		SHOW(ioctl(fd, numbers[i], NULL));
	}
}

static void descriptors_of(int fd)
{
	struct stat status;
	SHOW(fstat(fd, &status));
	show_status("fstat", &status);
	SHOW(fstat64(fd, (struct stat64 *)&status));
#if defined(__x86_64__)
	SHOW(__fxstat(1, fd, &status));
#endif
	SHOW(dup(fd));
	SHOW(dup2(fd, 50));
	SHOW(dup3(fd, 51, O_CLOEXEC));
	SHOW(dup3(fd, fd, 0));
	SHOW(fcntl(fd, F_DUPFD, 60));
	SHOW(fcntl(fd, F_DUPFD_CLOEXEC, 61));
	SHOW(fcntl(fd, F_GETFL));
	SHOW(fcntl(fd, F_SETFD, FD_CLOEXEC));
	SHOW(fcntl(fd, F_GETFD));
	struct flock lock = { .l_type = F_WRLCK };
	SHOW(fcntl(fd, F_GETLK, &lock));
	SHOW(fcntl64(fd, 9999));
	SHOW(ftruncate(fd, -1));
	for (int other = 50; other <= 61; other++)
		SHOW(close(other));
	ioctls_of(fd);
}

static void size_of(const char *path)
{
	struct stat status;
	printf("size: %ld\n", stat(path, &status) ? -1 : (long)status.st_size);
}

static void fill(const char *path)
{
	FILE *file = fopen(path, "w");
	fputs("0123456789", file);
	fclose(file);
	size_of(path);
}

static void truncations_of(const char *path)
{
	fill(path);
	SHOW(truncate(path, 5));
	size_of(path);
	SHOW(truncate64(path, 4));
	SHOW(truncate(path, -1));
	int fd = SHOW(open(path, O_RDWR));
	SHOW(ftruncate(fd, 3));
	SHOW(ftruncate64(fd, 2));
	size_of(path);
	SHOW(close(fd));
	fill(path);
	SHOW(close(SHOW(open64(path, O_WRONLY | O_TRUNC))));
	size_of(path);
	fill(path);
	SHOW(close(SHOW(__openat64_2(AT_FDCWD, path, O_WRONLY | O_TRUNC))));
	size_of(path);
	fill(path);
	SHOW(close(SHOW(creat(path, 0600))));
	size_of(path);
	SHOW(close(SHOW(open("fresh", O_WRONLY | O_CREAT | O_TRUNC, 0600))));
	SHOW(unlink("fresh"));
	fill(path);
	FILE *file = freopen(path, "w", fopen(path, "r"));
	size_of(path);
	SHOW(fclose(file));
}

static void opens_of(const char *path)
{
	SHOW(close(SHOW(open(path, O_RDONLY))));
	SHOW(close(SHOW(open64(path, O_RDONLY | O_NOFOLLOW))));
	SHOW(close(SHOW(openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY))));
	SHOW(close(SHOW(openat64(99, path, O_RDONLY))));
	SHOW(close(SHOW(__open_2(path, O_RDONLY))));
	SHOW(close(SHOW(__open64_2(path, O_RDONLY))));
	SHOW(close(SHOW(__openat_2(AT_FDCWD, path, O_RDONLY))));
	FILE *file = fopen(path, "re");
	SHOW(file != NULL);
	if (file)
		SHOW(fclose(file));
}

static void wrong_arguments(void)
{
	char *volatile none = NULL, *volatile wrong = (char *)16;
	struct stat status;
	SHOW(open(none, O_RDONLY));
	SHOW(open(wrong, O_WRONLY | O_CREAT | O_TRUNC, 0600));
	SHOW(creat(none, 0600));
	SHOW(truncate(wrong, 0));
	SHOW(stat(none, &status));
	SHOW(stat("/", (struct stat *)wrong));
	SHOW(fstatat(AT_FDCWD, wrong, &status, 0));
	SHOW(ftruncate(-1, 0));
	SHOW(close(-1));
	SHOW(dup(-1));
	SHOW(dup2(0, -1));
	SHOW(fcntl(-1, F_GETFL));
	SHOW(ioctl(-1, BLKGETSIZE64, none));
	SHOW(close_range(200, 100, 0));
	SHOW(close_range(900, 950, 0));
}

/* A thread that waits in open() is cancelled: the stack unwinds through the wrapper. */
static void *blocked(void *path)
{
	pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, NULL);
	open(path, O_RDONLY);
	return NULL;
}

static void cancellation(const char *path)
{
	pthread_t thread;
	void *result;
	unlink(path);
	mkfifo(path, 0600);
	SHOW(pthread_create(&thread, NULL, blocked, (void *)path));
	SHOW(pthread_cancel(thread));
	SHOW(pthread_join(thread, &result));
	SHOW(result == PTHREAD_CANCELED);
	unlink(path);
}

static void children(const char *path)
{
	pid_t child = vfork();
	if (child == 0) {
		int fd = open(path, O_RDONLY);
		dup2(fd, 70);
		close(fd);
		_exit(ioctl(70, BLKGETSIZE64, &fd) == -1 ? errno & 127 : 99);
	}
	int status;
	waitpid(child, &status, 0);
	printf("vfork: %d\n", status);
	posix_spawn_file_actions_t actions;
	posix_spawn_file_actions_init(&actions);
	SHOW(posix_spawn_file_actions_addopen(&actions, 1, path, O_WRONLY | O_TRUNC, 0));
	char *arguments[] = { "echo", "hello", NULL }, *environment[] = { NULL };
	fflush(stdout);
	SHOW(posix_spawn(&child, "/bin/echo", &actions, NULL, arguments, environment));
	waitpid(child, &status, 0);
	printf("spawn: %d\n", status);
	size_of(path);
}

int main(int count, char **arguments)
{
	if (count != 3 || chdir(arguments[1]))
		return 2;
	fill("file");
	symlink("file", "link");
	mkdir("folder", 0700);
	const char *paths[] = { "file", "link", "folder", "missing", "/dev/null", arguments[2] };
	errno = 4711;
	for (int i = 0; i < 6; i++) {
		printf("== %s\n", paths[i]);
		opens_of(paths[i]);
		status_of(paths[i]);
		int fd = open(paths[i], O_RDONLY);
		descriptors_of(fd);
		close(fd);
	}
	truncations_of("file");
	wrong_arguments();
	children("file");
	cancellation("fifo");
	return 0;
}
