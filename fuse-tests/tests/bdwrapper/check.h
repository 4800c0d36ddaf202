/* Checks of the C programs of these tests: print what fails, and count it. */
#include <errno.h>
#include <stdio.h>

static int failures;

#define CHECK(condition, ...)                                                               \
	do {                                                                                \
		if (!(condition)) {                                                         \
			__atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);                 \
			printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);              \
			printf(__VA_ARGS__);                                                \
			printf(" (errno %d)\n", errno);                                     \
		}                                                                           \
	} while (0)
