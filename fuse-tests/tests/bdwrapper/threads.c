/*
 * Opens, duplicates, passes through vfork children and closes descriptors at random in several threads, and compares each
 * with a model: what the descriptor was opened as. Run under LD_PRELOAD:
 *
 *   threads NAME SIZE UNLISTED ROUNDS
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { THREADS = 8, HELD = 16 };

static const char *listed, *unlisted;
static int64_t size;
static int rounds;

/* Checks a descriptor against the model. A thread's errno must be its own. */
static void check(int fd, int is_listed)
{
	uint64_t answer = 0;
	struct stat status;
	errno = 4711;
	int result = ioctl(fd, BLKGETSIZE64, &answer);
	if (is_listed)
		CHECK(result == 0 && (int64_t)answer == size && errno == 4711, "descriptor %d: %d", fd, result);
	else
		CHECK(result == -1 && errno == ENOTTY && answer == 0, "descriptor %d: %d", fd, result);
	CHECK(fstat(fd, &status) == 0 && S_ISBLK(status.st_mode) == is_listed, "descriptor %d: %o", fd, status.st_mode);
}

/* A vfork child shares the memory of all threads, but has descriptors of its own. */
static void in_child(int fd, int is_listed, unsigned *seed)
{
	int with_own = rand_r(seed) % 2, status;
	pid_t child = vfork();
	if (child == 0) {
		uint64_t answer;
		int own = with_own ? open(listed, O_RDONLY) : dup(fd);
		int result = ioctl(own, BLKGETSIZE64, &answer);
		close(own);
		close(fd);
		_exit((result == 0) != (with_own || is_listed));
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0, "vfork");
}

static void *run(void *argument)
{
	unsigned seed = (unsigned)(uintptr_t)argument;
	int held[HELD], is_listed[HELD];
	memset(held, -1, sizeof held);
	for (int round = 0; round < rounds; round++) {
		int i = rand_r(&seed) % HELD, from = rand_r(&seed) % HELD;
		if (held[i] < 0 && (held[from] < 0 || rand_r(&seed) % 2)) {
			is_listed[i] = rand_r(&seed) % 2;
			held[i] = open(is_listed[i] ? listed : unlisted, O_RDWR | (rand_r(&seed) % 2 ? O_CLOEXEC : 0));
		} else if (held[i] < 0) {
			is_listed[i] = is_listed[from];
			held[i] = rand_r(&seed) % 2 ? dup(held[from]) : fcntl(held[from], F_DUPFD, 100);
		} else if (held[from] >= 0 && from != i && rand_r(&seed) % 3 == 0) {
			is_listed[i] = is_listed[from];
			CHECK(dup2(held[from], held[i]) == held[i], "dup2");
		} else if (rand_r(&seed) % 8 == 0) {
			in_child(held[i], is_listed[i], &seed);
		} else if (rand_r(&seed) % 2) {
			CHECK(close(held[i]) == 0, "close");
			held[i] = -1;
		}
		if (held[i] >= 0)
			check(held[i], is_listed[i]);
	}
	return NULL;
}

int main(int count, char **arguments)
{
	if (count != 5)
		return 2;
	listed = arguments[1];
	size = atoll(arguments[2]);
	unlisted = arguments[3];
	rounds = atoi(arguments[4]);
	pthread_t threads[THREADS];
	for (uintptr_t i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, run, (void *)(i + 1));
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	return failures != 0;
}
